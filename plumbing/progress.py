"""Progress that people watch: a bar on a terminal, a line about every thirty seconds in a log.

for batch in progress(batches, "evaluating"): ...
"""

import sys

from tqdm import tqdm

from plumbing import parallel

EVERY = 30  # seconds between the lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left{postfix}"


class Lines(tqdm):
    """tqdm without a terminal: it never redraws, so that a file, a notebook or a cluster's log stays readable."""

    def display(self, msg=None, pos=None):
        if msg is None:  # "" would clear the bar
            print(self, file=self.fp, flush=True)

    def clear(self, *_, **__):
        pass

    def moveto(self, n):
        pass

    @classmethod
    def write(cls, text):
        print(text, flush=True)


def progress(items=None, name="", leave=False, **settings):
    """tqdm(items) of process 0 alone. settings: tqdm's own, such as total, initial or unit."""
    settings |= {"desc": name, "disable": parallel.rank() > 0}
    if sys.stderr.isatty():
        return tqdm(items, leave=leave, dynamic_ncols=True, **settings)
    settings |= {"delay": EVERY, "mininterval": EVERY, "maxinterval": EVERY}
    return Lines(items, leave=False, bar_format=LINE, **settings)
