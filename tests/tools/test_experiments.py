"""tools.experiments and tools.lists make missing runs once, and their tables are right."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from data import TASKS
from plumbing import cli
from tools import experiments, lists, tune
from tools.experiments import curves, row_label, table

ROOT = Path(train.__file__).parent
RESULTS = Path(train.__file__).with_name("results") / "runs.jsonl"


@pytest.fixture
def tiny(monkeypatch, make_model, glue, tmp_path):
    """tiny() makes the missing of two runs, one of which fails until its temperature is mended."""
    monkeypatch.setattr(lists, "STEPS", {"movies": 2})
    small = {"length": 16, "batch": 8, "device": "cpu"}
    bad = [-1]

    def runs():
        yield lists.run("movies", "smp-s", 0.5, 0, **small)
        yield lists.run("movies", "smp-s", 0.5, 1, temperature=bad[0], **small)
        yield lists.run("movies", "smp-s", 0.5, 0, **small)  # again, but it is one run

    monkeypatch.setattr(experiments, "LISTS", {"tiny": runs})
    machine = ["--data-dir", glue, "--model", make_model()]

    def go():
        argv = ["run", "tiny", "--at-once", "2", "--results", tmp_path / "results", *machine]
        experiments.main([str(a) for a in argv])
        return read(go.path)

    go.path = tmp_path / "results" / "runs.jsonl"
    return go, bad


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_missing_runs_are_made_once(tiny, capsys):
    go, bad = tiny
    with pytest.raises(SystemExit):
        go()
    (line,) = read(go.path)
    out = capsys.readouterr().out
    assert (
        "0 runs of tiny are in" in out
        and "2 are missing" in out
        and "--temperature: must be greater than 0" in out
    )
    assert line["command"].startswith(
        "python train.py --task=movies --model=minilm --method=smp-s --sparsity=0.5"
    )
    assert (
        line["seed"] == 0
        and line["final"]["accuracy"] >= 0
        and line["at_once"] == 2
        and line["gpus"] == 0
    )
    assert len(line["fingerprint"]) == 64 and cli.code_version().items() <= line.items()
    bad[0] = 2
    assert [line["seed"] for line in go()] == [0, 1]
    assert "1 runs of tiny are in" in capsys.readouterr().out
    assert len(go()) == 2


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """pretend(make_run, *flags) makes six runs with another make_run -> the lines of the file."""
    monkeypatch.setattr(experiments, "LISTS", {"six": lambda: (f"--seed={n}" for n in range(6))})

    def go(make_run, *flags):
        monkeypatch.setattr(experiments, "make_run", make_run)
        experiments.main(["run", "six", "--results", str(tmp_path), *flags])
        path = tmp_path / "runs.jsonl"
        return read(path) if path.exists() else []

    return go


def test_runs_at_a_time_have_gpus_of_their_own(pretend, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    together, seen = threading.Barrier(2, timeout=20), []

    def make_run(command, machine, seconds, gpu):
        seen.append((together.wait(), gpu))  # two are there at a time, or it breaks
        return {"command": command, "final": 1}

    lines = pretend(make_run, "--at-once", "2")
    assert [line["gpus"] for line in lines] == [2] * 6
    assert sorted(gpu for _, gpu in seen) == ["3"] * 3 + ["5"] * 3


@pytest.mark.slow
def test_a_terminated_list_takes_its_runs_with_it(tmp_path):
    """SIGTERM, as a batch system sends it: the runs in progress end too, and their folders go."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tools import experiments
experiments.LISTS = {{"two": lambda: ("--seed=0", "--seed=1")}}
experiments.ROOT = Path({str(tmp_path)!r})  # its train.py only waits
experiments.main(["run", "two", "--at-once", "2", "--results", {str(tmp_path)!r}])
"""
    waits = (
        "import os, sys, time; open(f'{sys.argv[0]}.{os.getpid()}', 'w').close(); time.sleep(60)"
    )
    (tmp_path / "train.py").write_text(waits)
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(started := list(tmp_path.glob("train.py.*"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert (
        process.returncode == 130
        and "interrupted; finished runs are kept" in said
        and "Traceback" not in said
    )
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.suffix[1:]), 0)
    assert len(started) == 2


def test_time_over_is_no_failure(pretend, capsys):
    left = []

    def make_run(command, machine, seconds, gpu):
        left.append(seconds)
        raise subprocess.TimeoutExpired(command, seconds)

    assert pretend(make_run, "--seconds", "100") == []
    assert len(left) == 6 and all(90 < seconds <= 100 for seconds in left)
    assert capsys.readouterr().out.count("stopped, out of time") == 6
    assert pretend(make_run, "--seconds", "0.5") == [] and len(left) == 6  # too late to begin


def line(task, method, seed, value, **more):
    steps = lists.STEPS[task]
    command = f"python train.py --task={task} --model=minilm --method={method}"
    command += f" --steps={steps} --seed={seed}"
    sparsity, final = 0.5 if method == "l0" else 0.2, {"accuracy": value, "f1": 0.1}
    result = {
        "command": command,
        "task": task,
        "method": method,
        "sparsity": sparsity,
        "final": final,
    }
    result |= {"density": 0.5, "seconds": 90.0, "stored_numbers": 0, "stored_bits": 10_600_000}
    return result | {"best": {"dev": {"accuracy": value + 0.01}}} | more


def test_a_table_by_hand():
    lines = [
        line("movies", "smp-s", 0, 0.85),
        line("movies", "smp-s", 1, 0.87),
        line("mrpc", "smp-s", 0, 0.8),
    ]
    lines.append(line("mrpc", "l0", 0, 0.7, reached=0.31, stored_numbers=2_500_000))
    lines.append(line("mrpc", "l0", 1, 0.7, reached=0.42, stored_numbers=2_500_000))
    lines.append(line("mrpc", "smp-s", 2, 0.5, stored_numbers=770))
    lines[-1]["command"] = (
        lines[-1]["command"].replace("--seed", "0 --seed").replace(" 0 ", "0 ")
    )  # another row
    rows = table(lines).splitlines()
    tasks = "movies, accuracy (seeds) | mrpc, accuracy (seeds)"
    assert rows[0] == f"| method | {tasks} | stored a task | density reached | minutes |"
    assert (
        rows[2] == "| smp-s | 86.0 ± 1.4 (2) | 80.0 (1) | 10.6 Mbit | 0.50 | 1.5 |"
    )  # less sparse comes first
    assert rows[3] == "| smp-s --steps=34500 |  | 50.0 (1) | 770 numbers + 10.6 Mbit | 0.50 | 1.5 |"
    assert rows[4] == "| l0 |  | 70.0 ± 0.0 (2) | 2.5 M numbers + 10.6 Mbit | 0.31 to 0.42 | 1.5 |"


def test_tasks_with_settings_of_their_own_share_a_row():
    own = {task: lists.BY_TASK[task, "soft-movement", 0.5] for task in ("movies", "mrpc")}
    assert own["movies"] != own["mrpc"]

    def made(task, flags, method="soft-movement"):
        command = f"python train.py {lists.run(task, method, 0.5, weight_lr=1e-4, **flags)}"
        return line(task, method, 0, 0.8) | {"command": command, "sparsity": 0.5}

    lines = [made("movies", own["movies"]), made("mrpc", own["mrpc"]), made("mrpc", {"penalty": 9})]
    lines.append(made("mrpc", own["mrpc"], "movement"))
    soft, rate = "soft-movement --sparsity=0.5", "--weight-lr=0.0001"
    named = [f"{soft} {rate} BY_TASK"] * 2 + [f"{soft} --penalty=9 {rate}"]
    assert [row_label(made, merge=True) for made in lines[:3]] == named
    assert row_label(lines[3], merge=True) == row_label(
        lines[3]
    )  # another method's flags, though they are the same
    spelt = [row_label(made) for made in lines[:2]]
    assert spelt == [
        " ".join([soft, *lists.as_flags(own[task]), rate]) for task in ("movies", "mrpc")
    ]
    assert sum(row.startswith("| soft") for row in table(lines, merge=True).splitlines()) == 2
    assert all(
        row.count("80.0 (1)") == 1 for row in table(lines[:3]).splitlines()[2:]
    )  # each row has its results


def test_a_table_of_equal_budgets_by_hand(monkeypatch):
    """Rows bear the method's name alone, and two tasks that share sentences count as one."""
    monkeypatch.setattr(lists, "CHOSEN", {"smp-s --sparsity=0.5": "--no-dropout --lr=0.01"})
    monkeypatch.setattr(experiments, "MAIN_ROWS", lists.main_rows())
    commands = [f"python train.py {arguments}" for arguments in lists.main()]
    assert len(commands) == 5 * 5
    assert commands[0].endswith(
        "--method=smp-s --sparsity=0.5 --steps=1196 --seed=10 --no-dropout --lr=0.01"
    )
    values = {"movies": 0.9, "sst2": 0.7, "mrpc": 0.5, "cola": 0.4, "stsb": 0.1}
    lines = []
    for command in commands:
        task = shlex.split(command)[2].removeprefix("--task=")
        lines.append(
            line("movies", "smp-s", 0, 0.0) | {"command": command, "task": task, "sparsity": 0.5}
        )
        lines[-1]["final"] = {TASKS[task].metrics[0]: values[task]}
    head, _, row = table(lines, averages=True).splitlines()
    assert "sst2, accuracy (seeds) | average | stored" in head
    assert row.startswith("| smp-s --sparsity=0.5 | 90.0 ± 0.0 (5) |")
    assert "| 70.0 ± 0.0 (5) | 45.0 | 10.6 Mbit |" in row  # (80 + 50 + 40 + 10) / 4
    without = [made for made in lines if made["task"] != "sst2"]
    assert "|  | 10.6 Mbit" in table(without, averages=True)  # not all have run


def test_curves_by_hand():
    lines = [
        line("movies", "l0", seed, value, sparsity=0.9) for seed, value in ((0, 0.8), (1, 0.84))
    ]
    lines += [
        line("movies", "l0", 0, 0.85, sparsity=0.5),
        line("movies", "finetune", 0, 0.86, sparsity=0.0),
    ]
    for made in lines:
        made["command"] += f" --sparsity={made['sparsity']}"
    found = curves(lines)
    assert list(found) == ["movies, finetune", "movies, l0"]
    (half, mean, spread), tenth = found["movies, l0"]
    assert (half, mean) == (0.5, 0.85) and spread != spread  # of one seed there is no deviation
    assert tenth == (0.9, pytest.approx(0.82), pytest.approx(0.04 / 2**0.5))


def test_what_cannot_be_shown_is_refused(tmp_path, fails):
    for text in ("5", "{}", json.dumps(line("movies", "l0", 0, 0.8) | {"task": "none"})):
        (tmp_path / "runs.jsonl").write_text(text + "\n")
        error = fails(experiments.main, ["table", "main", "--results", tmp_path])
        assert "runs.jsonl:1 is not the result of a run (" in error
    (tmp_path / "runs.jsonl").unlink()
    assert "make them with: python -m tools.experiments run main" in fails(
        experiments.main, ["table", "main", "--results", tmp_path]
    )
    assert "plot is for the list `curve`" in fails(experiments.main, ["plot", "main"])


@pytest.mark.slow
def test_the_lists_are_what_is_reported():
    done = [line["command"] for line in read(RESULTS)]
    wanted = {
        command
        for name in (*lists.LISTS, *experiments.RECORDED)
        for command in experiments.commands(name)
    }
    wanted |= {*tune.first_round(), *tune.second_round(tune.read_done(RESULTS.parent))}
    assert len(done) == len(set(done)) and set(done) == wanted
    for command in {re.sub(" --seed=[0-9]+", "", command) for command in wanted}:
        train.parse_args(shlex.split(command)[2:])  # exits if a flag is unknown or out of range
    assert len(experiments.commands("main")) == len(tune.GRIDS) * 5 * 5


def test_what_equal_budgets_chose_is_what_stands_in_the_lists():
    done = tune.read_done(RESULTS.parent)
    assert {tune.name_of(*row): tune.chosen(done, row)[1] for row in tune.GRIDS} == lists.CHOSEN
    assert len(done) == len(tune.GRIDS) * 2 * (10 + 3 * 2)  # the same budget for all
    assert not any("--data-dir" in command for command in experiments.commands("main"))
    assert not set(lists.FRESH) & set(tune.SEEDS)


@pytest.mark.slow
def test_what_was_chosen_came_out_best_of_what_was_tried():
    tried = set(experiments.commands("tuning"))
    done = read(RESULTS)
    chosen = [
        ("mrpc", "finetune", None),
        ("mrpc", "magnitude", 0.5),
        ("mrpc", "magnitude", 0.9),
        *lists.BY_TASK,
    ]
    chosen += [
        ("mrpc", "smp-w", 0.5),
        ("mrpc", "smp-w", 0.9),
        *(("ptb", *key) for key in lists.PTB),
    ]
    flags = {run: lists.tuned(*run) for run in chosen}
    for (task, method, sparsity), own in flags.items():
        of = {"task": task, "method": method, "sparsity": sparsity or 0, "seed": 0}
        rivals = [made for made in done if made["command"] in tried and of.items() <= made.items()]
        reached = [made["final"][TASKS[task].metrics[0]] for made in rivals]
        best = [
            made
            for made, value in zip(rivals, reached, strict=True)
            if value == TASKS[task].best(reached)
        ]
        assert len(rivals) > 4 and any(own.items() <= made.items() for made in best), of
    for sparsity in lists.SPARSITIES:  # chosen by its mean over seeds, on another task
        assert (
            f"python train.py {lists.run('movies', 'movement', sparsity, **lists.MOVEMENT)}"
            in tried
        )
