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
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data import collate
from mask import METHODS, Method, whole_counts
from plumbing import parallel
from plumbing.progress import progress

INPUTS = 3000  # drawn from the training set, at most
TOKENS = 200  # drawn from these inputs
BATCH = 64

# --- what units do --------------------------------------------------------------------------------


def modules(model):
    """{group: [module of each layer]}: the modules that hold the prunable weights."""
    by_group = {}
    for group, names in model.prunable().items():
        by_group[group] = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    return by_group


@contextmanager
def watched(model, device, watch):
    """Put the model on a device, without dropout. watch(module, inputs) sees what its units do.

    It is called before each module that reads units: the attention's output projection, which reads
    heads [..., heads * D], and the second feed-forward matrix, which reads neurons [..., neurons].
    Yields these modules, first those that read heads, layer by layer, then the others. At the end
    the model is back on the CPU, in training mode.
    """
    groups = modules(model)
    readers = groups["attn_output"] + groups["output"]
    hooks = [reader.register_forward_pre_hook(watch) for reader in readers]
    model.eval().to(device)
    try:
        yield readers
    finally:
        for hook in hooks:
            hook.remove()
        model.train().to("cpu")


def draw_inputs(examples, rng):
    """Draw INPUTS rows of the examples, or all if there are fewer -> row numbers [N].

    They are sorted by length, so that a batch needs little padding.
    """
    rows = rng.permutation(len(examples))[:INPUTS]
    return np.array(sorted(rows, key=lambda row: len(examples.ids[row])))


def draw_tokens(examples, seed, tokens=TOKENS):
    """Draw T tokens of random inputs, never padding.

    -> the inputs that contain them, as rows of examples [N], and for each token its input, a number
    below N [T], and its position there [T].
    """
    rng = np.random.default_rng(seed)
    rows = draw_inputs(examples, rng)
    lengths = np.array([len(examples.ids[row]) for row in rows])

    # Number the tokens of all inputs in a row, and draw from these numbers.
    ends = lengths.cumsum()  # the number after each input's last token
    total = ends[-1]
    drawn = rng.choice(total, min(tokens, total), replace=False)
    drawn.sort()
    owner = np.searchsorted(ends, drawn, side="right")  # the input of each token
    starts = ends - lengths
    position = drawn - starts[owner]

    # Leave out the inputs without a drawn token, and number the others anew.
    needed, owner = np.unique(owner, return_inverse=True)
    return rows[needed], owner, position


@torch.no_grad()
def activations(model, examples, device, seed, tokens=TOKENS):
    """The activations of heads and neurons on T random tokens, the same for all layers.

    -> per layer the input of the attention's output projection [T, heads * D], and per layer the
    input of the second feed-forward matrix [T, neurons], in float32 on the CPU. Raises ValueError
    if they are not finite.
    """
    rows, owner, position = draw_tokens(examples, seed, tokens)
    parts = defaultdict(list)  # {module: [its input at the drawn tokens of each batch]}

    def watch(module, inputs):
        # All tokens would take gigabytes. The loop below sets index anew for each batch.
        flat = inputs[0].flatten(0, -2)  # [B, S, units] -> [B * S, units]
        parts[module].append(flat[index].float().cpu())

    with watched(model, device, watch) as readers:
        for start in progress(range(0, len(rows), BATCH), "reading activations"):
            inputs, _ = collate(examples, rows[start : start + BATCH], device)  # [3, B, S]
            # Where the drawn tokens of this batch stand in [B * S].
            here = (owner >= start) & (owner < start + BATCH)
            index = (owner[here] - start) * inputs.shape[2] + position[here]
            index = torch.from_numpy(index).to(device)
            model.states(*inputs)

    checked = []
    for reader in readers:
        x = torch.cat(parts[reader])  # [T, units]
        if not x.isfinite().all():
            raise ValueError("--model: its activations are not finite, so they cannot be compared")
        checked.append(x)
    layers = len(model.config.layers)
    return checked[:layers], checked[layers:]


def fisher(model, examples, device, seed):
    """How much the loss would feel the removal of each unit -> per layer heads [n], neurons [n].

    A gate of 1 on a unit has the gradient g, summed over an input's tokens. Its Fisher information
    is the mean of g^2 over inputs. This returns sums, which rank alike.
    """
    rows = draw_inputs(examples, np.random.default_rng(seed))
    heads, neurons = zip(*model.config.layers, strict=True)
    counts = heads + neurons  # the units that each module reads
    sums = [0.0] * len(counts)
    seen = {}

    def watch(module, inputs):
        inputs[0].retain_grad()
        seen[module] = inputs[0]

    with watched(model, device, watch) as readers:
        for start in progress(range(0, len(rows), BATCH), "reading gradients"):
            inputs, labels = collate(examples, rows[start : start + BATCH], device)
            summed_loss(model(*inputs), labels).backward()
            for i, reader in enumerate(readers):
                # The gradient of a gate is the sum of x * dL/dx over what it multiplies.
                x = seen[reader]  # [B * S, units * D], where a neuron has D = 1
                products = x.detach() * x.grad  # detached, or the sums would keep every graph
                size = x.shape[-1] // counts[i]  # D
                products = products.view(len(labels), -1, counts[i], size)  # [B, S, units, D]
                gates = products.sum((1, 3))  # [B, units]
                sums[i] = sums[i] + gates.square().sum(0).cpu()
            model.zero_grad()
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
            distance = 1 - matched(blocks[a, b].clone())
            distances[a, b] = distance
            distances[b, a] = distance
    return distances


def matched(similarity):
    """Match the D dimensions of two heads one to one -> their mean similarity.

    similarity [D, D] is overwritten. The matching is greedy: each time, the most similar two of the
    dimensions that are left.
    """
    size = len(similarity)  # D
    taken = []
    for _ in range(size):
        index = int(similarity.argmax())  # in [D * D]
        row, column = divmod(index, size)
        taken.append(similarity[row, column].item())
        similarity[row] = -1  # less than any |cos|
        similarity[:, column] = -1
    return sum(taken) / size


# --- clusters -------------------------------------------------------------------------------------


def merges(distances):
    """Complete-linkage clustering of n units -> n - 1 merges (height, a, b), a dendrogram.

    distances [n, n]: a row is the profile of a unit. Two profiles are as far apart as their largest
    difference (Chebyshev). In a merge the cluster of unit a joins that of unit b. A merge comes
    after those that made its two clusters, but heights are not in order. The algorithm is the
    nearest-neighbour chain (Murtagh 1983), which takes n^2 steps.
    """
    n = len(distances)
    apart = np.full((n, n), np.inf, dtype=np.float32)  # stays infinite on the diagonal
    # pdist gives the pairs above the diagonal, row by row. Then mirror them.
    apart[np.triu_indices(n, 1)] = torch.pdist(distances.float(), p=math.inf).numpy()
    apart = np.minimum(apart, apart.T)

    alive = np.ones(n, dtype=bool)
    chain = []  # clusters, each the nearest neighbour of the one before
    dendrogram = []
    while len(dendrogram) < n - 1:
        a = chain.pop() if chain else int(alive.argmax())  # any cluster may begin
        nearest = int(apart[a].argmin())
        # In a tie the one before wins, or the chain might go round in circles.
        if not chain or apart[a, nearest] < apart[a, chain[-1]]:
            chain += [a, nearest]
            continue

        # a and the one before it are nearest to each other: merge a into b.
        b = chain.pop()
        dendrogram.append((float(apart[a, b]), a, b))
        farthest = np.maximum(apart[a], apart[b])  # of the members: complete linkage
        apart[b] = farthest
        apart[:, b] = farthest
        apart[a] = np.inf
        apart[:, a] = np.inf
        alive[a] = False
    return dendrogram


def clusters(n, dendrogram, threshold):
    """Apply the merges of units 0 to n - 1 up to a height -> the clusters, lists of units."""
    members = {unit: [unit] for unit in range(n)}
    for height, a, b in dendrogram:
        # What made these two clusters is not higher (complete linkage), so it is applied already.
        if height <= threshold:
            members[b] += members.pop(a)
    return [sorted(units) for units in members.values()]


def lowest_threshold(dendrograms, keep):
    """The lowest height up to which merging leaves at most `keep` clusters in all layers."""
    heights = []
    for dendrogram in dendrograms:
        heights += [height for height, _, _ in dendrogram]
    heights.sort()
    units = len(heights) + len(dendrograms)  # n units of a layer take n - 1 merges
    surplus = units - keep
    if surplus <= 0:
        return -1.0  # below every height
    return heights[surplus - 1]


def representatives(distances, strengths, keep):
    """Cluster the units of each layer -> the strongest of each cluster, about `keep` in all.

    distances: per layer [n, n]. strengths: per layer the mean |activation| of each unit [n].
    """
    dendrograms = [merges(layer) for layer in progress(distances, "clustering")]
    threshold = lowest_threshold(dendrograms, keep)
    kept = []
    for dendrogram, strength in zip(dendrograms, strengths, strict=True):
        strongest = []
        for units in clusters(len(strength), dendrogram, threshold):
            strongest.append(max(units, key=strength.__getitem__))
        kept.append(torch.tensor(sorted(strongest)))
    return kept


# --- how much, and which --------------------------------------------------------------------------


def multiply_accumulates(config, tokens):
    """-> the multiply-accumulates of one head and of one neuron, for an input of so many tokens."""
    width = config.hidden_size
    size = config.head_size
    # A head has four projections, scores and a mixture of values. A neuron has two vectors.
    head = 4 * tokens * width * size + 2 * tokens**2 * size
    neuron = 2 * tokens * width
    return head, neuron


def totals(config):
    """-> [heads, neurons] of all layers together, an array."""
    return np.array(config.layers).sum(0)


def budget(config, tokens, sparsity, ffn_share):
    """-> how many heads and how many neurons may stay in all.

    sparsity: the share of their multiply-accumulates to remove. ffn_share: how many the neurons
    lose for each one that the heads lose. Every layer keeps a head and a neuron. Raises ValueError
    that says what is possible.
    """
    if 0 in np.array(config.layers):
        raise ValueError(
            "--model: a layer of it has lost all its heads or neurons already; "
            "it takes --method finetune"
        )
    # All arrays are [2]: heads, neurons.
    counts = totals(config)
    costs = np.array(multiply_accumulates(config, tokens))
    whole = (counts * costs).sum()
    parts = sparsity * np.array([1, ffn_share]) / (1 + ffn_share)  # shares of the whole to remove
    removable = counts - len(config.layers)  # one unit per layer stays
    most = removable * costs / whole
    if (parts > most).any():
        raise ValueError(
            f"--sparsity {sparsity:g} with --ffn-share {ffn_share:g} takes {parts[0]:.3f} of the "
            f"multiply-accumulates from heads and {parts[1]:.3f} from neurons, but {most[0]:.3f} "
            f"and {most[1]:.3f} can go at most: every layer keeps one head and one neuron"
        )
    kept = (counts * costs - parts * whole) / costs
    return (kept + 1e-9).astype(int).tolist()  # 2.9999999 are three units


def evenly(scores, keep):
    """Keep about the same share of each layer -> the units with its highest scores, `keep` in all.

    scores: per layer [n]. Every layer keeps one unit. The share is that of its other units.
    """
    others = torch.tensor([len(s) - 1 for s in scores]).double()  # [L]
    counts = 1 + others * (keep - len(scores)) / others.sum().clamp(min=1)  # with fractions
    counts = whole_counts(counts[None], torch.tensor([[keep]]))[0]  # all layers are one group
    kept = []
    for s, count in zip(scores, counts.tolist(), strict=True):
        kept.append(s.topk(count).indices.sort().values)
    return kept


def highest_overall(scores, keep):
    """Keep the units with the highest scores of all layers, `keep` in all, one in each at least.

    scores: per layer [n].
    """
    sizes = [len(s) for s in scores]
    flat = torch.cat(scores)  # [units of all layers]
    for layer in flat.split(sizes):  # views
        layer[layer.argmax()] = math.inf  # stays in any case
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.topk(keep).indices] = True
    return [mask.nonzero().flatten() for mask in kept.split(sizes)]


def mean_activations(layers, counts):
    """Per layer x [T, n * D] and its number n of units -> per layer the mean |x| of a unit [n]."""
    means = []
    for x, n in zip(layers, counts, strict=True):
        by_unit = x.abs().mean(0).view(n, -1)  # [T, n * D] -> [n * D] -> [n, D]
        means.append(by_unit.mean(1))
    return means


def choose(model, units, examples, keep, device, seed):
    """-> which heads stay, and which neurons: one tensor of indices per layer each.

    units: "clusters", "fisher", "activation" (the strongest) or "random". The last two keep about
    the same share of each layer. keep: how many heads and how many neurons in all. Raises
    ValueError if activations are not finite.
    """
    keep_heads, keep_neurons = keep
    heads, neurons = zip(*model.config.layers, strict=True)  # how many each layer has
    if units == "fisher":
        head_scores, neuron_scores = fisher(model, examples, device, seed)
    elif units == "random":
        generator = torch.Generator().manual_seed(seed)
        head_scores = torch.rand(sum(heads), generator=generator).split(heads)
        neuron_scores = torch.rand(sum(neurons), generator=generator).split(neurons)
    else:
        of_heads, of_neurons = activations(model, examples, device, seed)
        head_scores = mean_activations(of_heads, heads)
        neuron_scores = mean_activations(of_neurons, neurons)

    if units == "clusters":
        head_apart = [head_distances(x, n) for x, n in zip(of_heads, heads, strict=True)]
        neuron_apart = [neuron_distances(x) for x in of_neurons]
        return [
            representatives(head_apart, head_scores, keep_heads),
            representatives(neuron_apart, neuron_scores, keep_neurons),
        ]
    select = highest_overall if units == "fisher" else evenly
    return [select(head_scores, keep_heads), select(neuron_scores, keep_neurons)]


def shrink(model, heads, neurons):
    """Make a new model that has only these heads and neurons.

    heads, neurons: per layer the indices of those that stay [n].
    """
    tensors = model.state_dict()
    names = {group: list(weights) for group, weights in model.prunable().items()}
    size = model.config.head_size  # D
    for i, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        rows = kept_heads[:, None] * size + torch.arange(size)  # [heads, D]
        rows = rows.flatten()  # [heads * D]

        # These matrices make the units: cut their rows, and their biases.
        makers = {"query": rows, "key": rows, "value": rows, "intermediate": kept_neurons}
        for group, kept in makers.items():
            weight = names[group][i]
            bias = weight.removesuffix("weight") + "bias"
            tensors[weight] = tensors[weight][kept]
            tensors[bias] = tensors[bias][kept]

        # These read the units: cut their columns.
        readers = {"attn_output": rows, "output": kept_neurons}
        for group, kept in readers.items():
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
    lengths = []
    for examples in dev.values():
        lengths += map(len, examples.ids)
    tokens = statistics.mean(lengths)

    keep = budget(model.config, tokens, args.sparsity, args.ffn_share)
    kept = choose(model, units, train, keep, device, args.seed)
    smaller = shrink(model, *kept)

    facts = facts_of(smaller, model, tokens)
    heads, neurons = totals(smaller.config)
    all_heads, all_neurons = totals(model.config)
    print(
        f"{heads} of {all_heads} heads and {neurons:,} of {all_neurons:,} neurons stay: "
        f"{facts['multiply_accumulates']:.4f} of the multiply-accumulates, "
        f"{facts['density']:.4f} of the weights"
    )
    return smaller, facts


def facts_of(smaller, model, tokens):
    """Describe the units that stay, for result.json. Only heads and neurons count."""
    costs = multiply_accumulates(model.config, tokens)
    after = totals(smaller.config) @ costs
    before = totals(model.config) @ costs
    return {
        "layers": smaller.config.layers,
        "whole": model.config.layers,
        "tokens": tokens,
        "multiply_accumulates": float(after / before),
        "density": prunable_weights(smaller) / prunable_weights(model),
    }


def prunable_weights(model):
    """How many weights the model's prunable matrices have."""
    total = 0
    for weights in model.prunable().values():
        total += sum(weight.numel() for weight in weights.values())
    return total


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
