"""A table of your own as a task: texts in one column, labels or scores in another.

The flags become a description, a small dict that says what was decided. The description becomes
the Task, and stays in the run's result, so that eval.py reads the next table in the same way. It
holds columns, labels and counts, and no text of the table:

    {"file": "reviews.csv", "train": "data/reviews.csv", "dev": "", "sha256": "53aa...",
     "text": ["review"], "label": "sentiment", "rows": 300, "skip_bad_rows": False,
     "words": {"0": "bad", "1": "good"},  # label: its word
     "scale": [],  # of scores: [low, unit], a score is low + unit * logit
     "notes": ["2 classes: 0 (150), 1 (150)"]}  # what the run prints about it

    python train.py --train reviews.csv --text-column review --label-column sentiment
    python eval.py RUN --text-file new.csv > answered.csv
"""

import codecs
import csv
import io
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import extras.glue  # noqa: F401 (the metrics of scores)
from data import ACCURACY, MOVIES, TASKS, Task, encode, tables
from model import label_word_ids
from plumbing import fetch
from plumbing.checkpoints import cutting_tokenizer, encode_texts
from plumbing.cli import flag, printable
from plumbing.files import sha256

FLAGS = {
    "train": (str, "a CSV or TSV file of yours; its first line names columns"),
    "dev": (
        str,
        "a second one to evaluate on; by default a tenth of the rows (50 to 1000, at most half)",
    ),
    "text_column": (list, "the column with the text; twice for pairs"),
    "label_column": (str, "the column with the label"),
    "words": (str, "label words, with commas between, in the order of the classes"),
    "regression": (bool, "the labels are scores"),
    "skip_bad_rows": (bool, "leave out rows that cannot be used"),
}

MOST_CLASSES = 20  # of a column that is taken for the labels without being named
MOST_ROWS = 20_000  # that a run reads by default; more rows are read in part
SCALE = 5.0  # scores are learned from 0 to 5, as those of STS-B are


class Row(NamedTuple):
    """A row of a table."""

    line: int  # where it begins in the file, from 1
    cells: list


# --- files ----------------------------------------------------------------------------------------


def read_text(path):
    """Decode a file: UTF-8, or UTF-16 with its mark. Raises ValueError for another encoding."""
    content = path.read_bytes()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL characters")
    except ValueError as error:
        start = getattr(error, "start", 0)  # the byte, of a UnicodeDecodeError
        line = content[:start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 ({error}); save it as UTF-8 "
            "(Excel: Save As, CSV UTF-8; iconv -f cp1252 -t utf-8 FILE)"
        ) from None
    return text


def find_delimiter(path, text):
    """What separates the cells: tabs, commas or semicolons."""
    first_line = text.partition("\n")[0]
    if path.suffix.lower() in (".tsv", ".tab") or "\t" in first_line:
        return "\t"
    # Where a comma is the decimal point, spreadsheets write semicolons.
    return max(",;", key=first_line.count)


def read_table(path):
    """A CSV or TSV file -> (header, list of Rows, delimiter). Empty rows are left out.

    Raises ValueError that names the line.
    """
    path = Path(path)
    text = read_text(path)
    delimiter = find_delimiter(path, text)
    try:
        rows = split_rows(text, delimiter)
    except ValueError as error:
        if delimiter != "\t":
            raise ValueError(f"{path}:{error}; a quote within quotes is doubled") from None
        # Many programs write TSV without quoting. There a quote is an ordinary character.
        rows = split_rows(text, delimiter, quoting=csv.QUOTE_NONE)
    if len(rows) < 2:
        raise ValueError(f"{path} holds no rows below a first line with the columns' names")
    header = [name.strip() for name in rows.pop(0).cells]
    return header, rows, delimiter


def split_rows(text, delimiter, **options):
    """A text -> Rows. Raises ValueError that begins with the line of a quote that does not end."""
    csv.field_size_limit(2**31 - 1)  # of characters in a cell; Windows allows no more
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **options)
    rows = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(line, cells))
            line = reader.line_num + 1  # a cell may hold line breaks
    except csv.Error as error:
        raise ValueError(f"{line}: {error}") from None
    return rows


# --- columns --------------------------------------------------------------------------------------


def column_number(path, header, name):
    """Where a column is. Raises ValueError unless there is exactly one of this name."""
    count = header.count(name)
    if count != 1:
        raise ValueError(f"{path} has {count or 'no'} columns {name!r}; its columns are {header}")
    return header.index(name)


def looks_like_text(cells):
    """Whether most cells have several words, and most differ."""
    several = sum(len(cell.split()) > 1 for cell in cells)
    different = len(set(cells))
    return min(several, different) > len(cells) / 2


def looks_like_labels(cells):
    """Whether there are a few labels, each of which occurs twice or more on average; or scores."""
    different = len(set(cells))
    if all_scores(cells):
        return different > 1
    return 1 < different <= min(MOST_CLASSES, len(cells) / 2)


def all_scores(cells):
    """Whether all are numbers, and some have fractions."""
    fractions = 0
    for cell in cells:
        value = number(cell)
        if math.isnan(value):
            return False
        fractions += not value.is_integer()
    return fractions > 0


def number(cell):
    """A cell -> float; nan if it is no finite number."""
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def only_column(path, header, rows, role, others):
    """The name of the only column that looks like `role`, "text" or "label", and is not in others.

    Raises ValueError if none does, or several do.
    """
    likely = looks_like_text if role == "text" else looks_like_labels
    candidates = []
    for i, name in enumerate(header):
        cells = []
        for row in rows:  # some may be too short
            if i < len(row.cells) and row.cells[i].strip():
                cells.append(row.cells[i].strip())
        if cells and name not in others and likely(cells):
            candidates.append(name)
    if len(candidates) != 1:
        what = f"no column is clearly the {role}"
        if candidates:
            what = f"each of {candidates} could be the {role}"
        raise ValueError(f"{path}: {what} (columns: {header}); name it with --{role}-column")
    return candidates[0]


# --- rows -----------------------------------------------------------------------------------------


def usable_rows(path, table, rows, header, labelled=True):
    """Rows that can be used -> (these Rows, texts as tuples, labels, a line about the others).

    table: the description. labelled False: the table needs no labels, and none are returned. Raises
    ValueError that names the first line that cannot be used, unless --skip-bad-rows leaves such
    rows out.
    """
    names = list(table["text"])
    if labelled:
        names.append(table["label"])
    columns = {name: column_number(path, header, name) for name in names}
    kept, texts, labels, bad = [], [], [], []
    for row in rows:
        try:
            cells = usable_cells(row, columns, len(header))
            if labelled:
                check_label(table, cells[-1])
        except ValueError as error:
            bad.append(f"{path}:{row.line}: {error}")
            continue
        kept.append(row)
        if labelled:
            labels.append(cells.pop())
        texts.append(tuple(cells))

    note = ""
    if bad:
        note = f"unusable rows: {len(bad)}, the first is {bad[0]}"
        if not table["skip_bad_rows"]:
            raise ValueError(
                f"{bad[0]}; unusable rows: {len(bad)}, and --skip-bad-rows leaves such rows out"
            )
    if not kept:
        raise ValueError(f"{path} holds no rows that can be used")
    return kept, texts, labels, note


def usable_cells(row, columns, width):
    """A row's cells in these columns {name: number}, without space around them.

    width: how many columns the table has. Raises ValueError that says why the row cannot be used.
    """
    if len(row.cells) < width or any(row.cells[width:]):
        raise ValueError(f"{len(row.cells)} columns instead of {width}")
    cells = []
    for name, i in columns.items():
        cells.append(row.cells[i].strip())
        if not cells[-1]:
            raise ValueError(f"{name!r} is empty")
    return cells


def check_label(table, label):
    """Raise ValueError for a label that is no score, or none of the classes, if they are known."""
    if table["scale"]:
        if math.isnan(number(label)):
            raise ValueError(f"{label!r} is not a score")
    elif table["words"] and label not in table["words"]:
        raise ValueError(f"the label {label!r} is none of {list(table['words'])}")


def held_out(texts):
    """For each of the texts (tuples), whether it belongs to the dev set: a list of bool.

    The dev set is a tenth of the rows, from 50 to 1000, but at most half. It takes those with the
    lowest sha256, so that the order of the rows does not matter, and equal texts stay together.
    """
    digests = [sha256("\n".join(text).encode()) for text in texts]
    size = min(max(len(texts) // 10, 50), 1000, len(texts) // 2)
    highest = sorted(digests)[size - 1]
    return [digest <= highest for digest in digests]


# --- from flags to a description ------------------------------------------------------------------


def settings(given):
    """data.tables.settings: read the table that --train names, and decide how to learn it.

    Raises ValueError that names the flag to change.
    """
    if "train" not in given:
        for name in FLAGS:
            if name in given:
                raise ValueError(f"{flag(name)} needs --train FILE")
        return {}
    for name in ("task", "data_dir"):
        if name in given:
            raise ValueError(f"--train makes a task of its own; leave out {flag(name)}")

    path = given["train"]
    if not Path(path).is_file():
        raise ValueError(f"--train: there is no file {path}")
    if "dev" in given and Path(given["dev"]).resolve() == Path(path).resolve():
        raise ValueError("--dev is the training table; leave it out to hold out some of its rows")
    table = {"file": Path(path).name, "train": path, "dev": given.get("dev", "")}
    table["sha256"] = sha256(Path(path).read_bytes())
    header, rows, _ = read_table(path)
    table |= find_columns(given, header, rows)
    table["skip_bad_rows"] = "skip_bad_rows" in given
    table["words"] = {}  # words and scale follow from the labels, which are read below
    table["scale"] = [0.0, 1.0] if "regression" in given else []
    _, _, labels, _ = usable_rows(path, table, rows, header)
    table["rows"] = len(labels)
    if table["scale"] or all_scores(labels):
        describe_scores(table, labels)
    else:
        describe_classes(table, labels)
    return {
        "task": task_name(path),
        "table": table,
        "head": choose_words(table, given),
        "data_dir": path,  # the table itself, see data.split_path
    }


def task_name(path):
    """What the run is called after: reviews.csv -> reviews, but movies.csv -> movies-csv."""
    path = Path(path)
    name = path.stem
    if name in TASKS:
        name = path.name.replace(".", "-")
    return re.sub(r"[^\w-]", "-", name)


def find_columns(given, header, rows):
    """-> {"text": names, "label": name, "notes": lines}, as given or found.

    Raises ValueError if a column cannot be found, or is named twice.
    """
    path = given["train"]
    text = given.get("text_column")
    label = given.get("label_column")
    notes = []
    if text is None:
        text = [only_column(path, header, rows, "text", [label])]
        notes.append(f"the text is in {text[0]!r}, the only column that looks like one")
    if label is None:
        label = only_column(path, header, rows, "label", text)
        notes.append(f"the labels are in {label!r}, the only column that looks like labels")
    distinct = len({*text, label}) == len(text) + 1
    if len(text) > 2 or not distinct:
        raise ValueError("--text-column: name one column, or two for pairs, and not the label's")
    return {"text": text, "label": label, "notes": notes}


def describe_classes(table, labels):
    """Put the classes into the description, in their order: that of numbers, or of the alphabet."""
    counts = Counter(labels)
    # 10 comes after 9 if all are whole numbers, and before it among words.
    whole = all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in counts)
    names = sorted(counts, key=int if whole else None)
    if not 1 < len(names) <= len(labels) / 2:
        raise ValueError(
            f"{table['file']}: {table['label']!r} has {len(names)} different labels in "
            f"{len(labels)} rows; --label-column names another column, --regression takes numbers "
            "as scores"
        )
    table["words"] = {}
    shown = []
    for name in names:
        table["words"][name] = name
        shown.append(f"{name} ({counts[name]:,})")
    table["notes"].append(f"{len(names)} classes: {', '.join(shown)}")


def describe_scores(table, labels):
    """Put the scale of the scores into the description."""
    scores = [number(label) for label in labels]
    low, high = min(scores), max(scores)
    if low == high:
        raise ValueError(f"{table['file']}: every {table['label']!r} is {low:g}")
    table["words"] = {"score": "yes"}
    table["scale"] = [low, (high - low) / SCALE]  # [low, unit]: a score is low + unit * logit
    table["notes"].append(f"{table['label']!r} is a score from {low:g} to {high:g}")


def choose_words(table, given):
    """Decide between label words, which go into the description, and a classifier -> the head.

    given: the flags. Raises ValueError that names the one that cannot be followed.
    """
    names = list(table["words"])
    chosen = given.get("words")
    head = given.get("head")
    if head == "classifier":
        if chosen:
            raise ValueError("--words: a classifier has none; leave out --head classifier")
        return head

    folder = fetch.model_folder(given.get("model") or MOVIES["model"])
    tokenizer = cutting_tokenizer(folder, MOVIES["length"])
    # The labels themselves ("yes" for a score), or in small letters.
    usual = list(table["words"].values())
    tries = [usual, [word.lower() for word in usual]]
    if chosen:
        tries = [[word.strip() for word in chosen.split(",")]]
    for words in tries:
        try:
            if len(words) != len(names):
                raise ValueError(f"{len(words)} words for {len(names)}: {', '.join(names)}")
            label_word_ids(words, tokenizer)
        except ValueError as error:
            reason = error
        else:
            table["words"] = dict(zip(names, words, strict=True))
            table["notes"].append(f"label words: {', '.join(words)}")
            return "words"

    if chosen or head:
        raise ValueError(f"--words: {reason}")
    table["notes"].append(
        "a fresh classifier trains, too, as not every label is one word of the vocabulary "
        "(--words names label words)"
    )
    return "classifier"


# --- from a description to a task -----------------------------------------------------------------


def make_task(table):
    """data.tables.task: a description -> Task. It trains one epoch, and less of a long table."""
    return Task(
        folder="",
        file=table["file"],
        text=tuple(table["text"]),
        label=table["label"],
        words=table["words"],
        metrics=("pearson", "spearman") if table["scale"] else ACCURACY,
        recipe=MOVIES | {"epochs": min(1.0, MOST_ROWS / table["rows"])},
        fetch=report_missing,
        scale=tuple(table["scale"]) or (0.0, 1.0),
        read=partial(read, table),
        answer_file=partial(answer_file, table),
    )


def report_missing(task, split):
    """Task.fetch: there is nothing to download."""
    raise ValueError("the run's table is not here; eval.py --dev names a file like it")


def read(table, task, split, path, tokenizer):
    """Task.read: the rows of a split -> Examples.

    Prints what is left out, and for "train" what was decided. path: the run's table, wherever it is
    now, or another file to evaluate. Raises ValueError that names the file and what is wrong.
    """
    # Whatever it is called, the rows that trained must not be evaluated.
    ours = str(path) == str(Path(table["train"])) or sha256(path.read_bytes()) == table["sha256"]
    if ours and split == "dev" and table["dev"]:
        dev = Path(table["dev"])
        beside = path.with_name(dev.name)  # where both have moved
        path = beside if beside.exists() and not dev.exists() else dev
    header, rows, _ = read_table(path)
    lenient = table if ours else table | {"skip_bad_rows": True}
    _, texts, labels, note = usable_rows(path, lenient, rows, header)
    notes = [note] if note else []

    if ours and not table["dev"]:  # both splits are in this file
        held = held_out(texts)
        texts, labels = rows_of_split(split, texts, labels, held)
        if not texts:
            raise ValueError(f"{path}: too few texts differ to hold some out; --dev names a file")
        if split == "train":
            notes.append(
                f"{sum(held)} of {len(held)} rows are the dev set, chosen by a hash of their text; "
                "--dev names a file instead"
            )
    if split == "train":
        notes = [*table["notes"], *notes, describe_lengths(texts, tokenizer)]
    for line in notes:
        print(f"{path.name}: {line}")
    return encode(texts, [target(table, label) for label in labels], tokenizer)


def rows_of_split(split, texts, labels, held):
    """Texts and labels of one split, "train" or "dev". held: for each row, whether it is dev's."""
    split_texts, split_labels = [], []
    for text, label, is_dev in zip(texts, labels, held, strict=True):
        if is_dev == (split == "dev"):
            split_texts.append(text)
            split_labels.append(label)
    return split_texts, split_labels


def target(table, label):
    """What is learned for a label: the number of its class, or its score on a scale from 0 to 5."""
    if not table["scale"]:
        return list(table["words"]).index(label)
    low, unit = table["scale"]
    return (number(label) - low) / unit


def describe_lengths(texts, tokenizer):
    """Say how long the longest text is, in tokens."""
    settings = tokenizer.truncation
    tokenizer.no_truncation()
    # To the library a tuple is a pair, and a single text is a string.
    whole = [text if len(text) == 2 else text[0] for text in texts]
    longest = max(len(encoding.ids) for encoding in encode_texts(tokenizer, whole))
    tokenizer.enable_truncation(**settings)
    return f"the longest text has {longest} tokens"


def describe_table(table):
    """Say on a card or a page what a run's table was; "" for a task that has none."""
    if not table:
        return ""
    about = "; ".join(table.get("notes", []))  # older runs have none
    if table["scale"]:
        low, unit = table["scale"]
        about += f"; a score is {low:g} + {unit:g} times the logit"
    columns = f"{table['label']} from {' and '.join(table['text'])}"
    return printable(f"Trained on a table, {table['file']}: {columns}. {about}.")


# --- answers --------------------------------------------------------------------------------------


def answer_file(table, path, answers):
    """Task.answer_file: a table of texts -> its lines, with answer and probability at the end.

    The file needs only the columns of the text. The cells are separated as they were. A row that
    cannot be used gets no answer.
    """
    header, rows, delimiter = read_table(path)
    lenient = table | {"skip_bad_rows": True}
    kept, texts, _, note = usable_rows(path, lenient, rows, header, labelled=False)
    if note:
        print(note, file=sys.stderr)

    added = ["score"] if table["scale"] else ["answer", "probability"]
    answered = {}  # {line where a row begins: the cells to add}
    for row, answer in zip(kept, answers(texts), strict=True):
        value, label = answer[0]  # the likeliest
        if table["scale"]:
            answered[row.line] = [f"{value:.4f}"]
        else:
            answered[row.line] = [label, f"{value:.4f}"]

    written = io.StringIO()
    if path.read_bytes().startswith(codecs.BOM_UTF8):  # without it, Excel would not read UTF-8
        written.write("\ufeff")
    writer = csv.writer(written, delimiter=delimiter, lineterminator="\n")
    writer.writerow([*header, *added])
    for row in rows:
        more = answered.get(row.line, [""] * len(added))
        writer.writerow([*row.cells[: len(header)], *more])
    return written.getvalue().removesuffix("\n").split("\n")


tables.flags, tables.settings, tables.task = FLAGS, settings, make_task
