"""The methods that SMP is compared with: their weights train as well, with AdamW, beside the scores or without any.

Sources: magnitude pruning, Zhu and Gupta 2017 (arXiv 1710.01878); movement and soft movement pruning, Sanh et al.,
NeurIPS 2020 (arXiv 2005.07683); L0 regularization, Louizos et al., ICLR 2018 (arXiv 1712.01312); lottery tickets, Chen
et al., NeurIPS 2020 (arXiv 2007.12223).
"""

import math
from dataclasses import replace
from functools import partial

import torch

from extras.variants import above_threshold
from mask import METHODS, Masks, Method, StraightThrough, mean_sigmoid, smp_l


class BothLearn(StraightThrough):
    """W' = W * M(S) of a weight that trains too: dL/dW = dL/dW' * M, nothing where it is removed."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        mask = mask.to(weight.dtype)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        for_scores = None
        if ctx.needs_input_grad[1]:
            for_scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
            torch.mul(grad, weight, out=for_scores)
        return grad * mask, for_scores, None


class Magnitude(Masks):
    """Scores are |W| as it is now."""

    def make_scores(self, stacks):
        pass  # they are computed each time

    @property
    def scores(self):
        return {group: weight.detach().abs() for group, weight in self.weights.items()}


class Random(Masks):
    """Scores are drawn once."""

    def make_scores(self, stacks):
        self.scores = {}
        for group, stack in stacks.items():
            self.scores[group] = torch.rand_like(stack, dtype=torch.float32)


class Ticket(Masks):
    """Scores are |W| of the pretrained weights, for good (lottery ticket)."""

    def make_scores(self, stacks):
        self.scores = {group: stack.float().abs() for group, stack in stacks.items()}


# --- L0 ------------------------------------------------------------------------------------------------------

BETA = 2 / 3  # temperature, and ends of the stretched interval (section 4)
GAMMA = -0.1
ZETA = 1.1
# With noise, a gate is open with probability sigmoid(S + SHIFT); without, it is open where sigmoid(S) > OPEN.
SHIFT = -BETA * math.log(-GAMMA / ZETA)
OPEN = -GAMMA / (ZETA - GAMMA)


def hard_concrete(scores, noise):
    """Gates in [0, 1] of log alpha = scores (Louizos et al. 2018), drawn (eq. 10 to 12) or, without noise, eq. 13."""
    if noise:
        u = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        scores = (scores + u.log() - (-u).log1p()) / BETA
    return (torch.sigmoid(scores) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(Masks):
    """L0: weights are multiplied with random gates, not with a mask, and the regularizer counts the open ones."""

    def make_scores(self, stacks):
        super().make_scores(stacks)
        for scores in self.scores.values():
            scores.data.fill_(math.log(0.9 / 0.1))  # nine in ten gates are open

    def stacked(self, density):
        open_share = mean_sigmoid({group: s + SHIFT for group, s in self.scores.items()}).mean()
        weights = {}
        for group, weight in self.weights.items():
            gates = hard_concrete(self.scores[group], noise=True)
            weights[group] = weight.to(self.dtype) * gates.to(self.dtype)
        return weights, open_share

    @torch.no_grad()
    def final_weights(self, density, dtype=None):
        masks = self.choose(density)
        gated = {}
        for group, weight in self.weights.items():
            gated[group] = weight * hard_concrete(self.scores[group], noise=False)
        return {
            n: weight.to(dtype or self.dtype) * masks[n]
            for n, weight in self.by_name(gated).items()
        }


WEIGHTS = ("weights",)
BOTH = ("scores", "weights")
GRADUAL = {"sparsity": 0.5, "hold": 0.0, "ramp": None, "schedule": None, "weight_lr": None}
LEARNED = GRADUAL | {"lr": 1e-2, "penalty": 400.0}
SOFT = Method(above_threshold, rule=BothLearn, trains=BOTH, recipe=LEARNED)
METHODS |= {
    "magnitude": Method(smp_l, rule=BothLearn, trains=WEIGHTS, recipe=GRADUAL, masks=Magnitude),
    "movement": replace(SOFT, how_many=smp_l, recipe=LEARNED | {"penalty": 0.0}),
    "soft-movement": SOFT,
    "l0": replace(SOFT, how_many=partial(above_threshold, tau=OPEN), masks=Gates),
    "ticket": Method(
        smp_l,
        rule=BothLearn,
        trains=WEIGHTS,
        recipe={"sparsity": 0.5, "weight_lr": None},
        masks=Ticket,
    ),
    "random": Method(smp_l, rule=BothLearn, trains=WEIGHTS, recipe=GRADUAL, masks=Random),
}
