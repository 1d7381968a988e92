"""The replay against a recording by a second implementation: matrix by matrix, Adam by hand."""

import json
import math
import shutil

import pytest
import replay
import torch
import torch.nn.functional as F
from conftest import load_model, write_model
from oracle import plain_bert
from recordings import nudge_file, replayed
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from model import Encoder

TOTAL, RAMP, FINAL, LR, WORDS = 12, 8, 0.4, 0.02, [5, 6]


def plain_densities(method, scores, v):
    """Group by group; above 1 is cut, as the reference code does."""
    if method == "smp-l":
        return dict.fromkeys(scores, v)
    densities = {}
    kind = {
        name: name.split(".layer.")[1].split(".", 1)[1] for name in scores
    }  # behind the layer's number
    for group in set(kind.values()):
        names = [name for name in scores if kind[name] == group]
        share = torch.stack([torch.sigmoid(scores[name]).mean() for name in names]).detach()
        cut = (v * len(names) * share / share.sum()).clamp(max=1.0)
        densities |= dict(zip(names, cut, strict=True))
    return {name: densities[name] for name in scores}


def plain_mask(score, density):
    keep = torch.zeros(score.numel())
    keep[score.flatten().topk(int(density * score.numel())).indices] = 1
    return keep.view_as(score)


def plain_training(folder, batches, labels, method, start):
    """-> trajectory dict and final masks.

    HF's old AdamW: lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).
    """
    model = load_model(folder, WORDS).eval().requires_grad_(False)
    model.bert.forward = lambda *batch: Encoder.forward(model.bert, *batch[:3])  # no `tokens`
    frozen, scores = model.state_dict(), {n: s.clone().requires_grad_() for n, s in start.items()}
    m, v = ({n: torch.zeros_like(s) for n, s in start.items()} for _ in range(2))
    steps = []
    for t in range(TOTAL):
        rows = slice(8 * t, 8 * t + 8)
        density = FINAL + (1 - FINAL) * max(0.0, 1 - t / RAMP) ** 3
        penalty = 400 * (1 - (1 - t / TOTAL) ** 3)
        densities = plain_densities(method, scores, density)
        weights = {
            n: frozen[n] * (plain_mask(s.detach(), densities[n]) + s - s.detach())
            for n, s in scores.items()
        }
        ce = F.cross_entropy(
            functional_call(model, weights, tuple(b[rows] for b in batches)), labels[rows]
        )
        r = torch.stack([torch.sigmoid(s).mean() for s in scores.values()]).mean()
        grads = torch.autograd.grad(ce + penalty * r, list(scores.values()))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        for (name, s), g in zip(scores.items(), grads, strict=True):
            g = g * min(1.0, 1 / (norm + 1e-6))
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
            step = LR * (1 - t / TOTAL) * math.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            s.data -= step * m[name] / (v[name].sqrt() + 1e-8)
        steps.append(
            {"density": density, "penalty": penalty, "ce": ce.item(), "regularizer": r.item()}
        )
        if method == "smp-s":  # [layer][group], as the reference code's recording
            per_layer = [[d for n, d in densities.items() if f".layer.{i}." in n] for i in range(2)]
            steps[-1]["layer_density"] = [[float(d) for d in row] for row in per_layer]
    densities = plain_densities(method, scores, FINAL)
    masks = {n: plain_mask(s.detach(), densities[n]) for n, s in scores.items()}
    logits = functional_call(
        model, {n: frozen[n] * k for n, k in masks.items()}, tuple(b[:8] for b in batches)
    )
    recorded = {
        "total_steps": TOTAL,
        "prune_steps": RAMP,
        "final_density": FINAL,
        "final_penalty": 400.0,
        "lr": LR,
    }
    recorded |= {"clip_norm": 1.0, "batch": 8, "label_word_ids": WORDS, "steps": steps}
    return recorded | {"logits_end_first_batch": logits.tolist()}, masks


@pytest.fixture(scope="module")
def recorded_once(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("replay") / "recording")
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 26, (8 * TOTAL, 9), generator=g)
    mask = (torch.arange(9) < torch.randint(4, 10, (8 * TOTAL, 1), generator=g)).long()
    batches = [ids * mask, (torch.arange(9) > 4).long() * mask, mask]
    labels = (ids[:, 1] > 15).long()
    names = ("input_ids", "token_type_ids", "attention_mask", "labels")
    save_file(dict(zip(names, [*batches, labels], strict=True)), folder / "batches.safetensors")
    model = load_model(folder, WORDS).eval()
    _, logits = plain_bert(load_file(folder / "model.safetensors"), *(b[:8] for b in batches))
    save_file({"mlm_logits": logits.detach()}, folder / "dense_first_batch.safetensors")
    weights = {n: w for ws in model.prunable().values() for n, w in ws.items()}
    start = {n: 0.01 * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    save_file(start, folder / "scores_start.safetensors")
    for method in ("smp-l", "smp-s"):
        trajectory, masks = plain_training(folder, batches, labels, method, start)
        (folder / f"trajectory_{method}.json").write_text(json.dumps(trajectory))
        save_file(
            {n: k.byte() for n, k in masks.items()}, folder / f"mask_end_{method}.safetensors"
        )
    return folder


@pytest.fixture
def recording(recorded_once, tmp_path):
    """A copy of the recording of smp-l and smp-s."""
    return shutil.copytree(recorded_once, tmp_path / "recording")


def test_stacked_training_equals_the_plain_one(recording, capsys):
    status, found, beyond = replayed(recording, capsys)
    assert status == 0 and not beyond
    assert found["smp-l ce"] < 1e-4 and found["smp-l mask_end"] == 0
    assert all(isinstance(value, float) for value in found.values())
    assert {name.rsplit(" ", 1)[0] for name in found} == {
        "dense",
        "smp-l",
        "smp-s",
        replay.HANDED_ON,
    }


def test_what_rounding_leads_to_is_no_fault():
    """A recording may leave ours once our own runs, nudged by little, leave each other."""

    def losses(by, first):
        steps = [torch.tensor(0.7, dtype=torch.float64) for _ in range(TOTAL)]
        return {"ce": [loss + by * (step >= first) for step, loss in enumerate(steps)]}

    ours, theirs = losses(0, 0), losses(5e-3, first=6)
    assert replay.judge(ours, theirs, [ours] * 3) == ({"ce": pytest.approx(5e-3)}, ["ce"])
    nudged = [ours, losses(1e-3, first=5), ours]
    assert replay.judge(ours, theirs, nudged)[1] == []
    theirs["ce"][4] += 5e-3  # before that
    assert replay.judge(ours, theirs, nudged)[1] == ["ce"]


def nudge_step(folder, quantity, by=-2e-3):
    """Of the first step: later ones may differ by rounding alone, and then more is allowed."""
    path = folder / "trajectory_smp-s.json"
    trajectory = json.loads(path.read_text())
    place = trajectory["steps"][0]
    if quantity == "layer_density":
        place, quantity = place["layer_density"][1], 3
    place[quantity] += by
    path.write_text(json.dumps(trajectory))


RECORDED = ("density", "penalty", "ce", "regularizer", "layer_density")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantity", "nudge"),
    [(f"smp-s {q}", lambda folder, q=q: nudge_step(folder, q)) for q in RECORDED]
    + [("smp-s ce", lambda folder: nudge_step(folder, "ce", math.nan))]
    + [
        ("dense logits", lambda f: nudge_file(f, "dense_first_batch.safetensors", "mlm_logits")),
        # A whole matrix of twelve: more than any rounding explains.
        ("smp-s mask_end", lambda f: nudge_file(f, "mask_end_smp-s.safetensors", None, 256)),
    ],
)
def test_replay_notices_a_deviation(recording, capsys, quantity, nudge):
    (recording / "trajectory_smp-l.json").unlink()
    nudge(recording)
    status, _, beyond = replayed(recording, capsys)
    assert status == 1 and quantity in beyond
    assert beyond == {quantity}
