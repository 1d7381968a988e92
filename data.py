"""Tasks, TSV readers, tokenising, and batches of texts of like length.

TASKS is the one table of tasks, with every default that a task brings. Sources: Wang et al., GLUE (ICLR 2019).

    tokenizer = load_tokenizer(fetch.model_folder("minilm"), length=64)
    train = load_split("movies", "train", None, tokenizer)
    for parts in training_batches(train, size=32, steps=600, seed=0):
        for inputs, labels, share in parts: ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plumbing import fetch, parallel
from plumbing.checkpoints import encode_texts, open_tokenizer
from plumbing.files import require_regular_file, sha256


@dataclass(frozen=True)
class Task:
    """One row of the task table. Batch and epochs are the paper's for SMP; `movies` has a recipe of a few minutes."""

    folder: str  # below --data-dir, as GLUE names it
    text: tuple  # columns of the sentence (and of its pair), by header name; by number where there is no header
    label: str | int
    words: dict  # label as it stands in the file -> label word, in the order of the classes; one alone: regression
    metrics: tuple  # in plumbing.metrics, or scored by its Examples; the first decides which evaluation is best
    epochs: int

    # the recipe
    batch: int = 32
    length: int = 128  # longest input in tokens
    ramp: float = 0.6  # share of the steps in which the density falls to its target
    penalty: float = 400.0  # lambda, the final weight of the regularizer
    temperature: float | None = None  # p of SMP-S; None: by the density
    dropout: bool = True
    weight_lr: float = 3e-5  # peak learning rate of weights that train
    decay: float = 0.01  # of matrices that train
    evals: int = 20  # evaluations in a run
    best: Callable = max  # or min: which value of the first metric is best
    model: str = "bert-base-uncased"

    # the splits beside "train", and their files
    dev: tuple = ("dev",)
    test: tuple = ("test",)  # without labels
    file: str = "{}.tsv"  # what the file of a split is called
    test_text: tuple = ()  # columns of the text in the test files, where they have other names
    skip_broken: bool = False  # rows with the wrong number of columns
    fetch: Callable = fetch.fetch_glue  # (task, split): put the file of a split, or all, into the cache

    # what a task that is not classification or regression of [CLS] brings along
    every_token: bool = False  # the model reads every token
    load: Callable | None = None  # (folder, length, head) -> model, tokenizer; default: a Bert
    read: Callable | None = None  # (task, path, tokenizer) -> Examples; default: a TSV file
    say: Callable | None = None  # (texts, tokenizer, Examples -> what they keep, args) -> lines, for eval.py --text


SENTIMENT = {"0": "terrible", "1": "great"}
NO_YES = {"0": "no", "1": "yes"}
ENTAILMENT = {"not_entailment": "no", "entailment": "yes"}
NLI = {"contradiction": "no", "neutral": "maybe", "entailment": "yes"}
PAIR = ("sentence1", "sentence2")
TASKS = {
    "movies": Task(
        "movies", ("sentence",), "label", SENTIMENT, ("accuracy",), epochs=1, batch=16, length=64, ramp=0.9,
        penalty=800.0, temperature=4.0, dropout=False, weight_lr=1e-4, evals=4, model="minilm", test=(),
        fetch=fetch.fetch_movies,
    ),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), epochs=100),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", NO_YES, ("accuracy", "f1"), epochs=60),
    "cola": Task(
        "CoLA", (3,), 1, {"0": "incorrect", "1": "correct"}, ("mcc",), epochs=60, test_text=("sentence",),
    ),
    "stsb": Task("STS-B", PAIR, "score", {"score": "yes"}, ("pearson", "spearman"), epochs=60),
    "sst2": Task("SST-2", ("sentence",), "label", SENTIMENT, ("accuracy",), epochs=12, batch=64),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",), epochs=12, batch=64),
    "qqp": Task(
        "QQP", ("question1", "question2"), "is_duplicate", NO_YES, ("accuracy", "f1"), epochs=12, batch=64,
        skip_broken=True,
    ),
    "mnli": Task(
        "MNLI", PAIR, "gold_label", NLI, ("accuracy",), epochs=12, batch=64,
        dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched"),
    ),
    "wnli": Task("WNLI", PAIR, "label", NO_YES, ("accuracy",), epochs=60),
}  # fmt: skip


# --- examples ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Tokenised rows of a file: token ids and segment ids as lists, labels, the longest input allowed."""

    ids: list  # of lists, without padding
    types: list  # 0 for the first text, 1 for its pair
    labels: list
    limit: int
    eval_batch = 64  # rows at a time in evaluation: another number would round differently

    def __len__(self):
        return len(self.ids)

    def digest(self):
        """sha256 of all rows: what ties a checkpoint to its data."""
        return sha256(repr((self.ids, self.labels)).encode())

    def asked(self):
        """How many questions the rows ask: one each."""
        return len(self)

    def keep(self, logits, labels):
        """What evaluation keeps of a batch: logits [B, C], labels [B] -> [B, ...], of one shape in all batches."""
        return logits

    def score(self, logits, names, metrics):
        """What was kept, logits [N, C], names of metrics {name: (predicted, true) -> number} -> {name: number}."""
        predicted = decide(logits)
        true = np.array(self.labels)
        return {name: metrics[name](predicted, true) for name in names}


def decide(logits):
    """Logits [N, C] -> predicted classes [N], or for one logit (regression) the scores themselves."""
    return (logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0]).numpy()


def load_tokenizer(folder, length):
    """The tokenizer of a model folder, set to cut at `length` tokens, the longer of a pair first, and not to pad."""
    tokenizer = open_tokenizer(folder)
    try:
        tokenizer.enable_truncation(length, strategy="longest_first")
        tokenizer.no_padding()  # published files carry settings of their own
        tokenizer.encode("a \u2603", "b")  # fails where no token stands for unknown characters, or between texts
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{folder}: its tokenizer.json is not valid: {error}") from None
    if not tokenizer.encode("a").special_tokens_mask[0]:
        raise ValueError(f"{folder}: its tokenizer.json puts no [CLS] before a text, and the answer is read there")
    return tokenizer


def label_word_ids(task, tokenizer):
    """Token id of each class's label word, in class order. Raises ValueError for a word of more than one token.

    Words follow a space, as in running text: RoBERTa's vocabulary knows "Ġyes"; BERT's does not see the space.
    """
    ids = []
    for word in task.words.values():
        encoded = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(encoded.ids) != 1 or encoded.tokens[0].removeprefix("Ġ") != word:
            raise ValueError(f"label word {word!r} is {encoded.tokens} in tokenizer.json, not one token: change TASKS")
        ids += encoded.ids
    return ids


def read_rows(path, task, labelled=True):
    """Rows of a TSV file of the task -> (list of text tuples, list of labels: class numbers, or scores).

    Without labels (GLUE's test files) every label is 0. No quoting: a quote is an ordinary character. Lines end at \\n
    alone, as a text may hold other separators. Raises ValueError with file and line for a row of the wrong width, an
    unknown label, or a file without rows.
    """
    try:
        lines = require_regular_file(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    if rows[-1] == [""]:  # behind the last newline
        rows.pop()

    columns = [*task.text, task.label] if labelled else [*(task.test_text or task.text)]
    start = 0
    width = 4  # CoLA: four columns, no header
    if isinstance(columns[-1], str):
        header = rows[0] if rows else []
        for name in columns:
            if name not in header:
                raise ValueError(f"{path}:1: no column {name!r} in the header {header} (tabs separate columns)")
        columns = [header.index(name) for name in columns]  # by number from here on
        start = 1
        width = len(header)

    texts, labels = [], []
    for number, row in enumerate(rows[start:], start + 1):
        if len(row) != width:
            if task.skip_broken and labelled:  # without labels, an answer must keep its number
                continue
            raise ValueError(f"{path}:{number}: {len(row)} columns instead of {width}")
        cells = [row[column] for column in columns]  # the texts, then the label
        labels.append(read_label(task, cells.pop(), f"{path}:{number}") if labelled else 0)
        texts.append(tuple(cells))
    if not texts:
        raise ValueError(f"{path} holds no examples")
    return texts, labels


def read_label(task, cell, place):
    """A cell -> class number, or for regression a score from 0 to 5. Raises ValueError that names the place."""
    if len(task.words) == 1:
        try:
            score = float(cell)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 5:  # nan is not either
            raise ValueError(f"{place}: {cell!r} is not a score from 0 to 5")
        return score
    if cell not in task.words:
        raise ValueError(f"{place}: unknown label {cell!r}; the task has {', '.join(task.words)}")
    return list(task.words).index(cell)


def encode(texts, labels, tokenizer):
    """Tokenise texts (tuples of one sentence or a pair) once -> Examples."""
    encoded = encode_texts(tokenizer, [text if len(text) == 2 else text[0] for text in texts])  # a tuple is a pair
    limit = tokenizer.truncation["max_length"]
    return Examples([e.ids for e in encoded], [e.type_ids for e in encoded], labels, limit)


def split_path(name, split, data_dir):
    """Where a split of a task stands, or will. Raises ValueError if data_dir is given and has no such file."""
    task = TASKS[name]
    path = Path(data_dir or fetch.cache() / "glue") / task.folder / task.file.format(split)
    if data_dir and not path.exists():
        raise ValueError(f"--data-dir: there is no {path.absolute()}")
    return path


def load_split(name, split, data_dir, tokenizer):
    """Examples of a split ("train", or one of the task's dev and test) from data_dir/FOLDER/FILE.

    data_dir None: the cache, filled on first use.
    """
    task = TASKS[name]
    path = split_path(name, split, data_dir)
    if not path.exists():
        task.fetch(task, split)
        if not path.exists():
            raise ValueError(f"there is no {path}, and the download did not hold it")
    if task.read:
        return task.read(task, path, tokenizer)
    return encode(*read_rows(path, task, labelled=split not in task.test), tokenizer)


# --- batches -------------------------------------------------------------------------------------------------


def collate(examples, rows, device="cpu", width=None):
    """Rows of Examples -> (ids, segments and mask as one [3, B, S]; labels [B]); S: `width`, or what padded() gives."""
    lengths = np.array([len(examples.ids[r]) for r in rows])
    inputs = np.zeros((3, len(rows), width or padded(lengths.max(), examples.limit)), dtype=np.int64)
    for i, r in enumerate(rows):  # what fills up is masked, so any id will do
        inputs[0, i, : lengths[i]] = examples.ids[r]
        inputs[1, i, : lengths[i]] = examples.types[r]
        inputs[2, i, : lengths[i]] = 1
    labels = np.array([examples.labels[r] for r in rows])
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)  # scores, or class numbers
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in (inputs, labels))


def padded(length, limit):
    """The width of a batch whose longest row has this length: the next multiple of 4.

    So shapes are few: a GPU records each once, and on a CPU new shapes break the C library's heap into pieces.
    """
    return min(-(-length // 4) * 4, limit)


def batch_rows(examples, size, rng=None):
    """Row numbers of one pass in batches of like length: [B] arrays, the last may be smaller.

    rng shuffles: rows are drawn into pools of 50 batches, sorted by length within each, and the batches shuffled.
    Without it: one pool, sorted by length, for evaluation.
    """
    n = len(examples)
    order = rng.permutation(n) if rng else np.arange(n)
    pool = 50 * size if rng else n  # rows that are sorted together
    lengths = np.array([len(ids) for ids in examples.ids])
    pools = [order[i : i + pool] for i in range(0, n, pool)]
    order = np.concatenate([rows[np.argsort(lengths[rows], kind="stable")] for rows in pools])
    batches = [order[i : i + size] for i in range(0, n, size)]
    if rng:  # or short texts would come first in every pool
        rng.shuffle(batches)
    return batches


class Part(NamedTuple):
    """What is computed at once: a batch, or a part of one."""

    inputs: torch.Tensor  # [3, B, S], see collate
    labels: torch.Tensor  # [B], or [B, ...]
    share: float = 1.0  # of the examples of the batch


def split_batch(rows, parts):
    """The rows of this process -> `parts` of about equal size, each with its share of the batch.

    A part without rows gets one with share 0, because a process without rows takes part in the step as well.
    """
    split = np.array_split(parallel.shard(rows), parts)  # some may be empty
    return [(part, len(part) / len(rows)) if len(part) else (rows[:1], 0.0) for part in split]


def training_batches(examples, size, steps, seed, device="cpu", parts=1, first=0):
    """Batches `first` to `steps`, over as many epochs as that takes; an epoch's order is fixed by (seed, epoch).

    Each is a list of Parts of one width S, see split_batch.
    """
    epochs = (batch_rows(examples, size, np.random.default_rng([seed, epoch])) for epoch in count())
    for batch in islice(chain.from_iterable(epochs), first, steps):
        width = padded(max(len(examples.ids[r]) for r in batch), examples.limit)
        most = min(parts, len(batch))  # the last batch may be small
        yield [Part(*collate(examples, rows, device, width), share) for rows, share in split_batch(batch, most)]
