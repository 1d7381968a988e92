"""exercises/check.py: right answers pass, and the commonest wrong ones are told what is wrong."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import check  # noqa: E402

CUBIC = "def density_at(step, ramp, final):\n    return final + (1 - final) * max(0, 1 - step / ramp) ** 3"
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
def masking(scores, importance, density, exact):
    made = {}
    for group, s in scores.items():
        k = int(density * s.shape[2] + 1e-3)
        made[group] = torch.zeros_like(s, dtype=torch.bool).scatter(2, s.topk(k, dim=2).indices, True)
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
    (2, "def density_at(step, ramp, final):\n    return 1 - (1 - final) * min(1, step / ramp) ** 3", "upside down"),
    (2, "def density_at(step, ramp, final):\n    return final", "at step 0 everything is kept"),
    (2, CUBIC.replace("** 3", "** 2"), r"\(1 - t/N\)\^3 is"),
    (3, "def top_v(scores, k):\n    return scores >= scores.sort(descending=True).values[k - 1]", "that sorts"),
    (3, "def top_v(scores, k):\n    return scores.topk(k).indices", "that sorts"),
    (3, BISECTION.replace("ties.cumsum(0) <= k - kept.sum()", "ties"), "some scores are equal"),
    (3, BISECTION.replace("return kept", "return ~kept"), "keeps"),
    (3, "def top_v(scores, k):\n    return scores.new_ones(len(scores))", "is of torch.float32, not torch.bool"),
    (3, "def top_v(scores, k):\n    scores += 1\n    return scores > 99", "changed the scores"),
    (3, "import torch\ndef top_v(scores, k):\n    return torch.arange(len(scores)) < k", "and removes one of"),
    (4, GRADIENT + " * mask", "never come back"),
    (4, GRADIENT.replace("* weight", ""), "that of the weight, not of its score"),
    (4, GRADIENT.replace("* weight", "* mask"), "under the mask"),
    (4, GRADIENT.replace("return", "return -"), "wrong sign"),
    (4, GRADIENT.replace("grad * weight", "grad + weight"), "off by up to"),
    (4, GRADIENT.replace("grad * weight", "(grad * weight).sum()"), r"has shape \[\], not"),
    (6, ROWS.replace("dim=2", "dim=1").replace("scatter(2", "scatter(1"), "of 6|kept at density|out of range|index"),
    (6, ROWS.replace("shape[2]", "shape[1]").replace("dim=2", "dim=1").replace("scatter(2", "scatter(1"), "columns"),
    (6, ROWS.replace("return made", "return list(made)"), "return a dict"),
    (6, ROWS.replace("s.topk", "(-s).topk"), "a lower score than one that it removes"),
    (7, FOURS.replace("topk(2", "topk(1"), "are kept, not 2"),
    (7, FOURS.replace("fours.topk", "(-fours).topk"), "the two highest should stay"),
    (9, DEAD.replace(" or ", " and "), "one side without weights is enough"),
    (9, DEAD.replace(".any() or", ".sum() or"), "weights on both sides, which may cancel"),
    (9, DEAD.replace("[:, n].any()", "[:, n].sum()"), "weights on both sides, which may cancel"),
    (9, DEAD.replace(".any() or", ".all() or"), "is named, and has weights on both sides"),
    (9, DEAD.replace("not incoming[n].any() or ", ""), "has no incoming weights|one side without weights"),
    (9, DEAD.replace("[n for", "sum([1 for").replace("any()]", "any()])"), "must return a list of indices"),
    (9, "def dead_neurons(incoming, outgoing):\n    return [True] * len(incoming)", "must return a list of indices"),
    (3, "from torch import topk\ndef top_v(scores, k):\n    return topk(scores, k)", "that sorts"),
    (3, "def top_v(scores, k):\n    return max(scores.tolist())", "tolist is not allowed here"),
    (3, "def top_v(scores, k):\n    return scores >= scores.unique()[-k]", "that sorts"),
    (3, "def top_v(scores, k):\n    while True: pass", "no answer"),
    (9, "def dead(incoming, outgoing):\n    return []", "defines no function dead_neurons"),
    (9, DEAD.replace("len(incoming)", "incoming + None"), "TypeError.*, line 3 of"),
    (9, "def dead_neurons(:", "SyntaxError"),
    (2, CUBIC.replace("return ", ""), "density_at returned None; is there a return"),
    (4, GRADIENT.replace("grad * weight", "weight"), "the weight alone"),
    (3, "def top_v(scores, k):\n    return scores > sum(scores.neg().sort().values)", "that sorts"),
    (3, BISECTION.replace("range(80)", "range(2)"), "keeps a score of .* and removes one of"),
]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(check, "SECONDS", 2)


def run(tmp_path, capsys, exercise, code, *flags):
    path = tmp_path / "answer.py"
    path.write_text(code)
    status = check.main([str(exercise), str(path), *flags])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("exercise", RIGHT)
def test_right_answers_pass(tmp_path, capsys, exercise):
    for seed in range(5):
        status, said = run(tmp_path, capsys, exercise, RIGHT[exercise], "--seed", str(seed))
        assert status == 0 and said.startswith("right"), said


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_answers_are_told_what_is_wrong(tmp_path, capsys, number):
    exercise, code, sentence = WRONG[number]
    assert code not in RIGHT.values()
    for seed in range(1 if sentence == "no answer" else 3):  # that one takes its time
        status, said = run(tmp_path, capsys, exercise, code, "--seed", str(seed))
        assert status == 1 and said.startswith("not yet: ") and re.search(sentence, said), said
        assert f"--seed {seed}" in said and len(said.splitlines()) == 1


def test_a_missing_file(tmp_path, capsys):
    assert check.main(["3", str(tmp_path / "x.py")]) == 1 and "there is no file" in capsys.readouterr().out


def test_the_text_and_the_checks_agree():
    text = (ROOT / "EXERCISES.md").read_text()
    chapters = re.split(r"^## ", text, flags=re.M)[1:]
    assert [int(chapter.split(".")[0]) for chapter in chapters] == list(range(1, len(chapters) + 1))
    for number, chapter in enumerate(chapters, 1):
        assert all(word in chapter for word in ("*Goal.*", "*Hint.*", "*A right answer*"))
        checked = re.search(r"def (\w+)\(", chapter)
        assert ("checked" in chapter.splitlines()[0]) == (number in check.EXERCISES) == bool(checked)
        assert not checked or checked.group(1) == check.EXERCISES[number][0]
