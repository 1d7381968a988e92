"""The cases for EXERCISES.md: what an answer must do, and how its mistakes are named.

A seed draws the cases anew, so that nobody can learn them by heart. The most common mistakes have
messages of their own. There are no solutions here: the checks compute the right results slowly, by
definition.
"""

import heapq
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch

SORTING = (
    "sort argsort topk kthvalue msort quantile nanquantile median nanmedian unique"
).split()  # names in torch


class Wrong(Exception):
    """A sentence that says what is wrong with an answer."""


def require(condition, sentence):
    if not condition:
        raise Wrong(sentence)


def require_tensor(found, shape, dtype, what):
    require(isinstance(found, torch.Tensor), f"{what} must be a tensor, not {type(found).__name__}")
    same = tuple(found.shape) == tuple(shape)
    require(same, f"{what} has shape {list(found.shape)}, not {list(shape)}")
    require(found.dtype == dtype, f"{what} is of {found.dtype}, not {dtype}")


def short(tensor):
    """Write a tensor's first eight numbers: "[0.3, -1, 2]"."""
    numbers = [f"{float(v):.3g}" for v in tensor.flatten()[:8]]
    if tensor.numel() > 8:
        numbers.append("...")
    return f"[{', '.join(numbers)}]"


def torch_generator(rng):
    return torch.Generator().manual_seed(rng.randrange(2**31))


# --- the checks: each takes the student's function and random numbers, and may raise Wrong ----


def schedule(function, rng):
    def density_at(*arguments):
        found = function(*arguments)
        scalar = isinstance(found, torch.Tensor) and found.ndim == 0
        number = scalar or isinstance(found, (int, float, np.floating))
        require(number, f"density_at must return a number, not {type(found).__name__}")
        return float(found)

    for _ in range(50):
        ramp, final = rng.randint(2, 1000), rng.uniform(0.01, 0.99)
        require(
            abs(density_at(0, ramp, final) - 1) < 1e-6,
            f"at step 0 everything is kept; density_at(0, {ramp}, ...) is not 1",
        )
        for step in (10 * ramp, ramp, ramp + 1):
            found = density_at(step, ramp, final)
            require(
                abs(found - final) < 1e-6,
                f"from step {ramp} on the density is {final:.3f}; "
                f"density_at({step}, {ramp}, ...) is {found:.3f}",
            )

        steps = sorted(rng.sample(range(ramp), min(5, ramp)))
        densities = [density_at(step, ramp, final) for step in steps]
        for before, after in zip(densities, densities[1:], strict=False):
            require(before >= after - 1e-6, "the density must never rise")
        for step, found in zip(steps, densities, strict=True):
            check_cubic(step, ramp, final, found)


def check_cubic(step, ramp, final, found):
    """Compare a density with the formula's, and with those of common mistakes."""
    left = (ramp - step) / ramp
    wanted = final + left * left * left * (1 - final)
    mistakes = {
        "linear": final + left * (1 - final),
        "upside down": 1 - (1 - final) * (1 - left) ** 3,
    }
    for name, mistake in mistakes.items():
        made = abs(found - mistake) <= 1e-6 and abs(mistake - wanted) >= 1e-5
        require(not made, f"this schedule is {name}, not cubic")
    require(
        abs(found - wanted) < 1e-6,
        f"density_at({step}, {ramp}, {final:.3f}) is {found:.4f}; "
        f"v + (1 - v)(1 - t/N)^3 is {wanted:.4f}",
    )


def top_v(function, rng):
    for number in range(60):
        # The first case always keeps 3 of 7. Every third case has many equal scores.
        n = rng.choice([1, 2, 7, 50, 400]) if number else 7
        if number % 3 == 0:
            values = [rng.choice([0.0, 1.0, -2.0]) for _ in range(n)]
        else:
            values = [rng.gauss(0, 1) for _ in range(n)]
        k = rng.choice([0, n, rng.randint(0, n)]) if number else 3
        scores = torch.tensor(values)
        before = scores.clone()
        kept = function(scores, k)
        require_tensor(kept, [n], torch.bool, "what top_v returns")
        require(torch.equal(before, scores), "top_v changed the scores that it was given")

        hint = "is the threshold that was found really one of the scores?"
        if len(set(values)) < n:
            hint = "some scores are equal, and only as many of them may stay as there is room for"
        count = int(kept.sum())
        case = f"top_v({short(scores)}, {k})"
        require(count == k, f"{case} keeps {count} of {n}, not {k}; {hint}")
        if 0 < k < n:
            lowest, highest = scores[kept].min().item(), scores[~kept].max().item()
            require(
                lowest >= highest,
                f"{case} keeps a score of {lowest:.3g} and removes one of {highest:.3g}",
            )


@contextmanager
def forbidden_sorting():
    """Forbid torch's, numpy's and Python's own ways to sort."""

    def refuse(*_, **__):
        raise Wrong("that sorts (or lets torch do it); find the k-th largest score by another way")

    def refuse_list(*_):
        raise Wrong(
            "tolist is not allowed here: Python's lists are too slow for millions of scores; "
            "stay with tensors"
        )

    patches = [patch("builtins.sorted", refuse), patch.object(torch.Tensor, "tolist", refuse_list)]
    for owner, names in (
        (torch, SORTING),
        (torch.Tensor, SORTING),
        (np, ("sort", "argsort", "partition", "argpartition")),
        (heapq, ("nlargest", "nsmallest", "heapify")),
    ):
        for name in names:
            if hasattr(owner, name):
                patches.append(patch.object(owner, name, refuse))
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def straight_through(score_gradient, rng):
    generator = torch_generator(rng)
    for _ in range(20):
        out, width, batch = (rng.randint(2, 6) for _ in range(3))
        weight = torch.randn(out, width, generator=generator)
        x = torch.randn(batch, width, generator=generator)
        target = torch.randn(batch, out, generator=generator)
        mask = torch.rand(out, width, generator=generator) < 0.5
        mask[0, 0], mask[0, 1] = True, False
        product = (weight * mask).requires_grad_()  # W'
        ((x @ product.T - target) ** 2).sum().backward()
        found = score_gradient(weight, mask, product.grad.clone())
        require_tensor(found, [out, width], torch.float32, "what score_gradient returns")
        # dL/dS = dL/dW' * W, because the mask counts as the identity
        wanted = torch.stack([product.grad[i] * weight[i] for i in range(out)])
        if not torch.allclose(found, wanted, atol=1e-4):
            explain_gradient(found, wanted, weight, mask, product.grad)


def explain_gradient(found, wanted, weight, mask, grad):
    """Raise Wrong, with the mistake that leads to this gradient if it is a common one."""
    mistakes = {
        "zero where the weight is removed; "
        "then a weight that is switched off could never come back": wanted * mask,
        "that of the weight, not of its score: the chain rule has another factor": grad,
        "that of the weight under the mask, not of its score": grad * mask,
        "without its sign: a score should fall as well as rise": wanted.abs(),
        "of the wrong sign": -wanted,
        "the weight alone; it lacks what comes from the loss": weight,
    }
    for sentence, mistake in mistakes.items():
        require(not torch.allclose(found, mistake, atol=1e-5), f"the gradient is {sentence}")
    raise Wrong(f"the gradient is off by up to {(found - wanted).abs().max().item():.3g}")


def rows(rank, rng):
    generator = torch_generator(rng)
    for _ in range(20):
        layers, width = rng.randint(1, 3), rng.choice([4, 10, 25])
        density = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0])
        scores = {
            "query": torch.randn(layers, 6, width, generator=generator),
            "output": torch.randn(layers, 3, 2 * width, generator=generator),
        }
        weights = {group: torch.randn_like(s) for group, s in scores.items()}
        found = rank(weights, scores)
        same = isinstance(found, dict) and found.keys() == scores.keys()
        require(same, "return a dict with the groups it was given")
        for group, s in scores.items():
            require(isinstance(found[group], torch.Tensor), f"{group} must be a tensor")
            require_tensor(found[group].float(), s.shape, torch.float32, f"what ranks {group}")
            kept = int(density * s.shape[2] + 1e-3) * s.shape[1]  # of each matrix
            order = found[group].flatten(1).argsort(dim=1, descending=True)
            mask = torch.zeros(order.shape, dtype=torch.bool)
            mask.scatter_(1, order[:, :kept], True)
            check_rows(group, s, mask.view_as(s), density)


def check_rows(group, scores, mask, density):
    """Check that each row of a mask [L, out, in] keeps its highest scores, and the right number."""
    length = scores.shape[2]
    wanted = int(density * length + 1e-3)
    counts = mask.sum(2)  # kept in each row
    columns = mask.sum(1)  # kept in each column
    equal_rows = bool((counts == wanted).all())
    equal_columns = bool((columns == columns.max()).all())
    require(
        equal_rows or not equal_columns,
        f"all columns of {group} keep equally many; the rows, s[layer, row], should",
    )
    fewest = int(counts.min())
    require(equal_rows, f"a row of {group} keeps {fewest} of {length}, not {wanted}")
    if 0 < wanted < length:
        lowest = scores.masked_fill(~mask, torch.inf).amin(2)
        highest = scores.masked_fill(mask, -torch.inf).amax(2)
        right = bool((lowest >= highest).all())
        require(right, "a row keeps a lower score than one that it removes")


def n_of_m(two_of_four, rng):
    generator = torch_generator(rng)
    for _ in range(20):
        scores = torch.randn(rng.randint(1, 5), 4 * rng.randint(1, 6), generator=generator)
        if rng.random() < 0.3:
            scores = scores.round()  # makes equal scores
        found = two_of_four(scores)
        require_tensor(found, scores.shape, torch.bool, "what two_of_four returns")
        # The rows follow each other, and their lengths are multiples of four.
        for four, kept in zip(scores.view(-1, 4), found.reshape(-1, 4), strict=True):
            count = int(kept.sum())
            require(count == 2, f"of {short(four)} in a row, {count} are kept, not 2")
            require(
                four[kept].min() >= four[~kept].max(),
                f"of {short(four)} the two highest should stay; kept are {short(four[kept])}",
            )


def is_index(n):
    if isinstance(n, torch.Tensor):
        return n.ndim == 0 and n.dtype == torch.long
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool)


def dead(dead_neurons, rng):
    generator = torch_generator(rng)
    for _ in range(30):
        neurons, width = rng.randint(1, 12), rng.randint(1, 5)
        incoming = torch.randn(neurons, width, generator=generator)
        outgoing = torch.randn(width, neurons, generator=generator)
        no_input = [n for n in range(neurons) if rng.random() < 0.3]
        no_output = [n for n in range(neurons) if rng.random() < 0.3]
        incoming[no_input], outgoing[:, no_output] = 0, 0
        if width > 1:
            incoming[:, 0] = 0  # a neuron with some zeros is alive
        if width > 2:  # and so is one whose weights cancel
            incoming[:, 1], outgoing[1] = -incoming[:, 2], -outgoing[2]
            incoming[:, 3:], outgoing[0], outgoing[3:] = 0, 0, 0

        found = dead_neurons(incoming, outgoing)
        fine = isinstance(found, (list, set, tuple)) and all(is_index(n) for n in found)
        require(fine, "dead_neurons must return a list of indices, [0, 3] say")
        check_dead({int(n) for n in found}, set(no_input), set(no_output), neurons)


def check_dead(found, no_input, no_output, neurons):
    """Compare the neurons that were found dead with those that are."""
    wanted = no_input | no_output
    both = no_input & no_output
    require(found != both or found == wanted, "one side without weights is enough")
    missed = sorted(wanted - found)
    if missed:
        side = "incoming" if missed[0] in no_input else "outgoing"
        raise Wrong(f"neuron {missed[0]} of {neurons} has no {side} weights, and is not named")
    alive = sorted(found - wanted)
    if alive:
        raise Wrong(
            f"neuron {alive[0]} of {neurons} is named, and has weights on both sides, "
            "which may cancel"
        )


CHECKS = {
    "density_at": schedule,
    "top_v": top_v,
    "score_gradient": straight_through,
    "rank": rows,
    "two_of_four": n_of_m,
    "dead_neurons": dead,
}
