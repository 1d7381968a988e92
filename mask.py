"""Static Model Pruning, learning which frozen weights to switch off, and the methods that it is compared with.

What it is: schedules, masking functions, the regularizer, the table of methods, scores and masked weights.
What it is not: it knows no BERT and no loop: groups of weights in, masked ones out. topk.py finds the highest scores.
Sources: Jiang et al., ACL 2023 (arXiv 2210.06210) for the equations; "reference code" is the authors'
implementation, followed where the two differ.

    masks = Masks(model.prunable(), "smp-s", density=0.5)
    weights, regularizer = masks(density_at(step, ramp=480, final=0.5))
    logits = torch.func.functional_call(model, weights, batch)  # then (loss + penalty * regularizer).backward()
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from topk import highest

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


def mean_sigmoid(scores, temperature=1.0, shift=0.0):
    """R((S + c) / p): scores {group: [L, out, in]} -> mean of the sigmoid over each matrix [G, L]."""
    plain = temperature == 1 and shift == 0
    return torch.stack([MeanSigmoid.apply(s if plain else (s + shift) / temperature) for s in scores.values()])


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


def smp_g(scores, importance, density, exact):
    """SMP-G: the int(v * n) highest scores of all matrices together; some may lose nearly everything."""
    every = torch.cat([s.detach().flatten() for s in scores.values()])[None]  # [1, all]
    count = torch.as_tensor(density * every.numel() + ROUNDING, device=every.device).long().view(1, 1)
    parts = highest({"every": every}, count, exact)["every"][0].split([s.numel() for s in scores.values()])
    return {g: part.view_as(s) for (g, s), part in zip(scores.items(), parts, strict=True)}


def threshold(scores, importance, density, exact, tau=0.1):
    """Keep where sigmoid(S) > tau, whatever density comes of it; exact: of these no more than asked for, as smp_g."""
    above = {g: torch.sigmoid(s) > tau for g, s in scores.items()}
    if not exact:
        return above
    return {g: mask & above[g] for g, mask in smp_g(scores, importance, density, exact).items()}


# --- masked weights ------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """W' = W * M(S); backward dL/dS = dL/dW' * W for kept and removed weights alike (eq. 3).

    A weight that trains as well gets dL/dW = dL/dW' * M: nothing where it is removed (movement pruning).
    """

    @staticmethod
    def forward(ctx, weight, scores, mask):
        mask = mask.to(weight.dtype)  # a product of two dtypes is far slower
        ctx.save_for_backward(weight, mask if ctx.needs_input_grad[0] else None)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        for_scores = None
        if ctx.needs_input_grad[1]:
            for_scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
            torch.mul(grad, weight, out=for_scores)
        return None if mask is None else grad * mask, for_scores, None


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and ends of the stretched interval (Louizos et al. 2018, section 4)


def hard_concrete(scores, noise):
    """Gates in [0, 1] of log alpha = scores (Louizos et al. 2018), drawn (eq. 10 to 12) or, without noise, eq. 13."""
    if noise:
        u = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        scores = (scores + u.log() - (-u).log1p()) / BETA
    return (torch.sigmoid(scores) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# --- the methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row of the table: what is ranked, what becomes of it, what trains beside it. Its defaults are SMP's.

    masking: (scores {group: [L, out, in]}, importance [G, L], density, exact) -> masks {group: bool}; None: no mask.
    """

    masking: Callable | None
    scores: str = "learnt"  # or "magnitude": |W| as it is now; "random": drawn once
    start: float = 0.0  # of learnt scores
    score_lr: float = 2e-2
    penalty: float = 400.0  # lambda of the regularizer at the end
    trains_weights: bool = False  # with AdamW, beside the scores
    head: str = "words"
    gates: Callable | None = None  # (scores, noise) -> what weights are multiplied with in place of the mask
    shift: float = 0.0  # the regularizer is the mean of sigmoid(S + shift)
    units: str = ""  # no mask, but whole units go before training, chosen as cluster.prune says

    @property
    def learns_scores(self):
        return self.masking is not None and self.scores == "learnt"


METHODS = {
    "smp-s": Method(smp_s),
    "smp-l": Method(smp_l),
    "smp-g": Method(smp_g),
    "smp-t": Method(threshold),
    "magnitude": Method(smp_l, scores="magnitude", penalty=0.0, trains_weights=True),
    "movement": Method(smp_l, score_lr=1e-2, penalty=0.0, trains_weights=True),
    "soft-movement": Method(threshold, score_lr=1e-2, trains_weights=True),
    # Without noise a gate is open where sigmoid(S) > -gamma / (zeta - gamma); with it, with probability
    # sigmoid(S - beta log(-gamma / zeta)), which is what the regularizer counts.
    "l0": Method(
        partial(threshold, tau=-GAMMA / (ZETA - GAMMA)), start=math.log(0.9 / 0.1), score_lr=1e-2,
        trains_weights=True, gates=hard_concrete, shift=-BETA * math.log(-GAMMA / ZETA),
    ),
    "random": Method(smp_l, scores="random", penalty=0.0, trains_weights=True),
    "finetune": Method(None, penalty=0.0, trains_weights=True),
    "p-pruning": Method(None, penalty=0.0, trains_weights=True, units="clusters"),
    "p-activation": Method(None, penalty=0.0, trains_weights=True, units="activation"),
    "p-random": Method(None, penalty=0.0, trains_weights=True, units="random"),
}  # fmt: skip


class Masks(nn.Module):
    """One score for every weight of the groups, and the weights under the masks that the scores give.

    groups: {group: {name: weight [out, in]}}, the matrices of a group all of one shape. method: a key of METHODS;
    density: the share of weights kept at the end, in (0, 1]; dtype: of what is multiplied, by default the weights';
    temperature: p of SMP-S. Weights that train are float32 parameters.
    """

    def __init__(self, groups, method, density, dtype=None, temperature=None):
        super().__init__()
        self.names = {group: list(weights) for group, weights in groups.items()}
        self.method = METHODS[method]
        stacks = {group: torch.stack([w.detach() for w in ws.values()]) for group, ws in groups.items()}
        self.dtype = dtype or next(iter(stacks.values())).dtype
        # Plain dicts, not buffers, of what does not train: no part of this module's state, and already where the model
        # is. Pairs, because ParameterDict sorts a plain dict.
        if self.method.trains_weights:
            self.weights = nn.ParameterDict([(group, stack.float()) for group, stack in stacks.items()])
        else:
            self.weights = {group: stack.to(self.dtype) for group, stack in stacks.items()}
        self.learnt = self.drawn = None
        if self.method.scores == "learnt":
            full = partial(torch.full_like, fill_value=self.method.start, dtype=torch.float32)
            self.learnt = nn.ParameterDict([(group, full(stack)) for group, stack in stacks.items()])
        elif self.method.scores == "random":
            self.drawn = {group: torch.rand_like(stack, dtype=torch.float32) for group, stack in stacks.items()}
        # p = 4 evens the layers out while most weights stay (reference code; not in the paper).
        self.temperature = temperature or (4.0 if density >= 0.7 else 1.0)

    @property
    def scores(self):
        """What is ranked now {group: [L, out, in]}."""
        return self.learnt or self.drawn or {group: weight.detach().abs() for group, weight in self.weights.items()}

    def by_name(self, stacks):
        """{group: [L, out, in]} -> {name: [out, in]}, views."""
        return {n: t for group, stack in stacks.items() for n, t in zip(self.names[group], stack, strict=True)}

    def forward(self, density):
        """-> masked weights {name: [out, in]} for one training step, and the regularizer R, both differentiable.

        R is the mean over all matrices of mean(sigmoid(S)) (eq. 6 with means, as reference code).
        """
        scores, method = self.scores, self.method
        means = mean_sigmoid(scores, shift=method.shift)
        weights = {g: w.to(self.dtype) for g, w in self.weights.items()}
        if method.gates:
            masked = {g: w * method.gates(scores[g], noise=True).to(self.dtype) for g, w in weights.items()}
            return self.by_name(masked), means.mean()
        with torch.no_grad():
            importance = means if self.temperature == 1 else mean_sigmoid(scores, self.temperature)
            masks = method.masking(scores, importance, density, exact=False)
        masked = {g: StraightThrough.apply(w, scores[g], masks[g]) for g, w in weights.items()}
        return self.by_name(masked), means.mean()

    @torch.no_grad()
    def exact(self, density):
        """-> masks {name: bool [out, in]} that keep exactly the share asked for, ties broken by index."""
        scores = self.scores
        importance = mean_sigmoid(scores, self.temperature)
        return self.by_name(self.method.masking(scores, importance, density, exact=True))

    @torch.no_grad()
    def reached(self, density):
        """-> the share of weights that training keeps by itself: for thresholds not what was asked for."""
        scores = self.scores
        masks = self.method.masking(scores, mean_sigmoid(scores, self.temperature), density, exact=False)
        return sum(m.sum().item() for m in masks.values()) / sum(m.numel() for m in masks.values())

    @torch.no_grad()
    def baked(self, density, dtype=None):
        """-> weights {name: [out, in]} under the exact masks, for evaluation, in this module's dtype or another."""
        weights = self.weights
        if self.method.gates:
            weights = {g: weight * self.method.gates(self.learnt[g], noise=False) for g, weight in weights.items()}
        weights = {name: weight.to(dtype or self.dtype) for name, weight in self.by_name(weights).items()}
        return apply_masks(weights, self.exact(density))


def apply_masks(weights, masks):
    """{name: weight}, {name: bool} -> {name: weight with the removed entries zero}."""
    return {name: weights[name] * mask for name, mask in masks.items()}
