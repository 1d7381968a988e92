"""mask.py against hand-computed cases, recorded reference values and invariants."""

import itertools
import math

import numpy as np
import pytest
import torch

import mask
import train
from mask import (
    METHODS,
    Masks,
    Method,
    density_at,
    penalty_at,
    proportional_densities,
    whole_counts,
)


def groups(layers=3, out=5, inp=7, seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(name):
        return {f"{name}{i}": torch.randn(out, inp, generator=g) for i in range(layers)}

    return {"query": make("q"), "key": make("k")}


def with_scores(masks, seed=1, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    for i, s in enumerate(masks.scores.values()):
        scale = spread * torch.linspace(0.2, 2, len(s))[:, None, None] * (i + 1)
        s.data = torch.randn(s.shape, generator=g) + scale
    return masks


@pytest.mark.parametrize(
    # Recorded from the reference code: v = 0.3, N = 40, lambda = 400, T = 60.
    ("step", "density", "penalty"),
    [
        (0, 1.0, 0.0), (1, 0.9488015625, 19.668518518518585), (5, 0.7689453125, 91.89814814814815),
        (20, 0.3875, 281.4814814814814), (39, 0.3000109375, 382.85), (40, 0.3, 385.18518518518516),
        (59, 0.3, 399.9981481481482),
    ],
)  # fmt: skip
def test_schedules_equal_the_reference(step, density, penalty):
    assert density_at(step, 40, 0.3) == pytest.approx(density, abs=1e-9)
    assert penalty_at(step, 60) == pytest.approx(penalty, abs=1e-9)


def test_density_schedule_ends():
    assert density_at(0, 0, 0.4) == density_at(7, 0, 0.4) == 0.4  # no ramp
    assert density_at(5, 10, 0.5, "linear") == 0.75


@pytest.mark.parametrize(
    ("hold", "ramp", "densities"),
    [
        (0, 0, [0.2, 0.2, 0.2, 0.2, 0.2]),  # from the first step on
        (2, 2, [1, 1, 0.2, 0.2, 0.2]),  # at once, but not before
        (0, 4, [1, 0.8, 0.6, 0.4, 0.2]),
        (2, 4, [1, 1, 1, 0.6, 0.2]),
        (4, 4, [1, 1, 1, 1, 0.2]),  # for the last evaluation alone
        (3, 2, [1, 1, 1, 0.2, 0.2]),  # held for longer: at once, too
    ],
)
def test_nothing_is_removed_before_hold(hold, ramp, densities):
    assert [density_at(t, ramp, 0.2, "linear", hold) for t in range(5)] == pytest.approx(densities)


def test_schedules_of_one_step():
    assert [density_at(t, 1, 0.2, hold=h) for h in (0, 1) for t in (0, 1)] == [1, 0.2, 1, 0.2]


def test_proportional_densities_hand_computed():
    share = torch.tensor([[0.3, 0.1, 0.6], [0.2, 0.2, 0.2]], dtype=torch.float64)
    # 0.5 * 3 * share, nothing overflows
    assert proportional_densities(share, 0.5).tolist() == [
        pytest.approx([0.45, 0.15, 0.9]), pytest.approx([0.5, 0.5, 0.5])]  # fmt: skip
    # 2.4 * share = .72 .24 1.44. The third is full, and the others share 1.4 as 3:1 = 1.05 .35. Now
    # the first is full, too, and the second takes .4.
    assert proportional_densities(share, 0.8)[0].tolist() == pytest.approx([1.0, 0.4, 1.0])
    assert proportional_densities(share, 1.0).tolist() == [pytest.approx([1.0] * 3)] * 2


@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 0.779, 0.8, 0.95, 1.0])
def test_proportional_densities_keep_the_mean_and_the_order(density):
    share = torch.rand(6, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    d = proportional_densities(share, density)
    assert d.mean(1).tolist() == pytest.approx([density] * 6, abs=1e-12)
    assert d.max() <= 1 and d.min() > 0
    assert (d.gather(1, share.argsort(1)).diff(dim=1) >= -1e-12).all()


def test_whole_counts_give_the_remainder_to_the_largest_fractions():
    # Three groups: by size, nothing to give, and the first of equal fractions.
    counts = [[2.9, 5.7, 6.4], [100.0, 50.0, 50.0], [2.9995, 2.9995, 2.9995]]
    found = whole_counts(
        torch.tensor(counts, dtype=torch.float64), torch.tensor([[15], [200], [8]])
    )
    assert found.tolist() == [[3, 6, 6], [100, 50, 50], [3, 3, 2]]


class Counts(Masks):
    """Says only how many weights of each matrix stay."""

    def choose_stacked(self, importance, density, exact):
        k = self.method.how_many(importance.double(), self.sizes, density, self.scores, exact)
        return dict(zip(self.names, k, strict=True))


@pytest.mark.parametrize(
    "n", [3_266, 147_456, 589_824, 1_000_000, 2_359_296, 10_616_832, 84_934_656]
)
def test_counts_are_those_of_the_decimal_that_was_asked_for(n):
    """Masks.choose keeps exactly as many. The reference code's int(v * n) is one less at times."""
    masks = Counts(groups(1), METHODS["smp-l"])
    masks.sizes.fill_(n)  # as if the matrices were that large
    for thousandths in range(1, 1000):
        exact = (1000 - thousandths) * n // 1000
        assert masks.choose(1 - thousandths / 1000) == {"q0": exact, "k0": exact}
        # Two ways to write the same density. Where a product is off, rounding took one weight.
        for v in (1 - thousandths / 1000, (1000 - thousandths) / 1000):
            assert int(v * n) in (exact, exact - 1)


def test_training_keeps_what_python_counts():
    """smp-l in training keeps int(v * n) of each matrix. In float32 some counts are off by one."""
    # The matrices of bert-base and MiniLM, and odd ones.
    rng = np.random.default_rng(0)
    numbers = [768 * 768, 3072 * 768, 384 * 384, 1536 * 384, 35, *rng.integers(1, 3072 * 768, 5)]
    numbers = [int(n) for n in numbers]
    sizes = torch.tensor(numbers, dtype=torch.float64)[:, None]  # [10, 1]
    importance = torch.ones(10, 2, dtype=torch.float64)

    args, pairs, in_float32 = train.parse_args(["--task", "rte"]), 0, 0
    for steps, target in itertools.product((60, 598, 7800), (0.5, 0.1, 0.03)):
        schedule = train.make_schedule(args, steps, target)
        densities, _ = train.schedule_on_device(schedule, torch.device("cpu"))
        found = [mask.smp_l(importance, sizes, v, {}, exact=False) for v in densities]
        expected = [[int(v * n) for n in numbers] for v, _ in schedule]
        first, second = torch.stack(found).unbind(2)  # [steps + 1, 10] of both layers
        assert first.tolist() == expected and second.equal(first)
        rounded = (densities.float() * sizes.float()).long().T
        in_float32 += int((rounded != first).sum())
        pairs += first.numel()
    assert pairs > 10_000 and in_float32 > 100  # so float32 would be noticed


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sparsity"), [("smp-l", 0.7), ("smp-s", 0.3)])
def test_more_weights_than_float32_can_count(method, sparsity):
    weights = {f"w{i}": torch.zeros(2900, 2900) for i in range(2)}
    masks = Masks({"g": weights}, METHODS[method])
    masks.scores["g"].data.normal_(generator=torch.Generator().manual_seed(0))
    kept = sum(int(m.sum()) for m in masks.choose(1 - sparsity).values())
    assert kept == (10 - round(10 * sparsity)) * 16_820_000 // 10


def test_a_group_whose_sigmoids_are_all_zero_shares_evenly():
    masks = Masks(groups(4, 20, 50), METHODS["smp-s"])
    for s in masks.scores.values():
        s.data.fill_(-200.0)
    assert [int(m.sum()) for m in masks.choose(0.5).values()] == [500] * 8
    masks(torch.tensor(0.5))


def top_k(scores, k, exact):
    """mask.highest of a single group."""
    return mask.highest({"g": scores}, torch.as_tensor(k)[None], exact)["g"]


def test_top_k_by_hand_and_with_ties():
    s = torch.tensor([[[3.0, 1.0], [2.0, 4.0]], [[1.0, 1.0], [1.0, 0.0]]])
    assert top_k(s, torch.tensor([2, 2]), exact=True).tolist() == [
        [[True, False], [False, True]], [[True, True], [False, False]]]  # fmt: skip
    assert top_k(s, torch.tensor([2, 2]), exact=False)[1].tolist() == [[True, True], [True, False]]
    assert top_k(s, torch.tensor([0, 4]), exact=True).sum((1, 2)).tolist() == [0, 4]


def test_top_k_equals_a_stable_sort():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (4, 9, 11), generator=g).float()  # many ties
    for k in ([0, 1, 50, 99], [98, 33, 7, 60]):
        keep = top_k(scores, torch.tensor(k), exact=True)
        for s, kept, n in zip(scores.flatten(1), keep.flatten(1), k, strict=True):
            expected = torch.zeros(99, dtype=torch.bool)
            expected[s.sort(descending=True, stable=True).indices[:n]] = True
            assert kept.equal(expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("method", ["smp-l", "smp-s"])
def test_saved_masks_keep_exactly_what_was_asked(method, sparsity):
    density = 1 - sparsity
    masks = with_scores(Masks(groups(4, 20, 50), METHODS[method]), spread=3)
    exact = masks.choose(density)
    for names in masks.names.values():
        counts = [int(exact[n].sum()) for n in names]
        assert sum(counts) == round(density * 4000)
        if method == "smp-l":
            assert counts == [round(density * 1000)] * 4
        elif 0.1 <= sparsity <= 0.9:
            assert (
                counts == sorted(counts) and counts[0] < counts[-1]
            )  # layers with higher scores keep more


@pytest.mark.parametrize("exact", [True, False])
def test_no_matrix_keeps_more_than_all(exact):
    """A schedule of one's own may go above 1."""
    masks = with_scores(Masks(groups(), METHODS["smp-l"]))
    assert all(kept.all() for kept in masks.choose(1.17, exact).values())


def test_what_trains_is_a_tuple():
    """A string would be read letter by letter, and train every weight that has one of them."""
    with pytest.raises(AssertionError, match="write a tuple"):
        mask.Method(mask.smp_l, trains=("LayerNorm"))


def test_reference_would_lose_what_is_handed_on():
    masks = with_scores(Masks(groups(4, 20, 50), METHODS["smp-s"]), spread=3)
    masks.temperature = 1.0
    masks.scores["key"].data[0] = masks.scores["query"].data[
        0
    ] = -9.0  # a layer that matters little
    importance = mask.mean_sigmoid(masks.scores).detach()
    cut = 3.2 * importance / importance.sum(1, keepdim=True)  # v * L * share
    assert cut.max() > 1 and cut.clamp(max=1).mean() < 0.79
    assert sum(int(m.sum()) for m in masks.choose(0.8).values()) == 6400


def test_temperature_follows_the_target_density():
    """4 where at least 70 % stay, as in the reference code; movies has a value of its own."""
    for sparsity, temperature in ((0.0, 4), (0.3, 4), (0.31, 1), (0.9, 1)):
        given = {"task": "rte", "method": "smp-s", "sparsity": sparsity}
        assert train.recipe(given)["temperature"] == temperature
        assert train.recipe(given | {"temperature": 2.5})["temperature"] == 2.5
    assert Masks(groups(), METHODS["smp-s"]).temperature == 1


def test_final_weights_are_rounded_for_use_but_not_for_a_file():
    """A run in bfloat16 whose weights train, too: they are float32, and are saved as such."""
    method = Method(how_many=mask.smp_l, trains=("scores", "weights"))
    weights = groups()
    masks = with_scores(Masks(weights, method, torch.bfloat16))
    kept = masks.choose(0.5)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        final = masks.final_weights(0.5, dtype)
        for name, weight in (weights["query"] | weights["key"]).items():
            assert final[name].dtype == expected
            assert torch.equal(final[name], weight.to(expected) * kept[name])


def test_straight_through_gradient():
    """dL/dS is dL/dW' * W for kept and removed entries. dL/dW' comes from finite differences."""
    masks = with_scores(Masks(groups(), METHODS["smp-l"]))
    x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(weights):
        return sum((x @ w.double().T).tanh().sum() for w in weights.values())

    weights, _ = masks(0.4)
    loss(weights).backward()
    detached = {n: w.detach().double() for n, w in weights.items()}
    for group, names in masks.names.items():
        for i, name in enumerate(names):
            numeric = torch.zeros(5, 7, dtype=torch.float64)
            for at in np.ndindex(5, 7):
                up, down = ({n: w.clone() for n, w in detached.items()} for _ in range(2))
                up[name][at] += 1e-5
                down[name][at] -= 1e-5
                numeric[at] = (loss(up) - loss(down)) / 2e-5
            expected = numeric * masks.weights[group][i]
            assert torch.allclose(masks.scores[group].grad[i].double(), expected, atol=1e-5)
            assert (
                (weights[name] == 0) & (masks.scores[group].grad[i] != 0)
            ).any()  # removed ones learn too


def test_regularizer_is_the_mean_of_means():
    masks = with_scores(Masks(groups(), METHODS["smp-s"]))
    _, r = masks(0.9)
    every = [torch.sigmoid(s[i]).mean() for s in masks.scores.values() for i in range(3)]
    assert r.item() == pytest.approx(sum(every).item() / 6, abs=1e-6)
    r.backward()
    s = masks.scores["query"]
    assert torch.allclose(
        s.grad, torch.sigmoid(s) * (1 - torch.sigmoid(s)) / s.numel() / 2, atol=1e-8
    )


def test_start_keeps_everything_and_changes_nothing():
    given = groups()
    masks = Masks(given, METHODS["smp-s"])
    weights, r = masks(density_at(0, 10, 0.5))
    assert all(weights[n].equal(w) for ws in given.values() for n, w in ws.items())
    assert r.item() == 0.5


def test_kth_largest_of_nothing_is_infinite():
    assert mask.kth_largest(torch.zeros(2, 3), torch.tensor([0, 3])).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("n", [1, 2, 7, 40_000])
def test_kth_largest_is_the_kth_of_the_sorted_row(n):
    g = torch.Generator().manual_seed(n)
    random, ties = torch.randn(n, generator=g), torch.randint(3, (n,), generator=g).float()
    for row in (random, ties, torch.full((n,), -0.5), random.sort().values):
        for k in {1, n // 3, n // 2, n} - {0}:
            found = mask.kth_largest(row[None], torch.tensor([k]))
            assert found.item() == row.sort(descending=True).values[k - 1]


@pytest.mark.parametrize("kind", ["normal", "clusters", "columns"])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.5, 0.9, 0.999])
def test_thresholds_without_sorting_are_off_by_a_thousandth_at_most(kind, density):
    g = torch.Generator().manual_seed(7)
    scores = torch.randn(2, 600, 768, generator=g)
    if kind == "clusters":  # as after the first steps of Adam
        scores = scores.sign() * 0.02 + 1e-4 * torch.randn(scores.shape, generator=g)
    if kind == "columns":  # inputs that differ in scale, as those of models do
        scores = scores * (1 + torch.arange(768).remainder(24)) ** 2
    groups = [
        scores.flatten(1),
        scores[:, :200].flatten(1),
    ]  # the smaller one is sampled more densely
    k = torch.tensor([[int(density * s.shape[1]), 0] for s in groups])
    found = mask.about_kth_largest(groups, k)
    for s, row, threshold in zip(groups, k, found, strict=True):
        assert (
            abs((s[0] >= threshold[0]).sum() - row[0]) <= 1e-3 * s.shape[1]
            and threshold[1] == math.inf
        )


def test_thresholds_of_few_scores_are_exact():
    scores = torch.randn(4, 999, generator=torch.Generator().manual_seed(2))
    k = torch.tensor([0, 1, 500, 999])
    assert mask.about_kth_largest([scores], k[None])[0].equal(mask.kth_largest(scores, k))
    assert (
        mask.about_kth_largest([torch.zeros(1, 99_999)], torch.tensor([[5000]])).item() == 0
    )  # all equal: all kept
