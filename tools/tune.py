"""Tune every method with the same budget, on held-out training rows. No dev row takes part.

For each row of GRIDS, ten settings are drawn from its grid and tried with one seed on two tasks.
The three with the highest mean get two more seeds. The setting with the highest mean over all seeds
is chosen: copy it into CHOSEN of tools/lists.py. `python -m tools.experiments run main` then
measures it on dev, with fresh seeds that were not used for tuning.

Run these from the repository's root, once any run has fetched both tasks:

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
from tools.experiments import ROOT, RUNS, make_missing, markdown, read_lines
from tools.lists import as_flags, main_run

SETTINGS = 10  # per row
FINALISTS = 3  # settings that get more seeds
SEEDS = (0, 1, 2)
TASKS = ("movies", "mrpc")
HELD = "held"  # for --data-dir

DENSE = {"weight_lr": (5e-5, 1e-4, 2e-4, 4e-4), "warmup": (0, 0.1), "dropout": (True, False)}
GRADUAL = {"ramp": (0.5, 0.7, 0.9), "hold": (0, 0.2), "schedule": ("cubic", "linear")}
RIVAL = DENSE | GRADUAL
# Movement's scores start at 0, so the density must stay high until they mean something.
LATE = RIVAL | {"hold": (0.2, 0.3, 0.4), "schedule": ("linear",)}
SCORES = GRADUAL | {
    "lr": (1e-2, 2e-2, 4e-2),
    "penalty": (200, 400, 800),
    "warmup": (0, 0.1),
    "dropout": (True, False),
}
SMP_S = SCORES | {"temperature": (1, 4)}
BIAS = SMP_S | {"weight_lr": (3e-4, 1e-3, 3e-3)}
GATES = DENSE | {"lr": (5e-3, 1e-2, 2e-2)}  # here the penalty decides how many weights stay

# A row is (the method with any fixed flags, the sparsity). Each has its grid.
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
    """Name a row as tools.lists does: "smp-s --sparsity=0.5"."""
    return " ".join([method, *as_flags({"sparsity": sparsity})])


def settings(method, sparsity):
    """Draw the settings to try for a row, always the same -> a list of flags, each on one line."""
    grid = GRIDS[method, sparsity]
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    drawn = random.Random(f"{method} {sparsity}").sample(every, SETTINGS)
    return [" ".join(as_flags(dict(sorted(flags.items())))) for flags in drawn]


def runs(row, flags, seeds):
    """List the commands that try a setting on the held-out rows."""
    commands = []
    for task, seed in itertools.product(TASKS, seeds):
        arguments = main_run(task, name_of(*row), seed, flags)
        commands.append(f"python train.py {arguments} --data-dir={HELD}")
    return commands


def ranked(done, row, tried, seeds):
    """Rank settings by accuracy -> [(mean over tasks and seeds, flags)], the best first.

    Settings with missing runs are left out.
    """
    found = []
    for flags in tried:
        commands = runs(row, flags, seeds)
        if all(command in done for command in commands):
            found.append((statistics.mean(done[command] for command in commands), flags))
    return sorted(found, key=lambda pair: -pair[0])


def finalists(done, row):
    best = ranked(done, row, settings(*row), SEEDS[:1])[:FINALISTS]
    return [flags for _, flags in best]


def chosen(done, row):
    """Return (mean accuracy, flags) of a row's best setting.

    Raises ValueError if runs are missing.
    """
    found = ranked(done, row, finalists(done, row), SEEDS)
    if len(found) < FINALISTS:
        raise ValueError(
            f"runs of {name_of(*row)} are missing; make them with: python -m tools.tune run"
        )
    return found[0]


def first_round():
    commands = []
    for row in GRIDS:
        for flags in settings(*row):
            commands += runs(row, flags, SEEDS[:1])
    return commands


def second_round(done):
    commands = []
    for row in GRIDS:
        for flags in finalists(done, row):
            commands += runs(row, flags, SEEDS[1:])
    return commands


def read_done(folder):
    """Read the runs that tuning made -> {command: accuracy}."""
    done = {}
    for line in read_lines(folder / RUNS):
        if line["command"].endswith(f"--data-dir={HELD}"):
            done[line["command"]] = line["final"]["accuracy"]
    return done


def table(done):
    """Write a Markdown table: each row's choices, its runs, its chosen setting and the result."""
    rows = [["method", "settings in its grid", "tried", "runs", "chosen", "held-out accuracy"]]
    for row, grid in GRIDS.items():
        size = math.prod(len(values) for values in grid.values())
        made = 0
        for flags in settings(*row):
            made += sum(command in done for command in runs(row, flags, SEEDS))
        accuracy, flags = chosen(done, row)
        cells = [name_of(*row), size, SETTINGS, made, f"`{flags}`", f"{100 * accuracy:.1f}"]
        rows.append([str(cell) for cell in cells])
    return markdown(rows)


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.tune", description="Tune every method with the same budget."
    )
    add = parser.add_argument
    add("do", choices=("run", "table"))
    results = ROOT / "results"
    add("--results", type=Path, default=results, metavar="FOLDER", help=f"has {RUNS} (results)")
    add("--at-once", type=count, default=1, help="runs at a time, on all GPUs (1)")
    add("--seconds", type=float, default=1e6, help="time limit; finished runs are kept")
    add("--model", metavar="FOLDER", help="run: where MiniLM is here")
    args = parser.parse_args(argv)
    if args.do == "table":
        print(table(read_done(args.results)))
        return

    for task in TASKS:
        split_path(task, "train", HELD)  # raises ValueError if the file is missing
    machine = args.results, args.at_once, args.seconds, as_flags({"model": args.model})
    make_missing("the first round", first_round(), *machine)
    done = read_done(args.results)
    if not done.keys() >= set(first_round()):
        raise ValueError("the first round is not complete; the same command continues it")
    make_missing("the second round", second_round(done), *machine)


if __name__ == "__main__":
    main()
