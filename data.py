"""Tasks, metrics, TSV readers, and batches of texts of similar length.

TASKS is the one table of tasks; extras/ adds rows to it. RECIPE holds the defaults that all tasks
share, and each row says what it does otherwise. Source: Wang et al., GLUE (ICLR 2019).

    train = load_split("movies", "train", None, tokenizer)
    for parts in training_batches(train, size=32, steps=600, seed=0):
        for inputs, labels, share in parts: ...
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from plumbing import parallel
from plumbing.checkpoints import encode_rows
from plumbing.fetch import by_hand, cache, fetch_movies, no_test_server
from plumbing.files import read_lines
from plumbing.rows import Rows, sha256_of_rows

# --- metrics: (predicted classes or scores [N], true ones [N]) -> a number ------------------------


def accuracy(predicted, true):
    return float((predicted == true).mean())


METRICS = {"accuracy": accuracy}  # extras/glue.py has more

# --- tasks ----------------------------------------------------------------------------------------

# The recipe of the paper's code for GLUE. The names are train.py's flags; decay has no flag.
RECIPE = {
    "model": "bert-base-uncased",
    "batch": 32,
    "length": 128,  # longest input in tokens
    "dropout": True,
    "ramp": 0.6,  # share of the steps in which the density falls to its target
    "penalty": 400.0,  # lambda, the final weight of the regularizer
    "weight_lr": 3e-5,  # peak learning rate of weights that train
    "decay": 0.01,  # weight decay, for matrices alone
    "evals": 20,  # evaluations per run
    "epochs": 10,  # passes over the training set
}
LARGE = {"epochs": 12, "batch": 64}  # the paper's code for the four large tasks
MOVIES = {  # ours: minutes on a CPU
    "model": "minilm",
    "epochs": 1,
    "batch": 16,
    "length": 64,
    "dropout": False,
    "ramp": 0.9,
    "penalty": 800.0,
    "temperature": 4.0,  # p of SMP-S
    "weight_lr": 1e-4,
    "evals": 4,
}


@dataclass(frozen=True)
class Task:
    """One row of the task table."""

    folder: str  # below --data-dir, as GLUE names it
    text: tuple  # columns of the text (and of its pair), by header name, or number without a header
    label: str | int  # column of the label
    words: dict  # label in the file -> label word, in class order; a single entry means regression
    metrics: tuple  # in METRICS, or known to its Examples; the first chooses the best step
    recipe: dict = field(default_factory=dict)  # {flag: default} where it differs from RECIPE

    # The splits beside "train", and their files.
    dev: tuple = ("dev",)
    file: str = "{}.tsv"  # the file name of a split
    skip_broken: bool = False  # leave out rows with the wrong number of columns
    predict: Callable = no_test_server  # (test file, run, Loaded, logits_of): write answers
    fetch: Callable = by_hand  # (task, split): put the file of a split into the cache

    # Of a regression: the lowest and the highest score that may occur. A score is a + b * logit.
    scores: tuple = (-1e18, 1e18)
    scale: tuple = (0.0, 1.0)

    # Hooks for tasks that do more than classify [CLS].
    best: Callable = max  # or min: which value of the first metric is best
    every_token: bool = False  # the model reads every token
    load: Callable | None = None  # (folder, length, head) -> model, tokenizer; default: a BERT
    read: Callable | None = None  # (task, split, path, tokenizer) -> Examples; default: a TSV file
    step: Callable | None = None  # make_forward_backward; default: train.py's
    format_answer: Callable | None = None  # (texts, tokenizer, logits_of, args) -> lines of --text
    answer_file: Callable | None = None  # (path, answers) -> lines of --text-file; default: TSV


SENTIMENT = {"0": "terrible", "1": "great"}
NO_YES = {"0": "no", "1": "yes"}
ENTAILMENT = {"not_entailment": "no", "entailment": "yes"}
NLI = {"contradiction": "no", "neutral": "maybe", "entailment": "yes"}

ACCURACY = ("accuracy",)
PAIR = ("sentence1", "sentence2")
QNLI_PAIR = ("question", "sentence")

# name: folder, columns of the text, column of the label, {label: word}, metrics, recipe
TASKS = {
    "movies": Task(
        "movies", ("sentence",), "label", SENTIMENT, ACCURACY, MOVIES, fetch=fetch_movies,
    ),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ACCURACY, {"epochs": 100}),
    "sst2": Task("SST-2", ("sentence",), "label", SENTIMENT, ACCURACY, LARGE),
    "qnli": Task("QNLI", QNLI_PAIR, "label", ENTAILMENT, ACCURACY, LARGE),
    "mnli": Task(
        "MNLI", PAIR, "gold_label", NLI, ACCURACY, LARGE,
        dev=("dev_matched", "dev_mismatched"),
    ),
    "wnli": Task("WNLI", PAIR, "label", NO_YES, ACCURACY, {"epochs": 60}),
}  # fmt: skip


# Tasks made of a table of your own, which has no row here: extras/own.py puts its functions in.
tables = SimpleNamespace(
    flags={},  # further flags of train.py, {name: (type, help)}
    settings=lambda given: {},  # flags as given -> the defaults that follow from the table
    task=None,  # the setting "table" -> Task
)


def task_of(settings):
    """The Task of a run's settings, or of its result; None if nobody knows it."""
    if tables.task and settings.get("table"):
        return tables.task(settings["table"])
    return TASKS.get(settings["task"])


# --- examples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Tokenised rows of a file: N texts or pairs of texts."""

    ids: Rows  # N rows of token ids, without padding
    types: Rows  # N rows of segment ids: 0 for the first text, 1 for its pair
    labels: list  # N class numbers, or scores
    limit: int  # longest input allowed, in tokens
    cut: int = field(default=0, kw_only=True)  # how many of the texts were longer
    eval_batch = 64  # rows per batch of evaluation; another number would round differently

    def __len__(self):
        return len(self.ids)

    def digest(self):
        """sha256 of all token ids and labels. It ties a run to its data."""
        return sha256_of_rows(self.ids, self.labels)

    def arrays(self, rows, width=None):
        """Row numbers [B] -> (ids, segments and mask as one [3, B, S]; labels [B]).

        S is `width`, or what padded() makes of the longest row.
        """
        lengths = [len(self.ids[row]) for row in rows]
        width = width or padded(max(lengths), self.limit)
        # Zeros are padding, which is masked, so that any id will do.
        inputs = np.zeros((3, len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            inputs[0, i, : lengths[i]] = self.ids[row]
            inputs[1, i, : lengths[i]] = self.types[row]
            inputs[2, i, : lengths[i]] = 1

        labels = np.array([self.labels[row] for row in rows])
        kind = np.float32 if labels.dtype.kind == "f" else np.int64  # scores, or class numbers
        return inputs, labels.astype(kind)

    def num_questions(self):
        """How many questions the rows ask: one each."""
        return len(self)

    def reduce_logits(self, logits, labels):
        """What evaluation keeps of a batch: logits [B, C], labels [B] -> [B, ...]."""
        return logits

    def score(self, logits, metrics):
        """Logits [N, C] -> {metric: number}. metrics: names in METRICS."""
        # A single logit (regression) is the answer itself. Otherwise the class with the largest.
        predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
        predicted, true = predicted.numpy(), np.array(self.labels)
        return {name: METRICS[name](predicted, true) for name in metrics}


def read_rows(path, task):
    """Rows of a TSV file -> (list of text tuples, list of labels: class numbers, or scores).

    Raises ValueError with file and line for an unknown label, and see read_columns.
    """
    texts, labels = [], []
    columns = [*task.text, task.label]
    for line, (*text, label) in read_columns(path, columns, task.skip_broken):
        texts.append(tuple(text))
        labels.append(read_label(task, label, f"{path}:{line}"))
    return texts, labels


def read_columns(path, columns, skip_broken=False):
    """Yield (line number, [cell of each column]) of the rows of a TSV file.

    A quote is an ordinary character. Lines end at \\n alone, as a text may hold other separators.
    Raises ValueError with file and line for a row of the wrong width, or a file without rows.
    """
    header = next(read_cells(path), [])
    first, width = 0, len(header)
    numbers = []
    for column in columns:
        # By name in a header, or by number, as in CoLA, which has none.
        if isinstance(column, str):
            first = 1
            if header.count(column) != 1:
                problem = f"{header.count(column)} columns {column!r} in the header {header}"
                raise ValueError(f"{path}:1: {problem} (tabs separate columns)")
            column = header.index(column)
        if column >= width:
            raise ValueError(f"{path}:1: {width} columns, and the task reads column {column}")
        numbers.append(column)

    # Lines count from 1, the header included, as an editor shows them.
    any_example = False
    for line, row in enumerate(islice(read_cells(path), first, None), first + 1):
        if len(row) == width:
            any_example = True
            yield line, [row[number] for number in numbers]
        elif not skip_broken:
            raise ValueError(f"{path}:{line}: {len(row)} columns instead of {width}")
    if not any_example:
        raise ValueError(f"{path} holds no examples")


def read_cells(path):
    """Yield the lines of a TSV file, each a list of cells."""
    for line in read_lines(path):
        yield line.split("\t")


def read_label(task, cell, place):
    """A cell -> class number, or for regression a score. place: for the ValueError."""
    if len(task.words) > 1:
        if cell not in task.words:
            known = ", ".join(task.words)
            raise ValueError(f"{place}: unknown label {cell!r}; the task has {known}")
        return list(task.words).index(cell)

    lowest, highest = task.scores
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not lowest <= score <= highest:  # so that nan is refused, too
        raise ValueError(f"{place}: {cell!r} is not a score from {lowest} to {highest}")
    return score


def encode(texts, labels, tokenizer):
    """Tokenise texts (tuples of one sentence or a pair) once -> Examples."""
    # To the library a tuple is a pair, and a single text is a string.
    texts = [text if len(text) == 2 else text[0] for text in texts]
    ids, types, cut = encode_rows(tokenizer, texts)
    return Examples(ids, types, labels, tokenizer.truncation["max_length"], cut=cut)


def split_path(task, split, data_dir):
    """Where the file of a split is or will be. data_dir: see load_split.

    Raises ValueError if data_dir lacks it.
    """
    path = Path(data_dir or cache() / "glue")
    if not path.is_file():
        path = path / task.folder / task.file.format(split)
    if data_dir and not path.exists():
        raise ValueError(f"--data-dir or --dev: there is no {path.absolute()}")
    return path


def load_split(task, split, data_dir, tokenizer):
    """Examples of a split ("train", or one of the task's dev) of data_dir/FOLDER/FILE.

    task: a Task, or its name. data_dir None: the cache, which is filled on first use. data_dir
    may also name one file, to read as this split.
    """
    task = TASKS[task] if isinstance(task, str) else task
    path = split_path(task, split, data_dir)
    if not path.exists():  # in the cache, on first use
        task.fetch(task, split)
    if task.read:
        return task.read(task, split, path, tokenizer)
    return encode(*read_rows(path, task), tokenizer)


# --- batches --------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What is computed at once: a batch, or a part of one."""

    inputs: torch.Tensor  # [3, B, S], see collate
    labels: torch.Tensor  # [B], or [B, ...]
    share: float = 1.0  # the share of the batch that it is


def training_batches(examples, size, steps, seed, device="cpu", parts=1, first=0):
    """Batches `first` to `steps`, over as many epochs as that takes.

    The order of an epoch follows from (seed, epoch). Each batch is a list of Parts of one width S.
    """
    for rows in islice(endless_rows(examples, size, seed), first, steps):
        longest = max(len(examples.ids[row]) for row in rows)
        width = padded(longest, examples.limit)
        batch = []
        for part, share in split_batch(rows, min(parts, len(rows))):
            inputs, labels = collate(examples, part, device, width)
            batch.append(Part(inputs, labels, share))
        yield batch


def endless_rows(examples, size, seed):
    """The row numbers of one batch after the other, epoch after epoch."""
    for epoch in count():
        yield from batch_rows(examples, size, np.random.default_rng([seed, epoch]))


def batch_rows(examples, size, rng=None):
    """Row numbers of one pass, in batches of similar length: [B] arrays, one may be smaller.

    With rng: rows are drawn into pools of 50 batches, sorted by length within each pool, and the
    batches are shuffled. Without: one pool, sorted by length, for evaluation.
    """
    n = len(examples)
    order, pool = np.arange(n), n
    if rng:
        order, pool = rng.permutation(n), 50 * size
    lengths = np.array([len(ids) for ids in examples.ids])
    for start in range(0, n, pool):
        rows = order[start : start + pool]  # a view
        rows[:] = rows[lengths[rows].argsort(kind="stable")]

    batches = [order[start : start + size] for start in range(0, n, size)]
    if rng:  # or the short texts of a pool would always come first
        rng.shuffle(batches)
    return batches


def split_batch(rows, parts):
    """Rows of a batch -> this process's, in `parts` of about equal size, with their shares.

    A process without rows takes part in the step, too, so it gets a dummy row with share 0.
    """
    split = []
    for part in np.array_split(parallel.shard(rows), parts):  # some may be empty
        if len(part):
            split.append((part, len(part) / len(rows)))
        else:
            split.append((rows[:1], 0.0))
    return split


def collate(examples, rows, device="cpu", width=None):
    """Rows of Examples -> (ids, segments and mask as one [3, B, S]; labels [B]), on a device."""
    inputs, labels = map(torch.from_numpy, examples.arrays(rows, width))
    return inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def padded(length, limit):
    """The width of a batch whose longest row has this length: the next multiple of 4.

    So there are few shapes. A GPU records each once, and on a CPU many shapes fragment malloc's
    heap.
    """
    return min(math.ceil(length / 4) * 4, limit)
