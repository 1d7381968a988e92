"""exercises/check.py passes right answers, says what wrong ones do, and always ends."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acts import prepared, stop_after

import eval as evaluation
from plumbing.files import unseal  # noqa: F401 (exercise 5 calls it)

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import answer  # noqa: E402
import cases  # noqa: E402
import check  # noqa: E402

CUBIC = """def density_at(step, ramp, final):
    return final + (1 - final) * max(0, 1 - step / ramp) ** 3"""
BISECTION = """
import torch
def top_v(scores, k):
    low, high = scores.min() - 1, scores.max() + 1
    for _ in range(80):
        middle = (low.double() + high.double()) / 2
        low, high = (middle, high) if (scores >= middle).sum() >= k else (low, middle)
    kept = scores >= high
    ties = (scores >= low) & ~kept
    return kept | ties & (ties.cumsum(0) <= k - kept.sum())
"""
SORTED = "def top_v(scores, k):\n    return scores >= scores.sort(descending=True).values[k - 1]"
GRADIENT = "def score_gradient(weight, mask, grad):\n    return grad * weight"
ROWS = """
import torch
def rank(weights, scores):
    made = {}
    for group, s in scores.items():
        made[group] = s.argsort(dim=2).argsort(dim=2)  # places within the rows
    return made
"""
FOURS = """
import torch
def two_of_four(scores):
    fours = scores.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(2, fours.topk(2, dim=2).indices, True)
    return kept.flatten(1)
"""
DEAD = """
def dead_neurons(incoming, outgoing):
    return [n for n in range(len(incoming)) if not incoming[n].any() or not outgoing[:, n].any()]
"""
RIGHT = {2: CUBIC, 3: BISECTION, 4: GRADIENT, 6: ROWS, 7: FOURS, 9: DEAD}
WRONG = [  # (exercise, code, what is said about it)
    (2, CUBIC.replace("** 3", ""), r"density_at\(\d+, \d+, [\d.]+\) is [\d.]+, not [\d.]+$"),
    (2, CUBIC.replace("** 3", "** 2"), "is .*, not"),
    (2, CUBIC.replace("max(0, 1 - step / ramp)", "(1 - step / ramp)"), "is .*, not"),
    (2, CUBIC.replace("max(0, 1 - step / ramp)", "(step / ramp)"), r"\(0, .*, not 1.0000"),
    (2, CUBIC.replace("return final + (1", "return 1 - (1").replace("1 - step", "step"), "not"),
    (2, CUBIC.replace("1 - step / ramp", "1 - step // ramp"), "is 1.0000, not"),
    (2, CUBIC.replace("return ", "return str(").replace("** 3", "** 3)"), "TypeError"),
    (2, CUBIC.replace("return ", ""), "TypeError.*NoneType"),
    (3, SORTED, "no sort .line 2.: find the k-th largest score without sorting"),
    (3, SORTED.replace("sort(descending=True).values", "tolist()"), "no tolist .line 2."),
    (3, "from torch import topk\ndef top_v(scores, k):\n    return topk(scores, k)", "no topk"),
    (3, "from torch import topk as f\ndef top_v(scores, k):\n    return f(scores, k)", "no topk"),
    (3, "from torch import *\n" + SORTED.replace("scores.sort(", "sort(scores, "), "no sort"),
    (3, "import torch\n@torch.no_grad()\n" + SORTED, "no sort .line 4."),
    (3, f"import functools as f\n{SORTED}\ntop_v = f.partial(top_v)", "no sort .line 3."),
    (
        3,
        BISECTION.replace("ties.cumsum(0) <= k - kept.sum()", "ties"),
        "not 3; some scores are equal, and only as many",
    ),
    (3, BISECTION.replace("return kept", "return ~kept"), "keeps"),
    (3, BISECTION.replace("range(80)", "range(2)"), "the highest are"),
    (3, "def top_v(scores, k):\n    return scores + 1", "is of torch.float32, not torch.bool"),
    (3, "def top_v(scores, k):\n    scores += 1\n    return scores > 9", "keeps 0 of 7, not 3"),
    (3, "def top_v(scores, k):\n    return (scores > 9)[:1]", r"has shape \[1\], not \[7\]"),
    (3, "def top_v(scores, k):\n    pass", "must be a tensor, not NoneType"),
    (4, GRADIENT + " * mask", "could never come back"),
    (4, GRADIENT.replace("* weight", ""), "that of the weight, not of its score"),
    (4, GRADIENT.replace("* weight", "* mask"), "under its mask"),
    (4, GRADIENT.replace("return", "return -"), "of the wrong sign"),
    (4, GRADIENT.replace("grad * weight", "weight"), "the gradient is .*, not"),
    (4, GRADIENT.replace("grad * weight", "(grad * weight).abs()"), "the gradient is .*, not"),
    (4, GRADIENT.replace("grad * weight", "grad * weight * grad.sign()"), "is .*, not"),
    (4, GRADIENT.replace("grad * weight", "(grad * weight).T"), r"has shape \[5, 3\], not"),
    (4, GRADIENT.replace("return ", ""), "must be a tensor, not NoneType"),
    (6, ROWS.replace("dim=2", "dim=1"), "a row of .* keeps .*, not"),
    (6, ROWS.replace("return made", "return scores"), "a row of .* keeps .*, not"),
    (6, ROWS.replace("= s.arg", "= (-s).arg"), "keeps the scores .* the highest are"),
    (6, ROWS.replace("= s.arg", "= weights[group].arg"), "keeps the scores .* the highest are"),
    (6, ROWS.replace("= {}", "= scores").replace("= s.arg", "= (-s).arg"), "keeps the scores"),
    (6, ROWS.replace("return made", "return list(made)"), "rank must return a dict"),
    (6, ROWS.replace("made[group]", "made['query']"), "has shape|no output"),
    (6, ROWS.replace("return made", "return {g: m[:1] for g, m in made.items()}"), "has shape"),
    (7, FOURS.replace("topk(2", "topk(1"), "two_of_four keeps 1 of 4, not 2"),
    (7, FOURS.replace("fours.topk", "(-fours).topk"), "keeps the scores .* the highest are"),
    (7, FOURS.replace("unflatten(1, (-1, 4))", "unflatten(1, (4, -1)).mT"), "keeps"),
    (7, FOURS.replace("kept.flatten(1)", "kept"), "what two_of_four returns has shape"),
    (9, DEAD.replace(" or ", " and "), "one side without weights is enough"),
    (9, DEAD.replace("not incoming[n].any() or ", ""), "one side without weights is enough"),
    (9, DEAD.replace(".any() or", ".sum() or"), "weights that cancel are weights"),
    (9, DEAD.replace("[:, n].any()", "[:, n].sum()"), "weights that cancel are weights"),
    (9, DEAD.replace(".any() or", ".all() or"), r"dead are \[.*\], not \[0, 1, 2"),
    (9, "def dead_neurons(incoming, outgoing):\n    return []", r"dead are \[.*\], not \[\]"),
    (9, "def dead_neurons(incoming, outgoing):\n    return 0", "must return a list"),
    (9, DEAD.replace("len(incoming)", "incoming + None"), "^not yet: line 3 of .*: TypeError"),
    (9, "def dead(incoming, outgoing):\n    return []", "defines no function dead_neurons"),
    (9, "def dead_neurons(:", "SyntaxError.*line 1"),
    (2, "\0", "not yet: "),
    (2, "x = '\udcff'", "SyntaxError"),
    (2, "def density_at(*given):\n    return density_at(*given)", "line 2 of .*: RecursionError"),
    (2, "def density_at(*given):\n    raise ValueError('a\\nb')", "line 2 of .*: ValueError: a b"),
    (2, "def density_at(*given):\n    assert False", "line 2 of .*AssertionError"),
]


def judge(tmp_path, exercise, code, seed):
    path = tmp_path / "answer.py"
    path.write_text(code, "utf-8", "surrogateescape")
    return answer.judge(check.EXERCISES[exercise][0], path, seed)


@pytest.mark.parametrize("exercise", RIGHT)
def test_right_answers_pass(tmp_path, exercise):
    for seed in range(5):
        assert judge(tmp_path, exercise, RIGHT[exercise], seed) == "right"


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_answers_are_told_what_is_wrong(tmp_path, number):
    exercise, code, sentence = WRONG[number]
    assert code not in RIGHT.values()
    for seed in range(3):
        said = judge(tmp_path, exercise, code, seed)
        assert said.startswith("not yet: ") and re.search(sentence, said), said
        assert len(said.splitlines()) == 1 and len(said) <= 420


def test_words_that_sort_nothing_are_free(tmp_path):
    """A variable may be called unique. A decorator and a callable object are no sorting either."""
    named = BISECTION.replace("ties", "unique") + "    # without topk or 'sort'\n"
    decorated = BISECTION.replace("def top_v", "@torch.no_grad()\ndef top_v")
    called = BISECTION.replace("top_v(", "__call__(self, ").replace("\n    ", "\n        ")
    called = called.replace("def ", "class Top:\n    def ") + "top_v = Top()\n"
    for code in (named, decorated, called):
        assert judge(tmp_path, 3, code, 0) == "right"


def test_an_exit_is_no_right_answer(tmp_path):
    """It leaves without a verdict, which check.py notices."""
    with pytest.raises(SystemExit):
        judge(tmp_path, 2, "exit()", 0)


def test_seeds_draw_other_cases(tmp_path):
    wrong = CUBIC.replace("3", "1")
    first, again, other = (judge(tmp_path, 2, wrong, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.slow
def test_one_answer(tmp_path, capfd):
    path = tmp_path / "mine.py"
    path.write_text("print('look')\n" + CUBIC)
    patient = ["--seconds", "999999"]
    assert check.main(["2", str(path), "--seed", "5", *patient]) == 0
    said = "look\n2. density_at (5 of 5 points): right\n--seed 5 repeats these cases\n"
    assert capfd.readouterr().out == said

    path.write_text(CUBIC.replace("3", "1"))
    assert check.main(["2", str(path), *patient]) == 1
    assert "2. density_at (0 of 5 points): not yet: density_at(" in capfd.readouterr().out


@pytest.mark.slow
def test_a_folder_is_graded_whatever_is_in_it(tmp_path, capfd):
    """A crash and a missing file before a right answer."""
    codes = {2: "import os\nos.abort()", 9: "print('look')\n" + DEAD}
    for number, code in codes.items():
        (tmp_path / check.EXERCISES[number][1]).write_text(code)
    results = tmp_path / "results.json"
    argv = ["--json", str(results), "--seconds", "999999", "2", "3", "9", str(tmp_path)]
    assert check.main(argv) == 0

    tests = json.loads(results.read_text())["tests"]
    assert [test["score"] for test in tests] == [0, 0, 25]
    assert [test["max_score"] for test in tests] == [5, 15, 25]
    crash, missing, right = [test["output"] for test in tests]
    assert re.fullmatch("not yet: Python ended with status .*", crash)
    assert missing == "not yet: there is no file top_v.py"
    assert right == "right"
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 4 and "Traceback" not in said.err


def this_python(folder):
    """Put a command `python` into a new folder: a system may know it as python3 alone."""
    folder.mkdir(parents=True)
    command = folder / "python"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    command.chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_class_is_graded_as_the_page_for_teachers_shows(tmp_path):
    """Beside the folders of two students lie files, which are no students."""
    page = (ROOT / "exercises" / "TEACHING.md").read_text()
    chapter = page.split("\n## A class on your own computer\n")[1].split("\n## ")[0]
    script = re.search(r"```sh\n(.*?)```", chapter, re.S)[1]
    table = re.search(r"```\n(student,.*?)```", chapter, re.S)[1]
    for name in ("exercises", "mask.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "class" / ".hidden").mkdir(parents=True)
    (tmp_path / "class" / "names.txt").write_text("ada and ben")
    this_python(tmp_path / "bin")
    paths = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    ended = subprocess.run(
        ["bash", "-ec", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": paths},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert (tmp_path / "class.csv").read_text("utf-8-sig") == table
    lines = ended.stdout.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["ada:", "ben:"]
    assert "2. density_at (5 of 5 points): right" in lines and len(lines) == 2 * 7 + 1
    assert any(re.match(r"2. .*: not yet: density_at\(\d+, ", line) for line in lines)


def test_a_class_needs_a_folder_for_each_student(tmp_path):
    (tmp_path / "schedule.py").write_text(CUBIC)
    with pytest.raises(SystemExit, match="no folders.*one for each student"):
        check.main(["--csv", str(tmp_path / "class.csv"), "2", str(tmp_path)])
    assert not (tmp_path / "class.csv").exists()


def test_numbers_and_flags_come_in_any_order():
    Path("answers").mkdir()
    for argv in (["2", "--seed", "5", "answers"], ["--seed", "5", "2", "answers"]):
        args = check.parse_args(argv)
        assert (args.exercises, args.path, args.seed) == ([2], Path("answers"), 5)
    assert check.parse_args(["answers"]).exercises == list(check.EXERCISES)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("2 5 .", "only exercises [2, 3, 4, 6, 7, 9] have a check"),
        ("2", "there is no 2; name the answer, or its folder, last"),
        ("2 nofolder", "there is no nofolder"),
        ("2 none/schedule.py", "there is no none/schedule.py"),
        ("--seconds 0 .", "--seconds must be at least 1"),
        ("--json none/results.json .", "argument --json: cannot write a file none/results.json"),
        ("--csv none/class.csv .", "argument --csv: cannot write a file none/class.csv"),
        ("--json . .", "argument --json: cannot write a file ."),
        ("--csv class.csv --json results.json .", "--json: not allowed with argument --csv"),
    ],
)
def test_a_mistaken_command_is_told_before_anything_is_graded(capsys, words, sentence):
    with pytest.raises(SystemExit):
        check.main(words.split())
    said = capsys.readouterr()
    assert sentence in said.err and not said.out
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_an_answer_that_never_ends_is_ended(tmp_path, capfd):
    (tmp_path / "schedule.py").write_text("while True:\n    print('x' * 99)")
    results = tmp_path / "results.json"
    argv = ["--json", str(results), "--seconds", "2", "2", "3", str(tmp_path)]
    assert check.main(argv) == 0
    loop, missing = [test["output"] for test in json.loads(results.read_text())["tests"]]
    assert loop == "not yet: no result after 2 seconds; does a loop never end?"
    assert "there is no file" in missing and len(capfd.readouterr().out.splitlines()) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_teachers_script_in_the_layout_of_gradescope(tmp_path):
    """The submission is full of files named like modules. None may be imported for one of them."""
    for folder in ("source", "submission", "results"):
        (tmp_path / folder).mkdir()
    this_python(tmp_path / "env" / "bin")
    page = (ROOT / "exercises" / "TEACHING.md").read_text()
    _, script = re.findall(r"```sh\n(#!.*?)```", page, re.S)
    packed = re.search(r"`zip autograder.zip setup.sh run_autograder (.*?)`", page)[1]
    for path in [path for pattern in packed.split() for path in ROOT.glob(pattern)]:
        (tmp_path / "source" / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "source" / path.relative_to(ROOT))

    submission = tmp_path / "submission"
    for name in ("torch", "json", "numpy", "string", "cases", "answer"):
        (submission / f"{name}.py").write_text("raise SystemExit('trapped')")
    by_the_core = "from mask import by_scores\n" + ROWS.replace(
        "scores.items()", "by_scores(weights, scores).items()"
    )
    for number, code in {3: BISECTION, 4: GRADIENT + " * mask", 6: by_the_core}.items():
        (submission / check.EXERCISES[number][1]).write_text(code)
    environment = os.environ | {"AUTOGRADER": str(tmp_path)}
    ended = subprocess.run(
        ["bash", "-c", script], cwd=submission, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [test["score"] for test in found["tests"]] == [0, 15, 0, 20, 0, 0], found
    assert found["output"] == "--seed 2026 repeats these cases"


def test_the_text_and_the_checks_agree():
    text = (ROOT / "EXERCISES.md").read_text()
    chapters = re.split(r"^## ", text, flags=re.M)[1:]
    assert [int(chapter.split(".")[0]) for chapter in chapters] == list(range(len(chapters)))
    for number, chapter in enumerate(chapters):
        assert all(word in chapter for word in ("*Goal.*", "*Hint.*", "*A right answer*"))
        checked = re.search(r"def (\w+)\(", chapter)
        assert (
            ("checked" in chapter.splitlines()[0]) == (number in check.EXERCISES) == bool(checked)
        )
        if checked:
            function, file, _ = check.EXERCISES[number]
            assert checked.group(1) == function
            assert hasattr(cases, f"check_{function}")
            assert chapter.splitlines()[0].endswith(f"checked; `{file}`)")


@pytest.mark.parametrize("page", ["EXERCISES.md", "exercises/TEACHING.md"])
def test_a_page_names_what_exists(page):
    """Such as `highest` in `mask.py`, or a call of `plumbing/files.py`."""
    text = " ".join((ROOT / page).read_text().split())
    found = re.findall(r"`(\w+)[^`]*`,? (?:in|of) `([\w/]+)\.py`", text)
    assert found
    for name, file in found:
        module = importlib.import_module(file.replace("/", "."))
        assert hasattr(module, name), f"{page}: {file}.py has no {name}"


def calls_of(number):
    """The calls in an exercise's text, such as `loaded = load_run(RUN)`."""
    text = (ROOT / "EXERCISES.md").read_text().split(f"\n## {number}. ")[1].split("\n## ")[0]
    return re.findall(r"`([^`]*\([^`]*\))`", text)


def test_scores_are_read_as_exercise_5_says(run):
    """From the checkpoint of a run that ended after its first step: six groups, queries first."""
    args, unfinished, job = prepared(run.argv("--evals", 12))
    stop_after(1, args, unfinished, job)
    (call,) = calls_of(5)
    tensors, description = eval(call.replace("RUN", args.out.as_posix()))
    assert description["step"] == 1
    scores = job.learner.masks.scores
    assert [*scores][0] == "query" and len(scores) == 6
    for number, stack in enumerate(scores.values()):
        assert stack.any() and torch.equal(tensors[f"parameter.{number}"], stack)


def test_a_mask_is_scored_as_exercise_8_says(finished):
    """With its own masks, a run has the score that it ended with."""
    final = json.loads((finished / "result.json").read_text())["final"]
    names = vars(evaluation) | {"torch": torch, "RUN": finished}
    load, read_sets, make_weights, score, replace_masks = calls_of(8)
    exec(load, names)
    names["other"] = names["loaded"]
    for call in (replace_masks, read_sets, make_weights):
        exec(call, names)
    assert eval(score, names) == final


def test_the_page_for_teachers_has_the_points_and_files():
    page = (ROOT / "exercises" / "TEACHING.md").read_text()
    rows = dict(re.findall(r"^\| (\d+)\. .*?\| (.*) \|$", page, re.M))
    for number, (_, file, points) in check.EXERCISES.items():
        cells = [cell.strip() for cell in rows[str(number)].split("|")]
        assert f"`{file}`" in cells and str(points) in cells
    assert sum(points for _, _, points in check.EXERCISES.values()) == 100
