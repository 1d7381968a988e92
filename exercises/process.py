"""Run one answer in a process of its own, watch it, and end it.

There is always a sentence, whatever the file does: it may fail, exit, crash, or loop for ever in
Python or in C. Python's audit hooks refuse to write files, start programs or use the network. So do
the system's limits, where it has them. This prevents accidents. It does not stop somebody who looks
for a hole: that takes a container, like Gradescope's.
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
except ImportError:  # Windows
    resource = None

START = 300  # seconds until a process must be ready, most of it to import torch
SECONDS = 30  # for all cases of an exercise
MEMORY = 2 << 30  # bytes, in addition to what torch takes
PRINTS = 100_000  # characters


def one_line(text):
    text = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 400 else text[:400] + " ..."


# --- in the answer's process ------------------------------------------------------------------

REFUSED = {  # how the names of audit events begin -> what they do
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
    """Libraries that only try something carry on after it, as after any PermissionError."""


def guard(event, arguments):
    """An audit hook. Python calls it before anything that reaches outside of the process."""
    if event == "open":
        _, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & WRITES:
            raise Refused("it writes a file, which is not allowed here")
        return
    for beginning, does in REFUSED.items():
        if event.startswith(beginning):
            raise Refused(f"it {does}, which is not allowed here")


def lower_limit(kind, value):
    """Lower a system limit for this process, which can never raise it again."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS knows some limits by name only
        resource.setrlimit(kind, (value, value))


def lower_limits():
    """Set system limits, where there are any. They also bind C code, which no audit hook sees."""
    if resource is None:
        return
    lower_limit(resource.RLIMIT_FSIZE, 0)  # no file gets a single byte
    lower_limit(resource.RLIMIT_CORE, 0)
    lower_limit(resource.RLIMIT_CPU, 4 * SECONDS + START)  # in case nobody is left to stop it
    pages = Path("/proc/self/statm")
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        lower_limit(resource.RLIMIT_AS, used + MEMORY)


class Printed(io.TextIOBase):
    """A stream that sends the student's prints to the watching process, up to a limit."""

    def __init__(self, send):
        self.send, self.left = send, PRINTS

    def write(self, text):
        self.left -= len(text)
        if self.left < 0:
            raise Refused(f"it prints more than {PRINTS:,} characters; take the prints out")
        self.send(printed=text)
        return len(text)


def send(pipe, **message):
    pipe.send_bytes(json.dumps(message).encode())


def in_own_process(pipe, name, path, seed):
    import torch  # not at the top: the watching process does not need it
    from answer import judge

    if hasattr(os, "setsid"):
        os.setsid()  # a process group of its own, which can be killed as a whole
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if hasattr(os, "setsid"):  # close everything else: it belongs to other processes
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, 1000)
    sys.stdout = sys.stderr = Printed(partial(send, pipe))
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    lower_limits()
    sys.addaudithook(guard)
    send(pipe, ready=True)
    send(pipe, sentence=judge(name, path, seed))


# --- in the watching process ------------------------------------------------------------------


def watch(name, path, seed):
    """Run an answer -> (None if it is right, else a sentence; what the file printed)."""
    process, pipe = start(name, path, seed)
    late = threading.Event()

    def stop():
        late.set()
        end(process)

    timer = threading.Timer(SECONDS, stop)
    try:
        started = pipe.poll(START) and "ready" in receive(pipe)
        if not started:
            return "its process did not start; that is not the answer's fault", ""
        timer.start()
        sentence, printed = listen(pipe)
    finally:
        timer.cancel()
        end(process)
        process.join(START)
        pipe.close()
    if late.is_set():
        sentence = f"after {SECONDS} seconds there is no answer; "
        sentence += "does a loop never end, on equal scores say?"
    elif sentence == "":
        sentence = how_it_ended(process.exitcode)
    return sentence, printed


def start(name, path, seed):
    """Start a process for an answer -> (the process, the pipe to read from)."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "numpy"])  # import them once for all answers
    pipe, their_end = context.Pipe(duplex=False)
    arguments = (their_end, name, path, seed)
    process = context.Process(target=in_own_process, args=arguments, daemon=True)
    # PYTHONSAFEPATH keeps Python from importing a torch.py in the current folder.
    with patch.dict(os.environ, PYTHONSAFEPATH="1"):
        process.start()
    their_end.close()  # so that the pipe ends with the process
    return process, pipe


def receive(pipe):
    """Read the next message {kind: value}; {} at the end. JSON cannot carry code."""
    try:
        message = json.loads(pipe.recv_bytes(10 * PRINTS))
    except (EOFError, OSError, ValueError):  # the end, or a message that is not ours
        message = {}
    return message if isinstance(message, dict) else {}


def listen(pipe):
    """Read until the verdict -> (None for right or a sentence, "" if none came; the prints)."""
    printed = []
    while message := receive(pipe):
        if "sentence" in message:
            return message["sentence"], "".join(printed)
        printed.append(str(message.get("printed", "")))
    return "", "".join(printed)


def end(process):
    """Kill an answer's process and everything it started."""
    with suppress(AttributeError, OSError):  # Windows has no groups, or the group is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def how_it_ended(status):
    if status in (None, -9):
        return (
            "its process ended without an answer; "
            "did it take too much memory, or leave with os._exit?"
        )
    if status < 0:
        name = signal.Signals(-status).name
        return f"Python itself crashed ({name}); what does the file do outside of Python?"
    return f"its process left (status {status}) before there was an answer, with os._exit say"
