"""Export a finished run: as an ordinary model folder, a compact one, or the mask alone.

An ordinary folder loads in other libraries. The removed weights are zeros in their places. Zeros
alone make nothing smaller or faster: they are multiplied like other numbers. --compact takes out
the heads and neurons that the mask cut off, and the rest computes the same; measure its speed with
`python -m tools.bench --inference --model FOLDER`. --mask writes the mask alone, to share as
adapters are shared. Each folder has a model card.

    python -m tools.export RUN FOLDER [--compact | --mask]
"""

import copy
from pathlib import Path

import torch

from data import TASKS
from eval import load_run
from extras.pprune import modules, shrink
from mask import METHODS
from plumbing.checkpoints import (
    PER_LAYER,
    WEIGHTS,
    model_files,
    pack_weights,
    read_model,
    tokenizer_bytes,
    tokenizer_config,
)
from plumbing.cli import Parser, one_line_errors, show
from plumbing.files import file_digest, json_bytes, partial_folder, sha256, write_whole
from tools import card

HEADING = """# {task}, pruned to a density of {density:.4f}

{model}{changes}. Dev: {final} ({facts}).

"""
CLASSIFIER_USE = """The logit of a class is the logit of its label word, read at {where}: {words}.

```python
import torch
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {loader}.from_pretrained("."{arguments}).eval()
hidden = model(**tokenizer({text}, return_tensors="pt")){output}
print({logits})
```
"""
LANGUAGE_MODEL_USE = """```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained(".")
model = GPT2LMHeadModel.from_pretrained(".").eval()
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))
```
"""


def export(folder, run):
    """Fill a new folder: the loaded run's model with the mask applied, and a README.

    Returns a description. Raises ValueError if other libraries cannot load such a model, because
    of its head or because it has lost heads or neurons.
    """
    if run.result["head"] != "words":
        raise ValueError(
            "a fresh head has no place in an ordinary model folder; it stays in the run folder"
        )
    if any(getattr(run.model.config, name) for name in PER_LAYER):
        raise ValueError(
            "other libraries load no model that has lost heads or neurons; "
            "use the folder of the run"
        )
    _, tensors = read_model(run.folder)  # all of them, under their original names
    has_pooler = any("pooler." in name for name in tensors)
    apply_run(tensors, run)

    text = card.front_matter(run.result, "transformers")
    text += describe(run.result, run.model, has_pooler)
    files = {
        "README.md": text.encode(),
        "config.json": (run.folder / "config.json").read_bytes(),
        "model.safetensors": pack_weights(tensors),
    }
    write_files(folder, files | tokenizer_files(run))
    return "an ordinary model folder; its README.md says how to use it"


def apply_run(tensors, run):
    """Multiply weights {name: tensor} by the run's masks, and take over its trained vectors."""
    model = run.model
    trained = dict(run.masks)
    if "vectors" in METHODS[run.result["method"]].trains:
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                trained[name] = weight.detach()
    published = model.published(trained)
    trained = {model.canonical(name): tensor for name, tensor in published.items()}

    for name, tensor in tensors.items():
        found = trained.get(model.canonical(name))
        if found is not None:
            tensors[name] = tensor * found if found.ndim > 1 else found


def tokenizer_files(run):
    """Return the files of a run's tokenizer as {name: bytes}."""
    length = run.model.config.longest_input
    return {
        "tokenizer.json": tokenizer_bytes(run.folder),
        "tokenizer_config.json": tokenizer_config(run.folder, length),
    }


def write_files(folder, files):
    for name, content in files.items():
        write_whole(folder / name, content)


def describe(result, model, has_pooler):
    """Write the exported folder's README, below its metadata."""
    method = METHODS[result["method"]]
    changes = f", its weights trained ({result['method']})" if "weights" in method.trains else ""
    changes += "; biases and LayerNorms trained" if "vectors" in method.trains else ""
    changes += f"; the weights that {result['method']} removed are zero" if method.how_many else ""
    if result["words"]:
        note, use = describe_classes(result, model, has_pooler)
        changes += note
    else:
        use = LANGUAGE_MODEL_USE
    heading = HEADING.format(
        task=result["task"],
        density=result["density"],
        model=card.backbone(result)[0],
        changes=changes,
        final=show(result["final"]),
        facts=card.facts(result),
    )
    return heading + use


def describe_classes(result, model, has_pooler):
    """Write how a model with label words is used -> (a note on its head, text with code)."""
    ids = model.words.tolist()
    at = "" if model.every_token else "[:, 0]"
    if hasattr(model, "cls"):
        note = ""
        loader, arguments = "AutoModelForMaskedLM", ""
        output, logits = f".logits{at}", f"hidden[..., {ids}]"
    else:
        note = (
            "; it has no masked-LM head, so the first state times the word's embedding is the logit"
        )
        loader, arguments = "AutoModel", "" if has_pooler else ", add_pooling_layer=False"
        output = f".last_hidden_state{at}"
        logits = f"hidden @ model.embeddings.word_embeddings.weight[{ids}].T"

    words = []
    for (label, word), i in zip(result["words"].items(), ids, strict=True):
        words.append(f"{word!r} (id {i}) for {label}")
    where = "the first token"
    if model.every_token:
        where = "every token, for start and end of the answer"
    two_texts = len(TASKS[result["task"]].text) == 2
    return note, CLASSIFIER_USE.format(
        where=where,
        words=", ".join(words),
        loader=loader,
        arguments=arguments,
        text='"a text", "its pair"' if two_texts else '"a text"',
        output=output,
        logits=logits,
    )


# --- compact ----------------------------------------------------------------------------------


@torch.no_grad()
def fold_dead(model):
    """Find what is alive in each layer -> (head indices per layer, neuron indices per layer).

    A neuron is dead if its incoming row or its outgoing column is zero; a head if its value rows or
    its output columns are. A unit without incoming weights still adds a constant: a neuron
    gelu(its bias), and a head the bias of its values, because attention weights sum to 1 (without
    dropout). Each constant is added, in place, to the bias that follows.
    """
    groups = modules(model)
    heads, neurons = [], []
    for value, outer in zip(groups["value"], groups["attn_output"], strict=True):
        heads.append(fold(value.weight, value.bias, outer, model.config.head_size))
    for inner, outer in zip(groups["intermediate"], groups["output"], strict=True):
        neurons.append(fold(inner.weight, model.activation(inner.bias), outer, size=1))
    return heads, neurons


def fold(incoming, constant, outer, size):
    """Fold the constants of units without input into outer's bias -> indices of units alive.

    A unit is `size` rows of incoming [units * size, H] and as many columns of outer's weight.
    constant [units * size]: what the units compute without incoming weights.
    """
    units = len(constant) // size
    rows = incoming.unflatten(0, (units, size))  # [units * size, H] -> [units, size, H]
    columns = outer.weight.unflatten(1, (units, size))  # [H, units * size] -> [H, units, size]
    no_input = ~rows.any(2).any(1)  # [units]
    no_output = ~columns.any(2).any(0)  # [units]
    outer.bias += outer.weight @ (constant * no_input.repeat_interleave(size))
    return (~(no_input | no_output)).nonzero()[:, 0]


@torch.no_grad()
def export_compact(folder, run):
    """Fill a new folder: the loaded run's model without its dead heads and neurons.

    The folder is a finished run too. Returns a description of what is gone. Raises ValueError if
    the smaller model would compute something else.
    """
    model = copy.deepcopy(run.model).eval()  # its biases will change
    state = model.state_dict()
    masked = {name: state[name] * mask for name, mask in run.masks.items()}
    model.load_state_dict(masked, strict=False)

    # Compare the logits before and after on random tokens.
    ids = torch.randint(0, model.config.vocab_size, (32, min(64, run.result["length"])))
    probe = (ids, torch.zeros_like(ids), torch.ones_like(ids))
    logits = model(*probe)
    heads, neurons = fold_dead(model)
    smaller = shrink(model, heads, neurons)
    difference = (smaller(*probe) - logits).abs().max().item()
    if difference > 1e-5 * max(1.0, logits.abs().max().item()):
        raise ValueError(
            f"the smaller model would compute something else, by {difference:.1e}; "
            "nothing was written"
        )

    description = describe_dead(model, heads, neurons)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    description += f"parameters {before:,} -> {after:,}; logits differ by at most {difference:.1e}"
    write_compact(folder, run, smaller, description)
    return description


def describe_dead(model, heads, neurons):
    """Say how many of a model's heads and neurons are dead, given the indices of those alive."""
    all_heads, all_neurons = map(sum, zip(*model.config.layers, strict=True))
    dead_heads = all_heads - sum(map(len, heads))
    dead_neurons = all_neurons - sum(map(len, neurons))
    text = f"{dead_heads} of {all_heads} attention heads "
    text += f"and {dead_neurons:,} of {all_neurons:,} neurons are dead"
    if not dead_heads and not dead_neurons:
        text += "; nothing is gained"
    return text + "\n"


def write_compact(folder, run, model, description):
    """Write the files of a finished run that has its own weights and no mask."""
    files = model_files(run.folder, model.published(model.state_dict()), model.config)
    result = dict(run.result)
    for key in ("kept", "prunable", "densities"):
        result.pop(key, None)
    result |= {"pruned_with": result["method"], "method": "finetune", "config": str(model.config)}
    result["sha256"] = {"model.safetensors": sha256(files["model.safetensors"])}

    text = card.front_matter(run.result, card.OURS) + description
    text += "\n\nLayers may differ in size, so only the code that wrote this folder can load it: "
    text += "it is a RUN for eval.py.\n"
    files["README.md"] = text.encode()
    files["result.json"] = json_bytes(result)
    write_files(folder, files)


# --- the mask alone ---------------------------------------------------------------------------


def export_mask(folder, run, mask_file):
    """Fill a new folder: the loaded run's mask, a card and adapter_config.json.

    Returns a description. Raises ValueError if the run trained more than a mask.
    """
    if "weights" in METHODS[run.result["method"]].trains:
        raise ValueError(
            "--mask: this run trained weights too, which a mask does not hold; leave it out"
        )
    kept = sum(mask.sum().item() for mask in run.masks.values())
    total = sum(mask.numel() for mask in run.masks.values())
    weights = run.folder / WEIGHTS
    backbone = file_digest(weights) if weights.exists() else None  # None: in several files
    config = card.adapter_config(run.result, backbone, kept / total)
    files = {
        "mask.safetensors": mask_file.read_bytes(),
        "README.md": card.mask_card(run.result, kept, total).encode(),
        "adapter_config.json": json_bytes(config),
    }
    write_files(folder, files)
    return (
        "a mask to share; its README.md says how to use it. "
        "The mask's file also names the run's command and folders"
    )


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.export",
        description="Write a finished run as a folder to use elsewhere.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or the mask file from one")
    add("folder", type=Path, metavar="FOLDER", help="a new folder")
    add("--model", metavar="FOLDER", help="where the backbone is now")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--compact", action="store_true", help="no dead heads and neurons; needs this code")
    add("--mask", action="store_true", help="the mask alone; needs this code and the backbone")
    args = parser.parse_args(argv)

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise ValueError(f"{args.folder} holds files already; delete it, or name another folder")
    run = load_run(args.run, args.model)
    with partial_folder(args.folder.resolve()) as part:
        if args.mask:
            mask_file = args.run if args.run.is_file() else args.run / "mask.safetensors"
            description = export_mask(part, run, mask_file)
        elif args.compact:
            description = export_compact(part, run)
        else:
            description = export(part, run)
    print(f"{args.folder}: {description}")


if __name__ == "__main__":
    main()
