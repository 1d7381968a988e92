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
from pathlib import Path

import pytest
from house import ARROWS, CORE, HOOK, ROOT, WINGS, imported, python_files, room

SOURCES = [ROOT / name for name in CORE]
for wing in WINGS:
    SOURCES += python_files(ROOT / wing)
EXERCISES = python_files(ROOT / "exercises")
GONE = {"adam", "metrics"}  # files of plumbing/ whose content went into the core


def test_five_files_stand_on_top():
    assert {path.name for path in python_files(ROOT)} == set(CORE)


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
        hooked = "extras" in WINGS and name in ("train.py", "eval.py")
        assert [line[: len(HOOK)] for line in lines] == [HOOK] * hooked


def test_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert required == {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
    needed_elsewhere = {("picture.py", "matplotlib"), ("fetch.py", "huggingface_hub")}
    for path in SOURCES + EXERCISES:
        beside = {other.stem for other in EXERCISES} if path in EXERCISES else set()
        for _, name in imported(path):
            known = name in required | ARROWS.keys() | sys.stdlib_module_names | beside
            assert known or (path.name, name) in needed_elsewhere, f"{path} imports {name}"
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


@pytest.mark.parametrize(("folder", "most"), [("plumbing", 6900), ("exercises", 2260)])
def test_the_wings_are_small(folder, most):
    nodes = 0
    for path in python_files(ROOT / folder):
        nodes += sum(not isinstance(node, USES) for node in ast.walk(ast.parse(path.read_text())))
    assert nodes <= most


@pytest.mark.parametrize("path", SOURCES + EXERCISES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 40, f"{path}: {node.name}"


def copy_of_the_repository(folder, without=()):
    """Copy everything but these folders. Returns python(*words), which runs there -> its stdout."""

    def leave_out(path, names):
        here = Path(path).relative_to(ROOT)
        others = {"__pycache__", ".git", ".pytest_cache", ".ruff_cache", ".venv", "env", "runs"}
        return [name for name in names if name in others or str(here / name) in without]

    # An editor may keep a link that leads nowhere beside a file.
    shutil.copytree(ROOT, folder, ignore=leave_out, ignore_dangling_symlinks=True)

    def python(*words):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, *(str(word) for word in words)]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
        return ended.stdout

    return python


@pytest.mark.slow
def test_the_method_stands_without_its_wings(make_model, glue, tmp_path):
    """A copy without extras/, tools/, exercises/, their tests and the lines that import extras.

    It trains, evaluates and passes its tests. Only a few files of these run here.
    """
    house = tmp_path / "house"
    without = {"extras", "tools", "exercises", "tests/extras", "tests/tools", "tests/course"}
    python = copy_of_the_repository(house, without)
    for name in ("train.py", "eval.py"):
        lines = (house / name).read_text().splitlines(keepends=True)
        (house / name).write_text("".join(line for line in lines if not line.startswith(HOOK)))

    out = tmp_path / "run"
    flags = ["--data-dir", glue, "--model", make_model(), "--length", 16, "--device", "cpu"]
    files = ("tests/core/test_mask.py", "tests/core/test_train.py", "tests/test_house.py")
    with ThreadPoolExecutor() as pool:
        tested = pool.submit(python, "-m", "pytest", "-q", *files)
        python("train.py", *flags, "--steps", 6, "--out", out)
        final = json.loads((out / "result.json").read_text())["final"]["accuracy"]
        said = python("eval.py", out, "--device", "cpu")  # as it was trained
        assert f"accuracy {final:.4f}\ntraining reported" in said
        shown = python("train.py", "--help")
        assert "movement" not in shown and "squad" not in shown and "smp-s" in shown
        assert re.search(r"^\d\d\d passed", tested.result(), re.M)


@pytest.mark.slow
@pytest.mark.skipif("extras" not in WINGS, reason="extras/ is not there")
@pytest.mark.skipif(not shutil.which("git"), reason="git is not there")
def test_a_file_of_ones_own_in_extras_breaks_no_test(tmp_path):
    """The README's snippets, where it says to put them, in a checkout."""
    house = tmp_path / "house"
    python = copy_of_the_repository(house)
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *words], cwd=house, check=True)
    section = (ROOT / "README.md").read_text().split("\n## Change it\n")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.S)
    (house / "extras" / "mine.py").write_text("\n".join(snippets))
    # The tests of tables, of the house, and of what is a test for each method.
    methods = "tests/extras/test_methods.py::test_"
    each = f"{methods}every_method_reaches_its_density_and_can_be_evaluated"
    tests = ["tests/core/test_data.py", "tests/test_house.py", "tests/test_readme.py"]
    tests += [f"{methods}what_scores_are_and_what_trains", f"{each}[smp-shared]"]
    said = python("-m", "pytest", "-q", *tests)
    assert len(snippets) == 4 and re.search(r"^\d\d\d passed", said, re.M)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def test_the_readme_shows_the_house():
    """The tree of files in README.md names every file of every wing, and no other."""
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"## Files\n\n```\n(.*?)```", text, re.S)[1]
    for wing in WINGS:
        line = next(line for line in tree.splitlines() if line.startswith(f"{wing}/"))
        files = {path.stem for path in python_files(ROOT / wing)} - {"__init__"}
        assert files == set(re.findall(r"\w+", line)) & (files | GONE)
    for name in CORE:
        assert f"\n{name} " in f"\n{tree}"
