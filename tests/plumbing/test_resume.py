"""A run that is killed and resumed ends with the masks of one that was not."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from acts import interrupt, prepared
from conftest import CONFIG, bert_tensors, put_back, write_glue, write_model
from safetensors.torch import save_file

import train
from mask import METHODS, Masks, Method, smp_l
from plumbing.files import MASKS, lock, seal, unseal, write_whole
from plumbing.run import FORMAT, interrupted_run

ROOT = Path(__file__).parent.parent.parent
ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # as here: other numbers of threads may round differently
# train.py, which sends itself a signal when it takes its n-th batch.
SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
from plumbing import run
run.SAVE_EVERY = 0  # a checkpoint at each evaluation
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
real = train.data.training_batches
def batches(*args, **more):
    for number, batch in enumerate(real(*args, **more), 1):
        if number == {nth}:
            os.kill(os.getpid(), {number})
        yield batch
train.data.training_batches = batches
train.main(sys.argv[1:])
"""
# train.py, which kills itself when it syncs a file to disk for the n-th time. That file is half
# written then.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
from plumbing import files, run
run.SAVE_EVERY = 0  # a checkpoint at each evaluation
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
    tensors, description = unseal(folder / "mask.safetensors", MASKS)
    return {name: mask.tolist() for name, mask in tensors.items()}, description["run"]


def run_until(code, flags, **places):
    """Run train.py as changed by code, in a process of its own -> its status and stderr."""
    words = [sys.executable, "-c", code.format(root=str(ROOT), **places), *flags]
    ended = subprocess.run(words, capture_output=True, text=True, env=ONE_THREAD)
    return ended.returncode, ended.stderr


def resumed(folder):
    train.main(["--resume", str(folder)])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "dev" in line]
    assert evaluated == list(range(2, 17, 2))  # each once, in order
    assert not (folder / "checkpoint.safetensors").exists()
    return masks_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "places"),
    [
        (SIGNALLED, {"nth": 12, "number": signal.SIGKILL.value}),  # between two evaluations
        (KILLED, {"nth": 3}),  # while a checkpoint is written
        (KILLED, {"nth": 8}),  # after seven checkpoints, while the mask is written
    ],
)
def test_killed_and_resumed(flags, tmp_path, code, places):
    train.main([*flags, "--out", str(tmp_path / "whole")])
    masks, run = masks_of(tmp_path / "whole")
    folder = tmp_path / "run"
    status, _ = run_until(code, [*flags, "--out", folder], **places)
    assert status == -signal.SIGKILL
    assert (folder / "checkpoint.safetensors").exists() and not (folder / "result.json").exists()
    found, described = resumed(folder)
    assert found == masks
    assert described["final"] == run["final"] and described["best"] == run["best"]


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on(flags, tmp_path):
    folder = tmp_path / "run"
    given = [*flags, "--out", folder]
    status, said = run_until(SIGNALLED, given, nth=12, number=signal.SIGINT.value)
    assert status == 130 and "Traceback" not in said
    assert f"python train.py --resume {folder} continues after step 10" in said
    assert said.endswith("interrupted\n")
    train.main([*flags, "--out", str(tmp_path / "whole")])
    assert resumed(folder)[0] == masks_of(tmp_path / "whole")[0]


def test_what_cannot_be_resumed(flags, tmp_path, fails):
    said = fails(train.main, ["--resume", tmp_path])
    assert "checkpoint.safetensors; the run is finished" in said
    assert "no other flags" in fails(train.main, ["--resume", tmp_path, "--steps", "3"])
    assert "no other flags" in fails(train.main, [f"--resume={tmp_path}", "--steps=20"])
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(os.urandom(99))
    assert "is not a whole safetensors file" in fails(train.main, ["--resume", tmp_path])
    state = {"step": 5, "evaluations": [], "argv": flags, "seconds": 1.0, "log": 0}
    state["identity"] = {"fingerprint": "0"}
    tensors = {"parameter.0": torch.zeros(3)}
    described = {"format": FORMAT, "description": json.dumps(state), "sha256": "0"}
    save_file(tensors, checkpoint, described)
    assert "was altered" in fails(train.main, ["--resume", tmp_path])
    checkpoint.write_bytes(seal(FORMAT, tensors, state))
    assert "when the run began" in fails(train.main, ["--resume", tmp_path])
    said = fails(train.main, [*flags, "--out", tmp_path])  # nothing is lost
    assert f"an interrupted run, --resume {tmp_path} continues it" in said


@pytest.fixture(scope="module")
def interrupted_once(tmp_path_factory):
    home = tmp_path_factory.mktemp("interrupted")
    argv = flags_of(write_model(home / "model"), write_glue(home / "glue"))
    interrupt([*argv, "--out", home / "run"], 6)
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
    assert "the run is finished, was new" in fails(train.main, ["--resume", interrupted])


def test_other_settings_are_not_gone_on_with(interrupted, fails):
    """Such as other defaults, in another version of the code."""
    path = interrupted / "checkpoint.safetensors"
    tensors, state = unseal(path, FORMAT)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    state["identity"]["--penalty"] = "5.0"
    path.write_bytes(seal(FORMAT, tensors, state))
    said = fails(train.main, ["--resume", interrupted])
    assert "--resume: --penalty is 800.0 now, and was 5.0 when the run began" in said


def test_another_teacher_is_not_gone_on_with(flags, tmp_path, fails):
    short = [*flags, "--steps", "2", "--evals", "1", "--method", "finetune"]
    for name in ("teacher", "other"):
        train.main([*short, "--seed", str(len(name)), "--out", str(tmp_path / name)])
    interrupt([*flags, "--teacher", tmp_path / "teacher", "--out", tmp_path / "run"], 6)
    (tmp_path / "teacher").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "teacher")
    assert "--resume: teacher digest is" in fails(train.main, ["--resume", tmp_path / "run"])


def test_a_layer_without_heads_goes_on_too(flags, tmp_path, make_model):
    tensors = bert_tensors(CONFIG)
    for name in ("query", "key", "value"):
        for part in ("weight", "bias"):
            at = f"bert.encoder.layer.1.attention.self.{name}.{part}"
            tensors[at] = tensors[at][:0]
    at = "bert.encoder.layer.1.attention.output.dense.weight"
    tensors[at] = tensors[at][:, :0].contiguous()
    model = str(make_model("headless", tensors, heads_per_layer=[4, 0]))
    argv = ["--model", model, *flags[2:], "--method", "finetune"]
    interrupt([*argv, "--out", tmp_path / "run"], 6)
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


def test_a_folder_is_held_until_the_run_is_finished(flags, tmp_path):
    args, run, job = prepared([*flags, "--steps", 2, "--evals", 1, "--out", tmp_path / "run"])
    log = tmp_path / "run" / "log.jsonl"

    def is_held():
        with open(log, "a") as file:
            lock(file)

    with run:
        train.learn(args, run, job)
        with pytest.raises(ValueError, match="another process is writing"):
            is_held()
        train.finish(args, run, job)
    is_held()


def test_a_run_that_was_finished_meanwhile_stays(flags, tmp_path):
    """Another process finished in this folder while this one prepared."""
    args, run, job = prepared([*flags, "--out", tmp_path / "run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        run.__enter__()
    assert (tmp_path / "run" / "result.json").read_text() == "{}"


def test_two_that_resume_one_run_do_not_harm_it(interrupted):
    """The second read the checkpoint before the first finished, or went on."""
    second = interrupted_run(interrupted)
    train.main(["--resume", str(interrupted)])
    before = {path: path.read_bytes() for path in interrupted.iterdir()}
    with pytest.raises(ValueError, match="holds a finished run"):
        second.__enter__()
    assert {path: path.read_bytes() for path in interrupted.iterdir()} == before
    assert len(before) == 3


class Counting(Masks):
    """Masks with a state of their own: how often they were asked for weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, density):
        self.calls += 1
        return super().forward(density)


def test_a_state_of_a_method_goes_on(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "counting", Method(smp_l, masks=Counting))
    interrupt([*flags, "--method", "counting", "--out", tmp_path / "run"], 6)
    second = interrupted_run(tmp_path / "run")
    args = train.parse_args(second.argv)
    job = train.prepare(args, second)
    with second:
        train.learn(args, second, job)
    assert second.step > 0 and job.learner.masks.calls == job.total


def test_a_run_that_another_took_further_ends_the_same(interrupted, tmp_path):
    """The second read its checkpoint before the other wrote a later one, and continues from it."""
    path = interrupted / "checkpoint.safetensors"
    second = interrupted_run(interrupted)
    tensors, state = unseal(path, FORMAT)
    write_whole(path, seal(FORMAT, tensors, state | {"step": state["step"] + 2}))
    args = train.parse_args(second.argv)
    job = train.prepare(args, second)
    with second:
        train.learn(args, second, job)
        train.finish(args, second, job)
    train.main([*second.argv[:-1], str(tmp_path / "whole")])
    assert masks_of(interrupted)[0] == masks_of(tmp_path / "whole")[0]


@pytest.mark.parametrize("content", ["my notes\n", "[1]\n", None])
def test_a_folder_of_somebody_else_is_left_alone(flags, tmp_path, fails, content):
    """Even if it has a log.jsonl; None: a link of that name, which leads to another run's."""
    out, other = tmp_path / "run", tmp_path / "other.jsonl"
    out.mkdir()
    other.write_text('{"step": 1, "density": 1.0}\n')
    if content is None:
        (out / "log.jsonl").symlink_to(other)
    else:
        (out / "log.jsonl").write_text(content)
    before = {path: path.read_bytes() for path in [*out.iterdir(), other]}
    assert "holds other files" in fails(train.main, [*flags, "--out", out])
    assert {path: path.read_bytes() for path in [*out.iterdir(), other]} == before


@pytest.mark.parametrize("log", ["", '{"step": 1, "density": 1.0}\n'])
@pytest.mark.parametrize("name", ["config.json", "thesis.tex"])
def test_a_log_makes_no_folder_a_runs(flags, tmp_path, fails, name, log):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text(log)
    (out / name).write_text("mine")
    assert "holds other files" in fails(train.main, [*flags, "--out", out])
    assert (out / name).read_text() == "mine" and (out / "log.jsonl").read_text() == log


def test_from_another_folder_a_relative_one_is_not_found(flags, tmp_path, fails, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    relative = [word.replace(f"{tmp_path}/", "") for word in flags]
    monkeypatch.chdir(tmp_path)
    interrupt([*relative, "--out", tmp_path / "run"], 6)
    monkeypatch.chdir(elsewhere)
    said = fails(train.main, ["--resume", tmp_path / "run"])
    assert f"--data-dir or --dev: there is no {elsewhere}/glue/movies/train.tsv" in said
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "run"])
    assert (tmp_path / "run" / "result.json").exists()


@contextmanager
def largest_file(size):
    """No file can grow beyond this size, as on a disk that is nearly full.

    It must end within a test: what pytest itself prints after one may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_costs_no_mask(flags, tmp_path, capsys, monkeypatch):
    """It is said at once, and the run goes on to its end."""
    monkeypatch.setattr("plumbing.run.SAVE_EVERY", 10**9)  # it is tried once, however long it takes
    with largest_file(20_000):  # a checkpoint takes more, and the mask less
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("no checkpoint ([Errno 27] File too large") == 1
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"log.jsonl", "mask.safetensors", "result.json"}


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(flags, tmp_path, capsys):
    """What Ctrl-C says then is where the run really continues."""
    _, run, job = prepared([*flags, "--out", tmp_path / "run"])
    optimizer = train.make_optimizer(job.learner, 0.1, 0.1)
    sum(p.sum() for p in job.learner.parameters()).backward()
    optimizer.step()
    with run:
        run.save(5, job.learner, optimizer)
        run.saved = 0  # an hour ago
        with largest_file(20_000):
            run.save(10, job.learner, optimizer)
    assert run.saved_step == 5 == interrupted_run(run.folder).step


def test_a_mask_that_does_not_fit_is_written_once_there_is_room(flags, tmp_path, fails, capsys):
    args, run, job = prepared([*flags, "--out", tmp_path / "run"])
    with run:
        train.learn(args, run, job)
        with largest_file(1000):  # now not even a mask fits, nor a line of the log
            run.log(step=99)
            with pytest.raises(OSError, match="File too large"):
                train.finish(args, run, job)
    assert "a line of" in capsys.readouterr().err
    assert "holds other files" in fails(train.main, [*flags, "--out", tmp_path / "run"])
    assert resumed(tmp_path / "run")
