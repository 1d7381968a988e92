"""model.py against torch's own encoder layer, and strict loading."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, bert_tensors
from safetensors.torch import save_file
from torch import nn

from model import load_model
from plumbing.run import identity

IDS = torch.tensor([[2, 5, 9, 13, 3], [2, 7, 3, 0, 0]])
TYPES = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


def oracle(t, ids=IDS, types=TYPES, mask=MASK):
    """(last hidden states, masked-LM logits) of the same weights through nn.TransformerEncoderLayer."""
    size = ids.shape[1]
    h = t["bert.embeddings.word_embeddings.weight"][ids] + t["bert.embeddings.position_embeddings.weight"][:size]
    h = h + t["bert.embeddings.token_type_embeddings.weight"][types]
    h = F.layer_norm(h, (16,), t["bert.embeddings.LayerNorm.weight"], t["bert.embeddings.LayerNorm.bias"], 1e-12)
    for n in range(2):
        at = f"bert.encoder.layer.{n}."
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.1, "gelu", 1e-12, batch_first=True).eval()
        qkv = [at + f"attention.self.{x}." for x in ("query", "key", "value")]
        state = {f"self_attn.in_proj_{x}": torch.cat([t[name + x] for name in qkv]) for x in ("weight", "bias")}
        for ours, theirs in {
            "attention.output.dense": "self_attn.out_proj", "intermediate.dense": "linear1", "output.dense": "linear2",
            "attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2",
        }.items():  # fmt: skip
            state |= {f"{theirs}.{x}": t[f"{at}{ours}.{x}"] for x in ("weight", "bias")}
        layer.load_state_dict(state)
        h = layer(h, src_key_padding_mask=mask == 0)
    if "cls.predictions.bias" not in t:
        return h, None
    at = "cls.predictions.transform."
    head = F.gelu(F.linear(h, t[f"{at}dense.weight"], t[f"{at}dense.bias"]))
    head = F.layer_norm(head, (16,), t[f"{at}LayerNorm.weight"], t[f"{at}LayerNorm.bias"], 1e-12)
    return h, head @ t["bert.embeddings.word_embeddings.weight"].T + t["cls.predictions.bias"]


def test_encoder_and_masked_lm_head_agree_with_torch(make_model):
    model = load_model(make_model(), words=[5, 6]).eval()
    hidden = model.bert(IDS, TYPES, MASK)
    expected, logits = oracle(bert_tensors(CONFIG))
    assert torch.allclose(hidden[MASK.bool()], expected[MASK.bool()], atol=1e-5)
    assert torch.allclose(model.word_logits(hidden)[MASK.bool()], logits[MASK.bool()], atol=1e-5)
    assert torch.allclose(model(IDS, TYPES, MASK), logits[:, 0, [5, 6]], atol=1e-5)  # and one token is enough


def test_without_a_head_logits_are_products_with_the_word_embeddings(make_model):
    t = bert_tensors(CONFIG, head=False)
    model = load_model(make_model(tensors=t), words=[5, 6]).eval()
    expected = oracle(t)[0][:, 0] @ t["bert.embeddings.word_embeddings.weight"][[5, 6]].T
    assert torch.allclose(model(IDS, TYPES, MASK), expected, atol=1e-5)


def test_padding_does_not_matter(make_model):
    model = load_model(make_model(), words=[5, 6]).eval()
    short = model(IDS[1:, :3], TYPES[1:, :3], MASK[1:, :3])
    assert torch.allclose(model(IDS, TYPES, MASK)[1:], short, atol=1e-6)


def test_names_of_published_checkpoints_are_understood(make_model):
    t = bert_tensors(CONFIG)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for n, v in t.items()}  # fmt: skip
    old |= {"cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": t["cls.predictions.bias"].clone(),
            "cls.seq_relationship.weight": torch.ones(2, 16), "bert.pooler.dense.weight": torch.ones(16, 16),
            "bert.embeddings.position_ids": torch.arange(32)}  # fmt: skip
    half = {n: v.half() for n, v in t.items()}
    bare = bert_tensors(CONFIG, head=False, prefix="")
    for name, tensors, expected in (
        ("gamma", old, t),
        ("half", half, {n: v.float() for n, v in half.items()}),
        ("bare", bare, {f"bert.{n}": v for n, v in bare.items()}),
    ):
        loaded = load_model(make_model(name, tensors), words=[5, 6]).state_dict()
        assert loaded.keys() == expected.keys() and all(loaded[n].equal(v) for n, v in expected.items())


def roberta_name(name):
    name = name.replace("bert.", "roberta.", 1).replace("cls.predictions.transform.", "lm_head.")
    return name.replace("cls.predictions.", "lm_head.").replace("lm_head.LayerNorm", "lm_head.layer_norm")


def test_roberta_is_bert_under_other_names_with_positions_behind_the_padding_id(make_model):
    t = bert_tensors(CONFIG)
    plain = load_model(make_model("bert", t), words=[5, 6]).eval()
    names = {roberta_name(n): v for n, v in t.items()}
    assert "lm_head.dense.weight" in names and "lm_head.bias" in names and "lm_head.layer_norm.bias" in names
    positions = "roberta.embeddings.position_embeddings.weight"
    names[positions] = torch.cat([torch.full((2, 16), math.nan), names[positions]])  # the first two rows are not used
    changes = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 34}
    roberta = load_model(make_model("roberta", names, **changes), words=[5, 6]).eval()
    assert roberta.config.longest_input == plain.config.longest_input == 32
    assert roberta(IDS, TYPES, MASK).equal(plain(IDS, TYPES, MASK))
    assert roberta.state_dict().keys() == plain.state_dict().keys()


def broken(change):
    t = bert_tensors(CONFIG)
    change(t)
    return t


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"Missing key.*{QUERY}"),
        (lambda t: t.update({QUERY: torch.ones(16, 8)}), "size mismatch for " + QUERY + r".*\[16, 8\].*\[16, 16\]"),
        (lambda t: t.update({"bert.encoder.layer.2.x": torch.ones(1)}), "Unexpected key.*layer.2.x"),
        (lambda t: t.update({"bert.embeddings.LayerNorm.gamma": torch.ones(16)}), "holds .* twice"),
        (lambda t: t.update({"cls.predictions.decoder.weight": t[WORDS] + 1}), "only tied decoders"),
        (lambda t: t.pop("cls.predictions.bias"), "Missing key.*cls.predictions.bias"),
    ],
)
def test_every_tensor_is_used_once_or_named(make_model, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(make_model(tensors=broken(change)), words=[5, 6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', not bert or roberta"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3}, "not divisible"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
        ({"model_type": "roberta", "pad_token_id": -1}, "pad_token_id is -1"),
    ],
)
def test_config_is_checked(make_model, changes, message):
    folder = make_model()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        load_model(folder, words=[5, 6])


def test_unreadable_files(make_model):
    folder = make_model()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(folder, words=[5, 6])
    for text, message in (("{", "not a JSON object"), ("[]", "not a JSON object"), ("{}", "vocab_size is None")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(folder, words=[5, 6])


def test_fingerprint_tells_weights_apart(make_model, tmp_path):
    same = [identity(folder, load_model(folder, words=[5, 6])) for folder in map(make_model, ("a", "b"))]
    assert same[0] == same[1]
    t = bert_tensors(CONFIG)
    t[QUERY][3, 3] = torch.nextafter(t[QUERY][3, 3], torch.tensor(9.0))
    save_file(t, tmp_path / "a" / "model.safetensors")
    assert identity(tmp_path / "a", load_model(tmp_path / "a", words=[5, 6]))["fingerprint"] != same[0]["fingerprint"]
