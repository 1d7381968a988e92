"""Tiny models, tokenizers and data, made here.

No test needs a network, a GPU or a file from elsewhere.
"""

import hashlib
import http.server
import json
import os
import random
import re
import signal
import threading
from functools import cache, partial

import pytest
import torch
from house import ROOT
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import data
import mask
import model
import train
from plumbing import cli
from plumbing.checkpoints import read_config, read_model

# Without one of these folders, the tests of a room are left out: there is nothing to test.
NEEDED = {
    "extras": ["extras"],
    "tools": ["tools", "extras"],
    "course": ["exercises", "extras", "tools"],
}
collect_ignore = []
for room, folders in NEEDED.items():
    if not all((ROOT / folder).is_dir() for folder in folders):
        collect_ignore.append(room)

# What a person has set decides no test: a proxy, a language of which there is no locale here, or a
# repository and settings of git. In a hook of git, GIT_DIR names that repository, and a test that
# commits would commit into it.
for name in list(os.environ):
    if name.startswith("GIT_") or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "LC_ALL": "C"}
os.environ.pop("SMP_TRACEBACK", None)  # it would turn one-line errors into tracebacks
os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library reads it when it is imported, later
code_version = cache(cli.code_version)  # hundreds of runs need not ask git for the same answer
torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
WORDS = "no yes terrible great incorrect correct the a film is was good bad and very it".split()
WORDS += "fun dull un ##happ ##y maybe".split()
CONFIG = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 32,
    "type_vocab_size": 2,
}  # fmt: skip

GPT2_CONFIG = {
    "model_type": "gpt2", "vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2,
    "n_head": 4, "n_inner": 24, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip

WIDE = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # wide enough for a mask of random weights to learn


def bert_tensors(config, head=True, prefix="bert.", seed=0):
    """Random weights under the names of a BertForMaskedLM checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (v, h),
        "embeddings.token_type_embeddings.weight": (2, h),
    }
    shapes |= {"embeddings.position_embeddings.weight": (config["max_position_embeddings"], h)}
    norms = ["embeddings.LayerNorm"]
    for n in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{n}."
        linears = {f"attention.self.{x}": (h, h) for x in ("query", "key", "value")}
        linears |= {
            "attention.output.dense": (h, h),
            "intermediate.dense": (i, h),
            "output.dense": (h, i),
        }
        for name, shape in linears.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    norms = [prefix + name for name in norms]
    if head:
        shapes |= {
            "cls.predictions.transform.dense.weight": (h, h),
            "cls.predictions.transform.dense.bias": (h,),
        }
        shapes |= {"cls.predictions.bias": (v,)}
        norms.append("cls.predictions.transform.LayerNorm")
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    for name in norms:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(h, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(h, generator=generator)
    return tensors


def gpt2_tensors(config=GPT2_CONFIG, seed=0):
    """Random weights under the names of a GPT2LMHeadModel checkpoint, its matrices [in, out]."""
    generator = torch.Generator().manual_seed(seed)
    h, inner = config["n_embd"], config["n_inner"]
    shapes = {"wte.weight": (config["vocab_size"], h), "wpe.weight": (config["n_positions"], h)}
    norms = ["ln_f"]
    for n in range(config["n_layer"]):
        linears = {
            "attn.c_attn": (h, 3 * h),
            "attn.c_proj": (h, h),
            "mlp.c_fc": (h, inner),
            "mlp.c_proj": (inner, h),
        }
        for name, shape in linears.items():
            shapes |= {f"h.{n}.{name}.weight": shape, f"h.{n}.{name}.bias": shape[1:]}
        norms += [f"h.{n}.ln_1", f"h.{n}.ln_2"]
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    for name in norms:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(h, generator=generator)
        tensors[f"{name}.bias"] = 0.1 * torch.randn(h, generator=generator)
    return tensors


def load_model(folder, words, head="words", **more):
    """A model folder -> Bert."""
    return model.load_model(*read_model(folder), words, head, **more)


def rows_of(lists):
    """Rows of these lists."""
    rows = data.Rows()
    for row in lists:
        rows.append(row)
    return rows


def load_config(folder):
    stored = json.loads((folder / "config.json").read_text())
    return read_config(stored, model.Config, model.FAMILIES, model.ONLY)


def write_tokenizer(path):
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=20)  # published files carry settings that the loader must undo
    tokenizer.enable_truncation(8)
    tokenizer.save(str(path))


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path_factory):
    """The current folder and the cache are new: runs of the person who tests are left alone."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SMP_CACHE", str(folder.with_name(f"{folder.name}-cache")))


@pytest.fixture(autouse=True)
def machine(monkeypatch, request):
    """The same device and dtype by default on every machine, also in processes of their own.

    {"cuda": False, "mps": False, "bf16": False}: a test may say that the machine has one of them.
    """
    has = dict.fromkeys(("cuda", "mps", "bf16"), False)
    for name in ("FORCE_COLOR", "PY_COLORS", "PYTHON_COLORS", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)  # what is printed is read here
    if request.module.__name__ == "test_cuda":
        return has

    def accelerator(*_, **__):
        found = [torch.device(name) for name in ("cuda", "mps") if has[name]]
        return found[0] if found else None

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has["cuda"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has["bf16"]})
    monkeypatch.setattr("plumbing.run.code_version", code_version)
    return has


@pytest.fixture
def tables():
    """METHODS and TASKS, for rows of a test's own. Afterwards they are as before, as SCHEDULES."""
    before = [(table, dict(table)) for table in (mask.METHODS, data.TASKS, mask.SCHEDULES)]
    yield mask.METHODS, data.TASKS
    for table, rows in before:
        table.clear()
        table.update(rows)


@pytest.fixture
def as_process(monkeypatch):
    """as_process(rank, processes): from now on this is one process of several."""

    def become(rank, processes):
        told = {"RANK": rank, "WORLD_SIZE": processes, "TORCHELASTIC_RUN_ID": "test"}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    return become


def write_model(folder, tensors=None, **changes):
    """Fill a new model folder: a tiny BERT with random weights, or with these."""
    folder.mkdir()
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(bert_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture
def make_model(tmp_path):
    """make_model(name, tensors=None, **config) -> a model folder."""
    return lambda name="model", tensors=None, **changes: write_model(
        tmp_path / name, tensors, **changes
    )


@pytest.fixture
def make_gpt2(tmp_path):
    """make_gpt2(name, tensors=None, **config) -> a model folder.

    Its tokenizer knows all bytes and a few pairs.
    """

    def make(name="gpt2", tensors=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = GPT2_CONFIG | changes
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            gpt2_tensors(config) if tensors is None else tensors, folder / "model.safetensors"
        )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
        trainer = trainers.BpeTrainer(vocab_size=290, show_progress=False, **special)
        tokenizer.train_from_iterator([" the film is good\n", " the film was dull\n"] * 9, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture
def texts(tmp_path):
    """A folder with ptb/: sentences in which the second word decides the last."""
    folder = tmp_path / "texts"
    (folder / "ptb").mkdir(parents=True)
    rng = random.Random(0)
    for split, size in (("train", 300), ("valid", 60), ("test", 60)):
        kinds = [rng.choice((("film", "good"), ("show", "dull"))) for _ in range(size)]
        lines = [f" the {what} {rng.choice(('is', 'was'))} {how} \n" for what, how in kinds]
        (folder / "ptb" / f"ptb.{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def glue(tmp_path):
    """A folder in GLUE's layout: `movies` (separable: good or fun against bad or dull) and RTE."""
    return write_glue(tmp_path / "glue")


def write_glue(folder):
    rng = random.Random(0)
    for task in ("movies", "RTE"):
        (folder / task).mkdir(parents=True)
    for split, size in (("train", 96), ("dev", 40)):
        rows = []
        for n in range(size):
            filler = [
                rng.choice("the a film is was and very it".split())
                for _ in range(rng.randint(1, 6))
            ]
            rows.append(
                (" ".join([*filler, rng.choice([["bad", "dull"], ["good", "fun"]][n % 2])]), n % 2)
            )
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (folder / "movies" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        names = ("not_entailment", "entailment")
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [
            f'{n}\t{text}\tit "is good\t{names[label]}' for n, (text, label) in enumerate(rows)
        ]
        (folder / "RTE" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(make_model, glue, tmp_path):
    """run(*flags) -> (run folder, its result) of a short training on the tiny `movies`.

    run.argv(*flags) -> the words of its command, run.model: the folder of its model.
    """
    model = make_model()

    def argv(*flags, out="run", steps=12):
        words = ["--model", model, "--data-dir", glue, "--out", tmp_path / out, "--batch", 8]
        words += ["--steps", steps] if steps else []
        words += ["--length", 16, "--device", "cpu", *flags]
        return [str(word) for word in words]

    def go(*flags, out="run", steps=12):
        train.main(argv(*flags, out=out, steps=steps))
        return tmp_path / out, json.loads((tmp_path / out / "result.json").read_text())

    go.model, go.argv = model, argv
    return go


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with model/, glue/ and run/, and the files in it as {path: bytes}."""
    home = tmp_path_factory.mktemp("once")
    flags = ["--model", write_model(home / "model"), "--data-dir", write_glue(home / "glue")]
    flags += ["--out", home / "run"]
    flags += ["--steps", 20, "--evals", 2, "--batch", 8, "--length", 16, "--device", "cpu"]
    flags += ["--dtype", "float32"]
    train.main([str(flag) for flag in flags])
    return home, {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.fixture
def finished(trained_once):
    """The folder of one finished run, beside model/ and glue/.

    All tests share it. What a test changes is undone.
    """
    home, files = trained_once
    yield home / "run"
    put_back(home, files)


def put_back(home, files):
    """Make a folder hold {path: bytes} and no other files, as before a test."""
    for path in home.rglob("*"):
        if path.is_file() and path not in files:
            path.unlink()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


# What a bar prints into a log, as soon as that takes half a minute.
PROGRESS = re.compile(r": \S+ of \S+ after [\d:]+, about ")


@pytest.fixture
def fails(capsys):
    """fails(main, argv) -> stderr of a command, which must be one line of error, with status 2."""

    def run(main, argv):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in argv])
        assert ended.value.code == 2
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.strip() and not PROGRESS.search(line)
        ]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return run


def left_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def survives(capsys, tmp_path, trained_once):
    """survives(command): it works or ends with status 2 and one line, and does not hang.

    It writes nothing.
    """
    home, _ = trained_once

    def there():
        return sorted([*tmp_path.rglob("*"), *home.rglob("*")])

    def too_slow(*_):
        raise KeyboardInterrupt("it hangs")  # which nothing turns into an error of a file

    def run(command):
        files = there()
        capsys.readouterr()
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(120)  # a second is enough, even on a slow machine
        try:
            command()
            said = None
        except SystemExit as ended:
            assert ended.code == 2
            lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
            lines = [
                line
                for line in lines
                if line.strip() and not PROGRESS.search(line)
            ]
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
            said = lines[0]
        finally:
            signal.alarm(0)
        assert there() == files
        return said

    return run


COMMIT = "c1" * 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves {path: content}; `cut` sends half of what it announces.

    What is at /OWNER/NAME/resolve/COMMIT/ is a repository of a hub, with COMMIT on its main branch.
    """

    def __init__(self, files, cut, *args):
        self.files, self.cut = files, cut
        super().__init__(*args)

    def of_hub(self):
        """What the hub's own API says of a repository, or None."""
        asked = re.match(r"/api/models/(.*)/(revision|tree)/", self.path)
        if not asked:
            return None
        before = f"/{asked[1]}/resolve/{COMMIT}/"
        names = [path.removeprefix(before) for path in self.files if path.startswith(before)]
        info = {"id": asked[1], "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        tree = []
        for name in names:
            size = len(self.files[before + name])
            tree.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
        said = info if asked[2] == "revision" else tree
        return json.dumps(said).encode() if names else None

    def do_HEAD(self):  # noqa: N802
        content = self.files.get(self.path, self.of_hub())
        repository = self.path.partition("/resolve/")[0]
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", len(content or b""))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        if content is None:
            known = any(path.startswith(f"{repository}/") for path in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.end_headers()
        return content or b""

    def do_GET(self):  # noqa: N802
        content = self.do_HEAD()
        self.wfile.write(content[: len(content) // 2] if self.path in self.cut else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """Where downloads go: a new folder."""
    monkeypatch.setenv("SMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch, tmp_path, cache_folder):
    """(files, cut): fill them with what is served; the caches are new folders."""
    from huggingface_hub import constants

    files, cut = {}, set()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files, cut))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    settings = {
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }
    for name, value in settings.items():  # the library has read the environment already
        monkeypatch.setattr(constants, name, value)
    places = {"HF_ENDPOINT": "", "GLUE_URL": "/glue/", "SQUAD_URL": "/squad", "LM_URL": "/lm/"}
    for name, place in places.items():
        monkeypatch.setenv(name, url + place)
    yield files, cut
    httpd.shutdown()
    httpd.server_close()
