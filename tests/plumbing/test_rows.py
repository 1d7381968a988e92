"""Rows in one array: what a list of lists would say, and its digest."""

import hashlib
import random

import numpy as np
import pytest
from conftest import rows_of

from plumbing.rows import sha256_of_rows

RNG = random.Random(0)
LISTS = [[RNG.randrange(2**31) for _ in range(RNG.randrange(9))] for _ in range(50)]


@pytest.mark.parametrize("lists", [[], [[]], [[7, 8, 9], [], [5]], LISTS])
def test_rows_are_those_of_a_list_of_lists(lists):
    rows = rows_of(lists)
    assert [list(row) for row in rows] == lists and len(rows) == len(lists)
    for i in range(-len(lists), len(lists)):
        assert list(rows[i]) == lists[i] and list(rows[np.int64(i)]) == lists[i]
    for beyond in (len(lists), len(lists) + 5):
        with pytest.raises(IndexError):
            rows[beyond]
    assert np.array(rows.numbers).dtype == np.int32


@pytest.mark.parametrize("labels", [[], [0, 2, 1], [4.75, 1e-7], [(3, 4), (0, 0)]])
@pytest.mark.parametrize("lists", [[], [[7]], LISTS])
def test_the_digest_is_that_of_the_whole_text(lists, labels):
    """Mask files hold it, so it must stay."""
    expected = hashlib.sha256(repr((lists, labels)).encode()).hexdigest()
    assert sha256_of_rows(rows_of(lists), labels) == expected == sha256_of_rows(lists, labels)
