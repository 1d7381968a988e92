"""Disks, networks and GPUs that fail: one line of error, and nothing half-written is trusted."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROGRESS, code_version

import train
from model import Bert
from plumbing import cli

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def argv(make_model, glue, tmp_path):
    given = ["--model", make_model(), "--data-dir", glue, "--out", tmp_path / "run"]
    given += ["--steps", 20, "--batch", 8]
    return [str(a) for a in [*given, "--length", 16, "--evals", 4, "--device", "cpu"]]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux")
def test_a_folder_that_cannot_be_written(argv, fails):
    """In /proc, because a superuser may write to folders that are merely marked read-only."""
    assert "/proc/run" in fails(train.main, [*argv, "--out", "/proc/run"])


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            torch.AcceleratorError("CUDA error: launch failure\nlong advice"),
            "the device failed; python train.py --resume RUN_DIR continues: CUDA error: launch",
        ),
        (
            torch.AcceleratorError("CUDA error: invalid device ordinal"),
            "--nproc_per_node: there can be one process per GPU",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "--accumulate 2, --batch, --length"),
        (MemoryError(), "--accumulate 2, --batch, --length"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "--accumulate 2, --batch, --length",
        ),
    ],
)
def test_a_gpu_that_fails(argv, fails, monkeypatch, tmp_path, error, remedy):
    real, calls = train.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 12:
            raise error
        return real(*args)

    monkeypatch.setattr(train, "train_step", train_step)
    assert remedy in fails(train.main, argv)
    train.main(["--resume", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 20


def test_the_result_names_the_code(argv, tmp_path):
    train.main([*argv, "--deterministic"])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["deterministic"] and code_version().items() <= result.items()


def test_code_version_outside_of_git_and_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # it may be in a checkout
    for path in (os.environ["PATH"], ""):
        monkeypatch.setenv("PATH", path)
        assert "versions" in cli.code_version()
        with monkeypatch.context() as patched:
            patched.setattr(cli, "__file__", str(tmp_path / "cli.py"))
            assert cli.code_version().keys() == {"versions"}
    assert cli.code_version().keys() == {"versions"}


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git here")
def test_code_version(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    (tmp_path / "cli.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    commit = cli.code_version()["commit"]
    assert len(commit) >= 7 and "dirty" not in commit
    (tmp_path / "notes.txt").write_text("x")
    assert cli.code_version()["commit"] == commit
    for changed in ("mine.py", "cli.py"):  # new, and then another one that is altered
        (tmp_path / changed).write_text("x")
        assert cli.code_version()["commit"] == f"{commit}-dirty"
        (tmp_path / "mine.py").unlink(missing_ok=True)


# --- where the output goes ---

COMMAND = """
import sys
sys.path.insert(0, {root!r})
import train
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_output_that_goes_nowhere_is_no_traceback(argv, tmp_path):
    """Run train.py in a shell with its output redirected -> status, stderr without progress."""
    expected = {"| true": (141, 0)}
    expected |= {"> /dev/full": (2, 1)} if Path("/dev/full").exists() else {}  # Linux
    started = {}
    for number, after in enumerate(
        expected
    ):  # side by side: each spends its time on importing torch
        words = [sys.executable, "-c", COMMAND.format(root=str(ROOT)), *argv]
        words += ["--out", str(tmp_path / str(number))]
        script = f"{shlex.join(words)} {after}"
        started[after] = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", script], stderr=subprocess.PIPE, text=True
        )
    for after, process in started.items():
        _, errors = process.communicate()
        said = [
            line
            for line in errors.replace("\r", "\n").splitlines()
            if line.strip() and not PROGRESS.search(line)
        ]
        assert (process.returncode, len(said)) == expected[after], said
        assert all("No space left" in line for line in said)


@pytest.mark.parametrize("terminal", [True, False])
def test_names_that_the_terminal_cannot_show(argv, tmp_path, monkeypatch, terminal):
    """It shows their codes. In a file they are UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    train.main([*argv, "--out", str(tmp_path / "r\u00e9sum\u00e9")])
    shown = b"r\\xe9sum\\xe9" if terminal else "r\u00e9sum\u00e9".encode()
    assert shown in stream.buffer.getvalue()
    assert (tmp_path / "r\u00e9sum\u00e9" / "result.json").exists()


def test_ranks_that_torchrun_did_not_set(argv, tmp_path, monkeypatch):
    """A cluster's own variables make no second process."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "two")
    train.main(argv)
    assert (tmp_path / "run" / "result.json").exists()


def test_names_are_printed_without_their_controls(fails):
    said = fails(train.main, ["--model", "a\x1b[31mb\nc\u202ed"])
    assert "a\\x1b[31mb c\\u202ed" in said
    assert "\\x1b" in fails(train.main, ["--task", "\x1b[31m"])


def test_no_compiler(argv, fails, monkeypatch):
    class InductorError(RuntimeError):  # torch's own is slow to provoke
        pass

    def no_compiler(self):
        raise InductorError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(Bert, "compile_layers", no_compiler)
    said = fails(train.main, [*argv, "--compile"])
    assert "--compile: torch cannot compile here; leave it out: InvalidCxxCompiler: No" in said
