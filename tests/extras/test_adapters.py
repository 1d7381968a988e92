"""BitFit, LoRA, BitDelta, Piggyback, SMP with weights, and masks on a fine-tuned model.

What is frozen does not move, what is stored is counted, and a saved run gives the same numbers.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from acts import prepared
from safetensors.torch import load_file
from torch import nn

import eval as eval_
import train
from extras.adapters import LowRank, Signs
from extras.rivals import FrozenEmbeddings
from mask import METHODS

PRUNABLE = 2 * (4 * 256 + 2 * 384)


@pytest.fixture
def train_on(make_model, glue, tmp_path):
    """train_on(name, method, *flags, model=, steps=) -> the folder of a finished run."""
    base = make_model()

    def command(name, method, *flags, model=base, steps=6):
        argv = ["--model", model, "--data-dir", glue, "--out", tmp_path / name, "--steps", steps]
        argv += ["--batch", 8, "--length", 16, "--device", "cpu", "--method", method]
        return [str(word) for word in [*argv, *flags]]

    def make(name, *args, **kwargs):
        train.main(command(name, *args, **kwargs))
        return tmp_path / name

    make.base, make.command = base, command
    return make


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def same_number(folder, capsys):
    """eval.py finds the number that training reported."""
    capsys.readouterr()
    eval_.main([str(folder)])
    accuracy = result_of(folder)["final"]["accuracy"]
    return f"accuracy {accuracy:.4f}\ntraining reported" in capsys.readouterr().out


def test_bitfit_trains_vectors_alone_and_stores_nothing_else(train_on, capsys, fails):
    out = train_on("run", "bitfit", "--weight-lr", "1e-2")
    before = load_file(train_on.base / "model.safetensors")
    run = eval_.load_run(out)
    after = {name: weight.detach() for name, weight in run.model.named_parameters()}
    vectors = {name for name, tensor in before.items() if tensor.ndim == 1}
    assert moved(before, after) == vectors and run.masks == {}
    result = result_of(out)
    assert result["stored_numbers"] == sum(before[name].numel() for name in vectors)
    assert result["stored_bits"] == 0 and result["density"] == 1
    assert set(load_file(out / "mask.safetensors")) >= vectors
    assert not (out / "model.safetensors").exists()
    assert same_number(out, capsys) and same_number(out, capsys)
    assert "its own flags are --weight-lr" in fails(
        train.main, ["--method", "bitfit", "--sparsity", "0.5"]
    )


def test_a_low_rank_layer_is_its_merged_weight():
    """(W + B A) x = W x + B (A x), and at the start B A = 0."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    layer = LowRank(linear, 2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))
    layer.lora_b.data.normal_()
    unmerged = linear(x) + F.linear(F.linear(x, layer.lora_a), layer.lora_b)
    assert torch.allclose(layer(x), unmerged, atol=1e-6)
    assert layer.lora_a.abs().max() <= 6**-0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_two_thin_matrices_for_query_and_value(train_on, capsys, dtype):
    out = train_on("run", "lora", "--rank", 3, "--weight-lr", "1e-1", "--dtype", dtype)
    before = load_file(train_on.base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()  # an ordinary model: nothing of LoRA's is left in it
    frozen = {n: t.to(getattr(torch, dtype)).float() for n, t in before.items()}
    expected = {n for n in before if n.endswith(("query.weight", "value.weight"))}
    assert moved(frozen, after) == expected
    for name in expected if dtype == "float32" else ():
        rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-4)
        assert rank <= 3
    result = result_of(out)
    assert result["stored_numbers"] == 4 * 3 * (16 + 16) and result["stored_bits"] == 0
    assert same_number(out, capsys)


def test_the_logits_of_a_lora_run_are_those_it_was_trained_to(train_on, tmp_path):
    args, run, job = prepared(train_on.command("other", "lora"))
    with run:
        train.learn(args, run, job)
        weights = job.learner.final_weights(job.density)
        dev = next(iter(job.dev.values()))
        trained = eval_.predict(job.model, weights, dev, job.device)
        train.finish(args, run, job)
    loaded = eval_.load_run(tmp_path / "other")
    assert torch.equal(trained, eval_.predict(loaded.model, {}, dev, job.device))


def test_a_rank_is_a_whole_number(train_on, fails):
    for rank in ("1.5", "17"):
        said = fails(train.main, train_on.command("run", "lora", "--rank", rank))
        assert f"--rank: must be a whole number up to 16; got {rank}" in said


def test_a_fresh_classifier_counts_as_stored(train_on, capsys):
    out = train_on("run", "lora", "--rank", 3, "--head", "classifier")
    assert result_of(out)["stored_numbers"] == 4 * 3 * (16 + 16) + 2 * 16 + 2
    assert same_number(out, capsys)


def test_bitdelta_takes_a_teacher_of_the_same_model(train_on, make_model, fails):
    other = train_on("dense", "finetune", model=make_model("other", intermediate_size=32))
    said = fails(train.main, train_on.command("run", "bitdelta", "--teacher", other))
    assert f"--teacher: {other} was not made of this --model" in said


def test_signs_by_hand():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer = Signs(linear, torch.tensor([[0.3, -0.1], [0.0, -0.4]]))
    assert layer.scale.item() == pytest.approx(0.2)  # the mean of |D|, which is nearest to D
    found = layer(torch.eye(2)).T
    assert torch.allclose(found, torch.tensor([[1.2, 1.8], [3.2, 3.8]]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitdelta_stores_one_bit_per_weight_and_one_number_per_matrix(
    train_on, capsys, fails, dtype
):
    """In bfloat16 the dense run has rounded its embeddings. They are not stored all the same."""
    dense = train_on("dense", "finetune-encoder", "--weight-lr", "1e-2", "--dtype", dtype)
    out = train_on("run", "bitdelta", "--teacher", dense, "--weight-lr", "1e-3")
    before = load_file(train_on.base / "model.safetensors")
    tuned = load_file(dense / "model.safetensors")
    after = load_file(out / "model.safetensors")
    matrices = {n for n in before if ".layer." in n and before[n].ndim == 2}
    for name in matrices:
        change = after[name] - before[name]
        assert torch.allclose(change.abs(), change.abs().mean(), atol=1e-5)
        clear = (tuned[name] - before[name]).abs() > 1e-5
        assert torch.equal(change[clear] > 0, (tuned[name] > before[name])[clear])
    others = before.keys() - matrices
    embeddings = {name for name in others if "_embeddings.weight" in name}
    assert all(torch.equal(after[name], tuned[name]) for name in others - embeddings)
    assert all(torch.equal(after[name], before[name]) for name in embeddings)
    stored = sum(before[name].numel() for name in others - embeddings)
    result = result_of(out)
    assert result["stored_bits"] == PRUNABLE and len(matrices) == 12
    assert result["stored_numbers"] == 12 + stored
    assert same_number(out, capsys)
    assert "needs --teacher" in fails(train.main, train_on.command("other", "bitdelta"))


def test_finetune_encoder_leaves_the_embeddings_alone(train_on, capsys):
    out = train_on("dense", "finetune-encoder", "--weight-lr", "1e-2")
    before = load_file(train_on.base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    still = before.keys() - moved(before, after)
    assert still == {name for name in before if "_embeddings.weight" in name}
    numbers = sum(t.numel() for n, t in before.items() if n not in still)
    assert result_of(out)["stored_numbers"] == numbers and same_number(out, capsys)
    row = METHODS["finetune-encoder"]
    assert isinstance(row, FrozenEmbeddings) and not row.trains_tensor("wte.weight", torch.ones(2))


def test_piggyback_begins_with_every_weight_and_loses_those_below_the_threshold():
    row = METHODS["piggyback"]
    masks = row.masks({"g": {"w": torch.ones(2, 2)}}, row)
    assert masks.choose(1.0)["w"].all()
    masks.scores["g"].data = torch.tensor([[[0.1, -0.1], [0.01, -3.0]]])
    assert masks.choose(1.0)["w"].tolist() == [[True, False], [True, False]]
    weights, _ = masks(torch.tensor(1.0))
    (weights["w"] * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert masks.scores["g"].grad.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]  # removed ones learn too


def test_a_piggyback_run_stores_a_mask_and_nothing_else(train_on, capsys):
    out = train_on("run", "piggyback", "--lr", "5e-3")
    result = result_of(out)
    assert result["stored_bits"] == PRUNABLE and result["stored_numbers"] == 0
    assert 0 < result["density"] < 1 and result["density"] == result["reached"]
    assert same_number(out, capsys)


def test_soft_movement_never_keeps_less_than_a_two_hundredth():
    """Reference code: at least 0.5 % of each matrix."""
    row = METHODS["soft-movement"]
    masks = row.masks({"g": {"w": torch.ones(40, 10)}}, row)
    masks.scores["g"].data = torch.arange(400.0).view(1, 40, 10) - 1000  # all below the threshold
    for exact in (True, False):
        kept = masks.choose(0.9, exact)["w"].flatten()
        assert kept.sum() == 2 and kept[-2:].all()


def test_smp_with_weights_moves_both(train_on, capsys):
    out = train_on("run", "smp-weights", "--sparsity", 0.5, "--weight-lr", "1e-2")
    before = load_file(train_on.base / "model.safetensors")
    after = load_file(out / "model.safetensors")
    still = before.keys() - moved(before, after)
    assert still == {name for name in before if "_embeddings.weight" in name}
    assert same_number(out, capsys)


def test_a_mask_on_a_fine_tuned_model_is_a_command(train_on, capsys):
    """Mask Fine-Tuning: the backbone is the folder of a dense run."""
    dense = train_on("dense", "finetune", "--weight-lr", "1e-2")
    out = train_on("run", "smp-s", "--sparsity", 0.1, model=dense)
    tuned = load_file(dense / "model.safetensors")
    run = eval_.load_run(out)
    assert all(torch.equal(w, tuned[name]) for name, w in run.model.named_parameters())
    result = result_of(out)
    assert result["kept"] == pytest.approx(0.9 * PRUNABLE, abs=12)
    assert same_number(out, capsys)
    again = train_on("again", "finetune", "--weight-lr", "1e-2", model=dense)
    assert moved(tuned, load_file(again / "model.safetensors"))
