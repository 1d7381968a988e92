"""Where GLUE's tasks come from: its server's archives, and for MRPC the files that it is made of.

Without this file the tasks are the same, and their files are put in place by hand. MRPC is by Dolan
and Brockett, IWP 2005; GLUE by Wang et al., ICLR 2019.

    python train.py --task rte
"""

import io
import os
import zipfile
import zlib
from dataclasses import replace
from urllib.parse import urljoin

from data import TASKS
from plumbing.fetch import cache, download, fill_folder, join
from plumbing.files import check_digest, split_lines

URL = "https://dl.fbaipublicfiles.com/glue/data"
LARGEST = 1 << 30  # most bytes of a split, unzipped

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
    fill_checked(path.parent, {path.name: download(url, remedy)}, {path.name: md5})


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
                if archive.getinfo(member).file_size > LARGEST:  # never more than it says is read
                    raise zipfile.BadZipFile(f"{name} would take more than a gibibyte")
                files[name] = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{url} is not the archive of {folder.name} ({error}); not kept") from None
    fill_checked(folder, files, sums)


def assemble_mrpc(base, remedy):
    """Build MRPC in GLUE's layout from two downloads -> {file name: bytes}.

    mrpc_dev_ids.tsv lists the pairs of ids that make the dev set, out of the training file.
    """
    rows = []
    for place in ("mrpc_dev_ids.tsv", "../../senteval/senteval_data/msr_paraphrase_train.txt"):
        text = download(urljoin(f"{base}/", place), remedy).decode("utf-8")
        rows.append([line.strip().split("\t") for line in split_lines(text)])
    dev_ids, pairs = rows

    train, dev = [pairs[0]], [pairs[0]]  # each with the header
    for row in pairs[1:]:
        part = dev if row[1:3] in dev_ids else train
        part.append(row)
    parts = {"train.tsv": train, "dev.tsv": dev}
    return {name: join("\t".join(row) for row in part) for name, part in parts.items()}


for name, task in TASKS.items():
    if task.folder in GLUE:
        TASKS[name] = replace(task, fetch=fetch_glue)
