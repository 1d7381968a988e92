"""Progress that people watch: a bar on a terminal, or a line every thirty seconds in a log.

Only process 0 shows it.

    for batch in progress(batches, "evaluating"):
        ...
"""

import sys
import time
from collections import deque
from statistics import mean

from tqdm import tqdm

from plumbing import parallel

LOG_SECONDS = 30  # between the lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left{postfix}"


class Clock:
    """Estimates how long a loop will still take, from its recent steps and its pauses.

    total: steps. done: those before. pauses: the steps after which something longer happens, such
    as an evaluation. pause: how many steps that takes, as a guess until the first one.
    """

    def __init__(self, total, done=0, pauses=(), pause=0.0):
        self.total, self.done, self.pauses = total, done, pauses
        self.pause = pause  # in steps
        self.recent = deque(maxlen=100)  # seconds of steps without a pause

    def watch(self, items):
        """Yield the items of the loop, and measure how long it works on each."""
        before = time.monotonic()
        for done, item in enumerate(items, self.done + 1):
            yield item
            now = time.monotonic()
            self.add(done, now - before)
            before = now

    def add(self, done, seconds):
        """Step number `done` took so long, with the pause that followed it, if any."""
        if done not in self.pauses:
            self.recent.append(seconds)
        elif self.recent:
            self.pause = max(seconds / mean(self.recent) - 1, 0)

    def left(self, done):
        """The seconds that are left after step number `done`; None before anything is known."""
        if not self.recent:
            return None
        pauses = sum(step > done for step in self.pauses)
        return (self.total - done + pauses * self.pause) * mean(self.recent)


class Bar(tqdm):
    """tqdm with the estimate of a Clock, if it has one."""

    clock = None

    @property
    def format_dict(self):
        fields = super().format_dict
        left = self.clock.left(self.n) if self.clock else None
        if left:  # tqdm divides the steps that are left by this rate; at the end it shows the mean
            fields["rate"] = (self.total - self.n) / left
        return fields


class LogProgress(Bar):
    """A bar that prints whole lines and never redraws.

    Files, notebooks and a cluster's logs stay readable.
    """

    def display(self, msg=None, pos=None):
        # tqdm passes "" to clear the bar, and shows a bar that is reset at once.
        if msg is None and self.format_dict["elapsed"] >= self.delay:
            print(self, file=self.fp, flush=True)

    write = print  # tqdm's own would draw the bar again


def progress(items=None, name="", clock=None, leave=False, **settings):
    """Wrap items in a progress bar that only process 0 shows.

    clock: a Clock for the estimate of what is left. settings: tqdm's own, such as total or unit.
    """
    if clock:
        items = clock.watch(items)
        settings |= {"total": clock.total, "initial": clock.done}
    settings |= {"desc": name, "disable": parallel.rank() > 0}
    if sys.stderr.isatty():
        bar = Bar(items, leave=leave, **settings)
    else:
        # miniters 1: look at the clock in every step, and keep tqdm's monitor from printing.
        settings |= {"delay": LOG_SECONDS, "mininterval": LOG_SECONDS, "miniters": 1}
        bar = LogProgress(items, leave=False, bar_format=LINE, **settings)
    bar.clock = clock
    return bar
