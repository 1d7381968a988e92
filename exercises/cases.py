"""The cases for EXERCISES.md. The message of an assertion is what the student reads.

Numbers are drawn anew for every seed, so that nobody can learn them by heart. What is expected was
computed by hand, or comes from topk or from autograd. There are no solutions here.
"""

import ast
import copy
import random

import torch


def check_tensor(found, shape, what):
    assert isinstance(found, torch.Tensor), f"{what} must be a tensor, not {type(found).__name__}"
    assert found.shape == shape, f"{what} has shape {list(found.shape)}, not {list(shape)}"


def check_highest(kept, scores, k, what):
    """A mask must keep the k highest of some scores [n]. Of equal scores, any may stay."""
    assert kept.dtype == torch.bool, f"{what} is of {kept.dtype}, not torch.bool"
    count = int(kept.sum())
    hint = ""
    if len(scores.unique()) < len(scores):
        hint = "; some scores are equal, and only as many of them may stay as there is room for"
    assert count == k, f"{what} keeps {count} of {len(scores)}, not {k}{hint}"

    found = scores[kept].topk(k).values
    wanted = scores.topk(k).values
    right = torch.equal(found, wanted)
    assert right, f"{what} keeps the scores {short(found)}; the highest are {short(wanted)}"


def short(tensor):
    """Write the first eight numbers: "[0.3 -1 2]"."""
    numbers = [f"{value:.3g}" for value in tensor.flatten()[:8]]
    return f"[{' '.join(numbers)}]"


# --- the checks: each calls the student's function --------------------------------------------

CUBES = {  # t/N: (1 - t/N)^3
    0: 1,
    0.25: 27 / 64,
    0.5: 1 / 8,
    0.75: 1 / 64,
    1: 0,
    1.25: 0,  # after step N, the density stays
    10: 0,
}


def check_density_at(density_at):
    for _ in range(20):
        ramp = random.randrange(4, 1000, 4)
        final = random.uniform(0.01, 0.99)
        for time, cube in CUBES.items():
            step = int(time * ramp)
            wanted = final + (1 - final) * cube
            found = density_at(step, ramp, final)
            case = f"density_at({step}, {ramp}, {final:.4f})"
            assert abs(found - wanted) < 1e-6, f"{case} is {found:.4f}, not {wanted:.4f}"


SORTING = (
    "sort sorted argsort msort topk kthvalue unique median nanmedian quantile nanquantile "
    "partition argpartition nlargest nsmallest heapify heappush tolist"
).split()


def check_top_v(top_v):
    for n in (7, 1, 2, 50, 400):
        for k in (n // 2, 0, 1, n):
            different = torch.randn(n)
            equal = different.round()  # many of them
            for scores in (different, equal):
                kept = top_v(scores.clone(), k)
                case = f"top_v({short(scores)}, {k})"
                check_tensor(kept, scores.shape, case)
                check_highest(kept, scores, k, case)


def refuse_sorting(path):
    """A file must not use what sorts. Variables may have such a name."""
    hint = "find the k-th largest score without sorting, and stay with tensors"
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:  # scores.sort, sorted(scores), from torch import sort
            case ast.Attribute(attr=name) | ast.Call(func=ast.Name(id=name)) | ast.alias(name=name):
                assert name not in SORTING, f"no {name} (line {node.lineno}): {hint}"


def check_score_gradient(score_gradient):
    for _ in range(20):
        weight = torch.randn(3, 5)
        grad = torch.randn(3, 5)  # dL/dW'
        mask = torch.randperm(15).view(3, 5) < 7

        # M counts as the identity. So let autograd multiply by scores that equal the mask.
        scores = mask.float().requires_grad_()
        (weight * scores).backward(grad)
        wanted = scores.grad

        found = score_gradient(weight, mask, grad.clone())
        check_tensor(found, weight.shape, "the gradient")
        mistakes = {
            "zero where a weight is removed, so that it could never come back": wanted * mask,
            "that of the weight, not of its score; the chain rule has another factor": grad,
            "that of the weight under its mask, not that of its score": grad * mask,
            "of the wrong sign": -wanted,
        }
        for sentence, mistake in mistakes.items():
            assert not torch.allclose(found, mistake), f"the gradient is {sentence}"
        right = torch.allclose(found, wanted, atol=1e-5)
        assert right, f"the gradient is {short(found)}, not {short(wanted)}"


def check_rank(rank):
    for _ in range(20):
        scores = {"query": torch.randn(2, 6, 10), "output": torch.randn(2, 3, 20)}
        weights = {}
        for group in scores:
            weights[group] = torch.randn_like(scores[group])
        found = rank(weights, copy.deepcopy(scores))
        assert isinstance(found, dict), "rank must return a dict"
        for group, matrices in scores.items():
            assert group in found, f"rank returns no {group}"
            check_tensor(found[group], matrices.shape, f"what ranks {group}")
            k = random.randint(0, 10)  # kept of each row
            for matrix, ranks in zip(matrices, found[group], strict=True):
                check_rows(matrix, ranks, k, f"a row of {group}")


def check_rows(matrix, ranks, k, what):
    """Keep what is ranked highest in a matrix [out, in]. In each row, that must be k scores."""
    kept = torch.zeros(matrix.numel(), dtype=torch.bool)
    kept[ranks.flatten().topk(k * len(matrix)).indices] = True
    for row, kept_of_row in zip(matrix, kept.view_as(matrix), strict=True):
        check_highest(kept_of_row, row, k, what)


def check_two_of_four(two_of_four):
    for _ in range(20):
        scores = torch.randn(5, 12).round(decimals=1)  # makes some equal scores
        found = two_of_four(scores.clone())
        check_tensor(found, scores.shape, "what two_of_four returns")
        # The rows follow each other, and their lengths are multiples of four.
        for four, kept in zip(scores.view(-1, 4), found.reshape(-1, 4), strict=True):
            check_highest(kept, four, 2, f"of {short(four)} in a row, two_of_four")


def check_dead_neurons(dead_neurons):
    for _ in range(20):
        # The weights of a living neuron sum to zero, and some of them are zero.
        incoming = torch.randn(8, 1) * torch.tensor([0.0, 1.0, -1.0])
        outgoing = incoming.T.clone()
        no_input = random.sample(range(8), 3)
        no_output = random.sample(range(8), 2)
        incoming[no_input] = 0
        outgoing[:, no_output] = 0

        wanted = sorted({*no_input, *no_output})
        found = dead_neurons(incoming, outgoing)
        assert isinstance(found, list), "dead_neurons must return a list, such as [0, 3]"
        hint = "one side without weights is enough, and weights that cancel are weights"
        assert sorted(found) == wanted, f"dead are {wanted}, not {sorted(found)}; {hint}"
