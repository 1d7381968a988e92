"""The house: its rooms, and who may import whom."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = ("model.py", "mask.py", "data.py", "train.py", "eval.py")
# extras/ and tools/ can be deleted.
WINGS = [wing for wing in ("plumbing", "extras", "tools") if (ROOT / wing).is_dir()]
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


@cache
def tracked():
    """The files that git tracks. Empty where there is no checkout."""
    try:
        ended = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return set()
    files = {ROOT / name for name in ended.stdout.splitlines()}
    return files if ROOT / "train.py" in files else set()  # or it is somebody else's checkout


def python_files(folder):
    """The Python files in a folder, without those of yours that git does not know."""
    files = sorted(folder.glob("*.py"))
    return [path for path in files if path in tracked() or not tracked()]


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
