"""Variations on SMP: other counts, other rankings, and biases that train too.

SMP-G and SMP-T are the paper's own (Table 3). results/README.md has the figures of all.

    python train.py --method smp-bias --sparsity 0.9
"""

import torch

from mask import METHODS, SMP, Method, smp_l, smp_s, thresholds

# --- how many: two more answers -------------------------------------------------------------------


def smp_g(importance, sizes, density, scores, exact):
    """SMP-G: keep the int(v * n) highest scores of the whole model, however many of each matrix.

    Some matrices may lose nearly everything.
    """
    every = torch.cat([s.flatten() for s in scores.values()])[None]  # [1, weights of the model]
    total = (density * sizes.sum() * importance.shape[1]).long().to(every.device).view(1, 1)
    cut = thresholds([every], total, exact)[0, 0]
    at_least = torch.stack([(s >= cut).sum((1, 2)) for s in scores.values()])  # [G, L]
    if not exact:
        return at_least

    above = torch.stack([(s > cut).sum((1, 2)) for s in scores.values()])
    ties = at_least - above
    earlier_ties = ties.flatten().cumsum(0).view_as(ties) - ties  # those of the matrices before
    room = total - above.sum() - earlier_ties
    return above + room.clamp(min=0).minimum(ties)


def above_threshold(importance, sizes, density, scores, exact, tau=0.1, least=0.0):
    """SMP-T: keep every weight with sigmoid(S) > tau. This does not control the density.

    least: the share of its weights that each matrix keeps in any case. exact: keep no more of them
    than SMP-G would.
    """
    above = torch.stack([(torch.sigmoid(s) > tau).sum((1, 2)) for s in scores.values()])
    above = above.maximum((least * sizes).long().to(above.device))
    if exact:
        return above.minimum(smp_g(importance, sizes, density, scores, exact))
    return above


# --- which ones: two more rankings ----------------------------------------------------------------


def by_size(weights, scores):
    """smp-w: rank by |W| sigmoid(S), so that a small weight needs a higher score to stay."""
    return {group: weights[group].abs() * torch.sigmoid(s) for group, s in scores.items()}


def two_of_four(weights, scores):
    """smp-2:4: rank the two highest of each four weights in a row before all other weights.

    So at density 0.5 exactly two of four stay, a pattern that some GPUs support. In training on a
    GPU, where thresholds are estimated, 0.1 % may break it. Raises ValueError if rows cannot be
    divided into fours.
    """
    lifted = {}
    for group, s in scores.items():
        if s.shape[2] % 4:
            raise ValueError(
                f"--method smp-2:4 needs rows of fours; those of {group} have {s.shape[2]} weights"
            )
        fours = s.detach().unflatten(2, (-1, 4))  # [L, out, in] -> [L, out, in / 4, 4]
        two = fours.topk(2, dim=3).indices
        winners = torch.zeros_like(fours).scatter(3, two, 1.0).flatten(2)
        lifted[group] = s + winners * (s.max() - s.min() + 1)  # each winner above all others
    return lifted


SMP_S = METHODS["smp-s"].recipe
METHODS |= {
    "smp-g": Method(smp_g),  # global: all matrices together
    "smp-t": Method(above_threshold),  # threshold: does not control the final density
    "smp-w": Method(smp_s, rank=by_size, recipe=SMP_S),
    "smp-2:4": Method(smp_l, rank=two_of_four, recipe=SMP),
    "smp-bias": Method(smp_s, trains=("scores", "vectors"), recipe=SMP_S | {"weight_lr": 1e-3}),
}
