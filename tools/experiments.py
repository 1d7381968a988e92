"""Make the missing runs of a list, several at a time, and show a list as a table or as curves.

results/runs.jsonl holds one JSON line a run, known by its command; the lists of tools.lists are views of it.

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
from tools.lists import BY_TASK, EQUAL_STEPS, LISTS, STEPS, TOGETHER, earlier, main_rows, words
from tools.picture import plot_curves

ROOT = Path(__file__).parent.parent
RECORDED = ("tuning", "abandoned", "earlier")  # lists that only the lines of RUNS name
RUNS = "runs.jsonl"
KEPT = (
    "task method sparsity seed steps batch lr weight_lr warmup hold penalty schedule head final best density reached "
    "kept prunable stored_numbers stored_bits seconds device dtype versions commit clean multiply_accumulates layers "
    "fingerprint"
).split()
NEEDED = {
    "command": str,
    "task": str,
    "method": str,
    "sparsity": float,
    "final": dict,
    "best": dict,
}
NEEDED |= {"density": float, "seconds": float, "stored_numbers": int, "stored_bits": int}


def commands(name):
    """The commands of a list, each once: as tools.lists makes it, or as the lines of the repository's runs name it."""
    if name in LISTS:
        return list(dict.fromkeys(f"python train.py {arguments}" for arguments in LISTS[name]()))
    return [
        line["command"]
        for line in read_lines(ROOT / "results" / RUNS)
        if name in line.get("lists", ())
    ]


def read_lines(path):
    """Results of a file. Raises ValueError that names a line that is not the result of a run."""
    lines = []
    for number, text in enumerate(
        require_regular_file(path).read_text("utf-8").splitlines() if path.exists() else (), 1
    ):
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
    """Raise ValueError unless a value is what this file needs of a run."""
    check_types(line, NEEDED, "it is not as train.py writes it")
    if line["task"] not in TASKS:
        raise ValueError("TASKS has no such task")
    metric = TASKS[line["task"]].metrics[0]
    check_types(line["final"], {metric: float}, "final")
    check_types({"reached": 1.0, "lists": []} | line, {"reached": float, "lists": list}, "it")
    numbers = [line[key] for key in NEEDED if NEEDED[key] in (int, float)]
    numbers += [line["final"][metric], line.get("reached", 1.0)]
    if not all(abs(value) < 1e12 for value in numbers):  # nan is not either
        raise ValueError("its numbers are too large, or none")
    shlex.split(line["command"])


# --- runs ----------------------------------------------------------------------------------------------------

RUNNING = set()  # subprocesses, which must not outlive this one
STOPPING = Event()


def kill_running():
    STOPPING.set()  # what is just being started sees it
    for process in list(RUNNING):
        process.kill()


def interrupt(*_):
    kill_running()
    raise KeyboardInterrupt("finished runs are kept")


def side_by_side(work, items, at_once):
    """-> [work(item)], so many at a time. On SIGTERM, Ctrl-C and errors the runs in progress end too."""
    STOPPING.clear()
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)
    }
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
    """Run a command of train.py -> its line, a dict. Raises ValueError with what train.py said last if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        argv = [
            sys.executable,
            ROOT / "train.py",
            *shlex.split(command)[2:],
            *machine,
            "--out",
            out,
        ]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        with subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        ) as p:
            RUNNING.add(p)
            if STOPPING.is_set():
                p.kill()
            try:
                _, errors = p.communicate(timeout=seconds)
            finally:
                p.kill()  # does nothing to a process that has ended
                RUNNING.discard(p)
        if p.returncode:
            said = [line for line in errors.splitlines() if "rror" in line]
            raise ValueError(said[-1] if said else f"train.py ended with status {p.returncode}")
        result = read_json(out / "result.json")
    return {"command": command} | {key: result[key] for key in KEPT if key in result}


def gpus_for(at_once):
    """-> (a Queue with a GPU for each run that there may be at a time, what results say of the machine)."""
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    free = Queue()
    for slot in range(at_once):
        free.put(gpus[slot % len(gpus)])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return free, {"gpu": name, "gpus": sum(map(bool, gpus)), "at_once": at_once}


def make_missing(name, wanted, folder, at_once, seconds, machine):
    """Make those of the wanted commands whose runs the folder's file lacks, several at a time, until time is over."""
    path = folder / RUNS
    deadline = time.time() + seconds
    done = {line["command"] for line in read_lines(path)}
    missing = [command for command in wanted if command not in done]
    made = len(wanted) - len(missing)
    anew = "" if missing else "; make them anew with --results FOLDER"
    print(f"{made} runs of {name} are in {path}, {len(missing)} are missing{anew}", flush=True)
    free, where = gpus_for(at_once)
    lock = Lock()

    def work(command):
        """Whether the run failed; one that the time does not allow did not."""
        gpu = free.get()
        left = deadline - time.time()
        failed = False
        try:
            if left < 1:
                return False
            line = make_run(command, machine, left, gpu)
            with lock, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | where) + "\n")
                bar.update()
            said = line["final"]
        except subprocess.TimeoutExpired:
            said = "stopped, out of time"
        except ValueError as error:
            said = error
            failed = True
        finally:
            free.put(gpu)
        bar.write(f"{command}: {said}")
        return failed

    folder.mkdir(parents=True, exist_ok=True)
    with progress(None, name, total=len(missing), unit="run", leave=True) as bar:
        failures = sum(side_by_side(work, missing, at_once))
    if failures:
        raise ValueError(f"{failures} runs failed; the same command makes them again")


# --- tables and curves ---------------------------------------------------------------------------------------

MAIN_ROWS = main_rows()


def kind(line, merge=False):
    """What a table's row stands for: a command without its task and seed, and what comes from STEPS and earlier().

    merge: what comes from BY_TASK is named so, and the tasks share a row. Of `main`, what was chosen is left out too.
    """
    command = line["command"].removeprefix("python train.py ")
    if command in MAIN_ROWS:
        return MAIN_ROWS[command]
    given = shlex.split(command)
    given = [word for word in given if not word.startswith(("--task=", "--model=", "--seed="))]
    usual = words(
        {"steps": STEPS[line["task"]]} | earlier(line["task"], line["method"], line["sparsity"])
    )
    given = [word.removeprefix("--method=") for word in given if word not in usual]
    own = words(BY_TASK.get((line["task"], line["method"], line["sparsity"]), {})) if merge else []
    if own and set(own) <= set(given):
        given = [word for word in given if word not in own] + ["BY_TASK"]
    return " ".join(given)


def mean_and_spread(values):
    """-> mean and standard deviation; of one value, nan."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def metrics_of(task):
    """The first metric of a task; where lower is better, as of perplexity, on each of its dev sets."""
    row = TASKS[task]
    return [row.metrics[0]] + [
        f"{row.metrics[0]} {split}" for split in row.dev[1:] if row.best is min
    ]


def first_metric(line):
    return line["final"][TASKS[line["task"]].metrics[0]]


def cell(lines, metric):
    """Mean and standard deviation over seeds of a metric, shares in percent; then the number of seeds."""
    scale = 1 if TASKS[lines[0]["task"]].best is min else 100
    mean, spread = mean_and_spread([scale * line["final"][metric] for line in lines])
    return f"{mean:.1f} ± {spread:.1f} ({len(lines)})" if len(lines) > 1 else f"{mean:.1f} (1)"


def stored(lines):
    """Mean size of what is kept for a task: numbers of weights that trained, bits of a mask."""
    numbers = statistics.mean(line["stored_numbers"] for line in lines)
    bits = statistics.mean(line["stored_bits"] for line in lines)
    parts = []
    if numbers:
        parts.append(
            f"{numbers:,.0f} numbers" if numbers < 1e5 else f"{numbers / 1e6:.1f} M numbers"
        )
    if bits:
        parts.append(f"{bits / 1e6:.1f} Mbit")
    return " + ".join(parts)


def reached(lines):
    """The density that training came to by itself, or its range."""
    found = [line.get("reached", line["density"]) for line in lines]
    return (
        f"{min(found):.2f} to {max(found):.2f}"
        if max(found) - min(found) > 0.01
        else f"{found[0]:.2f}"
    )


def curves(lines):
    """-> {"task, method": [(sparsity, mean, standard deviation)]} of the first metric at the end, by sparsity."""
    found = {}
    for line in sorted(lines, key=lambda line: line["sparsity"]):
        at = found.setdefault(f"{line['task']}, {line['method']}", {})
        at.setdefault(line["sparsity"], []).append(first_metric(line))
    return {
        name: [(sparsity, *mean_and_spread(v)) for sparsity, v in at.items()]
        for name, at in found.items()
    }


def average(of_tasks):
    """Mean over the tasks of EQUAL_STEPS of the mean over seeds, those of TOGETHER as one; "" if one has no lines."""
    if not all(of_tasks.get(task) for task in EQUAL_STEPS):
        return ""
    means = {
        task: statistics.mean(first_metric(line) for line in of_tasks[task]) for task in EQUAL_STEPS
    }
    others = [mean for task, mean in means.items() if task not in TOGETHER]
    return (
        f"{100 * statistics.mean([*others, statistics.mean(means[task] for task in TOGETHER)]):.1f}"
    )


def table(lines, merge=False, averages=False):
    """Markdown: a row for every method with its flags, by sparsity; a column for every task, then what a run costs.

    merge: see kind; averages: a column for average().
    """
    tasks = [task for task in TASKS if any(line["task"] == task for line in lines)]
    columns = [(task, metric) for task in tasks for metric in metrics_of(task)]
    names = [f"{task}, {metric} (seeds)" for task, metric in columns]
    rows = [
        ["method", *names, *["average"] * averages, "stored a task", "density reached", "minutes"]
    ]
    rows.append(["---"] * len(rows[0]))
    for _, wanted in sorted({(line["sparsity"], kind(line, merge)) for line in lines}):
        mine = [line for line in lines if kind(line, merge) == wanted]
        of_tasks = {task: [line for line in mine if line["task"] == task] for task in tasks}
        minutes = statistics.mean(line["seconds"] for line in mine) / 60
        cells = [cell(of_tasks[task], metric) if of_tasks[task] else "" for task, metric in columns]
        if averages:
            cells.append(average(of_tasks))
        rows.append([wanted, *cells, stored(mine), reached(mine), f"{minutes:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.experiments",
        description="Make the missing runs of a list, or show a list.",
    )
    parser.add_argument(
        "do", choices=("run", "table", "plot"), help="plot: the metric over sparsity, into LIST.png"
    )
    parser.add_argument("list", choices=(*LISTS, *RECORDED))
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
    parser.add_argument("--data-dir", metavar="FOLDER", help="run: as in train.py")
    parser.add_argument("--model", metavar="FOLDER", help="run: where the list's model stands here")
    args = parser.parse_args(argv)
    machine = words({"data_dir": args.data_dir, "model": args.model})
    if args.do == "run":
        make_missing(
            args.list, commands(args.list), args.results, args.at_once, args.seconds, machine
        )
        return
    wanted = set(commands(args.list))
    lines = [line for line in read_lines(args.results / RUNS) if line["command"] in wanted]
    if not lines:
        command = f"python -m tools.experiments run {args.list} --results {args.results}"
        raise ValueError(f"{args.results / RUNS} has none of these runs; make them with: {command}")
    if args.do == "plot":
        if args.list != "curve":
            raise ValueError(
                "plot is for the list `curve`: one task, and one setting of each method at a sparsity"
            )
        path = args.results / f"{args.list}.png"
        plot_curves(path, curves(lines), f"dev {TASKS[lines[0]['task']].metrics[0]}")
        print(path)
    else:
        print(
            table(lines, merge=args.list in ("ablations", "earlier"), averages=args.list == "main")
        )


if __name__ == "__main__":
    main()
