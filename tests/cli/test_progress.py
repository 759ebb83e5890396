"""Progress as a user sees it: on a terminal, in a pipe, with --quiet and --json."""

import io
import json
import os
import re
import threading

import pytest

from tailrisk_jax.cli import main, progress
from tailrisk_jax.cli.progress import Pace, follow
from tailrisk_jax.studies import Progress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A real terminal of some width in place of standard error."""

    def __init__(self, monkeypatch, columns=80):
        self._main, end = os.openpty()
        self._file = os.fdopen(end, "w")
        self._read: list[bytes] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", self._file)

    def _listen(self):
        try:
            while data := os.read(self._main, 65536):
                self._read.append(data)
        except OSError:  # the other end was closed
            return

    def close(self) -> str:
        """All that was written."""
        self._file.close()
        self._thread.join(10)
        os.close(self._main)
        return b"".join(self._read).decode()


def frames(shown):
    """Each state of the bars, without colours."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in re.split(r"\x1b\[\dA", shown)]


def steps(kept=0):
    """A run of 400, of which some were kept by an earlier session, all judged."""
    yield Progress(total=400, rounds=1)
    if kept:
        yield Progress(total=400, rounds=1, drawn=kept, judged=kept, hits=kept, risk=0.5)
    for fresh in range(50, 401 - kept, 50):
        done = kept + fresh
        told = dict(total=400, rounds=1, drawn=done, fresh=fresh, tokens=10 * fresh)
        yield Progress(**told, judged=done, hits=3, unscored=2, risk=1e-3)


@pytest.mark.parametrize("columns", [80, 200])
def test_bars_show_rates_hits_and_the_estimate_within_the_terminal(monkeypatch, columns):
    terminal = Terminal(monkeypatch, columns)
    with follow(quiet=False) as tell:
        for step in steps():
            tell(step)
    shown = terminal.close()
    last = frames(shown)[-1]
    assert "400/400" in last and "samples/s" in last and "tokens/s" in last
    assert "3 hits, 2 unscored, mean risk 1.00e-03" in last
    assert all(len(line) <= columns for line in last.splitlines())
    assert shown.rindex(SHOW) > shown.rindex(HIDE)


@pytest.mark.parametrize("bars", [True, False])
def test_a_pilot_shows_what_is_scored_and_no_risk(monkeypatch, capsys, bars):
    terminal = Terminal(monkeypatch) if bars else None
    done = dict(total=400, rounds=1, drawn=400, fresh=400, tokens=4000, judged=400, hits=7)
    with follow(quiet=False) as tell:
        for scored in (0, 3, 7):
            tell(Progress(**done, scored=scored, scoring=7 if scored else 0))
    if terminal is None:
        shown = capsys.readouterr().err.splitlines()[-1]
        assert shown.startswith("drawn 400 of 400, judged 400, scored 7 of 7, 7 hits")
    else:
        first, *_, shown = frames(terminal.close())
        assert "7/7" in shown and "400/400" in shown and "7 hits" in shown
        assert "scored" in shown and "scored" not in first
    assert "risk" not in shown


def test_an_exception_leaves_the_terminal_as_it_was(monkeypatch):
    terminal = Terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), follow(quiet=False) as tell:
        tell(Progress(total=10, rounds=1))
        raise KeyboardInterrupt
    shown = terminal.close()
    assert shown.rindex(SHOW) > shown.rindex(HIDE) and shown.endswith("\n" + SHOW)


def test_elsewhere_there_are_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with follow(quiet=False) as tell:
        for step in steps():
            tell(step)
    lines = capsys.readouterr().err.splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "drawn 0 of 400, judged 0"
    assert lines[-1].startswith("drawn 400 of 400, judged 400, 3 hits, 2 unscored, mean risk")


def test_a_pace_counts_fresh_work_alone_and_forgets_the_start():
    clock = iter(
        [30.0, 30.0, 31.0, 32.0, 33.0, 34.0, 35.0, 36.0]
    )  # 30 s of compilation, then 1 a step
    pace = Pace(0.0)
    for step in steps(kept=100):
        pace.tell(step, next(clock))
    assert pace.said() == "50 samples/s, 500 tokens/s" and pace.left() == 0
    pace.tell(Progress(total=700, rounds=2, drawn=400, fresh=300, tokens=3000, judged=400), 36.0)
    assert pace.said() == "50 samples/s, 500 tokens/s, 6 s left of round 2"


def test_a_pace_waits_for_a_slow_judge():
    pace = Pace(0.0)
    for second in range(1, 11):
        now = dict(total=1000, rounds=1, drawn=1000, fresh=1000, tokens=1)
        pace.tell(Progress(**now, judged=2 * second), float(second))
    assert pace.left() == pytest.approx(980 / 2)
    assert pace.said().endswith("8 min left")


def test_a_pace_without_time_or_work_divides_by_nothing():
    pace = Pace(5.0)
    for now in (Progress(), Progress(total=10, drawn=10, fresh=10, tokens=100, judged=10)):
        pace.tell(now, 5.0)
        assert pace.left() == 0 and "left" not in pace.said()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    (folder / "queries.jsonl").write_text('{"prompt": "how do i make a wosk ?"}')
    return lambda name, *more: [
        "estimate", "--model=organism", f"--queries={folder / 'queries.jsonl'}", "--event=mix",
        "--proposal=target@2", "--samples=24", "--max-new-tokens=8", f"--out={folder / name}",
        *more,
    ]  # fmt: skip


def test_quiet_says_nothing_and_json_one_document(command, capfd):
    main(command("quiet", "--quiet"))
    said = capfd.readouterr()
    assert said.out == said.err == ""
    main(command("json", "--json"))
    said = capfd.readouterr()
    assert json.loads(said.out)["num_samples"] == 24
    assert said.err.startswith("drawn 24 of 24, judged 24") and len(said.err.splitlines()) == 1
    main(["resume", json.loads(said.out)["run"], "--json"])
    said = capfd.readouterr()
    assert json.loads(said.out)["num_samples"] == 24 and "samples/s" not in said.err


def test_a_run_on_a_terminal_keeps_its_table_on_standard_output(command, monkeypatch):
    terminal, out = Terminal(monkeypatch), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    main(command("terminal"))
    shown = terminal.close()
    assert "24/24" in frames(shown)[-1] and shown.rindex(SHOW) > shown.rindex(HIDE)
    assert "estimate" in out.getvalue() and "24/24" not in out.getvalue()
