"""The rest of GLUE (Wang et al., ICLR 2019): tasks with other metrics, downloads, the test server.

Without this file, data.py's tasks are the same, and their files are put in place by hand. Archives
come from GLUE's server. MRPC (Dolan and Brockett, IWP 2005) is made of two files.

    python train.py --task rte
    python eval.py RUN --predict RTE/test.tsv
"""

import io
import os
import zipfile
import zlib
from dataclasses import replace
from urllib.parse import urljoin

import numpy as np

from data import LARGE, METRICS, NO_YES, PAIR, TASKS, Task, encode, read_cells, read_columns
from plumbing.fetch import cache, download, fill_folder, join
from plumbing.files import check_digest, split_lines, write_whole

# --- metrics: (predicted classes or scores [N], true ones [N]) -> a number ------------------------


def f1(predicted, true):
    """F1 of class 1, of more than two classes their mean (macro). 0 without a true positive."""
    classes = np.union1d(predicted, true)
    if classes.max() <= 1:  # no more than two
        classes = [1]
    scores = []
    for c in classes:
        positive = predicted == c
        actual = true == c
        hits = (positive & actual).sum()  # true positives
        # 2 / (1 / precision + 1 / recall): precision is hits / positive, recall hits / actual.
        total = positive.sum() + actual.sum()
        scores.append(2 * hits / max(total, 1))
    return float(np.mean(scores))


def correlation(predicted, true):
    """Pearson's r of [N] and [N], or of rows [C, N] together. It is 0 when one side is constant."""
    p = predicted.astype(np.float64)
    t = true.astype(np.float64)
    # Exact: deviations from a rounded mean would not be 0.
    if not np.ptp(p, -1).any() or not np.ptp(t, -1).any():
        return 0.0
    # From here on, deviations from the mean.
    p -= p.mean(-1, keepdims=True)
    t -= t.mean(-1, keepdims=True)
    covariance = (p * t).sum()  # N times it, which cancels out
    variances = (p * p).sum() * (t * t).sum()
    return float(covariance / np.sqrt(variances))


def mcc(predicted, true):
    """Matthews' coefficient, for three or more classes Gorodkin's R_K (2004)."""
    # Both as one-hot rows [C, N]: for two classes this is Pearson's r of the class numbers.
    classes = np.union1d(predicted, true)[:, None]
    return correlation(predicted == classes, true == classes)


def ranks(values):
    """Ranks from 1. Equal values share their mean rank."""
    # [3, 1, 3] -> distinct values 1 and 3, index [1, 0, 1], counts [1, 2], ranks [2.5, 1, 2.5]
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = counts.cumsum() - (counts - 1) / 2  # one for each distinct value
    return mean_ranks[index]


def spearman(predicted, true):
    return correlation(ranks(predicted), ranks(true))


METRICS |= {"f1": f1, "mcc": mcc, "pearson": correlation, "spearman": spearman}

# --- tasks ----------------------------------------------------------------------------------------

MRPC_PAIR = ("#1 String", "#2 String")
QQP_PAIR = ("question1", "question2")
ACCEPTABLE = {"0": "incorrect", "1": "correct"}
ACCURACY_AND_F1 = ("accuracy", "f1")

TASKS |= {
    "mrpc": Task("MRPC", MRPC_PAIR, "Quality", NO_YES, ACCURACY_AND_F1, {"epochs": 60}),
    "cola": Task("CoLA", (3,), 1, ACCEPTABLE, ("mcc",), {"epochs": 60}),  # it has no header
    "stsb": Task(
        "STS-B", PAIR, "score", {"score": "yes"}, ("pearson", "spearman"), {"epochs": 60},
        scores=(0, 5),
    ),
    "qqp": Task(
        "QQP", QQP_PAIR, "is_duplicate", NO_YES, ACCURACY_AND_F1, LARGE, skip_broken=True,
    ),
}  # fmt: skip

# --- downloads ------------------------------------------------------------------------------------

URL = "https://dl.fbaipublicfiles.com/glue/data"
LARGEST = 1 << 30  # most bytes of a split, unzipped
# What zipfile raises for an archive that is broken, or lacks a file.
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, OSError)
# MRPC's two files, below or beside URL.
MRPC_DEV_IDS = "mrpc_dev_ids.tsv"
MRPC_TEXT = "../../senteval/senteval_data/msr_paraphrase_train.txt"

# GLUE's archives, and the MD5 of each file that must be in them.
GLUE = {
    "RTE": ("RTE.zip", {
        "train.tsv": "d2844f558d111a16503144bb37a8165f",
        "dev.tsv": "973cb4178d4534cf745a01c309d4a66c"}),
    "MRPC": ("", {
        "train.tsv": "dc2dac669a113866a6480a0b10cd50bf",
        "dev.tsv": "185958e46ba556b38c6a7cc63f3a2135"}),
    "CoLA": ("CoLA.zip", {
        "train.tsv": "c79d4693b8681800338aa044bf9e797b",
        "dev.tsv": "c5475ccefc9e7ca0917294b8bbda783c"}),
    "STS-B": ("STS-B.zip", {
        "train.tsv": "4f7a86dde15fe4832c18e5b970998672",
        "dev.tsv": "5f4d6b0d2a5f268b1b56db773ab2f1fe"}),
    "SST-2": ("SST-2.zip", {
        "train.tsv": "da409a0a939379ed32a470bc0f7fe99a",
        "dev.tsv": "268856b487b2a31a28c0a93daaff7288"}),
    "QNLI": ("QNLIv2.zip", {
        "train.tsv": "5e6063f407b08d1f7c7074d049ace94a",
        "dev.tsv": "1e81e211959605f144ba6c0ad7dc948b"}),
    "QQP": ("QQP-clean.zip", {
        "train.tsv": "e003db73d277d38bbd83a2ef15beb442",
        "dev.tsv": "cff6a448d1580132367c22fc449ec214"}),
    "MNLI": ("MNLI.zip", {
        "train.tsv": "220192295e23b6705f3545168272c740",
        "dev_matched.tsv": "c3fa2817007f4cdf1a03663611a8ad23",
        "dev_mismatched.tsv": "b219e6fe74e4aa779e2f417ffe713053"}),
    "WNLI": ("WNLI.zip", {
        "train.tsv": "5cdc5a87b7be0c87a6363fa6a5481fc1",
        "dev.tsv": "a79a6dd5d71287bcad6824c892e517ee"}),
}  # fmt: skip


def fetch_glue(task, split=None):
    """Task.fetch: download all splits of a GLUE task. MD5 sums check train and dev.

    Raises ValueError if the server sends something else, and OSError if it cannot be reached.
    """
    archive, sums = GLUE[task.folder]
    folder = cache() / "glue" / task.folder
    remedy = (
        f"put GLUE's {', '.join(sums)} into {folder} by hand, or name your copy of GLUE "
        "with --data-dir; the default task, movies, comes from the package index"
    )
    base = (os.environ.get("GLUE_URL") or URL).rstrip("/")
    if archive:
        fetch_zip(f"{base}/{archive}", folder, sums, remedy)
    else:
        fill_checked(folder, assemble_mrpc(base, remedy), sums)


def fill_checked(folder, files, sums):
    """fill_folder, after a check of the MD5 sums {name: MD5, or None if it is unknown}."""
    for name, md5 in sums.items():
        if md5:
            check_digest(files[name], "md5", md5, f"{folder.name}/{name}")
    fill_folder(folder, files)


def fetch_file(url, path, md5, remedy):
    """Download a file with a known MD5."""
    content = download(url, remedy)
    fill_checked(path.parent, {path.name: content}, {path.name: md5})


def fetch_zip(url, folder, sums, remedy):
    """Download a zip and take files in its FOLDER/; nothing else in it is touched.

    sums: the files, see fill_checked.
    """
    content = download(url, remedy)
    files = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in sums:
                member = f"{folder.name}/{name}"
                size = archive.getinfo(member).file_size  # no more than that will be read
                if size > LARGEST:
                    raise zipfile.BadZipFile(f"{name} would take more than a gibibyte")
                files[name] = archive.read(member)
    except BROKEN as error:
        raise ValueError(f"{url} is not the archive of {folder.name} ({error}); not kept") from None
    fill_checked(folder, files, sums)


def assemble_mrpc(base, remedy):
    """Build MRPC in GLUE's layout from two downloads -> {file name: bytes}.

    mrpc_dev_ids.tsv lists the pairs of ids that make the dev set, out of the training file.
    """
    root = f"{base}/"
    dev_ids = download_lines(urljoin(root, MRPC_DEV_IDS), remedy)  # such as "7\t8"
    lines = download_lines(urljoin(root, MRPC_TEXT), remedy)
    train, dev = lines[:1], lines[:1]  # each with the header
    for line in lines[1:]:
        ids = "\t".join(line.split("\t")[1:3])  # "label\t7\t8\ttext\ttext" -> "7\t8"
        part = dev if ids in dev_ids else train
        part.append(line)
    return {"train.tsv": join(train), "dev.tsv": join(dev)}


def download_lines(url, remedy):
    """Download a text -> its lines, without white space around them."""
    text = download(url, remedy).decode("utf-8")
    return [line.strip() for line in split_lines(text)]


# --- the test server ------------------------------------------------------------------------------

INDEX = ("index", "id")  # what a test file's own column of numbers is called
TEST_TEXT = {"CoLA": ("sentence",)}  # its test file has a header, unlike the others
# MNLI's test files, and GLUE's diagnostic set (AX), which a run of MNLI answers.
MNLI_FILES = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}
MNLI_FILES |= dict.fromkeys(("diagnostic", "AX"), "AX")  # it is published under both names


def predict(path, run, loaded, logits_of):
    """Task.predict: write answers to a test file as GLUE's server takes them, beside the run.

    Each row keeps the index that it has in the file. Without such a column, rows count from 0.
    """
    task = loaded.task
    texts, index = read_test_file(path, task)
    no_labels = [0] * len(texts)
    logits = logits_of(encode(texts, no_labels, loaded.tokenizer))  # [N, C]
    if len(task.words) > 1:
        labels = list(task.words)  # in class order
        answers = [labels[number] for number in logits.argmax(1).tolist()]
    else:
        scores = logits[:, 0].clip(*task.scores)
        answers = [f"{score:.3f}" for score in scores.tolist()]

    lines = ["index\tprediction"]
    for number, answer in zip(index, answers, strict=True):
        lines.append(f"{number}\t{answer}")
    name = task.folder
    if name == "MNLI":
        name = MNLI_FILES.get(path.stem, name)
    write_beside(run, f"{name}.tsv", join(lines))


def read_test_file(path, task):
    """-> the N texts of a test file as tuples, and the index of each row, see predict."""
    text = TEST_TEXT.get(task.folder, task.text)
    header = next(read_cells(path), [])
    own = [name for name in INDEX if name in header][:1]  # the column with the index, if any
    texts, index = [], []
    for number, (_, cells) in enumerate(read_columns(path, [*text, *own])):
        texts.append(tuple(cells[: len(text)]))
        index.append(cells[-1] if own else number)
    return texts, index


def write_beside(run, name, content):
    """Write a file into the folder of a run, or beside its mask file, and print where it is."""
    folder = run if run.is_dir() else run.parent
    path = folder / name
    write_whole(path, content)
    print(path)


for name, task in TASKS.items():
    if task.folder in GLUE:
        TASKS[name] = replace(task, fetch=fetch_glue, predict=predict)
