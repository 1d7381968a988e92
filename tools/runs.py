"""Make the runs of a list, several side by side, and show them as a table or a picture.

A list is a text file with one command of train.py per line, and `--seed=10-14` stands for five. A
line [NAME] names a row of the table, for the commands below it. Without one, a row is named by its
flags. Lines that begin with # are comments. Results have one JSON line per run. A run is missing
when no line has its flags.

    python -m tools.runs run results/lists/main.txt --at-once 4   # make what is missing
    python -m tools.runs table results/lists/main.txt             # mean and deviation over seeds
    python -m tools.runs plot results/lists/price.txt             # score over bytes per task

A command with --out keeps the folder of its run, which other commands may name as their --model or
--teacher.

To choose settings without dev, hold out rows of train, and name their folder in the list:

    python -m tools.runs holdout mrpc --rows 600                  # then --data-dir=held
    python -m tools.runs table results/lists/tuning.txt --best 1
"""

import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

import data
from data import TASKS, split_path
from plumbing.cli import Parser, count, one_line_errors
from plumbing.files import prefix_errors, read_json, read_lines, write_whole
from plumbing.progress import progress
from plumbing.run import print_stderr
from tools.picture import MALFORMED, plot_prices

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
RESULTS = ROOT / "results" / "runs.jsonl"
TOGETHER = ("movies", "sst2")  # they share sentences, so averages count them as one task

# The flags that differ within a row of a table.
IN_A_ROW = ("--task=", "--model=", "--seed=", "--teacher=", "--out=")
# Those within a setting. --steps= follows the size of the task, --data-dir= has the held-out rows.
IN_A_SETTING = (*IN_A_ROW, "--steps=", "--data-dir=")

# --- lists and results ----------------------------------------------------------------------------


def flags_of(command):
    """Split a command into its flags, as a shell would.

    "python train.py --lr 0.01 --dropout --seed=3" -> ["--lr=0.01", "--dropout", "--seed=3"]
    """
    flags = []
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            flags.append(word)
        else:  # the value of the flag before it
            flags[-1] += f"={word}"
    return flags


def key_of(command):
    """What identifies a run: its flags, in any order."""
    return frozenset(flags_of(command))


def label_of(command, hidden=IN_A_ROW):
    """Name the row of a run: its flags, but for those that begin with one of `hidden`."""
    label = [flag for flag in flags_of(command) if not flag.startswith(hidden)]
    return " ".join(flag.removeprefix("--method=") for flag in label)


def expand(command):
    """List the commands that `--seed=10-14` stands for. Raises ValueError if it cannot."""
    seeds = re.search(r"--seed[= ](\d+)-(\d+)", command)
    if not seeds:
        return [command]
    first, last = map(int, seeds.groups())
    if last < first or "--out" in command:
        raise ValueError(f"{seeds[0]} must count upwards, and its runs cannot share one --out")
    return [command.replace(seeds[0], f"--seed={seed}") for seed in range(first, last + 1)]


def read_list(path):
    """Read a list -> {row: {key: command}}. Raises ValueError that names a line it cannot read."""
    rows = {}
    name = None
    for number, line in enumerate(read_lines(path), 1):
        line = line.strip()
        with prefix_errors(f"{path}:{number}"):
            if line.startswith("["):
                name = line.strip("[]")
            elif re.match(r"python train\.py( --|$)", line):
                row = rows.setdefault(name or label_of(line), {})
                row.update({key_of(command): command for command in expand(line)})
            elif line and not line.startswith("#"):
                raise ValueError("must be `python train.py --...`, [NAME] or a # comment")
    return rows


def read_results(path):
    """Read results -> {key: line, a dict}.

    Raises ValueError that names a line which is not the result of a run.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; python -m tools.runs run LIST makes it")
    results = {}
    for number, text in enumerate(read_lines(path), 1):
        try:
            line = json.loads(text)
            if not data.task_of(line):
                raise ValueError("TASKS lacks its task")
            score(line)
            results[key_of(line["command"])] = line
        except MALFORMED as error:
            raise ValueError(f"{path}:{number} is not the result of a run: {error!r}") from None
    return results


def read_rows(path, results):
    """Read what to show of a list -> {row: [lines]}."""
    rows, missing = read_done(path, results)
    if not rows:
        raise ValueError(
            f"{results} has no run of {path}; to make them: python -m tools.runs run {path}"
        )
    if missing:
        print_stderr(f"runs of {path} that are missing in {results}: {len(missing)}")
    return rows


def read_done(path, results):
    """Split the runs of a list -> ({row: [lines of results]}, [commands that are missing])."""
    done = read_results(results)
    rows = {}
    missing = {}  # each once, though several rows may have it
    for name, commands in read_list(path).items():
        for key, command in commands.items():
            if key in done:
                rows.setdefault(name, []).append(done[key])
            else:
                missing[key] = command
    return rows, list(missing.values())


def group(lines, name_of):
    """Group lines of results -> {name_of(line): [lines]}."""
    groups = {}
    for line in lines:
        groups.setdefault(name_of(line), []).append(line)
    return groups


# --- runs -----------------------------------------------------------------------------------------


class Started(NamedTuple):
    command: str
    gpu: str
    folder: tempfile.TemporaryDirectory
    out: Path  # what it writes, by default in that folder
    process: subprocess.Popen


def start(command, gpu):
    """Start a run on a GPU, in a new folder."""
    folder = tempfile.TemporaryDirectory()
    home = Path(folder.name)
    out = home / "run"
    for flag in flags_of(command):
        if flag.startswith("--out="):  # this folder is kept
            out = Path(flag.removeprefix("--out="))
    with open(home / "errors", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, TRAIN, *flags_of(command), "--out", out],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    return Started(command, gpu, folder, out, process)


def packed_bytes(path):
    """How many bytes the masks in a mask file take. Their bits are compressed where that helps."""
    tensors = load_file(path).values() if path.exists() else []
    return sum(t.nbytes for t in tensors if t.dtype == torch.uint8)


def finish(run, results, where):
    """Append the line of a run that has ended to the results -> [], or [the error] if it failed."""
    with run.folder as folder:
        if run.process.returncode:
            errors = Path(folder, "errors").read_text("utf-8", "replace").strip()
            last = errors.split("\n")[-1] or f"exit status {run.process.returncode}"
            return [f"failed: {run.command}: {last}"]
        result = read_json(run.out / "result.json")
        result["mask_bytes"] = packed_bytes(run.out / "mask.safetensors")

    for key in ("densities", "digest"):  # of every matrix, and of the file
        result.pop(key, None)
    line = result | where | {"command": run.command}
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return []


def make_runs(commands, results, at_once):
    """Make runs, `at_once` side by side -> the errors of those that failed, a line each.

    However this ends, no run outlives it.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    where = {"gpu": name, "at_once": at_once}
    # The GPUs that this process may use, and without any [""].
    numbers = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", numbers).split(",")
    free = [gpus[slot % len(gpus)] for slot in range(at_once)]
    waiting = list(commands)
    running = []
    failed = []
    try:
        with progress(None, "runs", total=len(commands), unit="run", leave=True) as bar:
            while waiting or running:
                while waiting and free:
                    running.append(start(waiting.pop(0), free.pop(0)))
                time.sleep(0.1)
                for run in list(running):
                    if run.process.poll() is not None:
                        running.remove(run)
                        free.append(run.gpu)
                        failed += finish(run, results, where)
                        bar.update()
    finally:
        for run in running:
            run.process.kill()
            run.process.wait()
    return failed


def make_missing(path, results, at_once):
    """Make the runs of a list that the results lack. Raises ValueError if some fail."""
    results.touch()
    _, missing = read_done(path, results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    failed = make_runs(missing, results, at_once)
    if failed:
        print(*failed, sep="\n")
        raise ValueError(
            f"{len(failed)} of {len(missing)} runs failed; the same command makes them again"
        )


# --- tables and curves ----------------------------------------------------------------------------


def score(line):
    """The first metric of a run's task, on the first dev set."""
    return line["final"][data.task_of(line).metrics[0]]


task_name = itemgetter("task")
seed_of = itemgetter("seed")


# Each of these writes a cell of a table, given the lines of its row.


def metric_cell(task, metric, lines):
    """Mean ± standard deviation of a metric over seeds: "81.2±0.4".

    Shares are in percent. Where lower is better, as for perplexity, nothing is a share.
    """
    mine = [line for line in lines if line["task"] == task]
    if not mine:
        return ""
    scale = 1 if data.task_of(mine[0]).best is min else 100
    values = [scale * line["final"][metric] for line in mine]
    text = f"{statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f"±{statistics.stdev(values):.1f}"
    return text


def seeds(lines):
    """How many runs each task has: "5", or "1 to 3"."""
    counts = set(map(len, group(lines, task_name).values()))
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def mean_over_tasks(lines):
    """The mean score of tasks. Those of TOGETHER count as one."""
    means = {}
    for task, of_task in group(lines, task_name).items():
        name = TOGETHER if task in TOGETHER else task
        means.setdefault(name, []).append(statistics.mean(map(score, of_task)))
    return statistics.mean(map(statistics.mean, means.values()))


def average(tasks, lines):
    """The mean over tasks, in percent. "" if one is missing."""
    if group(lines, task_name).keys() != tasks:
        return ""
    # Rounded first: the order of sums must not decide what becomes of 0.7405.
    return f"{100 * round(mean_over_tasks(lines), 12):.1f}"


def megabytes(line):
    """What a task stores: trained numbers of four bytes, and a mask or signs."""
    packed = line.get("mask_bytes") or line["stored_bits"] / 8
    return (4 * line["stored_numbers"] + packed) / 1e6


def stored(lines):
    return f"{statistics.mean(map(megabytes, lines)):.2f} MB"


def reached(lines):
    """The density that training reached without trimming, or its range."""
    densities = [line.get("reached", line["density"]) for line in lines]
    low, high = min(densities), max(densities)
    if high - low > 0.01:
        return f"{low:.2f} to {high:.2f}"
    return f"{high:.2f}"


def minutes(lines):
    return f"{statistics.mean(line['seconds'] for line in lines) / 60:.1f}"


def table(rows, costs=False):
    """Write {row: [lines]} as a Markdown table: each task, the mean of several, how many seeds.

    The number of seeds has a column if rows differ in it.

    costs: whether to add what a task stores, the density and how long a run took.
    """
    tasks = group(sum(rows.values(), []), task_name)
    columns = {}  # {heading: the function that writes a cell}
    for task in sorted(tasks, key=[*TASKS, *tasks].index):
        for metric in tasks[task][0]["final"]:
            if metric.split()[0] == data.task_of(tasks[task][0]).metrics[0]:  # on every dev set
                columns[f"{task}, {metric}"] = partial(metric_cell, task, metric)
    # A perplexity is no share, so it has no place in an average.
    if len(tasks) > 1 and all(data.task_of(lines[0]).best is max for lines in tasks.values()):
        columns["average"] = partial(average, tasks.keys())
    heading = "method"
    counts = {seeds(lines) for lines in rows.values()}
    if len(counts) > 1:
        columns["seeds"] = seeds
    else:
        heading += f", seeds: {counts.pop()}"
    if costs:
        columns |= {"stored per task": stored, "density reached": reached, "minutes": minutes}

    written = [f"| {heading} | {' | '.join(columns)} |", "|---" * len(columns) + "|---|"]
    for name, lines in rows.items():
        cells = [write(lines) for write in columns.values()]
        written.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(written)


def setting_of(name, line):
    """Name the setting of a line: its row, and what the name of the row does not say.

    In a row named half: "half --batch=2 --evals=1 smp-s". Its flags are sorted.
    """
    label = label_of(line["command"], IN_A_SETTING)
    return " ".join([name, *sorted(set(label.split()) - set(name.split()))])


def standing(lines):
    """Rank a setting: first by how many runs it has, then by its mean score."""
    mean = statistics.mean(map(score, lines))
    lower_is_better = data.task_of(lines[0]).best is min
    return len(lines), -mean if lower_is_better else mean


def best_settings(rows, most):
    """Keep at most `most` settings of each row, the best first -> {setting: [lines]}."""
    kept = {}
    for name, lines in rows.items():
        settings = group(lines, partial(setting_of, name)).items()
        ranked = sorted(settings, key=lambda setting: standing(setting[1]), reverse=True)
        kept |= dict(ranked[:most])
    return kept


def prices(rows):
    """Collect what a task stores, and what it gets -> {method: [(MB, mean over tasks, deviation)]}.

    The deviation is over seeds, and nan for a single one. Points are in the order of MB.
    """
    by_method = {}
    for lines in rows.values():
        size = statistics.mean(map(megabytes, lines))
        scores = [mean_over_tasks(seed) for seed in group(lines, seed_of).values()]
        deviation = statistics.stdev(scores) if len(scores) > 1 else math.nan
        point = (size, statistics.mean(scores), deviation)
        by_method.setdefault(lines[0]["method"], []).append(point)
    return {name: sorted(points) for name, points in by_method.items()}


# --- rows to tune on ------------------------------------------------------------------------------


def hold_out(name, rows):
    """Split the train file of a task in two -> held/FOLDER/train.tsv and the file of each dev set.

    The lines are always shuffled alike, and the last `rows` of them become dev.
    """
    task = TASKS.get(name)
    if not task or task.read:
        raise ValueError(f"{name} is not a task with a train.tsv")
    source = split_path(task, "train", None)
    if not source.exists():  # in the cache, on first use
        task.fetch(task, "train")
    lines = list(read_lines(source))
    header = [lines.pop(0)] if isinstance(task.label, str) else []
    if rows >= len(lines):
        raise ValueError(f"--rows: {source} has only {len(lines)} rows; hold out fewer")
    random.Random(0).shuffle(lines)
    for split in ("train", *task.dev):
        part = lines[:-rows] if split == "train" else lines[-rows:]
        path = Path("held") / task.folder / task.file.format(split)
        write_whole(path, "\n".join([*header, *part, ""]).encode())
        print(path)


# --- the command ----------------------------------------------------------------------------------


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.runs", description="Make the runs of a list, or show them."
    )
    add = parser.add_subparsers(dest="do", required=True).add_parser
    run = add("run", help="make the runs that the results lack")
    show = add("table", help="show the runs as a table")
    plot = add("plot", help="draw the score over bytes per task")
    holdout = add("holdout", help="split the train file of a task, to choose settings without dev")
    for verb in (run, show, plot):
        verb.add_argument("list", type=Path, metavar="LIST", help="a text file of commands")
        verb.add_argument("--results", type=Path, default=RESULTS, help="(results/runs.jsonl)")
    run.add_argument("--at-once", type=count, default=1, help="runs side by side (1)")
    show.add_argument("--costs", action="store_true", help="add storage, density and minutes")
    show.add_argument("--best", type=count, help="only this many settings per row, the best first")
    plot.add_argument("--out", type=Path, default="price.png", help="(price.png)")
    holdout.add_argument("task")
    holdout.add_argument("--rows", type=count, default=600, help="of train that become dev (600)")
    args = parser.parse_args(argv)

    if args.do == "holdout":
        hold_out(args.task, args.rows)
    elif args.do == "run":
        make_missing(args.list, args.results, args.at_once)
    elif args.do == "table":
        rows = read_rows(args.list, args.results)
        if args.best:
            rows = best_settings(rows, args.best)
        print(table(rows, args.costs))
    else:
        plot_prices(args.out, prices(read_rows(args.list, args.results)))
        print(args.out)


if __name__ == "__main__":
    main()
