"""The house: its rooms, and who may import whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ("model.py", "mask.py", "data.py", "train.py", "eval.py")
WINGS = ("plumbing", "extras", "tools")
# What each room may import of ours, beside itself.
ARROWS = {
    "model": {"plumbing"},
    "mask": set(),
    "plumbing": set(),
    "data": {"plumbing"},
    "extras": {"plumbing", "data", "mask", "model"},
    "eval": {"plumbing", "data", "mask", "model"},
    "train": {"plumbing", "data", "mask", "model", "eval"},
    "tools": {"plumbing", "data", "mask", "model", "eval", "train", "extras"},
}
HOOK = "import extras  # noqa: F401"  # the one line by which train.py and eval.py know of extras


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Names of the top-level modules that a file imports, by line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module.split(".")[0]))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
    return found
