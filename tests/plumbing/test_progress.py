"""plumbing.progress: whole lines in a log, tqdm's own bar on a terminal, silence elsewhere."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from plumbing import progress as module
from plumbing.progress import LogProgress, progress


class Stream(io.StringIO):
    """Stands for stderr, on a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """stderr(terminal) -> the stream that bars write to from then on."""

    def replace(terminal):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def go_through(bar, items=5, seconds=0.02):
    for _ in bar:
        time.sleep(seconds)
    assert bar.n == items


def test_a_log_gets_whole_lines(stderr, monkeypatch):
    """One after each interval, with what is done and how long the rest takes."""
    monkeypatch.setattr(module, "LOG_SECONDS", 0.01)
    stream = stderr(terminal=False)
    bar = progress(range(5), "smp-s", total=5)
    bar.set_postfix({"loss": "0.500"}, refresh=False)
    go_through(bar)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 1 <= len(lines) <= 6
    for line in lines:
        assert line.startswith("smp-s: ") and " of 5 after 00:0" in line and ", about " in line
        assert line.endswith(" left, loss=0.500")


def test_a_short_loop_says_nothing_in_a_log(stderr, capsys):
    stream = stderr(terminal=False)
    bar = progress(range(5), "evaluating", leave=True)
    assert isinstance(bar, LogProgress)
    for _ in bar:
        bar.set_postfix({"loss": "0.5"}, refresh=False)
    bar.write("step 5  dev accuracy 0.5")
    bar.close()
    assert stream.getvalue() == ""
    assert capsys.readouterr().out == "step 5  dev accuracy 0.5\n"


def test_a_terminal_gets_tqdms_bar(stderr):
    stream = stderr(terminal=True)
    bar = progress(range(5), "smp-s", leave=True, mininterval=0)
    assert type(bar) is tqdm
    go_through(bar, seconds=0)
    assert "\rsmp-s: " in stream.getvalue() and "5/5" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(stderr, monkeypatch, as_process, terminal):
    monkeypatch.setattr(module, "LOG_SECONDS", 0)
    as_process(1, 2)
    stream = stderr(terminal)
    assert list(progress(range(5), "smp-s", mininterval=0) if terminal else progress(range(5)))
    assert stream.getvalue() == ""
