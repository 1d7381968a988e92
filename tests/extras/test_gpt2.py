"""GPT-2, against a second, plain implementation that reads a checkpoint as it is published."""

import json
import math

import pytest
import replay
import torch
from conftest import GPT2_CONFIG, gpt2_tensors
from recordings import nudge_file, replayed
from safetensors.torch import load_file, save_file
from torch import nn

from extras.gpt2 import load_gpt2
from extras.pprune import shrink
from mask import METHODS, Masks
from plumbing.checkpoints import read_model


def plain_norm(x, t, at):
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred**2).mean(-1, keepdim=True)
    return centred / (spread + 1e-5).sqrt() * t[f"{at}.weight"] + t[f"{at}.bias"]


def plain_gpt2(t, row, heads):
    """Published tensors, ids [S] -> logits [S, V], {name: input of each c_proj}.

    Computed token by token and head by head.
    """
    x = t["wte.weight"][row] + t["wpe.weight"][: len(row)]
    inputs = {}
    for i in range(GPT2_CONFIG["n_layer"]):
        at = f"h.{i}"
        joined = (
            plain_norm(x, t, f"{at}.ln_1") @ t[f"{at}.attn.c_attn.weight"]
            + t[f"{at}.attn.c_attn.bias"]
        )
        q, k, v = joined.chunk(3, 1)
        size = x.shape[1] // heads
        mixed = torch.zeros_like(x)
        for head in range(heads):
            of_head = slice(head * size, (head + 1) * size)
            for s in range(len(row)):
                scores = k[: s + 1, of_head] @ q[s, of_head] / math.sqrt(size)
                mixed[s, of_head] = scores.softmax(0) @ v[: s + 1, of_head]
        x = x + mixed @ t[f"{at}.attn.c_proj.weight"] + t[f"{at}.attn.c_proj.bias"]
        inner = (
            plain_norm(x, t, f"{at}.ln_2") @ t[f"{at}.mlp.c_fc.weight"] + t[f"{at}.mlp.c_fc.bias"]
        )
        inner = (
            0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        )
        x = x + inner @ t[f"{at}.mlp.c_proj.weight"] + t[f"{at}.mlp.c_proj.bias"]
        inputs |= {f"heads.{i}": mixed, f"neurons.{i}": inner}
    return plain_norm(x, t, "ln_f") @ t["wte.weight"].T, inputs


@pytest.fixture
def ids():
    return torch.randint(
        GPT2_CONFIG["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(2)
    )


def test_logits_are_those_of_a_plain_implementation(make_gpt2, ids):
    model = load_gpt2(*read_model(make_gpt2())).eval()
    with torch.inference_mode():
        ours = model(ids)
    for row, logits in zip(ids, ours, strict=True):
        expected, _ = plain_gpt2(gpt2_tensors(), row, 4)
        assert torch.allclose(logits, expected, atol=1e-5)


def test_a_later_token_changes_nothing_before_it(make_gpt2, ids):
    model = load_gpt2(*read_model(make_gpt2())).eval()
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % GPT2_CONFIG["vocab_size"]
    with torch.inference_mode():
        a, b = model(ids), model(other)
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-6) and not torch.allclose(
        a[:, 5], b[:, 5], atol=1e-3
    )


def test_the_replay_takes_a_recorded_gpt2(make_gpt2, ids, capsys):
    folder = make_gpt2()
    rows = [plain_gpt2(gpt2_tensors(), row, 4) for row in ids]
    recorded = {"input_ids": ids, "logits": torch.stack([logits for logits, _ in rows])}
    recorded |= {name: torch.stack([inputs[name] for _, inputs in rows]) for name in rows[0][1]}
    save_file(recorded, folder / "dense_first_batch.safetensors")
    losses = []
    for (logits, _), row in zip(rows, ids, strict=True):
        losses.append(
            -logits.log_softmax(1)[range(8), row[1:]].mean().item()
        )  # of the last there is no target
    expected = {"loss": sum(losses) / 3, "loss_of_rows": losses}
    (folder / "expected.json").write_text(json.dumps(expected))
    status, found, beyond = replayed(folder, capsys)
    assert status == 0 and not beyond and found.keys() == {"logits", "inputs", "loss"}
    (folder / "expected.json").write_text(json.dumps(expected | {"loss": expected["loss"] + 1e-4}))
    nudge_file(folder, "dense_first_batch.safetensors", "neurons.1")
    assert replayed(folder, capsys)[::2] == (1, {"inputs", "loss"})
    assert replay.BOUNDS["loss"] == 1e-5 and replay.BOUNDS["logits"] == 1e-4


def test_loading_draws_no_numbers_that_the_file_replaces(make_gpt2, monkeypatch):
    """To draw on the meta device, torch imports its compiler, which takes 2 s."""
    monkeypatch.setattr(nn.init, "normal_", None)
    load_gpt2(*read_model(make_gpt2()))


def test_published_tensors_go_in_and_come_out(make_gpt2):
    """With or without the prefix, a stored head and buffers of the causal mask: the same model."""
    tensors = gpt2_tensors()
    plain = load_gpt2(*read_model(make_gpt2()))
    more = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    more |= {
        "lm_head.weight": tensors["wte.weight"].clone(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    more |= {"transformer.h.1.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8)}
    full = load_gpt2(*read_model(make_gpt2("full", more)))
    for model in (plain, full):
        found = model.published(model.state_dict())
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_six_groups(make_gpt2):
    model = load_gpt2(*read_model(make_gpt2()))
    groups = model.prunable()
    assert [len(weights) for weights in groups.values()] == [2] * 6
    joined = gpt2_tensors()["h.1.attn.c_attn.weight"]  # [in, 3 * out]
    for third, group in enumerate(("query", "key", "value")):
        assert torch.equal(
            groups[group][f"h.1.attn.{group}.weight"].T, joined[:, 16 * third : 16 * third + 16]
        )
    shapes = {group: tuple(next(iter(weights.values())).shape) for group, weights in groups.items()}
    assert (
        shapes["attn_output"] == (16, 16)
        and shapes["intermediate"] == (24, 16)
        and shapes["output"] == (16, 24)
    )
    masks = Masks(groups, METHODS["smp-s"]).choose(0.5)
    assert sum(mask.sum().item() for mask in masks.values()) == 2 * (4 * 16 * 16 + 2 * 16 * 24) // 2


def test_a_smaller_model_computes_what_zeros_compute(make_gpt2, ids):
    """Heads and neurons whose outgoing weights are zero can be taken out."""
    model = load_gpt2(*read_model(make_gpt2())).eval()
    for block in model.h:
        block.attn.c_proj.weight.data[:, :4] = 0  # head 0 of four
        block.mlp.c_proj.weight.data[:, 5:] = 0
    kept = [torch.tensor([1, 2, 3])] * 2, [torch.arange(5)] * 2
    smaller = shrink(model, *kept)
    assert smaller.config.layers == [(3, 5), (3, 5)] and not smaller.training
    with torch.inference_mode():
        assert torch.allclose(smaller(ids), model(ids), atol=1e-5)
    again = load_gpt2(
        json.loads(
            json.dumps(GPT2_CONFIG | {"heads_per_layer": [3, 3], "neurons_per_layer": [5, 5]})
        ),
        smaller.published(smaller.state_dict()),
    )
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids), smaller(ids))


def test_a_layer_may_have_no_heads(make_gpt2, ids):
    model = load_gpt2(*read_model(make_gpt2()))
    smaller = shrink(model, [torch.arange(0), torch.arange(4)], [torch.arange(24), torch.arange(0)])
    smaller(ids).sum().backward()
    assert smaller.h[0].attn.query.weight.grad.shape == (0, 16)
    stored = GPT2_CONFIG | {"heads_per_layer": [0, 4], "neurons_per_layer": [24, 0]}
    again = load_gpt2(stored, smaller.published(smaller.state_dict()))
    assert torch.equal(again.eval()(ids), smaller.eval()(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"model_type": "bert"}, "model_type is 'bert'; the models for this task are gpt2"),
        ({"model_type": None}, "model_type is None"),
        ({"n_embd": None}, "n_embd is None"),
        ({"n_embd": "16"}, "n_embd is '16'"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"n_head": 3}, "the weights do not fit config.json: size mismatch"),
        ({"neurons_per_layer": [25, 1]}, "the weights do not fit config.json: size mismatch"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        load_gpt2(GPT2_CONFIG | changes, gpt2_tensors())


def test_what_does_not_fit_is_named():
    def without(*names, **more):
        return {name: tensor for name, tensor in gpt2_tensors().items() if name not in names} | more

    for tensors, message in [
        (without("ln_f.bias"), "ln_f.bias"),
        (without("h.0.attn.c_attn.weight"), "h.0.attn.query.weight"),
        (without(**{"h.0.attn.c_attn.bias": torch.zeros(())}), "h.0.attn.query.bias"),
        (without(**{"h.0.attn.c_attn.weight": torch.zeros(16, 47)}), "size mismatch for h.0.attn"),
        (
            without(**{"h.0.mlp.c_fc.weight": torch.zeros(24, 16)}),
            "size mismatch for h.0.mlp.c_fc.weight",
        ),
        (
            without(**{"lm_head.weight": torch.zeros(40, 16)}),
            "lm_head.weight differs from wte.weight",
        ),
        (without(**{"transformer.wte.weight": torch.zeros(40, 16)}), "tensors twice"),
        (without(**{"h.2.ln_1.bias": torch.zeros(16)}), "h.2.ln_1.bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_gpt2(GPT2_CONFIG, tensors)


def test_a_file_of_the_fixture_is_in_published_layout(make_gpt2):
    stored = load_file(make_gpt2() / "model.safetensors")
    assert stored["h.0.attn.c_attn.weight"].shape == (16, 48) and stored[
        "h.0.mlp.c_proj.weight"
    ].shape == (24, 16)
