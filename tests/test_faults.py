"""Disks, networks and GPUs that fail: one line of error, and nothing half-written is trusted."""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import train
from plumbing import cli, fetch, files

ROOT = Path(__file__).parent.parent


@pytest.fixture
def argv(make_model, glue, tmp_path):
    given = ["--model", make_model(), "--data-dir", glue, "--out", tmp_path / "run", "--steps", 20, "--batch", 8]
    return [str(a) for a in [*given, "--length", 16, "--evals", 4, "--device", "cpu"]]


@pytest.fixture
def unreliable():
    """start(content, sends, ranges): a server that closes each connection after the next number of bytes -> URL.

    ranges: whether it can begin where it is asked to. start.replies counts its replies.
    """
    servers = []

    def start(content, sends, ranges=True):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                start.replies += 1
                asked = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", len(content) - asked)
                self.end_headers()
                self.wfile.write(content[asked : asked + (sends.pop(0) if sends else len(content))])

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/x"

    start.replies = 0
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_download_cut_anywhere_is_continued(unreliable, tmp_path):
    content = os.urandom(3_000_000)
    for sends in ([1], [0x100000], [len(content) - 1], [7, 1_500_000, 2], [1] * 50):
        unreliable.replies = 0
        with fetch.fetched(unreliable(content, list(sends)), tmp_path / "x", "") as part:
            assert part.read_bytes() == content
        assert unreliable.replies == len(sends) + 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_always_begins_anew_is_given_up_when_it_gets_no_further(unreliable, tmp_path):
    content = os.urandom(3_000_000)
    with fetch.fetched(unreliable(content, [100, 200], ranges=False), tmp_path / "x", "") as part:
        assert part.read_bytes() == content
    unreliable.replies = 0
    url = unreliable(content, [200, 100], ranges=False)
    with pytest.raises(OSError, match="ended after 100 of 3000000 bytes.*; try this"):
        fetch.fetched(url, tmp_path / "x", "try this").__enter__()
    assert unreliable.replies == 2 and list(tmp_path.iterdir()) == []


def test_two_processes_fill_one_cache(unreliable, tmp_path):
    content = os.urandom(30_000_000)
    url, digest = unreliable(content, []), hashlib.sha256(content).hexdigest()
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from plumbing import fetch
fetch.HUB_MODELS = {{"bert": ("a/b", "main", {{"model.safetensors": {digest!r}}})}}
fetch.fetch_hub_model("bert")
"""
    environment = os.environ | {"SMP_CACHE": str(tmp_path), "HF_ENDPOINT": url}
    processes = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    (file,) = (tmp_path / "models" / "bert").iterdir()
    assert file.read_bytes() == content


def test_a_full_disk_during_a_download(unreliable, tmp_path, monkeypatch):
    url = unreliable(b"x" * 1000, [])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch, "download_rest", full)
    with pytest.raises(OSError, match="No space left") as said, fetch.fetched(url, tmp_path / "x", "remedy"):
        pass
    assert said.value.errno == errno.ENOSPC and "SMP_CACHE" in cli.describe(said.value)


@pytest.mark.parametrize("nth", [1, 3, 4])  # two of three checkpoints, the mask file
def test_a_full_disk(argv, fails, monkeypatch, tmp_path, nth):
    calls = []

    def fsync(number):
        calls.append(number)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fsync)
        assert "No space left on device" in (said := fails(train.main, argv)) and "--out" in said
    assert not (tmp_path / "run" / "result.json").exists() and not list((tmp_path / "run").glob(".part*"))
    train.main(["--resume", str(tmp_path / "run")] if nth > 1 else argv)
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_disk_under_the_log(argv, fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    assert "No space left on device" in fails(train.main, argv)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux")
def test_a_folder_that_cannot_be_written(argv, fails):
    """In /proc, because a superuser may write to folders that are merely marked read-only."""
    assert "/proc/run" in fails(train.main, [*argv, "--out", "/proc/run"])


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            torch.AcceleratorError("CUDA error: launch failure\nlong advice"),
            "launch failure); python train.py --resume",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "--accumulate 2, --batch, --length"),
        (MemoryError(), "--accumulate 2, --batch, --length"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--accumulate 2, --batch, --length"),
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
    assert result["deterministic"] and cli.code_version().items() <= result.items()


def test_code_version(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert cli.code_version().keys() == {"versions"}
    (tmp_path / "cli.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    assert cli.code_version()["clean"] and len(cli.code_version()["commit"]) >= 7
    (tmp_path / "cli.py").write_text("x")
    assert not cli.code_version()["clean"]
    monkeypatch.setenv("PATH", "")
    assert cli.code_version().keys() == {"versions"}
