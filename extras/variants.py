"""Variations on SMP: what else could rank, be kept or learn. results/README.md says what each of them brings.

    python train.py --method smp-bias --sparsity 0.9
"""

import torch

from mask import METHODS, SCORES, SHARES, Masks, Method, StraightThrough, mean_sigmoid, smp_l, smp_s

# --- another ranking -----------------------------------------------------------------------------------------


def by_size(weights, scores):
    """smp-w: a small weight needs a higher score to stay, |W| sigmoid(S)."""
    return {group: weights[group].abs() * torch.sigmoid(s) for group, s in scores.items()}


# --- another pattern -----------------------------------------------------------------------------------------


def two_of_four(scores, importance, density, exact):
    """smp-2:4: of each four weights in a row at least the two highest, from density 0.5 down at most these.

    Some GPUs know this pattern. Raises ValueError where rows have no fours.
    """
    lifted = {}
    for group, s in scores.items():
        if s.shape[2] % 4:
            raise ValueError(f"--method smp-2:4 needs rows of fours; those of {group} have {s.shape[2]} weights")
        s = s.detach()
        fours = s.unflatten(2, (-1, 4))  # [L, out, in] -> [L, out, in / 4, 4]
        two = fours.topk(2, dim=3).indices
        winners = torch.zeros_like(fours).scatter(3, two, 1.0).flatten(2)
        lifted[group] = s + winners * (s.max() - s.min() + 1)  # every winner above every other
    return smp_l(lifted, importance, density, exact)


# --- another sign --------------------------------------------------------------------------------------------


class SignedStraightThrough(StraightThrough):
    """W' = W sign(S) M(|S|); backward dL/dS = dL/dW' * W, sign and mask counting as the identity."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight)
        return weight * mask.to(weight.dtype) * scores.sign().to(weight.dtype)


class Signed(Masks):
    """Scores that start at 1. A weight is removed while its score is near zero, and comes back negated below."""

    def make(self, stacks):
        super().make(stacks)
        for scores in self.scores.values():
            scores.data.fill_(1.0)

    def stacked(self, density):
        masked, _ = super().stacked(density)
        return masked, mean_sigmoid({group: s.abs() for group, s in self.scores.items()}).mean()

    @torch.no_grad()
    def baked(self, density, dtype=None):
        signs = self.by_name({group: s.sign() for group, s in self.scores.items()})
        return {name: weight * signs[name].to(weight.dtype) for name, weight in super().baked(density, dtype).items()}


def by_distance(weights, scores):
    """smp-signed: the mask keeps the scores that are farthest from zero."""
    return {group: s.abs() for group, s in scores.items()}


METHODS |= {
    "smp-w": Method(smp_s, flags=METHODS["smp-s"].flags, rank=by_size),
    "smp-bias": Method(smp_s, flags=METHODS["smp-s"].flags | {"weight_lr": None}, vectors=True),
    "smp-2:4": Method(two_of_four, flags=SHARES | SCORES),
    "smp-signed": Method(smp_l, SignedStraightThrough, Signed, SHARES | SCORES, rank=by_distance),
}
