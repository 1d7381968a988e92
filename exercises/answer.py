"""Load one answer, put its cases to it, and say in a sentence what is wrong with it."""

import ast
import random
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

from cases import CHECKS, Wrong, forbidden_sorting, require
from process import MEMORY, Refused, one_line

NOT_NEEDED = (  # modules that no answer needs, among them those of the check
    "aiohttp answer asyncio cases cffi check ctypes ftplib gc http multiprocessing process pty "
    "requests signal smtplib socket socketserver ssl subprocess urllib webbrowser"
).split()
SENTENCES = {  # for errors whose own message says little
    SystemExit: "it ends the program, with exit() say; return from the function instead",
    RecursionError: "a function calls itself without end",
    MemoryError: f"it takes more memory than it may, {MEMORY >> 30} GiB",
    EOFError: "it waits for input, which nobody gives here",
}


def judge(name, path, seed):
    """Run the file and its cases -> None if the answer is right, else a sentence.

    The file may do something that this process does not survive.
    """
    try:
        with forbidden_sorting() if name == "top_v" else nullcontext():
            CHECKS[name](load(path, name), random.Random(seed))
    except Wrong as wrong:
        return one_line(wrong)
    except BaseException as error:  # from the file, or from a check surprised by what it returns
        return describe(error, path)
    return None


def load(path, name):
    """Run the student's file -> its function. Raises Wrong if there is none."""
    require(path.is_file(), f"there is no file {path}")
    source = path.read_bytes()  # Python finds the encoding itself
    require(b"\0" not in source, f"{path.name} is not a text file")
    tree = ast.parse(source, str(path))
    for node in ast.walk(tree):
        refuse_import(node)
    sorts = name == "top_v" and b".sort(" in source
    require(not sorts, "that sorts; find the k-th largest score by another way")

    sys.path.insert(0, str(Path(__file__).parent.parent))  # answers may import mask and the others
    scope = {"__name__": "answer", "__file__": str(path)}
    exec(compile(tree, str(path), "exec"), scope)
    require(callable(scope.get(name)), f"{path.name} defines no function {name}")

    def answer(*arguments):
        result = scope[name](*arguments)
        require(
            result is not None,
            f"{name} returned None; is there a return on every way through it?",
        )
        return result

    return answer


def refuse_import(node):
    """Raise Wrong if a node of the syntax tree imports a module that no answer needs."""
    modules = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""]
    for module in modules:
        require(
            module.split(".")[0] not in NOT_NEEDED,
            f"line {node.lineno} imports {module}, which is not allowed here, "
            "and which no answer needs",
        )


def describe(error, path):
    """Describe any error on one line, and name the line of the student's file that caused it."""
    sentence = f"{type(error).__name__}: {error}"
    for kind, words in SENTENCES.items():
        if isinstance(error, kind):
            sentence = words
    if isinstance(error, Refused):
        sentence = error.args[0]  # not str(error): shutil.rmtree gives it the name of a file
    elif "allocate memory" in str(error):  # torch raises a RuntimeError
        sentence = SENTENCES[MemoryError]
    elif "iostream error" in str(error):  # torch.save raises this at a limit of the system
        sentence = "it writes a file, which is not allowed here"

    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == str(path):
            lines.append(frame.lineno)
    where = f", line {lines[-1]} of {path.name}" if lines else ""
    return one_line(sentence) + where
