"""Replay recorded numbers of the reference code, and print how far ours are from them.

    python tests/replay.py FOLDER

FOLDER holds one of three recordings:

1. A tiny BERT or RoBERTa (config.json, model.safetensors), dense_first_batch.safetensors, and for
   training batches.safetensors and scores_start.safetensors. Each method has its
   trajectory_METHOD.json and mask_end_METHOD.safetensors.
2. Choices of P-pruning: activations.safetensors (head_activations.LAYER [tokens, heads * D],
   neuron_activations.LAYER, and the distances between them) and expected.json (budget, thresholds,
   clusters, kept units).
3. A tiny GPT-2 (config.json, model.safetensors), expected.json (loss, loss_of_rows) and
   dense_first_batch.safetensors (input_ids, logits, and the inputs of every c_proj, heads.LAYER and
   neurons.LAYER).

The second and the third kind need extras/; tests/extras/replay_extras.py replays them.

It prints one flat JSON line, the largest deviation of each quantity, and names what is beyond its
bound. The exit status is 1 if anything is.

A trajectory may leave the recorded one by rounding alone: a score just above or just below the cut
sends all that follows another way. So each method is replayed again with weights nudged by a few
roundings. At each step, ten times of what our own runs have differed by until then is allowed. A
fault differs from the recording before they do.

The recording cuts layer densities above 1 (it keeps 0.9999 of a layer at step 0, where the target
is 1). This project hands the excess on. So smp-s is replayed twice. With the cut in place of our
rule, everything must agree. Without it, a few more weights in the first step lead to another,
equally good mask.
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent.parent))
import mask
from data import Part
from mask import METHODS, density_at, penalty_at
from model import Encoder, load_model
from plumbing.checkpoints import read_model
from plumbing.cli import one_line_errors
from plumbing.files import read_json
from train import Learner, make_forward_backward, make_optimizer, set_rates, train_step

BOUNDS = {
    "logits": 1e-4, "inputs": 1e-4, "loss": 1e-5,
    "density": 1e-6, "penalty": 1e-6, "ce": 1e-3, "regularizer": 1e-3, "layer_density": 1e-3,
    "mask_end": 1e-3, "logits_end": 1e-3,
    "distance": 1e-4, "budget": 0, "threshold": 1e-3,
    "layers_clustered_otherwise": 0, "layers_kept_otherwise": 0,
}  # fmt: skip
HANDED_ON = "smp-s, excess handed on"
NUDGE = 1e-6  # relative
MARGIN = 10
LARGEST_SHARE = 0.05  # of a mask that rounding explains


def cut_densities(importance, density):
    """The recording's rule in place of mask.proportional_densities."""
    return (density * importance.shape[1] * importance / importance.sum(1, keepdim=True)).clamp(
        max=1.0
    )


def replay_dense(folder, batches):
    model = load_model(*read_model(folder), words=[0]).eval()
    expected = load_file(folder / "dense_first_batch.safetensors")["mlm_logits"]
    batch = [b[: len(expected)] for b in batches]
    with torch.inference_mode():
        gap = model.word_logits(model.bert(*batch)) - expected
    # Not at padding: RoBERTa's authors give it a position of its own, which no other token sees.
    return gap[batch[2].bool()].abs().max().item()


def smp_s(densities):
    """mask.smp_s with another rule: (importance [G, L], density) -> densities [G, L]."""

    def how_many(importance, sizes, density, scores, exact):
        counts = densities(importance, density) * sizes
        if exact:
            return mask.whole_counts(counts, (density * sizes * importance.shape[1]).long())
        return counts.long()

    return how_many


def prepare(folder, recorded, method, nudge):
    """-> the model and its Learner as the recording began, but for the nudge, see replay_method."""
    model = (
        load_model(*read_model(folder), words=recorded["label_word_ids"])
        .eval()
        .requires_grad_(False)
    )
    if nudge is not None:
        torch.manual_seed(nudge)
        for p in model.parameters():
            p.mul_(1 + NUDGE * torch.randn_like(p))
    # All tokens of the last layer, as recorded. Its gradients of 1e-8 depend on the order of
    # summation, and Adam's first step makes whole steps of them. So another order leads to another
    # path within 20 steps.
    model.bert.forward = lambda *batch: Encoder.forward(model.bert, *batch[:3])  # no `tokens`
    learner = Learner(model, method, torch.float32)
    start = load_file(folder / "scores_start.safetensors")
    for group, scores in learner.masks.scores.items():
        scores.data.copy_(torch.stack([start[name] for name in learner.masks.names[group]]))
    return model, learner


def replay_method(folder, batches, labels, method, densities=cut_densities, nudge=None):
    """Train as the recording did, without dropout and with batches in order.

    -> ours and theirs {quantity: [values of each step]}.

    densities: the rule of smp-s, see smp_s. nudge: the seed of noise of a few roundings on all
    weights.
    """
    recorded = json.loads((folder / f"trajectory_{method}.json").read_text())
    total, ramp, final = recorded["total_steps"], recorded["prune_steps"], recorded["final_density"]
    row = METHODS[method]
    if method == "smp-s":
        row = replace(row, how_many=smp_s(densities))
    model, learner = prepare(folder, recorded, row, nudge)
    masks = learner.masks
    adam = make_optimizer(learner, recorded["lr"], None)
    forward_backward = make_forward_backward(model, learner)
    ours, theirs = defaultdict(list), defaultdict(list)

    def note(quantity, found, expected):
        ours[quantity].append(torch.as_tensor(found, dtype=torch.float64))
        theirs[quantity].append(torch.as_tensor(expected, dtype=torch.float64))

    for t, expected in enumerate(recorded["steps"]):
        density, penalty = (
            density_at(t, ramp, final),
            penalty_at(t, total, recorded["final_penalty"]),
        )
        note("density", density, expected["density"])
        note("penalty", penalty, expected["penalty"])
        if "layer_density" in expected:  # recorded before the cut at 1, as [layer][group]
            layers = densities(mask.mean_sigmoid(masks.scores), density).T  # [G, L] -> [L, G]
            note(
                "layer_density",
                layers.detach(),
                torch.tensor(expected["layer_density"]).clamp(max=1.0),
            )
        set_rates(adam, t, total)
        rows = slice(t * recorded["batch"], (t + 1) * recorded["batch"])
        parts = [Part(torch.stack([b[rows] for b in batches]), labels[rows])]
        ce, regularizer = train_step(
            forward_backward,
            adam,
            parts,
            torch.tensor(density, dtype=torch.float64),
            torch.tensor(penalty),
        )
        note("ce", ce, expected["ce"])
        note("regularizer", regularizer, expected["regularizer"])

    # The recording rounds each count down; our exact masks hand out the remainder as well.
    chosen, expected = masks.choose(final), load_file(folder / f"mask_end_{method}.safetensors")
    note(
        "mask_end",
        *(torch.cat([m[name].flatten().bool() for name in expected]) for m in (chosen, expected)),
    )
    with torch.inference_mode():
        logits = functional_call(model, masks(final)[0], tuple(b[:8] for b in batches))
    note("logits_end", logits, recorded["logits_end_first_batch"])
    return ours, theirs


def gaps(quantity, a, b):
    """Values of each step -> [steps]: largest differences, or the share of a mask that differs."""
    differences = [(x - y).abs() for x, y in zip(a[quantity], b[quantity], strict=True)]
    return torch.stack([d.mean() if quantity == "mask_end" else d.max() for d in differences])


def judge(ours, theirs, nudged):
    """-> ({quantity: largest deviation}, names of those that no rounding explains).

    nudged: what further runs of ours found instead, after a nudge.
    """
    found = {quantity: gaps(quantity, ours, theirs) for quantity in ours}
    beyond = []
    for quantity, gap in found.items():
        by_rounding = torch.stack([gaps(quantity, ours, other) for other in nudged]).amax(
            0
        )  # [steps]
        allowed = (MARGIN * by_rounding.cummax(0).values).clamp(min=BOUNDS[quantity])
        if quantity == "mask_end":
            allowed = allowed.clamp(max=LARGEST_SHARE)
        if not (gap <= allowed).all():  # nan is not either
            beyond.append(quantity)
    return {quantity: gap.max().item() for quantity, gap in found.items()}, beyond


def replay_extras(folder, gpt2):
    """A recorded GPT-2, or choices of P-pruning. Their replay can be deleted with extras/."""
    sys.path.append(str(Path(__file__).parent / "extras"))
    import replay_extras

    if gpt2:
        found = replay_extras.replay_gpt2(folder)
        return found, [name for name, gap in found.items() if not gap <= BOUNDS[name]]

    found = {}
    for part, deviations in replay_extras.replay_pprune(folder).items():
        found |= {f"{part} {name}": gap for name, gap in deviations.items()}
    return found, [name for name, gap in found.items() if gap > BOUNDS[name.split()[1]]]


def replay_all(folder):
    """-> ({quantity: largest deviation}, names of those out of bounds)."""
    config = folder / "config.json"
    gpt2 = config.exists() and read_json(config).get("model_type") == "gpt2"
    if gpt2 or (folder / "activations.safetensors").exists():
        return replay_extras(folder, gpt2)

    path = folder / "batches.safetensors"
    stored = load_file(path if path.exists() else folder / "dense_first_batch.safetensors")
    types = stored.get("token_type_ids", torch.zeros_like(stored["input_ids"]))
    batches = [stored["input_ids"], types, stored.get("attention_mask", torch.ones_like(types))]
    found = {"dense logits": replay_dense(folder, batches)}
    beyond = [name for name, gap in found.items() if gap > BOUNDS["logits"]]
    for path in sorted(folder.glob("trajectory_*.json")):
        method = path.stem.removeprefix("trajectory_")
        recording = (folder, batches, stored["labels"], method)
        nudged = [replay_method(*recording, nudge=seed)[0] for seed in range(3)]
        deviations, out = judge(*replay_method(*recording), nudged)
        found |= {f"{method} {name}": gap for name, gap in deviations.items()}
        beyond += [f"{method} {name}" for name in out]
        if method == "smp-s":
            # To be looked at: another rule leads to another mask.
            ours, theirs = replay_method(*recording, densities=mask.proportional_densities)
            for name in ours:
                found[f"{HANDED_ON} {name}"] = gaps(name, ours, theirs).max().item()
    return found, beyond


@one_line_errors()
def main(argv):
    folder = Path(argv[0]) if len(argv) == 1 else None
    kinds = ("dense_first_batch.safetensors", "activations.safetensors")
    if folder is None or not any((folder / kind).exists() for kind in kinds):
        raise SystemExit(__doc__)
    found, beyond = replay_all(folder)
    print(json.dumps(found))
    for name in beyond:
        print(f"beyond its bound: {name}", file=sys.stderr)
    sys.exit(int(bool(beyond)))


if __name__ == "__main__":
    main(sys.argv[1:])
