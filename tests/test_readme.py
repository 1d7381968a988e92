"""The README is true: its files, commands, packages, line counts and pieces of code."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

import bench
import data
import eval as eval_
import experiments
import mask
import squad
import train

ROOT = Path(__file__).parent.parent
README, EXERCISES, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "EXERCISES.md", "results/README.md"))
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "exercises").glob("*.py")]
COMMANDS = {"train": train, "eval": eval_, "bench": bench, "experiments": experiments, "squad": squad}


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_file_is_in_the_list_and_every_name_in_it_is_a_file():
    table = section("Files").strip().split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert {path.name for path in ROOT.glob("*.py")} <= named
    assert all((ROOT / name).exists() for name in named)


def test_line_counts():
    counts = [len(path.read_text().splitlines()) for path in SOURCES]
    total, longest = (
        int(n.replace(",", "")) for n in re.search(r"less than ([\d,]+) lines.*?over (\d+)", README, re.S).groups()
    )
    assert 0.9 * total < sum(counts) <= total and 0.9 * longest < max(counts) <= longest


def test_packages():
    required = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert required == {"torch", "tokenizers", "safetensors", "numpy", "tqdm"} and "five packages" in README
    ours = {path.stem for path in SOURCES}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                assert top in required | ours | sys.stdlib_module_names or (path.stem, top) == ("picture", "matplotlib")
                assert top not in ("pickle", "shelve", "marshal")


def commands():
    """(script, its arguments) of what stands in code blocks and between backquotes."""
    found = []
    for text in (README, EXERCISES, RESULTS):
        fences = re.findall(r"```\w*\n(.*?)```", text, re.S)
        spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        lines = [line.split(" # ")[0] for fence in fences for line in fence.splitlines()]
        for line in lines + [" ".join(span.split()) for span in spans]:
            found += re.findall(r"(?:python|=2) (\w+)\.py(.*)", line)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_every_command_exist(name, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[name].main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    used = {flag for script, rest in commands() if script == name for flag in re.findall(r"(?<![\w-])--[a-z-]+", rest)}
    assert used <= known, used - known
    assert any(script == name for script, _ in commands())


def test_methods_and_tasks_are_those_of_the_tables():
    table = [
        line.split("`")[1]
        for line in section("The idea").splitlines()
        if line.startswith("| `") and "METHODS" not in line
    ]
    assert [name for name in table if name in mask.METHODS] == list(mask.METHODS)
    assert re.findall(r"^\| `(\w+)` \|", section("Models and data"), re.M) == list(data.TASKS)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / path).stat().st_size < 200_000 for path in pictures)


def test_functions_that_the_equations_name_exist():
    names = re.findall(r"\| `(\w+)` \|$", section("The idea"), re.M)
    assert len(names) == 5 and all(hasattr(mask, name) for name in names)


def blocks():
    return re.findall(r"```python\n(.*?)```", section("Change it"), re.S)


def run(make_model, folder, tmp_path, *flags):
    given = ["--model", make_model(), "--data-dir", folder, "--out", tmp_path / "run", "--steps", 8, "--length", 16]
    train.main([str(a) for a in [*given, "--device", "cpu", "--evals", 1, *flags]])
    return json.loads((tmp_path / "run" / "result.json").read_text())


def test_a_new_task_takes_one_row(make_model, tmp_path, glue):
    code = blocks()[0].replace("sport", "bad").replace("politics", "good")  # words that the tests' tokenizer knows
    try:
        exec(code, vars(data))
        (glue / "news").mkdir()
        for split in ("train", "dev"):
            rows = "".join(f"the film is {('bad', 'good')[n % 2]}\t{n % 2}\n" for n in range(40))
            (glue / "news" / f"{split}.tsv").write_text("headline\ttopic\n" + rows)
        assert run(make_model, glue, tmp_path, "--task", "news")["task"] == "news"
    finally:
        data.TASKS.pop("news")


def test_a_new_masking_function_takes_one_function(make_model, tmp_path, glue):
    try:
        exec(blocks()[1], vars(mask))
        assert run(make_model, glue, tmp_path, "--method", "smp-shared")["density"] == 0.5
    finally:
        mask.METHODS.pop("smp-shared")
        del mask.shared


def test_a_new_scoring_rule_takes_one_function(make_model, tmp_path, glue, monkeypatch):
    scope = dict(vars(mask))
    exec(blocks()[2], scope)
    monkeypatch.setattr(mask, "StraightThrough", scope["BySign"])
    assert run(make_model, glue, tmp_path)["density"] == 0.5


@pytest.mark.parametrize("name", ["main", "ablations", "abandoned", "units"])
def test_tables_are_those_of_the_results(name, capsys):
    experiments.main(["table", name])
    assert f"\n\n{capsys.readouterr().out}\n" in README + RESULTS  # the whole of a table
