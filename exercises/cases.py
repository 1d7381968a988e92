"""The cases of the exercises of EXERCISES.md: what is asked of an answer, and in which words it is told what is wrong.

Cases are drawn anew from a seed, so that they cannot be learnt by heart, and the commonest mistakes are named. There
are no solutions in here; what an answer is compared with is computed the slow way, by definition.
"""

import heapq
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch

SORTING = (
    "sort",
    "argsort",
    "topk",
    "kthvalue",
    "msort",
    "quantile",
    "nanquantile",
    "median",
    "nanmedian",
    "unique",
)


class Wrong(Exception):
    """What is wrong, as a sentence."""


def require(condition, sentence):
    if not condition:
        raise Wrong(sentence)


def require_tensor(found, shape, dtype, what):
    require(isinstance(found, torch.Tensor), f"{what} must be a tensor, not {type(found).__name__}")
    require(
        tuple(found.shape) == tuple(shape),
        f"{what} has shape {list(found.shape)}, not {list(shape)}",
    )
    require(found.dtype == dtype, f"{what} is of {found.dtype}, not {dtype}")


def short(tensor):
    return (
        "["
        + ", ".join(f"{float(v):.3g}" for v in tensor.flatten()[:8])
        + (", ...]" if tensor.numel() > 8 else "]")
    )


# --- the checks: (the student's function, random numbers) -> None, or Wrong ------------------------------------


def schedule(function, rng):
    def density_at(*given):
        found = function(*given)
        number = isinstance(found, (int, float, np.floating)) or (
            isinstance(found, torch.Tensor) and found.ndim == 0
        )
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
                f"from step {ramp} on the density is {final:.3f}; density_at({step}, {ramp}, ...) is {found:.3f}",
            )
        steps = sorted(rng.sample(range(ramp), min(5, ramp)))
        found = [density_at(step, ramp, final) for step in steps]
        require(
            all(a >= b - 1e-6 for a, b in zip(found, found[1:], strict=False)),
            "the density must never rise",
        )
        for step, value in zip(steps, found, strict=True):
            left = (ramp - step) / ramp
            wanted = final + left * left * left * (1 - final)
            kinds = {
                "linear": final + left * (1 - final),
                "upside down": 1 - (1 - final) * (1 - left) ** 3,
            }
            for name, other in kinds.items():
                require(
                    abs(value - other) > 1e-6 or abs(other - wanted) < 1e-5,
                    f"this schedule is {name}, not cubic",
                )
            require(
                abs(value - wanted) < 1e-6,
                f"density_at({step}, {ramp}, {final:.3f}) is {value:.4f}; v + (1 - v)(1 - t/N)^3 is {wanted:.4f}",
            )


def top_v(function, rng):
    for number in range(60):
        n = rng.choice([1, 2, 7, 50, 400]) if number else 7
        values = [
            rng.choice([0.0, 1.0, -2.0]) if number % 3 == 0 else rng.gauss(0, 1) for _ in range(n)
        ]
        scores, k = torch.tensor(values), rng.choice([0, n, rng.randint(0, n)]) if number else 3
        before = scores.clone()
        kept = function(scores, k)
        require_tensor(kept, [n], torch.bool, "what top_v returns")
        require(torch.equal(before, scores), "top_v changed the scores that it was given")
        count, case = int(kept.sum()), f"top_v({short(scores)}, {k})"
        ties = len(set(values)) < n
        hint = "; is the threshold that was found really one of the scores?"
        if ties:
            hint = "; some scores are equal, and of equal ones only so many may stay as there is room for"
        require(count == k, f"{case} keeps {count} of {n}, not {k}{hint}")
        if 0 < k < n:
            lowest, highest = scores[kept].min().item(), scores[~kept].max().item()
            require(
                lowest >= highest,
                f"{case} keeps a score of {lowest:.3g} and removes one of {highest:.3g}",
            )


@contextmanager
def forbidden_sorting():
    """torch's and Python's own ways to sort are not to be used here."""

    def refuse(*_, **__):
        raise Wrong("that sorts (or lets torch do it); find the k-th largest score by another way")

    def refuse_list(*_):
        raise Wrong(
            "tolist is not allowed here: Python's lists are too slow for millions of scores; stay with tensors"
        )

    patches = [
        patch.object(where, name, refuse)
        for where in (torch, torch.Tensor)
        for name in SORTING
        if hasattr(where, name)
    ]
    patches += [
        patch.object(np, name, refuse) for name in ("sort", "argsort", "partition", "argpartition")
    ]
    patches += [patch.object(heapq, name, refuse) for name in ("nlargest", "nsmallest", "heapify")]
    patches += [patch("builtins.sorted", refuse), patch.object(torch.Tensor, "tolist", refuse_list)]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def straight_through(score_gradient, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for _ in range(20):
        out, width, batch = (rng.randint(2, 6) for _ in range(3))
        weight, x, target = (
            torch.randn(s, generator=generator)
            for s in ((out, width), (batch, width), (batch, out))
        )
        mask = torch.rand(out, width, generator=generator) < 0.5
        mask[0, 0], mask[0, 1] = True, False
        product = (weight * mask).requires_grad_()
        ((x @ product.T - target) ** 2).sum().backward()
        found = score_gradient(weight, mask, product.grad.clone())
        require_tensor(found, [out, width], torch.float32, "what score_gradient returns")
        wanted = torch.stack(
            [product.grad[i] * weight[i] for i in range(out)]
        )  # the mask counts as the identity
        if torch.allclose(found, wanted, atol=1e-4):
            continue
        mistakes = {
            "zero where the weight is removed; then a weight that is switched off could never come back": wanted
            * mask,
            "that of the weight, not of its score: the chain rule has another factor": product.grad,
            "that of the weight under the mask, not of its score": product.grad * mask,
            "without its sign: a score should fall as well as rise": wanted.abs(),
            "of the wrong sign": -wanted,
            "the weight alone; it lacks what comes from the loss": weight,
        }
        for sentence, mistake in mistakes.items():
            require(not torch.allclose(found, mistake, atol=1e-5), f"the gradient is {sentence}")
        raise Wrong(f"the gradient is off by up to {(found - wanted).abs().max().item():.3g}")


def rows(masking, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for _ in range(20):
        layers, width, density = (
            rng.randint(1, 3),
            rng.choice([4, 10, 25]),
            rng.choice([0.0, 0.2, 0.5, 0.8, 1.0]),
        )
        scores = {"query": torch.randn(layers, 6, width, generator=generator)}
        scores |= {"output": torch.randn(layers, 3, 2 * width, generator=generator)}
        found = masking(scores, torch.ones(2, layers), density, True)
        require(
            isinstance(found, dict) and found.keys() == scores.keys(),
            "return a dict with the groups it was given",
        )
        for group, s in scores.items():
            require_tensor(found[group], s.shape, torch.bool, f"the mask of {group}")
            wanted = int(density * s.shape[2] + 1e-3)
            counts = found[group].sum(2)
            columns = found[group].sum(1)
            mixed_up = bool((columns == columns.max()).all()) and not bool((counts == wanted).all())
            require(
                not mixed_up,
                f"all columns of {group} keep equally many; the rows, s[layer, row], should",
            )
            kept, asked = int(counts.sum()), wanted * counts.numel()
            require(
                kept == asked,
                f"{kept} of {s.numel()} weights are kept at density {density}, not {asked}",
            )
            require(
                bool((counts == wanted).all()),
                f"a row of {group} keeps {int(counts.min())} of {s.shape[2]}, not {wanted}",
            )
            if 0 < wanted < s.shape[2]:
                lowest = s.masked_fill(~found[group], torch.inf).amin(2)
                highest = s.masked_fill(found[group], -torch.inf).amax(2)
                require(
                    bool((lowest >= highest).all()),
                    "a row keeps a lower score than one that it removes",
                )


def n_of_m(two_of_four, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for _ in range(20):
        scores = torch.randn(rng.randint(1, 5), 4 * rng.randint(1, 6), generator=generator)
        if rng.random() < 0.3:
            scores = scores.round()  # equal scores
        found = two_of_four(scores)
        require_tensor(found, scores.shape, torch.bool, "what two_of_four returns")
        for i in range(scores.shape[0]):
            for j in range(0, scores.shape[1], 4):
                four, kept = scores[i, j : j + 4], found[i, j : j + 4]
                require(
                    int(kept.sum()) == 2,
                    f"of {short(four)} in a row, {int(kept.sum())} are kept, not 2",
                )
                require(
                    four[kept].min() >= four[~kept].max(),
                    f"of {short(four)} the two highest should stay; kept are {short(four[kept])}",
                )


def is_index(n):
    whole = isinstance(n, (int, np.integer)) or (
        isinstance(n, torch.Tensor) and n.ndim == 0 and n.dtype == torch.long
    )
    return whole and not isinstance(n, bool)


def dead(dead_neurons, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    for _ in range(30):
        neurons, width = rng.randint(1, 12), rng.randint(1, 5)
        incoming, outgoing = (
            torch.randn(neurons, width, generator=generator),
            torch.randn(width, neurons, generator=generator),
        )
        no_input = [n for n in range(neurons) if rng.random() < 0.3]
        no_output = [n for n in range(neurons) if rng.random() < 0.3]
        incoming[no_input], outgoing[:, no_output] = 0, 0
        if width > 1:
            incoming[:, 0] = 0  # a neuron with some zeros is alive
        if width > 2:  # and one whose weights cancel
            incoming[:, 1], outgoing[1] = -incoming[:, 2], -outgoing[2]
            incoming[:, 3:], outgoing[0], outgoing[3:] = 0, 0, 0
        found = dead_neurons(incoming, outgoing)
        fine = isinstance(found, (list, set, tuple)) and all(is_index(n) for n in found)
        require(fine, "dead_neurons must return a list of indices, [0, 3] say")
        found = [int(n) for n in found]
        wanted = set(no_input) | set(no_output)
        both = set(no_input) & set(no_output)
        require(set(found) != both or set(found) == wanted, "one side without weights is enough")
        if missed := sorted(wanted - set(found)):
            side = "incoming" if missed[0] in no_input else "outgoing"
            raise Wrong(f"neuron {missed[0]} of {neurons} has no {side} weights, and is not named")
        if named := sorted(set(found) - wanted):
            raise Wrong(
                f"neuron {named[0]} of {neurons} is named, and has weights on both sides, which may cancel"
            )


CHECKS = {
    "density_at": schedule,
    "top_v": top_v,
    "score_gradient": straight_through,
    "masking": rows,
    "two_of_four": n_of_m,
    "dead_neurons": dead,
}
