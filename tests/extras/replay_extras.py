"""The parts of tests/replay.py that need extras/: recorded choices of P-pruning, and a GPT-2."""

import json
import math

import torch
from safetensors.torch import load_file

from eval import evaluate
from extras import pprune
from extras.gpt2 import load_gpt2
from extras.lm import Blocks
from model import Config
from plumbing.checkpoints import read_model


def replay_choice(tensors, expected, kind, costs):
    """Of "head"s or "neuron"s -> {quantity: largest deviation}."""
    labels, distances = expected[f"{kind}_clusters"], []
    activations = [tensors[f"{kind}_activations.{layer}"] for layer in range(len(labels))]
    for x, of_units in zip(activations, labels, strict=True):
        distances.append(
            pprune.head_distances(x, len(of_units))
            if kind == "head"
            else pprune.neuron_distances(x)
        )
    gaps = [
        (d - tensors[f"{kind}_distance.{layer}"]).abs().max().item()
        for layer, d in enumerate(distances)
    ]
    target, cost = (
        expected["target_attention_macs" if kind == "head" else "target_ffn_macs"],
        costs[kind == "neuron"],
    )
    keep, merges = int(target / cost), [pprune.merges(d) for d in distances]
    threshold = pprune.lowest_threshold(merges, keep)
    differing = 0
    for found, numbers in zip(merges, labels, strict=True):
        groups = sorted([i for i, n in enumerate(numbers) if n == label] for label in set(numbers))
        differing += groups != sorted(pprune.clusters(len(numbers), found, threshold))
    strengths = [
        x.abs().mean(0).view(len(n), -1).mean(1) for x, n in zip(activations, labels, strict=True)
    ]
    kept = [units.tolist() for units in pprune.representatives(distances, strengths, keep)]
    otherwise = sum(a != b for a, b in zip(kept, expected[f"kept_{kind}s"], strict=True))
    return {
        "distance": max(gaps), "budget": abs(cost - expected[f"macs_per_{kind}"]),
        "threshold": abs(threshold - expected[f"{kind}_threshold"]),
        "layers_clustered_otherwise": differing, "layers_kept_otherwise": otherwise,
    }  # fmt: skip


def replay_pprune(folder):
    tensors, expected = (
        load_file(folder / "activations.safetensors"),
        json.loads((folder / "expected.json").read_text()),
    )
    c = expected["config"]
    config = Config(1, c["d_emb"], c["layer_num"], c["head_num"], c["d_ffn"], 1, 1)
    tokens = expected["seq_len"]
    costs = pprune.multiply_accumulates(config, tokens)
    worst = {kind: replay_choice(tensors, expected, kind, costs) for kind in ("head", "neuron")}
    keep = pprune.budget(
        config, tokens, 1 - expected["retained_ratio"], expected["ffn_to_attention"]
    )
    wanted = [
        int(expected[f"target_{part}_macs"] / expected[f"macs_per_{kind}"])
        for part, kind in (("attention", "head"), ("ffn", "neuron"))
    ]
    return worst | {"split": {"budget": float(keep != wanted)}}


def replay_gpt2(folder):
    """-> {quantity: largest deviation}.

    The losses are those of eval.py's perplexities, of each row and of all.
    """
    model = load_gpt2(*read_model(folder)).eval()
    recorded = load_file(folder / "dense_first_batch.safetensors")
    expected = json.loads((folder / "expected.json").read_text())
    seen = {}

    def watch(name):
        return lambda module, inputs: seen.update({name: inputs[0]})

    for group, units in (("attn_output", "heads"), ("output", "neurons")):
        for layer, module in enumerate(pprune.modules(model)[group]):
            module.register_forward_pre_hook(watch(f"{units}.{layer}"))
    ids = recorded["input_ids"]
    with torch.inference_mode():
        found = {"logits": (model(ids) - recorded["logits"]).abs().max().item()}
    found["inputs"] = max((seen[name] - recorded[name]).abs().max().item() for name in seen)

    rows = [ids[i : i + 1] for i in range(len(ids))]
    losses = dict(
        zip(("all", *range(len(rows))), (expected["loss"], *expected["loss_of_rows"]), strict=True)
    )
    perplexities = {
        name: perplexity(model, ids if name == "all" else rows[name]) for name in losses
    }
    found["loss"] = max(abs(math.log(perplexities[name]) - losses[name]) for name in losses)
    return found


def perplexity(model, ids):
    blocks = Blocks.of(ids.numpy(), tokens_per_word=1.0)
    return evaluate(model, {}, {"rows": blocks}, (), "cpu")["perplexity"]
