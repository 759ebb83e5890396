"""One run for all tests, its page, and two more pages: of plain and of hostile text."""

import pytest

from tailrisk_jax.reports import html_report
from tests.reports.synthetic import UNSEEN, hostile_word, refilled, run_record


@pytest.fixture(scope="session")
def run():
    return run_record()


@pytest.fixture(scope="session")
def page(run):
    return html_report(run)


@pytest.fixture(scope="session")
def plain(run):
    return html_report(refilled(run, lambda k: f"{k} plain", {"study.yaml": "plain"}))


@pytest.fixture(scope="session")
def hostile(run):
    return html_report(refilled(run, hostile_word, {"study.yaml": UNSEEN}))
