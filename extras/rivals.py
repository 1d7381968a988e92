"""The methods that SMP is compared with.

All but Piggyback train the weights too, with AdamW. Embeddings stay frozen, as in the paper's
Table 1.

- Magnitude pruning: Zhu and Gupta 2017 (arXiv 1710.01878).
- Movement and soft movement pruning: Sanh et al., NeurIPS 2020 (arXiv 2005.07683).
- L0 regularization: Louizos et al., ICLR 2018 (arXiv 1712.01312).
- Lottery tickets: Chen et al., NeurIPS 2020 (arXiv 2007.12223).
- Random masks, and dense fine-tuning (finetune-encoder).
- smp-weights: SMP-S with weights that train as well, which the paper says is not needed.
- Piggyback: Mallya et al., ECCV 2018 (arXiv 1801.06519), and for BERT Zhao et al., EMNLP 2020
  (arXiv 2004.12406). It trains masks alone, with a threshold and without a regularizer.
"""

import math
from dataclasses import replace
from functools import partial

import torch

from extras.variants import above_threshold
from mask import METHODS, Masks, Method, StraightThrough, mean_sigmoid, smp_l, smp_s


class BothLearn(StraightThrough):
    """W' = W * M(S) for a weight that trains too: dL/dW = dL/dW' * M.

    Removed weights get no gradient.
    """

    @staticmethod
    def forward(ctx, weight, scores, mask):
        mask = mask.to(weight.dtype)
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        for_scores = None
        if ctx.needs_input_grad[1]:  # the scores train too
            for_scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
            torch.mul(grad, weight, out=for_scores)
        return grad * mask, for_scores, None


class Magnitude(Masks):
    """Scores are the current |W|."""

    def make_scores(self, stacks):
        pass  # they are computed when they are read

    @property
    def scores(self):
        return {group: weight.detach().abs() for group, weight in self.weights.items()}


class Random(Masks):
    """Scores are drawn once, and stay."""

    def make_scores(self, stacks):
        self.scores = {}
        for group, stack in stacks.items():
            self.scores[group] = torch.rand_like(stack, dtype=torch.float32)


class Ticket(Masks):
    """Scores are |W| of the pretrained weights, and stay (lottery ticket)."""

    def make_scores(self, stacks):
        self.scores = {group: stack.float().abs() for group, stack in stacks.items()}


class Raised(Masks):
    """Scores start a little above the threshold, so that every weight stays at first."""

    def make_scores(self, stacks):
        super().make_scores(stacks)
        for scores in self.scores.values():
            scores.data.fill_(0.005)  # Mallya et al.: 0.01, with a threshold of 0.005


# --- L0 -------------------------------------------------------------------------------------------

# The values of section 4.
BETA = 2 / 3  # temperature
GAMMA = -0.1  # ends of the stretched interval
ZETA = 1.1
SHIFT = -BETA * math.log(-GAMMA / ZETA)  # with noise, P(open gate) is sigmoid(S + SHIFT)
OPEN = -GAMMA / (ZETA - GAMMA)  # without noise, a gate is open where sigmoid(S) > OPEN


def hard_concrete(scores, noise):
    """Gates in [0, 1] whose log alpha are the scores (Louizos et al. 2018).

    They are drawn (eq. 10 to 12), or without noise computed (eq. 13).
    """
    if noise:
        u = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
        scores = (scores + u.log() - (-u).log1p()) / BETA
    return (torch.sigmoid(scores) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(Masks):
    """L0: random gates in place of a mask. The regularizer is the expected share of open gates."""

    def make_scores(self, stacks):
        super().make_scores(stacks)
        for scores in self.scores.values():
            scores.data.fill_(math.log(0.9 / 0.1))  # with noise, 98 of 100 gates are open

    def stacked(self, density):
        open_share = mean_sigmoid({group: s + SHIFT for group, s in self.scores.items()}).mean()
        weights = {}
        for group, weight in self.weights.items():
            gates = hard_concrete(self.scores[group], noise=True)
            weights[group] = weight.to(self.dtype) * gates.to(self.dtype)
        return weights, open_share

    @torch.no_grad()
    def final_weights(self, density, dtype=None):
        gated = {}
        for group, weight in self.weights.items():
            gated[group] = weight * hard_concrete(self.scores[group], noise=False)
        # The mask closes the gates beyond the density, too.
        final = self.by_name(gated)
        for name, mask in self.choose(density).items():
            final[name] = final[name].to(dtype or self.dtype) * mask
        return final


# --- the rows -------------------------------------------------------------------------------------


class FrozenEmbeddings(Method):
    """A method that trains every weight but the embeddings."""

    def trains_tensor(self, name, tensor):
        embedding = name.endswith(("_embeddings.weight", "wte.weight", "wpe.weight"))
        return not embedding and super().trains_tensor(name, tensor)


# Recipes: pruned at once, gradually, or gradually by scores that learn.
ONCE = {"sparsity": 0.5, "weight_lr": None}
GRADUAL = {"sparsity": 0.5, "hold": 0.0, "ramp": None, "schedule": None, "weight_lr": None}
LEARNED = GRADUAL | {"lr": 1e-2, "penalty": 400.0}
# FIXED: the weights learn, and the scores do not. BOTH: both do.
FIXED = FrozenEmbeddings(smp_l, rule=BothLearn, trains=("weights",), recipe=GRADUAL)
BOTH = replace(FIXED, trains=("scores", "weights"), recipe=LEARNED)
# In the reference code of soft movement, a matrix keeps at least 0.5 % of its weights.
SOFT = replace(BOTH, how_many=partial(above_threshold, least=0.005))
SMP_S = METHODS["smp-s"].recipe
METHODS |= {
    "finetune-encoder": FrozenEmbeddings(None, trains=("weights",), recipe={"weight_lr": None}),
    "magnitude": replace(FIXED, masks=Magnitude),
    "movement": replace(BOTH, recipe=LEARNED | {"penalty": 0.0}),  # its authors have none
    "soft-movement": SOFT,
    "l0": replace(BOTH, how_many=partial(above_threshold, tau=OPEN), masks=Gates),
    "ticket": replace(FIXED, recipe=ONCE, masks=Ticket),
    "random": replace(FIXED, masks=Random),
    "smp-weights": replace(BOTH, how_many=smp_s, recipe=SMP_S | {"weight_lr": None}),
    "piggyback": Method(partial(above_threshold, tau=0.5), recipe={"lr": 1e-3}, masks=Raised),
}
