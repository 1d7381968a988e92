"""The house: who may import whom, how long things may be, and that the method stands without its wings."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {
    "model.py": 350,
    "mask.py": 310,
    "data.py": 320,
    "train.py": 400,
    "eval.py": 260,
}  # lines, at most
WINGS = ("plumbing", "extras", "tools")
SOURCES = [ROOT / name for name in CORE] + [
    path for wing in WINGS for path in sorted((ROOT / wing).glob("*.py"))
]
EXERCISES = sorted((ROOT / "exercises").glob("*.py"))
# What each room may import of ours, beside itself.
ARROWS = {
    "model": set(),
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


def test_five_files_stand_on_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(CORE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_up(path):
    lines = path.read_text().splitlines()
    for number, name in imported(path):
        hook = path.name in ("train.py", "eval.py") and lines[number - 1].startswith(HOOK)
        if name in ARROWS and name != room(path) and not hook:
            assert name in ARROWS[room(path)], f"{path}:{number} imports {name}"


def test_the_core_names_nothing_of_extras_but_the_hook():
    for name in CORE:
        lines = [line for line in (ROOT / name).read_text().splitlines() if "extras" in line]
        assert [line[: len(HOOK)] for line in lines] == [HOOK] * (name in ("train.py", "eval.py"))


def test_packages():
    required = {
        line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    assert required == {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
    for path in SOURCES + EXERCISES:
        beside = {other.stem for other in EXERCISES} if path in EXERCISES else set()
        for _, name in imported(path):
            known = name in required | ARROWS.keys() | sys.stdlib_module_names | beside
            assert known or (path.name, name) == ("picture.py", "matplotlib"), (
                f"{path} imports {name}"
            )
            assert name not in ("pickle", "shelve", "marshal")


@pytest.mark.parametrize("path", SOURCES + EXERCISES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= CORE.get(path.name, 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, f"{path}: {node.name}"


@pytest.mark.slow
def test_the_method_stands_without_its_wings(make_model, glue, tmp_path):
    """A copy without extras/, tools/ and the lines that import extras trains and evaluates."""
    house = tmp_path / "house"
    shutil.copytree(ROOT / "plumbing", house / "plumbing")
    for name in CORE:
        lines = (ROOT / name).read_text().splitlines(keepends=True)
        (house / name).write_text("".join(line for line in lines if not line.startswith(HOOK)))

    def python(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *(str(word) for word in words)]
        ended = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    model = make_model()
    flags = ["--data-dir", glue, "--model", model, "--length", 16, "--steps", 6, "--device", "cpu"]

    def run(method):
        python("train.py", *flags, "--method", method, "--out", tmp_path / method)
        final = json.loads((tmp_path / method / "result.json").read_text())["final"]["accuracy"]
        assert f"accuracy {final:.4f}\ntraining reported" in python("eval.py", tmp_path / method)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, ("smp-s", "finetune")))
    listed = python(
        "-c",
        "from mask import METHODS; from data import TASKS; import train; print(*METHODS, *TASKS)",
    )
    assert "movement" not in listed and "squad" not in listed and "smp-s" in listed


def test_the_readme_is_short_and_shows_the_house():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 300
    tree = re.search(r"## Files\n\n```\n(.*?)```", text, re.S)[1]
    for wing in WINGS:
        line = next(line for line in tree.splitlines() if line.startswith(f"{wing}/"))
        files = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
        assert files == {
            name for name in re.findall(r"\w+", line) if (ROOT / wing / f"{name}.py").exists()
        }
    for name in CORE:
        assert f"\n{name} " in f"\n{tree}"
