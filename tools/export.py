"""Export a finished run: as an ordinary model folder, a compact one, or the mask alone.

An ordinary folder loads in other libraries. The removed weights are zeros in their places. Zeros
alone make nothing smaller or faster: they are multiplied like other numbers. --compact takes out
the heads and neurons that the mask cut off, and the rest computes the same. Measure its speed with
`python -m tools.bench --model FOLDER`. --mask writes the mask alone, to share as adapters are
shared. Each folder has a README.md with metadata, as model hubs read it.

    python -m tools.export RUN FOLDER [--compact | --mask]
"""

import copy
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from data import task_of
from eval import load_run, masked_weights
from extras.gpt2 import GPT2
from extras.own import describe_table
from extras.pprune import modules, shrink
from mask import METHODS
from plumbing.checkpoints import PER_LAYER, model_files, read_model
from plumbing.cli import Parser, one_line_errors, printable, show
from plumbing.fetch import model_name
from plumbing.files import part_path, sha256, signed_json, write_whole

OURS = "static-model-pruning"  # the library, for folders that only this code reads
HUB = {  # the models' names on the hub
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "gpt2": "openai-community/gpt2",
}

CARD = """---
library_name: {library}
tags: [pruning, sparsity, static-model-pruning, "{method}"]
{base}---

# {task}, at a density of {density:.4f}

Backbone {name}, method {method}. What trained: {trained}.
The density is the share of the layers' weights that remain. The others are zero.
Dev: {scores} ({facts}). {table}

{use}"""
TRAINED = {"vectors": "biases and LayerNorms"}  # where Method.trains does not say it plainly
FACTS = "seed {seed}, {steps} steps, {seconds} seconds, commit {commit}, {device}, {dtype}"
CLASSIFIER_USE = """The logit of a class is that of its label word, read at the {where}: {words}.

```python
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {loader}.from_pretrained(".").eval()
output = model(**tokenizer({texts}, return_tensors="pt"))
logits = {logits}  # of every token and word
print(logits{first}[..., {ids}])
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
MASKED_LM_USE = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForMaskedLM.from_pretrained(".").eval()
inputs = tokenizer("The film was [MASK].", return_tensors="pt")
masked = inputs["input_ids"] == tokenizer.mask_token_id
print(tokenizer.decode(model(**inputs).logits[masked].argmax(-1)))
```
"""
COMPACT_USE = """{description}

Layers may differ in size, so only the code that wrote this folder can load it: it is a RUN for
eval.py.
"""
MASK_USE = """`mask.safetensors` holds the mask, at most one bit per weight, and whatever else
trained. The backbone is not in this folder.

You need the code of *Static Model Pruning, from scratch*. FOLDER is this folder:

```sh
python eval.py FOLDER/mask.safetensors --text "..."
```

Without `--text` this evaluates the dev split again. `--model` names the folder of the backbone, if
the code cannot fetch it, and `--data-dir` that of the data. It refuses a file that was altered,
and any backbone but the one that the mask was trained for. The fingerprint of its weights is
{fingerprint}.
"""


# --- cards ----------------------------------------------------------------------------------------


def card(result, library, use):
    """Write the README.md of an exported folder -> bytes. use: the text that follows the facts."""
    base = HUB.get(result["model"])  # a folder has no name there, and is named without its path
    method = METHODS[result["method"]]
    trained = ", ".join(TRAINED.get(part, part) for part in method.trains)
    parts = {
        "library": library,
        "base": f"base_model: {base}\n" if base else "",
        "name": printable(model_name(result["model"])),
        "trained": getattr(method, "learns_what", trained),
        "scores": show(result["final"]),
        "facts": facts(result),
        "table": describe_table(result.get("table")),
        "use": use,
    }
    return CARD.format_map(result | parts).encode()


def facts(result):
    """Say how a run was made, as far as it is known."""
    return printable(FACTS.format_map({"commit": "unknown"} | result))


# --- an ordinary model folder ---------------------------------------------------------------------


def export(folder, run):
    """Fill a new folder: the loaded run's model with the mask applied, and a README.

    Returns a description. Raises ValueError if other libraries cannot load such a model.
    """
    if run.result["head"] != "words":
        raise ValueError(
            "a fresh head has no place in an ordinary model folder; it stays in the run folder"
        )
    if any(getattr(run.model.config, name) for name in PER_LAYER):
        raise ValueError(
            "this folder lists layer sizes, which other libraries do not read; "
            "use the folder of the run"
        )
    _, tensors = read_model(run.folder)  # all of them, under their original names
    apply_run(tensors, run)
    use = MASKED_LM_USE
    if isinstance(run.model, GPT2):
        use = LANGUAGE_MODEL_USE
    elif run.result["words"]:
        use = classifier_use(run.result, run.model)
    files = model_files(run.folder, tensors, run.model.config)
    files["README.md"] = card(run.result, "transformers", use)
    write_files(folder, files)
    return "an ordinary model folder; its README.md says how to use it"


def apply_run(tensors, run):
    """Multiply weights {name: tensor} by the run's masks, and take over its trained vectors."""
    model = run.model
    trained = dict(run.masks)
    method = METHODS[run.result["method"]]
    if "weights" not in method.trains:
        trained |= method.trained(model)
    published = model.published(trained)
    trained = {model.canonical(name): tensor for name, tensor in published.items()}

    for name, tensor in tensors.items():
        ours = trained.get(model.canonical(name))
        if ours is not None:
            tensors[name] = tensor * ours if ours.dtype == torch.bool else ours


def write_files(folder, files):
    for name, content in files.items():
        write_whole(folder / name, content)


def classifier_use(result, model):
    """Write how a model with label words is used."""
    loader, logits = "AutoModelForMaskedLM", "output.logits"
    if not hasattr(model, "cls"):  # without a masked-LM head, words are compared with the state
        loader = "AutoModel"
        logits = "output.last_hidden_state @ model.get_input_embeddings().weight.T"
    return CLASSIFIER_USE.format(
        where="start and the end of an answer" if model.every_token else "first token",
        first="" if model.every_token else "[:, 0]",
        words=result["words"],
        ids=model.words.tolist(),
        texts='"a text", "its pair"' if len(task_of(result).text) == 2 else '"a text"',
        loader=loader,
        logits=logits,
    )


# --- compact --------------------------------------------------------------------------------------


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
    dead = no_input | no_output
    return (~dead).nonzero()[:, 0]


@torch.no_grad()
def export_compact(folder, run):
    """Fill a new folder: the loaded run's model without its dead heads and neurons.

    The folder is a finished run too. Returns a description of what is gone. Raises ValueError if
    the smaller model would compute something else.
    """
    model = copy.deepcopy(run.model).eval()  # its biases will change
    model.load_state_dict(masked_weights(run, "cpu", torch.float32), strict=False)

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

    description = describe_dead(model, smaller)
    description += f"; logits differ by at most {difference:.1e}"
    write_compact(folder, run, smaller, description)
    return description


def describe_dead(model, smaller):
    """Say how much smaller a model is without its dead heads and neurons."""
    all_heads, all_neurons, before = size_of(model)
    heads, neurons, after = size_of(smaller)
    return (
        f"{all_heads - heads} of {all_heads} attention heads "
        f"and {all_neurons - neurons:,} of {all_neurons:,} neurons are dead\n"
        f"parameters {before:,} -> {after:,}"
    )


def size_of(model):
    """How many heads, neurons and parameters a model has."""
    heads, neurons = torch.tensor(model.config.layers).sum(0).tolist()
    return heads, neurons, sum(p.numel() for p in model.parameters())


def write_compact(folder, run, model, description):
    """Write the files of a finished run that has its own weights and no mask."""
    files = model_files(run.folder, model.published(model.state_dict()), model.config)
    result = dict(run.result)
    for key in ("kept", "prunable", "densities"):
        result.pop(key, None)
    result |= {"pruned_with": result["method"], "method": "finetune", "config": str(model.config)}
    result["sha256"] = {"model.safetensors": sha256(files["model.safetensors"])}

    use = COMPACT_USE.format(description=description)
    files["README.md"] = card(run.result, OURS, use)
    files["result.json"] = signed_json(result)
    write_files(folder, files)


# --- the mask alone -------------------------------------------------------------------------------


def export_mask(folder, run, mask_file):
    """Fill a new folder: the loaded run's mask file and a README.

    Returns a description. Raises ValueError if the run trained more than a mask.
    """
    if "weights" in METHODS[run.result["method"]].trains:
        raise ValueError(
            "--mask: this run trained weights too, which a mask does not hold; leave it out"
        )
    files = {
        "README.md": card(run.result, OURS, MASK_USE.format_map(run.result)),
        "mask.safetensors": mask_file.read_bytes(),
    }
    write_files(folder, files)
    return (
        "a mask to share; its README.md says how to use it. "
        "Note: the mask file records the training command, with its paths"
    )


@contextmanager
def partial_folder(folder):
    """Yield a new folder to fill. It then replaces `folder`. After an error it is removed.

    Raises ValueError unless `folder` is missing or empty.
    """
    if folder.is_file() or any(folder.glob("*")):
        raise ValueError(f"{folder} holds files already; delete it, or name another folder")
    folder = folder.resolve()
    part = part_path(folder)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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

    run = load_run(args.run, args.model)
    with partial_folder(args.folder) as part:
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
