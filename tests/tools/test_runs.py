"""tools.runs: a list's missing runs are made once, and its tables are right."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train
from data import TASKS
from tools import runs

ROOT = Path(train.__file__).parent
LISTS = sorted((ROOT / "results" / "lists").glob("*.txt"))

# Stands for train.py. It fails for seed 13, waits for ever for seed 99, and with --together it
# waits until two of it have started.
TRAIN = """
import json, os, sys, time
from pathlib import Path

here, out = Path(__file__).parent, Path(sys.argv[-1])
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:-2])
(here / f"started.{os.getpid()}").touch()
if flags["seed"] == "13":
    print("a warning", file=sys.stderr)
    sys.exit("error: --seed: 13 is bad luck")
while flags["seed"] == "99" or "together" in flags and len(list(here.glob("started.*"))) < 2:
    time.sleep(0.01)
gpu = os.environ["CUDA_VISIBLE_DEVICES"]
result = {"task": "movies", "method": "smp-s", "sparsity": 0.5, "seed": int(flags["seed"])}
result |= {"final": {"accuracy": 0.8}, "density": 0.5, "seconds": 60.0, "on": gpu}
result |= {"stored_numbers": 0, "stored_bits": 8_000_000, "densities": {"query": [0.5]}}
out.mkdir()
(out / "result.json").write_text(json.dumps(result))
"""


# tools.runs, which sends itself a signal while it waits for its second run.
TERMINATED = """
import os, signal, sys, time
from pathlib import Path
from tools import runs
runs.TRAIN = Path({folder!r}, "train.py")
real = time.sleep
def sleep(seconds):  # by now, whatever has started is known
    real(seconds)
    if len(list(Path({folder!r}).glob("started.*"))) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
time.sleep = sleep
runs.main(sys.argv[1:])
"""


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """quick(text of a list, *flags) makes its runs with TRAIN -> the lines of the results."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(runs, "TRAIN", tmp_path / "train.py")

    def go(text, *flags):
        (tmp_path / "list.txt").write_text(text)
        argv = ["run", tmp_path / "list.txt", "--results", tmp_path / "results.jsonl", *flags]
        runs.main([str(a) for a in argv])
        return read(tmp_path / "results.jsonl")

    return go


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- lists ----------------------------------------------------------------------------------------


def test_a_list_by_hand(tmp_path, fails):
    path = tmp_path / "list.txt"
    path.write_text("""
        # two rows, one with a name
        python train.py --method=smp-s --task=rte --seed=3-4 --lr 0.1

        [dense]
        python train.py --task=rte --method=finetune --seed 0
        python train.py --task=mrpc --method=finetune
    """)
    rows = runs.read_list(path)
    assert list(rows) == ["smp-s --lr=0.1", "dense"]
    assert list(rows["smp-s --lr=0.1"].values()) == [
        "python train.py --method=smp-s --task=rte --seed=3 --lr 0.1",
        "python train.py --method=smp-s --task=rte --seed=4 --lr 0.1",
    ]
    assert len(rows["dense"]) == 2
    path.write_text("# a comment\u2028 in two parts\ntrain.py --seed 3\n")
    command = ["run", path, "--results", tmp_path / "results.jsonl"]
    assert f"{path}:2: must be `python train.py" in fails(runs.main, command)
    for line, said in {
        "python train.py movies": "must be `python train.py",
        "python train.py --model='m": "No closing quotation",
        "python train.py --seed=14-10": "--seed=14-10 must count upwards",
        "python train.py --seed 5-6 --out x": "--seed 5-6 must count upwards, and its runs cannot",
    }.items():
        path.write_text(line)
        assert f"{path}:1: {said}" in fails(runs.main, command)


def test_a_run_is_known_by_its_flags_in_any_order():
    one = runs.key_of("python train.py --lr 0.01 --no-dropout  --data-dir=a--b --seed=3")
    assert one == runs.key_of("python train.py --seed=3 --data-dir a--b --lr=0.01 --no-dropout")
    assert one == {"--lr=0.01", "--no-dropout", "--data-dir=a--b", "--seed=3"}
    assert runs.key_of("python train.py") == set()
    quoted = runs.key_of("""python train.py --train "my file --2.csv" --text='it is'""")
    assert quoted == {"--train=my file --2.csv", "--text=it is"}


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_missing_runs_are_made_and_a_failed_one_is_named(quick, tmp_path, capsys):
    some = "python train.py --task=movies --seed=12-14\n"
    with pytest.raises(SystemExit):
        quick(some)
    out, err = capsys.readouterr()
    assert err.endswith("error: 1 of 3 runs failed; the same command makes them again\n")
    assert "failed: python train.py --task=movies --seed=13: error: --seed: 13 is bad luck" in out
    lines = read(tmp_path / "results.jsonl")
    assert [line["seed"] for line in lines] == [12, 14]  # the others went on
    assert lines[0]["command"] == "python train.py --task=movies --seed=12"
    assert lines[0]["at_once"] == 1 and lines[0]["gpu"] is None and "densities" not in lines[0]

    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace('"13"', '"none"'))
    assert [line["seed"] for line in quick(some)] == [12, 14, 13]
    assert len(quick("python train.py --seed 13 --task movies\n")) == 3  # as it is spelt elsewhere


@pytest.mark.slow
def test_runs_side_by_side_have_gpus_of_their_own(quick, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    lines = quick("python train.py --seed=0-1 --together", "--at-once", 2)
    assert sorted(line["on"] for line in lines) == ["3", "5"]


@pytest.mark.slow
def test_an_interrupted_list_goes_on(tmp_path):
    """SIGTERM, as a batch system sends it, ends the run in progress too. The finished one stays."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "list.txt").write_text("python train.py --seed=0\npython train.py --seed=99\n")
    results = tmp_path / "results.jsonl"
    code = TERMINATED.format(folder=str(tmp_path))
    words = [sys.executable, "-c", code, "run", tmp_path / "list.txt", "--results", results]
    ended = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said, started = ended.stderr, list(tmp_path.glob("started.*"))
    assert ended.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert len(started) == 2 and [line["seed"] for line in read(results)] == [0]
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.suffix[1:]), 0)
        path.unlink()

    (tmp_path / "train.py").write_text(TRAIN.replace('"99"', '"none"'))
    subprocess.run(words, cwd=ROOT, check=True)
    assert [line["seed"] for line in read(results)] == [0, 99]


@pytest.mark.slow
def test_a_tiny_model_is_trained_and_shown(make_model, glue, tmp_path, capsys):
    command = f"python train.py --task=movies --model={make_model()} --data-dir={glue}"
    command += " --length=16 --batch=8 --steps=2 --device=cpu"
    (tmp_path / "list.txt").write_text(f"[tiny]\n{command} --seed=0\n{command} --steps=-1\n")
    argv = [str(tmp_path / "list.txt"), "--results", str(tmp_path / "results.jsonl")]
    with pytest.raises(SystemExit):
        runs.main(["run", *argv, "--at-once", "2"])
    assert "--steps: must be a whole number" in capsys.readouterr().out
    runs.main(["table", *argv, "--costs"])
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| method, seeds: 1 | movies, accuracy | stored per task |")
    assert row.startswith("| tiny | ") and " | 0.00 MB | 0.50 | " in row


# --- tables and curves ----------------------------------------------------------------------------


def line(task, value, method="smp-s", sparsity=0.5, flags="", **more):
    """A line of results whose first metric has a value."""
    command = f"python train.py --task={task} --method={method} {flags}"
    result = {"command": command, "task": task, "method": method, "sparsity": sparsity}
    result |= {"final": {TASKS[task].metrics[0]: value}, "density": 0.5, "seconds": 90.0}
    return result | {"stored_numbers": 0, "stored_bits": 10_600_000} | more


def test_a_table_by_hand():
    soft = {"stored_numbers": 2_500_000, "flags": "--seed=0"}
    rows = {
        "smp-s": [line("mrpc", 0.8), line("movies", 0.85), line("movies", 0.87)],
        "soft": [line("mrpc", 0.7, reached=0.31, **soft), line("mrpc", 0.7, reached=0.42, **soft)],
        "head": [line("mrpc", 0.5, stored_numbers=770, seconds=30.0)],
    }
    tasks = "movies, accuracy | mrpc, accuracy"
    assert runs.table(rows, costs=True).splitlines() == [
        f"| method | {tasks} | average | seeds | stored per task | density reached | minutes |",
        "|---|---|---|---|---|---|---|---|",
        "| smp-s | 86.0±1.4 | 80.0 | 83.0 | 1 to 2 | 1.32 MB | 0.50 | 1.5 |",
        "| soft |  | 70.0±0.0 |  | 2 | 11.32 MB | 0.31 to 0.42 | 1.5 |",
        "| head |  | 50.0 |  | 1 | 1.33 MB | 0.50 | 0.5 |",
    ]


def test_an_average_by_hand():
    """Two tasks that share sentences count as one. A row that lacks a task has no average."""
    values = {"movies": 0.9, "mrpc": 0.5, "cola": 0.4, "stsb": 0.1, "sst2": 0.7}
    whole = [line(task, value) for task, value in values.items()]
    head, _, row, other = runs.table({"a": whole, "b": whole[:4]}).splitlines()
    assert head.startswith("| method, seeds: 1 |") and head.endswith("| stsb, pearson | average |")
    assert row.endswith("| 10.0 | 45.0 |")  # (80 + 50 + 40 + 10) / 4
    assert other.endswith("| 10.0 |  |")


def test_a_perplexity_is_no_share_and_has_a_column_for_every_set():
    final = {"perplexity": 27.24, "word_perplexity": 90.0, "perplexity test": 25.0}
    head, _, row = runs.table({"a": [line("ptb", 0) | {"final": final}]}).splitlines()
    assert head == "| method, seeds: 1 | ptb, perplexity | ptb, perplexity test |"
    assert row == "| a | 27.2 | 25.0 |"
    head, *_ = runs.table({"a": [line("ptb", 27.0), line("wikitext2", 27.0)]}).splitlines()
    assert "average" not in head


def test_the_best_settings_by_hand():
    """Of rates 1 to 4 the first three went on to a second seed, where the first fell behind."""
    found = [(1, 0, 0.9), (2, 0, 0.8), (3, 0, 0.7), (4, 0, 0.6), (1, 1, 0.1), (2, 1, 0.8)]
    found.append((3, 1, 0.7))
    lines = []
    for rate, seed, value in found:
        lines.append(line("rte", value, flags=f"--steps=9 --seed={seed} --lr={rate}"))
    best = runs.best_settings({"smp-s": lines, "again": lines[3:4]}, most=2)
    assert list(best) == ["smp-s --lr=2", "smp-s --lr=3", "again --lr=4 smp-s"]
    assert [made["final"]["accuracy"] for made in best["smp-s --lr=2"]] == [0.8, 0.8]
    one = [line("rte", 0.5, flags=flags) for flags in ("--lr=1 --ramp=0.5", "--ramp=0.5 --lr=1")]
    one.append(line("rte", 0.5) | {"command": "python train.py --ramp=0.5 --lr=1 --method=smp-s"})
    assert list(runs.best_settings({"half": one}, most=2)) == ["half --lr=1 --ramp=0.5 smp-s"]
    texts = [line("ptb", 40.0, flags="--lr=1"), line("ptb", 30.0, flags="--lr=2")]
    assert list(runs.best_settings({"smp-s": texts}, most=1)) == ["smp-s --lr=2"]  # lower is better


def test_prices_by_hand():
    """A number takes four bytes, and a mask the bytes of its file where these are known."""
    rows = {}
    for name, size in (("few", 250_000), ("many", 0)):
        rows[name] = []
        for seed, value in enumerate((0.5, 0.7)):
            for task in ("mrpc", "rte"):
                rows[name].append(line(task, value, seed=seed, mask_bytes=size))
    rows["dense"] = [line("mrpc", 0.9, "finetune", seed=0, stored_numbers=10**6, stored_bits=0)]
    found = runs.prices(rows)
    few, many = found["smp-s"]
    assert few == (0.25, pytest.approx(0.6), pytest.approx(0.2 / 2**0.5)) and many[0] == 1.325
    assert found["finetune"][0][:2] == (4.0, 0.9)


def test_a_command_may_keep_the_folder_of_its_run(quick, tmp_path):
    (line,) = quick(f"python train.py --task=movies --seed=3 --out={tmp_path}/kept")
    assert (tmp_path / "kept" / "result.json").exists() and line["mask_bytes"] == 0
    save_file({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(9)}, tmp_path / "m")
    assert runs.packed_bytes(tmp_path / "m") == 3
    assert runs.label_of(line["command"]) == ""
    quick(f"python train.py --task=movies --seed=4 --out {tmp_path}/kept.too")
    assert (tmp_path / "kept.too" / "result.json").exists()


def test_what_is_shown_of_a_file_of_results(tmp_path, capsys, fails):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line("rte", 0.5, flags="--lr=1 --seed=0")) + "\n")
    (tmp_path / "list.txt").write_text("python train.py --task=rte --method=smp-l\n")
    error = fails(runs.main, ["table", tmp_path / "list.txt", "--results", path])
    listed = path.parent / "list.txt"
    assert error.endswith(f"no run of {listed}; to make them: python -m tools.runs run {listed}")
    some = "python train.py --task=rte --seed=0-2 --method=smp-s --lr=1"
    (tmp_path / "list.txt").write_text(f"[a]\n{some}\n[b]\n{some}")  # rows may share runs
    runs.main(["table", str(tmp_path / "list.txt"), "--results", str(path)])
    said = capsys.readouterr().err
    assert said == f"runs of {tmp_path}/list.txt that are missing in {path}: 2\n"
    none = ["table", tmp_path / "list.txt", "--results", tmp_path / "none.jsonl"]
    assert "there is no " in fails(runs.main, none)
    assert "unrecognized arguments: --rows" in fails(runs.main, [*none, "--rows", 3])
    wrong = [line("rte", 0.5) | {"task": "none"}, line("rte", 0.5) | {"command": "python a.py b"}]
    for text in ("5", "{}", "<<<<", "[" * 100_000, *map(json.dumps, wrong)):
        path.write_text(f"{json.dumps(line('rte', 0.5))}\n{text}\n")
        command = ["table", tmp_path / "list.txt", "--results", path]
        assert "results.jsonl:2 is not the result of a run" in fails(runs.main, command)


def test_a_plot_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["plot", str(ROOT / "results" / "lists" / "main.txt"), "--out", f"{tmp_path}/a.png"]
    runs.main(argv)
    assert capsys.readouterr().out == f"{tmp_path}/a.png\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- rows to tune on ------------------------------------------------------------------------------


def test_rows_are_held_out(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setenv("SMP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder, header in (("movies", ["sentence\tlabel"]), ("CoLA", [])):
        rows = [f"a\t{n % 2}\t*\ttext {n}" if folder == "CoLA" else f"{n}\t1" for n in range(10)]
        (tmp_path / "glue" / folder).mkdir(parents=True)
        text = "\n".join([*header, *rows, ""])
        (tmp_path / "glue" / folder / "train.tsv").write_text(text)
        runs.main(["holdout", folder.lower(), "--rows", "3"])
        parts = []
        for split, size in (("train", 7), ("dev", 3)):
            lines = (tmp_path / "held" / folder / f"{split}.tsv").read_text().splitlines()
            assert lines[: len(header)] == header and len(lines) == size + len(header)
            parts += lines[len(header) :]
        assert sorted(parts) == sorted(rows) and parts != rows  # all of them once, in a new order
    assert "held/CoLA/dev.tsv\n" in capsys.readouterr().out
    assert "squad is not a task with" in fails(runs.main, ["holdout", "squad", "--rows", 3])
    before = (tmp_path / "held" / "movies" / "train.tsv").read_bytes()
    for rows in (10, 99999):
        said = fails(runs.main, ["holdout", "movies", "--rows", rows])
        assert "--rows: " in said and "train.tsv has only 10 rows" in said
    assert (tmp_path / "held" / "movies" / "train.tsv").read_bytes() == before


def test_a_task_with_two_dev_sets_gets_both(tmp_path, monkeypatch):
    monkeypatch.setenv("SMP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue" / "MNLI").mkdir(parents=True)
    (tmp_path / "glue" / "MNLI" / "train.tsv").write_text("a\n1\n2\n3\n")
    runs.main(["holdout", "mnli", "--rows", "1"])
    found = {}
    for split in ("train", *TASKS["mnli"].dev):
        header, *found[split] = (tmp_path / "held" / "MNLI" / f"{split}.tsv").read_text().split()
        assert header == "a"
    assert found["dev_matched"] == found["dev_mismatched"] and len(found["dev_matched"]) == 1
    assert sorted(found["train"] + found["dev_matched"]) == ["1", "2", "3"]


# --- the lists of results/ ------------------------------------------------------------------------


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_run_of_the_lists_is_made(path):
    done = runs.read_results(runs.RESULTS)
    for commands in runs.read_list(path).values():
        assert commands.keys() <= done.keys()


def test_every_result_is_of_a_list():
    listed = set()
    for path in LISTS:
        for commands in runs.read_list(path).values():
            listed |= commands.keys()
    assert runs.read_results(runs.RESULTS).keys() <= listed


def test_results_are_of_clean_commits():
    for line in runs.read_results(runs.RESULTS).values():
        assert line["clean"], line["command"]


@pytest.mark.slow
def test_train_takes_every_flag_of_the_lists():
    for path in LISTS:
        text = path.read_text()
        for command in {line for line in text.splitlines() if line.startswith("python")}:
            train.parse_args(shlex.split(runs.expand(command)[0])[2:])  # exits if one is unknown


def settings_of(command):
    return set(runs.label_of(command, (*runs.IN_A_ROW, "--steps=", "--data-dir=")).split())


def test_what_tuning_chose_is_what_is_run():
    """Ten settings for each method, the best three of them with three seeds."""
    tuning = runs.read_rows(ROOT / "results" / "lists" / "tuning.txt", runs.RESULTS)
    main = runs.read_list(ROOT / "results" / "lists" / "main.txt")
    best = runs.best_settings(tuning, most=1).values()
    chosen = dict(zip(tuning, best, strict=True))
    for tried in tuning.values():
        assert len(tried) == 2 * (10 + 3 * 2)
        assert all("--data-dir=held" in made["command"] for made in tried)
    for name, commands in main.items():
        for command in commands.values():
            assert "--data-dir" not in command
            if name in chosen:
                assert settings_of(command) == settings_of(chosen[name][0]["command"])


def rivals():
    """What tuning-rivals.txt has tried: {row: {task: [lines]}}, five settings of each."""
    path = ROOT / "results" / "lists" / "tuning-rivals.txt"
    if not path.exists():
        return {}
    rows = runs.read_rows(path, runs.RESULTS)
    return {name: runs.group(lines, runs.task_name) for name, lines in rows.items()}


def test_what_rivals_run_is_the_best_of_five_settings():
    """By the mean over tasks. Where five tasks were tried, each has its own."""
    tried = rivals()
    for name, tasks in tried.items():
        means = {}
        for lines in tasks.values():
            assert len(lines) <= 5
            for line in lines:
                setting = frozenset(settings_of(line["command"]))
                means.setdefault(setting, []).append(runs.score(line))
        means = {s: sum(values) for s, values in means.items() if len(values) == len(tasks)}
        assert 4 <= len(means) <= 5  # at too high a rate one may diverge
        best = {task: max(means, key=means.get) for task in runs.TASKS}
        if len(tasks) == 5:
            for task, lines in tasks.items():
                line = max(lines, key=runs.score)
                best[task] = frozenset(settings_of(line["command"]))
        rows = runs.read_list(ROOT / "results" / "lists" / "price.txt")
        for command in rows.get(name, {}).values():
            task = command.split("--task=")[1].split()[0]
            assert settings_of(command) == best[task]
