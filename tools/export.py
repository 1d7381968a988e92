"""Write a finished run as an ordinary model folder that other libraries load; or, compact, without what is dead.

The removed weights are zeros in their places. Zeros alone make nothing smaller or faster: they are multiplied like
other numbers. With --compact, heads and neurons that the mask cut off are taken out, and the rest computes the same;
how fast that is, `python -m tools.bench --inference --model FOLDER` tells.

    python -m tools.export RUN FOLDER
    python -m tools.export RUN FOLDER --compact
"""

import copy
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

from data import TASKS
from eval import load_run
from extras.pprune import shrink
from mask import METHODS
from model import PER_LAYER, canonical, published
from plumbing.cli import Parser, one_line_errors, show
from plumbing.files import json_bytes, read_json, sha256, write_whole

COPIED = "config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt merges.txt".split()

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


def export(folder, run):
    """Fill a new folder from a loaded run: its model's own files, with the masks' zeros, and a README.

    Raises ValueError when the run has a head that other libraries lack, or lost heads or neurons.
    """
    result, source, model, _, masks = run
    if result["head"] != "words":
        raise ValueError("--export: a fresh head has no place in an ordinary model folder; it stays in the run folder")
    if any(getattr(model.config, name) for name in PER_LAYER):
        raise ValueError("other libraries load no model that has lost heads or neurons; use the folder of the run")
    with safe_open(source / "model.safetensors", "pt") as file:  # all tensors, under the names that they had
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        header = file.metadata()
    for name, tensor in tensors.items():
        if canonical(name) in masks:
            tensors[name] = tensor * masks[canonical(name)]
    write_whole(folder / "README.md", describe(result, model, tensors).encode())
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    write_whole(folder / "model.safetensors", save(tensors, header))
    print(f"{folder}: an ordinary model folder; its README.md says how to use it")


def describe(result, model, tensors):
    """The text of the exported folder's README."""
    kind = "Roberta" if model.config.model_type == "roberta" else "Bert"
    with_head = hasattr(model, "cls")
    with_pooler = any("pooler." in name for name in tensors)
    ids = model.words.tolist()
    at = "" if model.every_token else "[:, 0]"
    classes = zip(result["words"].items(), ids, strict=True)
    method = METHODS[result["method"]]
    no_head = "; it has no masked-LM head, so the first state times the word's embedding is the logit"
    embedding = f"model.embeddings.word_embeddings.weight[{ids}]"
    return README.format(
        **{key: result[key] for key in ("task", "density", "model")},
        trained=f", its weights trained ({result['method']})" if method.trains_weights else "",
        removed=f"; the weights that {result['method']} removed are zero" if method.masking else "",
        head="" if with_head else no_head,
        final=show(result["final"]),
        where="every token, for start and end of the answer" if model.every_token else "the first token",
        words="\n".join(f"- {label}: {word!r}, id {i}" for (label, word), i in classes),
        loader=f"{kind}ForMaskedLM" if with_head else f"{kind}Model",
        arguments="" if with_head or with_pooler else ", add_pooling_layer=False",
        text='"a text", "its pair"' if len(TASKS[result["task"]].text) == 2 else '"a text"',
        output=(".logits" if with_head else ".last_hidden_state") + at,
        logits=f"hidden[..., {ids}]" if with_head else f"hidden @ {embedding}.T",
    )


# --- compact -------------------------------------------------------------------------------------------------

COMPACT = """# {task}, pruned to a density of {density:.4f}, without what is dead

{model}; of the weights that {method} left, {removed}. These are gone, and the rest computes the same. Layers
differ in size, so this needs the code that wrote it (commit {commit}): `python eval.py` and this folder's path, or

```python
from pathlib import Path
from eval import load_run

model = load_run(Path("this folder")).model.eval()
```
"""


@torch.no_grad()
def fold_dead(model):
    """Indices of the heads and of the neurons of each layer that are alive -> (list of [heads], list of [neurons]).

    A neuron is dead if its incoming row or its outgoing column is zero, a head if its value rows or its output columns
    are. Without incoming weights it still adds a constant, which goes into the bias behind it (in place): a neuron
    gelu(its bias); a head the bias of its values, because attention weights sum to 1. (Dropout aside.)
    """
    heads, neurons = [], []
    for layer in model.bert.encoder["layer"]:
        inner = layer.intermediate["dense"]
        neurons.append(fold(inner.weight, F.gelu(inner.bias), layer.output.dense, size=1))
        attention = layer.attention["self"]
        outer = layer.attention["output"].dense
        heads.append(fold(attention.value.weight, attention.value.bias, outer, attention.size))
    return heads, neurons


def fold(incoming, constant, outer, size):
    """Units of `size` rows of incoming [units * size, H] and columns of outer's weight -> indices of those alive.

    constant [units * size]: what the unit computes without incoming weights.
    """
    units = len(constant) // size
    no_input = ~incoming.unflatten(0, (units, size)).any(2).any(1)  # [units * size, H] -> [units, size, H] -> [units]
    no_output = ~outer.weight.unflatten(1, (units, size)).any(2).any(0)  # [H, units, size] -> [units]
    outer.bias += outer.weight @ (constant * no_input.repeat_interleave(size))
    return (~(no_input | no_output)).nonzero()[:, 0]


@torch.no_grad()
def export_compact(folder, run):
    """Fill a new folder with a loaded run's model less its dead heads and neurons; it is a finished run as well.

    Raises ValueError when the smaller model would compute something else.
    """
    result, source, model, _, masks = run
    model = copy.deepcopy(model).eval()  # its biases will change
    state = model.state_dict()
    model.load_state_dict({name: state[name] * mask for name, mask in masks.items()}, strict=False)
    ids = torch.randint(0, model.config.vocab_size, (32, min(64, result["length"])))
    probe = (ids, torch.zeros_like(ids), torch.ones_like(ids))
    logits = model(*probe)
    heads, neurons = fold_dead(model)
    smaller = shrink(model, heads, neurons)
    difference = (smaller(*probe) - logits).abs().max().item()
    if difference > 1e-5 * max(1.0, logits.abs().max().item()):
        raise ValueError(f"the smaller model would compute something else, by {difference:.1e}; nothing was written")

    all_heads, all_neurons = map(sum, zip(*model.config.layers, strict=True))
    dead_heads = all_heads - sum(map(len, heads))
    dead_neurons = all_neurons - sum(map(len, neurons))
    removed = f"{dead_heads} of {all_heads} attention heads and {dead_neurons:,} of {all_neurons:,} neurons are dead"
    write_compact(folder, source, result, smaller, removed)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    print(f"{folder}: {removed}" + ("" if dead_heads or dead_neurons else "; nothing is gained"))
    print(f"parameters {before:,} -> {after:,}; logits differ by at most {difference:.1e}")


def write_compact(folder, source, result, model, removed):
    """The files of a finished run whose weights are its own."""
    content = save({published(n, model.config.model_type): t.contiguous() for n, t in model.state_dict().items()})
    result = {key: value for key, value in result.items() if key not in ("kept", "prunable", "densities")}
    result |= {"sha256": {"model.safetensors": sha256(content)}, "config": str(model.config)}
    text = COMPACT.format(**{"commit": "unknown"} | result | {"removed": removed})
    result |= {"pruned_with": result["method"], "method": "finetune"}  # weights of its own, and no mask
    write_whole(folder / "README.md", text.encode())
    config = read_json(source / "config.json") | {name: getattr(model.config, name) for name in PER_LAYER}
    write_whole(folder / "config.json", json_bytes(config))
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    write_whole(folder / "model.safetensors", content)
    write_whole(folder / "result.json", json_bytes(result))


def main(argv=None):
    parser = Parser(prog="python -m tools.export", description="Write a finished run as a model folder.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a mask file out of one")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    parser.add_argument("--compact", action="store_true", help="without dead heads and neurons; needs this code")
    parser.add_argument("--model", metavar="FOLDER", help="where the backbone stands now")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise ValueError(f"{args.folder} holds files already; delete it, or name another folder")
        write = export_compact if args.compact else export
        write(args.folder, load_run(args.run, args.model))


if __name__ == "__main__":
    main()
