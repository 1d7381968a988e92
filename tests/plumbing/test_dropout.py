"""Dropout on a CPU: what is dropped, what becomes of the rest, and the gradient."""

import pytest
import torch

from plumbing.graphs import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_and_the_others_make_up_for_it(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(101, 997, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropout(x, p)
    y.sum().backward()
    assert y.dtype == dtype and y.shape == x.shape
    dropped = y == 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.float().mean() - p) < 5 * deviation
    expected = torch.tensor(1.0, dtype=dtype) / (1 - p)
    assert torch.equal(y, torch.where(dropped, 0, expected)) and torch.equal(x.grad, y)
    # Neighbours have nothing to do with each other, though four come from one number.
    together = (dropped[:, 1:] & dropped[:, :-1]).float().mean()
    assert abs(together - p * p) < 10 * deviation


def test_the_seed_decides_and_rates_of_none_and_all_are_torchs():
    x = torch.randn(5, 7)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(dropout(x, 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(dropout(x, 0), x) and not dropout(x, 1.0).any()
    assert dropout(x[:0], 0.5).shape == (0, 7)
    assert (dropout(torch.ones(9999), 1 - 1e-6) == 0).sum() > 9900  # next to 1, too
    assert Dropout(0.5).eval()(x) is x and (Dropout(0.5)(torch.ones(999)) == 0).any()
