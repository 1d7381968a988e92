"""tools.export: an exported folder is the backbone with zeros in it, under the names that it had."""

import errno
import json
import os

import pytest
import torch
from conftest import CONFIG, bert_tensors, load_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_model import roberta_name

import eval as eval_
import train
from eval import load_run
from tools import export


@pytest.fixture
def trained(make_model, glue, tmp_path):
    """trained(model folder, *flags) -> a run's folder."""

    def go(model, *flags):
        argv = ["--model", model, "--data-dir", glue, "--out", tmp_path / "run", "--steps", 3, "--length", 16, *flags]
        train.main([str(a) for a in [*argv, "--device", "cpu", "--evals", 1]])
        return tmp_path / "run"

    return go


@pytest.mark.parametrize("names", ["bert", "encoder", "roberta"])
def test_the_exported_model_is_the_pruned_one(make_model, trained, tmp_path, names):
    if names == "roberta":
        tensors = {roberta_name(name): tensor for name, tensor in bert_tensors(CONFIG).items()}
        model = make_model("m", tensors, model_type="roberta", pad_token_id=0)
    else:
        model = make_model("m", bert_tensors(CONFIG) if names == "bert" else bert_tensors(CONFIG, False, ""))
    run, out = trained(model), tmp_path / "out"
    export.main([str(run), str(out)])
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    result = json.loads((run / "result.json").read_text())
    zeros = sum(int(((after[n] == 0) & (t != 0)).sum()) for n, t in before.items())
    assert before.keys() == after.keys() and zeros == result["prunable"] - result["kept"]
    assert all(after[n].equal(t) or ((after[n] == t) | (after[n] == 0)).all() for n, t in before.items())
    loaded = load_run(run)
    backbone = loaded.model
    masks = loaded.masks
    inputs = torch.tensor([[2, 9, 8, 3]]), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4)
    weights = {name: backbone.state_dict()[name] * mask for name, mask in masks.items()}
    pruned = torch.func.functional_call(backbone.eval(), weights, inputs)
    assert torch.allclose(load_model(out, backbone.words.tolist()).eval()(*inputs), pruned, atol=1e-6)
    readme = (out / "README.md").read_text()
    assert ("AutoModel" if names == "encoder" else "AutoModelForMaskedLM") + ".from_pretrained" in readme
    assert "'great' (id 8) for 1" in readme
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize(("method", "way"), [("smp-s", []), ("finetune", []), ("smp-s", ["--compact"])])
@pytest.mark.parametrize("lowercase", [True, False])
def test_other_libraries_take_the_tokenizer_as_it_is(make_model, trained, tmp_path, method, way, lowercase):
    """Their class for BERT lowers the case, whatever tokenizer.json says; and old ones want a format in the header."""
    model, out = make_model("m"), tmp_path / "out"
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["normalizer"]["lowercase"] = lowercase
    (model / "tokenizer.json").write_text(json.dumps(stored))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    run = trained(model, "--method", method)
    export.main([str(run), str(out), *way])
    for folder in [out, run] if method == "finetune" else [out]:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["cls_token"] == "[CLS]"
        assert config["model_max_length"] == 32 and "do_lower_case" not in config
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("method", ["movement", "finetune"])
def test_what_was_trained_is_not_called_unchanged(make_model, trained, tmp_path, method):
    run, out = trained(make_model("m", bert_tensors(CONFIG, False, "")), "--method", method), tmp_path / "out"
    export.main([str(run), str(out)])
    readme = (out / "README.md").read_text()
    assert f"its weights trained ({method})" in readme and "add_pooling_layer=False" in readme
    assert ("removed are zero" in readme) == (method == "movement")


def test_what_cannot_be_exported_is_refused(make_model, trained, fails, tmp_path):
    run = trained(make_model(), "--head", "classifier")
    assert "a fresh head has no place" in fails(export.main, [run, tmp_path / "out"])
    assert "holds files already" in fails(export.main, [run, run])


def test_a_failed_export_leaves_nothing_and_can_be_made_again(make_model, trained, fails, tmp_path, monkeypatch):
    folder, out = trained(make_model()), tmp_path / "out"
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for flags in ([], ["--compact"]):
        with monkeypatch.context() as patched:
            patched.setattr(export, "pack_weights", full)
            assert "No space left" in fails(export.main, [folder, out, *flags])
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    out.mkdir()  # empty: may be filled
    export.main([str(folder), str(out)])
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("main", [train.main, eval_.main, export.main])
def test_weights_of_a_run_are_checked_wherever_they_are_read(make_model, trained, fails, glue, tmp_path, main):
    folder = trained(make_model(), "--method", "finetune")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    argv = {train.main: ["--model", folder, "--data-dir", glue, "--out", tmp_path / "x", "--length", 16]}
    argv |= {eval_.main: [folder], export.main: [folder, tmp_path / "x"]}
    assert "model.safetensors: sha256 is" in fails(main, argv[main])
