"""Finished runs: a run folder or a mask file, its description, its backbone and its masks, brought together.

What it is: reading what train.py wrote, and refusing what does not fit together. What it is not: it evaluates nothing,
and writes nothing but a backbone that the cache still lacks. Sources: none.

    result, folder, model, tokenizer, masks = load_run(Path("runs/movies-minilm-smp-s-0.5-seed0"))
"""

import hashlib
import json
from dataclasses import asdict

import data
import fetch
import maskfile
from data import TASKS, load_tokenizer
from mask import METHODS
from pretrained import load_config, load_model, read_weights


def load_backbone(folder, task, length, head, fresh=True, read=read_weights):
    """-> (Bert with the task's label words and this head, fresh or the folder's, tokenizer) of a model folder.

    Raises ValueError when they do not fit each other, the task or the length.
    """
    config = load_config(folder)
    if not 4 <= length <= config.longest_input:
        raise ValueError(f"--length {length}: the model in {folder} takes 4 to {config.longest_input} tokens")
    tokenizer = load_tokenizer(folder, length)
    model = load_model(folder, data.label_word_ids(task, tokenizer), head, fresh, read)
    model.every_token = task is TASKS["squad"]
    probes = [tokenizer.encode("a"), tokenizer.encode("a", "b")]  # with what the tokenizer puts around texts
    ids = max(*tokenizer.get_vocab().values(), *(i for e in probes for i in e.ids))
    if ids >= config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has more words than the vocab_size of config.json")
    if max(i for e in probes for i in e.type_ids) >= config.type_vocab_size:
        raise ValueError(f"{folder}: tokenizer.json tells more segments apart than type_vocab_size in config.json")
    return model, tokenizer


def read_result(run):
    """What describes a finished run's folder (result.json) or a mask file, as a dict.

    Raises ValueError if it is none of this code's.
    """
    if run.is_file():
        return checked(maskfile.read(run)[2], run)
    path = run / "result.json"
    if not path.exists():
        state = "an interrupted or still running" if (run / "log.jsonl").exists() else "no finished"
        saved = (run / "checkpoint.safetensors").exists()
        remedy = f"python train.py --resume {run} goes on" if saved else "run its train.py command to the end"
        raise ValueError(f"{run} holds {state} run: there is no {path}; {remedy}")
    try:
        result = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return checked(result, path)


NEEDED = {
    "task": str, "method": str, "model": str, "words": dict, "length": int, "final": dict, "fingerprint": str,
    "tokenizer": str, "sha256": dict, "config": dict, "density": float, "data_dir": str | None,
}  # fmt: skip
ONE_OF = {"head": ("words", "classifier"), "device": ("cuda", "mps", "cpu"), "dtype": ("float32", "bfloat16")}


def checked(result, path):
    """The description of a run, if it is one and can be evaluated. Raises ValueError if not."""
    fine = isinstance(result, dict) and NEEDED.keys() <= result.keys()
    fine = fine and all(isinstance(result[key], kind) for key, kind in NEEDED.items())
    fine = fine and all(result.get(key) in known for key, known in ONE_OF.items())
    fine = fine and all(isinstance(value, float) for value in result["final"].values())
    if fine and result["method"] not in METHODS:
        raise ValueError(f"{path}: METHODS has no method {result['method']}")
    if not fine or not set(result["sha256"]) <= {"model.safetensors"}:
        raise ValueError(f"{path} is not the result of a run of this train.py")
    if result["task"] not in TASKS or result["words"] != TASKS[result["task"]].words:
        raise ValueError(f"{path}: TASKS has no task {result['task']} with the label words {result['words']}")
    return result


def plain(config):
    """A model.Config as JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def tokenizer_digest(folder):
    """sha256 of a model folder's tokenizer.json: what ties a mask to its tokenizer."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def load_run(run, model_name=None, read=read_weights):
    """A finished run's folder, or a mask file -> (result, model folder, Bert, tokenizer, masks {name: bool} or {}).

    read: see pretrained.load_model. Raises ValueError that says what is missing or does not fit.
    """
    alone = run.is_file()
    mask_file = run if alone else run / "mask.safetensors"
    result = read_result(run)
    if alone and result["sha256"]:
        raise ValueError(f"{run}: the weights of this run were trained as well; name its folder, which holds them")
    task, length, head = TASKS[result["task"]], int(result["length"]), result["head"]
    for name, digest in result["sha256"].items():
        fetch.check_digest(run / name, "sha256", digest, run / name)
    own = "model.safetensors" in result["sha256"]  # its weights were trained
    if own and model_name:
        raise ValueError(f"--model: {run} holds its own weights, which were trained; leave the flag away")
    folder = run if own else fetch.model_folder(model_name or result["model"])
    model, tokenizer = load_backbone(folder, task, length, head, not own, read)
    if not own and model.fingerprint() != result["fingerprint"]:
        raise ValueError(f"--model: the weights in {folder} are not those that {run} was trained on")
    if result["config"] != plain(model.config):
        raise ValueError(f"--model: {folder / 'config.json'} is not the one that {run} was trained with")
    if tokenizer_digest(folder) != result["tokenizer"]:
        raise ValueError(f"--model: the tokenizer in {folder} is not the one that {run} was trained with")
    if "kept" not in result:
        return result, folder, model, tokenizer, {}
    expected = {n: tuple(w.shape) for weights in model.prunable().values() for n, w in weights.items()}
    masks, head_weights, described = maskfile.load_masks(mask_file, expected)
    if described != result:
        raise ValueError(f"{run}: mask.safetensors and result.json are of different runs")
    expected_head = {n: p.shape for n, p in model.named_parameters() if n.startswith("classifier.") and not own}
    if expected_head != {name: tensor.shape for name, tensor in head_weights.items()}:
        raise ValueError(f"{mask_file} was made for a head of another shape")
    model.load_state_dict(head_weights, strict=False)
    return result, folder, model, tokenizer, masks
