"""tools.export --compact removes what is dead and what was named, and the logits stay."""

import dataclasses
import json

import pytest
import torch
from conftest import load_config

import eval as eval_
import train
from extras.pprune import shrink
from model import Bert, Config
from tools import export
from tools.export import fold_dead

CONFIG = Config(60, 32, 3, 4, 48, 32, 2)
INPUTS = (
    torch.arange(45).view(5, 9) + 5,
    torch.zeros(5, 9, dtype=torch.long),
    torch.ones(5, 9, dtype=torch.long),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    bert = Bert(CONFIG, [3, 4], ["cls"]).eval()
    for name, p in bert.named_parameters():
        if "LayerNorm" not in name:
            p.data.normal_(0, 0.3)
    return bert


def parts(model, i):
    layer = model.bert.encoder["layer"][i]
    return (
        layer.attention["self"].value,
        layer.attention["output"].dense,
        layer.intermediate["dense"],
        layer.output.dense,
    )


@torch.no_grad()
def test_what_is_dead_goes_without_changing_the_logits(model):
    value, attn_output, intermediate, output = parts(model, 0)
    intermediate.weight[[3, 5]] = 0  # a constant each
    output.weight[:, [5, 7]] = 0
    value.weight[8:16] = 0  # head 1 of 4
    value, attn_output, intermediate, output = parts(model, 1)
    attn_output.weight[:, 24:] = 0  # head 3
    value.weight[:7] = 0  # all of head 0 but one row
    value, attn_output, intermediate, output = parts(model, 2)
    value.weight[:] = 0
    intermediate.weight[:] = 0
    logits = model(*INPUTS)
    heads, neurons = fold_dead(model)
    assert [h.tolist() for h in heads] == [[0, 2, 3], [0, 1, 2], []]
    assert [len(n) for n in neurons] == [45, 48, 0] and not {3, 5, 7} & set(neurons[0].tolist())
    smaller = shrink(model, heads, neurons)
    assert torch.allclose(smaller(*INPUTS), logits, atol=1e-5)
    assert smaller.config.layers == [(3, 45), (3, 48), (0, 0)]
    gone = (12 - 6) * (4 * 32 * 8 + 3 * 8) + (3 * 48 - 93) * (2 * 32 + 1)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, smaller)]
    assert sizes[0] - gone == sizes[1]
    again = fold_dead(smaller)  # nothing more is dead, and empty layers are no problem
    assert [len(h) for h in again[0]] == [3, 3, 0]
    assert torch.allclose(shrink(smaller, *again)(*INPUTS), logits, atol=1e-5)


def test_cutting_a_head_is_zeroing_its_output(model):
    heads, neurons = [torch.tensor([0, 1, 3])] * 3, [torch.arange(1, 48)] * 3
    smaller = shrink(model, heads, neurons)
    with torch.no_grad():
        for i in range(3):
            _, attn_output, _, output = parts(model, i)
            attn_output.weight[:, 16:24] = 0
            output.weight[:, 0] = 0
    assert torch.allclose(smaller(*INPUTS), model(*INPUTS), atol=1e-5)
    smaller.train()(*INPUTS).sum().backward()  # and it trains


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"heads_per_layer": [4]}, "heads_per_layer is .4., not a list of one number per layer"),
        ({"neurons_per_layer": 4}, "neurons_per_layer is 4, not a list"),
        ({"heads_per_layer": [4, "5", 4]}, "heads_per_layer is '5', not a number from 0 to"),
        ({"neurons_per_layer": [48, -1, 3.0]}, "neurons_per_layer is -1, not"),
    ],
)
def test_counts_are_checked(tmp_path, counts, message):
    stored = dataclasses.asdict(CONFIG) | {"heads_per_layer": [4, 0, 1], "neurons_per_layer": []}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_config(tmp_path).layers == [(4, 48), (0, 48), (1, 48)]
    (tmp_path / "config.json").write_text(json.dumps(stored | counts))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("flags", [[], ["--head", "classifier"], ["--method", "movement"]])
def test_a_compact_export_is_a_smaller_run_with_the_same_answers(
    make_model, glue, tmp_path, capsys, fails, flags
):
    run, out = tmp_path / "run", tmp_path / "out"
    given = ["--model", make_model(), "--data-dir", glue, "--out", run, "--steps", 8]
    given += ["--length", 16, "--evals", 1]
    train.main([str(a) for a in [*given, "--sparsity", 0.97, "--device", "cpu", *flags]])
    capsys.readouterr()
    eval_.main([str(run)])
    reported = capsys.readouterr().out.splitlines()[-1]
    export.main([str(run), str(out), "--compact"])
    said = capsys.readouterr().out
    assert "of 8 attention heads and" in said
    before, after = (
        int(n.replace(",", "")) for n in said.split("parameters ")[1].split(";")[0].split(" -> ")
    )
    assert after < before and float(said.split("at most ")[1].split()[0]) < 1e-5
    eval_.main([str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == reported
    assert "holds files already" in fails(export.main, [run, out, "--compact"])
    flags = ["--model", out, "--method", "finetune", "--out", tmp_path / "tuned", "--steps", 2]
    train.main([str(a) for a in [*given[2:4], *flags, "--length", 16, "--device", "cpu"]])
    eval_.main([str(tmp_path / "tuned")])


def test_a_mask_that_kills_nothing_is_said_to_gain_nothing(make_model, glue, tmp_path, capsys):
    given = ["--model", make_model(), "--data-dir", glue, "--out", tmp_path / "run"]
    given += ["--steps", 2, "--length", 16]
    train.main([str(a) for a in [*given, "--sparsity", 0.1, "--device", "cpu"]])
    export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--compact"])
    assert (
        "0 of 8 attention heads and 0 of 48 neurons are dead"
        in capsys.readouterr().out
    )
