"""Run one answer in a process of its own, watch it, and end it.

Whatever the file does, there is a sentence: it may fail, loop for ever in Python or in C, leave, or crash. Writing
files, other programs and the network are refused, by Python's audit hooks and by limits of the system where it has
them. This keeps mistakes from doing harm; it is no wall against somebody who looks for a hole. That takes a container,
as Gradescope has.
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

try:
    import resource
except ImportError:  # on Windows
    resource = None

START = 300  # seconds until a process is ready; most of that is importing torch
SECONDS = 30  # for all cases of an exercise
MEMORY = 2 << 30  # bytes, beside what torch takes itself
PRINTS = 100_000  # characters


def one_line(text):
    text = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 400 else text[:400] + " ..."


# --- in the answer's process ---------------------------------------------------------------------------------

REFUSED = {  # audit events, by their beginning
    "socket.": "uses the network",
    "subprocess.": "starts a program",
    "os.system": "starts a program",
    "os.exec": "starts a program",
    "os.posix_spawn": "starts a program",
    "os.spawn": "starts a program",
    "os.startfile": "starts a program",
    "pty.": "starts a program",
    "os.fork": "starts a process",
    "os.kill": "ends a process",
    "ctypes.": "calls code in C",
    "os.remove": "removes a file",
    "os.rmdir": "removes a folder",
    "os.mkdir": "makes a folder",
    "os.rename": "renames a file",
    "os.link": "makes a file",
    "os.symlink": "makes a file",
    "os.truncate": "changes a file",
    "os.chmod": "changes a file",
    "os.chown": "changes a file",
    "os.utime": "changes a file",
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(PermissionError):
    """Libraries that merely try something go on without it, as they do at other PermissionErrors."""


def guard(event, given):
    """An audit hook: Python calls it before whatever reaches out of the process."""
    if event == "open":
        _, mode, flags = given
        if set(mode or "") & set("wax+") or (flags or 0) & WRITES:
            raise Refused("it writes a file, which is not allowed here")
        return
    for beginning, does in REFUSED.items():
        if event.startswith(beginning):
            raise Refused(f"it {does}, which is not allowed here")


def lower(kind, value):
    """Lower a limit of the system for this process, which can then not raise it again."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS knows some by name only
        resource.setrlimit(kind, (value, value))


def lower_limits():
    """The same for code in C, which no audit hook sees, where the system has such limits."""
    if resource is None:
        return
    lower(resource.RLIMIT_FSIZE, 0)  # no file gets a single byte
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_CPU, 4 * SECONDS + START)  # should nobody be left who stops it
    pages = Path("/proc/self/statm")
    if pages.exists():
        lower(
            resource.RLIMIT_AS, int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        )


class Printed(io.TextIOBase):
    """Where the student's prints go: to the watching process, and not without end."""

    def __init__(self, say):
        self.say, self.left = say, PRINTS

    def write(self, text):
        self.left -= len(text)
        if self.left < 0:
            raise Refused(f"it prints more than {PRINTS:,} characters; take the prints out")
        self.say(printed=text)
        return len(text)


def say(line, **words):
    line.send_bytes(json.dumps(words).encode())


def in_own_process(line, name, path, seed):
    import torch  # here: the watching process needs none
    from answer import judge

    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, which can be ended as a whole
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if hasattr(os, "setsid"):  # what else is open belongs to others
        os.closerange(3, line.fileno())
        os.closerange(line.fileno() + 1, 1000)
    sys.stdout = sys.stderr = Printed(partial(say, line))
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    lower_limits()
    sys.addaudithook(guard)
    say(line, ready=True)
    say(line, sentence=judge(name, path, seed))


# --- in the watching process ---------------------------------------------------------------------------------


def watch(name, path, seed):
    """-> (None if the answer is right, else a sentence; what the file printed)."""
    start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(
            ["torch", "numpy"]
        )  # imported once, not once for each answer
    line, their_end = context.Pipe(duplex=False)
    process = context.Process(
        target=in_own_process, args=(their_end, name, path, seed), daemon=True
    )
    with patch.dict(
        os.environ, PYTHONSAFEPATH="1"
    ):  # or Python would import torch.py of the current folder, if any
        process.start()
    their_end.close()  # so that the line ends with the process

    late = threading.Event()

    def stop():
        late.set()
        end(process)

    timer = threading.Timer(SECONDS, stop)
    try:
        started = line.poll(START) and "ready" in hear(line)
        if not started:
            return "its process did not start; that is not the answer's fault", ""
        timer.start()
        sentence, printed = listen(line)
    finally:
        timer.cancel()
        end(process)
        process.join(START)
        line.close()
    if late.is_set():
        sentence = f"after {SECONDS} seconds there is no answer; does a loop never end, on equal scores say?"
    return (how_it_ended(process.exitcode) if sentence == "" else sentence), printed


def hear(line):
    """-> the next message {kind: value}; {} when there are no more. JSON, as it is only data."""
    try:
        message = json.loads(line.recv_bytes(10 * PRINTS))
    except (EOFError, OSError, ValueError):  # the end, or nothing of ours
        message = {}
    return message if isinstance(message, dict) else {}


def listen(line):
    """-> (the sentence, None for right, "" if there was none; what was printed)."""
    printed = []
    while message := hear(line):
        if "sentence" in message:
            return message["sentence"], "".join(printed)
        printed.append(str(message.get("printed", "")))
    return "", "".join(printed)


def end(process):
    """End an answer's process, and all that it started."""
    with suppress(AttributeError, OSError):  # Windows has no groups; or all are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def how_it_ended(status):
    if status in (None, -9):
        return "its process ended without an answer; did it take too much memory, or leave with os._exit?"
    if status < 0:
        return f"Python itself crashed ({signal.Signals(-status).name}); what does the file do outside of Python?"
    return f"its process left (status {status}) before there was an answer, with os._exit say"
