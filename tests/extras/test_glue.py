"""extras/glue.py: archives from a server on loopback, and what faults leave behind."""

import hashlib
import io
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import left_in, write_tokenizer
from fuzzing import TIMES, altered_bytes

import data
from extras import glue
from plumbing import cli, fetch
from plumbing.checkpoints import cutting_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return cutting_tokenizer(tmp_path, 7)


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
    monkeypatch.setitem(glue.GLUE, "RTE", ("RTE.zip", sums))
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
            "is not the archive of RTE",
        ),
        (
            lambda files, cut: files.update(
                {"/glue/RTE.zip": zipped(train=ROWS, dev="no", test="x")}
            ),
            "dev.tsv: md5",
        ),
        (
            lambda files, cut: files.update({"/glue/RTE.zip": zipped(train=ROWS)}),
            "is not the archive of RTE",
        ),
        (
            lambda files, cut: files.clear(),
            "404.*GLUE's train.tsv, dev.tsv into .*RTE by hand.*--data-dir",
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
        glue.GLUE, "MRPC", ("", dict(zip(("train.tsv", "dev.tsv"), sums, strict=True)))
    )
    files, _ = server
    sent = "\r\n".join([head.strip("\n"), *rows]) + " \r\n"
    files["/senteval/senteval_data/msr_paraphrase_train.txt"] = sent.encode()
    files["/glue/mrpc_dev_ids.tsv"] = b"7\t8\n"
    assert data.load_split("mrpc", "dev", None, tokenizer).labels == [0]
    folder = fetch.cache() / "glue" / "MRPC"
    assert [(folder / f"{n}.tsv").read_text() for n in ("train", "dev")] == list(made)
    assert left_in(folder) == ["dev.tsv", "train.tsv"]


def test_a_line_ends_at_a_newline_alone(server, monkeypatch):
    """U+0085 and U+2028 may stand in a text. They end no row."""
    files, _ = server
    head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = ["1\t5\t6\ta\x85b\tc\u2028d\n", "0\t7\t8\te\x0cf\tg\x1ch\n"]
    files["/senteval/senteval_data/msr_paraphrase_train.txt"] = (head + "".join(rows)).encode()
    files["/glue/mrpc_dev_ids.tsv"] = b"7\t8\n"
    made = glue.assemble_mrpc(os.environ["GLUE_URL"].rstrip("/"), "")
    assert made["train.tsv"].decode() == head + rows[0]
    assert made["dev.tsv"].decode() == head + rows[1]


def test_an_empty_answer_for_mrpc_is_not_kept(server, tokenizer):
    files, _ = server
    files["/senteval/senteval_data/msr_paraphrase_train.txt"] = b" "
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


def test_a_zip_that_unpacks_to_too_much(rte, tokenizer, monkeypatch):
    monkeypatch.setattr(glue, "LARGEST", 30)
    with pytest.raises(ValueError, match="would take more"):
        data.load_split("rte", "dev", None, tokenizer)
    assert left_in(fetch.cache()) == []


def archive(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
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
    monkeypatch.setitem(glue.GLUE, "RTE", ("RTE.zip", {"train.tsv": digest, "dev.tsv": digest}))
    rng, outcomes = random.Random(0), []

    def fetch_it():
        try:
            with cli.one_line_errors():
                glue.fetch_glue(data.TASKS["rte"])
        finally:
            landed = {str(p.relative_to(fetch.cache())) for p in fetch.cache().rglob("*")}
            assert landed <= {
                "glue",
                "glue/RTE",
                *(f"glue/RTE/{name}.tsv" for name in ("train", "dev", "test")),
            }
            shutil.rmtree(fetch.cache(), ignore_errors=True)

    for number in range(TIMES):
        files["/glue/RTE.zip"] = altered_bytes(whole, rng) if number else whole
        outcomes.append(survives(fetch_it))
    assert outcomes[0] is None and any(outcomes) and not Path("/tmp/smp-outside.tsv").exists()
