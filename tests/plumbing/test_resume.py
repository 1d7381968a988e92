"""A run that is killed and resumed ends with the masks of one that was not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, bert_tensors, put_back, write_glue, write_model
from safetensors.torch import save_file

import data
import train
from plumbing import run as plumbing_run
from plumbing.files import lock, read_masks, seal, unseal
from plumbing.run import FORMAT, open_log, read_checkpoint

ROOT = Path(__file__).parent.parent.parent
ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # as here: other numbers of threads may round differently
# train.py, which kills itself when it syncs a file to disk for the n-th time. That file is half
# written then.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
from plumbing import files
torch.set_num_threads(1)
left = {nth}
def fsync(number):
    global left
    left -= 1
    if not left:
        os.ftruncate(number, os.fstat(number).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
files.os.fsync = fsync
train.main(sys.argv[1:])
"""


@pytest.fixture
def flags(make_model, glue):
    return flags_of(make_model(), glue)


def flags_of(model, glue):
    given = ["--model", model, "--data-dir", glue, "--steps", 16, "--batch", 8, "--length", 16]
    given += ["--evals", 8]
    return [str(f) for f in [*given, "--device", "cpu", "--dtype", "float32"]]


def masks_of(folder):
    tensors, description = read_masks(folder / "mask.safetensors")
    return {name: mask.tolist() for name, mask in tensors.items()}, description["run"]


def kill_when(command, ready, number):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=ONE_THREAD)
    while not ready() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def resumed(folder, steps):
    train.main(["--resume", str(folder)])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "dev" in line]
    assert evaluated == list(range(steps // 8, steps + 1, steps // 8))  # each once, in order
    assert not (folder / "checkpoint.safetensors").exists()
    return masks_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["between evaluations", "while a checkpoint is written", "at the end"]
)
def test_killed_and_resumed(flags, tmp_path, moment):
    steps = 160 if moment == "between evaluations" else 16  # so many that the signal comes in time
    flags = [*flags, "--steps", str(steps)]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    masks, run = masks_of(tmp_path / "whole")
    folder = tmp_path / "run"
    log, checkpoint = folder / "log.jsonl", folder / "checkpoint.safetensors"
    if moment == "between evaluations":
        command = [sys.executable, ROOT / "train.py", *flags, "--out", folder]
        ready = lambda: checkpoint.exists() and len(log.read_text().splitlines()) > 12  # noqa: E731
        code, _ = kill_when(command, ready, signal.SIGKILL)
    else:
        nth = 3 if "written" in moment else 8  # seven checkpoints, then the mask file
        command = [sys.executable, "-c", KILLED.format(root=str(ROOT), nth=nth), *flags]
        command += ["--out", folder]
        code = subprocess.run(command, capture_output=True, env=ONE_THREAD).returncode
    assert code == -signal.SIGKILL and checkpoint.exists() and not (folder / "result.json").exists()
    found, described = resumed(folder, steps)
    assert (
        found == masks and described["final"] == run["final"] and described["best"] == run["best"]
    )


@pytest.mark.slow
def test_interrupted_finishes_the_step_and_says_how_to_go_on(flags, tmp_path):
    folder, flags = tmp_path / "run", [*flags, "--steps", "160"]
    command = [sys.executable, ROOT / "train.py", *flags, "--out", folder]
    ready = lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text()  # noqa: E731
    code, said = kill_when(command, ready, signal.SIGTERM)
    assert (
        code == 130
        and f"python train.py --resume {folder} continues" in said
        and "Traceback" not in said
    )
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert resumed(folder, 160)[0] == masks_of(tmp_path / "whole")[0]


def test_what_cannot_be_resumed(flags, tmp_path, fails):
    assert "checkpoint.safetensors; a run writes one" in fails(train.main, ["--resume", tmp_path])
    assert "no other flags" in fails(train.main, ["--resume", tmp_path, "--steps", "3"])
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(os.urandom(99))
    assert "is not a whole safetensors file" in fails(train.main, ["--resume", tmp_path])
    state = {"step": 5, "evaluations": [], "argv": flags, "seconds": 1.0, "log": 0, "identity": {}}
    tensors = {"parameter.0": torch.zeros(3)}
    (tmp_path / "log.jsonl").touch()
    form = plumbing_run.FORMAT
    save_file(
        tensors, checkpoint, {"format": form, "description": json.dumps(state), "sha256": "0"}
    )
    assert "was altered" in fails(train.main, ["--resume", tmp_path])
    checkpoint.write_bytes(seal(form, tensors, state))
    assert "when the run began" in fails(train.main, ["--resume", tmp_path])
    assert "no other flags" in fails(train.main, [f"--resume={tmp_path}", "--steps=20"])
    assert "holds an interrupted run; --resume" in fails(
        train.main, [*flags, "--out", tmp_path]
    )  # nothing is lost


def stopping_at(step):
    """A set_rates that ends the run before a step."""
    set_rates = train.set_rates

    def set_or_stop(optimizer, number, *more):
        if number == step:
            raise ValueError("enough")
        set_rates(optimizer, number, *more)

    return set_or_stop


@pytest.fixture(scope="module")
def interrupted_once(tmp_path_factory):
    home = tmp_path_factory.mktemp("interrupted")
    argv = flags_of(write_model(home / "model"), write_glue(home / "glue"))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train, "set_rates", stopping_at(6))
        train.main([*argv, "--out", str(home / "run")])
    return home, {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.fixture
def interrupted(interrupted_once):
    """A run that ended after 6 of its 16 steps, beside model/ and glue/.

    What a test changes is undone.
    """
    home, files = interrupted_once
    yield home / "run"
    put_back(home, files)


def test_another_backbone_or_other_data_are_not_gone_on_with(interrupted, fails):
    weights, glue = interrupted.parent / "model" / "model.safetensors", interrupted.parent / "glue"
    whole, table = weights.read_bytes(), glue / "movies" / "train.tsv"
    save_file(bert_tensors(CONFIG, seed=9), weights)
    assert "--resume: fingerprint is" in fails(train.main, ["--resume", interrupted])
    weights.write_bytes(whole)
    rows = table.read_text()
    table.write_text(rows.replace("dull", "very dull", 1))
    assert "--resume: train digest is" in fails(train.main, ["--resume", interrupted])
    table.write_text(rows)
    dev = glue / "movies" / "dev.tsv"
    rows = dev.read_text()
    dev.write_text(rows.rsplit("\n", 2)[0] + "\n")
    assert "--resume: dev digest is" in fails(train.main, ["--resume", interrupted])
    dev.write_text(rows)
    (interrupted / ".part-0123abcd-model.safetensors").touch()
    train.main(["--resume", str(interrupted)])
    assert not list(interrupted.glob(".part-*"))
    assert "is finished" in fails(train.main, ["--resume", interrupted])


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"argv": 5},
            {"argv": [1]},
            {"seconds": "x"},
            {"log": -1},
            {"identity": 1},
            {"step": []},
            {"step": -1},
        ),
        *({"step": True}, {"evaluations": [1]}, {"evaluations": [{}]}),
        {"evaluations": [{"step": 1, "density": "2", "dev": {}}]},
        {"evaluations": [{"step": 1, "density": 1.0, "dev": {"accuracy": "high"}}]},
    ],
)
def test_descriptions_that_are_none(interrupted, fails, change):
    sealed(interrupted / "checkpoint.safetensors", change)
    assert "is not a valid checkpoint" in fails(train.main, ["--resume", interrupted])


def sealed(path, change, tensors=None):
    """Alter a checkpoint, and its sum with it."""
    there, state = unseal(path, plumbing_run.FORMAT)
    path.write_bytes(seal(plumbing_run.FORMAT, there | (tensors or {}), state | change))


@pytest.mark.parametrize(
    ("change", "tensors"),
    [
        ({"step": 0}, {}),
        ({"step": 17}, {}),
        (
            {"evaluations": [{"step": 1, "density": 1.0, "dev": {"f1": 0.5}}]},
            {},
        ),  # found too late, after all steps
        ({"step": 10**9}, {}),
        ({}, {"exp_avg.0": torch.zeros(3)}),  # the optimizer would write beyond its end
        ({}, {"exp_avg_sq.1": torch.zeros(2, 16, 16, dtype=torch.float64)}),
        ({}, {"step.0": torch.zeros(5)}),
        ({}, {"more": torch.zeros(5)}),
        ({}, {"random.cpu": torch.zeros(5, dtype=torch.uint8)}),
        ({}, {"random.cpu": torch.zeros(5056, dtype=torch.uint8)}),
    ],
)
def test_states_that_would_do_harm(interrupted, fails, change, tensors):
    sealed(interrupted / "checkpoint.safetensors", change, tensors)
    said = fails(train.main, ["--resume", interrupted])
    assert "checkpoint of another run" in said or "no valid state of random numbers" in said


def test_other_defaults_are_not_gone_on_with(interrupted, fails, monkeypatch):
    movies = data.TASKS["movies"]
    other = dataclasses.replace(movies, recipe=movies.recipe | {"penalty": 5.0})
    monkeypatch.setitem(data.TASKS, "movies", other)
    said = fails(train.main, ["--resume", interrupted])
    assert "--resume: --penalty is 5.0 now, and was 800.0 when the run began" in said


def test_another_teacher_is_not_gone_on_with(flags, tmp_path, fails, monkeypatch):
    short = [*flags, "--steps", "2", "--evals", "1", "--method", "finetune"]
    for name in ("teacher", "other"):
        train.main([*short, "--seed", str(len(name)), "--out", str(tmp_path / name)])
    with monkeypatch.context() as patched:
        patched.setattr(train, "set_rates", stopping_at(6))
        fails(train.main, [*flags, "--teacher", tmp_path / "teacher", "--out", tmp_path / "run"])
    (tmp_path / "teacher").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "teacher")
    assert "--resume: teacher digest is" in fails(train.main, ["--resume", tmp_path / "run"])


def test_a_layer_without_heads_goes_on_too(flags, tmp_path, fails, monkeypatch, make_model):
    tensors = bert_tensors(CONFIG)
    for name in ("query", "key", "value"):
        for part in ("weight", "bias"):
            at = f"bert.encoder.layer.1.attention.self.{name}.{part}"
            tensors[at] = tensors[at][:0]
    at = "bert.encoder.layer.1.attention.output.dense.weight"
    tensors[at] = tensors[at][:, :0].contiguous()
    argv = [
        "--model",
        str(make_model("headless", tensors, heads_per_layer=[4, 0])),
        *flags[2:],
        "--method",
        "finetune",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(train, "set_rates", stopping_at(6))
        fails(train.main, [*argv, "--out", tmp_path / "run"])
    train.main(["--resume", str(tmp_path / "run")])
    train.main([*argv, "--out", str(tmp_path / "whole")])
    whole, run = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert whole == run


def test_two_processes_do_not_write_to_one_folder(flags, tmp_path, fails):
    out = tmp_path / "run"
    out.mkdir()
    with open(out / "log.jsonl", "a") as file:
        lock(file)
        assert "another process is writing" in fails(train.main, [*flags, "--out", out])
    assert (out / "log.jsonl").read_bytes() == b""


def test_a_folder_is_held_until_the_run_is_finished(flags, tmp_path, monkeypatch):
    finish, refused = train.finish, []

    def held(args, *given):
        with (
            open(args.out / "log.jsonl", "a") as file,
            pytest.raises(ValueError, match="another process is writing"),
        ):
            lock(file)
        refused.append(True)
        return finish(args, *given)

    monkeypatch.setattr(train, "finish", held)
    train.main([*flags, "--steps", "2", "--evals", "1", "--out", str(tmp_path / "run")])
    assert refused and (tmp_path / "run" / "result.json").exists()


def test_a_run_that_was_finished_meanwhile_stays(flags, tmp_path, fails, monkeypatch):
    load = train.load_inputs

    def late(args):
        loaded = load(args)
        args.out.mkdir()
        (args.out / "result.json").write_text("{}")  # of another process
        return loaded

    monkeypatch.setattr(train, "load_inputs", late)
    assert "holds a finished run" in fails(train.main, [*flags, "--out", tmp_path / "run"])
    assert (tmp_path / "run" / "result.json").read_text() == "{}"


def test_two_that_resume_one_run_do_not_harm_it(interrupted, fails, monkeypatch):
    """The second read the checkpoint before the first went on, or finished."""
    load = train.load_inputs
    files = {}

    def while_another_finishes(args):
        loaded = load(args)
        monkeypatch.setattr(train, "load_inputs", load)
        train.main(["--resume", str(interrupted)])
        files.update({path: path.read_bytes() for path in interrupted.iterdir()})
        return loaded

    monkeypatch.setattr(train, "load_inputs", while_another_finishes)
    assert "is finished; look at it" in fails(train.main, ["--resume", interrupted])
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == files and len(files) == 3


def test_a_run_that_another_took_further_is_not_taken_back(interrupted, fails, monkeypatch):
    path = interrupted / "checkpoint.safetensors"
    load = train.load_inputs

    def while_another_goes_on(args):
        tensors, state = read_checkpoint(path)
        path.write_bytes(seal(FORMAT, tensors, state | {"step": state["step"] + 2}))
        return load(args)

    log = (interrupted / "log.jsonl").read_bytes()
    monkeypatch.setattr(train, "load_inputs", while_another_goes_on)
    assert "another process has taken" in fails(train.main, ["--resume", interrupted])
    assert (interrupted / "log.jsonl").read_bytes() == log


def test_a_checkpoint_that_a_killed_run_left_behind_goes(interrupted, fails):
    path = interrupted / "checkpoint.safetensors"
    whole = path.read_bytes()
    train.main(["--resume", str(interrupted)])
    path.write_bytes(b"precious")  # of somebody else
    assert (
        "is finished" in fails(train.main, ["--resume", interrupted])
        and path.read_bytes() == b"precious"
    )
    path.write_bytes(whole)
    assert "is finished" in fails(train.main, ["--resume", interrupted]) and not path.exists()


@pytest.mark.parametrize("content", ["my notes\n", "[1]\n", '{"step": 1}\n', None])
def test_a_folder_of_somebody_else_is_left_alone(flags, tmp_path, fails, content):
    """Even if it has a log.jsonl; None: a link of that name, which leads to another run's."""
    out, other = tmp_path / "run", tmp_path / "other.jsonl"
    out.mkdir()
    other.write_text('{"step": 1, "density": 1.0}\n')
    (out / ".part-0123abcd-mine").write_text("mine")
    if content is None:
        (out / "log.jsonl").symlink_to(other)
    else:
        (out / "log.jsonl").write_text(content)
    before = {path: path.read_bytes() for path in [*out.iterdir(), other]}
    assert "holds files that no run wrote" in fails(train.main, [*flags, "--out", out])
    assert {path: path.read_bytes() for path in [*out.iterdir(), other]} == before


@pytest.mark.parametrize("name", ["config.json", "thesis.tex"])
def test_an_empty_log_makes_no_folder_a_runs(flags, tmp_path, fails, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").touch()
    (out / name).write_text("mine")
    assert "holds files that no run wrote" in fails(train.main, [*flags, "--out", out])
    (out / "log.jsonl").write_text(
        '{"step": 1, "density": 1.0}\n'
    )  # of a run that was killed while it finished
    if name == "thesis.tex":
        assert "holds files that no run wrote" in fails(train.main, [*flags, "--out", out])
    assert (out / name).read_text() == "mine"


def test_a_link_that_takes_the_place_of_the_log_is_not_followed(tmp_path):
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link; remove it"):
        open_log(tmp_path / "log.jsonl")
    assert not (tmp_path / "elsewhere").exists()


def test_from_another_folder_a_relative_one_is_not_found(flags, tmp_path, fails, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    relative = [word.replace(f"{tmp_path}/", "") for word in flags]
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        patched.setattr(train, "set_rates", stopping_at(6))
        assert "enough" in fails(train.main, [*relative, "--out", tmp_path / "run"])
    monkeypatch.chdir(elsewhere)
    said = fails(train.main, ["--resume", tmp_path / "run"])
    assert f"--data-dir: there is no {elsewhere}/glue/movies/train.tsv" in said
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "run"])
    assert (tmp_path / "run" / "result.json").exists()
