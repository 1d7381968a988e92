"""Write a finished run as an ordinary model folder that other libraries load.

What it is: the backbone's own files with the removed weights set to zero, and a README that says how to use them; or,
compact, without the heads and neurons that the mask made dead. What it is not: zeros alone make nothing smaller or
faster, they are multiplied like other numbers. Sources: none.

    python eval.py RUN --export FOLDER
    python eval.py RUN --export-compact FOLDER
"""

import copy
import hashlib
import json
import shutil
from functools import partial
from statistics import median

import torch
from safetensors import safe_open
from safetensors.torch import save

from bench import timed
from data import TASKS
from fetch import write_whole
from mask import METHODS, apply_masks
from model import PER_LAYER
from pretrained import canonical, published
from runs import plain
from shrink import config_json, fold_dead, shrink

COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
)

README = """# {task}, pruned to a density of {density:.4f}

{model}{trained}{removed}{head}. Dev: {final}.

The logit of a class is the logit of its label word, read at {where}:

{words}

```python
import torch
from transformers import AutoTokenizer, {loader}

tokenizer, model = AutoTokenizer.from_pretrained("."), {loader}.from_pretrained("."{arguments}).eval()
hidden = model(**tokenizer({text}, return_tensors="pt")){output}
print({logits})
```
"""


def check_free(folder, flag):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{flag}: {folder} holds files already; delete it, or name another folder")


def export(folder, source, result, masks, words):
    """Fill a new folder from a model folder and the masks {name: bool} of a run on it; words: ids of the label words.

    Raises ValueError when the folder holds something already, or the run has a head that other libraries lack.
    """
    check_free(folder, "--export")
    if result["head"] != "words":
        raise ValueError("--export: a fresh head has no place in an ordinary model folder; it stays in the run folder")
    if any(key in json.loads((source / "config.json").read_text("utf-8")) for key in PER_LAYER):
        raise ValueError("--export: other libraries load no model that has lost heads or neurons; use its folder")
    with safe_open(source / "model.safetensors", "pt") as file:  # all tensors, under the names that they had
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = file.metadata()
    for name, tensor in tensors.items():
        if canonical(name) in masks:
            tensors[name] = tensor * masks[canonical(name)]
    write_whole(folder / "README.md", describe(result, tensors, words, source).encode())
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    write_whole(folder / "model.safetensors", save(tensors, header))


COMPACT = """# {task}, pruned to a density of {density:.4f}, without what is dead

{model}; of the weights that {method} left, {removed}. These are gone, and the rest computes the same. Layers
differ in size, so this needs the code that wrote it (commit {commit}): `python eval.py` and this folder's path, or

```python
from pathlib import Path
from runs import load_run

model = load_run(Path("this folder"))[2].eval()
```
"""


@torch.no_grad()
def export_compact(folder, source, result, masks, model, device, dtype):
    """Fill a new folder with a run's model less its dead heads and neurons -> lines that say what was gained.

    The folder is that of a finished run as well, so eval.py takes it. Raises ValueError when it holds something.
    """
    check_free(folder, "--export-compact")
    model = copy.deepcopy(model)  # its biases will change
    model.load_state_dict(apply_masks(model.state_dict(), masks), strict=False)
    inputs = {n: torch.randint(0, model.config.vocab_size, (n, min(64, result["length"]))) for n in (1, 32)}
    inputs = {n: (ids, torch.zeros_like(ids), torch.ones_like(ids)) for n, ids in inputs.items()}
    model.eval()
    logits = model(*inputs[32])
    before, layers = copy.deepcopy(model), model.config.layers
    heads, neurons = fold_dead(model)
    model = shrink(model, heads, neurons)
    difference = (model(*inputs[32]) - logits).abs().max().item()
    if difference > 1e-5 * max(1.0, logits.abs().max().item()):
        raise ValueError(f"the smaller model would compute something else, by {difference:.1e}; nothing was written")
    all_heads, all_neurons = map(sum, zip(*layers, strict=True))
    gone = [all_heads - sum(map(len, heads)), all_neurons - sum(map(len, neurons))]
    removed = f"{gone[0]} of {all_heads} attention heads and {gone[1]:,} of {all_neurons:,} neurons are dead"
    write_compact(folder, source, result, model, removed)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (before, model)]
    lines = [f"{folder}: {removed}" + "; nothing is gained" * (gone == [0, 0])]
    lines.append(f"parameters {sizes[0]:,} -> {sizes[1]:,}; logits differ by at most {difference:.1e}")
    for n, batch in inputs.items() if gone != [0, 0] else ():
        batch = [tensor.to(device) for tensor in batch]
        times = [median(timed(partial(m.to(device, dtype), *batch), device, 20)) for m in (before, model)]
        lines.append(f"batch {n:2} of {batch[0].shape[1]} tokens: {times[0]:.2f} ms -> {times[1]:.2f} ms")
    return lines


def write_compact(folder, source, result, model, removed):
    """The files of a finished run whose weights are its own."""
    content = save({published(n, model.config.model_type): t.contiguous() for n, t in model.state_dict().items()})
    result = {key: value for key, value in result.items() if key not in ("kept", "prunable", "densities")}
    result |= {"sha256": {"model.safetensors": hashlib.sha256(content).hexdigest()}, "config": plain(model.config)}
    text = COMPACT.format(**{"commit": "unknown"} | result | {"removed": removed})
    write_whole(folder / "README.md", text.encode())
    write_whole(folder / "config.json", config_json(source, model.config))
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    write_whole(folder / "model.safetensors", content)
    write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def describe(result, tensors, ids, source):
    """The text of the exported folder's README."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    kind = "Roberta" if config.get("model_type") == "roberta" else "Bert"
    with_head = any(canonical(name).startswith("cls.") for name in tensors)
    at = "" if result["task"] == "squad" else "[:, 0]"
    classes = zip(result["words"].items(), ids, strict=True)
    embedding = "model.embeddings.word_embeddings.weight"
    row, pooler = METHODS[result["method"]], any("pooler." in name for name in tensors)
    return README.format(
        **{key: result[key] for key in ("task", "density", "model")},
        trained=f", its weights trained ({result['method']})" if row.trains_weights else "",
        removed=f"; the weights that {result['method']} removed are zero" if row.masking else "",
        arguments="" if with_head or pooler else ", add_pooling_layer=False",
        final=", ".join(f"{name} {value:.4f}" for name, value in result["final"].items()),
        head=""
        if with_head
        else "; it has no masked-LM head, so the first state times the word's embedding is the logit",
        words="\n".join(f"- {label}: {word!r}, id {i}" for (label, word), i in classes),
        loader=f"{kind}ForMaskedLM" if with_head else f"{kind}Model",
        where="the first token" if at else "every token, for start and end of the answer",
        text='"a text", "its pair"' if len(TASKS[result["task"]].text) == 2 else '"a text"',
        output=(".logits" if with_head else ".last_hidden_state") + at,
        logits=f"hidden[..., {ids}]" if with_head else f"hidden @ {embedding}[{ids}].T",
    )
