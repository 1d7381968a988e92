"""plumbing.progress: whole lines in a log, tqdm's own bar on a terminal, silence elsewhere."""

import io
import re
import sys

import pytest
from tqdm import tqdm

from plumbing import progress as module
from plumbing.progress import Clock, LogProgress, progress


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


def go_through(bar, items=5):
    for _ in bar:
        pass
    assert bar.n == items


def test_a_log_gets_whole_lines(stderr, monkeypatch):
    """One after each interval, here after each step, with what is done and how long the rest takes.

    One more stands before the first step.
    """
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    stream = stderr(terminal=False)
    bar = progress(range(5), "smp-s", total=5)
    bar.set_postfix({"loss": "0.500"}, refresh=False)
    go_through(bar)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    _, *lines = text.splitlines()
    assert len(lines) >= 5
    for number, line in enumerate(lines[:5], 1):
        found = rf"smp-s: {number} of 5 after \d\d:\d\d, about \S+ left, loss=0.500"
        assert re.fullmatch(found, line)


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
    assert isinstance(bar, tqdm) and not isinstance(bar, LogProgress)
    go_through(bar)
    assert "\rsmp-s: " in stream.getvalue() and "5/5" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(stderr, monkeypatch, as_process, terminal):
    monkeypatch.setattr(module, "LOG_SECONDS", 0)
    as_process(1, 2)
    stream = stderr(terminal)
    assert list(progress(range(5), "smp-s", mininterval=0) if terminal else progress(range(5)))
    assert stream.getvalue() == ""


def test_what_is_left_by_hand():
    """Steps that are left as the recent ones, and evaluations that are left as the last one."""
    clock = Clock(total=10, done=2, pauses={5, 10}, pause=4.0)
    assert clock.left(2) is None
    clock.add(3, seconds=2.0)
    assert clock.left(3) == (7 + 2 * 4) * 2  # the guess: four steps each
    clock.add(4, seconds=4.0)
    assert clock.left(4) == (6 + 2 * 4) * 3
    clock.add(5, seconds=9.0)  # a step of 3 and an evaluation of 6
    assert clock.left(5) == (5 + 1 * 2) * 3
    assert clock.left(10) == 0
    # Only recent steps count, so that a machine may become slower.
    clock = Clock(total=1000)
    for step in range(1, 501):
        clock.add(step, seconds=1.0 if step <= 400 else 3.0)
    assert clock.left(500) == 500 * 3


def test_a_bar_tells_what_its_clock_says(stderr, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    stream = stderr(terminal=False)
    clock = Clock(total=1000, done=996)
    monkeypatch.setattr(clock, "left", lambda done: 25.0 * (1000 - done))
    go_through(progress(range(4), "smp-s", clock=clock), items=1000)
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith("smp-s: 997 of 1000 ") and "about 01:15 left" in lines[1]
    assert lines[-1].startswith("smp-s: 1000 of 1000 ") and "about 00:00 left" in lines[-1]


def test_a_finished_bar_tells_its_mean_speed(stderr):
    bar = progress(range(4), "smp-s", clock=Clock(total=4))
    assert bar.format_dict["rate"] is None  # tqdm then takes the mean
    bar.clock.add(4, seconds=2.0)
    bar.n = 4
    assert bar.format_dict["rate"] is None
    bar.n = 2
    assert bar.format_dict["rate"] == 0.5
