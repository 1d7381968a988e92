"""Variations on SMP: what else could rank, be kept or learn. results/README.md says what each of them brings.

    python train.py --method smp-bias --sparsity 0.9
"""

import torch

from mask import DENSITY_FLAGS, METHODS, SCORE_FLAGS, Method, smp_l, smp_s

# --- another ranking -----------------------------------------------------------------------------------------


def by_size(weights, scores):
    """smp-w: a small weight needs a higher score to stay, |W| sigmoid(S)."""
    return {group: weights[group].abs() * torch.sigmoid(s) for group, s in scores.items()}


# --- another pattern -----------------------------------------------------------------------------------------


def two_of_four(scores, importance, density, exact):
    """smp-2:4: of each four weights in a row at least the two highest, from density 0.5 down at most these.

    Some GPUs know this pattern. In training on a GPU, where thresholds are estimated, 0.1 % may break it. Raises
    ValueError where rows have no fours.
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


METHODS |= {
    "smp-w": Method(smp_s, flags=METHODS["smp-s"].flags, rank=by_size),
    "smp-bias": Method(smp_s, flags=METHODS["smp-s"].flags | {"weight_lr": 1e-3}, vectors=True),
    "smp-2:4": Method(two_of_four, flags=DENSITY_FLAGS | SCORE_FLAGS),
}
