"""extras/glue.py: metrics, tables, archives from a server on loopback, what faults leave behind."""

import hashlib
import io
import math
import os
import random
import re
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import left_in, write_tokenizer
from fuzzing import TIMES, altered_bytes

import data
import eval as eval_
import train
from data import TASKS, accuracy, read_rows
from eval import Loaded, main
from extras import glue
from extras.glue import correlation, f1, mcc, ranks, spearman
from plumbing import cli, fetch
from plumbing.checkpoints import cutting_tokenizer


def write(path, text):
    path.write_bytes(text.encode())
    return path


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


def test_an_empty_mrpc_is_not_kept(server, tokenizer):
    files, _ = server
    files["/senteval/senteval_data/msr_paraphrase_train.txt"] = b""
    files["/glue/mrpc_dev_ids.tsv"] = b""
    with pytest.raises(ValueError, match="MRPC/train.tsv: md5"):
        data.load_split("mrpc", "dev", None, tokenizer)
    assert left_in(fetch.cache() / "glue") == []


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
    monkeypatch.setenv("SMP_CACHE", str(tmp_path / "cache"))
    message = "RTE.zip.*Connection refused.*by hand.*--data-dir; the default task, movies"
    with socket.socket() as silent:  # it keeps its port for itself, and does not listen
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GLUE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match=message):
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


# --- metrics and tables ---


def test_metrics_by_hand():
    p, t = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    assert accuracy(p, t) == pytest.approx(4 / 6)
    assert f1(p, t) == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert correlation(p, t) == pytest.approx(
        (2 * 2 - 1 * 1) / 9
    )  # (TP TN - FP FN) / sqrt(3 * 3 * 3 * 3)
    assert correlation(p * 0, t) == f1(p * 0, t) == 0.0
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0, 3.0])
    assert correlation(x, y) == pytest.approx(
        4 / math.sqrt(42 / 9 * 6)
    )  # sums of (dx dy), dx^2, dy^2: 4, 42/9, 6
    assert ranks(np.array([5.0, 1.0, 5.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]
    assert spearman(np.array([1.0, 10.0, 100.0]), np.array([-3.0, 0.0, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([2, 2, 1])) == pytest.approx(
        -1.5 / math.sqrt(2 * 1.5)
    )


def test_three_classes_by_hand():
    """R_K from its confusion matrix: covariances of one-hot classes, as Gorodkin defines it."""
    true = np.array([0, 0, 1, 1, 2, 2])
    assert mcc(true, true) == pytest.approx(1)
    # Each class is found once and missed once, always for another class.
    predicted = np.array([0, 1, 1, 2, 2, 0])
    # c s - sum t p = 3 * 6 - 12 = 6; (s^2 - sum p^2) = (s^2 - sum t^2) = 36 - 12 = 24
    assert mcc(predicted, true) == pytest.approx(6 / 24)
    assert mcc((2 - true) % 3, np.array([2, 2, 1, 1, 0, 0])) == pytest.approx(1)
    assert f1(predicted, true) == pytest.approx(0.5)  # 0.5 of each class
    assert f1(np.array([0, 1, 1]), np.array([0, 0, 1])) == pytest.approx(2 / 3)  # of class 1


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2.7182817, -5.3])
def test_a_constant_correlates_with_nothing(value):
    """In float32 the mean of equal numbers may differ from them."""
    true = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    constant = np.full(1000, value, np.float32)
    assert correlation(constant, true) == correlation(true, constant) == 0
    assert spearman(constant, true) == mcc(np.ones(9), np.arange(9) % 2) == 0


def test_byte_order_mark_and_crlf(tmp_path):
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t5\t6\tone\ttwo\r\n"
    assert read_rows(write(tmp_path / "f", text), TASKS["mrpc"]) == ([("one", "two")], [1])


def test_headers_and_recipes(tmp_path):
    rows = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows += "1\t2\t3\ta?\tb?\t1\n4\t5\t6\tbroken\n7\t8\t9\tc\td\t0\n"
    assert read_rows(write(tmp_path / "f", rows), TASKS["qqp"]) == (
        [("a?", "b?"), ("c", "d")],
        [1, 0],
    )
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    rows = head + "\n0\tg\tf\t2012\t1\tnone\tnone\ta\tb\t4.750\n"
    assert read_rows(write(tmp_path / "f", rows), TASKS["stsb"]) == ([("a", "b")], [4.75])
    for score in ("5.1", "-1", "nan", "x"):
        with pytest.raises(ValueError, match=f":2: '{score}' is not a score"):
            read_rows(write(tmp_path / "f", rows.replace("4.750", score)), TASKS["stsb"])
    expected = {"mrpc": {"epochs": 60}, "cola": {"epochs": 60}, "stsb": {"epochs": 60}}
    expected["qqp"] = {"epochs": 12, "batch": 64}
    assert {name: TASKS[name].recipe for name in expected} == expected
    assert TASKS["qqp"].words == {"0": "no", "1": "yes"}
    assert TASKS["stsb"].words == {"score": "yes"}


def test_cola_has_no_header(tmp_path):
    assert read_rows(write(tmp_path / "f", "gj04\t1\t\tThe\ngj04\t0\t*\tHe"), TASKS["cola"]) == (
        [("The",), ("He",)], [1, 0])  # fmt: skip


def test_a_regression(run, tmp_path, capsys):
    folder = tmp_path / "glue" / "STS-B"  # run() reads the tasks' folders there
    folder.mkdir()
    for split, n in (("train", 24), ("dev", 9)):
        rows = [f"{i}\ta film\t{('bad', 'good')[i % 2]}\t{i % 6 * 0.9:.3f}" for i in range(n)]
        content = "\n".join(["index\tsentence1\tsentence2\tscore", *rows])
        write(folder / f"{split}.tsv", content)
    folder, result = run("--task", "stsb", "--method", "finetune", steps=2)
    assert result["final"].keys() == {"pearson", "spearman"}
    capsys.readouterr()
    eval_.main([str(folder), "--text", "a film", "--pair", "good"])
    assert re.fullmatch(r" *-?\d+\.\d{4}  score\n", capsys.readouterr().out)
    eval_.main([str(folder), "--text-file", str(write(tmp_path / "pairs.txt", "a film\tgood\n"))])
    assert re.fullmatch(r"-?\d+\.\d{4}\ta film\tgood\n", capsys.readouterr().out)


# --- the test server ---

HEADS = {  # the headers of GLUE's test files, and what a row of them holds
    "cola": ("index\tsentence", "{}\tgood"),
    "mrpc": ("index\t#1 ID\t#2 ID\t#1 String\t#2 String", "{}\t8\t9\tgood\tbad"),
    "qqp": ("id\tquestion1\tquestion2", "{}\tgood\tbad"),
    "rte": ("index\tsentence1\tsentence2", "{}\tgood\tbad"),
    "qnli": ("index\tquestion\tsentence", "{}\tgood\tbad"),
    "sst2": ("index\tsentence", "{}\tgood"),
    "stsb": ("index\tgenre\told_index\tsentence1\tsentence2", "{}\tg\t7\tgood\tbad"),
    "mnli": ("index\tpairID\tsentence1\tsentence2", "{}\t12e\tgood\tbad"),
}
ANSWERS = {"rte": ("not_entailment", "entailment"), "qnli": ("not_entailment", "entailment")}
ANSWERS |= {"stsb": ("0.000", "5.000"), "mnli": ("contradiction", "neutral")}


@pytest.mark.parametrize("task", HEADS)
def test_answers_have_the_indices_of_the_file(tmp_path, tokenizer, task):
    head, row = HEADS[task]
    path = tmp_path / "test.tsv"
    path.write_text("\ufeff" + "\n".join([head, *map(row.format, (17, 4, 99))]) + "\n")
    texts = ("good", "bad")[: len(data.TASKS[task].text)]

    def logits_of(examples):  # the second answer is the second class; scores are out of range
        expected = data.encode([texts] * 3, [0] * 3, tokenizer)
        assert list(examples.ids) == list(expected.ids)
        if task == "stsb":
            return torch.tensor([[-1.0], [7.0], [-1.0]])
        return torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])

    loaded = Loaded({"task": task}, data.TASKS[task], None, None, tokenizer, {})
    data.TASKS[task].predict(path, tmp_path, loaded, logits_of)
    no, yes = ANSWERS.get(task, ("0", "1"))
    expected = f"index\tprediction\n17\t{no}\n4\t{yes}\n99\t{no}\n".encode()
    assert (tmp_path / f"{data.TASKS[task].folder}.tsv").read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("test_matched", "MNLI-m"),
        ("test_mismatched", "MNLI-mm"),
        ("diagnostic", "AX"),
        ("AX", "AX"),
    ],
)
def test_a_run_of_mnli_answers_the_diagnostic_set_too(tmp_path, tokenizer, name, made):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / f"{name}.tsv"
    path.write_text("index\tsentence1\tsentence2\n0\tgood\tbad\n1\tbad\tgood\n")
    loaded = Loaded({"task": "mnli"}, data.TASKS["mnli"], None, None, tokenizer, {})
    glue.predict(path, tmp_path, loaded, lambda examples: torch.eye(3)[1:])
    expected = "index\tprediction\n0\tneutral\n1\tentailment\n"
    assert (tmp_path / f"{made}.tsv").read_text() == expected


def test_predict_from_end_to_end(make_model, glue, tmp_path, capsys, fails):
    flags = ["--data-dir", glue, "--model", make_model(), "--length", 16, "--device", "cpu"]
    flags += ["--out", tmp_path / "run", "--steps", 2, "--evals", 1, "--batch", 8]
    train.main([str(flag) for flag in ["--task", "rte", *flags]])
    capsys.readouterr()
    # dev.tsv does as a test file. Its labels are not read.
    for run in (tmp_path / "run", tmp_path / "run" / "mask.safetensors"):
        main([str(run), "--predict", str(glue / "RTE" / "dev.tsv")])
        assert capsys.readouterr().out == f"{tmp_path / 'run' / 'RTE.tsv'}\n"
    rows = (tmp_path / "run" / "RTE.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == ["index", *map(str, range(40))]
    error = fails(main, [tmp_path / "run", "--predict", glue / "movies" / "dev.tsv"])
    assert "dev.tsv:1: 0 columns 'sentence1' in the header" in error


def test_predict_without_a_test_server(finished, fails):
    file = finished.parent / "glue" / "movies" / "dev.tsv"
    assert "--predict: this task has no test server" in fails(main, [finished, "--predict", file])
