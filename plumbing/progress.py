"""Progress that people watch: a bar on a terminal, or a line every thirty seconds in a log.

Only process 0 shows it.

    for batch in progress(batches, "evaluating"):
        ...
"""

import sys

from tqdm import tqdm

from plumbing import parallel

LOG_SECONDS = 30  # between the lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, about {remaining} left{postfix}"


class LogProgress(tqdm):
    """tqdm that prints whole lines and never redraws.

    Files, notebooks and a cluster's logs stay readable.
    """

    def display(self, msg=None, pos=None):
        # tqdm passes "" to clear the bar, and shows a bar that is reset at once.
        if msg is None and self.format_dict["elapsed"] >= self.delay:
            print(self, file=self.fp, flush=True)

    write = print  # tqdm's own would draw the bar again


def progress(items=None, name="", leave=False, **settings):
    """Wrap items in a progress bar that only process 0 shows.

    settings: tqdm's own, such as total, initial or unit.
    """
    settings |= {"desc": name, "disable": parallel.rank() > 0}
    if sys.stderr.isatty():
        return tqdm(items, leave=leave, **settings)
    # miniters 1: look at the clock in every step, and keep tqdm's monitor thread from printing.
    settings |= {"delay": LOG_SECONDS, "mininterval": LOG_SECONDS, "miniters": 1}
    return LogProgress(items, leave=False, bar_format=LINE, **settings)
