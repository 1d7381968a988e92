"""Static Model Pruning: learn which weights of a frozen model to keep.

This file is the method. It knows nothing of BERT: groups of weights go in, masked weights come out.
Each weight W gets a score S. The forward pass uses W' = W * M(S), where the mask M keeps the
weights with the highest scores. The backward pass treats M as the identity, so that the scores
learn.

Equations and sections are those of Jiang et al., ACL 2023 (arXiv 2210.06210). "Reference code" is
the authors' implementation. Where paper and code differ, this file follows the code.

    masks = Masks(model.prunable(), METHODS["smp-s"])
    weights, regularizer = masks(density_at(step, ramp=480, final=0.5))
    logits = torch.func.functional_call(model, weights, batch)
    (cross_entropy(logits, labels) + penalty_at(step, total) * regularizer).backward()

Shapes: G groups (query, key, ...) of L matrices [out, in], one matrix per layer. All matrices of a
group have the same size, n = out * in, and are stacked into one tensor [L, out, in].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

# --- schedules --------------------------------------------------------------------------------


# Each falls from 1 to 0 while t, the finished share of the ramp, goes from 0 to 1.
SCHEDULES = {
    "cubic": lambda t: (1 - t) ** 3,
    "linear": lambda t: 1 - t,
}


def density_at(step, ramp, final, schedule="cubic", hold=0):
    """Share of weights kept at a step: 1 until step `hold`, then down to `final` at step `ramp`.

    v_t = v + (1 - v)(1 - t/N)^3 (section 4.3), or another of SCHEDULES in place of the cube.
    """
    if step < hold:
        return 1.0
    if step >= ramp:
        return final
    return final + (1 - final) * SCHEDULES[schedule]((step - hold) / (ramp - hold))


def penalty_at(step, total, final=400.0):
    """Weight of the regularizer at a step: lambda_t = lambda (1 - (1 - t/T)^3).

    Eq. 6, but over all T steps, as in the reference code.
    """
    return final * (1 - (1 - step / total) ** 3)


# --- how many weights each matrix keeps -------------------------------------------------------
#
# A function (importance, sizes, density, scores, exact) -> k [G, L], whole numbers. It gets
#   importance [G, L]   float64, the mean of sigmoid(S/p) over each matrix; p is the temperature
#   sizes [G, 1]        float64, the n of each group
#   density             the share v of all weights to keep: a number, or in training a 0-dim tensor
#   scores              {group: [L, out, in]}, for those of extras/ that look at single scores
#   exact               whether they must come to exactly the share v, as in a saved mask
# Everything stays on the device. A step in which the host waits cannot become a CUDA graph.
# float64, because float32 puts int(v * n) off by one at times.


def smp_l(importance, sizes, density, scores, exact):
    """SMP-L: every matrix keeps the same share, int(v * n)."""
    return (density * sizes).long().expand_as(importance)


def smp_s(importance, sizes, density, scores, exact):
    """SMP-S (eq. 4): within a group, important layers keep more."""
    counts = proportional_densities(importance, density) * sizes  # [G, L], with fractions
    counts = counts.nan_to_num()  # NaN scores must not fail here: the loop reports them
    if exact:
        return whole_counts(counts, (density * sizes * importance.shape[1]).long())
    return counts.long()


def proportional_densities(importance, density):
    """Densities [G, L] in proportion to importance [G, L], at most 1, with mean v in each group.

    A full layer's excess goes to the other layers of its group. The reference code drops it, and
    ends sparser than asked. Example: importance 3 and 1 at density 0.75. In proportion that is
    1.125 and 0.375, so the first layer gets 1 and the second 0.5.

    In general, with j layers full, the others share density * L - j in proportion. The right j is
    the smallest one for which none of the others overflows.
    """
    layers = importance.shape[1]
    smallest = torch.finfo(importance.dtype).tiny
    importance = importance.clamp(min=smallest)  # where all are 0, the layers share evenly
    ordered = importance.sort(dim=1, descending=True).values  # [G, L]
    others = ordered.flip(1).cumsum(1).flip(1)  # at j: the sum without the j largest
    j = torch.arange(layers, device=importance.device, dtype=importance.dtype)
    # [G, L]: density per importance, if j layers are full
    scales = (density * layers - j) / others
    # With j full, does the next layer overflow? It does for each j that is too small.
    full = (scales * ordered > 1).sum(1, keepdim=True)  # [G, 1]: the right j
    scale = scales.gather(1, full.clamp(max=layers - 1))  # [G, 1]; rounding may fill them all
    return (scale * importance).clamp(max=1.0)


def whole_counts(counts, totals):
    """Counts [G, L] with fractions -> whole counts [G, L] that add up to totals [G, 1].

    Each is rounded down. What is then missing in a group goes to its largest fractions: 2.9, 5.7
    and 6.4 with a total of 15 become 3, 6 and 6.
    """
    floors = counts.floor()
    missing = totals - floors.sum(1, keepdim=True)  # [G, 1]
    order = (counts - floors).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # 0 for the largest fraction of a group
    return (floors + (rank < missing)).long()


# --- which ones: the k highest scores of each matrix -------------------------------------------


def highest(scores, k, exact):
    """Masks of the k highest scores: {group: [L, out, in]}, k [G, L] -> {group: bool [L, out, in]}.

    exact: exactly k stay, and ties are broken by index. Otherwise every score that equals the k-th
    stays, so at the start, with all scores 0, everything does. On a GPU the k-th is approximate
    then, which is cheaper and enough in training.
    """
    flat = [s.detach().flatten(1).float() for s in scores.values()]  # [L, out, in] -> [L, n]
    k = k.to(flat[0].device)  # Apple's GPUs lack float64, so there k was counted on the CPU
    cuts = thresholds(flat, k, exact)

    masks = {}
    for g, group in enumerate(scores):
        cut = cuts[g][:, None]  # [L, 1]
        mask = flat[g] >= cut
        if exact:
            above = flat[g] > cut  # these stay in any case
            ties = mask & ~above  # only the first few of these stay
            room = k[g][:, None] - above.sum(1, keepdim=True)  # [L, 1]
            mask = above | (ties & (ties.cumsum(1) <= room))
        masks[group] = mask.view_as(scores[group])  # [L, n] -> [L, out, in]
    return masks


def thresholds(flat, k, exact):
    """The k-th highest score of each matrix: G tensors [L, n], k [G, L] -> [G, L]."""
    if exact or k.device.type == "cpu":
        return torch.stack([kth_largest(s, row) for s, row in zip(flat, k, strict=True)])
    return about_kth_largest(flat, k)


def kth_largest(scores, k):
    """scores [L, n], k [L] -> the k-th largest of each row [L], +inf for k = 0."""
    # A schedule of one's own may ask for more than all n: then the smallest is the one.
    index = scores.shape[1] - k.clamp(1, scores.shape[1])  # in ascending order, from 0
    if scores.device.type == "cpu":  # numpy's partition is 40 times faster than torch.sort here
        rows = zip(scores.numpy(), index.tolist(), strict=True)
        values = torch.tensor([np.partition(row, i)[i].item() for row, i in rows])
    else:
        # [L, n] -> [L, 1] -> [L]
        values = scores.sort(dim=1).values.gather(1, index[:, None])[:, 0]
    return values.masked_fill(k == 0, math.inf)  # no score reaches infinity: nothing is kept


SAMPLES = 32768  # taken of each row
STRIDE = 32749  # a prime, so that the samples reach all columns; 100 would see 10 of 1000


def about_kth_largest(flat, k):
    """kth_largest of all groups at once, off by about 0.1 % of n in rank, more in small matrices.

    flat: G tensors [L, n]; k [G, L] -> [G, L]. Sorting whole rows is slow on a GPU. So this sorts a
    sample of every row, looks up where the k-th score should be, counts how many scores really
    reach that value, and moves on by as many samples as are missing.
    """
    sizes = [s.shape[1] for s in flat]
    m = min(*sizes, SAMPLES)
    columns = torch.arange(m, device=k.device) * STRIDE
    # [G, L, m]
    samples = torch.stack([s[:, columns % n] for s, n in zip(flat, sizes, strict=True)])
    ordered = samples.sort(dim=2, descending=True).values
    # [G, L]: how many scores a sample stands for. Made on the device: a copy makes the host wait.
    spacing = torch.stack([torch.full_like(k[0], n / m, dtype=torch.float32) for n in sizes])

    def value_at(rank):
        index = rank.long().clamp(0, m - 1)
        return ordered.gather(2, index[:, :, None])  # [G, L, 1]

    rank = (k - 0.5) / spacing  # where the k-th score should be in the sorted sample, from 0
    guess = value_at(rank)
    # float32 is exact to 2^24, and an int64 sum is slower.
    counts = [(s >= v).sum(1, dtype=torch.float32) for s, v in zip(flat, guess, strict=True)]
    rank = rank + (k - torch.stack(counts)) / spacing  # too few reach it: further down
    return value_at(rank)[:, :, 0].masked_fill(k == 0, math.inf)


# --- masked weights ---------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """W' = W * M(S). Backward: dL/dS = dL/dW' * W (eq. 3).

    The scores of removed weights get gradients too, so that these weights may come back.
    """

    # forward does not read the scores. They are an argument, so that autograd sends them dL/dS.

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight)
        return weight * mask.to(weight.dtype)  # a product of two dtypes is far slower

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors  # grad is dL/dW' [L, out, in]
        grad_scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        torch.mul(grad, weight, out=grad_scores)  # rounded to W's dtype first
        return None, grad_scores, None  # W is frozen, and M has no gradient


def mean_sigmoid(scores, temperature=1.0):
    """R(S / p): {group: [L, out, in]} -> the mean of sigmoid(S / p) over each matrix [G, L]."""
    means = []
    for s in scores.values():
        if temperature != 1:
            s = s / temperature  # p > 1 evens the layers out
        total = torch.sigmoid(s).sum((1, 2))
        means.append(total / s[0].numel())  # .mean() would write out its gradient, as large as s
    return torch.stack(means)


def as_parameters(stacks):
    """{group: [L, out, in]} -> float32 parameters in the same order (a dict would be sorted)."""
    return nn.ParameterDict([(group, stack.float()) for group, stack in stacks.items()])


class Masks(nn.Module):
    """One score for every weight of the groups, and the weights under the masks of these scores.

    groups: {group: {name: weight [out, in]}}, one matrix per layer, all of one shape.
    method: a row of METHODS. dtype: of the product W * M, by default that of the weights.
    temperature: the p of SMP-S.
    """

    def __init__(self, groups, method, dtype=None, temperature=1.0):
        super().__init__()
        self.method = method
        self.temperature = temperature
        self.names = {group: list(weights) for group, weights in groups.items()}  # by layer

        # The matrices of a group are one tensor [L, out, in]: one operation masks them all.
        stacks = {}
        for group, weights in groups.items():
            stacks[group] = torch.stack([*weights.values()]).detach()
        first = next(iter(stacks.values()))  # all are alike
        self.dtype = dtype or first.dtype
        # [G, 1] in float64, which Apple's GPUs lack: there the host counts.
        sizes = torch.tensor([[stack[0].numel()] for stack in stacks.values()]).double()
        self.sizes = sizes if first.is_mps else sizes.to(first.device)

        if "weights" in method.trains:
            self.weights = as_parameters(stacks)
        else:  # frozen: a plain dict, and no part of what the optimizer sees
            self.weights = {group: stack.to(self.dtype) for group, stack in stacks.items()}
        self.make_scores(stacks)

    def make_scores(self, stacks):
        """Scores start at 0. Other methods override this."""
        self.scores = as_parameters({group: torch.zeros_like(s) for group, s in stacks.items()})

    def forward(self, density):
        """-> masked weights {name: [out, in]} for one step, and the regularizer R.

        Both are differentiable with respect to the scores.
        """
        masked, regularizer = self.stacked(density)
        return self.by_name(masked), regularizer

    # Apart from forward, so that --compile can fuse it without the views that by_name makes.
    def stacked(self, density):
        """-> masked weights {group: [L, out, in]}, and R, the mean of sigmoid(S) over a matrix.

        R is averaged over all matrices. Eq. 6 prints a sum; the reference code takes means.
        """
        scores = self.scores  # some methods compute them
        means = mean_sigmoid(scores)  # [G, L]
        with torch.no_grad():  # choosing is not differentiable
            importance = means
            if self.temperature != 1:
                importance = mean_sigmoid(scores, self.temperature)
            masks = self.choose_stacked(importance, density, exact=False)

        masked = {}
        for group, weight in self.weights.items():
            weight = weight.to(self.dtype)
            masked[group] = self.method.rule.apply(weight, scores[group], masks[group])
        return masked, means.mean()

    def choose_stacked(self, importance, density, exact):
        """The two questions: how many weights of each matrix stay, and which ones.

        -> masks {group: bool [L, out, in]}
        """
        scores = self.method.rank(self.weights, self.scores)
        importance = importance.to(self.sizes.device).double()
        k = self.method.how_many(importance, self.sizes, density, scores, exact)
        return highest(scores, k, exact)

    @torch.no_grad()
    def choose(self, density, exact=True):
        """-> masks {name: bool [out, in]} that keep exactly the share `density`.

        exact False: what training keeps.
        """
        importance = mean_sigmoid(self.scores, self.temperature)
        if exact:
            # 1 - 0.9 is 0.09999999999999998, which would keep 99 of 1000: round, and add a hair.
            density = round(density, 12) * (1 + 1e-15)
        return self.by_name(self.choose_stacked(importance, density, exact))

    @torch.no_grad()
    def final_weights(self, density, dtype=None):
        """-> weights {name: [out, in]} under the exact masks, in this module's dtype or another."""
        masks = self.choose(density)
        weights = self.by_name(self.weights)
        return {name: weights[name].to(dtype or self.dtype) * masks[name] for name in masks}

    def by_name(self, stacks):
        """{group: [L, out, in]} -> {name: [out, in]}, views."""
        views = {}
        for group, stack in stacks.items():
            for name, matrix in zip(self.names[group], stack, strict=True):
                views[name] = matrix
        return views


# --- the methods ------------------------------------------------------------------------------


def by_scores(weights, scores):
    """What is compared, {group: [L, out, in]}: by default the scores themselves."""
    return scores


# What the learning methods have in common. None: the task or the model decides.
SMP = {"sparsity": 0.5, "hold": 0.0, "ramp": None, "schedule": None, "lr": 2e-2, "penalty": None}


@dataclass(frozen=True)
class Method:
    """One row of the table. The defaults are SMP's."""

    how_many: Callable | None  # see above; None: nothing is masked
    rank: Callable = by_scores  # (weights, scores), {group: [L, out, in]} each -> what is compared
    rule: type = StraightThrough  # what flows into the scores
    # "scores", "vectors" (biases and LayerNorms), "weights" (all), or parts of weights' names.
    # Scores train if `masks` makes parameters of them, as Masks does.
    trains: tuple = ("scores",)
    # The flags it takes, and its defaults. What is missing is off, so begin with SMP | {...}.
    # Scores that train need lr in it, and weights or vectors weight_lr. A flag of all runs, such as
    # epochs, may have a default here, too.
    recipe: dict = field(default_factory=lambda: SMP)
    # A subclass may start its scores differently, keep a state, or override choose_stacked.
    masks: type = Masks
    before: Callable | None = None  # changes the model before training: extras/pprune, adapters

    def __post_init__(self):
        assert isinstance(self.trains, tuple), f"trains={self.trains!r}: write a tuple"

    def masked(self, model):
        """{name: weight [out, in]} of a model's weights that get a mask."""
        groups = model.prunable().values() if self.how_many else []
        return {name: weight for group in groups for name, weight in group.items()}

    def trained(self, model):
        """{name: weight} of the others that train. All the rest is frozen."""
        masked = self.masked(model)
        trained = {}
        for name, weight in model.named_parameters():
            if name not in masked and self.trains_tensor(name, weight):
                trained[name] = weight
        return trained

    def trains_tensor(self, name, tensor):
        """Whether a tensor that is not masked trains. A classifier always does, as it is fresh."""
        if "weights" in self.trains:
            return True
        if "vectors" in self.trains and tensor.ndim == 1:
            return True
        return any(part in name for part in ("classifier.", *self.trains))


METHODS = {
    "smp-s": Method(smp_s, recipe=SMP | {"temperature": None}),  # the paper's best
    "smp-l": Method(smp_l),  # local: each matrix by itself
    "finetune": Method(None, trains=("weights",), recipe={"weight_lr": None}),  # dense
}
