"""tools.export and tools.fresh with GPT-2, and with a model that lost heads and neurons."""

import json

import pytest
import torch
from conftest import gpt2_tensors
from safetensors.torch import load_file

import eval as eval_
import train
from data import TASKS
from extras import lm
from tools import export, fresh


@pytest.fixture
def run_on_texts(make_gpt2, texts, tmp_path):
    """run_on_texts(model, *flags) -> the result of a short run on the tiny `ptb`, in run/."""

    def go(model, *flags):
        given = ["--task", "ptb", "--model", model, "--data-dir", texts, "--out", tmp_path / "run"]
        given += ["--steps", 12, "--evals", 2, "--batch", 8, "--length", 16, "--device", "cpu"]
        train.main([str(flag) for flag in [*given, *flags]])
        return json.loads((tmp_path / "run" / "result.json").read_text())

    return go


def test_export_has_zeros_in_published_places(run_on_texts, make_gpt2, tmp_path):
    model = make_gpt2(
        "prefixed", {f"transformer.{name}": tensor for name, tensor in gpt2_tensors().items()}
    )
    result = run_on_texts(model, "--lr", 0.1)
    export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    before, after = (
        load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    pruned = [n for n in before if any(part in n for part in ("c_attn.w", "c_proj.w", "c_fc.w"))]
    assert sum(int((after[n] != 0).sum()) for n in pruned) == result["kept"]
    assert all(torch.equal(after[n], before[n]) or n in pruned for n in before)
    assert all(torch.equal(after[n][after[n] != 0], before[n][after[n] != 0]) for n in before)
    assert "GPT2LMHeadModel" in (tmp_path / "out" / "README.md").read_text()
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"]
        == "<|endoftext|>"
    )
    again = lm.load(tmp_path / "out", 16, "words")[
        0
    ]  # the exported folder is a model, and gives the same
    sets = eval_.load_sets(
        result, TASKS["ptb"].dev, None, eval_.load_run(tmp_path / "run").tokenizer
    )
    assert eval_.evaluate(again, {}, sets, (), "cpu") == pytest.approx(result["final"], rel=1e-5)


def test_compact_export_takes_out_what_is_dead(run_on_texts, make_gpt2, tmp_path, capsys):
    tensors = gpt2_tensors()
    tensors["h.0.mlp.c_proj.weight"][:7] = 0  # neurons that nobody reads, [in, out]
    tensors["h.1.attn.c_attn.weight"][:, 2 * 16 + 4 : 2 * 16 + 8] = (
        0  # head 1 has no values but its bias
    )
    run_on_texts(make_gpt2("dying", tensors), "--sparsity", 0.01, "--method", "smp-l")
    capsys.readouterr()
    export.main([str(tmp_path / "run"), str(tmp_path / "small"), "--compact"])
    assert "1 of 8 attention heads and 7 of 48 neurons are dead" in capsys.readouterr().out
    eval_.main([str(tmp_path / "small")])
    said = capsys.readouterr().out
    assert "heads and neurons left in each layer: [(4, 17), (3, 24)]\n" in said
    found, reported = (
        float(said.split(words)[1].split(",")[0])
        for words in (": perplexity ", "reported perplexity ")
    )
    assert found == pytest.approx(reported, rel=1e-4)


def test_a_fresh_folder(tmp_path, texts, fails):
    """Tokenizer, configuration, weights. Files that exist stay. A seed gives the same weights."""
    (tmp_path / "t.txt").write_text(" the film is good\n" * 50)
    flags = ["--text", tmp_path / "t.txt", "--vocabulary", 270, "--layers", 2, "--hidden", 16]
    flags += ["--heads", 2]
    said = fails(fresh.main, [tmp_path / "a", *flags[:-1], 3])
    assert "--hidden must be a multiple of --heads" in said
    assert not (tmp_path / "a").exists()  # nothing half-made is left
    for name in ("a", "b"):
        fresh.main([str(a) for a in (tmp_path / name, *flags, "--positions", 32, "--dropout", 0.2)])
    model, tokenizer = lm.load(tmp_path / "a", 32, "words")
    assert tokenizer.decode(tokenizer.encode(" it's ünheard\n").ids) == " it's ünheard\n"
    assert (model.config.resid_pdrop, model.config.n_positions, model.config.vocab_size) == (
        0.2,
        32,
        270,
    )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    # A folder with weights is left alone.
    assert "a holds files already" in fails(fresh.main, [tmp_path / "a", *flags])
    assert "a has weights; --text makes a new folder" in fails(fresh.main, [tmp_path / "a"])
    (tmp_path / "b" / "model.safetensors").unlink()
    assert f"{tmp_path / 'b'} has no model.safetensors; python -m tools.fresh makes" in fails(
        train.main,
        [
            "--task",
            "ptb",
            "--model",
            tmp_path / "b",
            "--data-dir",
            texts,
            "--out",
            tmp_path / "out",
        ],
    )
    assert "b holds files already" in fails(fresh.main, [tmp_path / "b", *flags])
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    fresh.main([str(tmp_path / "b"), "--seed", "1"])
    assert (
        before.items()
        <= {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}.items()
    )
    assert (tmp_path / "b" / "model.safetensors").read_bytes() != weights[0]
    spread = (
        model.h[0].mlp["c_fc"].weight.std().item(),
        model.h[0].mlp["c_proj"].weight.std().item(),
    )
    assert spread == (
        pytest.approx(0.02, rel=0.1),
        pytest.approx(0.02 / 2, rel=0.1),
    )  # 2 = sqrt(2 * layers)
    assert "c has no config.json; --text makes" in fails(fresh.main, [tmp_path / "c"])
    # A folder that training would refuse gets no weights.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_bytes(before["config.json"])
    assert "c has no tokenizer.json; --text makes" in fails(fresh.main, [tmp_path / "c"])
    assert not (tmp_path / "c" / "model.safetensors").exists()
    (tmp_path / "d").mkdir()  # empty: may be filled
    fresh.main([str(a) for a in (tmp_path / "d", *flags)])
    assert (tmp_path / "d" / "model.safetensors").exists()
    few = ["--text", tmp_path / "t.txt", "--vocabulary", 256]
    assert "--vocabulary: all bytes" in fails(fresh.main, [tmp_path / "e", *few])


def test_a_model_that_lost_units_is_not_exported(run, fails, tmp_path):
    flags = ["--method", "p-pruning", "--sparsity", 0.4, "--ffn-share", 2]
    folder, _ = run(*flags, steps=2)
    assert "this folder lists layer sizes" in fails(export.main, [folder, tmp_path / "out"])
