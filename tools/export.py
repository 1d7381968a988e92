"""Write a finished run as an ordinary model folder that other libraries load; or, compact, without what is dead.

The removed weights are zeros in their places. Zeros alone make nothing smaller or faster: they are multiplied like
other numbers. With --compact, heads and neurons that the mask cut off are taken out, and the rest computes the same;
how fast that is, `python -m tools.bench --inference --model FOLDER` tells. With --mask, the mask alone is written, to
be shared as adapters are. Each folder has a model card.

    python -m tools.export RUN FOLDER [--compact | --mask]
"""

import copy
from pathlib import Path

import torch

from data import TASKS
from eval import load_run
from extras.pprune import modules, shrink
from mask import METHODS
from model import PER_LAYER
from plumbing.checkpoints import (
    WEIGHTS,
    pack_weights,
    read_model,
    tokenizer_bytes,
    tokenizer_config,
)
from plumbing.cli import Parser, one_line_errors, show
from plumbing.files import file_digest, json_bytes, partial_folder, read_json, sha256, write_whole
from tools import card

HEADING = """# {task}, pruned to a density of {density:.4f}

{model}{changes}. Dev: {final} ({facts}).

"""
OF_CLASSES = """The logit of a class is the logit of its label word, read at {where}: {words}.

```python
import torch
from transformers import AutoTokenizer, {loader}

tokenizer, model = AutoTokenizer.from_pretrained("."), {loader}.from_pretrained("."{arguments}).eval()
hidden = model(**tokenizer({text}, return_tensors="pt")){output}
print({logits})
```
"""
OF_LANGUAGE = """```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer, model = AutoTokenizer.from_pretrained("."), GPT2LMHeadModel.from_pretrained(".").eval()
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=30)[0]))
```
"""


def export(folder, run):
    """Fill a new folder from a loaded run, its model's own files with the masks' zeros and a README -> what it is.

    Raises ValueError when the run has a head that other libraries lack, or lost heads or neurons.
    """
    if run.result["head"] != "words":
        raise ValueError(
            "a fresh head has no place in an ordinary model folder; it stays in the run folder"
        )
    if any(getattr(run.model.config, name) for name in PER_LAYER):
        raise ValueError(
            "other libraries load no model that has lost heads or neurons; use the folder of the run"
        )
    _, tensors = read_model(run.folder)  # all of them, under the names that they had
    learnt = dict(run.masks)
    if METHODS[run.result["method"]].vectors:
        learnt |= {
            name: weight.detach()
            for name, weight in run.model.named_parameters()
            if weight.ndim == 1
        }
    learnt = {
        run.model.canonical(name): found for name, found in run.model.published(learnt).items()
    }
    for name, tensor in tensors.items():
        found = learnt.get(run.model.canonical(name))
        if found is not None:
            tensors[name] = tensor * found if found.ndim > 1 else found
    has_pooler = any("pooler." in name for name in tensors)
    text = card.front_matter(run.result, "transformers") + describe(
        run.result, run.model, has_pooler
    )
    write_whole(folder / "README.md", text.encode())
    write_whole(folder / "config.json", (run.folder / "config.json").read_bytes())
    write_whole(folder / "tokenizer.json", tokenizer_bytes(run.folder))
    write_whole(
        folder / "tokenizer_config.json", tokenizer_config(folder, run.model.config.longest_input)
    )
    write_whole(folder / "model.safetensors", pack_weights(tensors))
    return "an ordinary model folder; its README.md says how to use it"


def describe(result, model, has_pooler):
    """The text of the exported folder's README, below its metadata."""
    method = METHODS[result["method"]]
    changes = f", its weights trained ({result['method']})" if method.trains_weights else ""
    changes += "; biases and LayerNorms trained" if method.vectors else ""
    changes += f"; the weights that {result['method']} removed are zero" if method.masking else ""
    heading = {key: result[key] for key in ("task", "density")}
    heading |= {
        "model": card.backbone(result)[0],
        "final": show(result["final"]),
        "facts": card.facts(result),
    }
    if not result["words"]:
        return HEADING.format(**heading, changes=changes) + OF_LANGUAGE

    ids = model.words.tolist()
    at = "" if model.every_token else "[:, 0]"
    code = {"loader": "AutoModelForMaskedLM", "arguments": ""}
    code |= {"output": f".logits{at}", "logits": f"hidden[..., {ids}]"}
    if not hasattr(model, "cls"):
        changes += (
            "; it has no masked-LM head, so the first state times the word's embedding is the logit"
        )
        code = {
            "loader": "AutoModel",
            "arguments": "" if has_pooler else ", add_pooling_layer=False",
        }
        code |= {"output": f".last_hidden_state{at}"}
        code |= {"logits": f"hidden @ model.embeddings.word_embeddings.weight[{ids}].T"}
    words = zip(result["words"].items(), ids, strict=True)
    return HEADING.format(**heading, changes=changes) + OF_CLASSES.format(
        **code,
        where="every token, for start and end of the answer"
        if model.every_token
        else "the first token",
        words=", ".join(f"{word!r} (id {i}) for {label}" for (label, word), i in words),
        text='"a text", "its pair"' if len(TASKS[result["task"]].text) == 2 else '"a text"',
    )


# --- compact -------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_dead(model):
    """Indices of the heads and of the neurons of each layer that are alive -> (list of [heads], list of [neurons]).

    A neuron is dead if its incoming row or its outgoing column is zero, a head if its value rows or its output columns
    are. Without incoming weights it still adds a constant, which goes into the bias behind it (in place): a neuron
    gelu(its bias); a head the bias of its values, because attention weights sum to 1. (Dropout aside.)
    """
    groups = modules(model)
    heads, neurons = [], []
    for value, outer in zip(groups["value"], groups["attn_output"], strict=True):
        heads.append(fold(value.weight, value.bias, outer, model.config.head_size))
    for inner, outer in zip(groups["intermediate"], groups["output"], strict=True):
        neurons.append(fold(inner.weight, model.activation(inner.bias), outer, size=1))
    return heads, neurons


def fold(incoming, constant, outer, size):
    """Units of `size` rows of incoming [units * size, H] and columns of outer's weight -> indices of those alive.

    constant [units * size]: what the unit computes without incoming weights.
    """
    units = len(constant) // size
    no_input = ~incoming.unflatten(0, (units, size)).any(2).any(
        1
    )  # [units * size, H] -> [units, size, H] -> [units]
    no_output = ~outer.weight.unflatten(1, (units, size)).any(2).any(
        0
    )  # [H, units, size] -> [units]
    outer.bias += outer.weight @ (constant * no_input.repeat_interleave(size))
    return (~(no_input | no_output)).nonzero()[:, 0]


@torch.no_grad()
def export_compact(folder, run):
    """Fill a new folder with a loaded run's model less its dead heads and neurons, a finished run too -> what is gone.

    Raises ValueError when the smaller model would compute something else.
    """
    model = copy.deepcopy(run.model).eval()  # its biases will change
    state = model.state_dict()
    model.load_state_dict(
        {name: state[name] * mask for name, mask in run.masks.items()}, strict=False
    )
    ids = torch.randint(0, model.config.vocab_size, (32, min(64, run.result["length"])))
    probe = (ids, torch.zeros_like(ids), torch.ones_like(ids))
    logits = model(*probe)
    heads, neurons = fold_dead(model)
    smaller = shrink(model, heads, neurons)
    difference = (smaller(*probe) - logits).abs().max().item()
    if difference > 1e-5 * max(1.0, logits.abs().max().item()):
        raise ValueError(
            f"the smaller model would compute something else, by {difference:.1e}; nothing was written"
        )

    all_heads, all_neurons = map(sum, zip(*model.config.layers, strict=True))
    dead = [all_heads - sum(map(len, heads)), all_neurons - sum(map(len, neurons))]
    removed = f"{dead[0]} of {all_heads} attention heads and {dead[1]:,} of {all_neurons:,} neurons are dead"
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    said = f"{removed}{'' if any(dead) else '; nothing is gained'}\n"
    said += f"parameters {before:,} -> {after:,}; logits differ by at most {difference:.1e}"
    write_compact(folder, run, smaller, said)
    return said


def write_compact(folder, run, model, said):
    """The files of a finished run whose weights are its own, and that has no mask."""
    content = pack_weights(model.published(model.state_dict()))
    result = {
        key: value
        for key, value in run.result.items()
        if key not in ("kept", "prunable", "densities")
    }
    result |= {"pruned_with": result["method"], "method": "finetune", "config": str(model.config)}
    result["sha256"] = {"model.safetensors": sha256(content)}
    config = read_json(run.folder / "config.json") | {
        name: getattr(model.config, name) for name in PER_LAYER
    }
    how = "Layers may differ in size, so this folder needs the code that wrote it: it is a RUN for eval.py."
    write_whole(
        folder / "README.md",
        f"{card.front_matter(run.result, card.OURS)}{said}\n\n{how}\n".encode(),
    )
    write_whole(folder / "config.json", json_bytes(config))
    write_whole(folder / "tokenizer.json", tokenizer_bytes(run.folder))
    write_whole(
        folder / "tokenizer_config.json", tokenizer_config(folder, model.config.longest_input)
    )
    write_whole(folder / "model.safetensors", content)
    write_whole(folder / "result.json", json_bytes(result))


# --- the mask alone ------------------------------------------------------------------------------------------


def export_mask(folder, run, mask_file):
    """Fill a new folder with a loaded run's mask, a card and adapter_config.json -> what it is.

    Raises ValueError when a mask is not all that the run learnt.
    """
    if METHODS[run.result["method"]].trains_weights:
        raise ValueError(
            "--mask: this run trained weights too, which a mask does not hold; leave it out"
        )
    kept = sum(mask.sum().item() for mask in run.masks.values())
    total = sum(mask.numel() for mask in run.masks.values())
    weights = run.folder / WEIGHTS
    backbone = file_digest(weights) if weights.exists() else None  # or they stand in several files
    write_whole(folder / "mask.safetensors", mask_file.read_bytes())
    write_whole(folder / "README.md", card.mask_card(run.result, kept, total).encode())
    write_whole(
        folder / "adapter_config.json",
        json_bytes(card.adapter_config(run.result, backbone, kept / total)),
    )
    return "a mask to share; its README.md says how to use it. The mask's file also names the run's command and folders"


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.export",
        description="Write a finished run as a folder to use elsewhere.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder, or a mask file out of one"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--compact", action="store_true", help="without dead heads and neurons; needs this code"
    )
    way.add_argument(
        "--mask",
        action="store_true",
        help="the mask alone, to share; needs this code and the backbone",
    )
    parser.add_argument("--model", metavar="FOLDER", help="where the backbone stands now")
    args = parser.parse_args(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise ValueError(f"{args.folder} holds files already; delete it, or name another folder")
    run = load_run(args.run, args.model)
    with partial_folder(args.folder.resolve()) as part:
        if args.mask:
            said = export_mask(
                part, run, args.run if args.run.is_file() else args.run / "mask.safetensors"
            )
        else:
            said = export_compact(part, run) if args.compact else export(part, run)
    print(f"{args.folder}: {said}")


if __name__ == "__main__":
    main()
