"""Masked language modelling: what is masked, what is read, and runs from pretraining to a mask."""

import json
import math
import re

import numpy as np
import pytest
import torch
from acts import interrupt
from conftest import WORDS
from safetensors.torch import load_file

import data
import eval as eval_
import train
from data import TASKS
from extras import mlm
from mask import METHODS

MASK = 4  # the id of [MASK] in the tests' tokenizer


@pytest.fixture
def texts(tmp_path):
    """data_dir with a text of random words, a paragraph per line."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "texts" / "mlm"
    folder.mkdir(parents=True)
    for split, lines in (("train", 120), ("dev", 30)):
        rows = [" ".join(rng.choice(WORDS[:9], 8)) for _ in range(lines)]
        (folder / f"{split}.txt").write_text("\n".join(rows))
    return folder.parent


@pytest.fixture
def pretrain(make_model, texts, tmp_path):
    def flags(name, *more):
        given = ["--task", "mlm", "--data-dir", texts, "--model", tmp_path / "model"]
        given += ["--method", "finetune", "--steps", 12, "--evals", 2, "--batch", 8]
        given += ["--length", 16, "--device", "cpu", "--out", tmp_path / name]
        return [str(word) for word in [*given, *more]]

    make_model()
    return flags


def read(texts, tmp_path, split, length=16):
    model, tokenizer = mlm.load(tmp_path / "model", length, "words")
    path = texts / "mlm" / f"{split}.txt"
    return model, mlm.read_blocks(TASKS["mlm"], split, path, tokenizer)


def test_blocks_and_what_is_masked(make_model, texts, tmp_path):
    """Three of fourteen tokens, a fifth rounded up. What the model guesses is what was there."""
    make_model()
    for split in ("train", "dev"):
        _, blocks = read(texts, tmp_path, split)
        assert blocks.ids.shape[1] == 16 and (blocks.ids[:, [0, 15]] == [2, 3]).all()
        rows = np.arange(len(blocks))[::-1]
        inputs, labels = blocks.arrays(rows)
        masked = inputs[0] == MASK
        assert labels.shape == (len(rows), 3) and (masked.sum(1) == 3).all()
        assert not masked[:, [0, 15]].any()  # never [CLS] or [SEP]
        whole = inputs[0].copy()
        whole[masked] = labels.flatten()
        assert (whole == blocks.ids[rows]).all()
        assert (inputs[1] == 0).all() and (inputs[2] == 1).all()
        again, _ = blocks.arrays(rows)
        assert (again == inputs).all() == (split == "dev")  # of train, others each time


def test_a_text_that_says_mask_has_nothing_to_guess_there(make_model, texts, tmp_path):
    make_model()
    path = texts / "mlm" / "train.txt"
    path.write_text(path.read_text().replace(WORDS[0], "[MASK]"))
    _, blocks = read(texts, tmp_path, "train")
    inputs, _ = blocks.arrays(np.arange(len(blocks)))
    assert ((inputs[0] == MASK).sum(1) == 3).all()


def test_the_head_reads_masked_tokens_alone(make_model, texts, tmp_path):
    make_model()
    model, blocks = read(texts, tmp_path, "dev")
    inputs, labels = data.collate(blocks, np.arange(4))
    model.eval()
    with torch.no_grad():
        every = model.word_logits(model.bert(*inputs))  # [B, S, V]
        logits = model(*inputs)  # [B, K, V]
    expected = every[inputs[0] == MASK].view_as(logits)
    assert torch.allclose(logits, expected, atol=1e-5)

    reduced = blocks.reduce_logits(logits, labels)
    loss, hit = 0.0, 0
    for b in range(4):
        for k in range(3):
            log_p = logits[b, k].log_softmax(0)
            loss -= log_p[labels[b, k]].item()
            hit += int(log_p.argmax() == labels[b, k])
    found = blocks.score(reduced, ())
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(loss / 12), rel=1e-5)
    assert found["accuracy"] == pytest.approx(hit / 12)


def test_tokens_are_kept_in_the_cache(make_model, texts, tmp_path, cache_folder):
    make_model()
    _, first = read(texts, tmp_path, "dev")
    (store,) = (cache_folder / "tokens").iterdir()
    before = store.stat().st_mtime_ns
    _, second = read(texts, tmp_path, "dev")
    assert (first.ids == second.ids).all() and store.stat().st_mtime_ns == before
    content = bytearray(store.read_bytes())
    content[-1] ^= 1
    store.write_bytes(content)
    message = f"delete this file.*: {re.escape(str(store))} was altered"
    with pytest.raises(ValueError, match=message):
        read(texts, tmp_path, "dev")
    store.unlink()
    _, third = read(texts, tmp_path, "dev", length=8)  # a text has the same tokens at any length
    assert [path.name for path in (cache_folder / "tokens").iterdir()] == [store.name]
    assert third.ids.shape[1] == 8


def test_from_pretraining_to_a_mask(pretrain, glue, tmp_path, capsys, fails):
    """Every weight that is read trains, an interruption changes nothing, and the result prunes."""
    train.main(pretrain("whole"))
    interrupt(pretrain("parts"), 6)
    train.main(["--resume", str(tmp_path / "parts")])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(whole[n].equal(parts[n]) for n in whole)
    before = load_file(tmp_path / "model" / "model.safetensors")
    names = [name for name in whole if "pooler" not in name]
    assert not any(whole[name].equal(before[name]) for name in names)

    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    capsys.readouterr()
    eval_.main([str(tmp_path / "whole")])
    value = result["final"]["pseudo_perplexity"]
    assert f"dev (17 examples): pseudo_perplexity {value:.4f}" in capsys.readouterr().out
    said = fails(eval_.main, [tmp_path / "whole", "--text", "x"])
    assert "--text: a masked language model has no answers" in said

    flags = ["--model", tmp_path / "whole", "--data-dir", glue, "--steps", 2, "--length", 16]
    train.main([str(flag) for flag in [*flags, "--out", tmp_path / "mask", "--device", "cpu"]])
    assert json.loads((tmp_path / "mask" / "result.json").read_text())["density"] == 0.5


def test_a_smaller_model_is_one_too(pretrain, tmp_path):
    """P-pruning rebuilds the model."""
    method = ["--method", "p-pruning", "--sparsity", "0.3"]
    flags = pretrain("small")
    at = flags.index("--method")
    train.main([*flags[:at], *method, *flags[at + 2 :]])
    result = json.loads((tmp_path / "small" / "result.json").read_text())
    assert result["density"] < 1 and METHODS[result["method"]].before


def test_what_does_not_fit(make_model, texts, tmp_path, pretrain, fails):
    without = make_model("without", {k: v for k, v in load_file(
        tmp_path / "model" / "model.safetensors").items() if "cls." not in k})  # fmt: skip
    flags = pretrain("x")
    flags[flags.index("--model") + 1] = str(without)
    assert "needs [MASK], a masked-LM head, and no --head" in fails(train.main, flags)
    assert "and no --head" in fails(train.main, pretrain("y", "--head", "classifier"))
    (texts / "mlm" / "dev.txt").write_text("too short")
    assert "dev.txt is shorter than a block of 16 tokens" in fails(train.main, pretrain("z"))
