"""Static Model Pruning: learn which weights of a frozen model to keep.

This is the method, and it knows no BERT: groups of weights in, masked ones out. Each weight W gets a score S. The
forward pass uses W' = W * M(S), where the mask M keeps the weights with the highest scores; the backward pass treats M
as the identity, so that scores learn. Equations and sections are those of Jiang et al., ACL 2023 (arXiv 2210.06210);
"reference code" is the authors' implementation, followed where the two differ.

    masks = Masks(model.prunable(), METHODS["smp-s"], density=0.5)
    weights, regularizer = masks(density_at(step, ramp=480, final=0.5))
    logits = torch.func.functional_call(model, weights, batch)
    (cross_entropy(logits, labels) + penalty_at(step, total) * regularizer).backward()
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from torch import nn

# --- schedules -----------------------------------------------------------------------------------------------


def density_at(step, ramp, final, power=3, hold=0):
    """Share of weights kept at a step: 1 before step `hold`, then down to `final` at step `ramp` (section 3.2).

    v_t = v + (1 - v)(1 - t/N)^power; the default power 3 is the cubic schedule, 1 is linear.
    """
    if step < hold:
        return 1.0
    if step >= ramp:
        return final
    left = 1 - (step - hold) / (ramp - hold)  # of the way from hold to ramp: 1 - t/N
    return final + (1 - final) * left**power


def penalty_at(step, total, final=400.0):
    """Weight of the regularizer at a step: lambda_t = lambda (1 - (1 - t/T)^3) (eq. 6, ramp as reference code)."""
    return final * (1 - (1 - step / total) ** 3)


# --- the k highest scores ------------------------------------------------------------------------------------


def kth_largest(scores, k):
    """scores [L, n], k [L] whole numbers in 0..n -> the k-th largest score of each row [L]; +inf where k is 0."""
    place = scores.shape[1] - k.clamp(min=1)  # in ascending order, from 0
    if scores.device.type == "cpu":  # numpy's partition is 40 times faster than torch.sort here
        pairs = zip(scores.numpy(), place.tolist(), strict=True)
        values = torch.tensor([np.partition(row, i)[i].item() for row, i in pairs], dtype=scores.dtype)
    else:
        values = scores.sort(dim=1).values.gather(1, place[:, None])[:, 0]  # [L, n] -> [L, 1] -> [L]
    return values.masked_fill(k == 0, math.inf)  # no score reaches infinity: nothing is kept


SAMPLES = 1 << 15  # of each row
STRIDE = 32749  # a prime, so that samples come from all columns; a stride of 100 would see only 10 of 1000 columns


def about_kth_largest(scores, k):
    """kth_largest of G groups, off by up to 0.1 % of n in rank (and by ties): cheap on a GPU, where sorting is not.

    scores: G tensors [L, n], n of their own; k [G, L] -> [G, L]. Sorts a sample of every row, looks up where the k-th
    should be, counts how many scores really are at least that large, and moves on by as many samples.
    """
    sizes = [s.shape[1] for s in scores]
    m = min(*sizes, SAMPLES)
    places = torch.arange(m, device=k.device) * STRIDE
    samples = torch.stack([s[:, places % n] for s, n in zip(scores, sizes, strict=True)])  # [G, L, m]
    ordered = samples.sort(dim=2, descending=True).values
    per_sample = torch.stack([torch.full_like(k[0], n / m, dtype=torch.float32) for n in sizes])  # scores a sample

    def value_at(rank):
        return ordered.gather(2, rank.long().clamp(0, m - 1)[:, :, None])  # [G, L, 1]

    rank = (k - 0.5) / per_sample  # of the k-th largest in the sample, from 0; 0.5: the middle of the k-th score
    # Summed in float32, which holds whole numbers to 2^24: from bool to int64, torch would write eight bytes a score.
    counts = [(s >= value).sum(1, dtype=torch.float32) for s, value in zip(scores, value_at(rank), strict=True)]
    rank = rank + (k - torch.stack(counts)) / per_sample  # too few are above: further down by what is missing
    return value_at(rank)[:, :, 0].masked_fill(k == 0, math.inf)


def highest(scores, k, exact):
    """Keep the k highest scores of each matrix: scores {group: [L, out, in]}, k [G, L] -> {group: bool [L, out, in]}.

    exact: break ties by index, so that precisely k are kept. Otherwise all scores that equal the k-th are kept, and on
    a GPU the k-th is only about the k-th, which is cheaper and enough in training. So at the start, when all scores are
    zero, everything is kept.
    """
    flat = [s.detach().flatten(1) for s in scores.values()]  # [L, out, in] -> [L, out * in]
    if exact or k.device.type == "cpu":
        thresholds = [kth_largest(s, row) for s, row in zip(flat, k, strict=True)]
    else:
        thresholds = about_kth_largest(flat, k)

    masks = {}
    for (group, shaped), s, cut, row in zip(scores.items(), flat, thresholds, k, strict=True):
        mask = s >= cut[:, None]
        if exact:
            above = s > cut[:, None]  # these stay in any case
            ties = mask & ~above  # of these, only the first few
            room = row[:, None] - above.sum(1, keepdim=True)  # [L, 1]
            mask = above | (ties & (ties.cumsum(1) <= room))
        masks[group] = mask.view_as(shaped)  # [L, out * in] -> [L, out, in]
    return masks


# --- how many to keep, and where: (scores, importance, density, exact) -> masks {group: bool [L, out, in]} ---


def mean_sigmoid(scores, temperature=1.0):
    """R(S / p): scores {group: [L, out, in]} -> mean of the sigmoid over each matrix [G, L]; p > 1 evens them out."""
    means = []
    for s in scores.values():
        s = torch.sigmoid(s if temperature == 1 else s / temperature)
        means.append(s.sum((1, 2)) / s[0].numel())  # the gradient of torch's own mean would be written out in full
    return torch.stack(means)


def proportional_densities(importance, density):
    """SMP-S (eq. 4): layer densities proportional to importance [G, L], at most 1, with mean `density` in each group.

    What a layer cannot take goes to the others of its group; the reference code cuts it, and ends sparser than asked.
    Importance 3 and 1 at density 0.75: proportionally 1.125 and 0.375; so 1 and 0.5. In general: with j layers full,
    the others share density * L - j in proportion, and j is the smallest for which none of them overflows.
    """
    layers = importance.shape[1]
    importance = importance.clamp(min=torch.finfo(importance.dtype).tiny)  # where all are 0, the layers share evenly
    ordered = importance.sort(dim=1, descending=True).values
    others = ordered.flip(1).cumsum(1).flip(1)  # at j: importance of the layers that are not among the j largest
    full = torch.arange(layers, device=importance.device, dtype=importance.dtype)  # each j
    scale = (density * layers - full) / others  # [G, L]: density per importance, if j layers are full
    overflowing = (scale * ordered > 1).sum(1, keepdim=True).clamp(max=layers - 1)  # so many j do; the next does not
    return (scale.gather(1, overflowing) * importance).clamp(max=1.0)


def count(density, n):
    """How many of n weights a density keeps: int(v n), for v to twelve decimals.

    So 1 - 0.9, which is 0.09999999999999998, keeps 100 of 1000. In training density is a 0-dim tensor, the result too.
    """
    if isinstance(density, torch.Tensor):  # on the device; float64, so that this is Python's int(v * n)
        return (density * n).long()
    return math.floor(Fraction(f"{density:.12f}") * n)


def whole_counts(densities, n, total):
    """Densities [L] in float64 of matrices of n weights -> whole numbers [L] whose sum is `total`.

    Each is rounded down, and the weights still missing go to the largest fractions.
    """
    wanted = densities * n  # [L], with fractions
    counts = wanted.floor()
    missing = total - int(counts.sum())
    counts[(wanted - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return counts.long()


def smp_l(scores, importance, density, exact):
    """SMP-L: the int(v * n) highest scores of each matrix. All are called alike; this one ignores importance."""
    counts = [torch.as_tensor(count(density, s[0].numel()), device=s.device) for s in scores.values()]
    return highest(scores, torch.stack(counts)[:, None].expand(importance.shape), exact)  # [G] -> [G, L]


def smp_s(scores, importance, density, exact):
    """SMP-S: each group keeps the share v, its layers in proportion to their importance [G, L], R(S / p) (eq. 4)."""
    sizes = [s[0].numel() for s in scores.values()]  # of one matrix of each group
    if exact:  # on the CPU in float64: in float32 the counts of a large matrix are off by one
        densities = proportional_densities(importance.cpu().double(), density)
        totals = [count(density, n * len(densities[0])) for n in sizes]
        counts = [whole_counts(d, n, total) for d, n, total in zip(densities, sizes, totals, strict=True)]
        return highest(scores, torch.stack(counts).to(importance.device), exact)
    densities = proportional_densities(importance.double(), density)
    # The clamp: scores that are not finite end in the loop's error about the loss, not in an index out of range.
    counts = torch.stack([(d * n).long().clamp(0, n) for d, n in zip(densities, sizes, strict=True)])
    return highest(scores, counts, exact)


def smp_g(scores, importance, density, exact):
    """SMP-G: the int(v * n) highest scores of all matrices together; some may lose nearly everything."""
    every = torch.cat([s.detach().flatten() for s in scores.values()])[None]  # [1, all]
    k = torch.as_tensor(count(density, every.numel()), device=every.device).view(1, 1)
    mask = highest({"every": every}, k, exact)["every"][0]  # [all], as if it were one matrix
    parts = mask.split([s.numel() for s in scores.values()])  # and back to the groups
    return {group: part.view_as(s) for (group, s), part in zip(scores.items(), parts, strict=True)}


def threshold(scores, importance, density, exact, tau=0.1):
    """SMP-T: keep where sigmoid(S) > tau, whatever density that gives; exact: of these no more than asked, as smp_g."""
    above = {group: torch.sigmoid(s) > tau for group, s in scores.items()}
    if not exact:
        return above
    return {group: mask & above[group] for group, mask in smp_g(scores, importance, density, exact).items()}


# --- masked weights ------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """W' = W * M(S); backward dL/dS = dL/dW' * W, also for removed weights, so that they may come back (eq. 3)."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight)
        return weight * mask.to(weight.dtype)  # a product of two dtypes is far slower

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors  # grad: dL/dW' [L, out, in]
        for_scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        torch.mul(grad, weight, out=for_scores)  # in float32 at once: no copy in 16 bits
        return None, for_scores, None  # W is frozen, M has no gradient


def parameters(stacks):
    """{group: [L, out, in]} -> float32 parameters, in the same order (a ParameterDict would sort a dict)."""
    return nn.ParameterDict([(group, stack.float()) for group, stack in stacks.items()])


class Masks(nn.Module):
    """One score for every weight of the groups, and the weights under the masks that the scores give.

    groups: {group: {name: weight [out, in]}}, a group of one shape. method: a row of METHODS; density: the share kept
    at the end, in (0, 1]; dtype: of what is multiplied, by default the weights'; temperature: p of SMP-S.
    """

    def __init__(self, groups, method, density, dtype=None, temperature=None):
        super().__init__()
        self.method = method
        self.names = {group: list(weights) for group, weights in groups.items()}  # in the order of the layers
        # p = 4 evens the layers out while most weights stay (reference code; not in the paper).
        self.temperature = temperature or (4.0 if density >= 0.7 else 1.0)
        # The matrices of a group are one tensor [L, out, in]: masking them all is then one operation.
        stacks = {group: torch.stack([w.detach() for w in weights.values()]) for group, weights in groups.items()}
        self.dtype = dtype or next(iter(stacks.values())).dtype
        self.make(stacks)

    def make(self, stacks):
        """Frozen weights, a plain dict because they are no part of what is learnt, and scores, which start at 0."""
        self.weights = {group: stack.to(self.dtype) for group, stack in stacks.items()}
        self.scores = parameters({group: torch.zeros_like(stack) for group, stack in stacks.items()})

    def by_name(self, stacks):
        """{group: [L, out, in]} -> {name: [out, in]}, views."""
        return {n: t for group, stack in stacks.items() for n, t in zip(self.names[group], stack, strict=True)}

    def forward(self, density):
        """-> masked weights {name: [out, in]} for one training step, and the regularizer R, both differentiable."""
        masked, regularizer = self.stacked(density)
        return self.by_name(masked), regularizer

    def stacked(self, density):
        """-> masked {group: [L, out, in]}, and R: the mean of every mean(sigmoid(S)) (eq. 6; means: reference code)."""
        scores = self.scores
        means = mean_sigmoid(scores)  # [G, L]
        with torch.no_grad():  # which weights stay is not differentiable
            importance = means if self.temperature == 1 else mean_sigmoid(scores, self.temperature)
            masks = self.method.masking(self.method.rank(self.weights, scores), importance, density, exact=False)
        masked = {}
        for group, weight in self.weights.items():  # six operations, not one for each of the matrices
            masked[group] = self.method.rule.apply(weight.to(self.dtype), scores[group], masks[group])
        return masked, means.mean()

    @torch.no_grad()
    def choose(self, density, exact=True):
        """-> masks {name: bool [out, in]} that keep exactly the share asked for; not exact: what training keeps."""
        importance = mean_sigmoid(self.scores, self.temperature)
        ranks = self.method.rank(self.weights, self.scores)
        return self.by_name(self.method.masking(ranks, importance, density, exact))

    @torch.no_grad()
    def baked(self, density, dtype=None):
        """-> weights {name: [out, in]} under the exact masks, for evaluation, in this module's dtype or another."""
        masks = self.choose(density)
        return {n: weight.to(dtype or self.dtype) * masks[n] for n, weight in self.by_name(self.weights).items()}


# --- the methods ---------------------------------------------------------------------------------------------

DENSITY_FLAGS = {"sparsity": 0.5, "hold": 0.0, "ramp": None, "schedule": None}  # None: the task, or the model, decides
SCORE_FLAGS = {"lr": 2e-2, "penalty": None}


@dataclass(frozen=True)
class Method:
    """One row of the table. The defaults are SMP's."""

    masking: Callable | None  # (scores {group: [L, out, in]}, importance [G, L], density, exact) -> {group: bool}
    rule: type = StraightThrough  # what flows into the scores
    module: type = Masks  # what learns; a subclass may start or train otherwise
    flags: dict = field(default_factory=lambda: DENSITY_FLAGS | SCORE_FLAGS)  # of train.py, and their defaults
    help: dict = field(default_factory=dict)  # {flag: what it does}, of flags of its own
    rank: Callable = lambda weights, scores: scores  # {group: [L, out, in]} of both -> of what masking compares
    before: Callable | None = None  # (model, train set, dev sets, args, device) -> a smaller model, facts about it
    vectors: bool = False  # all biases and LayerNorms train beside the mask, at weight_lr, and are stored with it

    @property
    def trains_weights(self):  # all of them, so that a run needs a model file of its own
        return "weight_lr" in self.flags and not self.vectors


METHODS = {
    "smp-s": Method(smp_s, flags=DENSITY_FLAGS | SCORE_FLAGS | {"temperature": None}),  # S: the paper's best
    "smp-l": Method(smp_l),  # L: local, the same share of each matrix
    "smp-g": Method(smp_g),  # G: global
    "smp-t": Method(threshold),  # T: does not end where it was asked to
    "finetune": Method(None, flags={"weight_lr": None}),  # the dense reference point
}
