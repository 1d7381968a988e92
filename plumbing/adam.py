"""Adam as BERT's authors and the reference code run it: rates that rise and fall, and their place for eps.

    optimizer = make_optimizer(learner.named_parameters(), "masks.scores.", 2e-2, 3e-5)
    set_rates(optimizer, step, total, warmup=0)
"""

import math

import torch


def make_optimizer(named, prefix, own_lr, lr, decay=0.01):
    """AdamW on (name, parameter) pairs, decaying only matrices, as BERT's authors fine-tune, at a highest rate of lr.

    Parameters whose names begin with the prefix have a highest rate of their own, and no decay.
    """
    special, matrices, vectors = [], [], []
    for name, parameter in named:
        if name.startswith(prefix):
            special.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = []
    for parameters, rate, its_decay in ((special, own_lr, 0.0), (matrices, lr, decay), (vectors, lr, 0.0)):
        if parameters:
            groups.append({"params": parameters, "lr": rate, "highest_lr": rate, "weight_decay": its_decay})
    return torch.optim.AdamW(groups, fused=True)


def rate_at(step, total, warmup=0):
    """Share of the highest learning rate at a step: up in `warmup` steps, then down to 0 at total, both linearly."""
    return (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)


def set_rates(optimizer, step, total, warmup=0):
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * rate_at(step, total, warmup)
        # The reference code's Adam adds eps to the uncorrected second moment; torch's to the corrected one.
        group["eps"] = 1e-8 / math.sqrt(1 - group["betas"][1] ** (step + 1))
