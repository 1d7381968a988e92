"""Keep the k highest scores of each matrix: exactly k, or cheaply about k.

What it is: thresholds, and masks of what reaches them. What it is not: it does not say how many to keep; that is
mask.py. Sources: none.

    masks = highest({"query": scores}, torch.tensor([[500, 500]]), exact=True)  # scores [2, out, in], 500 of each
"""

import math

import numpy as np
import torch


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


SAMPLES, SCATTER = 1 << 16, 32749  # a prime


def about_kth_largest(scores, k):
    """kth_largest of several groups, off by up to 0.1 % of n in rank (and by ties): cheap on a GPU.

    scores: G tensors [L, n], n of their own; k [G, L] -> [G, L]. Sorts a sample of every row and looks up where the
    k-th should be; then counts how many scores really are at least that large, and moves on by as many samples.
    """
    sizes = [s.shape[1] for s in scores]
    m = min(*sizes, SAMPLES)
    # Multiples of a prime modulo n: evenly over the rows and columns of a matrix; every tenth, say, misses columns.
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
