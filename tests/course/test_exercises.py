"""exercises/check.py passes right answers, names the commonest wrong ones, and always ends."""

import ast
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import answer  # noqa: E402
import cases  # noqa: E402
import check  # noqa: E402
import process  # noqa: E402

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
WRONG = [
    (2, CUBIC.replace("** 3", ""), "linear, not cubic"),
    (2, CUBIC.replace("max(0, 1 - step / ramp)", "(1 - step / ramp)"), "from step"),
    (
        2,
        "def density_at(step, ramp, final):\n    return 1 - (1 - final) * min(1, step / ramp) ** 3",
        "upside down",
    ),
    (2, "def density_at(step, ramp, final):\n    return final", "at step 0 everything is kept"),
    (2, CUBIC.replace("** 3", "** 2"), r"\(1 - t/N\)\^3 is"),
    (
        3,
        "def top_v(scores, k):\n    return scores >= scores.sort(descending=True).values[k - 1]",
        "that sorts",
    ),
    (3, "def top_v(scores, k):\n    return scores.topk(k).indices", "that sorts"),
    (3, BISECTION.replace("ties.cumsum(0) <= k - kept.sum()", "ties"), "some scores are equal"),
    (3, BISECTION.replace("return kept", "return ~kept"), "keeps"),
    (
        3,
        "def top_v(scores, k):\n    return scores.new_ones(len(scores))",
        "is of torch.float32, not torch.bool",
    ),
    (3, "def top_v(scores, k):\n    scores += 1\n    return scores > 99", "changed the scores"),
    (
        3,
        "import torch\ndef top_v(scores, k):\n    return torch.arange(len(scores)) < k",
        "and removes one of",
    ),
    (4, GRADIENT + " * mask", "never come back"),
    (4, GRADIENT.replace("* weight", ""), "that of the weight, not of its score"),
    (4, GRADIENT.replace("* weight", "* mask"), "under the mask"),
    (4, GRADIENT.replace("return", "return -"), "wrong sign"),
    (4, GRADIENT.replace("grad * weight", "grad + weight"), "off by up to"),
    (4, GRADIENT.replace("grad * weight", "(grad * weight).sum()"), r"has shape \[\], not"),
    (6, ROWS.replace("dim=2", "dim=1"), "all columns of query keep equally many; the rows, s"),
    (6, ROWS.replace("return made", "return scores"), "a row of query keeps"),
    (6, ROWS.replace("return made", "return list(made)"), "return a dict"),
    (6, ROWS.replace("= s.arg", "= (-s).arg"), "a lower score than one that it removes"),
    (7, FOURS.replace("topk(2", "topk(1"), "are kept, not 2"),
    (7, FOURS.replace("fours.topk", "(-fours).topk"), "the two highest should stay"),
    (9, DEAD.replace(" or ", " and "), "one side without weights is enough"),
    (9, DEAD.replace(".any() or", ".sum() or"), "weights on both sides, which may cancel"),
    (9, DEAD.replace("[:, n].any()", "[:, n].sum()"), "weights on both sides, which may cancel"),
    (9, DEAD.replace(".any() or", ".all() or"), "is named, and has weights on both sides"),
    (
        9,
        DEAD.replace("not incoming[n].any() or ", ""),
        "has no incoming weights|one side without weights",
    ),
    (
        9,
        DEAD.replace("[n for", "sum([1 for").replace("any()]", "any()])"),
        "must return a list of indices",
    ),
    (
        9,
        "def dead_neurons(incoming, outgoing):\n    return [True] * len(incoming)",
        "must return a list of indices",
    ),
    (3, "from torch import topk\ndef top_v(scores, k):\n    return topk(scores, k)", "that sorts"),
    (3, "def top_v(scores, k):\n    return max(scores.tolist())", "tolist is not allowed here"),
    (3, "def top_v(scores, k):\n    return scores >= scores.unique()[-k]", "that sorts"),
    (9, "def dead(incoming, outgoing):\n    return []", "defines no function dead_neurons"),
    (9, DEAD.replace("len(incoming)", "incoming + None"), "TypeError.*, line 3 of"),
    (9, "def dead_neurons(:", "SyntaxError"),
    (2, CUBIC.replace("return ", ""), "density_at returned None; is there a return"),
    (4, GRADIENT.replace("grad * weight", "weight"), "the weight alone"),
    (3, "def top_v(scores, k):\n    return scores > sum(scores.neg().sort().values)", "that sorts"),
    (3, BISECTION.replace("range(80)", "range(2)"), "keeps a score of .* and removes one of"),
    (3, "import heapq\ndef top_v(scores, k):\n    return heapq.nlargest(k, scores)", "that sorts"),
    (
        3,
        "import numpy as np\ndef top_v(scores, k):\n    return np.partition(scores, -k)[-k]",
        "that sorts",
    ),
    (
        3,
        "import torch\ndef top_v(scores, k):\n    return torch.ones(len(scores)).bool()",
        "keeps 7 of 7, not 3",
    ),
    (
        2,
        CUBIC.replace("return ", "return str(").replace("** 3", "** 3)"),
        "must return a number, not str",
    ),
    (2, CUBIC.replace("ramp) ** 3", "(ramp + 1)) ** 3"), "from step|is 0"),
    (2, CUBIC.replace("1 - step / ramp", "1 - step // ramp"), "linear|is 1.0000"),
    (
        4,
        GRADIENT.replace("grad * weight", "(grad * weight).abs()"),
        "a score should fall as well as rise",
    ),
    (4, GRADIENT.replace("grad * weight", "(grad * weight).T"), "has shape|off by up to"),
    (4, GRADIENT.replace("grad * weight", "grad * weight * grad.sign()"), "off by up to"),
    (6, ROWS.replace("return made", "return {g: m[:1] for g, m in made.items()}"), "has shape"),
    (6, ROWS.replace("= s.arg", "= weights[group].arg"), "a lower score than one"),
    (7, FOURS.replace("kept.flatten(1)", "kept"), "what two_of_four returns has shape"),
    (
        7,
        FOURS.replace("unflatten(1, (-1, 4))", "unflatten(1, (4, -1)).mT"),
        "are kept, not 2|should stay",
    ),
    (
        9,
        "def dead_neurons(incoming, outgoing):\n    return []",
        "has no (in|out)|one side without weights",
    ),
    (9, "def dead_neurons(incoming, outgoing):\n    return ['0']", "must return a list of indices"),
    (
        2,
        "import torch\nimport os.path, socket\n" + CUBIC,
        "line 2 imports socket, which is not allowed",
    ),
    (
        2,
        "def density_at(*_):\n    from urllib.request import urlopen",
        "line 2 imports urllib.request",
    ),
    (2, "import check\n" + CUBIC, "line 1 imports check"),
    (
        2,
        "def density_at(*given):\n    return density_at(*given)",
        "calls itself without end, line 2 of",
    ),
    (2, "def density_at(*given):\n    exit()", "it ends the program"),
    (2, "import sys\nsys.exit(0)", "it ends the program.*, line 2 of answer.py"),
    (2, "def density_at(*given):\n    raise MemoryError", "more memory than it may"),
    (
        2,
        "import torch\ndef density_at(*given):\n    return torch.zeros(10**15)",
        "more memory than it may",
    ),
    (2, "def density_at(*given):\n    raise KeyboardInterrupt", "KeyboardInterrupt"),
    (2, "def density_at(*given):\n    raise ValueError('a\\nb')", "ValueError: a b, line 2"),
    (2, "x = '\udcff'", "SyntaxError"),
    (2, "\0", "is not a text file"),
    (2, "", "defines no function density_at"),
    (2, CUBIC + "\ndensity_at = 3", "defines no function density_at"),
]
# What happens only in a process of its own: (exercise, code, sentence)
OUTSIDE = [
    (2, "def density_at(*_):\n    while True: pass", "after 1 seconds there is no answer"),
    (
        2,
        "def density_at(*_):\n    return sum(iter(int, 1))",
        "after 1 seconds there is no answer",
    ),  # a loop in C
    (
        2,
        "while True:\n    try: 1 / 0\n    except BaseException: pass",
        "after 1 seconds there is no answer",
    ),
    (2, "import os\nos._exit(0)", r"its process left \(status 0\)"),
    (2, "import os\nos.abort()", "Python itself crashed.*SIGABRT"),
    (2, "import faulthandler\nfaulthandler._sigsegv()", "Python itself crashed.*SIGSEGV"),
    (
        2,
        "def density_at(*_):\n    open('{here}/new', 'w')",
        "it writes a file, which is not allowed here, line 2 of",
    ),
    (2, "import os\nos.open('{here}/new', os.O_CREAT)", "it writes a file"),
    (
        2,
        "import torch\ntorch.save(1, '{here}/new')",
        "it writes a file",
    ),  # in C++, where no hook of Python's is called
    (2, "import os\nos.remove(__file__)", "it removes a file"),
    (2, "import os\nos.rename(__file__, __file__ + 'x')", "it renames a file"),
    (2, "import shutil\nshutil.rmtree('{here}')", "it removes a file|it removes a folder"),
    (2, "import os\nwhile True: os.fork()", "it starts a process"),
    (2, "import os\nos.system('true')", "it starts a program"),
    (2, "__import__('subprocess').run(['true'])", "it starts a program"),
    (2, "s = __import__('socket')\ns.create_connection(('127.0.0.1', 9))", "it uses the network"),
    (2, "import os\nos.kill(os.getppid(), 9)", "it ends a process"),
    (2, "__import__('ctypes').string_at(0)", "it calls code in C|crashed"),
    (2, "while True: print('x' * 99)", "it prints more than 100,000 characters"),
    (2, "def density_at(*_):\n    return float(input())", "it waits for input"),
    (2, "x = []\nwhile True: x.append(bytes(10**8))", "it takes more memory than it may, 2 GiB"),
    (2, "print('right: exercise 2', flush=True)\nimport os\nos._exit(0)", "its process left"),
    (
        2,
        "import os\nfor fd in range(3, 30):\n    os.write(fd, b'{{\"sentence\": null}}')",
        "OSError|left|ended without",
    ),
]


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 1)


def judge(tmp_path, exercise, code, seed):
    path = tmp_path / "answer.py"
    path.write_text(code, "utf-8", "surrogateescape")
    return answer.judge(check.EXERCISES[exercise].function, path, seed)


@pytest.mark.parametrize("exercise", RIGHT)
def test_right_answers_pass(tmp_path, exercise):
    for seed in range(5):
        assert judge(tmp_path, exercise, RIGHT[exercise], seed) is None


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_answers_are_told_what_is_wrong(tmp_path, number):
    exercise, code, sentence = WRONG[number]
    assert code not in RIGHT.values()
    for seed in range(3):
        said = judge(tmp_path, exercise, code, seed)
        assert said and re.search(sentence, said) and len(said.splitlines()) == 1, said


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and signals are Linux's")
@pytest.mark.parametrize("number", range(len(OUTSIDE)))
def test_whatever_a_file_does_there_is_a_sentence(tmp_path, soon, number):
    exercise, code, sentence = OUTSIDE[number]
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "schedule.py"
    path.write_text(code.replace("{here}", str(folder)).replace("{{", "{").replace("}}", "}"))
    before = path.read_text()
    said, _ = process.watch("density_at", path, 0)
    assert said and re.search(sentence, said) and len(said.splitlines()) == 1, said
    assert path.read_text() == before and not [
        p for p in folder.iterdir() if p != path and p.stat().st_size
    ]


def single(tmp_path, capsys, code, *flags):
    path = tmp_path / "answer.py"
    path.write_text(code)
    status = check.main(["2", str(path), *flags])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_one_answer(tmp_path, capsys):
    assert single(tmp_path, capsys, CUBIC) == (0, "right: exercise 2, density_at\n")
    status, said = single(
        tmp_path, capsys, "print('right: exercise 2')\n" + CUBIC.replace("3", "1"), "--seed", "5"
    )
    first, last = said.splitlines()
    assert (
        status == 1
        and first == "right: exercise 2"
        and last.startswith("not yet: this schedule is linear")
    )
    assert last.endswith("(--seed 5 repeats these cases)")
    assert (
        check.main(["3", str(tmp_path / "x.py")]) == 1
        and "there is no file" in capsys.readouterr().out
    )


def grade(folder, results, *numbers, seed=0):
    check.main(["--json", str(results), "--seed", str(seed), *map(str, numbers), str(folder)])
    return json.loads(results.read_text())


@pytest.mark.slow
def test_a_folder_is_graded_whatever_is_in_it(tmp_path, soon, capfd):
    """In Gradescope's layout; a crash, a loop and a missing file among right answers."""
    folder = tmp_path / "submission"
    folder.mkdir()
    codes = {
        2: "import os\nos.abort()",
        3: BISECTION,
        4: "while True: pass",
        6: "print('look')\n" + ROWS,
        9: DEAD,
    }
    for number, code in codes.items():
        (folder / check.EXERCISES[number].file).write_text(code)
    found = grade(folder, tmp_path / "results.json", 2, 3, 4, 6, 7, 9)
    assert [test["score"] for test in found["tests"]] == [0, 15, 0, 20, 0, 25]
    assert sum(test["max_score"] for test in found["tests"]) == 100
    outputs = [test["output"] for test in found["tests"]]
    assert "crashed" in outputs[0] and outputs[1] == "right" and "no answer" in outputs[2]
    assert outputs[3] == "right\n\nThe file printed:\nlook\n"
    assert "there is no file two_of_four.py; there are dead_neurons.py, rank.py" in outputs[4]
    assert [test["status"] for test in found["tests"]] == ["failed", "passed"] * 3
    assert all({"name", "score", "max_score", "output"} <= test.keys() for test in found["tests"])
    assert [p.name for p in tmp_path.iterdir() if "results" in p.name] == ["results.json"]
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 6 and "Traceback" not in said.out + said.err


def test_results_are_whole_or_those_of_before(tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    results.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit):
        grade(tmp_path, results, 2)
    assert results.read_text() == "before"


def test_what_a_command_line_lacks_is_said(tmp_path, capsys):
    folder, results = str(tmp_path), str(tmp_path / "no" / "results.json")
    for argv, said in (
        (["2", "3", folder], "--json RESULTS"),
        (["--json", "x.json", "2", str(tmp_path / "y")], "is no folder"),
        (["--json", results, "2", folder], "results.json"),
        (["5", folder], "invalid choice: 5"),
    ):
        with pytest.raises(SystemExit) as ended:
            check.main(argv)
        last = (
            capsys.readouterr().err.splitlines()[-1].replace("'5'", "5")
        )  # newer Pythons quote it
        assert ended.value.code == 2 and said in last


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_teachers_script_in_the_layout_of_gradescope(tmp_path):
    """The submission is full of files named like modules. None may run outside of its process."""
    for folder in ("source", "submission", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "env").symlink_to(sys.prefix)
    page = (ROOT / "exercises" / "TEACHING.md").read_text()
    scripts = re.findall(r"```sh\n(.*?)```", page, re.S)
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
    for number, code in {**RIGHT, 4: "import socket", 6: by_the_core}.items():
        (submission / check.EXERCISES[number].file).write_text(code)
    environment = os.environ | {"AUTOGRADER": str(tmp_path)}
    ended = subprocess.run(
        ["bash", "-c", scripts[1]], cwd=submission, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert [test["score"] for test in found["tests"]] == [5, 15, 0, 20, 15, 25], found
    assert (
        found["output"] == "cases drawn with --seed 2026"
        and "imports socket" in found["tests"][2]["output"]
    )


@pytest.mark.slow
def test_where_processes_cannot_fork(tmp_path, monkeypatch):
    monkeypatch.setattr(
        multiprocessing, "get_all_start_methods", lambda: ["spawn"]
    )  # as on Windows
    path = tmp_path / "schedule.py"
    path.write_text(CUBIC.replace("3", "1"))
    assert "linear" in process.watch("density_at", path, 0)[0]


def test_watching_needs_no_torch():
    """So that a check imports it once; and no answer can be taken for a module of ours."""
    for name in ("check", "process"):
        tree = ast.parse((ROOT / "exercises" / f"{name}.py").read_text())
        top = [n.name for node in tree.body if isinstance(node, ast.Import) for n in node.names]
        assert "json" in top and "torch" not in top and "answer" not in top
    assert {"check", "process", "answer", "cases"} <= set(answer.NOT_NEEDED)


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
            exercise = check.EXERCISES[number]
            assert checked.group(1) == exercise.function and exercise.function in cases.CHECKS
            assert chapter.splitlines()[0].endswith(f"checked; `{exercise.file}`)")


def test_the_page_for_teachers_has_the_points_and_files():
    page = (ROOT / "exercises" / "TEACHING.md").read_text()
    rows = dict(re.findall(r"^\| (\d+)\. .*?\| (.*) \|$", page, re.M))
    for number, exercise in check.EXERCISES.items():
        cells = [cell.strip() for cell in rows[str(number)].split("|")]
        assert f"`{exercise.file}`" in cells and str(exercise.points) in cells
    assert sum(exercise.points for exercise in check.EXERCISES.values()) == 100
