"""The notebooks of the labs are small, clean, explained, and in step with the code."""

import ast
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from house import ARROWS, CORE, ROOT, WINGS

import mask

LABS = sorted((ROOT / "exercises").glob("*.ipynb"))
MACHINE = re.compile(
    r"(?<![\w.])/(home|root|tmp|usr|work|Users|content)/|(?<!\w)[A-Z]:\\"
)  # where paths of a machine begin

every_lab = pytest.mark.parametrize("lab", LABS, ids=lambda path: path.stem)


def read(lab, kind):
    """Cells of a kind, code or markdown -> [(cell, its text)]."""
    cells = json.loads(lab.read_text("utf-8"))["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == kind]


def defined(tree):
    """Names of the functions and classes of a syntax tree, methods among them."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, kinds) and not node.name.startswith("__")
    }


def test_there_are_two():
    assert [lab.name for lab in LABS] == ["lab1.ipynb", "lab2.ipynb"]


@every_lab
def test_a_notebook_runs_anywhere_and_is_small(lab):
    text = lab.read_text("utf-8")
    notebook = json.loads(text)
    assert len(text.encode()) < 200_000
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and {cell["cell_type"] for cell in notebook["cells"]} == {
        "code",
        "markdown",
    }
    assert not MACHINE.search(text)


@every_lab
def test_outputs_are_those_of_one_whole_run(lab):
    """Cells were run from the first to the last, without errors, warnings or progress bars."""
    cells = [cell for cell, _ in read(lab, "code")]
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "restart the kernel, run all cells, and save"
    for cell in cells:
        assert cell["metadata"].keys() <= {"tags"}
        for output in cell["outputs"]:
            assert (
                output["output_type"] in ("stream", "display_data")
                and output.get("name") != "stderr"
            ), output
    assert any(
        "image/png" in output.get("data", ()) for cell in cells for output in cell["outputs"]
    )


@every_lab
def test_cells_are_short_and_import_what_there_is(lab):
    required = {
        line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    known = required | {"matplotlib", "IPython"} | ARROWS.keys() | set(sys.stdlib_module_names)
    for _, text in read(lab, "code"):
        assert len(text.splitlines()) <= 30, text
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known, text


@every_lab
def test_nothing_of_ours_is_written_again(lab):
    files = [ROOT / name for name in CORE] + [
        path for wing in WINGS for path in (ROOT / wing).glob("*.py")
    ]
    ours = set().union(*(defined(ast.parse(path.read_text("utf-8"))) for path in files))
    assert {"highest", "Masks", "stacked", "learn", "evaluate"} <= ours
    theirs = set().union(*(defined(ast.parse(text)) for _, text in read(lab, "code")))
    assert theirs and not theirs & ours


@every_lab
def test_sections_explain_and_ask(lab):
    """Each begins with sentences and ends with questions. The exercises in its headings exist."""
    text = "\n".join(text for _, text in read(lab, "markdown"))
    first, *sections = re.split(r"^## ", text, flags=re.M)
    assert "pip install -r requirements.txt matplotlib" in first and "minutes" in first
    assert [section[:3] for section in sections] == [
        f"{chr(ord('A') + n)}. " for n in range(len(sections))
    ]
    numbers = re.findall(r"^## (\d+)\.", (ROOT / "EXERCISES.md").read_text("utf-8"), flags=re.M)
    for section in sections:
        heading, _, body = section.partition("\n")
        said, _, asked = body.partition("**Questions.**")
        assert said.count(". ") >= 1, heading
        asked, _, room = asked.partition("**Your answers.**")
        if lab.stem == "lab1":  # it has room for every answer
            assert re.findall(r"^\d\.", room, re.M) == re.findall(r"^\d\.", asked, re.M), heading
        assert asked.strip().startswith("1. ") and asked.rstrip().endswith(("?", ")")), heading
        assert set(re.findall(r"\d+", heading)) <= set(numbers), heading


# What lab1 asks the student to write: right answers, and wrong ones with what is said about them.
MASKED = "def my_masked(weight, scores, mask):\n    return "
DENSITY = "def my_density(step, ramp, final):\n    return "
REGULARIZER = "def my_regularizer(scores):\n    return "
TOP_K = "def my_top_k(scores, k):\n    return "
CUBIC = "final + (1 - final) * max(0, 1 - step / ramp) ** 3"
MEANS = "torch.stack([torch.sigmoid(s).mean() for s in scores.values()])"
PLACES = "scores.flatten().argsort(descending=True).argsort().view_as(scores)"
RIGHT = {
    "my-masked": MASKED + "weight * (mask + (scores - scores.detach()))",
    "my-density": DENSITY + CUBIC,
    "my-regularizer": REGULARIZER + MEANS + ".mean()",
    "my-top-k": TOP_K + PLACES + " < k",
}
WRONG = [
    ("my-masked", MASKED + "weight * mask", "nothing can learn"),
    ("my-masked", MASKED + "weight * scores", "W' is"),
    ("my-masked", MASKED + "weight * mask * (1 + scores - scores.detach())", "never come back"),
    ("my-masked", MASKED + "weight * mask + (scores - scores.detach())", "has the factor W"),
    ("my-density", DENSITY + CUBIC.removesuffix(" ** 3"), "at step 25 of 100"),
    ("my-density", DENSITY + CUBIC.replace("max(0, 1 - step / ramp)", "(1 - step / ramp)"), "150"),
    ("my-density", DENSITY + CUBIC.replace("1 - step", "step"), "at step 0"),
    ("my-regularizer", REGULARIZER + f"4 * {MEANS}.mean()", "is the sum over matrices"),
    (
        "my-regularizer",
        REGULARIZER + "torch.cat([s.flatten() for s in scores.values()]).sigmoid().mean()",
        "a matrix counts as one",
    ),
    ("my-regularizer", REGULARIZER + f"{MEANS}.mean().item()", "must be a tensor"),
    ("my-regularizer", REGULARIZER + f"{MEANS}.mean() / 2", "R is 0.3452, not 0.6904"),
    ("my-top-k", TOP_K + "scores", "a mask is bool"),
    ("my-top-k", TOP_K + PLACES + " <= k", "are kept of"),
    ("my-top-k", TOP_K + f"{PLACES} >= scores.numel() - k", "a higher score is removed"),
    (
        "my-top-k",
        TOP_K + "scores >= scores.flatten().sort().values[len(scores.flatten()) - max(k, 1)]",
        "5 are kept of",  # of equal scores all
    ),
]


def check_of_lab1(written, code):
    """Run the check below a cell of lab1 that the student has filled with this code."""
    cells = {cell["id"]: text for cell, text in read(ROOT / "exercises" / "lab1.ipynb", "code")}
    scope = {name: getattr(mask, name) for name in ("StraightThrough", "density_at", "highest")}
    scope |= {"mean_sigmoid": mask.mean_sigmoid, "torch": torch, "np": np}
    scope["small"] = torch.tensor([[[0.3, -1.0, 2.0, 0.3], [0.0, 0.3, -0.5, 1.0]]])
    for text in (cells["yours-or-ours"], code or cells[written]):
        exec(text, scope)
    exec(cells[written.replace("my", "check")], scope)


@pytest.mark.parametrize("written", RIGHT)
def test_right_functions_pass(written, capsys):
    check_of_lab1(written, RIGHT[written])
    assert capsys.readouterr().out.startswith("passed: ")


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_functions_are_told_what_is_wrong(number):
    written, code, sentence = WRONG[number]
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        check_of_lab1(written, code)


@pytest.mark.parametrize("written", RIGHT)
def test_an_unwritten_function_is_replaced_and_the_lab_says_so(written, capsys):
    check_of_lab1(written, None)
    name = written.replace("-", "_")
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{name} is not written yet; mask.py stands in for it"
    assert second.startswith("passed: ")


@pytest.fixture
def notebook(monkeypatch):
    """What Jupyter gives a notebook: its folder, a display, pictures that open no window."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    shown = SimpleNamespace(update=lambda picture: None)
    display = SimpleNamespace(display=lambda *_, **__: shown, clear_output=lambda *_, **__: None)
    package = SimpleNamespace(display=display, version_info=(9, 0), get_ipython=lambda: None)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / "exercises")
    with pyplot.rc_context():
        yield
    pyplot.close("all")


@every_lab
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_every_cell_runs_on_a_tiny_model(lab, notebook, make_model, glue, tmp_path):
    torch.manual_seed(0)
    model = make_model(hidden_size=32, intermediate_size=128)
    flags = ["--data-dir", glue, "--model", model, "--length", 16, "--steps", 6, "--evals", 1]
    flags += ["--device", "cpu"]
    ours = {
        "FLAGS": [str(word) for word in flags],
        "RUNS": tmp_path / "runs",
        "STEPS": "6",
        "EXAMPLES": 8,
    }
    scope = {}
    for number, (cell, text) in enumerate(read(lab, "code"), 1):
        exec(compile(text, f"{lab.name}, code cell {number}", "exec"), scope)
        if "parameters" in cell["metadata"].get("tags", ()):
            scope |= ours
            ours = None
    assert ours is None  # there was such a cell
    assert len(list((tmp_path / "runs").glob("*/result.json"))) >= 2
