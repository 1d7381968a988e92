"""Adam as BERT's authors and the reference code run it: rates that rise and fall, and their place for eps.

    optimizer = make_optimizer([(scores, 2e-2, 0.0), (matrices, 3e-5, 0.01)])
    set_rates(optimizer, step, total, warmup=0)
"""

import math

import torch


def make_optimizer(groups):
    """AdamW on groups of (parameters, highest learning rate, weight decay); empty ones are left out."""
    groups = [
        {"params": parameters, "lr": rate, "highest_lr": rate, "weight_decay": decay}
        for parameters, rate, decay in groups
        if parameters
    ]
    return torch.optim.AdamW(groups, fused=True)


def rate_at(step, total, warmup=0):
    """Share of the highest learning rate at a step: up in `warmup` steps, then down to 0 at total, both linearly."""
    return (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)


def set_rates(optimizer, step, total, warmup=0):
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * rate_at(step, total, warmup)
        # The reference code's Adam adds eps to the uncorrected second moment; torch's to the corrected one.
        group["eps"] = 1e-8 / math.sqrt(1 - group["betas"][1] ** (step + 1))
