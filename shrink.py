"""Remove whole attention heads and intermediate neurons from a model, so that it really becomes smaller and faster.

What it is: cutting tensors, and finding what a mask made dead, which can go without changing what is computed. What it
is not: it does not choose what else could go; cluster.py does. Sources: none.

    heads, neurons = fold_dead(model)  # a model whose removed weights are zero
    smaller = shrink(model, heads, neurons)
"""

import json
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import PER_LAYER, Bert

LAYER = "bert.encoder.layer."


@torch.no_grad()
def fold_dead(model):
    """Indices of the heads and of the neurons of each layer that are alive -> (list of [heads], list of [neurons]).

    A neuron is dead if its incoming row or its outgoing column is zero, a head if its value rows or its output columns
    are. Without incoming weights it still adds a constant, which goes into the bias behind it (in place): a neuron
    gelu(its bias); a head the bias of its values, because attention weights sum to 1. (Dropout aside.)
    """
    heads, neurons = [], []
    for layer in model.bert.encoder["layer"]:
        inner, outer = layer.intermediate["dense"], layer.output.dense
        neurons.append(fold(inner.weight, F.gelu(inner.bias), outer, size=1))
        attention, outer = layer.attention["self"], layer.attention["output"].dense
        heads.append(fold(attention.value.weight, attention.value.bias, outer, attention.size))
    return heads, neurons


def fold(incoming, constant, outer, size):
    """Units of `size` rows of incoming [units * size, H] and columns of outer's weight -> indices of those alive.

    constant [units * size]: what the unit computes without incoming weights.
    """
    units = len(constant) // size
    no_input = ~incoming.unflatten(0, (units, size)).any(2).any(1)  # [units * size, H] -> [units, size, H] -> [units]
    no_output = ~outer.weight.unflatten(1, (units, size)).any(2).any(0)  # [H, units, size] -> [units]
    outer.bias += outer.weight @ (constant * no_input.repeat_interleave(size))
    return (~(no_input | no_output)).nonzero()[:, 0]


def shrink(model, heads, neurons):
    """A new Bert with only these heads and neurons, tensors of indices for each layer."""
    config, tensors = model.config, model.state_dict()
    size = config.head_size
    for i, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        rows = (kept_heads[:, None] * size + torch.arange(size)).flatten()  # [heads, size] -> [heads * size]
        for name in ("attention.self.query", "attention.self.key", "attention.self.value"):
            keep(tensors, f"{LAYER}{i}.{name}", rows)
        keep(tensors, f"{LAYER}{i}.intermediate.dense", kept_neurons)
        for name, columns in (("attention.output.dense", rows), ("output.dense", kept_neurons)):
            tensors[f"{LAYER}{i}.{name}.weight"] = tensors[f"{LAYER}{i}.{name}.weight"][:, columns].contiguous()
    counts = {"heads_per_layer": tuple(map(len, heads)), "neurons_per_layer": tuple(map(len, neurons))}
    smaller = Bert.of(replace(config, **counts), model.words.tolist(), tensors)
    smaller.every_token = model.every_token
    return smaller.train(model.training)


def config_json(folder, config):
    """config.json of a model folder, with the counts of a shrunk model if it is one -> bytes."""
    stored = (folder / "config.json").read_bytes()
    counts = {name: getattr(config, name) for name in PER_LAYER if getattr(config, name)}
    return (json.dumps(json.loads(stored) | counts, indent=1) + "\n").encode() if counts else stored


def keep(tensors, name, rows):
    """Only these rows of a linear layer's weight and bias."""
    for part in ("weight", "bias"):
        tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][rows]
