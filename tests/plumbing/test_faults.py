"""Disks, networks and GPUs that fail: one line of error, and nothing half-written is trusted."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from model import Bert
from plumbing import cli, download, files
from plumbing import run as plumbing_run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def argv(make_model, glue, tmp_path):
    given = ["--model", make_model(), "--data-dir", glue, "--out", tmp_path / "run"]
    given += ["--steps", 20, "--batch", 8]
    return [str(a) for a in [*given, "--length", 16, "--evals", 4, "--device", "cpu"]]


@pytest.fixture
def unreliable():
    """start(content, sends, ranges) -> the URL of a server that cuts each connection.

    It closes each one after the next number of bytes in `sends`.

    ranges: whether it can begin where it is asked to. off: how far it is off. start.replies counts
    its replies.
    """
    servers = []

    def start(content, sends, ranges=True, off=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                start.replies += 1
                asked = int(self.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", len(content) - asked)
                if asked:
                    self.send_header(
                        "Content-Range", f"bytes {asked + off}-{len(content) - 1}/{len(content)}"
                    )
                self.end_headers()
                self.wfile.write(content[asked : asked + (sends.pop(0) if sends else len(content))])

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
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
        with download.fetched(unreliable(content, list(sends)), tmp_path / "x", "") as part:
            assert part.read_bytes() == content
        assert unreliable.replies == len(sends) + 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_always_begins_anew_is_given_up_when_it_gets_no_further(unreliable, tmp_path):
    content = os.urandom(3_000_000)
    with download.fetched(
        unreliable(content, [100, 200], ranges=False), tmp_path / "x", ""
    ) as part:
        assert part.read_bytes() == content
    unreliable.replies = 0
    url = unreliable(content, [200, 100], ranges=False)
    with pytest.raises(OSError, match="ended after 100 of 3000000 bytes.*; try this"):
        download.fetched(url, tmp_path / "x", "try this").__enter__()
    assert unreliable.replies == 2 and list(tmp_path.iterdir()) == []


def test_an_answer_of_another_part_is_not_appended(unreliable, tmp_path):
    url = unreliable(os.urandom(3000), [1000], off=1)
    with (
        pytest.raises(OSError, match="another part than it was asked"),
        download.fetched(url, tmp_path / "x", ""),
    ):
        pass
    assert unreliable.replies == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"LARGEST_OF_OTHERS": 5000}, "larger than 5,000 bytes"),
        ({"PATIENCE": 0.2}, "less than a mebibyte came in 0.2"),
    ],
)
def test_downloads_have_bounds(tmp_path, monkeypatch, bounds, message):
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # until the other side has had enough
                while True:
                    self.wfile.write(b"x" * 100)
                    time.sleep(0.001)

        def log_message(self, *_):
            pass

    for name, value in bounds.items():
        monkeypatch.setattr(download, name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        with (
            pytest.raises(OSError, match=f"{message}.*; try this"),
            download.fetched(url, tmp_path / "x", "try this"),
        ):
            pass
        server.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_a_login_is_not_sent_to_another_host(tmp_path):
    seen = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            seen[self.path] = self.headers.get("Authorization")
            self.send_response(302 if self.path == "/a" else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/b")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with download.fetched(
            f"http://me:secret@127.0.0.1:{server.server_port}/a", tmp_path / "x", ""
        ):
            pass
        server.shutdown()
    assert seen["/a"].startswith("Basic ") and seen["/b"] is None


def test_partial_files_of_killed_processes_go_after_a_day(tmp_path):
    yesterday = time.time() - files.STALE - 1
    for name in (".part-0123abcd-old", ".part-0123abcd-new", ".part-notours"):
        (tmp_path / name).write_text("x")
        if "new" not in name:
            os.utime(tmp_path / name, (yesterday, yesterday))
    files.write_whole(tmp_path / "file", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".part-0123abcd-new",
        ".part-notours",
        "file",
    ]


@pytest.mark.slow
def test_two_processes_fill_one_cache(unreliable, tmp_path):
    content = os.urandom(30_000_000)
    url, digest = unreliable(content, []), hashlib.sha256(content).hexdigest()
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from plumbing import fetch
fetch.HUB["bert"] = ("a/b", "main")
fetch.MODELS["bert"] = {{"model.safetensors": {digest!r}}}
fetch.fetch_hub_model("bert", fetch.cache() / "models" / "bert")
"""
    environment = os.environ | {"SMP_CACHE": str(tmp_path), "HF_ENDPOINT": url}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    (file,) = (tmp_path / "models" / "bert").iterdir()
    assert file.read_bytes() == content


def test_a_full_disk_during_a_download(unreliable, tmp_path, monkeypatch):
    url = unreliable(b"x" * 1000, [])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "download_rest", full)
    with (
        pytest.raises(OSError, match="No space left") as said,
        download.fetched(url, tmp_path / "x", "remedy"),
    ):
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
    assert not (tmp_path / "run" / "result.json").exists() and not list(
        (tmp_path / "run").glob(".part*")
    )
    train.main(["--resume", str(tmp_path / "run")] if nth > 1 else argv)
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_disk_under_the_log(argv, fails, monkeypatch):
    monkeypatch.setattr(plumbing_run, "open_log", lambda path: open("/dev/full", "a"))  # noqa: SIM115
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
    assert result["deterministic"] and cli.code_version().items() <= result.items()


def test_code_version_outside_of_git_and_without_it(tmp_path, monkeypatch):
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
    assert cli.code_version()["clean"] and len(cli.code_version()["commit"]) >= 7
    (tmp_path / "cli.py").write_text("x")
    assert not cli.code_version()["clean"]


# --- where the output goes ---

COMMAND = """
import sys
sys.path.insert(0, {root!r})
import plumbing.cli
plumbing.cli.cpu_computes_bf16 = lambda: False
import train
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_output_that_goes_nowhere_is_no_traceback(argv, tmp_path):
    """Run train.py in a shell with its output redirected -> status, stderr without progress."""
    expected = {"| true": (141, 0), ">&- 2>&-": (0, 0)}
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
        _, errors = process.communicate(timeout=60)
        said = [
            line
            for line in errors.replace("\r", "\n").splitlines()
            if line.strip() and "it/s" not in line
        ]
        assert (process.returncode, len(said)) == expected[after], said
        assert all("No space left" in line for line in said)


def test_names_that_the_terminal_cannot_show(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    train.main([*argv, "--out", str(tmp_path / "r\u00e9sum\u00e9")])
    assert b"r\\xe9sum\\xe9" in sys.stdout.buffer.getvalue()
    assert (tmp_path / "r\u00e9sum\u00e9" / "result.json").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ],
)
def test_what_torchrun_sets_and_others_may(
    argv, fails, tmp_path, monkeypatch, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message:
        assert message in fails(train.main, argv)
    else:
        train.main(argv)
        assert (tmp_path / "run" / "result.json").exists()


def test_names_are_printed_without_their_controls(fails):
    assert (
        fails(train.main, ["--model", "a\x1b[31mb\nc\u202ed"]).count("a\\x1b[31mb\\nc\\u202ed") == 1
    )
    assert cli.show({"a\x1b]0;x": 1.0}) == "a\\x1b]0;x 1.0000"
    assert "\\x1b" in fails(train.main, ["--task", "\x1b[31m"])


@pytest.mark.parametrize("flag", ["--out=--", "--model=--", "--lr=--"])
def test_two_dashes_are_no_value(fails, flag):
    assert f"{flag}: -- is not a value" in fails(train.main, [flag])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(argv, fails, monkeypatch, tmp_path, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if number == errno.EIO:
        assert os.strerror(number) in fails(train.main, argv)
        return
    train.main(argv)
    assert (
        tmp_path / "run" / "result.json"
    ).exists() and "this file system has no locks" in capsys.readouterr().out


def test_pipes_and_devices_are_not_read(argv, fails, tmp_path):
    names = ("tokenizer.json", "config.json", "model.safetensors")
    paths = [tmp_path / "glue" / "movies" / "dev.tsv", *(tmp_path / "model" / n for n in names)]
    for path in paths:
        kept = path.rename(tmp_path / "kept")
        os.mkfifo(path)
        assert f"{path} is not a regular file" in fails(train.main, argv)
        path.unlink()
        path.symlink_to("/dev/zero")
        assert f"{path} is not a regular file" in fails(train.main, argv)
        path.unlink()
        kept.rename(path)


def test_no_compiler(argv, fails, monkeypatch):
    class InductorError(RuntimeError):  # torch's own is slow to provoke
        pass

    def no_compiler(self):
        raise InductorError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(Bert, "compile_layers", no_compiler)
    said = fails(train.main, [*argv, "--compile"])
    assert "--compile: torch cannot compile here (InvalidCxxCompiler: No working C++" in said
