"""Every file that people may hand over, altered at random.

It works, or it ends in one line of error. It never ends in a traceback.
"""

import hashlib
import json
import lzma
import os
import random
import re
import shlex
import shutil
import signal
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from test_squad import CONTEXT, question
from tokenizers import Tokenizer, normalizers

import data
import eval as eval_
import train
from extras import squad
from plumbing import cli, fetch
from plumbing import run as plumbing_run
from plumbing.checkpoints import cutting_tokenizer
from plumbing.files import MASKS, seal, unseal
from tools import picture, runs

ROOT = Path(__file__).parent.parent.parent
TIMES = int(os.environ.get("FUZZ", 25))  # alterations of each file; .ci/run asks for 150
HOSTILE = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "x",
    "../../x", "/etc/passwd", "\0", "y" * 5000,
    [], {}, [[]], {"a": {}}, [1e9] * 3, "bfloat16", "movies", "\ud800",
]  # fmt: skip


def altered_bytes(content, rng):
    """Flip, cut, insert, repeat or drop a little of it, once or a few times."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 10])):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 4, 64])
        kind = rng.choice(["flip", "flip", "cut", "insert", "repeat", "drop"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = rng.choice(
                [rng.randbytes(length), b"\n" * length, b"\t" * length, b"[" * 5000]
            )
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        else:
            del content[at : at + length]
    return bytes(content)


def altered_json(value, rng):
    """The same with one value replaced, dropped or renamed, at any depth."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.15:
            changed = copy.pop(key)
            if isinstance(copy, dict) and rng.random() < 0.3:
                copy[str(key) + "x"] = changed
        else:
            copy[key] = altered_json(copy[key], rng)
        return copy
    return rng.choice(HOSTILE)


def altered(content, rng):
    """Bytes of a JSON file or any other -> altered ones."""
    if content[:1] == b"{" and rng.random() < 0.7:
        return json.dumps(altered_json(json.loads(content), rng)).encode()
    return altered_bytes(content, rng)


@pytest.fixture
def survives(capsys, tmp_path, trained_once):
    """survives(command): it works or ends with status 2 and one line, within 10 seconds.

    It writes nothing.
    """
    home, _ = trained_once

    def there():
        return sorted([*tmp_path.rglob("*"), *home.rglob("*")])

    def too_slow(*_):
        raise KeyboardInterrupt(
            "longer than 10 seconds"
        )  # which nothing turns into an error of a file

    def run(command):
        files = there()
        capsys.readouterr()
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(10)
        try:
            command()
            said = None
        except SystemExit as ended:
            assert ended.code == 2
            lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
            lines = [
                line
                for line in lines
                if line.strip() and not re.match("evaluating|movies smp-s|RTE.zip", line)
            ]
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
            said = lines[0]
        finally:
            signal.alarm(0)
        assert there() == files
        return said

    return run


def fuzz(path, survives, command, seed=0):
    """Alter a file TIMES times. Both outcomes must occur, or the test shows nothing."""
    whole, rng, outcomes = path.read_bytes(), random.Random(seed), []
    for _ in range(TIMES):
        path.write_bytes(altered(whole, rng))
        outcomes.append(survives(command))
    path.write_bytes(whole)
    assert survives(command) is None and any(outcomes)
    return outcomes


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


def test_squad_files(finished, survives, tmp_path, monkeypatch):
    monkeypatch.setattr(squad, "STRIDE", 3)
    (tmp_path / "squad").mkdir()
    path = tmp_path / "squad" / "dev-v1.1.json"
    path.write_text(
        json.dumps(
            {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [question("is it", "fun")]}]}]}
        )
    )

    def read():
        with cli.one_line_errors():
            tokenizer = cutting_tokenizer(finished.parent / "model", 32)
            data.load_split("squad", "dev", str(tmp_path), tokenizer)

    fuzz(path, survives, read)


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


def altered_line(content, rng):
    """One line of JSON lines altered."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = altered(lines[at], rng)
    return b"\n".join(lines)


def fuzz_lines(path, survives, command):
    whole, rng, outcomes = path.read_bytes(), random.Random(0), []
    for _ in range(TIMES):
        path.write_bytes(altered_line(whole, rng))
        outcomes.append(survives(command))
    assert None in outcomes and any(outcomes)


def test_logs(finished, survives):
    """What read_log lets through is drawn: matplotlib can count ticks for numbers of that size."""

    def read():
        with cli.one_line_errors():
            losses, evaluations = picture.read_log(finished / "log.jsonl")
            assert all(abs(line["loss"] + line["density"] + line["step"]) < 1e10 for line in losses)
            assert all(abs(value) < 1e10 for line in evaluations for value in line["dev"].values())

    fuzz_lines(finished / "log.jsonl", survives, read)


def test_lines_of_results(survives, tmp_path):
    """Of a file of results, what `run` reads; its other numbers are those of the tool itself."""
    lines = (ROOT / "results" / "runs.jsonl").read_text().splitlines()
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(lines[:12]))

    def read():
        with cli.one_line_errors():
            runs.read_results(path)

    fuzz_lines(path, survives, read)


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
