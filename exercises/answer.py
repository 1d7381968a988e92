"""Load one answer, put its cases to it, and say in a sentence what is wrong with it."""

import ast
import random
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from cases import CHECKS, Wrong, forbidden_sorting, require
from process import MEMORY, Refused, one_line

NOT_NEEDED = (
    "aiohttp answer asyncio cases cffi check ctypes ftplib gc http multiprocessing process pty requests signal smtplib "
    "socket socketserver ssl subprocess urllib webbrowser"
).split()
SAID = {  # of errors whose own words say little
    SystemExit: "it ends the program, with exit() say; return from the function instead",
    RecursionError: "a function calls itself without end",
    MemoryError: f"it takes more memory than it may, {MEMORY >> 30} GiB",
    EOFError: "it waits for input, which nobody gives here",
}


def judge(name, path, seed):
    """-> None if the answer is right, else a sentence. Runs the file, and does not survive all that a file can do."""
    try:
        with forbidden_sorting() if name == "top_v" else nullcontext():
            CHECKS[name](load(path, name), random.Random(seed))
    except Wrong as wrong:
        return one_line(wrong)
    except (
        BaseException
    ) as error:  # of the student's file, or of a check that what it returns surprises
        return describe(error, path)
    return None


def load(path, name):
    """A function of the student's file, which is run. Raises Wrong if there is none."""
    require(path.is_file(), f"there is no file {path}")
    source = path.read_bytes()  # Python finds out the encoding
    require(b"\0" not in source, f"{path.name} is not a text file")
    tree = ast.parse(source, str(path))
    for node in ast.walk(tree):
        refuse_import(node)
    require(
        name != "top_v" or b".sort(" not in source,
        "that sorts; find the k-th largest score by another way",
    )
    sys.path.insert(
        0, str(Path(__file__).parent.parent)
    )  # so that answers may import mask and the others
    scope = {"__name__": "answer", "__file__": str(path)}
    exec(compile(tree, str(path), "exec"), scope)
    require(callable(scope.get(name)), f"{path.name} defines no function {name}")

    def answer(*given):
        found = scope[name](*given)
        require(
            found is not None, f"{name} returned None; is there a return on every way through it?"
        )
        return found

    return answer


def refuse_import(node):
    """Raise Wrong at the import of a module that no answer needs."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    for module in modules:
        allowed = module.split(".")[0] not in NOT_NEEDED
        require(
            allowed,
            f"line {node.lineno} imports {module}, which is not allowed here, and which no answer needs",
        )


def describe(error, path):
    """Any error as one line, and where in the student's file it came up."""
    said = next((words for kind, words in SAID.items() if isinstance(error, kind)), None)
    if isinstance(error, Refused):
        said = str(error)
    elif "allocate memory" in str(error):  # torch says so in a RuntimeError
        said = SAID[MemoryError]
    elif "iostream error" in str(error):  # torch.save, at a limit of the system
        said = "it writes a file, which is not allowed here"
    places = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    where = f", line {places[-1].lineno} of {path.name}" if places else ""
    return one_line(said or f"{type(error).__name__}: {error}") + where
