"""Make the missing runs of a list, several at a time, and show a list as a table or as curves.

results/runs.jsonl holds one JSON line per run, identified by its command. The lists of tools.lists
select from these lines.

    python -m tools.experiments run tuning --at-once 4 --seconds 1500
    python -m tools.experiments table main
"""

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Event, Lock

import torch

from data import TASKS
from plumbing.cli import Parser, count, one_line_errors
from plumbing.files import check_types, read_json, require_regular_file
from plumbing.progress import progress
from tools.lists import (
    BY_TASK,
    EQUAL_STEPS,
    LISTS,
    STEPS,
    TOGETHER,
    as_flags,
    earlier_recipe,
    main_rows,
)
from tools.picture import plot_curves

ROOT = Path(__file__).parent.parent
RECORDED = ("tuning", "abandoned", "earlier")  # lists that only the lines of RUNS name
RUNS = "runs.jsonl"
KEPT = (
    "task method sparsity seed steps batch lr weight_lr warmup hold penalty schedule head "
    "final best density reached kept prunable stored_numbers stored_bits seconds device dtype "
    "versions commit clean multiply_accumulates layers fingerprint"
).split()
NEEDED = {
    "command": str,
    "task": str,
    "method": str,
    "sparsity": float,
    "final": dict,
    "best": dict,
    "density": float,
    "seconds": float,
    "stored_numbers": int,
    "stored_bits": int,
}


def commands(name):
    """List the commands of a list, each once.

    tools.lists generates most lists. The others are marked in the lines of the repository's runs.
    """
    if name in LISTS:
        return list(dict.fromkeys(f"python train.py {arguments}" for arguments in LISTS[name]()))
    lines = read_lines(ROOT / "results" / RUNS)
    return [line["command"] for line in lines if name in line.get("lists", ())]


def read_lines(path):
    """Read a file of results -> a list of dicts; empty if there is no file.

    Raises ValueError that names a line which is not the result of a run.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(require_regular_file(path).read_text("utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            check_line(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is not the result of a run ({error}); delete that line"
            ) from None
        lines.append(line)
    return lines


def check_line(line):
    """Raise ValueError unless a line has what tables and curves need."""
    check_types(line, NEEDED, "it is not as train.py writes it")
    if line["task"] not in TASKS:
        raise ValueError("TASKS has no such task")
    metric = TASKS[line["task"]].metrics[0]
    check_types(line["final"], {metric: float}, "final")
    check_types({"reached": 1.0, "lists": []} | line, {"reached": float, "lists": list}, "it")
    numbers = [line[key] for key in NEEDED if NEEDED[key] in (int, float)]
    numbers += [line["final"][metric], line.get("reached", 1.0)]
    if not all(abs(value) < 1e12 for value in numbers):  # false for nan too
        raise ValueError("its numbers are too large, or not numbers")
    shlex.split(line["command"])


# --- runs -------------------------------------------------------------------------------------

RUNNING = set()  # subprocesses, which must not outlive this process
STOPPING = Event()


def kill_running():
    STOPPING.set()  # make_run checks this right after it starts a process
    for process in list(RUNNING):
        process.kill()


def interrupt(*_):
    kill_running()
    raise KeyboardInterrupt("finished runs are kept")


def side_by_side(work, items, at_once):
    """Call work(item) for each item, `at_once` at a time -> a list of results.

    SIGTERM, Ctrl-C and errors end the runs in progress too.
    """
    STOPPING.clear()
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, interrupt)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                kill_running()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_run(command, machine, seconds, gpu):
    """Run a command of train.py -> its line, a dict. Raises ValueError with its error message."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = [*shlex.split(command)[2:], *machine, "--out", out]
        argv = [sys.executable, ROOT / "train.py", *flags]
        status, errors = run_process(argv, seconds, gpu)
        if status:
            messages = [line for line in errors.splitlines() if "rror" in line]
            raise ValueError(messages[-1] if messages else f"train.py ended with status {status}")
        result = read_json(out / "result.json")
    return {"command": command} | {key: result[key] for key in KEPT if key in result}


def run_process(argv, seconds, gpu):
    """Run a program on a GPU -> (exit status, stderr). Raises TimeoutExpired after `seconds`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, env=environment, **output) as process:
        RUNNING.add(process)
        if STOPPING.is_set():
            process.kill()
        try:
            _, errors = process.communicate(timeout=seconds)
        finally:
            process.kill()  # does nothing to a process that has ended
            RUNNING.discard(process)
    return process.returncode, errors


def gpus_for(at_once):
    """Assign a GPU to each of `at_once` slots -> (a Queue of GPUs, what results say of them)."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    free = Queue()
    for slot in range(at_once):
        free.put(gpus[slot % len(gpus)])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return free, {"gpu": name, "gpus": sum(map(bool, gpus)), "at_once": at_once}


def find_missing(name, wanted, path):
    """List the commands without a line in the file, and print how many there are."""
    done = {line["command"] for line in read_lines(path)}
    missing = [command for command in wanted if command not in done]
    made = len(wanted) - len(missing)
    hint = "" if missing else "; make them anew with --results FOLDER"
    print(f"{made} runs of {name} are in {path}, {len(missing)} are missing{hint}", flush=True)
    return missing


def make_missing(name, wanted, folder, at_once, seconds, machine):
    """Make the runs of `wanted` that are not in the folder's file yet, until `seconds` have passed.

    machine: flags that say where the model and the data are on this machine.
    """
    path = folder / RUNS
    deadline = time.time() + seconds
    missing = find_missing(name, wanted, path)
    free, where = gpus_for(at_once)
    lock = Lock()

    def work(command):
        """Make one run -> whether it failed. Running out of time is no failure."""
        gpu = free.get()
        failed = False
        try:
            left = deadline - time.time()
            if left < 1:
                return False
            line = make_run(command, machine, left, gpu)
            with lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | where) + "\n")
                bar.update()
            outcome = line["final"]
        except subprocess.TimeoutExpired:
            outcome = "stopped, out of time"
        except ValueError as error:
            outcome = error
            failed = True
        finally:
            free.put(gpu)
        bar.write(f"{command}: {outcome}")
        return failed

    folder.mkdir(parents=True, exist_ok=True)
    with progress(None, name, total=len(missing), unit="run", leave=True) as bar:
        failures = sum(side_by_side(work, missing, at_once))
    if failures:
        raise ValueError(f"{failures} runs failed; the same command makes them again")


# --- tables and curves ------------------------------------------------------------------------

MAIN_ROWS = main_rows()


def row_label(line, merge=False):
    """Name the table row of a run: its method and the flags that set it apart.

    "python train.py --task=rte --model=minilm --method=smp-s --steps=3120 --seed=0 --lr=0.04"
    -> "smp-s --lr=0.04"

    The label leaves out flags that come from STEPS and earlier_recipe(). A row of `main` has its
    own name. merge: write BY_TASK for flags that come from BY_TASK, so that tasks share a row.
    """
    command = line["command"].removeprefix("python train.py ")
    if command in MAIN_ROWS:
        return MAIN_ROWS[command]

    key = line["task"], line["method"], line["sparsity"]
    usual = as_flags({"steps": STEPS[line["task"]]} | earlier_recipe(*key))
    label = []
    for word in shlex.split(command):
        if not word.startswith(("--task=", "--model=", "--seed=")) and word not in usual:
            label.append(word.removeprefix("--method="))

    own = as_flags(BY_TASK.get(key, {}))
    if merge and own and set(own) <= set(label):
        label = [word for word in label if word not in own] + ["BY_TASK"]
    return " ".join(label)


def mean_and_spread(values):
    """Mean and standard deviation, which is nan for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def metrics_of(task):
    """List the columns of a task: its first metric, on the first dev set.

    If lower is better, as for perplexity, there is a column for every dev set.
    """
    row = TASKS[task]
    metric = row.metrics[0]
    columns = [metric]
    if row.best is min:
        columns += [f"{metric} {split}" for split in row.dev[1:]]
    return columns


def first_metric(line):
    return line["final"][TASKS[line["task"]].metrics[0]]


def cell(lines, metric):
    """Write the mean ± standard deviation of a metric, and the number of seeds: "81.2 ± 0.4 (5)".

    Shares are in percent.
    """
    if not lines:
        return ""
    scale = 1 if TASKS[lines[0]["task"]].best is min else 100
    mean, spread = mean_and_spread([scale * line["final"][metric] for line in lines])
    return f"{mean:.1f} ± {spread:.1f} ({len(lines)})" if len(lines) > 1 else f"{mean:.1f} (1)"


def stored(lines):
    """Write the mean size of what a task stores: trained numbers, and bits of the mask."""
    numbers = statistics.mean(line["stored_numbers"] for line in lines)
    bits = statistics.mean(line["stored_bits"] for line in lines)
    parts = []
    if numbers >= 1e5:
        parts.append(f"{numbers / 1e6:.1f} M numbers")
    elif numbers:
        parts.append(f"{numbers:,.0f} numbers")
    if bits:
        parts.append(f"{bits / 1e6:.1f} Mbit")
    return " + ".join(parts)


def reached(lines):
    """Write the density that training reached without trimming, or its range."""
    densities = [line.get("reached", line["density"]) for line in lines]
    if max(densities) - min(densities) > 0.01:
        return f"{min(densities):.2f} to {max(densities):.2f}"
    return f"{densities[0]:.2f}"


def curves(lines):
    """Collect curves of the first metric -> {"task, method": [(sparsity, mean, spread)]}.

    The points are in the order of sparsity.
    """
    values = {}  # {curve: {sparsity: [value of each seed]}}
    for line in sorted(lines, key=lambda line: line["sparsity"]):
        points = values.setdefault(f"{line['task']}, {line['method']}", {})
        points.setdefault(line["sparsity"], []).append(first_metric(line))
    found = {}
    for name, points in values.items():
        found[name] = [(sparsity, *mean_and_spread(seeds)) for sparsity, seeds in points.items()]
    return found


def average(by_task):
    """Average the tasks of EQUAL_STEPS, in percent; "" if one of them has no lines.

    The tasks of TOGETHER count as one.
    """
    alone, together = [], []
    for task in EQUAL_STEPS:
        if not by_task.get(task):
            return ""
        mean = statistics.mean(first_metric(line) for line in by_task[task])
        (together if task in TOGETHER else alone).append(mean)
    return f"{100 * statistics.mean([*alone, statistics.mean(together)]):.1f}"


def table(lines, merge=False, averages=False):
    """Write a Markdown table: a row per method and its flags, ordered by sparsity.

    It has columns for every task, then for what a run costs. merge: see row_label. averages:
    whether to add a column for average().
    """
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    columns = [(task, metric) for task in tasks for metric in metrics_of(task)]
    names = [f"{task}, {metric} (seeds)" for task, metric in columns]
    if averages:
        names.append("average")
    rows = [["method", *names, "stored a task", "density reached", "minutes"]]
    labels = {(line["sparsity"], row_label(line, merge)) for line in lines}
    for _, label in sorted(labels):
        mine = [line for line in lines if row_label(line, merge) == label]
        by_task = {task: [line for line in mine if line["task"] == task] for task in tasks}
        cells = [cell(by_task[task], metric) for task, metric in columns]
        if averages:
            cells.append(average(by_task))
        minutes = statistics.mean(line["seconds"] for line in mine) / 60
        rows.append([label, *cells, stored(mine), reached(mine), f"{minutes:.1f}"])
    return markdown(rows)


def markdown(rows):
    """Write rows of strings as a Markdown table. The first row is the heading."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.experiments",
        description="Make the missing runs of a list, or show a list.",
    )
    add = parser.add_argument
    add("do", choices=("run", "table", "plot"), help="plot: the metric over sparsity, LIST.png")
    add("list", choices=(*LISTS, *RECORDED))
    results = ROOT / "results"
    add("--results", type=Path, default=results, metavar="FOLDER", help=f"has {RUNS} (results)")
    add("--at-once", type=count, default=1, help="runs at a time, on all GPUs (1)")
    add("--seconds", type=float, default=1e6, help="time limit; finished runs are kept")
    add("--data-dir", metavar="FOLDER", help="run: as in train.py")
    add("--model", metavar="FOLDER", help="run: where the list's model is here")
    args = parser.parse_args(argv)

    wanted = commands(args.list)
    if args.do == "run":
        machine = as_flags({"data_dir": args.data_dir, "model": args.model})
        make_missing(args.list, wanted, args.results, args.at_once, args.seconds, machine)
        return
    wanted = set(wanted)
    lines = [line for line in read_lines(args.results / RUNS) if line["command"] in wanted]
    if not lines:
        command = f"python -m tools.experiments run {args.list} --results {args.results}"
        raise ValueError(f"{args.results / RUNS} has none of these runs; make them with: {command}")
    if args.do == "table":
        merge = args.list in ("ablations", "earlier")
        print(table(lines, merge, averages=args.list == "main"))
        return

    if args.list != "curve":
        raise ValueError(
            "plot is for the list `curve`: one task, one setting per method and sparsity"
        )
    path = args.results / f"{args.list}.png"
    plot_curves(path, curves(lines), f"dev {TASKS[lines[0]['task']].metrics[0]}")
    print(path)


if __name__ == "__main__":
    main()
