"""model.py against torch's own encoder layer, and strict loading."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import CONFIG, bert_tensors, load_config, load_model
from oracle import IDS, MASK, TYPES, plain_bert, roberta_name
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn

import model
from plumbing.checkpoints import cutting_tokenizer, open_tokenizer, tokenizer_bytes
from plumbing.run import identity


def test_encoder_and_masked_lm_head_agree_with_torch(make_model):
    model = load_model(make_model(), words=[5, 6]).eval()
    hidden = model.bert(IDS, TYPES, MASK)
    expected, logits = plain_bert(bert_tensors(CONFIG))
    assert torch.allclose(hidden[MASK.bool()], expected[MASK.bool()], atol=1e-5)
    assert torch.allclose(model.word_logits(hidden)[MASK.bool()], logits[MASK.bool()], atol=1e-5)
    assert torch.allclose(
        model(IDS, TYPES, MASK), logits[:, 0, [5, 6]], atol=1e-5
    )  # and one token is enough


def test_loading_draws_no_numbers_that_the_file_replaces(make_model, monkeypatch):
    """To draw on the meta device, torch imports its compiler, which takes 2 s."""
    monkeypatch.setattr(nn.init, "normal_", None)
    load_model(make_model(), words=[5, 6])


def test_without_a_head_logits_are_products_with_the_word_embeddings(make_model):
    t = bert_tensors(CONFIG, head=False)
    model = load_model(make_model(tensors=t), words=[5, 6]).eval()
    expected = plain_bert(t)[0][:, 0] @ t["bert.embeddings.word_embeddings.weight"][[5, 6]].T
    assert torch.allclose(model(IDS, TYPES, MASK), expected, atol=1e-5)


def test_padding_does_not_matter(make_model):
    model = load_model(make_model(), words=[5, 6]).eval()
    short = model(IDS[1:, :3], TYPES[1:, :3], MASK[1:, :3])
    assert torch.allclose(model(IDS, TYPES, MASK)[1:], short, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_three_lines_is_that_of_the_fused_kernel(causal):
    """In bfloat16 a CPU takes the three lines. The kernel reads the same numbers in float32."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 3, 7, 4).bfloat16()  # each [B, heads, S, D]
    attn_bias = torch.zeros(2, 1, 1, 7)
    attn_bias[1, ..., 5:] = -math.inf  # padding
    if causal:
        attn_bias = torch.full((7, 7), -math.inf).triu(1)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        mixed = model.attention(*inputs, attn_bias.to(dtype), 0.0, causal)
        mixed.backward(grad.to(dtype))
        found[dtype] = [mixed, *(x.grad for x in inputs)]
        assert all(x.dtype == dtype for x in found[dtype])
    for plain, fused in zip(*found.values(), strict=True):
        assert (plain.float() - fused).abs().max() < 0.03
    for grad in found[torch.bfloat16][2:] if not causal else []:
        assert not grad[1, :, 5:].any()  # nobody has seen the padding


def test_attention_drops_probabilities_and_doubles_the_others():
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)  # every token counts for 1/64
    attn_bias = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    torch.manual_seed(0)
    weights = model.attention(q, q, torch.eye(64, dtype=torch.bfloat16)[None, None], attn_bias, 0.5)
    dropped = weights == 0
    assert torch.equal(weights, torch.where(dropped, 0.0, 2 / 64).bfloat16())
    assert 0.45 < dropped.float().mean() < 0.55  # of 4,096


def test_names_of_published_checkpoints_are_understood(make_model):
    t = bert_tensors(CONFIG)
    old = {
        "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": t["cls.predictions.bias"].clone(),
        "cls.seq_relationship.weight": torch.ones(2, 16),
        "bert.pooler.dense.weight": torch.ones(16, 16),
        "bert.embeddings.position_ids": torch.arange(32),
    }
    for n, v in t.items():
        n = n.replace("LayerNorm.weight", "LayerNorm.gamma")
        old[n.replace("LayerNorm.bias", "LayerNorm.beta")] = v
    half = {n: v.half() for n, v in t.items()}
    bare = bert_tensors(CONFIG, head=False, prefix="")
    for name, tensors, expected in (
        ("gamma", old, t),
        ("half", half, {n: v.float() for n, v in half.items()}),
        ("bare", bare, {f"bert.{n}": v for n, v in bare.items()}),
    ):
        loaded = load_model(make_model(name, tensors), words=[5, 6]).state_dict()
        assert loaded.keys() == expected.keys() and all(
            loaded[n].equal(v) for n, v in expected.items()
        )


def test_roberta_is_bert_under_other_names_with_positions_behind_the_padding_id(make_model):
    t = bert_tensors(CONFIG)
    plain = load_model(make_model("bert", t), words=[5, 6]).eval()
    names = {roberta_name(n): v for n, v in t.items()}
    assert (
        "lm_head.dense.weight" in names
        and "lm_head.bias" in names
        and "lm_head.layer_norm.bias" in names
    )
    positions = "roberta.embeddings.position_embeddings.weight"
    names[positions] = torch.cat(
        [torch.full((2, 16), 99.0), names[positions]]
    )  # the first two rows are not used
    changes = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 34}
    roberta = load_model(make_model("roberta", names, **changes), words=[5, 6]).eval()
    assert roberta.config.longest_input == plain.config.longest_input == 32
    assert roberta(IDS, TYPES, MASK).equal(plain(IDS, TYPES, MASK))
    assert roberta.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_padding_ids_that_config_json_leaves_out_are_those_of_the_family(make_model, family):
    """As RoBERTa's own: positions from 2 on."""
    config = CONFIG | {"max_position_embeddings": 34, "model_type": family}
    names = {roberta_name(n): v for n, v in bert_tensors(config).items()}
    given = load_model(make_model("given", names, **config, pad_token_id=1), words=[5, 6]).eval()
    left_out = load_model(make_model("left-out", names, **config), words=[5, 6]).eval()
    assert given.config == left_out.config and left_out.config.first_position == 2
    assert given(IDS, TYPES, MASK).equal(left_out(IDS, TYPES, MASK))
    assert load_model(make_model("bert"), words=[5, 6]).config.first_position == 0


def test_a_padding_token_in_a_text_has_no_position(make_model):
    """As in RoBERTa's own code: those behind it move up."""
    config = CONFIG | {"max_position_embeddings": 34, "model_type": "roberta"}
    model = load_model(
        make_model("m", {roberta_name(n): v for n, v in bert_tensors(config).items()}, **config),
        [5, 6],
    )
    table = model.bert.embeddings.position_embeddings.weight
    seen = model.bert.embeddings.eval()(torch.tensor([[2, 9, 1, 7, 3]]), torch.zeros(1, 5).long())
    words = model.bert.embeddings.word_embeddings.weight[[2, 9, 1, 7, 3]]
    types = model.bert.embeddings.token_type_embeddings.weight[0]
    expected = model.bert.embeddings.LayerNorm(words + types + table[[2, 3, 1, 4, 5]])
    assert torch.allclose(seen[0], expected, atol=1e-6)


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
        (
            lambda t: t.update({QUERY: torch.ones(16, 8)}),
            "size mismatch for " + QUERY + r".*\[16, 8\].*\[16, 16\]",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.2.x": torch.ones(1)}),
            "Unexpected key.*layer.2.x",
        ),
        (
            lambda t: t.update({"bert.embeddings.LayerNorm.gamma": torch.ones(16)}),
            "LayerNorm.weight is there twice",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": t[WORDS] + 1}),
            "only tied decoders",
        ),
        (lambda t: t.pop("cls.predictions.bias"), "Missing key.*cls.predictions.bias"),
    ],
)
def test_every_tensor_is_used_once_or_named(make_model, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(make_model(tensors=broken(change)), words=[5, 6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and only 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        (
            {"model_type": "distilbert", "vocab_size": None},
            "model_type is 'distilbert'; the models for this task are",
        ),
        ({"model_type": ["bert"]}, "model_type is"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3}, "the weights do not fit config.json: size mismatch"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"model_type": "roberta"}, "model_type is 'roberta', but its tensors are bert"),
        ({"model_type": "camembert"}, "model_type is 'camembert', but its tensors are bert"),
        ({"num_hidden_layers": 1}, "the weights do not fit config.json: Unexpected key.*layer.1"),
    ],
)
def test_config_is_checked(make_model, changes, message):
    folder = make_model()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message):
        load_model(folder, words=[5, 6])


@pytest.mark.parametrize("counts", [{"heads_per_layer": (4,)}, {"neurons_per_layer": (24, 24, 24)}])
def test_a_config_has_a_number_for_each_layer(make_model, counts):
    """read_config refuses other files, and a Config that was built otherwise raises."""
    names = {field.name for field in dataclasses.fields(model.Config)}
    values = {name: value for name, value in CONFIG.items() if name in names}
    assert model.Config(**values).layers == [(4, 24)] * 2
    one = make_model("one", tensors={}, num_hidden_layers=1)
    assert load_config(one).layers == [(4, 24)]
    with pytest.raises(ValueError, match="zip"):
        _ = model.Config(**values, **counts).layers


def test_unreadable_files(make_model):
    folder = make_model()
    content = (folder / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for damaged, message in ((content[:-10], "not a whole safetensors"), (pointer, "git lfs pull")):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"model.safetensors is .*{message}"):
            load_model(folder, words=[5, 6])
    (folder / "model.safetensors").write_bytes(content)
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "it is not an object"),
        ("{}", "vocab_size is missing"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(folder, words=[5, 6])


def test_fingerprint_tells_weights_apart(make_model, tmp_path):
    same = [
        identity(folder, load_model(folder, words=[5, 6])) for folder in map(make_model, ("a", "b"))
    ]
    assert same[0] == same[1]
    t = bert_tensors(CONFIG)
    t[QUERY][3, 3] = torch.nextafter(t[QUERY][3, 3], torch.tensor(9.0))
    save_file(t, tmp_path / "a" / "model.safetensors")
    assert (
        identity(tmp_path / "a", load_model(tmp_path / "a", words=[5, 6]))["fingerprint"]
        != same[0]["fingerprint"]
    )


# --- layouts of published checkpoints ---


def test_weights_in_several_files(make_model):
    folder, t = make_model(), bert_tensors(CONFIG)
    whole = load_model(folder, words=[5, 6]).state_dict()
    (folder / "model.safetensors").unlink()
    shards = {f"model-0000{n}-of-00002.safetensors": list(t)[n - 1 :: 2] for n in (1, 2)}
    for shard, names in shards.items():
        save_file({name: t[name] for name in names}, folder / shard)
    loaded = load_model(folder, words=[5, 6]).state_dict()
    assert loaded.keys() == whole.keys() and all(loaded[n].equal(w) for n, w in whole.items())
    (folder / shard).unlink()
    with pytest.raises(ValueError, match="do not fit config.json: Missing key"):
        load_model(folder, words=[5, 6])


ROBERTA = CONFIG | {
    "model_type": "roberta",
    "max_position_embeddings": 34,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
ROBERTA_LOGITS = [[-1.04766, 1.25575], [-0.99668, 1.24681]]
QA_HEAD = {"qa_outputs.weight": torch.ones(2, 16), "qa_outputs.bias": torch.ones(2)}
CLASSIFIER = {
    "classifier.dense.weight": torch.ones(16, 16),
    "classifier.dense.bias": torch.ones(16),
}
CLASSIFIER |= {
    "classifier.out_proj.weight": torch.ones(2, 16),
    "classifier.out_proj.bias": torch.ones(2),
}


@pytest.mark.parametrize(
    ("config", "prefix", "head", "logits"),
    [
        (ROBERTA, "roberta.", None, ROBERTA_LOGITS),
        (ROBERTA | {"model_type": "xlm-roberta"}, "roberta.", None, ROBERTA_LOGITS),
        (ROBERTA | {"model_type": "camembert"}, "roberta.", None, ROBERTA_LOGITS),
        (ROBERTA, "roberta.", CLASSIFIER, [[-1.68581, -1.03819], [-1.56633, -0.82895]]),
        (CONFIG, "bert.", QA_HEAD, [[1.45684, 0.8939], [1.76941, 1.95246]]),
        (CONFIG | {"type_vocab_size": 1}, "bert.", None, [[0.3647, 1.09894], [0.99786, -0.29024]]),
    ],
    ids=[
        "roberta",
        "xlm-roberta",
        "camembert",
        "sequence classification",
        "question answering",
        "one segment",
    ],
)
def test_logits_recorded_from_transformers(make_model, config, prefix, head, logits):
    """transformers 5.24 on the same folders.

    MaskedLM's logits, or the last state times the embeddings of the words.
    """
    tensors = bert_tensors(config, head=head is None)
    segments = "bert.embeddings.token_type_embeddings.weight"
    tensors[segments] = tensors[segments][: config["type_vocab_size"]].clone()
    if prefix == "roberta.":
        tensors = {roberta_name(name): tensor for name, tensor in tensors.items()}
    model = load_model(make_model("m", tensors | (head or {}), **config), words=[5, 6]).eval()
    types = TYPES.clamp(max=config["type_vocab_size"] - 1)
    assert torch.allclose(model(IDS, types, MASK), torch.tensor(logits), atol=2e-5)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_a_wrapper_left_behind(make_model, wrapper):
    t = bert_tensors(CONFIG)
    loaded = load_model(
        make_model("m", {wrapper + n: v for n, v in t.items()}), words=[5, 6]
    ).state_dict()
    assert all(loaded[n].equal(v) for n, v in t.items())


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_heads_of_other_tasks_are_left_out(make_model, head):
    t = bert_tensors(CONFIG, head=False)
    extra = {"qa_outputs.weight": torch.ones(2, 16), "qa_outputs.bias": torch.ones(2)}
    extra |= {
        "classifier.dense.weight": torch.ones(16, 16),
        "classifier.out_proj.bias": torch.ones(3),
    }
    extra |= {
        f"bert.embeddings.{name}_ids": torch.zeros(1, 32).long()
        for name in ("position", "token_type")
    }
    loaded = load_model(make_model("m", t | extra), words=[5, 6], head=head).state_dict()
    assert loaded.keys() - t.keys() == (
        {"classifier.weight", "classifier.bias"} if head == "classifier" else set()
    )


def test_a_tied_decoder_may_be_stored_in_place_of_what_it_is_tied_to(make_model):
    """safetensors' save_model does so: it keeps one of the names that share their memory."""
    t = bert_tensors(CONFIG)
    stored = dict(t)
    stored["cls.predictions.decoder.weight"] = stored.pop(WORDS)
    stored["cls.predictions.decoder.bias"] = stored.pop("cls.predictions.bias")
    loaded = load_model(make_model("m", stored), words=[5, 6]).state_dict()
    assert loaded.keys() == t.keys() and all(loaded[n].equal(v) for n, v in t.items())


def test_numbers_that_are_not_finite_are_named_before_training(make_model):
    for value in (math.nan, math.inf):
        t = bert_tensors(CONFIG)
        t["bert.embeddings.position_embeddings.weight"][31, 15] = value  # which no text reaches
        with pytest.raises(
            ValueError, match="must be finite floats.*position_embeddings.weight"
        ):
            load_model(make_model(f"m{value}", t), words=[5, 6])


def test_a_tokenizer_is_made_of_vocab_txt(make_model):
    folder = make_model()
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(stored["model"]["vocab"], key=stored["model"]["vocab"].get)
    ours = cutting_tokenizer(folder, 16)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    made = cutting_tokenizer(folder, 16)
    for text in ("a Good film", "unhappy fun", "x"):
        for pair in (None, "it was dull"):
            a, b = ours.encode(text, pair), made.encode(text, pair)
            assert (a.ids, a.type_ids) == (b.ids, b.type_ids)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert cutting_tokenizer(folder, 16).encode("Good").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="cannot read its tokenizer.*sep_token not found"):
        cutting_tokenizer(folder, 16)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_of(folder, vocabulary, text, settings=None, added=None):
    """The tokens of a text, for a folder with this vocab.txt and what stands beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    (folder / "added_tokens.json").write_text(json.dumps(added or {}))
    encoded = cutting_tokenizer(folder, 16).encode(text)
    return encoded.tokens[1:-1], encoded.ids[1:-1]


def test_a_line_of_a_vocabulary_ends_at_a_newline_alone(tmp_path):
    """bert-base-chinese has U+2028 as a word. What stands behind it keeps its id."""
    odd = ["\u2028", "\x85", "\x0c", "\x1c"]
    vocabulary = [*SPECIAL, *odd, "film"]
    assert words_of(tmp_path / "m", vocabulary, "film") == (["film"], [len(SPECIAL) + len(odd)])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, "mochte"),
        ({"do_lower_case": False}, "M\u00f6chte"),
        ({"strip_accents": False}, "m\u00f6chte"),
        ({"do_lower_case": False, "strip_accents": True}, "Mochte"),
    ],
)
def test_settings_beside_a_vocabulary_are_heeded(tmp_path, settings, word):
    """By default accents go with the capitals, as BERT's authors have it."""
    vocabulary = [*SPECIAL, "mochte", "M\u00f6chte", "m\u00f6chte", "Mochte"]
    assert words_of(tmp_path / "m", vocabulary, "M\u00f6chte", settings)[0] == [word]


def test_chinese_characters_are_words_unless_the_settings_say_otherwise(tmp_path):
    vocabulary = [*SPECIAL, "\u4e00", "\u4e01", "\u4e00\u4e01"]
    text = "\u4e00\u4e01"
    assert words_of(tmp_path / "m", vocabulary, text)[0] == ["\u4e00", "\u4e01"]
    settings = {"tokenize_chinese_chars": False}
    assert words_of(tmp_path / "m", vocabulary, text, settings)[0] == [text]


def test_added_tokens_are_one_token_each(tmp_path):
    vocabulary = [*SPECIAL, "a", "film", "[unused1]"]
    decoder = {"added_tokens_decoder": {"8": {"content": "[ENT]"}}}
    for settings, added in ((decoder, {}), ({}, {"[ENT]": 8})):
        found = words_of(tmp_path / "m", vocabulary, "a [ENT] film", settings, added)
        assert found == (["a", "[ENT]", "film"], [5, 8, 6])
    settings = {"additional_special_tokens": ["[unused1]"]}
    assert words_of(tmp_path / "m", vocabulary, "a [unused1] film", settings)[1] == [5, 7, 6]
    far = words_of(tmp_path / "m", vocabulary, "a [ENT] film", {}, {"[ENT]": 11})
    assert far == (["a", "[ENT]", "film"], [5, 11, 6])  # whatever ids lie between


def test_special_tokens_beside_a_vocabulary_are_heeded_or_refused(tmp_path):
    """Published folders have them as texts or as dicts, and null where there are none."""
    folder = tmp_path / "m"
    vocabulary = [*SPECIAL, "a", "film", "[unused1]", "<s>"]
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    usual = {f"{name}_token": {"content": token} for name, token in names.items()}
    usual |= {"bos_token": "[CLS]", "eos_token": None, "add_bos_token": False}
    folder.mkdir()
    more = {"additional_special_tokens": [{"content": "[unused1]", "lstrip": False}]}
    (folder / "special_tokens_map.json").write_text(json.dumps(usual | more))
    assert words_of(folder, vocabulary, "a [unused1] film", usual)[1] == [5, 7, 6]

    others = [("never_split", ["a"]), ("do_basic_tokenize", False), ("extra_special_tokens", ["a"])]
    refused = [("cls_token", "<s>"), ("eos_token", {"content": "<s>"}), ("bos_token", "<s>")]
    for name, value in [*refused, *others]:
        (folder / "special_tokens_map.json").write_text(json.dumps(usual | {name: value}))
        with pytest.raises(ValueError, match=f"{name} is .*not supported with a vocab.txt"):
            words_of(folder, vocabulary, "a")


def test_a_tokenizer_drops_nothing(tmp_path):
    """A BPE with dropout would merge a and b now and then only."""
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3, "dropout": 4}
    stored = Tokenizer(models.BPE(vocab, [("a", "b")], dropout=0.5, unk_token="[UNK]"))
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    assert all(tokenizer.encode("ab").ids == [3] for _ in range(50))

    # Nor does what a run takes along. A file without dropout stays as it is, to the byte.
    cleaned = json.loads((tmp_path / "tokenizer.json").read_text())
    cleaned["model"]["dropout"] = None
    assert json.loads(tokenizer_bytes(tmp_path)) == cleaned
    (tmp_path / "tokenizer.json").write_text(json.dumps(cleaned))
    assert tokenizer_bytes(tmp_path).decode() == json.dumps(cleaned)


@pytest.mark.parametrize("family", [None, "roberta", "bert"])
def test_robertas_tensors_make_a_roberta(make_model, family):
    """Its positions begin behind the padding, so reading it as BERT gives other logits."""
    tensors = {roberta_name(name): tensor for name, tensor in bert_tensors(CONFIG).items()}
    folder = make_model("m", tensors, model_type=family)
    if family is None:
        stored = json.loads((folder / "config.json").read_text())
        del stored["model_type"]
        (folder / "config.json").write_text(json.dumps(stored))
    if family == "bert":
        with pytest.raises(ValueError, match="model_type is 'bert', but its tensors are roberta"):
            load_model(folder, [5, 6])
    else:
        assert load_model(folder, [5, 6]).config.model_type == "roberta"


def test_a_classifier_needs_no_tied_decoder(make_model):
    tensors = bert_tensors(CONFIG)
    tensors["cls.predictions.decoder.weight"] = tensors[WORDS] + 1
    load_model(make_model("m", tensors), [0, 0], "classifier")


def test_classifier_logits_by_hand(make_model):
    tensors = bert_tensors(CONFIG) | {"classifier.weight": torch.ones(2, 16)}
    tensors |= {"classifier.bias": torch.tensor([0.0, 1.0])}
    tensors |= {
        "bert.pooler.dense.weight": 2 * torch.eye(16),
        "bert.pooler.dense.bias": torch.ones(16),
    }
    model = load_model(make_model("m", tensors), [7, 8], "classifier", fresh=False).eval()
    inputs = torch.tensor([[2, 9, 3]]), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    cls = model.bert(*inputs)[:, 0]
    expected = (2 * cls + 1).tanh().sum() + torch.tensor([0.0, 1.0])
    assert torch.allclose(model(*inputs)[0], expected, atol=1e-5)


def test_a_classifier_is_fresh_whatever_the_model_brings(make_model):
    tensors = bert_tensors(CONFIG) | {
        "classifier.weight": torch.ones(2, 16),
        "classifier.bias": torch.ones(2),
    }
    folder = make_model("m", tensors)
    assert load_model(folder, [7], "classifier").classifier.weight.shape == (1, 16)
    assert not load_model(folder, [7, 8], "classifier").classifier.bias.any()
    assert load_model(folder, [7, 8], "classifier", fresh=False).classifier.bias.all()
    with pytest.raises(ValueError, match="Missing key.*classifier.bias"):
        load_model(make_model("n"), [7, 8], "classifier", fresh=False)
