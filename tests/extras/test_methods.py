"""The methods that SMP is compared with: by hand, and from end to end on a tiny model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as eval_
import mask
import train
from data import TASKS
from extras.rivals import hard_concrete
from mask import METHODS, Masks
from model import load_backbone
from plumbing.files import MASKS, seal, unseal

WEIGHTS = [[3.0, -1.0], [0.5, -2.0]]


def one(method, scores=None, weights=WEIGHTS):
    """Masks of a single 2 x 2 matrix."""
    row = METHODS[method]
    masks = row.masks({"g": {"w": torch.tensor(weights)}}, row)
    if scores is not None:
        masks.scores["g"].data = torch.tensor([scores])
    return masks


def step(masks, density=0.5):
    """Backpropagate the sum of 10 w', 20 w', 30 w', 40 w'.

    -> masked weights, gradients of scores and of weights, or None.
    """
    weights, _ = masks(density)
    (weights["w"] * torch.tensor([[10.0, 20.0], [30.0, 40.0]])).sum().backward()
    grads = [getattr(p["g"], "grad", None) for p in (masks.scores, masks.weights)]
    return weights["w"].tolist(), *(None if g is None else g[0].tolist() for g in grads)


def test_movement_trains_only_the_weights_that_it_keeps_and_all_scores():
    weights, scores, of_weights = step(one("movement", scores=[[0.1, 0.4], [0.3, 0.2]]))
    assert weights == [[0.0, -1.0], [0.5, 0.0]]
    assert scores == [[30.0, -20.0], [15.0, -80.0]]  # dL/dW' * W, everywhere
    assert of_weights == [[0.0, 20.0], [30.0, 0.0]]  # dL/dW' * M


def test_magnitude_keeps_the_largest_weights_as_they_are_now():
    masks = one("magnitude")
    weights, scores, of_weights = step(masks)
    assert (
        weights == [[3.0, 0.0], [0.0, -2.0]]
        and scores is None
        and of_weights == [[10.0, 0.0], [0.0, 40.0]]
    )
    masks.weights["g"].data[0, 0, 0] = 0.1
    assert masks.choose(0.5)["w"].tolist() == [[False, True], [False, True]]


def test_a_random_mask_stays_and_shrinks_into_itself():
    masks = one("random", weights=torch.randn(20, 20).tolist())
    many, few = masks.choose(0.5)["w"], masks.choose(0.1)["w"]
    assert few.sum() == 40 and (many & few).equal(few) and masks.choose(0.1)["w"].equal(few)
    assert [name for name, _ in masks.named_parameters()] == ["weights.g"]


def reached(masks):
    """The share that training keeps by itself."""
    return masks.choose(0.5, exact=False)["w"].float().mean().item()


def test_thresholds_keep_what_is_above_and_are_cut_by_score():
    masks = one(
        "soft-movement", scores=[[-3.0, -2.0], [0.0, 5.0]]
    )  # sigmoid: .047 .119 .5 .993; tau = 0.1
    weights, scores, of_weights = step(masks)
    assert weights == [[0.0, -1.0], [0.5, -2.0]] and of_weights == [[0.0, 20.0], [30.0, 40.0]]
    assert reached(masks) == 0.75 and masks.choose(0.5)["w"].tolist() == [
        [False, False],
        [True, True],
    ]
    assert masks.choose(1.0)["w"].tolist() == [
        [False, True],
        [True, True],
    ]  # cut only, never filled up
    weights, scores, of_weights = step(one("smp-t", scores=[[-3.0, -2.0], [0.0, 5.0]]))
    assert scores == [[30.0, -20.0], [15.0, -80.0]] and of_weights is None


def test_global_ranking_puts_all_matrices_together():
    groups = {g: {f"{g}{i}": torch.ones(2, 2) for i in range(2)} for g in "ab"}
    masks = Masks(groups, METHODS["smp-g"])
    masks.scores["a"].data = torch.tensor([[[9.0, 8.0], [7.0, 6.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks.scores["b"].data = torch.tensor([[[5.0, 1.0], [1.0, 2.0]], [[3.0, 4.0], [0.0, -1.0]]])
    exact = masks.choose(0.5)
    assert exact["a0"].all() and not exact["a1"].any()
    assert exact["b0"].tolist() == [[True, False], [False, True]] and exact["b1"].tolist() == [
        [True, True],
        [False, False],
    ]


def test_hard_concrete_gates_by_formula():
    """s = sigmoid((log u - log(1 - u) + log alpha) / beta), stretched to (-0.1, 1.1) and cut.

    Louizos et al. 2018.
    """
    alpha = torch.linspace(-4, 4, 30).tolist()
    torch.manual_seed(0)
    u = torch.rand(30).tolist()
    torch.manual_seed(0)  # the same numbers again
    noisy = hard_concrete(torch.tensor(alpha), noise=True).tolist()
    still = hard_concrete(torch.tensor(alpha), noise=False).tolist()
    for a, v, found, median in zip(alpha, u, noisy, still, strict=True):
        s = 1 / (1 + math.exp(-(math.log(v) - math.log(1 - v) + a) / (2 / 3)))
        assert found == pytest.approx(min(1, max(0, 1.2 * s - 0.1)), abs=1e-5)
        assert median == pytest.approx(min(1, max(0, 1.2 / (1 + math.exp(-a)) - 0.1)), abs=1e-6)
    assert {0.0, 1.0} < set(noisy)  # some are shut, some wide open, some between


def test_l0_counts_the_chance_of_an_open_gate_and_learns_through_it():
    masks = one("l0", scores=[[-1.0, 0.0], [1.0, 2.0]])
    _, regularizer = masks(0.5)
    with torch.no_grad():
        drawn = hard_concrete(masks.scores["g"].repeat(20_000, 1, 1), noise=True)
    assert regularizer.item() == pytest.approx((drawn > 0).float().mean().item(), abs=0.01)
    weights, scores, of_weights = step(masks)
    z = (torch.tensor(weights) / torch.tensor(WEIGHTS)).tolist()
    assert np.allclose(of_weights, np.array([[10, 20], [30, 40]]) * z, atol=1e-4)
    inside = [[0 < gate < 1 for gate in row] for row in z]
    assert [
        [g != 0 for g in row] for row in scores
    ] == inside  # a gate that is fully open or shut gets no gradient
    median = np.clip(1.2 / (1 + np.exp([1.0, 0.0, -1.0, -2.0])) - 0.1, 0, 1).reshape(2, 2)
    assert np.allclose(
        masks.final_weights(0.5)["w"], WEIGHTS * median * [[0, 0], [1, 1]], atol=1e-5
    )


def test_l0_starts_nine_tenths_open_and_counts_gates_that_are_open_without_noise():
    assert torch.sigmoid(one("l0").scores["g"]).tolist() == [[[pytest.approx(0.9)] * 2] * 2]
    masks = one(
        "l0", scores=[[-2.5, -2.3], [1.0, 1.0]]
    )  # sigmoid: 0.076 0.091; 1.2 s - 0.1 > 0 from 1/12 = 0.083 on
    assert reached(masks) == 0.75 and (masks.final_weights(1.0)["w"] != 0).tolist() == [
        [False, True],
        [True, True],
    ]


def test_what_scores_are_and_what_trains():
    smp = (2e-2, None, ("scores",))  # lambda is the task's
    learned = (1e-2, 400, ("scores", "weights"))
    dense = (None, None, ("weights",))
    expected = {
        **dict.fromkeys(("smp-s", "smp-l", "smp-g", "smp-t", "smp-w", "smp-2:4"), smp),
        "smp-bias": (2e-2, None, ("scores", "vectors")),
        **dict.fromkeys(("soft-movement", "l0"), learned),
        "smp-weights": (2e-2, None, ("scores", "weights")),
        "piggyback": (1e-3, None, ("scores",)),
        "bitfit": (None, None, ("vectors",)),
        "movement": (1e-2, 0, ("scores", "weights")),
        **dict.fromkeys(("magnitude", "random", "ticket", "finetune"), dense),
        **dict.fromkeys(("p-pruning", "p-activation", "p-random", "p-fisher"), dense),
        **dict.fromkeys(("lora", "bitdelta", "finetune-encoder"), dense),
    }
    for name, row in expected.items():
        recipe = METHODS[name].recipe
        assert (recipe.get("lr"), recipe.get("penalty"), METHODS[name].trains) == row


def test_what_is_compared_may_depend_on_the_weights():
    """smp-w ranks |W| sigmoid(S): 1 * 0.5, 3 * 0.5, 2 * 0.881 and 0.1 * 0.999. Two of four stay."""
    masks = Masks({"g": {"w": torch.tensor([[1.0, -3.0], [2.0, 0.1]])}}, METHODS["smp-w"])
    masks.scores["g"].data = torch.tensor([[[0.0, 0.0], [2.0, 7.0]]])
    assert masks.choose(0.5)["w"].tolist() == [[False, True], [True, False]]
    assert masks(torch.tensor(0.5))[0]["w"].tolist() == [[0.0, -3.0], [2.0, 0.0]]
    by_score = Masks({"g": {"w": torch.ones(2, 2)}}, METHODS["smp-s"])
    by_score.scores["g"].data = masks.scores["g"].data
    assert by_score.choose(0.5)["w"].tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("exact", (True, False))
def test_two_of_each_four_by_hand(exact):
    """Down to half, the two highest of each four stay. Below, only some of these do."""
    scores = torch.tensor([[[1.0, 4, 3, 2, 9, 8, 7, 6], [0, -5, -6, 1, -1, -2, -4, -3]]])

    def kept(density):
        masks = Masks({"g": {"w": scores[0]}}, METHODS["smp-2:4"])
        masks.scores["g"].data.copy_(scores)
        return masks.choose(density, exact)["w"].int().tolist()

    winners = [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0, 0]]
    assert kept(1.0) == [[1] * 8] * 2 and kept(0.5) == winners
    assert kept(0.75) == [
        [1] * 8,
        winners[1],
    ]  # the four best of the others are all in the first row
    assert kept(0.25) == [winners[0], [0] * 8]
    start = Masks({"g": {"w": torch.ones(2, 8)}}, METHODS["smp-2:4"])
    assert start.choose(0.9, exact=False)["w"].all()
    with pytest.raises(ValueError, match="smp-2:4 needs rows of fours; those of g have 6 weights"):
        Masks({"g": {"w": torch.ones(2, 6)}}, METHODS["smp-2:4"]).choose(0.5, exact)


def test_a_ticket_keeps_its_mask_while_its_weights_train():
    masks = one("ticket")
    weights, scores, of_weights = step(masks)
    assert (
        weights == [[3.0, 0.0], [0.0, -2.0]]
        and scores is None
        and of_weights == [[10.0, 0.0], [0.0, 40.0]]
    )
    masks.weights["g"].data[0, 0, 0] = 0.1
    assert masks.choose(0.5)["w"].tolist() == [
        [True, False],
        [False, True],
    ]  # where magnitude would change it
    assert (
        train.parse_args(["--method", "ticket"]).ramp == 0
    )  # so it is sparse from the first step on


def test_temperature_can_be_set():
    groups = {"g": {"w": torch.ones(2, 2)}}
    assert one("smp-s").temperature == 1
    assert Masks(groups, METHODS["smp-s"], temperature=3).temperature == 3


MASKING = [name for name, row in METHODS.items() if row.how_many]


def is_embedding(name):
    return "_embeddings.weight" in name


@pytest.mark.parametrize("method", [m for m in MASKING if "sparsity" in METHODS[m].recipe])
def test_every_method_reaches_its_density_and_can_be_evaluated(
    make_model, glue, tmp_path, capsys, method
):
    model, out = make_model(), tmp_path / "run"
    argv = ["--model", model, "--data-dir", glue, "--out", out, "--steps", 10, "--batch", 8]
    argv += ["--length", 16]
    argv += ["--sparsity", 0.6, "--method", method, "--device", "cpu", "--evals", 2]
    argv += ["--warmup", 0.1]
    train.main([str(a) for a in argv])
    result = json.loads((out / "result.json").read_text())
    prunable = 2 * (4 * 256 + 2 * 384)
    assert (
        abs(result["kept"] - 0.4 * prunable) < 12 and result["density"] == result["kept"] / prunable
    )  # whole weights
    files = {"log.jsonl", "mask.safetensors", "result.json"}
    before = load_file(model / "model.safetensors")
    if "weights" in METHODS[method].trains:
        files |= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
        after = load_file(out / "model.safetensors")
        groups = {n for n in before if n.endswith("weight") and ".layer." in n and "Norm" not in n}
        assert (
            len(groups) == 12 and sum(int((after[n] != 0).sum()) for n in groups) <= result["kept"]
        )
        # Rivals train no embeddings, as in the paper's Table 1.
        assert all((after[n] != before[n]).any() != is_embedding(n) for n in before)
        whole = sum(t.numel() for n, t in before.items() if not is_embedding(n))
        assert result["stored_numbers"] == whole - prunable + result["kept"]
    else:
        plain, _ = load_backbone(model, TASKS["movies"], 16)
        trained = METHODS[method].trained(plain).values()
        assert result["stored_numbers"] == sum(weight.numel() for weight in trained)
    assert {p.name for p in out.iterdir()} == files and result["stored_bits"] == prunable
    capsys.readouterr()
    eval_.main([str(out)])
    shown = capsys.readouterr().out
    assert (
        f"accuracy {result['final']['accuracy']:.4f}\ntraining reported" in shown
        and "layer 1" in shown
    )


def test_biases_and_layernorms_train_beside_the_mask_and_lie_in_its_file(
    make_model, glue, tmp_path, fails
):
    model, out = make_model(), tmp_path / "run"
    argv = ["--model", model, "--data-dir", glue, "--out", out, "--steps", 20, "--batch", 8]
    argv += ["--length", 16]
    train.main(
        [str(a) for a in [*argv, "--method", "smp-bias", "--weight-lr", "1e-2", "--device", "cpu"]]
    )
    run = eval_.load_run(out / "mask.safetensors")
    frozen, _ = load_backbone(model, TASKS["movies"], 16)
    moved = {
        n for n, w in frozen.named_parameters() if not torch.equal(w, run.model.get_parameter(n))
    }
    assert moved and all(w.ndim == 1 for n, w in frozen.named_parameters() if n in moved)
    assert any("LayerNorm" in name for name in moved) and any(
        "query.bias" in name for name in moved
    )
    stored = load_file(out / "mask.safetensors")
    for name, weight in run.model.named_parameters():
        assert (name in stored) == (weight.ndim == 1 or name in run.masks)
        assert weight.ndim > 1 or torch.equal(stored[name], weight)

    tensors, description = unseal(out / "mask.safetensors", MASKS)
    del tensors[next(name for name in tensors if "LayerNorm" in name)]
    (out / "mask.safetensors").write_bytes(seal(MASKS, tensors, description))
    assert "holds other weights beside its mask than its method trains" in fails(eval_.main, [out])


@pytest.mark.parametrize(
    ("method", "flag", "uses"),
    [
        ("magnitude", "--lr", "--weight-lr"),
        ("finetune", "--sparsity", "--weight-lr"),
        ("random", "--penalty", "--sparsity"),
        ("movement", "--temperature", "--penalty"),
        ("smp-s", "--ffn-share", "--temperature"),
        ("smp-s", "--weight-lr", "--lr"),
        ("finetune", "--hold", "--weight-lr"),
        ("p-random", "--ramp", "--ffn-share"),
    ],
)
def test_what_a_method_does_not_use_is_refused(fails, method, flag, uses):
    said = fails(train.main, ["--method", method, flag, "0.2"])
    assert (
        said.startswith(f"error: {flag}: {method} does not use it; its own flags are ")
        and uses in said
    )


def test_what_a_method_uses_is_taken(fails):
    assert train.parse_args(["--weight-lr", "1", "--head", "classifier"]).weight_lr == 1
    assert train.parse_args(["--method", "l0", "--hold", "0.2"]).hold == 0.2  # evaluations are cut
    assert train.parse_args(["--method", "p-pruning"]).ffn_share == 5
    assert "--schedule: p-pruning does not" in fails(
        train.main, ["--method", "p-pruning", "--schedule", "linear"]
    )
    assert "--hold: finetune does not" in fails(train.main, ["--method", "finetune", "--hold", "0"])
    said = fails(train.main, ["--steps", "0"])
    assert "--steps: must be a whole number from 1 to 10,000,000" in said
    assert "--weight-lr: must be a number from 1e-100" in fails(
        train.main, ["--method", "random", "--weight-lr", "-1"]
    )
    assert "must be a number from 0 to 0.9999; got 1" in fails(train.main, ["--warmup", "1"])


def test_learning_rates_rise_and_fall():
    assert [train.rate_at(t, 10, 4) for t in (0, 1, 3, 4, 7, 10)] == [0.2, 0.4, 0.8, 1, 0.5, 0]
    assert [train.rate_at(t, 10) for t in (0, 5)] == [1, 0.5]


# The others are traced where time does not count. smp-bias masks as smp-s does.


@pytest.mark.slow
@pytest.mark.parametrize("method", MASKING)
def test_torch_compile_sees_masks_as_one_piece(method, monkeypatch):
    """As on a GPU, where numpy finds no thresholds.

    Without a compiler: traced, and then run as it is.
    """
    monkeypatch.setattr(
        mask, "kth_largest", lambda scores, k: mask.about_kth_largest([scores], k[None])[0]
    )
    torch.compiler.reset()  # it gives up on a function that it compiled eight times
    torch.manual_seed(0)
    masks = METHODS[method].masks(
        {"g": {"a": torch.randn(5, 8), "b": torch.randn(5, 8)}}, METHODS[method]
    )
    traced = torch.compile(masks.stacked, backend="aot_eager", fullgraph=True)
    found = []
    for stacked in (masks.stacked, traced):
        for scores in masks.scores.values() if "scores" in METHODS[method].trains else ():
            scores.data.copy_(torch.linspace(-1, 1, scores.numel()).view_as(scores))
        torch.manual_seed(1)  # of L0's gates
        weights, regularizer = stacked(torch.tensor(0.3))
        (weights["g"].square().sum() + regularizer).backward()
        found.append([weights["g"], regularizer, *(p.grad for p in masks.parameters())])
        masks.zero_grad()
    for plain, compiled in zip(*found, strict=True):
        assert torch.allclose(plain, compiled)


def test_a_mask_is_not_all_of_a_run_whose_weights_trained(run, fails):
    folder, _ = run("--method", "movement", steps=2)
    assert "name its folder" in fails(eval_.main, [folder / "mask.safetensors"])


def test_settings_of_a_method_come_before_those_of_movies():
    args = train.parse_args(["--method", "movement"])
    assert (args.batch, args.penalty, args.temperature, args.dropout) == (16, 0, None, False)


def test_a_runs_folder_has_no_colon():
    name = Path("runs/movies-minilm-smp-2of4-0.5-seed0")
    assert train.parse_args(["--method", "smp-2:4"]).out == name  # Windows takes none


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.1, 0.9])
def test_more_weights_than_float32_can_count(sparsity):
    masks = Masks({"g": {f"w{i}": torch.zeros(2900, 2900) for i in range(2)}}, METHODS["smp-g"])
    masks.scores["g"].data.normal_(generator=torch.Generator().manual_seed(0))
    kept = sum(int(m.sum()) for m in masks.choose(1 - sparsity).values())
    assert kept == (10 - round(10 * sparsity)) * 16_820_000 // 10
