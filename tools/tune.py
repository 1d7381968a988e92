"""Tune every method with the same budget, on training rows that were held out: no row of dev takes part.

Of each row of ROWS, ten settings are drawn from its grid and tried with one seed on two tasks. The three with the
highest mean get two more seeds; the highest mean over all is chosen, and stands in CHOSEN of tools/lists.py. What it is
worth, `python -m tools.experiments run main` tells, on dev and with seeds that chose nothing.

    python -m tools.split movies ~/.cache/smp/glue/movies/train.tsv held --dev 1500
    python -m tools.split mrpc ~/.cache/smp/glue/MRPC/train.tsv held --dev 600
    python -m tools.tune run --at-once 6                # a few hours on one GPU
    python -m tools.tune table
"""

import itertools
import random
import statistics
from pathlib import Path

from plumbing.cli import Parser, count, one_line_errors
from tools.experiments import ROOT, RUNS, make_missing, read_lines
from tools.lists import EQUAL_STEPS, arguments, words

SETTINGS = 10  # of each row
FINALISTS = 3  # get more seeds
SEEDS = (0, 1, 2)
TASKS = ("movies", "mrpc")
HELD = "held"  # --data-dir

DENSE = {"weight_lr": (5e-5, 1e-4, 2e-4, 4e-4), "warmup": (0, 0.1), "dropout": (True, False)}
GRADUAL = {"ramp": (0.5, 0.7, 0.9), "hold": (0, 0.2), "schedule": ("cubic", "linear")}
RIVAL = DENSE | GRADUAL
SCORES = GRADUAL | {"lr": (1e-2, 2e-2, 4e-2), "penalty": (200, 400, 800), "warmup": (0, 0.1), "dropout": (True, False)}
SMP_S = SCORES | {"temperature": (1, 4)}
BIAS = SMP_S | {"weight_lr": (3e-4, 1e-3, 3e-3)}
GATES = DENSE | {"lr": (5e-3, 1e-2, 2e-2)}  # of these, lambda decides how many weights stay

# What train.py's --method is, with flags that it always has -> {sparsity: grid}
ROWS = {
    "finetune": {None: DENSE},
    "finetune --head=classifier": {None: DENSE},
    "magnitude": {0.5: RIVAL, 0.9: RIVAL},
    "movement": {0.5: RIVAL, 0.9: RIVAL},
    "soft-movement": {0.5: GATES | {"penalty": (50, 100, 200, 400)}, 0.9: GATES | {"penalty": (800, 1600, 3200)}},
    "l0": {0.5: GATES | {"penalty": (25, 50, 100, 200)}, 0.9: GATES | {"penalty": (100, 200, 400, 800)}},
    "ticket": {0.5: DENSE, 0.9: DENSE},
    "smp-l": {0.5: SCORES, 0.9: SCORES},
    "smp-s": {0.5: SMP_S, 0.9: SMP_S},
    "smp-w": {0.5: SMP_S, 0.9: SMP_S},
    "smp-bias": {0.5: BIAS, 0.9: BIAS},
    "smp-signed": {0.5: SCORES, 0.9: SCORES},
    "smp-2:4": {0.5: SCORES},
}
CELLS = [(row, sparsity) for row, grids in ROWS.items() for sparsity in grids]


def settings(row, sparsity):
    """The settings of a cell that are tried, {flag: value}, always the same."""
    grid = ROWS[row][sparsity]
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return random.Random(f"{row} {sparsity}").sample(every, SETTINGS)


def command(task, row, sparsity, seed, flags):
    steps = EQUAL_STEPS[task]
    return f"python train.py {arguments(task, row, sparsity, seed, steps, flags)} --data-dir={HELD}"


def mean(done, row, sparsity, flags, seeds):
    """Mean over tasks and seeds of what {command: accuracy} has for a setting; None if a run is missing."""
    wanted = [command(task, row, sparsity, seed, flags) for task in TASKS for seed in seeds]
    if not done.keys() >= set(wanted):
        return None
    return statistics.mean(done[name] for name in wanted)


def ranked(done, row, sparsity, tried, seeds):
    """[(mean, flags)] of those that are tried and done, the best first."""
    found = [(mean(done, row, sparsity, flags, seeds), flags) for flags in tried]
    return sorted((one for one in found if one[0] is not None), key=lambda one: -one[0])


def finalists(done, row, sparsity):
    return [flags for _, flags in ranked(done, row, sparsity, settings(row, sparsity), SEEDS[:1])[:FINALISTS]]


def chosen(done, row, sparsity):
    """(mean, flags) of the setting that tuning prefers. Raises ValueError if runs are missing."""
    found = ranked(done, row, sparsity, finalists(done, row, sparsity), SEEDS)
    if len(found) < FINALISTS:
        raise ValueError(f"runs of {row} are missing; make them with: python -m tools.tune run")
    return found[0]


def first_round():
    for seed_of_all, (row, sparsity) in itertools.product(SEEDS[:1], CELLS):
        for flags, task in itertools.product(settings(row, sparsity), TASKS):
            yield command(task, row, sparsity, seed_of_all, flags)


def second_round(done):
    for row, sparsity in CELLS:
        for flags, task, seed in itertools.product(finalists(done, row, sparsity), TASKS, SEEDS[1:]):
            yield command(task, row, sparsity, seed, flags)


def read_done(folder):
    """{command: final accuracy} of the runs that tuning made."""
    lines = read_lines(folder / RUNS)
    return {line["command"]: line["final"]["accuracy"] for line in lines if f"--data-dir={HELD}" in line["command"]}


def table(done):
    """Markdown: what every row had to choose from, how many runs it got, what was chosen and how well that did."""
    rows = [["method", "sparsity", "its grid has", "tried", "runs", "chosen", "held-out accuracy"], ["---"] * 7]
    for row, sparsity in CELLS:
        value, flags = chosen(done, row, sparsity)
        every = 1
        for values in ROWS[row][sparsity].values():
            every *= len(values)
        runs = len(TASKS) * (SETTINGS + FINALISTS * len(SEEDS[1:]))
        cells = [row, str(sparsity or 0), str(every), str(SETTINGS), str(runs), f"`{' '.join(words(flags))}`"]
        rows.append([*cells, f"{100 * value:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@one_line_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.tune", description="Tune every method with the same budget.")
    parser.add_argument("do", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="FOLDER", help=f"of {RUNS} (results)")
    parser.add_argument("--at-once", type=count, default=1, help="runs at a time, on all GPUs (1)")
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after so long; finished runs are kept")
    parser.add_argument("--model", metavar="FOLDER", help="run: where MiniLM stands here")
    args = parser.parse_args(argv)
    if args.do == "run":
        machine = words({"model": args.model})
        make_missing("the first round", list(first_round()), args.results, args.at_once, args.seconds, machine)
        second = list(second_round(read_done(args.results)))
        make_missing("the second round", second, args.results, args.at_once, args.seconds, machine)
    else:
        print(table(read_done(args.results)))


if __name__ == "__main__":
    main()
