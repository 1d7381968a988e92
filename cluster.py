"""P-pruning: choose whole attention heads and intermediate neurons of a pretrained model to remove, before fine-tuning.

What it is: units that do the same on a task's inputs are clustered, and of each cluster one stays; and two simpler
choices to compare with. What it is not: it trains nothing, uses no labels, and cutting is shrink.py's. Sources: Wang et
al., LREC-COLING 2024, "Pruning before Fine-tuning", and its authors' code; where that scores other heads than it means
to, what it means is done here.

    smaller, facts = prune(model, "clusters", train, tokens=25.0, sparsity=0.4, ffn_share=5.0, device=device, seed=0)
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

import data
from shrink import shrink

INPUTS, TOKENS, BATCH = 3000, 200, 64

# --- what units do -------------------------------------------------------------------------------------------


@torch.no_grad()
def activations(model, examples, device, seed):
    """What heads and neurons give on random tokens of random inputs, the same for all layers, without labels.

    -> for each layer [TOKENS, heads * D], the input of the attention's output projection, and [TOKENS, neurons], that
    of the second feed-forward layer; float32 on the CPU. Padding does not count.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(examples))[:INPUTS]
    lengths = np.array([len(examples.ids[row]) for row in rows])
    rows, lengths = rows[lengths.argsort(kind="stable")], np.sort(lengths)
    chosen = np.sort(rng.choice(lengths.sum(), min(TOKENS, lengths.sum()), replace=False))  # tokens, counted through
    layers = model.bert.encoder["layer"]
    outer = [layer.attention["output"].dense for layer in layers] + [layer.output.dense for layer in layers]
    seen, found = {}, [[] for _ in outer]
    watch = lambda n: lambda module, inputs: seen.update({n: inputs[0]})  # noqa: E731
    hooks = [linear.register_forward_pre_hook(watch(n)) for n, linear in enumerate(outer)]
    model.eval().to(device)
    for start in tqdm(range(0, len(rows), BATCH), "looking at inputs", leave=False):
        inputs, _ = data.collate(examples, rows[start : start + BATCH], device)
        first, count = lengths[:start].sum(), lengths[start : start + BATCH].sum()
        here = chosen[(chosen >= first) & (chosen < first + count)] - first
        if len(here):
            model.bert(*inputs)
            real = inputs[2].flatten().nonzero()[:, 0]  # [B, S] -> rows of [B * S, units] that are no padding
            at = real[torch.from_numpy(here).to(device)]
            for n, parts in enumerate(found):
                parts.append(seen[n][at].float().cpu())
    for hook in hooks:
        hook.remove()
    model.train().to("cpu")
    found = [torch.cat(parts) for parts in found]
    if not all(x.isfinite().all() for x in found):
        raise ValueError("--model: its activations are not finite, so no clusters can be made of them")
    return found[: len(layers)], found[len(layers) :]


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
    blocks = cosines(x).view(heads, size, heads, size).transpose(1, 2)  # [heads * D] * 2 -> [heads, heads, D, D]
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
    chain, found, alive = [], [], np.ones(n, dtype=bool)
    for _ in range(n - 1):
        if not chain:
            chain = [int(alive.argmax())]
        while True:
            a, b = chain[-1], int(apart[chain[-1]].argmin())
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
        layers = list(tqdm(pool.map(merges, distances), "clustering", len(distances), leave=False))
    threshold = lowest_threshold(layers, keep)
    kept = []
    for found, strength in zip(layers, strengths, strict=True):
        strongest = [max(units, key=strength.__getitem__) for units in clusters(len(strength), found, threshold)]
        kept.append(torch.tensor(sorted(strongest)))
    return kept


# --- how much, and which -------------------------------------------------------------------------------------


def multiply_accumulates(config, tokens):
    """-> those of one head, those of one neuron, for an input of so many tokens."""
    width, size = config.hidden_size, config.head_size
    return 4 * tokens * width * size + 2 * tokens**2 * size, 2 * tokens * width


def facts_of(smaller, model, tokens):
    """What stays of a model, for result.json; multiply-accumulates are those of heads and neurons alone."""
    costs = multiply_accumulates(model.config, tokens)
    macs = [sum(h * costs[0] + n * costs[1] for h, n in m.config.layers) for m in (smaller, model)]
    weights = [sum(w.numel() for ws in m.prunable().values() for w in ws.values()) for m in (smaller, model)]
    facts = {"layers": smaller.config.layers, "whole": model.config.layers, "tokens": tokens}
    return facts | {"multiply_accumulates": macs[0] / macs[1], "density": weights[0] / weights[1]}


def describe(facts):
    """facts_of as a line."""
    (heads, neurons), (all_heads, all_neurons) = (map(sum, zip(*facts[k], strict=True)) for k in ("layers", "whole"))
    shares = f"{facts['multiply_accumulates']:.4f} of the multiply-accumulates, {facts['density']:.4f} of the weights"
    return f"{heads} of {all_heads} heads and {neurons:,} of {all_neurons:,} neurons stay: {shares}"


def budget(config, tokens, sparsity, ffn_share):
    """How many heads and neurons may stay in all, so that a share of their multiply-accumulates goes.

    ffn_share: what the neurons lose for each that the heads lose. Raises ValueError, with what would be possible, when
    one of them cannot lose that much; every layer keeps a head and a neuron.
    """
    if 0 in (count for counts in config.layers for count in counts):
        raise ValueError("--model: a layer of it has lost all its heads or neurons already; it takes --method finetune")
    counts, costs = [sum(part) for part in zip(*config.layers, strict=True)], multiply_accumulates(config, tokens)
    whole = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    removed = sparsity * whole
    parts = [removed / (1 + ffn_share), removed * ffn_share / (1 + ffn_share)]
    most = [(count - len(config.layers)) * cost for count, cost in zip(counts, costs, strict=True)]
    if removed > sum(most):
        raise ValueError(f"--sparsity {sparsity:g}: no more than {sum(most) / whole:.3f} can go, a unit a layer stays")
    if any(part > limit for part, limit in zip(parts, most, strict=True)):
        lowest = max(removed / most[0] - 1, 0.01) if most[0] else 2000.0  # more than the highest
        highest = min(most[1] / (removed - most[1]), 1000.0) if removed > most[1] else 1000.0
        lowest, highest = math.ceil(100 * lowest) / 100, math.floor(100 * highest) / 100
        possible = f"{lowest:g} to {highest:g} is" if lowest <= highest else "and no other is; lower --sparsity"
        raise ValueError(f"--ffn-share {ffn_share:g} is not possible at --sparsity {sparsity:g}, {possible}")
    return [int((count * cost - part) / cost + 1e-9) for count, cost, part in zip(counts, costs, parts, strict=True)]


def evenly(scores, keep):
    """Scores [n] of each layer -> the units with the highest ones in each, `keep` in all, the same share everywhere.

    One unit of each layer stays in any case; the share is that of the others. Rounded down; what is missing goes to the
    layers with the largest fractions.
    """
    others = np.array([len(s) - 1 for s in scores])
    wanted = 1 + others * (keep - len(scores)) / max(others.sum(), 1)
    counts = np.floor(wanted + 1e-9).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: keep - counts.sum()]] += 1
    return [s.topk(int(count)).indices.sort().values for s, count in zip(scores, counts, strict=True)]


def prune(model, units, examples, tokens, sparsity, ffn_share, device, seed):
    """-> (a new Bert with the heads and neurons that are chosen by `units`; what stays, see facts_of).

    units: "clusters"; or, the same share of each layer, "activation", the strongest, or "random". examples: those of
    training, whose labels are not read; tokens: mean length of an input; sparsity: share of the multiply-accumulates of
    all heads and neurons that goes. Raises ValueError as budget does, and when activations are not finite.
    """
    config = model.config
    keep = budget(config, tokens, sparsity, ffn_share)
    if units == "random":
        drawn = torch.Generator().manual_seed(seed)
        counts = zip(*config.layers, strict=True)
        strengths = [[torch.rand(n, generator=drawn) for n in part] for part in counts]
    else:
        of_heads, of_neurons = activations(model, examples, device, seed)
        heads = [n for n, _ in config.layers]
        strengths = [[x.abs().mean(0).view(n, -1).mean(1) for x, n in zip(of_heads, heads, strict=True)]]
        strengths.append([x.abs().mean(0) for x in of_neurons])
    if units == "clusters":
        distances = [[head_distances(x, n) for x, n in zip(of_heads, heads, strict=True)]]
        distances.append([neuron_distances(x) for x in of_neurons])
        chosen = [representatives(d, s, k) for d, s, k in zip(distances, strengths, keep, strict=True)]
    else:
        chosen = [evenly(s, k) for s, k in zip(strengths, keep, strict=True)]
    smaller = shrink(model, *chosen)
    return smaller, facts_of(smaller, model, tokens)
