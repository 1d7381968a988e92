"""Every file that people may hand over, altered at random.

It works, or it ends in one line of error. It never ends in a traceback.
"""

import json
import lzma
import random

import numpy as np
import pytest
import torch
from acts import interrupt
from fuzzing import TIMES, altered_bytes, fuzz
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import eval as eval_
import train
from plumbing.files import MASKS, seal, unseal


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_model_folders(finished, survives, name):
    fuzz(
        finished.parent / "model" / name,
        survives,
        lambda: eval_.main([str(finished), "--text", "a good film"]),
    )


def test_mask_files(finished, survives):
    path = finished / "mask.safetensors"
    fuzz(path, survives, lambda: eval_.main([str(path), "--text", "a good film"]))


def test_results(run, survives):
    """Of a run without a mask: where there is one, its file says what the run was."""
    folder, _ = run("--method", "finetune", steps=2)
    said = fuzz(folder / "result.json", survives, lambda: eval_.main([str(folder)]))
    assert any("was altered" in line for line in said if line)


def unsealed(path):
    """unseal, copied out of the file, which will be overwritten."""
    tensors, description = unseal(path, MASKS)
    return {name: tensor.clone() for name, tensor in tensors.items()}, description


def test_tables(finished, survives):
    glue = finished.parent / "glue"
    argv = [
        str(finished),
        "--data-dir",
        str(glue),
    ]  # or nothing but the run's own table would be read
    assert None in fuzz(glue / "movies" / "dev.tsv", survives, lambda: eval_.main(argv))


def test_checkpoints(run, survives):
    interrupt(run.argv("--evals", 2, steps=20), 10)
    folder = run.model.parent / "run"
    path = folder / "checkpoint.safetensors"
    rng, outcomes = random.Random(0), []
    whole = path.read_bytes()
    for _ in range(TIMES):
        altered = altered_bytes(whole, rng)
        if altered == whole:  # such as a cut at the end
            continue
        path.write_bytes(altered)
        outcomes.append(survives(lambda: train.main(["--resume", str(folder)])))
    assert any("was altered" in said for said in outcomes)
    assert any("is not a whole" in said for said in outcomes)
    path.write_bytes(whole)
    train.main(["--resume", str(folder)])


def test_mask_files_that_unpack_to_gigabytes(finished, survives):
    path = finished / "mask.safetensors"
    packed, description = unsealed(path)
    names = list(packed)
    bomb = torch.tensor(np.frombuffer(lzma.compress(bytes(10**8), preset=0), np.uint8))
    for shapes in ({"b": [1, 8 * 10**8], "a": [-1, 8 * 10**8]}, {"b": [1, 8 * 10**8]}):
        lying = {"b": bomb} | ({"a": packed[names[0]]} if "a" in shapes else {})
        path.write_bytes(seal(MASKS, lying, description | {"shapes": shapes}))
        assert survives(lambda: eval_.main([str(path), "--text", "a good film"]))


def test_weights_of_other_numbers(finished, survives):
    path = finished.parent / "model" / "model.safetensors"
    tensors = load_file(path)
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64):
        name = "bert.encoder.layer.0.output.dense.weight"
        save_torch(tensors | {name: tensors[name].to(dtype)}, path)
        assert f"{name} ({dtype}) is not" in survives(
            lambda: eval_.main([str(finished), "--text", "a good film"])
        )


def test_texts_and_tokenizers_that_do_not_fit(finished, survives, tmp_path):
    assert "cannot read a text" in survives(lambda: eval_.main([str(finished), "--text", "\udcff"]))
    path = finished.parent / "model" / "tokenizer.json"
    whole = json.loads(path.read_text())
    flags = ["--model", path.parent, "--data-dir", finished.parent / "glue"]
    flags += ["--steps", 2, "--length", 16, "--out", tmp_path / "new"]
    for change in ("id", "special", "type"):
        stored = json.loads(json.dumps(whole))
        if change == "id":
            stored["model"]["vocab"]["film"] = 100000
        elif change == "special":
            stored["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [50000]
        else:
            stored["post_processor"]["single"][0]["SpecialToken"]["type_id"] = 7
        path.write_text(json.dumps(stored))
        assert "tokenizer.json" in survives(lambda: train.main([str(f) for f in flags]))


def test_another_config_is_another_backbone(finished, survives):
    path = finished.parent / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 2}))
    assert "the config of" in survives(lambda: eval_.main([str(finished), "--text", "a good film"]))
