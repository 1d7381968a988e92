"""Variations on SMP: other counts, other rankings, and biases that train too.

SMP-G and SMP-T are the paper's own (Table 3). results/README.md has the figures of all.

    python train.py --method smp-bias --sparsity 0.9
"""

import torch

from mask import METHODS, Method, smp_l, smp_s, thresholds

# --- how many: two more answers -------------------------------------------------------------------


def smp_g(importance, sizes, density, scores, exact):
    """SMP-G: keep the int(v * n) highest scores of the whole model, however many of each matrix.

    Some matrices may lose nearly everything.
    """
    # One row of all scores, as if the model were a single matrix.
    flat = [s.flatten() for s in scores.values()]
    every = torch.cat(flat)[None]  # [1, weights of the model]
    layers = importance.shape[1]
    total = (density * sizes.sum() * layers).long().to(every.device)  # how many stay
    cut = thresholds([every], total.view(1, 1), exact)[0, 0]
    at_least = count(scores, lambda s: s >= cut)  # [G, L]
    if not exact:
        return at_least

    # The scores above the cut stay. Ties fill what room is left, matrix by matrix.
    above = count(scores, lambda s: s > cut)
    ties = at_least - above
    earlier_ties = ties.flatten().cumsum(0).view_as(ties) - ties  # those of the matrices before
    room = total - above.sum() - earlier_ties
    filled = room.clamp(min=0).minimum(ties)
    return above + filled


def count(scores, passes):
    """How many scores of each matrix pass a test -> [G, L]. passes: [L, out, in] -> bool."""
    counts = []
    for s in scores.values():
        counts.append(passes(s).sum((1, 2)))
    return torch.stack(counts)


def above_threshold(importance, sizes, density, scores, exact, tau=0.1, least=0.0):
    """SMP-T: count the weights with sigmoid(S) > tau. This does not control the density.

    least: the share of its weights that each matrix keeps in any case. exact: keep no more of a
    matrix than SMP-G would.
    """
    counts = count(scores, lambda s: torch.sigmoid(s) > tau)
    floor = (least * sizes).long()  # [G, 1]
    counts = counts.maximum(floor.to(counts.device))
    if exact:
        most = smp_g(importance, sizes, density, scores, exact)
        counts = counts.minimum(most)
    return counts


# --- which ones: two more rankings ----------------------------------------------------------------


def by_size(weights, scores):
    """smp-w: rank by |W| sigmoid(S), so that a small weight needs a higher score to stay."""
    ranked = {}
    for group, s in scores.items():
        ranked[group] = weights[group].abs() * torch.sigmoid(s)
    return ranked


def two_of_four(weights, scores):
    """smp-2:4: rank the two highest of each four weights in a row before all other weights.

    So at density 0.5 exactly two of four stay, a pattern that some GPUs support. In training on a
    GPU, where thresholds are estimated, 0.1 % may break it. Raises ValueError if rows cannot be
    divided into fours.
    """
    lifted = {}
    for group, s in scores.items():
        width = s.shape[2]
        if width % 4:
            raise ValueError(
                f"--method smp-2:4 needs rows of fours; those of {group} have {width} weights"
            )
        fours = s.detach().unflatten(2, (-1, 4))  # [L, out, in] -> [L, out, in / 4, 4]
        two = fours.topk(2, dim=3).indices
        winners = torch.zeros_like(fours).scatter(3, two, 1.0)  # 1 at the two, else 0
        winners = winners.flatten(2)  # [L, out, in]
        lift = s.max() - s.min() + 1  # raises each winner above all others
        lifted[group] = s + winners * lift
    return lifted


SMP_S = METHODS["smp-s"].recipe
SMP_BIAS = SMP_S | {"weight_lr": 1e-3}
METHODS |= {
    "smp-g": Method(smp_g),  # global: all matrices together
    "smp-t": Method(above_threshold),  # threshold: does not control the final density
    "smp-w": Method(smp_s, rank=by_size, recipe=SMP_S),
    "smp-2:4": Method(smp_l, rank=two_of_four),
    "smp-bias": Method(smp_s, trains=("scores", "vectors"), recipe=SMP_BIAS),
}
