"""The page in real headless Chromium: hostile text stays text; sorting, filters, themes, sizes."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.reports.synthetic import HOSTILE, SEEN, hostile_word

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
SWITCHES = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One session for all tests."""
    if not (CHROMIUM.exists() and DRIVER.exists()):
        if os.environ.get("TAILRISK_REQUIRE_CHROMIUM"):
            pytest.fail(f"{CHROMIUM} and {DRIVER} are required and missing")
        pytest.skip(f"{CHROMIUM} or {DRIVER} is missing")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for switch in (*SWITCHES, f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def visit(browser, tmp_path_factory):
    """Opens a page, from a file, after forgetting what earlier ones did."""
    folder = tmp_path_factory.mktemp("pages")

    def go(page, *, theme="light", width=1280, script=True):
        path = folder / f"{len(list(folder.iterdir()))}.html"
        path.write_text(page, encoding="utf-8")
        for command, values in (
            ("setEmulatedMedia",
             {"media": "", "features": [{"name": "prefers-color-scheme", "value": theme}]}),
            ("setDeviceMetricsOverride",
             {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}),
            ("setScriptExecutionDisabled", {"value": not script}),
        ):  # fmt: skip
            browser.execute_cdp_cmd(f"Emulation.{command}", values)
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())

    return go


def run_script(browser, script):
    return browser.execute_script(f"return {script}")


def trouble(browser):
    """Dialogs, globals, console messages and requests that the page gave rise to."""
    from selenium.common.exceptions import NoAlertPresentException

    found = []
    try:
        found.append(f"dialog: {browser.switch_to.alert.text}")
        browser.switch_to.alert.dismiss()
    except NoAlertPresentException:
        pass
    if run_script(browser, "typeof window.pwned") != "undefined":
        found.append("a global is set")
    found += [entry["message"] for entry in browser.get_log("browser")]
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return found + [f"request: {url}" for url in urls[1:] if not url.startswith("data:")]


def elements(browser):
    return Counter(
        run_script(browser, "Array.from(document.querySelectorAll('*'), (e) => e.localName)")
    )


def column(browser, number):
    """The shown cells of a column of the table, from the top."""
    return run_script(
        browser,
        "Array.from(document.querySelectorAll('#queries tbody tr:not([hidden])'),"
        f" (row) => row.cells[{number}].dataset.value ?? row.cells[{number}].textContent)",
    )


def test_hostile_text_is_shown_as_it_is_and_does_nothing(run, plain, hostile, browser, visit):
    visit(plain)
    wanted = elements(browser)
    visit(hostile)
    run_script(browser, "document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert trouble(browser) == []
    assert elements(browser) == wanted
    ids = run_script(
        browser, "Array.from(document.querySelectorAll('.query bdi'), (e) => e.textContent)"
    )
    for k in range(run.estimates.num_rows):
        assert (hostile_word(k) in ids) == (len(hostile_word(k)) <= 400)
    answers = run_script(
        browser, "Array.from(document.querySelectorAll('article pre'), (e) => e.textContent)"
    )
    first = 4 * run.estimates.num_rows
    written = {hostile_word(k)[:1200] for k in range(first, first + run.samples.num_rows)}
    assert len(answers) == 13 and {answer[:1200] for answer in answers} <= written
    assert SEEN in run_script(browser, "document.body.innerText")
    visit(hostile, width=400)
    assert run_script(browser, "document.documentElement.scrollWidth") <= 400


def test_were_text_not_escaped_the_policy_would_stop_it(page, browser, visit):
    """And the checks above would see it."""
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.ui import WebDriverWait

    attack = "".join(HOSTILE[:4]) + "<img src='https://example.invalid/x.png'>"
    visit(page.replace("how do i build zaggle 0 ?", attack))
    found = trouble(browser)
    asked = [one for one in found if one.startswith("request: ")]
    assert "request: https://example.invalid/x.png" in asked
    stopped = [one for one in found if one not in asked]
    assert stopped and all("Content Security Policy" in one for one in stopped)
    visit(page.replace("Content-Security-Policy", "X").replace("zaggle 0", HOSTILE[0], 1))
    WebDriverWait(browser, 60).until(alert_is_present())
    assert trouble(browser) == ["dialog: 1", "a global is set"]


def test_the_table_sorts_by_mouse_and_by_keyboard(run, page, browser, visit):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    visit(page)
    value = sorted(run.estimates["value"].to_pylist())
    heads = {head.text.split("\n")[0].rstrip("\u2191\u2193\xa0"): head
             for head in browser.find_elements(By.CSS_SELECTOR, "#queries th")}  # fmt: skip
    press = lambda name: heads[name].find_element(By.TAG_NAME, "button")  # noqa: E731
    order = lambda name: heads[name].get_attribute("aria-sort")  # noqa: E731
    assert order("estimate") == "descending"
    assert list(map(float, column(browser, 2))) == value[::-1]
    press("estimate").click()
    assert order("estimate") == "ascending"
    assert list(map(float, column(browser, 2))) == value
    press("#").send_keys(Keys.ENTER)
    assert (order("#"), order("estimate")) == ("ascending", None)
    assert column(browser, 0) == list("123456")
    press("query").send_keys(Keys.SPACE)
    press("query").send_keys(Keys.SPACE)
    assert column(browser, 0) == list("654321") and order("query") == "descending"
    for wanted in ("descending", "ascending"):  # an unknown figure comes last either way
        press("largest share").click()
        shares = column(browser, 5)
        assert shares[-1] == "nan" and order("largest share") == wanted
        known = list(map(float, shares[:-1]))
        assert known == sorted(known, reverse=wanted == "descending")
    assert trouble(browser) == []


def test_the_table_filters_by_text_and_verdict(run, page, browser, visit):
    from selenium.webdriver.common.by import By

    visit(page)
    verdicts = run.estimates["verdict"].to_pylist()
    find, shown = (browser.find_element(By.ID, name) for name in ("find", "shown"))
    assert shown.text == "6 of 6 shown"
    find.send_keys("ZAGGLE 3")
    assert column(browser, 0) == ["4"] and shown.text == "1 of 6 shown"
    find.clear()
    find.send_keys(" ")
    browser.find_element(By.CSS_SELECTOR, "#controls input[value=unusable]").click()
    left = {str(q + 1) for q, word in enumerate(verdicts) if word != "unusable"}
    assert set(column(browser, 0)) == left and 0 < len(left) < 6
    find.send_keys("nowhere")
    assert column(browser, 0) == [] and shown.text == "0 of 6 shown"


def test_without_scripts_the_table_is_whole_and_offers_no_controls(page, browser, visit):
    from selenium.webdriver.common.by import By

    visit(page, script=False)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#queries tbody tr")) == 6
    assert not browser.find_element(By.ID, "controls").is_displayed()
    assert not browser.find_elements(By.CSS_SELECTOR, "#queries button")
    answers = browser.find_elements(By.TAG_NAME, "article")
    assert answers and not any(answer.is_displayed() for answer in answers)


def test_pictures_follow_the_theme_and_the_page_fits_narrow_screens(page, browser, visit):
    fill = "getComputedStyle(document.querySelector('svg.plot {}')).fill"
    seen = []
    for theme in ("light", "dark"):
        visit(page, theme=theme, width=400)
        assert run_script(browser, "document.documentElement.scrollWidth") <= 400
        page_colour = run_script(browser, "getComputedStyle(document.body).backgroundColor")
        text, ink = run_script(
            browser, f"[{fill.format('text')}, getComputedStyle(document.body).color]"
        )
        seen.append((page_colour, text, ink, run_script(browser, fill.format("use[fill*=ok]"))))
        assert len(set(seen[-1])) > 2
    assert all(light != dark for light, dark in zip(*seen, strict=True))
    assert seen[0][3] == "rgb(35, 121, 74)"  # --ok of the light theme
    media = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert run_script(browser, "getComputedStyle(document.body).color") == seen[0][2]
