"""P-pruning: remove whole attention heads and intermediate neurons before fine-tuning.

It clusters the units, heads or neurons, that do the same on a task's inputs, and keeps the
strongest of each cluster. It does not read labels. For comparison there are two simpler choices:
the strongest units of each layer, and random ones. A fourth choice reads labels: the units whose
removal would cost most, by Fisher information.

Sources: Wang et al., LREC-COLING 2024, "Pruning before Fine-tuning", and its authors' code. Their
code scores other heads than intended. This file does what they intended. Fisher scores: Kwon et
al., NeurIPS 2022 (arXiv 2204.09656), who take them after fine-tuning, rearrange the masks and fit
them to the outputs. Here they are taken before fine-tuning, and used as they are.

    smaller, facts = prune(model, train, dev, args, device, units="clusters")
"""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data import collate
from mask import METHODS, Method
from plumbing import parallel
from plumbing.progress import progress

INPUTS = 3000  # drawn from the training set, at most
TOKENS = 200  # drawn from these inputs
BATCH = 64

# --- what units do --------------------------------------------------------------------------------


def modules(model):
    """{group: [module of each layer]}: the modules that hold the prunable weights."""
    found = {}
    for group, names in model.prunable().items():
        found[group] = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    return found


def draw_tokens(examples, seed, tokens=TOKENS):
    """Draw T tokens of random inputs, never padding.

    -> the inputs that contain them, as rows of examples [N], and for each token its input, a number
    below N [T], and its position there [T].
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(examples))[:INPUTS]
    lengths = np.array([len(examples.ids[row]) for row in rows])
    order = lengths.argsort(kind="stable")  # so that a batch needs little padding
    rows = rows[order]
    lengths = lengths[order]

    # Number the tokens of all inputs in a row, and draw from these numbers.
    ends = lengths.cumsum()
    drawn = rng.choice(ends[-1], min(tokens, ends[-1]), replace=False)
    drawn.sort()
    owner = np.searchsorted(ends, drawn, side="right")  # the input of each token
    position = drawn - (ends - lengths)[owner]
    needed, owner = np.unique(owner, return_inverse=True)  # leave out inputs without a token
    return rows[needed], owner, position


@torch.no_grad()
def activations(model, examples, device, seed, tokens=TOKENS):
    """The activations of heads and neurons on T random tokens, the same for all layers.

    -> per layer the input of the attention's output projection [T, heads * D], and per layer the
    input of the second feed-forward matrix [T, neurons], in float32 on the CPU. Raises ValueError
    if they are not finite.
    """
    rows, owner, position = draw_tokens(examples, seed, tokens)
    groups = modules(model)
    projections = groups["attn_output"] + groups["output"]
    parts = {projection: [] for projection in projections}

    def watch(module, inputs):
        flat = inputs[0].flatten(0, -2)  # [B, S, units] -> [B * S, units]
        parts[module].append(flat[at].float().cpu())  # all tokens would take gigabytes

    hooks = [projection.register_forward_pre_hook(watch) for projection in projections]
    model.eval().to(device)
    for start in progress(range(0, len(rows), BATCH), "reading activations"):
        inputs, _ = collate(examples, rows[start : start + BATCH], device)
        here = (owner >= start) & (owner < start + BATCH)
        at = (owner[here] - start) * inputs.shape[2] + position[here]  # in [B * S]
        at = torch.from_numpy(at).to(device)
        model.states(*inputs)
    for hook in hooks:
        hook.remove()
    model.train().to("cpu")

    found = [torch.cat(part) for part in parts.values()]
    if not all(x.isfinite().all() for x in found):
        raise ValueError("--model: its activations are not finite, so they cannot be compared")
    layers = len(model.config.layers)
    return found[:layers], found[layers:]


def fisher(model, examples, device, seed):
    """How much the loss would feel the removal of each unit -> per layer heads [n], neurons [n].

    A gate of 1 on a unit has the gradient g, summed over an input's tokens. Its Fisher information
    is the mean of g^2 over inputs.
    """
    rows = np.random.default_rng(seed).permutation(len(examples))[:INPUTS]
    rows = sorted(rows, key=lambda row: len(examples.ids[row]))  # so that batches need less padding
    groups = modules(model)
    projections = groups["attn_output"] + groups["output"]
    heads, neurons = zip(*model.config.layers, strict=True)
    counts = heads + neurons  # the units of each projection
    seen = {}

    def watch(module, inputs):
        inputs[0].retain_grad()
        seen[module] = inputs[0]

    hooks = [projection.register_forward_pre_hook(watch) for projection in projections]
    model.eval().to(device)
    sums = [0.0] * len(projections)
    for start in progress(range(0, len(rows), BATCH), "reading gradients"):
        inputs, labels = collate(examples, rows[start : start + BATCH], device)
        summed_loss(model(*inputs), labels).backward()
        for i, projection in enumerate(projections):
            x = seen[projection]  # [B * S, units * D], where a neuron has D = 1
            by_unit = x.detach() * x.grad  # detached, or the sums would keep every graph alive
            by_unit = by_unit.view(len(labels), -1, counts[i], x.shape[-1] // counts[i])
            gates = by_unit.sum((1, 3))  # [B, units]
            sums[i] = sums[i] + gates.square().sum(0).cpu()
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    model.train().to("cpu")
    return sums[: len(heads)], sums[len(heads) :]


def summed_loss(logits, labels):
    """The loss of each input alone, summed: cross-entropy, or the squared error of a score."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), labels, reduction="sum")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


# --- how alike they are ---------------------------------------------------------------------------


def cosines(x):
    """[T, units] -> |cos| of every two units, over the tokens [units, units]."""
    x = x / x.norm(dim=0).clamp(min=1e-12)
    return (x.T @ x).abs().clamp(max=1.0)


def neuron_distances(x):
    """[T, neurons] -> 1 - |cos| [neurons, neurons]."""
    return 1 - cosines(x)


def head_distances(x, heads):
    """[T, heads * D] -> 1 - the mean |cos| of their matched dimensions [heads, heads]."""
    size = x.shape[1] // heads  # D
    # [heads * D, heads * D] -> [heads, heads, D, D]
    blocks = cosines(x).view(heads, size, heads, size).transpose(1, 2)
    distances = torch.empty(heads, heads)
    for a in range(heads):
        for b in range(a, heads):
            distances[a, b] = distances[b, a] = 1 - matched(blocks[a, b].clone())
    return distances


def matched(similarity):
    """Match the D dimensions of two heads one to one -> their mean similarity.

    similarity [D, D] is overwritten. The matching is greedy: each time, the most similar two of the
    dimensions that are left.
    """
    taken = []
    for _ in range(len(similarity)):
        at = int(similarity.argmax())
        row, column = divmod(at, len(similarity))
        taken.append(similarity[row, column].item())
        similarity[row] = -1  # less than any |cos|
        similarity[:, column] = -1
    return sum(taken) / len(taken)


# --- clusters -------------------------------------------------------------------------------------


def merges(distances):
    """Complete-linkage clustering of n units -> n - 1 merges (height, a, b).

    distances [n, n]: a row is the profile of a unit. Two profiles are as far apart as their largest
    difference (Chebyshev). In a merge the cluster of unit a joins that of unit b. Heights are not
    in order. The algorithm is the nearest-neighbour chain, which takes n^2 steps.
    """
    n = len(distances)
    apart = np.full((n, n), np.inf, dtype=np.float32)  # stays infinite on the diagonal
    # pdist gives the pairs above the diagonal, row by row.
    apart[np.triu_indices(n, 1)] = torch.pdist(distances.float(), p=math.inf).numpy()
    apart = np.minimum(apart, apart.T)

    alive = np.ones(n, dtype=bool)
    chain = []  # clusters, each the nearest neighbour of the one before
    found = []
    while len(found) < n - 1:
        if not chain:
            chain.append(int(alive.argmax()))  # any cluster will do
        # Go to the nearest neighbour, until two clusters are nearest to each other.
        a = chain[-1]
        b = int(apart[a].argmin())
        mutual = len(chain) > 1 and apart[a, chain[-2]] <= apart[a, b]
        if not mutual:
            chain.append(b)
            continue

        # Merge a into b. Between clusters, the farthest members count (complete linkage).
        b = chain[-2]
        del chain[-2:]
        found.append((float(apart[a, b]), a, b))
        apart[b] = apart[:, b] = np.maximum(apart[a], apart[b])
        apart[a] = apart[:, a] = np.inf
        alive[a] = False
    return found


def clusters(n, found, threshold):
    """Apply the merges of units 0 to n - 1 up to a height -> the clusters, lists of units."""
    together = {unit: [unit] for unit in range(n)}
    owner = list(range(n))  # the cluster of each unit
    for height, a, b in found:
        if height <= threshold and owner[a] != owner[b]:
            moved = together.pop(owner[a])
            together[owner[b]] += moved
            for unit in moved:
                owner[unit] = owner[b]
    return [sorted(units) for units in together.values()]


def lowest_threshold(layers, keep):
    """The lowest height up to which merging leaves at most `keep` clusters in all.

    layers: the merges of each layer.
    """
    heights = sorted(height for found in layers for height, _, _ in found)
    # n units take n - 1 merges, so there are len(heights) + len(layers) units in all.
    surplus = len(heights) + len(layers) - keep
    return heights[surplus - 1] if surplus > 0 else -1.0  # -1: below every height


def representatives(distances, strengths, keep):
    """Cluster the units of each layer -> the strongest of each cluster, about `keep` in all.

    distances: per layer [n, n]. strengths: per layer the mean |activation| of each unit [n].
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        layers = list(progress(pool.map(merges, distances), "clustering", total=len(distances)))
    threshold = lowest_threshold(layers, keep)
    kept = []
    for found, strength in zip(layers, strengths, strict=True):
        groups = clusters(len(strength), found, threshold)
        strongest = [max(units, key=strength.__getitem__) for units in groups]
        kept.append(torch.tensor(sorted(strongest)))
    return kept


# --- how much, and which --------------------------------------------------------------------------


def multiply_accumulates(config, tokens):
    """-> the multiply-accumulates of one head and of one neuron, for an input of so many tokens."""
    width = config.hidden_size
    size = config.head_size
    # A head has four projections, scores and a mixture of values. A neuron has two vectors.
    return 4 * tokens * width * size + 2 * tokens**2 * size, 2 * tokens * width


def budget(config, tokens, sparsity, ffn_share):
    """-> how many heads and how many neurons may stay in all.

    sparsity: the share of their multiply-accumulates that goes. ffn_share: how many the neurons
    lose for each one that the heads lose. Every layer keeps a head and a neuron. Raises ValueError
    that says what is possible.
    """
    layers = np.array(config.layers)  # [L, 2]: heads and neurons
    if (layers == 0).any():
        raise ValueError(
            "--model: a layer of it has lost all its heads or neurons already; "
            "it takes --method finetune"
        )
    counts = layers.sum(0)  # [2]
    costs = np.array(multiply_accumulates(config, tokens))  # [2]
    whole = (counts * costs).sum()
    removed = sparsity * whole
    most = (counts - len(layers)) * costs  # what can go, as one unit per layer stays
    if removed > most.sum():
        raise ValueError(
            f"--sparsity {sparsity:g}: no more than {most.sum() / whole:.3f} can go, "
            "because every layer keeps one head and one neuron"
        )
    parts = removed * np.array([1, ffn_share]) / (1 + ffn_share)  # what goes of each
    if (parts > most).any():
        raise ValueError(
            f"--ffn-share {ffn_share:g} is not possible at --sparsity {sparsity:g}, "
            f"{possible_shares(removed, *most)}"
        )
    kept = (counts * costs - parts) / costs + 1e-9  # 2.9999999 are three units
    return [int(n) for n in kept]


def possible_shares(removed, most_heads, most_neurons):
    """Say which --ffn-share would do, to remove so much when heads and neurons can lose so much."""
    lowest = 2000.0  # more than the highest, because without a head to lose no share will do
    if most_heads:
        lowest = max(removed / most_heads - 1, 0.01)
    highest = 1000.0
    if removed > most_neurons:
        highest = min(most_neurons / (removed - most_neurons), highest)
    # Two decimals, rounded into the range.
    lowest = math.ceil(100 * lowest) / 100
    highest = math.floor(100 * highest) / 100
    if lowest > highest:
        return "and no other is; lower --sparsity"
    return f"{lowest:g} to {highest:g} is"


def evenly(scores, keep):
    """Keep about the same share of each layer -> the units with its highest scores, `keep` in all.

    scores: per layer [n]. Every layer keeps one unit. The share is that of its other units.
    """
    others = np.array([len(s) - 1 for s in scores])
    wanted = 1 + others * (keep - len(scores)) / max(others.sum(), 1)  # with fractions
    counts = np.floor(wanted + 1e-9).astype(int)
    # What is missing after rounding down goes to the layers with the largest fractions.
    largest = np.argsort(counts - wanted, kind="stable")
    counts[largest[: keep - counts.sum()]] += 1
    best = [s.topk(int(count)).indices for s, count in zip(scores, counts, strict=True)]
    return [indices.sort().values for indices in best]


def highest_overall(scores, keep):
    """Keep the units with the highest scores of all layers, `keep` in all, one in each at least.

    scores: per layer [n].
    """
    scores = [s.clone() for s in scores]
    for s in scores:
        s[s.argmax()] = math.inf
    layer = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    unit = torch.cat([torch.arange(len(s)) for s in scores])
    best = torch.cat(scores).topk(keep).indices
    return [unit[best][layer[best] == i].sort().values for i in range(len(scores))]


def choose(model, units, examples, keep, device, seed):
    """-> which heads stay, and which neurons: one tensor of indices per layer each.

    units: "clusters", "fisher", "activation" (the strongest) or "random". The last two keep the
    same share of each layer. keep: how many heads and how many neurons in all. Raises ValueError if
    activations are not finite.
    """
    keep_heads, keep_neurons = keep
    heads, neurons = zip(*model.config.layers, strict=True)  # how many each layer has
    if units == "fisher":
        scores = fisher(model, examples, device, seed)
        return [highest_overall(s, kept) for s, kept in zip(scores, keep, strict=True)]
    if units == "random":
        drawn = torch.Generator().manual_seed(seed)
        head_strengths = [torch.rand(n, generator=drawn) for n in heads]
        neuron_strengths = [torch.rand(n, generator=drawn) for n in neurons]
    else:
        of_heads, of_neurons = activations(model, examples, device, seed)
        # [T, heads * D] -> [heads, D] -> [heads], and [T, neurons] -> [neurons].
        means = [x.abs().mean(0) for x in of_heads]
        head_strengths = [x.view(n, -1).mean(1) for x, n in zip(means, heads, strict=True)]
        neuron_strengths = [x.abs().mean(0) for x in of_neurons]
    if units != "clusters":
        return [evenly(head_strengths, keep_heads), evenly(neuron_strengths, keep_neurons)]

    head_apart = [head_distances(x, n) for x, n in zip(of_heads, heads, strict=True)]
    neuron_apart = [neuron_distances(x) for x in of_neurons]
    return [
        representatives(head_apart, head_strengths, keep_heads),
        representatives(neuron_apart, neuron_strengths, keep_neurons),
    ]


def shrink(model, heads, neurons):
    """Make a new model with only these heads and neurons, a tensor of indices per layer each."""
    tensors = model.state_dict()
    names = {group: list(weights) for group, weights in model.prunable().items()}
    size = model.config.head_size  # D
    for i, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        rows = kept_heads[:, None] * size + torch.arange(size)  # [heads, D]
        rows = rows.flatten()  # [heads * D]
        # These matrices make the units: cut their rows, and their biases.
        outputs = {"query": rows, "key": rows, "value": rows, "intermediate": kept_neurons}
        for group, kept in outputs.items():
            weight = names[group][i]
            for name in (weight, weight.removesuffix("weight") + "bias"):
                tensors[name] = tensors[name][kept]
        # These read the units: cut their columns.
        for group, kept in {"attn_output": rows, "output": kept_neurons}.items():
            weight = names[group][i]
            tensors[weight] = tensors[weight][:, kept].contiguous()
    config = replace(
        model.config,
        heads_per_layer=tuple(map(len, heads)),
        neurons_per_layer=tuple(map(len, neurons)),
    )
    return model.resized(config, tensors)


def prune(model, train, dev, args, device, units):
    """Method.before: remove units -> (a new model, {name: value} for result.json).

    args.sparsity and args.ffn_share: see budget. Inputs count with the mean length of the dev sets.
    Raises the ValueErrors of budget and choose.
    """
    parallel.require_one_process(f"--method {args.method}")
    tokens = statistics.mean(len(ids) for examples in dev.values() for ids in examples.ids)
    keep = budget(model.config, tokens, args.sparsity, args.ffn_share)
    smaller = shrink(model, *choose(model, units, train, keep, device, args.seed))
    facts = facts_of(smaller, model, tokens)
    heads, neurons = np.array(facts["layers"]).sum(0)
    all_heads, all_neurons = np.array(facts["whole"]).sum(0)
    print(
        f"{heads} of {all_heads} heads and {neurons:,} of {all_neurons:,} neurons stay: "
        f"{facts['multiply_accumulates']:.4f} of the multiply-accumulates, "
        f"{facts['density']:.4f} of the weights"
    )
    return smaller, facts


def facts_of(smaller, model, tokens):
    """Describe the units that stay, for result.json. Only heads and neurons count."""
    costs = multiply_accumulates(model.config, tokens)
    after = np.array(smaller.config.layers).sum(0) @ costs
    before = np.array(model.config.layers).sum(0) @ costs
    return {
        "layers": smaller.config.layers,
        "whole": model.config.layers,
        "tokens": tokens,
        "multiply_accumulates": float(after / before),
        "density": prunable_weights(smaller) / prunable_weights(model),
    }


def prunable_weights(model):
    """How many weights the model's prunable matrices have."""
    groups = model.prunable().values()
    return sum(weight.numel() for weights in groups for weight in weights.values())


# ffn_share: how many multiply-accumulates neurons lose for each one that heads lose, see budget().
RECIPE = {"sparsity": 0.5, "weight_lr": None, "ffn_share": 5.0}
UNITS = {
    "p-pruning": "clusters",
    "p-activation": "activation",
    "p-random": "random",
    "p-fisher": "fisher",  # reads labels
}
for name, units in UNITS.items():
    METHODS[name] = Method(
        None, trains=("weights",), recipe=RECIPE, before=partial(prune, units=units)
    )
