"""A table of your own: reading it, what is decided, and the way from a file to answers."""

import codecs
import csv
import io
import json

import pytest
import torch
from acts import interrupt
from fuzzing import fuzz

import data
import eval as eval_
import train
from extras import own
from plumbing.checkpoints import cutting_tokenizer
from plumbing.cli import one_line_errors
from plumbing.files import MASKS, unseal

GOOD = ["it was a good film", "very fun and good", "the film is fun", "a fun and good film"]
BAD = ["it was a bad film", "very dull and bad", "the film is dull", "a dull and bad film"]


def write(path, rows, delimiter=",", encoding="utf-8", **options):
    """A table as the csv module, and so a spreadsheet, writes it."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, **options).writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def reviews(count=120):
    """A spreadsheet's rows: quotes, line breaks, separators, and columns that are neither."""
    rows = [["id", "review", "sentiment"]]
    for i in range(count):
        text = f"{(BAD, GOOD)[i % 2][i // 2 % 4]} {'and it ' * (i // 8)}"
        text += ('\n"good", was it;', " the\tfilm", "")[i % 3]
        rows.append([i, text, ("negative", "positive")[i % 2]])
    return rows


@pytest.fixture
def here(tmp_path, monkeypatch, make_model):
    """The current folder, with the folder of a tiny model in it."""
    make_model("tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = ["--model", "tiny", "--length", "16", "--steps", "6", "--evals", "1", "--device", "cpu"]


def decide(path, *flags):
    """What train.py makes of these flags."""
    return train.parse_args(["--train", str(path), "--model", "tiny", *flags])


# --- files ----------------------------------------------------------------------------------------


def test_cells_are_what_a_spreadsheet_shows(tmp_path):
    path = tmp_path / "f.csv"
    path.write_bytes(b'a , b\r\n"one, ""two""","x\r\ny"\r\n\r\n,\r\nthree,"4"\r\n')
    header, rows, delimiter = own.read_table(path)
    assert (header, delimiter) == (["a", "b"], ",")
    # Empty rows are left out, and lines count as an editor shows them.
    assert rows == [(2, ['one, "two"', "x\r\ny"]), (6, ["three", "4"])]


@pytest.mark.parametrize(
    ("name", "content", "cells"),
    [
        ("f.csv", "a;b\n1,5;x", ["1,5", "x"]),
        ("f.csv", "a\tb\n1,5\tx", ["1,5", "x"]),
        ("f.tsv", "a\n1,5", ["1,5"]),
        ("f.tsv", 'a\tb\n"a" film\tx', ['"a" film', "x"]),  # quotes are ordinary characters
    ],
)
def test_what_separates_cells(tmp_path, name, content, cells):
    (tmp_path / name).write_text(content)
    assert own.read_table(tmp_path / name)[1][0].cells == cells


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    ],
)
def test_encodings_that_say_what_they_are(tmp_path, encode):
    (tmp_path / "f.csv").write_bytes(encode("té\nñ☃\n"))
    assert own.read_table(tmp_path / "f.csv")[:2] == (["té"], [(2, ["ñ☃"])])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a,b\r\nx,y\r\ncafé,z\r\n".encode("cp1252"), 3),
        ("a,b\nx,y\n".encode("utf-16-le"), 1),
        (codecs.BOM_UTF16_LE + b"a\0b", 1),
    ],
)
def test_any_other_encoding_is_one_line_with_a_remedy(tmp_path, fails, content, line):
    path = tmp_path / "f.csv"
    path.write_bytes(content)
    said = fails(train.main, ["--train", path])
    assert f"{path}:{line}: not UTF-8 (" in said and "save it as UTF-8" in said


def test_what_is_no_table(here, fails):
    path = here / "f.csv"
    for content, message in (
        ("", "holds no rows below a first line"),
        ("a,b\n", "holds no rows below a first line"),
        ('a,b\nx,y\nx,"y\n', f"{path}:3: unexpected end of data"),
    ):
        path.write_text(content)
        assert message in fails(train.main, ["--train", path])
    path.write_text("text,label\n" + "a film,0.5\na film,1\n" * 9)
    command = ["--train", path, *FLAGS, "--text-column", "text"]
    assert "too few texts differ to hold some out" in fails(train.main, command)
    path.write_text("text,label\n" + "a film,1\na good film,1\n" * 9)
    said = fails(train.main, [*command, "--label-column", "label", "--regression"])
    assert "f.csv: every 'label' is 1" in said
    path.unlink()
    assert "--train: there is no file" in fails(train.main, ["--train", path])


# --- what is decided ------------------------------------------------------------------------------


def test_the_only_columns_that_fit_are_found(here):
    table = decide(write(here / "reviews.csv", reviews())).table
    assert (table["text"], table["label"]) == (["review"], "sentiment")
    assert table["notes"][:2] == [
        "the text is in 'review', the only column that looks like one",
        "the labels are in 'sentiment', the only column that looks like labels",
    ]
    assert table["notes"][2] == "2 classes: negative (60), positive (60)"


def test_columns_that_are_not_clear_are_asked_for(here, fails):
    rows = [["a", "b", "x", "y"]]
    rows += [[f"{n} good film", f"film {n} was", n % 2, n % 3] for n in range(30)]
    path = write(here / "f.csv", rows)
    command = ["--train", path, "--model", "tiny"]
    said = fails(train.main, command)
    assert "each of ['a', 'b'] could be the text (columns: ['a', 'b', 'x', 'y']); name it" in said
    command += ["--text-column", "a"]
    assert "each of ['x', 'y'] could be the label (columns:" in fails(train.main, command)
    said = fails(train.main, [*command, "--label-column", "z"])
    assert "no columns 'z'; its columns are ['a'," in said
    assert "--dev is the training table" in fails(train.main, [*command, "--dev", path])
    assert "there is no file none.csv" in fails(train.main, ["--train", "none.csv"])
    more = ["--text-column", "b", "--text-column", "x", "--label-column", "y"]
    assert "--text-column: name one column, or two" in fails(train.main, [*command, *more])
    more = ["--label-column", "b"]
    assert "'b' has 30 different labels in 30 rows" in fails(train.main, [*command, *more])


@pytest.mark.parametrize(
    ("labels", "flags", "words", "head"),
    [
        (["no", "yes"], [], {"no": "no", "yes": "yes"}, "words"),
        (["Great", "Terrible"], [], {"Great": "great", "Terrible": "terrible"}, "words"),
        (["10", "9", "-1"], [], {"-1": "-1", "9": "9", "10": "10"}, "classifier"),
        (["not so good", "fun"], [], {n: n for n in ("fun", "not so good")}, "classifier"),
        (["0", "1"], ["--words", "terrible, great"], {"0": "terrible", "1": "great"}, "words"),
        (["no", "yes"], ["--head", "classifier"], {"no": "no", "yes": "yes"}, "classifier"),
        (["1", "2"], ["--regression"], {"score": "yes"}, "words"),
        (["0.5", "2", "3"], [], {"score": "yes"}, "words"),
    ],
)
def test_label_words_or_a_classifier(here, labels, flags, words, head):
    rows = [["text", "label"]]
    rows += [[f"{n} was good", labels[n % len(labels)]] for n in range(30)]
    args = decide(write(here / "f.csv", rows), *flags)
    assert list(args.table["words"].items()) == list(words.items()) and args.head == head
    assert data.task_of(vars(args)).words == words
    assert data.task_of(vars(args)).metrics[0] == ("pearson" if "score" in words else "accuracy")


def test_words_that_cannot_be(here, fails):
    command = ["--train", write(here / "f.csv", reviews()), "--model", "tiny"]
    for flags, message in (
        (["--words", "great"], "--words: 1 words for 2: negative, positive"),
        (["--words", "great,great"], "--words: label word 'great' is"),
        (["--head", "words"], "--words: label word 'negative' is"),
        (["--head", "classifier", "--words", "a,b"], "--words: a classifier has none"),
        (["--regression"], "f.csv:2: 'negative' is not a score; unusable rows: 120"),
        (["--task", "movies"], "--train makes a task of its own; leave out --task"),
        (["--data-dir", "x"], "--train makes a task of its own; leave out --data-dir"),
    ):
        assert message in fails(train.main, [*command, *flags])
    assert "--words needs --train FILE" in fails(train.main, ["--words", "a,b"])


def test_many_rows_are_read_in_part(here):
    """One epoch up to 20,000 rows, and about as many steps beyond."""
    table = decide(write(here / "f.csv", reviews())).table
    epochs = [own.make_task(table | {"rows": n}).recipe["epochs"] for n in (9, 20_000, 80_000)]
    assert epochs == [1, 1, 0.25]


def test_what_a_run_is_named_after(here):
    path = write(here / "my films.csv", reviews())
    assert decide(path).out.name == "my-films-tiny-smp-s-0.5-seed0"
    args = decide(path, "--text-column", "review", "--words", "bad,good", "--lr", "0.04")
    assert args.out.name == "my-films-tiny-smp-s-0.5-lr0.04-review-bad,good-seed0"
    assert own.task_name("x/movies.csv") == "movies-csv"  # that of the table is another task
    assert vars(args)["epochs"] == 1 and args.batch == 16


# --- rows -----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_named_or_left_out(here, fails, capsys):
    rows = reviews()
    rows[3][1] = " "  # the second row takes two lines
    rows[5][2] = ""
    rows[7] = rows[7][:2]
    path = write(here / "f.csv", rows)
    command = ["--train", path, *FLAGS, "--label-column", "sentiment", "--text-column", "review"]
    said = fails(train.main, command)
    assert f"{path}:5: 'review' is empty; unusable rows: 3, and --skip-bad-rows" in said
    train.main([str(word) for word in [*command, "--skip-bad-rows", "--out", here / "run"]])
    said = capsys.readouterr().out
    assert said.count(f"f.csv: unusable rows: 3, the first is {path}:5") == 2
    assert json.loads((here / "run" / "result.json").read_text())["table"]["rows"] == 117

    # Labels that training did not see, in a file to evaluate.
    other = write(here / "other.csv", [rows[0], rows[1], [0, "a film", "neutral"]])
    flags = ["--dev", str(other)]
    eval_.main([str(here / "run"), *flags])
    assert "dev (1 examples)" in capsys.readouterr().out


def test_a_tenth_is_held_out_whatever_the_order():
    texts = [(f"text {n % 900}",) for n in range(1000)]  # a hundred occur twice
    held = own.held_out(texts)
    assert 100 <= sum(held) <= 101
    assert own.held_out(texts[::-1]) == held[::-1]
    assert held[:100] == held[900:]  # equal texts stay together
    assert [sum(own.held_out(texts[:n])) for n in (60, 90, 900)] == [30, 45, 90]
    assert sum(own.held_out([(str(n),) for n in range(20_000)])) == 1000


def test_scores_are_learned_from_0_to_5_and_told_on_their_own_scale(here, capsys):
    rows = [["text", "stars"]]
    for n in range(99):
        rows.append([f"{'good' if n % 2 else 'bad'} film {'and ' * n}", 20 + n % 2 * 60.5])
    path = write(here / "f.csv", rows)
    run = here / "run"
    train.main(["--train", str(path), *FLAGS, "--out", str(run)])
    assert "f.csv: 'stars' is a score from 20 to 80.5" in capsys.readouterr().out
    loaded = eval_.load_run(str(run))
    assert loaded.task.scale == (20, 60.5 / 5)
    dev = data.load_split(loaded.task, "dev", str(path), loaded.tokenizer)
    assert set(dev.labels) == {0, 5}
    # Half-way between 0 and 5 is half-way between 20 and 80.5.
    assert eval_.answers(loaded, ["a"], lambda _: torch.tensor([[2.5]])) == [[(50.25, "")]]


# --- from a file to answers -----------------------------------------------------------------------


def windows_rows():
    return [["text", "stars"], *([f"{(BAD + GOOD)[n % 8]} {n}", 1 + n % 3] for n in range(120))]


def pairs():
    rows = [["claim", "source", "verdict"]]
    for n in range(120):
        verdict = ("not enough info", "refuted", "supported")[n % 3]
        rows.append([f"{(BAD + GOOD)[n % 8]} {n}", f"the film {n} is {'very ' * (n % 5)}", verdict])
    return rows


TABLES = {
    "reviews.csv": (reviews, {"encoding": "utf-8-sig"}, []),
    "windows.tsv": (windows_rows, {"encoding": "utf-16", "delimiter": "\t"}, []),
    "pairs.csv": (pairs, {"delimiter": ";"}, ["--text-column", "claim", "--text-column", "source"]),
}


def test_labels_too_long_for_numbers_are_words():
    """Python reads no number of more than 4300 digits. In the alphabet, 12... comes before 2."""
    long = "12" * 3000
    table = {"file": "a.csv", "label": "stars", "notes": []}
    own.describe_classes(table, ["2"] * 3 + [long] * 3)
    assert list(table["words"]) == [long, "2"]


@pytest.mark.parametrize("name", TABLES)
def test_from_a_table_to_answers(here, capsys, name):
    """Training, evaluation and answers take a command each, and nothing is called another task."""
    make, options, flags = TABLES[name]
    rows = make()
    write(here / name, rows, **options)
    train.main(["--train", name, *flags, *FLAGS])
    said = capsys.readouterr().out
    (run,) = (here / "runs").iterdir()
    stem = name.partition(".")[0]
    assert run.name.startswith(f"{stem}-tiny-") and f"\n{stem}: {len(rows) - 51} train ex" in said
    assert f"{name}: 50 of {len(rows) - 1} rows are the dev set" in said
    assert f"{name}: the longest text has " in said and "classes: " in said
    mask = (run / "mask.safetensors").read_bytes()
    assert b"sst2" not in mask and b"movies" not in mask
    assert not any(text.encode() in mask for text in (*GOOD, *BAD))

    eval_.main([str(run)])
    final = json.loads((run / "result.json").read_text())["final"]["accuracy"]
    assert f"dev (50 examples): accuracy {final:.4f}" in capsys.readouterr().out

    # Without the column of the labels, in another order.
    new = [row[-2::-1] for row in rows]
    new_name = f"new{name[-4:]}"
    write(here / new_name, new, **options)
    eval_.main([str(run), "--text-file", new_name])
    delimiter = options.get("delimiter", ",")
    out = capsys.readouterr().out
    marked = (here / new_name).read_bytes().startswith(b"\xef\xbb\xbf")
    assert out.startswith("\ufeff") == marked  # without it, Excel would not read UTF-8
    answered = [*csv.reader(io.StringIO(out.removeprefix("\ufeff")), delimiter=delimiter)]
    assert answered[0] == [*map(str, new[0]), "answer", "probability"]
    loaded = eval_.load_run(str(run))
    columns = [new[0].index(column) for column in loaded.task.text]
    texts = [tuple(row[i].strip() for i in columns) for row in new[1:]]
    found = eval_.answers(loaded, texts)
    assert [row[-2:] for row in answered[1:]] == [
        [best[0][1], f"{best[0][0]:.4f}"] for best in found
    ]
    cells = [[str(cell).replace("\r\n", "\n") for cell in row] for row in new[1:]]
    assert [row[:-2] for row in answered[1:]] == cells


def test_a_run_can_be_resumed_while_its_table_is_the_same(here, fails, monkeypatch):
    monkeypatch.setattr("plumbing.run.SAVE_EVERY", 0)
    path = write(here / "f.csv", reviews())
    command = ["--train", "f.csv", *FLAGS, "--evals", "2"]
    interrupt([*command, "--out", "a"], step=3)
    train.main([*command, "--out", "b"])
    same = path.read_bytes()
    path.write_bytes(same.replace(b"dull", b"fun"))
    assert "--resume: train digest is" in fails(train.main, ["--resume", "a"])
    path.write_bytes(same)
    train.main(["--resume", "a"])
    masks = [unseal(here / run / "mask.safetensors", MASKS)[0] for run in "ab"]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])


def test_another_place_and_another_file(here, fails, capsys):
    """The run's numbers need its own rows. --dev takes any file with its columns."""
    path = write(here / "f.csv", reviews())
    train.main(["--train", "f.csv", *FLAGS, "--out", "run"])
    moved = path.rename(here / "g.csv")
    eval_.main(["run", "--dev", str(moved)])
    assert "dev (50 examples)" in capsys.readouterr().out  # never those that trained
    moved.write_text(moved.read_text() + "\n")
    eval_.main(["run", "--dev", str(moved)])
    assert "dev (120 examples)" in capsys.readouterr().out  # all rows: it is another file
    assert "the run's table is not here; eval.py --dev names" in fails(eval_.main, ["run"])
    write(path, reviews(100))
    assert "dev in f.csv is not the run's" in fails(eval_.main, ["run"])
    # A second file instead of held-out rows.
    train.main(["--train", "f.csv", "--dev", "g.csv", *FLAGS, "--out", "two"])
    said = capsys.readouterr().out
    assert "f: 100 train examples" in said and "are the dev set" not in said
    eval_.main(["two"])
    assert "dev (120 examples)" in capsys.readouterr().out
    # It is that file, even where one beside the table has its name. A moved one lies beside it.
    other = here / "other"
    other.mkdir()
    write(other / "f.csv", reviews(60))
    train.main(["--train", "f.csv", "--dev", "other/f.csv", *FLAGS, "--out", "three"])
    eval_.main(["three"])
    assert "dev (60 examples)" in capsys.readouterr().out
    (other / "f.csv").rename(other / "h.csv")
    train.main(["--train", "f.csv", "--dev", "other/h.csv", *FLAGS, "--out", "four"])
    (other / "h.csv").rename(here / "h.csv")
    eval_.main(["four"])
    assert "dev (60 examples)" in capsys.readouterr().out


def test_a_teacher_knows_the_same_classes(here, fails):
    write(here / "f.csv", reviews())
    teacher = ["--method", "finetune", "--out", "teacher", "--words", "bad,good"]
    train.main(["--train", "f.csv", *FLAGS, *teacher])
    student = ["--train", "f.csv", *FLAGS, "--teacher", "teacher", "--out", "student"]
    train.main([*student, "--words", "bad,good"])
    others = [["text", "label"], *([f"a film {n}", "yes" if n % 2 else "no"] for n in range(99))]
    write(here / "f.csv", others)
    message = "was trained on ['f', 'negative', 'positive'], not on ['f', 'no', 'yes']"
    student[-1] = "third"
    assert message in fails(train.main, student)


def test_lengths_are_told_before_they_are_cut(here):
    tokenizer = cutting_tokenizer(here / "tiny", 8)
    said = own.describe_lengths(
        [("a film",), ("very " * 9,), ("it was fun and good and so",)], tokenizer
    )
    assert said == "the longest text has 11 tokens"
    pairs = [("a film", "good"), ("it was fun", "very good")]  # with [CLS] and two [SEP]
    assert own.describe_lengths(pairs, tokenizer) == "the longest text has 8 tokens"
    assert len(tokenizer.encode("very " * 9).ids) == 8  # it still cuts


def test_altered_tables_end_in_one_line(here, survives):
    @one_line_errors()
    def command():
        decide(path, "--text-column", "review", "--label-column", "sentiment")

    path = write(here / "f.csv", reviews())
    fuzz(path, survives, command)


def test_a_row_that_cannot_be_used_gets_no_answer(here, fails, capsys):
    """So the rows stay beside those of the file. A note on stderr says so."""
    write(here / "f.csv", reviews())
    train.main(["--train", "f.csv", *FLAGS, "--out", "run"])
    capsys.readouterr()
    (here / "new.csv").write_bytes(b'x,review\r\n1,a film\r\n2,\r\n3,"a ""film"""\r\n')
    eval_.main(["run", "--text-file", "new.csv"])
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == ["x", "1", "2", "3"]
    assert out.splitlines()[2] == "2,,," and '3,"a ""film""",' in out
    assert "unusable rows: 1, the first is new.csv:3: 'review' is empty" in err
    write(here / "other.csv", [["text"], ["a film"]])
    said = fails(eval_.main, ["run", "--text-file", "other.csv"])
    assert "other.csv has no columns 'review'; its columns are ['text']" in said
