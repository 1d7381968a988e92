"""Tune every method with the same budget, on training rows that were held out: no row of the tasks' dev takes part.

For each row of GRIDS, ten settings are drawn from its grid and tried with one seed on two tasks. The three with the
highest mean get two more seeds; the highest mean over all is chosen: copy it into CHOSEN of tools/lists.py. What it is
worth, `python -m tools.experiments run main` tells, on dev and with seeds that chose nothing.

From the repository's root, once both tasks have been fetched, by any run:

    python -m tools.split movies ~/.cache/smp/glue/movies/train.tsv held --dev 1500
    python -m tools.split mrpc ~/.cache/smp/glue/MRPC/train.tsv held --dev 600
    python -m tools.tune run --at-once 6                # hours on one GPU
    python -m tools.tune table
"""

import itertools
import math
import random
import statistics
from pathlib import Path

from data import split_path
from plumbing.cli import Parser, count, one_line_errors
from tools.experiments import ROOT, RUNS, make_missing, read_lines
from tools.lists import equal, words

SETTINGS = 10  # of each row
FINALISTS = 3  # get more seeds
SEEDS = (0, 1, 2)
TASKS = ("movies", "mrpc")
HELD = "held"  # --data-dir

DENSE = {"weight_lr": (5e-5, 1e-4, 2e-4, 4e-4), "warmup": (0, 0.1), "dropout": (True, False)}
GRADUAL = {"ramp": (0.5, 0.7, 0.9), "hold": (0, 0.2), "schedule": ("cubic", "linear")}
RIVAL = DENSE | GRADUAL
LATE = RIVAL | {
    "hold": (0.2, 0.3, 0.4),
    "schedule": ("linear",),
}  # movement's scores start at 0, and mean nothing yet
SCORES = GRADUAL | {
    "lr": (1e-2, 2e-2, 4e-2),
    "penalty": (200, 400, 800),
    "warmup": (0, 0.1),
    "dropout": (True, False),
}
SMP_S = SCORES | {"temperature": (1, 4)}
BIAS = SMP_S | {"weight_lr": (3e-4, 1e-3, 3e-3)}
GATES = DENSE | {"lr": (5e-3, 1e-2, 2e-2)}  # of these, lambda decides how many weights stay

# (what --method is, with flags that it always has; sparsity) -> grid
GRIDS = {
    ("finetune", None): DENSE,
    ("finetune --head=classifier", None): DENSE,
    ("magnitude", 0.5): RIVAL,
    ("magnitude", 0.9): RIVAL,
    ("movement", 0.5): RIVAL,
    ("movement", 0.9): LATE,
    ("soft-movement", 0.5): GATES | {"penalty": (50, 100, 200, 400)},
    ("soft-movement", 0.9): GATES | {"penalty": (800, 1600, 3200)},
    ("l0", 0.5): GATES | {"penalty": (25, 50, 100, 200)},
    ("l0", 0.9): GATES | {"penalty": (100, 200, 400, 800)},
    ("ticket", 0.5): DENSE,
    ("ticket", 0.9): DENSE,
    ("smp-l", 0.5): SCORES,
    ("smp-l", 0.9): SCORES,
    ("smp-s", 0.5): SMP_S,
    ("smp-s", 0.9): SMP_S,
    ("smp-w", 0.5): SMP_S,
    ("smp-w", 0.9): SMP_S,
    ("smp-bias", 0.5): BIAS,
    ("smp-bias", 0.9): BIAS,
    ("smp-2:4", 0.5): SCORES,
}


def name_of(method, sparsity):
    """A row as tools.lists names it."""
    return " ".join([method, *words({"sparsity": sparsity})])


def settings(method, sparsity):
    """What is tried of a row, each as flags on one line; always the same."""
    grid = GRIDS[method, sparsity]
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    drawn = random.Random(f"{method} {sparsity}").sample(every, SETTINGS)
    return [" ".join(words(dict(sorted(flags.items())))) for flags in drawn]


def runs(row, flags, seeds):
    """Commands of a setting, on the rows that were held out."""
    name = name_of(*row)
    return [
        f"python train.py {equal(task, name, seed, flags)} --data-dir={HELD}"
        for task in TASKS
        for seed in seeds
    ]


def ranked(done, row, tried, seeds):
    """[(mean accuracy over tasks and seeds, flags)] of the settings whose runs are all done, the best first."""
    found = []
    for flags in tried:
        commands = runs(row, flags, seeds)
        if all(command in done for command in commands):
            found.append((statistics.mean(done[command] for command in commands), flags))
    return sorted(found, key=lambda one: -one[0])


def finalists(done, row):
    return [flags for _, flags in ranked(done, row, settings(*row), SEEDS[:1])[:FINALISTS]]


def chosen(done, row):
    """(mean accuracy, flags) of the setting that tuning prefers. Raises ValueError if runs are missing."""
    found = ranked(done, row, finalists(done, row), SEEDS)
    if len(found) < FINALISTS:
        raise ValueError(
            f"runs of {name_of(*row)} are missing; make them with: python -m tools.tune run"
        )
    return found[0]


def first_round():
    return [
        command
        for row in GRIDS
        for flags in settings(*row)
        for command in runs(row, flags, SEEDS[:1])
    ]


def second_round(done):
    return [
        command
        for row in GRIDS
        for flags in finalists(done, row)
        for command in runs(row, flags, SEEDS[1:])
    ]


def read_done(folder):
    """{command: accuracy} of the runs that tuning made."""
    lines = read_lines(folder / RUNS)
    mine = [line for line in lines if line["command"].endswith(f"--data-dir={HELD}")]
    return {line["command"]: line["final"]["accuracy"] for line in mine}


def table(done):
    """Markdown: what every row had to choose from, how many runs it got, what was chosen and how well that did."""
    lines = [
        ["method", "settings in its grid", "tried", "runs", "chosen", "held-out accuracy"],
        ["---"] * 6,
    ]
    for row, grid in GRIDS.items():
        accuracy, flags = chosen(done, row)
        size = math.prod(len(values) for values in grid.values())
        made = sum(
            command in done for flags in settings(*row) for command in runs(row, flags, SEEDS)
        )
        lines.append(
            [
                name_of(*row),
                str(size),
                str(SETTINGS),
                str(made),
                f"`{flags}`",
                f"{100 * accuracy:.1f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.tune", description="Tune every method with the same budget."
    )
    parser.add_argument("do", choices=("run", "table"))
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results",
        metavar="FOLDER",
        help=f"of {RUNS} (results)",
    )
    parser.add_argument("--at-once", type=count, default=1, help="runs at a time, on all GPUs (1)")
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="stop after so long; finished runs are kept"
    )
    parser.add_argument("--model", metavar="FOLDER", help="run: where MiniLM stands here")
    args = parser.parse_args(argv)
    if args.do == "table":
        print(table(read_done(args.results)))
        return
    for task in TASKS:
        split_path(task, "train", HELD)  # raises if it is not there
    machine = args.results, args.at_once, args.seconds, words({"model": args.model})
    make_missing("the first round", first_round(), *machine)
    done = read_done(args.results)
    if not done.keys() >= set(first_round()):
        raise ValueError("the first round is not complete; the same command continues it")
    make_missing("the second round", second_round(done), *machine)


if __name__ == "__main__":
    main()
