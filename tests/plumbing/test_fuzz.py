"""Every file that people may hand over, altered at random.

It works, or it ends in one line of error. It never ends in a traceback.
"""

import hashlib
import json
import lzma
import random
import shlex
import shutil
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import TIMES, altered_bytes, altered_json, fuzz
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer, normalizers

import data
import eval as eval_
import train
from plumbing import cli, fetch
from plumbing import run as plumbing_run
from plumbing.files import MASKS, seal, unseal


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_model_folders(finished, survives, name):
    fuzz(
        finished.parent / "model" / name,
        survives,
        lambda: eval_.main([str(finished), "--text", "a good film"]),
    )


@pytest.mark.parametrize("name", ["result.json", "mask.safetensors"])
def test_run_folders(finished, survives, name):
    fuzz(finished / name, survives, lambda: eval_.main([str(finished), "--text", "a good film"]))


def unsealed(path):
    """unseal, copied out of the file, which will be overwritten."""
    tensors, description = unseal(path, MASKS)
    return {name: tensor.clone() for name, tensor in tensors.items()}, description


def test_descriptions_of_mask_files_whose_sum_is_right(finished, survives):
    path, rng, outcomes = finished / "mask.safetensors", random.Random(0), []
    tensors, description = unsealed(path)
    for _ in range(TIMES):
        which = rng.choice(["run", "run", "shapes"])
        changed = description | {which: altered_json(description[which], rng)}
        path.write_bytes(seal(MASKS, tensors, changed))
        outcomes.append(survives(lambda: eval_.main([str(path), "--text", "a good film"])))
    assert any(outcomes) and None in outcomes


def test_tables(finished, survives):
    glue = finished.parent / "glue"
    argv = [
        str(finished),
        "--data-dir",
        str(glue),
    ]  # or nothing but the run's own table would be read
    assert None in fuzz(glue / "movies" / "dev.tsv", survives, lambda: eval_.main(argv))


def test_checkpoints(finished, survives, monkeypatch):
    """A run that is interrupted before its last step, and resumed to be interrupted again."""
    flags, path = (
        json.loads((finished / "result.json").read_text())["command"],
        finished / plumbing_run.CHECKPOINT,
    )
    set_rates = train.set_rates

    def interrupted(optimizer, step, *more):
        if step == 1:
            raise ValueError("that is far enough")
        set_rates(optimizer, step, *more)

    (finished / "result.json").unlink()
    monkeypatch.setattr(train, "set_rates", interrupted)
    argv = [*shlex.split(flags)[2:], "--steps", "2", "--evals", "2"]
    with pytest.raises(SystemExit):
        train.main(argv)
    whole, rng, outcomes = path.read_bytes(), random.Random(0), []
    for _ in range(TIMES):
        path.write_bytes(altered_bytes(whole, rng))
        outcomes.append(survives(lambda: train.main(["--resume", str(finished)])))
    path.write_bytes(whole)
    assert any("was altered" in said for said in outcomes) and any(
        "is not a whole" in said for said in outcomes
    )
    assert "far enough" in survives(lambda: train.main(["--resume", str(finished)]))


def archive(path, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as made:
        for name in (
            "train.tsv",
            "dev.tsv",
            "test.tsv",
            "../outside.tsv",
            "../../outside.tsv",
            "/tmp/smp-outside.tsv",
        ):
            made.writestr(
                f"RTE/{name}" if name[0] != "/" else name,
                "index\tsentence1\tsentence2\tlabel\n" * 50,
            )
    return path.read_bytes()


def test_archives(survives, server, tmp_path, monkeypatch):
    """Archives from a server. Their files land in their own folder of the cache, and only there."""
    files, _ = server
    whole, digest = (
        archive(tmp_path / "RTE.zip"),
        hashlib.md5(b"index\tsentence1\tsentence2\tlabel\n" * 50).hexdigest(),
    )
    monkeypatch.setitem(fetch.GLUE, "RTE", ("RTE.zip", {"train.tsv": digest, "dev.tsv": digest}))
    rng, outcomes = random.Random(0), []

    def fetch_it():
        try:
            with cli.one_line_errors():
                fetch.fetch_glue(data.TASKS["rte"])
        finally:
            landed = {str(p.relative_to(fetch.cache())) for p in fetch.cache().rglob("*")}
            assert landed <= {
                "glue",
                "glue/RTE",
                *(f"glue/RTE/{name}.tsv" for name in ("train", "dev", "test")),
            }
            shutil.rmtree(fetch.cache())

    for number in range(TIMES):
        files["/glue/RTE.zip"] = altered_bytes(whole, rng) if number else whole
        outcomes.append(survives(fetch_it))
    assert outcomes[0] is None and any(outcomes) and not Path("/tmp/smp-outside.tsv").exists()


def test_archives_without_bounds(survives, tmp_path):
    """bz2 and lzma members may unpack to more than they say."""
    path = tmp_path / "RTE.zip"

    def read():
        with cli.one_line_errors(), ExitStack() as unfinished:
            fetch.unzip_splits(
                path, tmp_path / "RTE", ["train.tsv", "dev.tsv"], ["test.tsv"], unfinished
            )

    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        archive(path, method)
        assert "compressed in a way" in survives(read)


def test_mask_files_of_other_numbers(finished, survives):
    path = finished / "mask.safetensors"
    packed, description = unsealed(path)
    names = list(packed)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64):
        path.write_bytes(
            seal(MASKS, {name: torch.zeros(8).to(dtype) for name in names}, description)
        )
        assert survives(lambda: eval_.main([str(path), "--text", "a good film"]))
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
        assert f"{name} is of {dtype}" in survives(
            lambda: eval_.main([str(finished), "--text", "a good film"])
        )


def test_texts_and_tokenizers_that_do_not_fit(finished, survives, tmp_path):
    assert "cannot read a text" in survives(lambda: eval_.main([str(finished), "--text", "\udcff"]))
    path = finished.parent / "model" / "tokenizer.json"
    whole = json.loads(path.read_text())
    flags = ["--model", path.parent, "--data-dir", finished.parent / "glue", "--out", finished]
    flags += ["--steps", 2, "--length", 16]
    (finished / "result.json").unlink()
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


@pytest.mark.parametrize("nested", [False, True])
def test_a_tokenizer_that_grows_its_texts(finished, survives, nested):
    """Forty times twice as long would be a million million times as long."""
    path = finished.parent / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    doubling = [normalizers.Replace("a", "aa") for _ in range(40)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Sequence(doubling)] if nested else doubling
    )
    tokenizer.save(str(path))
    assert "a hundred times longer" in survives(
        lambda: eval_.main([str(finished), "--text", "a good film"])
    )
