"""tools.export writes the backbone with zeros in it, under the names that it had."""

import errno
import html
import json
import os

import pytest
import torch
from conftest import CONFIG, bert_tensors, load_model
from oracle import roberta_name
from safetensors import safe_open
from safetensors.torch import load_file

import eval as eval_
import train
from eval import load_run
from plumbing import fetch
from tools import export, page


@pytest.fixture
def trained(make_model, glue, tmp_path):
    """trained(model folder, *flags) -> a run's folder."""

    def go(model, *flags):
        argv = ["--model", model, "--data-dir", glue, "--out", tmp_path / "run", "--steps", 3]
        argv += ["--length", 16, *flags]
        train.main([str(a) for a in [*argv, "--device", "cpu", "--evals", 1]])
        return tmp_path / "run"

    return go


@pytest.mark.parametrize("names", ["bert", "encoder", "roberta"])
def test_the_exported_model_is_the_pruned_one(make_model, trained, tmp_path, names):
    if names == "roberta":
        tensors = {roberta_name(name): tensor for name, tensor in bert_tensors(CONFIG).items()}
        model = make_model("m", tensors, model_type="roberta", pad_token_id=0)
    else:
        model = make_model(
            "m", bert_tensors(CONFIG) if names == "bert" else bert_tensors(CONFIG, False, "")
        )
    run, out = trained(model), tmp_path / "out"
    export.main([str(run), str(out)])
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    result = json.loads((run / "result.json").read_text())
    zeros = sum(int(((after[n] == 0) & (t != 0)).sum()) for n, t in before.items())
    assert before.keys() == after.keys() and zeros == result["prunable"] - result["kept"]
    assert all(
        after[n].equal(t) or ((after[n] == t) | (after[n] == 0)).all() for n, t in before.items()
    )
    loaded = load_run(run)
    backbone = loaded.model
    masks = loaded.masks
    inputs = torch.tensor([[2, 9, 8, 3]]), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4)
    weights = {name: backbone.state_dict()[name] * mask for name, mask in masks.items()}
    pruned = torch.func.functional_call(backbone.eval(), weights, inputs)
    assert torch.allclose(
        load_model(out, backbone.words.tolist()).eval()(*inputs), pruned, atol=1e-6
    )
    readme = (out / "README.md").read_text()
    assert (
        "AutoModel" if names == "encoder" else "AutoModelForMaskedLM"
    ) + ".from_pretrained" in readme
    assert "'1': 'great'" in readme and "[..., [7, 8]])" in readme
    stored = json.loads((model / "config.json").read_text())
    written = json.loads((out / "config.json").read_text())
    # The weights are float32, whatever the model's own config says. transformers 4 and 5 see it.
    assert written == stored | {"dtype": "float32", "torch_dtype": "float32"}
    inputs = json.loads((out / "tokenizer_config.json").read_text())["model_input_names"]
    assert ("token_type_ids" in inputs) == (stored.get("type_vocab_size", 2) == 2)
    assert inputs[0] == "input_ids" and inputs[-1] == "attention_mask"


@pytest.mark.parametrize(
    ("method", "way"), [("smp-s", []), ("finetune", []), ("smp-s", ["--compact"])]
)
@pytest.mark.parametrize("lowercase", [True, False])
def test_other_libraries_take_the_tokenizer_as_it_is(
    make_model, trained, tmp_path, method, way, lowercase
):
    """Their class for BERT lowers the case, whatever tokenizer.json says.

    Old versions want a format in the header.
    """
    model, out = make_model("m"), tmp_path / "out"
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["normalizer"]["lowercase"] = lowercase
    (model / "tokenizer.json").write_text(json.dumps(stored))
    (model / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    run = trained(model, "--method", method)
    export.main([str(run), str(out), *way])
    for folder in [out, run] if method == "finetune" else [out]:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert (
            config["tokenizer_class"] == "PreTrainedTokenizerFast"
            and config["cls_token"] == "[CLS]"
        )
        assert config["model_max_length"] == 32 and "do_lower_case" not in config
        assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("method", ["movement", "finetune"])
def test_what_was_trained_is_not_called_unchanged(make_model, trained, tmp_path, method):
    run, out = (
        trained(make_model("m", bert_tensors(CONFIG, False, "")), "--method", method),
        tmp_path / "out",
    )
    export.main([str(run), str(out)])
    readme = (out / "README.md").read_text()
    trained_what = readme.split(f"Backbone m, method {method}. What trained: ")[1]
    assert "weights" in trained_what.split(".\n")[0]


def test_biases_that_trained_beside_a_mask_are_exported(make_model, trained, tmp_path):
    run = trained(
        make_model("m", bert_tensors(CONFIG, True, "bert.")),
        "--method",
        "smp-bias",
        "--weight-lr",
        "0.1",
    )
    export.main([str(run), str(tmp_path / "out")])
    loaded = load_run(run)
    found = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "m" / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        weight = loaded.model.state_dict()[loaded.model.canonical(name)]
        assert torch.equal(
            tensor, weight * loaded.masks.get(loaded.model.canonical(name), torch.tensor(True))
        )
    assert any((found[name] != before[name]).any() for name in found if "LayerNorm.bias" in name)
    assert (
        "What trained: scores, biases and LayerNorms."
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_card_says_what_an_adapter_trained(make_model, trained, tmp_path):
    """A run of LoRA or BitDelta stores a whole model, of which little has trained."""
    run = trained(make_model("m"), "--method", "lora")
    dense = run.rename(tmp_path / "lora")
    export.main([str(dense), str(tmp_path / "a")])
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "at a density of 1.0000" in readme and "What trained: weights" not in readme
    assert "What trained: a low-rank change of each query and value matrix.\n" in readme

    run = trained(tmp_path / "m", "--method", "bitdelta", "--teacher", dense)
    export.main([str(run), str(tmp_path / "b")])
    readme = (tmp_path / "b" / "README.md").read_text()
    assert "What trained: one number per matrix" in readme and "of 1.0000" in readme


@pytest.mark.parametrize("method", ["finetune", "smp-s"])
def test_a_masked_language_model_is_exported_as_one(make_model, trained, tmp_path, method):
    (tmp_path / "texts" / "mlm").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "texts" / "mlm" / f"{split}.txt").write_text("the film was good\n" * 40)
    model = make_model()
    flags = ["--task", "mlm", "--data-dir", tmp_path / "texts", "--method", method]
    export.main([str(trained(model, *flags)), str(tmp_path / "out")])
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForMaskedLM.from_pretrained" in readme and "[MASK]" in readme
    assert "GPT2" not in readme and "label word" not in readme
    before, after = (
        load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out")
    )
    assert before.keys() == after.keys()


def test_a_table_of_ones_own_is_named_and_no_other(make_model, tmp_path, monkeypatch):
    """On the card and the page: the file, its columns, and what was decided."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    rows = [f"a film {n},{n % 9 + 0.5}" for n in range(90)]
    (tmp_path / "my films.csv").write_text("\n".join(["comment,stars", *rows]))
    flags = ["--model", model, "--length", 16, "--steps", 4, "--device", "cpu", "--out", "run"]
    train.main(["--train", "my films.csv", *map(str, flags)])
    export.main(["run", "full"])
    export.main(["run", "mask", "--mask"])
    page.main(["run", "--out", "page.html"])
    for name in ("full/README.md", "mask/README.md", "page.html"):
        text = html.unescape((tmp_path / name).read_text())
        assert "my-films" in text and "sst2" not in text and "movies" not in text
        assert "Trained on a table, my films.csv: stars from comment." in text
        assert "'stars' is a score from 0.5 to 8.5" in text
        assert "a score is 0.5 + 1.6 times the logit" in text


def test_what_cannot_be_exported_is_refused(make_model, trained, fails, tmp_path):
    run = trained(make_model(), "--head", "classifier")
    assert "a fresh head has no place" in fails(export.main, [run, tmp_path / "out"])
    assert "holds files already" in fails(export.main, [run, run])


def test_a_failed_export_leaves_nothing_and_can_be_made_again(
    finished, fails, tmp_path, monkeypatch
):
    folder, out = finished, tmp_path / "out"
    before = sorted(path.name for path in tmp_path.iterdir())

    write_files, disk_is_full = export.write_files, [True]

    def write(*given):
        if disk_is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_files(*given)

    monkeypatch.setattr(export, "write_files", write)
    for flags in ([], ["--compact"], ["--mask"]):
        assert "No space left" in fails(export.main, [folder, out, *flags])
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    disk_is_full.clear()
    out.mkdir()  # empty: may be filled
    export.main([str(folder), str(out)])
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("main", [eval_.main, export.main])
def test_weights_of_a_run_are_checked_wherever_they_are_read(
    make_model, trained, fails, tmp_path, main
):
    folder = trained(make_model(), "--method", "finetune")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    argv = [folder] if main == eval_.main else [folder, tmp_path / "x"]
    assert "model.safetensors: sha256 is" in fails(main, argv)


# --- cards ----------------------------------------------------------------------------------------


def metadata(readme):
    """A card -> {key: value} of its metadata, all as text."""
    assert readme.startswith("---\n")
    lines = readme.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_a_mask_that_was_exported_gives_the_same_result_elsewhere(
    make_model, trained, tmp_path, capsys, head
):
    model = make_model("secret")
    run, out = trained(model, "--head", head, "--seed", 7), tmp_path / "shared"
    export.main([str(run), str(out), "--mask"])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "mask.safetensors"]
    out = out.rename(tmp_path / "elsewhere")
    assert (out / "mask.safetensors").read_bytes() == (run / "mask.safetensors").read_bytes()
    (run / "result.json").rename(run / "moved.json")
    model = model.rename(tmp_path / "moved")
    capsys.readouterr()
    eval_.main([f"{out}/mask.safetensors", "--model", str(model), "--device", "cpu"])
    told = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert told[0].split(": ")[1] == told[1].removeprefix("training reported ")

    result = json.loads((run / "moved.json").read_text())
    readme = (out / "README.md").read_text()
    assert "secret" in readme and str(tmp_path) not in readme  # a folder's name, not its place
    assert "density of 0.5000" in readme and "seed 7, 3 steps" in readme
    assert f"accuracy {result['final']['accuracy']:.4f}" in readme
    assert result["fingerprint"] in readme and "base_model" not in readme
    # What trained is said in one place: a mask with label words has nothing beside it.
    assert "at most one bit per weight" in readme and "LayerNorms" not in readme
    assert metadata(readme)["library_name"] == export.OURS


def test_a_card_names_what_the_hub_knows(finished):
    result = json.loads((finished / "result.json").read_text())
    for model, base in [
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("gpt2", "openai-community/gpt2"),
    ]:
        card = export.card(result | {"model": model}, "transformers", "Use it.").decode()
        assert metadata(card)["base_model"] == base
        assert metadata(card)["tags"] == '[pruning, sparsity, static-model-pruning, "smp-s"]'
        assert f"\nBackbone {model}, method smp-s. What trained: scores" in card and card.endswith(
            "Use it."
        )
    assert fetch.MODELS.keys() <= export.HUB.keys()  # all that can be fetched have a name there


def test_no_name_breaks_a_card(finished):
    result = json.loads((finished / "result.json").read_text())
    bad = 'a: "b"\n---\n\x85\u2028- {x} \ud800 \U0001f600'
    result |= {"model": bad, "seed": bad, "commit": bad, "final": {bad: 1.0}}
    card = export.card(result, export.OURS, "").decode()
    assert card.count("\n---\n") == 1 and metadata(card)["library_name"] == export.OURS
    assert "\x85" not in card and "\u2028" not in card


@pytest.mark.parametrize("way", [[], ["--compact"]])
def test_every_exported_folder_has_a_card(finished, tmp_path, way):
    export.main([str(finished), str(tmp_path / "out"), *way])
    known = metadata((tmp_path / "out" / "README.md").read_text())
    assert known["library_name"] == (export.OURS if way else "transformers")
    assert "seed 0, 20 steps" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["finetune", "movement"])
def test_a_mask_is_not_all_of_a_run_that_trained_weights(
    make_model, trained, fails, tmp_path, method
):
    run = trained(make_model(), "--method", method)
    assert "error: --mask: this run trained weights" in fails(
        export.main, [run, tmp_path / "out", "--mask"]
    )
    assert not (tmp_path / "out").exists()
    assert "not allowed with" in fails(export.main, [run, tmp_path / "out", "--mask", "--compact"])
