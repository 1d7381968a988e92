"""P-pruning: choose whole attention heads and intermediate neurons of a pretrained model to remove, before fine-tuning.

Units that do the same on a task's inputs are clustered, and of each cluster the strongest stays; labels are not read.
Two simpler choices stand beside it, to compare with. Sources: Wang et al., LREC-COLING 2024, "Pruning before
Fine-tuning", and its authors' code; where that scores other heads than it means to, what it means is done here.

    smaller, facts = prune(model, train, dev, args, device, units="clusters")
"""

import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from data import collate
from mask import METHODS, Method
from plumbing import parallel
from plumbing.progress import progress

INPUTS = 3000  # of the training set, at most
TOKENS = 200  # of these, drawn at random
BATCH = 64

# --- what units do -------------------------------------------------------------------------------------------


def modules(model):
    """{group: [the module of each layer whose weight is prunable]}."""
    groups = model.prunable().items()
    return {
        group: [model.get_submodule(name.removesuffix(".weight")) for name in names]
        for group, names in groups
    }


@torch.no_grad()
def activations(model, examples, device, seed):
    """What heads and neurons give on random tokens of random inputs, the same for all layers, without labels.

    -> for each layer [TOKENS, heads * D], the input of the attention's output projection, and [TOKENS, neurons], that
    of the second feed-forward layer; float32 on the CPU. Padding does not count.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(examples))[:INPUTS]
    lengths = np.array([len(examples.ids[row]) for row in rows])
    rows = rows[lengths.argsort(kind="stable")]
    lengths = np.sort(lengths)
    ends = lengths.cumsum()
    chosen = np.sort(
        rng.choice(ends[-1], min(TOKENS, ends[-1]), replace=False)
    )  # tokens, counted through
    owner = np.searchsorted(ends, chosen, side="right")  # the input of each
    place = chosen - (ends - lengths)[owner]  # and where it stands there
    needed = np.unique(owner)  # no other input need pass
    projections = [
        projection for group in ("attn_output", "output") for projection in modules(model)[group]
    ]
    parts = {projection: [] for projection in projections}

    def watch(module, inputs):  # as a batch passes: all of its inputs would take gigabytes
        parts[module].append(inputs[0].flatten(0, -2)[at].float().cpu())

    hooks = [projection.register_forward_pre_hook(watch) for projection in projections]
    model.eval().to(device)
    for start in progress(range(0, len(needed), BATCH), "looking at inputs"):
        batch = needed[start : start + BATCH]
        inputs, _ = collate(examples, rows[batch], device)
        here = np.isin(owner, batch)
        rows_here = (
            np.searchsorted(batch, owner[here]) * inputs.shape[2] + place[here]
        )  # of [B * S, units]
        at = torch.from_numpy(rows_here).to(device)
        model.states(*inputs)
    for hook in hooks:
        hook.remove()
    model.train().to("cpu")
    found = [torch.cat(part) for part in parts.values()]
    if not all(x.isfinite().all() for x in found):
        raise ValueError(
            "--model: its activations are not finite, so no clusters can be made of them"
        )
    layers = len(model.config.layers)
    return found[:layers], found[layers:]


def cosines(x):
    """[T, units] -> |cos| of each two over the tokens [units, units]."""
    x = x / x.norm(dim=0).clamp(min=1e-12)
    return (x.T @ x).abs().clamp(max=1.0)


def neuron_distances(x):
    """[T, neurons] -> 1 - |cos| [neurons, neurons]."""
    return 1 - cosines(x)


def head_distances(x, heads):
    """[T, heads * D] -> 1 - the mean |cos| of dimensions that were matched one to one [heads, heads]."""
    size = x.shape[1] // heads
    blocks = (
        cosines(x).view(heads, size, heads, size).transpose(1, 2)
    )  # [heads * D] * 2 -> [heads, heads, D, D]
    distances = torch.empty(heads, heads)
    for a in range(heads):
        for b in range(a, heads):
            distances[a, b] = distances[b, a] = 1 - matched(blocks[a, b].clone())
    return distances


def matched(similarity):
    """[D, D], used up -> mean of D values taken greedily: the largest, then its row and column do not count."""
    taken = []
    for _ in range(len(similarity)):
        at = int(similarity.argmax())
        row, column = divmod(at, len(similarity))
        taken.append(similarity[row, column].item())
        similarity[row], similarity[:, column] = -1, -1
    return sum(taken) / len(taken)


# --- clusters ------------------------------------------------------------------------------------------------


def merges(distances):
    """Complete-linkage clustering of units by their profiles, rows of distances [n, n] -> n - 1 (height, a, b).

    Two profiles are as far apart as their largest difference (Chebyshev). Follows chains of nearest neighbours: in time
    n^2 once the profiles are compared. Unit a's cluster joins unit b's; heights are not in order.
    """
    n = len(distances)
    apart = np.full((n, n), np.inf, dtype=np.float32)
    upper = np.triu_indices(n, 1)
    apart[upper] = torch.pdist(distances.float(), p=float("inf")).numpy()
    apart = np.minimum(apart, apart.T)
    alive = np.ones(n, dtype=bool)
    chain = []  # of clusters, each the nearest of the one before
    found = []
    for _ in range(n - 1):
        if not chain:
            chain = [int(alive.argmax())]
        while True:
            a = chain[-1]
            b = int(apart[a].argmin())
            if len(chain) > 1 and apart[a, chain[-2]] <= apart[a, b]:  # each is the other's nearest
                b = chain[-2]
                break
            chain.append(b)
        del chain[-2:]
        found.append((float(apart[a, b]), a, b))
        apart[b] = np.maximum(apart[a], apart[b])  # complete linkage: the farthest members decide
        apart[:, b] = apart[b]
        apart[a] = apart[:, a] = np.inf
        alive[a] = False
    return found


def clusters(n, found, threshold):
    """Units 0 to n - 1 and merges -> lists of the units that are together when merged up to a height."""
    together = {unit: [unit] for unit in range(n)}
    owner = list(range(n))
    for height, a, b in found:
        if height <= threshold and owner[a] != owner[b]:
            moved = together.pop(owner[a])
            together[owner[b]] += moved
            for unit in moved:
                owner[unit] = owner[b]
    return [sorted(units) for units in together.values()]


def lowest_threshold(layers, keep):
    """Merges of each layer -> the smallest height up to which merging leaves at most `keep` clusters in all."""
    heights = sorted(height for found in layers for height, _, _ in found)
    surplus = len(heights) + len(layers) - keep  # a layer of n units has n - 1 merges
    return heights[surplus - 1] if surplus > 0 else -1.0


def representatives(distances, strengths, keep):
    """Distances [n, n] and mean |activation| [n] of each layer -> units kept in each, about `keep` in all."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        layers = list(progress(pool.map(merges, distances), "clustering", total=len(distances)))
    threshold = lowest_threshold(layers, keep)
    kept = []
    for found, strength in zip(layers, strengths, strict=True):
        strongest = [
            max(units, key=strength.__getitem__)
            for units in clusters(len(strength), found, threshold)
        ]
        kept.append(torch.tensor(sorted(strongest)))
    return kept


# --- how much, and which -------------------------------------------------------------------------------------


def multiply_accumulates(config, tokens):
    """-> those of one head, those of one neuron, for an input of so many tokens."""
    width = config.hidden_size
    size = config.head_size
    return 4 * tokens * width * size + 2 * tokens**2 * size, 2 * tokens * width


def budget(config, tokens, sparsity, ffn_share):
    """How many heads and neurons may stay in all, so that a share of their multiply-accumulates goes.

    ffn_share: what the neurons lose for each that the heads lose. Raises ValueError, with what would be possible, when
    one of them cannot lose that much; every layer keeps a head and a neuron.
    """
    if 0 in (count for counts in config.layers for count in counts):
        raise ValueError(
            "--model: a layer of it has lost all its heads or neurons already; it takes --method finetune"
        )
    counts = np.array(config.layers).sum(0)  # heads, neurons
    costs = np.array(multiply_accumulates(config, tokens))
    whole = (counts * costs).sum()
    removed = sparsity * whole
    parts = np.array([removed / (1 + ffn_share), removed * ffn_share / (1 + ffn_share)])
    most = (counts - len(config.layers)) * costs
    if removed > most.sum():
        raise ValueError(
            f"--sparsity {sparsity:g}: no more than {most.sum() / whole:.3f} can go, a unit a layer stays"
        )
    if (parts > most).any():
        lowest = max(removed / most[0] - 1, 0.01) if most[0] else 2000.0  # more than the highest
        highest = min(most[1] / (removed - most[1]), 1000.0) if removed > most[1] else 1000.0
        lowest = math.ceil(100 * lowest) / 100
        highest = math.floor(100 * highest) / 100
        possible = (
            f"{lowest:g} to {highest:g} is"
            if lowest <= highest
            else "and no other is; lower --sparsity"
        )
        raise ValueError(
            f"--ffn-share {ffn_share:g} is not possible at --sparsity {sparsity:g}, {possible}"
        )
    return [int(kept) for kept in (counts * costs - parts) / costs + 1e-9]


def evenly(scores, keep):
    """Scores [n] of each layer -> the units with the highest ones in each, `keep` in all, the same share everywhere.

    One unit of each layer stays in any case; the share is that of the others. Rounded down; what is missing goes to the
    layers with the largest fractions.
    """
    others = np.array([len(s) - 1 for s in scores])
    wanted = 1 + others * (keep - len(scores)) / max(others.sum(), 1)
    counts = np.floor(wanted + 1e-9).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: keep - counts.sum()]] += 1
    return [
        s.topk(int(count)).indices.sort().values for s, count in zip(scores, counts, strict=True)
    ]


def choose(model, units, examples, keep, device, seed):
    """-> the heads and the neurons that stay in each layer, a list of tensors of indices each.

    units: "clusters"; or, the same share of each layer, "activation", the strongest, or "random". keep: how many heads
    and how many neurons in all. Raises ValueError when activations are not finite.
    """
    heads = [count for count, _ in model.config.layers]
    if units == "random":
        drawn = torch.Generator().manual_seed(seed)
        counts = zip(*model.config.layers, strict=True)
        strengths = [[torch.rand(n, generator=drawn) for n in part] for part in counts]
        return [evenly(strength, k) for strength, k in zip(strengths, keep, strict=True)]
    of_heads, of_neurons = activations(model, examples, device, seed)
    head_strengths = [
        x.abs().mean(0).view(n, -1).mean(1) for x, n in zip(of_heads, heads, strict=True)
    ]
    neuron_strengths = [x.abs().mean(0) for x in of_neurons]
    if units == "activation":
        return [evenly(head_strengths, keep[0]), evenly(neuron_strengths, keep[1])]
    head_apart = [head_distances(x, n) for x, n in zip(of_heads, heads, strict=True)]
    neuron_apart = [neuron_distances(x) for x in of_neurons]
    return [
        representatives(head_apart, head_strengths, keep[0]),
        representatives(neuron_apart, neuron_strengths, keep[1]),
    ]


def shrink(model, heads, neurons):
    """A new model with only these heads and neurons, a tensor of indices for each layer."""
    tensors = model.state_dict()
    names = {group: list(weights) for group, weights in model.prunable().items()}
    size = model.config.head_size
    for i, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        rows = (
            kept_heads[:, None] * size + torch.arange(size)
        ).flatten()  # [heads, size] -> [heads * size]
        for group, kept in {
            "query": rows,
            "key": rows,
            "value": rows,
            "intermediate": kept_neurons,
        }.items():
            weight = names[group][i]
            for name in (weight, weight.removesuffix("weight") + "bias"):
                tensors[name] = tensors[name][kept]
        for group, kept in {"attn_output": rows, "output": kept_neurons}.items():
            weight = names[group][i]
            tensors[weight] = tensors[weight][:, kept].contiguous()
    counts = {
        "heads_per_layer": tuple(map(len, heads)),
        "neurons_per_layer": tuple(map(len, neurons)),
    }
    return model.resized(replace(model.config, **counts), tensors)


def prune(model, train, dev, args, device, units):
    """Method.before: -> (a new model without the units that go, {what: value} for result.json).

    args.sparsity: the share of the multiply-accumulates of all heads and neurons that goes, for inputs as long as those
    of the dev sets; args.ffn_share: see budget. Raises ValueError as budget and choose do.
    """
    parallel.require_one_process(f"--method {args.method}")
    tokens = statistics.mean(len(ids) for examples in dev.values() for ids in examples.ids)
    keep = budget(model.config, tokens, args.sparsity, args.ffn_share)
    smaller = shrink(model, *choose(model, units, train, keep, device, args.seed))
    facts = facts_of(smaller, model, tokens)
    heads, neurons = np.array(facts["layers"]).sum(0)
    all_heads, all_neurons = np.array(facts["whole"]).sum(0)
    shares = f"{facts['multiply_accumulates']:.4f} of the multiply-accumulates, {facts['density']:.4f} of the weights"
    print(f"{heads} of {all_heads} heads and {neurons:,} of {all_neurons:,} neurons stay: {shares}")
    return smaller, facts


def facts_of(smaller, model, tokens):
    """What stays of a model; multiply-accumulates are those of heads and neurons alone."""
    costs = multiply_accumulates(model.config, tokens)
    after, before = (np.array(m.config.layers).sum(0) @ costs for m in (smaller, model))
    kept, weights = (
        sum(w.numel() for ws in m.prunable().values() for w in ws.values())
        for m in (smaller, model)
    )
    facts = {"layers": smaller.config.layers, "whole": model.config.layers, "tokens": tokens}
    return facts | {"multiply_accumulates": float(after / before), "density": kept / weights}


# ffn_share: multiply-accumulates that neurons lose for each that heads lose, see budget().
RECIPE = {"sparsity": 0.5, "weight_lr": None, "ffn_share": 5.0}
for name, units in (
    ("p-pruning", "clusters"),
    ("p-activation", "activation"),
    ("p-random", "random"),
):
    METHODS[name] = Method(
        None, trains=("weights",), recipe=RECIPE, before=partial(prune, units=units)
    )
