"""experiments.py: missing runs are made once, failures are said and tried again, tables are right."""

import json

import pytest

import experiments
import train
from experiments import table


@pytest.fixture
def tiny(monkeypatch, make_model, glue, tmp_path):
    """tiny() makes the missing of two runs, one of which fails until its temperature is mended."""
    monkeypatch.setattr(experiments, "STEPS", {"movies": 2})
    small = {"length": 16, "batch": 8, "device": "cpu"}
    bad = [-1]

    def runs():
        yield experiments.run("movies", "smp-s", 0.5, 0, **small)
        yield experiments.run("movies", "smp-s", 0.5, 1, temperature=bad[0], **small)

    monkeypatch.setattr(experiments, "LISTS", {"tiny": runs})
    model = str(make_model())

    def go():
        argv = [
            "run",
            "tiny",
            "--at-once",
            "2",
            "--results",
            tmp_path / "results",
            "--data-dir",
            glue,
            "--model",
            model,
        ]
        experiments.main([str(a) for a in argv])
        return read(go.path)

    go.path = tmp_path / "results" / "tiny.jsonl"
    return go, bad


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_missing_runs_are_made_once(tiny, capsys):
    go, bad = tiny
    with pytest.raises(SystemExit):
        go()
    (line,) = read(go.path)
    out = capsys.readouterr().out
    assert "0 runs are in" in out and "2 are missing" in out and "--temperature must be greater than 0" in out
    assert line["command"].startswith("python train.py --task=movies --model=minilm --method=smp-s --sparsity=0.5")
    assert line["seed"] == 0 and line["final"]["accuracy"] >= 0 and line["at_once"] == 2 and "commit" in line
    bad[0] = 2
    assert [line["seed"] for line in go()] == [0, 1]
    assert "1 runs are in" in capsys.readouterr().out
    assert len(go()) == 2


def line(task, method, seed, value, **more):
    steps = experiments.STEPS[task]
    command = f"python train.py --task={task} --model=minilm --method={method} --steps={steps} --seed={seed}"
    result = {
        "command": command,
        "task": task,
        "method": method,
        "sparsity": 0.5 if method == "l0" else 0.2,
        "final": {"accuracy": value, "f1": 0.1},
        "density": 0.5,
        "seconds": 90.0,
    }
    result |= {"best": {"dev": {"accuracy": value + 0.01}}, "stored_numbers": 0, "stored_bits": 10_600_000}
    return result | more


def test_a_table_by_hand():
    lines = [line("movies", "smp-s", 0, 0.85), line("movies", "smp-s", 1, 0.87), line("mrpc", "smp-s", 0, 0.8)]
    lines.append(line("mrpc", "l0", 0, 0.7, reached=0.31, stored_numbers=2_500_000))
    lines.append(line("mrpc", "smp-s", 2, 0.5, stored_numbers=770))
    lines[-1]["command"] = lines[-1]["command"].replace("steps=", "steps=1")  # another row, which says so
    rows = table(lines).splitlines()
    tasks = "movies, accuracy (seeds) | mrpc, accuracy (seeds)"
    assert rows[0] == f"| method | {tasks} | stored a task | density reached | minutes |"
    assert rows[2] == "| smp-s | 86.0 ± 1.4 (2) | 80.0 (1) | 10.6 Mbit | 0.50 | 1.5 |"  # less sparse comes first
    assert rows[3] == "| smp-s --steps=13450 |  | 50.0 (1) | 770 numbers + 10.6 Mbit | 0.50 | 1.5 |"
    assert rows[4] == "| l0 |  | 70.0 (1) | 2.5 M numbers + 10.6 Mbit | 0.31 | 1.5 |"
    assert "| 87.0 ± 1.4 (2) |" in table(lines, "best")


def test_a_penalty_of_the_task_is_named_as_such_and_another_is_said():
    own = experiments.PENALTIES[0.5]
    assert own["movies"] != own["mrpc"]
    made = [experiments.run(t, "soft-movement", 0.5, penalty=own[t], weight_lr=1e-4) for t in ("movies", "mrpc")]
    made.append(experiments.run("mrpc", "soft-movement", 0.5, penalty=own["movies"], weight_lr=1e-4))
    tasks = ("movies", "mrpc", "mrpc")
    kinds = [
        experiments.kind({"command": f"python train.py {arguments}", "task": task, "sparsity": 0.5})
        for arguments, task in zip(made, tasks, strict=True)
    ]
    assert kinds[0] == kinds[1] == "soft-movement --sparsity=0.5 --penalty=PENALTIES --weight-lr=0.0001"
    assert kinds[2] == f"soft-movement --sparsity=0.5 --penalty={own['movies']} --weight-lr=0.0001"


def test_curves_by_hand():
    lines = [line("movies", "smp-s", seed, value, sparsity=0.9) for seed, value in ((0, 0.8), (1, 0.84))]
    lines += [line("movies", "smp-s", 0, 0.85, sparsity=0.5), line("movies", "finetune", 0, 0.86, sparsity=0.0)]
    found = experiments.curves(lines)
    assert list(found) == ["movies, finetune", "movies, smp-s"]
    (half, mean, spread), tenth = found["movies, smp-s"]
    assert (half, mean) == (0.5, 0.85) and spread != spread  # of one seed there is no deviation
    assert tenth == (0.9, pytest.approx(0.82), pytest.approx(0.04 / 2**0.5))


def test_a_broken_results_file_is_named(tmp_path, fails):
    (tmp_path / "main.jsonl").write_text("5\n")
    assert "main.jsonl:1 is not the result of a run" in fails(
        experiments.main, ["table", "main", "--results", tmp_path]
    )


def test_lists_have_the_runs_that_are_reported():
    main = list(experiments.compared())
    assert len(main) == len(set(main)) == 12 * (5 * 5 + 3)
    for make in experiments.LISTS.values():
        for arguments in make():
            train.parse_args(experiments.shlex.split(arguments))  # exits if a flag is unknown or out of range
