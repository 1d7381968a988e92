"""The house: who may import whom, how large things are, and that the method stands by itself."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor

import pytest
from house import ARROWS, CORE, HOOK, ROOT, WINGS, imported, room

SOURCES = [ROOT / name for name in CORE] + [
    path for wing in WINGS for path in sorted((ROOT / wing).glob("*.py"))
]
EXERCISES = sorted((ROOT / "exercises").glob("*.py"))
GONE = {"adam", "metrics"}  # files of plumbing/ whose content went into the core


def test_five_files_stand_on_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(CORE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_up(path):
    lines = path.read_text().splitlines()
    for number, name in imported(path):
        hook = path.name in ("train.py", "eval.py") and lines[number - 1].startswith(HOOK)
        if name in ARROWS and name != room(path) and not hook:
            assert name in ARROWS[room(path)], f"{path}:{number} imports {name}"


def tokens(text):
    return list(tokenize.generate_tokens(io.StringIO(text).readline))


def test_the_core_names_nothing_of_extras_but_the_hook():
    """Comments may say where to look."""
    for name in CORE:
        text = (ROOT / name).read_text()
        lines = [t.line for t in tokens(text) if t.type == tokenize.NAME and t.string == "extras"]
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


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Load, Store and Del only say how a name is used.
USES = (ast.Load, ast.Store, ast.Del)


def test_the_core_is_small_and_airy():
    """Size is counted in syntax nodes. Packing does not shrink them, and air does not grow them."""
    lines = nodes = statements = comprehensions = comments = 0
    for name in CORE:
        text = (ROOT / name).read_text()
        lines += len(text.splitlines())
        comments += sum(token.type == tokenize.COMMENT for token in tokens(text))
        for node in ast.walk(ast.parse(text)):
            nodes += not isinstance(node, USES)
            statements += isinstance(node, ast.stmt)
            comprehensions += isinstance(node, COMPREHENSIONS)
    assert nodes <= 9700
    assert round(nodes / statements, 1) <= 7.8
    assert round(100 * comprehensions / lines, 1) <= 4
    assert round(100 * comments / lines, 1) >= 15


@pytest.mark.parametrize("path", SOURCES + EXERCISES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 40, f"{path}: {node.name}"


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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def test_the_readme_shows_the_house():
    """The tree of files in README.md names every file of every wing, and no other."""
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## Files\n\n```\n(.*?)```", text, re.S)[1]
    for wing in WINGS:
        line = next(line for line in tree.splitlines() if line.startswith(f"{wing}/"))
        files = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
        assert files == set(re.findall(r"\w+", line)) & (files | GONE)
    for name in CORE:
        assert f"\n{name} " in f"\n{tree}"
