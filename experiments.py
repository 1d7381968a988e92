"""Lists of runs, one command that makes the missing ones, and one that shows them as a table.

What it is: every run behind the README's comparisons, as the arguments of train.py; results are one JSON line a run in
results/LIST.jsonl, known by their command. What it is not: it trains nothing itself. Sources: Jiang et al., ACL 2023,
tables 1 to 3, for what is compared.

    python experiments.py run tuning --at-once 4 --seconds 1500
    python experiments.py table main
"""

import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock

import torch

from cli import Parser, one_line_errors
from data import TASKS
from picture import plot_curves

# Steps of MiniLM's runs, the same for all methods of a task: about a third of the paper's for bert-base.
STEPS = {"rte": 3120, "mrpc": 3450, "cola": 3216, "stsb": 3600, "sst2": 3159, "movies": 1196, "squad": 2870}
SEEDS = {"rte": 5, "mrpc": 5, "cola": 5, "stsb": 5, "sst2": 3, "movies": 5}
SPARSITIES = (0.5, 0.9)
CURVE = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97)
COMPARED = ("magnitude", "movement", "soft-movement", "smp-l", "smp-s")

# Lambda of soft movement: which share of the weights it leaves depends on the task.
PENALTIES = {
    0.5: {"movies": 400, "rte": 50, "mrpc": 50, "cola": 200, "stsb": 100, "sst2": 200},
    0.9: {"movies": 6400, "rte": 800, "mrpc": 800, "cola": 1200, "stsb": 1600, "sst2": 800},
}
# What tuning found for a method, at a sparsity: see the list `tuning`.
TUNED = {
    "finetune": {"weight_lr": 1e-4},
    ("magnitude", 0.5): {"weight_lr": 1e-4},
    ("magnitude", 0.9): {"weight_lr": 1e-4, "hold": 0.1},
    "movement": {"weight_lr": 1e-4, "hold": 0.3, "schedule": "linear"},
    "soft-movement": {"weight_lr": 1e-4},
    ("smp-s", 0.5): {"lr": 4e-2},
    ("smp-s", 0.9): {"lr": 1e-2},
    ("l0", 0.5): {"weight_lr": 1e-4, "penalty": 25},
    ("l0", 0.9): {"weight_lr": 1e-4, "penalty": 100},
}
TUNED |= {(method, s): TUNED["smp-s", s] for method in ("smp-l", "smp-g") for s in SPARSITIES}


def tuned(task, method, sparsity=None):
    """What tuning found for a method at a sparsity, as flags."""
    own = {"penalty": PENALTIES[sparsity][task]} if method == "soft-movement" else {}
    return TUNED.get(method, {}) | TUNED.get((method, sparsity), {}) | own


def run(task, method, sparsity=None, seed=0, **flags):
    """The arguments of a run as one line, by which it is known."""
    given = {"task": task, "model": "minilm", "method": method, "sparsity": sparsity}
    given |= {"steps": STEPS[task], "seed": seed} | dict(sorted(flags.items()))
    return shlex.join(f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None)


def compared():
    for task, seeds in SEEDS.items():
        for seed in range(seeds):
            yield run(task, "finetune", seed=seed, **TUNED["finetune"])
            for method, sparsity in itertools.product(COMPARED, SPARSITIES):
                yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
            # What movement pruning gained from, SMP may gain from too: on STS-B it does.
            yield run(task, "smp-s", 0.9, seed, **tuned(task, "smp-s", 0.9) | {"schedule": "linear"})


def ablations():
    """Without the regularizer, with a fresh head, ranked together or by threshold; two tasks, three seeds."""
    for sparsity in SPARSITIES:  # whether movement needs more time than all others
        for settings in ({"hold": 0}, {"hold": 0.3}, TUNED["movement"]):
            yield run("sst2", "movement", sparsity, steps=4 * STEPS["sst2"], **settings)
        yield run("mrpc", "movement", sparsity, steps=4 * STEPS["mrpc"], **TUNED["movement"])
    for task, seed, sparsity in itertools.product(("mrpc", "sst2"), range(3), SPARSITIES):
        for method in ("smp-s", "smp-l"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity) | {"penalty": 0})
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity) | {"head": "classifier"})
        for method in ("smp-g", "smp-t", "l0", "random"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
        yield run(task, "movement", sparsity, seed, penalty=400, weight_lr=1e-4)


ONLY = {"weight_lr": (1e-4,)}
WEIGHTS = {"weight_lr": (3e-5, 1e-4, 3e-4), "warmup": (0, 0.1)}
HOLDS = {"weight_lr": (3e-5, 1e-4), "hold": (0.1, 0.3)}
OTHERS = "rte cola stsb sst2"
# Of each method its own knobs: tasks, methods, sparsities, and values of flags, all with all.
GRIDS = (
    ("mrpc", "finetune", (None,), WEIGHTS),
    ("mrpc", "magnitude", SPARSITIES, WEIGHTS),
    ("mrpc", "movement", SPARSITIES, WEIGHTS | {"lr": (1e-3, 1e-2)}),
    ("mrpc", "magnitude movement", SPARSITIES, HOLDS),
    ("mrpc", "movement", SPARSITIES, ONLY | {"penalty": (50, 400)}),  # whether the regularizer is what it lacks
    ("mrpc", "movement", SPARSITIES, ONLY | {"steps": (4 * STEPS["mrpc"],)}),
    ("mrpc movies", "movement", SPARSITIES, ONLY | {"hold": (0.5,), "lr": (1e-2, 3e-2)}),
    ("mrpc movies", "movement", SPARSITIES, ONLY | {"hold": (0.1, 0.3), "schedule": ("linear",), "seed": (0, 1, 2)}),
    ("movies", "movement", (0.5,), {"weight_lr": (3e-5, 1e-4), "hold": (0, 0.3), "lr": (1e-3, 1e-2, 3e-2)}),
    ("mrpc", "soft-movement", SPARSITIES, {"weight_lr": (3e-5, 1e-4), "penalty": (10, 50, 100, 400, 800, 1600)}),
    ("movies", "soft-movement", (0.5,), ONLY | {"penalty": (200, 400, 800, 1600)}),
    ("movies", "soft-movement", (0.9,), ONLY | {"penalty": (1600, 3200, 4800, 6400)}),
    (OTHERS, "soft-movement", (0.5,), ONLY | {"penalty": (100, 200, 400)}),
    (OTHERS, "soft-movement", (0.9,), ONLY | {"penalty": (1200, 1600, 3200)}),
    ("mrpc", "l0", SPARSITIES, ONLY | {"penalty": (25, 100, 400)}),
    ("mrpc", "l0", (0.5,), ONLY | {"lr": (3e-2, 1e-1), "penalty": (50, 200)}),
    ("mrpc", "l0", (0.9,), ONLY | {"lr": (3e-2, 1e-1), "penalty": (200, 800)}),
    ("mrpc", "smp-s", SPARSITIES, {"lr": (1e-2, 2e-2, 4e-2), "penalty": (100, 400)}),
    ("mrpc", "magnitude", SPARSITIES, ONLY | {"hold": (0, 0.1, 0.3), "schedule": ("linear",)}),
    ("mrpc", "smp-s", SPARSITIES, {"lr": (1e-2, 4e-2), "schedule": ("linear",)}),
    ("stsb", "smp-s", (0.9,), {"lr": (1e-2,), "penalty": (100, 200, 800), "seed": (0, 3)}),
    ("stsb", "smp-s", (0.9,), {"lr": (1e-2,), "ramp": (0.4, 0.8), "seed": (0, 3)}),
    (f"movies {OTHERS}", "smp-s", (0.5,), {"lr": (1e-2, 2e-2)}),
    (f"movies {OTHERS}", "smp-s", (0.9,), {"lr": (5e-3, 2e-2)}),
)


def tuning():
    """What TUNED and PENALTIES come from."""
    for tasks, methods, sparsities, grid in GRIDS:
        for task, method, sparsity in itertools.product(tasks.split(), methods.split(), sparsities):
            for values in itertools.product(*grid.values()):
                yield run(task, method, sparsity, **dict(zip(grid, values, strict=True)))


def units():
    """P-pruning beside simpler choices of heads and neurons, SMP at the same share removed, and the dense model."""
    for task, seeds in (("movies", 3), ("mrpc", 3), ("sst2", 1), ("squad", 1)):
        for seed in range(seeds):
            yield run(task, "finetune", seed=seed, **TUNED["finetune"])
            for sparsity in (0.2, 0.4, 0.6):
                for method in ("p-pruning", "p-activation", "p-random"):
                    yield run(task, method, sparsity, seed, **TUNED["finetune"])
                yield run(task, "smp-s", sparsity, seed)


def curve():
    """Accuracy over sparsity of the default task; between the tuned sparsities, with the settings of the nearer one."""
    for seed in range(3):
        yield run("movies", "finetune", seed=seed, **TUNED["finetune"])
        for sparsity, method in itertools.product(CURVE, ("smp-s", "movement", "magnitude")):
            yield run("movies", method, sparsity, seed, **tuned("movies", method, SPARSITIES[sparsity > 0.7]))


LISTS = {"main": compared, "ablations": ablations, "units": units, "curve": curve, "tuning": tuning}
KEPT = (
    "task method sparsity seed steps batch lr weight_lr warmup hold penalty schedule head final best density reached "
    "kept prunable stored_numbers stored_bits seconds device dtype versions commit clean multiply_accumulates layers"
).split()
NEEDED = {"command", "task", "sparsity", "final", "best", "density", "seconds", "stored_numbers", "stored_bits"}


def read_lines(path):
    """Results of a list's file. Raises ValueError that names the line that is none."""
    lines = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else (), 1):
        try:
            lines.append(json.loads(line))
            if not lines[-1].keys() >= NEEDED:
                raise ValueError
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path}:{number} is not the result of a run; delete that line") from None
    return lines


def make_run(arguments, machine, seconds, gpu):
    """Run train.py -> the result's line as a dict. Raises ValueError with what train.py said last if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        script = Path(__file__).with_name("train.py")
        command = [sys.executable, script, *shlex.split(arguments), *machine, "--out", out]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        if ended.returncode:
            said = [line for line in ended.stderr.splitlines() if "rror" in line]
            raise ValueError(said[-1] if said else f"train.py ended with status {ended.returncode}")
        result = json.loads((out / "result.json").read_text("utf-8"))
    return {"command": f"python train.py {arguments}"} | {key: result[key] for key in KEPT if key in result}


def make_missing(name, folder, at_once, seconds, machine):
    """Make the runs of a list that its file lacks, several at a time, until the time is over."""
    path, lock, deadline = folder / f"{name}.jsonl", Lock(), time.time() + seconds
    done = {line["command"] for line in read_lines(path)}
    missing = [arguments for arguments in dict.fromkeys(LISTS[name]()) if f"python train.py {arguments}" not in done]
    where = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    where["at_once"] = at_once
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    free = Queue()  # a GPU for each run that there may be at a time
    for slot in range(at_once):
        free.put(gpus[slot % len(gpus)])
    anew = "" if missing else "; make them anew with --results FOLDER"
    print(f"{len(done)} runs are in {path}, {len(missing)} are missing{anew}", flush=True)

    def work(arguments):
        """Whether the run did not fail; one that the time does not allow is none."""
        gpu = free.get()
        try:
            if (left := deadline - time.time()) < 1:
                return True
            line = make_run(arguments, machine, left, gpu)
            with lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | where) + "\n")
            said, fine = line["final"], True
        except subprocess.TimeoutExpired:
            said, fine = "stopped, out of time", True
        except ValueError as error:
            said, fine = error, False
        finally:
            free.put(gpu)
        print(f"{arguments}: {said}", flush=True)
        return fine

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        failed = list(pool.map(work, missing)).count(False)
    if failed:
        raise ValueError(f"{failed} runs failed; the same command makes them again")


def kind(line):
    """What a table's row stands for: a command without its task, seed and what comes from STEPS; PENALTIES by name."""
    words = shlex.split(line["command"].removeprefix("python train.py "))
    dropped = ("--task=", "--model=", "--seed=", f"--steps={STEPS[line['task']]}")
    words = [word.removeprefix("--method=") for word in words if not word.startswith(dropped)]
    own = PENALTIES.get(line["sparsity"], {}).get(line["task"])
    if words[0] == "soft-movement":
        words = ["--penalty=PENALTIES" if word == f"--penalty={own}" else word for word in words]
    return " ".join(words)


def mean_and_spread(values):
    """-> mean and standard deviation; of one value, nan."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def cell(lines, which):
    """Mean and standard deviation over seeds of a task's first metric, in percent; then the number of seeds."""
    metric = TASKS[lines[0]["task"]].metrics[0]
    values = [100 * (line["best"]["dev"] if which == "best" else line["final"])[metric] for line in lines]
    mean, spread = mean_and_spread(values)
    return f"{mean:.1f} ± {spread:.1f} ({len(values)})" if len(values) > 1 else f"{mean:.1f} (1)"


def stored(lines):
    """Mean size of what is kept for a task: numbers of weights that trained, bits of a mask."""
    numbers, bits = (statistics.mean(line[key] for line in lines) for key in ("stored_numbers", "stored_bits"))
    count = f"{numbers:,.0f}" if numbers < 1e5 else f"{numbers / 1e6:.1f} M"
    return " + ".join([f"{count} numbers"] * (numbers > 0) + [f"{bits / 1e6:.1f} Mbit"] * (bits > 0))


def reached(lines):
    """The density that training came to by itself, or its range."""
    found = [line.get("reached", line["density"]) for line in lines]
    return f"{min(found):.2f} to {max(found):.2f}" if max(found) - min(found) > 0.01 else f"{found[0]:.2f}"


def curves(lines):
    """-> {"task, method": [(sparsity, mean, standard deviation)]} of the first metric at the end, by sparsity."""
    found = {}
    for line in sorted(lines, key=lambda line: line["sparsity"]):
        at = found.setdefault(f"{line['task']}, {line['method']}", {})
        at.setdefault(line["sparsity"], []).append(line["final"][TASKS[line["task"]].metrics[0]])
    return {name: [(sparsity, *mean_and_spread(v)) for sparsity, v in at.items()] for name, at in found.items()}


def table(lines, which="final"):
    """Markdown: a row for every method with its flags, by sparsity; a column for every task, then what a run costs."""
    kinds = dict.fromkeys(kind(line) for line in sorted(lines, key=lambda line: (line["sparsity"], kind(line))))
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    names = [f"{task}, {TASKS[task].metrics[0]} (seeds)" for task in tasks]
    rows = [["method", *names, "stored a task", "density reached", "minutes"]]
    rows.append(["---"] * len(rows[0]))
    for wanted in kinds:
        mine = [line for line in lines if kind(line) == wanted]
        by_task = [[line for line in mine if line["task"] == task] for task in tasks]
        costs = [stored(mine), reached(mine), f"{statistics.mean(line['seconds'] for line in mine) / 60:.1f}"]
        rows.append([wanted, *(cell(some, which) if some else "" for some in by_task), *costs])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv=None):
    parser = Parser(description="Make the missing runs of a list, or show a list as a table.")
    parser.add_argument("do", choices=("run", "table", "plot"), help="plot: the metric over sparsity, into LIST.png")
    sizes = ", ".join(f"{name} ({len(dict.fromkeys(make()))} runs)" for name, make in LISTS.items())
    parser.add_argument("list", choices=LISTS, help=sizes)
    folder = Path(__file__).with_name("results")
    parser.add_argument("--results", type=Path, default=folder, metavar="FOLDER", help="of LIST.jsonl (results)")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, on all GPUs (1)")
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after so long; finished runs are kept")
    parser.add_argument("--best", action="store_true", help="table: the best evaluation on dev in place of the last")
    parser.add_argument("--data-dir", metavar="FOLDER", help="run: as in train.py")
    parser.add_argument("--model", metavar="FOLDER", help="run: where minilm stands on this machine")
    args = parser.parse_args(argv)
    if args.at_once < 1:
        parser.error("--at-once must be at least 1")
    machine = [
        f"--{name.replace('_', '-')}={value}" for name in ("data_dir", "model") if (value := getattr(args, name))
    ]
    with one_line_errors():
        if args.do == "run":
            make_missing(args.list, args.results, args.at_once, args.seconds, machine)
        else:
            path = args.results / f"{args.list}.jsonl"
            if not (lines := read_lines(path)):
                raise ValueError(f"{path} has no results; make them with: python experiments.py run {args.list}")
            if args.do == "plot":
                plot_curves(path.with_suffix(".png"), curves(lines), f"dev {TASKS[lines[0]['task']].metrics[0]}")
                print(path.with_suffix(".png"))
            else:
                print(table(lines, "best" if args.best else "final"))


if __name__ == "__main__":
    main()
