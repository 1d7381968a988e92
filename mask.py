"""Static Model Pruning: learn which frozen weights to switch off, and nothing else.

What it is: scores, masking functions, schedules, the regularizer, and mask files (one bit a weight).
What it is not: it knows no BERT and no loop; it is given groups of weights and gives masked ones back.
Sources: Jiang et al., ACL 2023 (arXiv 2210.06210) for the equations; "reference code" is the authors'
implementation, followed where the two differ.

    masks = Masks(model.prunable(), "smp-s", density=0.5)
    weights, regularizer = masks(density_at(step, ramp=480, final=0.5))
    logits = torch.func.functional_call(model, weights, batch)  # then (loss + penalty * regularizer).backward()
"""

import json
import math

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

# --- schedules -----------------------------------------------------------------------------------------------


def density_at(step, ramp, final, power=3):
    """Share of weights kept at a step: from 1 down to `final` in `ramp` steps, then constant (section 3.2).

    v_t = v + (1 - v)(1 - t/N)^power; the default power 3 is the cubic schedule, 1 is linear.
    """
    return final + (1 - final) * (1 - min(step / ramp, 1.0)) ** power if ramp else final


def penalty_at(step, total, final=400.0):
    """Weight of the regularizer at a step: lambda_t = lambda (1 - (1 - t/T)^3) (eq. 6, ramp as reference code)."""
    return final * (1 - (1 - step / total) ** 3)


# --- choosing weights ----------------------------------------------------------------------------------------


def kth_largest(scores, k):
    """scores [L, n], k [L] whole numbers in 0..n -> the k-th largest score of each row [L]; +inf where k is 0."""
    index = (k - 1).clamp(min=0)
    if scores.device.type == "cpu":  # numpy's partition is 40 times faster than torch.sort on a CPU
        n = scores.shape[1]
        pairs = zip(scores.detach().numpy(), (n - 1 - index).tolist(), strict=True)
        values = torch.tensor([np.partition(row, i)[i].item() for row, i in pairs], dtype=scores.dtype)
    else:
        values = scores.detach().sort(dim=1, descending=True).values.gather(1, index[:, None])[:, 0]
    return values.masked_fill(k == 0, math.inf)


SAMPLES, SCATTER = 1 << 16, 32749  # a prime, and small enough for torch.compile, which multiplies in 32 bits


def about_kth_largest(scores, k):
    """kth_largest of several groups, off by up to 0.1 % of n in rank (and by ties): cheap on a GPU.

    scores: G tensors [L, n], n of their own; k [G, L] -> [G, L]. Sorts a sample of every row and looks up where the
    k-th should be; then counts how many scores really are at least that large, and moves on by as many samples.
    """
    sizes = [s.shape[1] for s in scores]
    m = min(*sizes, SAMPLES)
    # Multiples of a prime modulo n: evenly over the rows and columns of a matrix, as every so-manieth would not be.
    multiples = torch.arange(m, device=k.device) * SCATTER
    samples = torch.stack([s[:, multiples % n] for s, n in zip(scores, sizes, strict=True)])
    ordered = samples.sort(dim=2, descending=True).values  # [G, L, m]
    per_sample = torch.stack([torch.full_like(k[0], n / m, dtype=torch.float32) for n in sizes])
    rank = (k - 0.5) / per_sample  # of the k-th largest in the sample, from 0
    look_up = lambda: ordered.gather(2, rank.long().clamp(0, m - 1)[:, :, None])  # noqa: E731
    # In float32, which holds whole numbers to 2^24: from bool to int64, torch would write eight bytes a score.
    counts = [(s >= value).sum(1, dtype=torch.float32) for s, value in zip(scores, look_up(), strict=True)]
    rank = rank + (k - torch.stack(counts)) / per_sample
    return look_up()[:, :, 0].masked_fill(k == 0, math.inf)


def highest(scores, k, exact):
    """Keep the k highest scores of each matrix: scores {group: [L, out, in]}, k [G, L] -> {group: bool [L, out, in]}.

    exact: break ties by index, so that precisely k are kept. Otherwise all scores that equal the k-th are kept, and on
    a GPU the k-th is only about the k-th, which is cheaper and enough in training; so at the start, when all scores are
    zero, everything is kept.
    """
    flat = [s.detach().flatten(1) for s in scores.values()]  # [L, out, in] -> [L, out * in]
    if exact or k.device.type == "cpu":
        thresholds = [kth_largest(s, row) for s, row in zip(flat, k, strict=True)]
    else:
        thresholds = about_kth_largest(flat, k)
    masks = []
    for s, threshold, row in zip(flat, thresholds, k, strict=True):
        mask = s >= threshold[:, None]
        if exact:
            above = s > threshold[:, None]
            ties, room = mask & ~above, row[:, None] - above.sum(1, keepdim=True)
            mask = above | (ties & (ties.cumsum(1) <= room))
        masks.append(mask)
    return {g: mask.view_as(s) for (g, s), mask in zip(scores.items(), masks, strict=True)}


class MeanSigmoid(torch.autograd.Function):
    """S [L, out, in] -> mean of sigmoid(S) over each matrix [L]: torch's own, with less memory traffic backward."""

    @staticmethod
    def forward(ctx, scores):
        s = torch.sigmoid(scores)
        ctx.save_for_backward(s)
        return s.mean((1, 2))

    @staticmethod
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        grad = (grad / s[0].numel())[:, None, None].expand_as(s)  # torch's own mean would write this out
        return torch.ops.aten.sigmoid_backward(grad, s)


def mean_sigmoid(scores, temperature=1.0):
    """R(S / p): scores {group: [L, out, in]} -> mean of sigmoid(S / p) over each matrix [G, L]."""
    return torch.stack([MeanSigmoid.apply(s if temperature == 1 else s / temperature) for s in scores.values()])


def proportional_densities(importance, density):
    """SMP-S (eq. 4): layer densities proportional to importance [G, L], at most 1, with mean `density` in each group.

    What a layer cannot take goes to the others of its group; the reference code cuts it, and ends sparser than
    asked. Importance 3 and 1 at density 0.75: proportionally 1.125 and 0.375; so 1 and 0.5. In general: with j layers
    full, the others share density * L - j in proportion, and j is the smallest for which none of them overflows.
    """
    layers = importance.shape[1]
    sorted_, order = importance.sort(dim=1, descending=True)
    others = sorted_.flip(1).cumsum(1).flip(1)  # at j: importance of the layers that are not among the j largest
    full = torch.arange(layers, device=importance.device, dtype=importance.dtype)
    scale = (density * layers - full) / others
    overflowing = (scale * sorted_ > 1).sum(1, keepdim=True).clamp(max=layers - 1)
    return (scale.gather(1, overflowing) * importance).clamp(max=1.0)


ROUNDING = 1e-3  # 1 - 0.9 is 0.09999999999999998 in binary: 1000 weights at sparsity 0.9 still keep 100


def whole_counts(densities, n):
    """Densities [L] in float64 of matrices of n weights -> whole numbers [L]: their sum is the group's, rounded down.

    Each is rounded down, and the weights still missing go to the largest fractions.
    """
    wanted = densities * n
    counts = wanted.floor()
    missing = int((wanted.sum() + ROUNDING).floor() - counts.sum())
    counts[(wanted - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def smp_l(scores, importance, density, exact):
    """SMP-L: the int(v * n) highest scores of each matrix. scores {group: [L, out, in]} -> bool, likewise.

    density: a number, or in training a 0-dim tensor. The importance is for SMP-S: all masking functions are called
    alike.
    """
    counts = [torch.as_tensor(density * s[0].numel() + ROUNDING, device=s.device) for s in scores.values()]
    return highest(scores, torch.stack(counts).long()[:, None].expand(importance.shape), exact)


def smp_s(scores, importance, density, exact):
    """SMP-S: each group keeps the share v, its layers in proportion to their importance [G, L], R(S / p) (eq. 4)."""
    if exact:
        importance = importance.cpu().double()  # in float32 the counts of a large matrix are off by one
    densities = proportional_densities(importance, density)
    sizes = [s[0].numel() for s in scores.values()]
    if exact:
        counts = torch.stack([whole_counts(d, n) for d, n in zip(densities, sizes, strict=True)])
        return highest(scores, counts.to(scores[next(iter(scores))].device), exact)
    # The clamp: scores that are not finite end in the loop's error about the loss, not in an index out of range.
    counts = [(d * n).long().clamp(0, n) for d, n in zip(densities, sizes, strict=True)]
    return highest(scores, torch.stack(counts), exact)


MASKING = {"smp-s": smp_s, "smp-l": smp_l}

# --- scores and masked weights -------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """W' = W * M(S); backward dL/dS = dL/dW' * W for kept and removed weights alike (eq. 3)."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        product = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        return None, torch.mul(grad, weight, out=product), None


class Masks(nn.Module):
    """One score for every weight of the groups, all zero at the start; the weights themselves stay as they are.

    groups: {group: {name: weight [out, in]}}, the matrices of a group all of one shape.
    method: a key of MASKING; density: the share of weights kept at the end, in (0, 1].
    """

    def __init__(self, groups, method, density):
        super().__init__()
        # Plain dicts, not buffers: no part of this module's state, and already where the model is.
        self.names = {group: list(weights) for group, weights in groups.items()}
        self.weights = {group: torch.stack([w.detach() for w in ws.values()]) for group, ws in groups.items()}
        zeros = [(group, torch.zeros_like(w, dtype=torch.float32)) for group, w in self.weights.items()]
        self.scores = nn.ParameterDict(zeros)  # pairs, because ParameterDict sorts a plain dict
        self.masking = MASKING[method]
        # p = 4 evens the layers out while most weights stay (reference code; not in the paper).
        self.temperature = 4.0 if density >= 0.7 else 1.0

    def by_name(self, stacks):
        """{group: [L, out, in]} -> {name: [out, in]}, views."""
        return {n: t for group, stack in stacks.items() for n, t in zip(self.names[group], stack, strict=True)}

    def forward(self, density):
        """-> masked weights {name: [out, in]} for one training step, and the regularizer R, both differentiable.

        R is the mean over all matrices of mean(sigmoid(S)) (eq. 6 with means, as reference code).
        """
        means = mean_sigmoid(self.scores)
        with torch.no_grad():
            importance = means if self.temperature == 1 else mean_sigmoid(self.scores, self.temperature)
            masks = self.masking(self.scores, importance, density, exact=False)
        masked = {g: StraightThrough.apply(w, self.scores[g], masks[g]) for g, w in self.weights.items()}
        return self.by_name(masked), means.mean()

    @torch.no_grad()
    def exact(self, density):
        """-> masks {name: bool [out, in]} that keep exactly the share asked for, ties broken by index."""
        importance = mean_sigmoid(self.scores, self.temperature)
        return self.by_name(self.masking(self.scores, importance, density, exact=True))

    def baked(self, density):
        """-> weights {name: [out, in]} under the exact masks, for evaluation."""
        return apply_masks(self.by_name(self.weights), self.exact(density))


def apply_masks(weights, masks):
    """{name: weight}, {name: bool} -> {name: weight with the removed entries zero}."""
    return {name: weights[name] * mask for name, mask in masks.items()}


# --- mask files ----------------------------------------------------------------------------------------------

FORMAT = "smp-mask-1"


def pack_masks(masks, metadata):
    """{name: bool [out, in]} and a dict for people and checks -> bytes of a safetensors file, one bit a weight."""
    bits = {name: np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    header = {"format": FORMAT, "shapes": json.dumps(shapes), "run": json.dumps(metadata)}
    return save(bits, header)


def load_masks(path, shapes):
    """Read a mask file -> ({name: bool [out, in]}, metadata dict).

    shapes: {name: (out, in)} of the backbone's prunable weights; the file must hold exactly these.
    Raises ValueError that says why the file cannot be used.
    """
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a mask file of format {FORMAT}")
    stored = {name: tuple(shape) for name, shape in json.loads(header.get("shapes", "{}")).items()}
    if stored != {name: tuple(shape) for name, shape in shapes.items()} or stored.keys() != bits.keys():
        raise ValueError(f"{path} was made for a backbone of another shape")
    masks = {}
    for name, shape in stored.items():
        if bits[name].dtype != np.uint8 or bits[name].size != -(-math.prod(shape) // 8):
            raise ValueError(f"{path}: {name} has {bits[name].size} bytes, not one bit a weight")
        unpacked = np.unpackbits(bits[name], count=math.prod(shape)).reshape(shape)
        masks[name] = torch.from_numpy(unpacked.astype(bool))
    return masks, json.loads(header.get("run", "{}"))
