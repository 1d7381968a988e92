"""tools.split: rows, or articles of SQuAD, are held out, and none is lost."""

import json

import pytest

from data import TASKS, read_rows
from tools import split


def test_rows_are_held_out_and_none_is_lost(tmp_path, fails):
    """Train and dev hold the file's rows, each once, in an order that stays."""
    rows = [f'film {n} " quoted\t{n % 2}' for n in range(9)]
    for name, header, width in (("movies", ["sentence\tlabel"], 2), ("cola", [], 4)):
        path = tmp_path / f"{name}.tsv"
        lines = rows if width == 2 else [f"x\t{n % 2}\t\tfilm {n}" for n in range(9)]
        path.write_text(
            "\n".join([*header, *lines]), "utf-8-sig"
        )  # no newline at the end, a mark at the start
        split.main([name, str(path), str(tmp_path / "held"), "--dev", "3"])
        folder = tmp_path / "held" / TASKS[name].folder
        train, dev = (
            (folder / f"{part}.tsv").read_text().splitlines() for part in ("train", "dev")
        )
        assert train[: len(header)] == dev[: len(header)] == header
        assert sorted(train[len(header) :] + dev[len(header) :]) == sorted(lines) and len(
            dev
        ) == 3 + len(header)
        assert train[len(header) :] != lines[:6]  # files may be sorted by label
        assert len(read_rows(folder / "train.tsv", TASKS[name])[0]) == 6
        assert "is there already" in fails(
            split.main, [name, path, tmp_path / "held", "--dev", "3"]
        )
        assert "--dev 9: the file holds only 9" in fails(
            split.main, [name, path, tmp_path / "new", "--dev", "9"]
        )
    (tmp_path / "odd.tsv").write_text("no such column\n1\n")
    assert "odd.tsv:1: no column" in fails(
        split.main, ["movies", tmp_path / "odd.tsv", tmp_path / "new", "--dev", "1"]
    )
    assert not (tmp_path / "new").exists()


def test_split_by_articles(tmp_path, capsys):
    articles = [{"title": str(n), "paragraphs": []} for n in range(5)]
    (tmp_path / "all.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    split.main(["squad", str(tmp_path / "all.json"), str(tmp_path), "--dev", "2"])
    parts = [
        json.loads((tmp_path / "squad" / f"{n}-v1.1.json").read_text())["data"]
        for n in ("train", "dev")
    ]
    assert parts == [articles[:3], articles[3:]]
    for name, dev in (("all.json", "5"), ("all.json", "0"), ("all.json", "2"), ("none.json", "1")):
        with pytest.raises(SystemExit, match="2"):
            split.main(["squad", str(tmp_path / name), str(tmp_path), "--dev", dev])
        assert capsys.readouterr().err.startswith("error: ")
    for content in ("[" * 100_000, json.dumps({"data": "articles"}), "{}"):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(SystemExit, match="2"):
            split.main(["squad", str(tmp_path / "odd.json"), str(tmp_path / "new"), "--dev", "1"])
        said = capsys.readouterr().err
        assert "odd.json is not a SQuAD v1.1 file" in said or "odd.json is not valid JSON" in said
    assert not (tmp_path / "new").exists()
