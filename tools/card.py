"""The text of model cards and of adapter_config.json. tools.export writes the files.

A card is a README.md that begins with metadata in YAML, as model hubs read it. Everything that
comes from a run is written as JSON, which is YAML too, so no name can break the metadata.

    text = front_matter(result, "transformers") + "# What it is"
"""

import json
from pathlib import Path

from data import TASKS
from mask import METHODS
from plumbing import fetch
from plumbing.cli import printable, show
from plumbing.files import MASKS

OURS = "static-model-pruning"  # the library's name, for a folder that only this code reads
# Names on the hub that differ from ours: models from elsewhere, data sets, metrics.
BACKBONES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
DATASETS = {
    "squad": ("rajpurkar/squad", "plain_text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-v1"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-v1"),
}
GLUE = "rte mrpc cola stsb sst2 qnli qqp mnli wnli".split()
DATASETS |= {task: ("nyu-mll/glue", task) for task in GLUE}
METRICS = {
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "em": "exact_match",
}

MASK_CARD = """# {task}: a mask for {backbone}

This mask keeps {kept:,} of the {total:,} prunable weights of {backbone}: density {density:.4f},
sparsity {sparsity:.4f}. It stores one bit per weight. The backbone is not in this folder;
{trained} (method {method}).{head}

Dev: {final} ({facts}).

## Use it

You need the code of *Static Model Pruning, from scratch*. FOLDER is this folder{where}:

```sh
pip install -r requirements.txt
python eval.py FOLDER/mask.safetensors{model} {ask}
```

Without {flags} this evaluates the dev split again{data}. It refuses a file that was altered, and
any backbone but the one that the mask was trained for.

## Files

`mask.safetensors` is the packed mask; `unpack_bits` in `plumbing/files.py` explains the packing.
`adapter_config.json` holds

| key | meaning |
|---|---|
| `base_model_name_or_path` | the backbone |
| `base_model_sha256` | sha256 of its `model.safetensors`; null if it has several weight files |
| `base_model_fingerprint` | sha256 of all its weights by name, however they are stored |
| `format` | the format of `mask.safetensors` |
| `task`, `method`, `density` | what was trained, how, and the share of weights kept |
| `head`, `label_words` | what answers, and for each label the word whose logit counts |
| `max_length` | longest input in tokens |
"""


def backbone(result):
    """Name the model of a run -> (name to display, name on the hub or None).

    A folder is named without its path.
    """
    hub_names = BACKBONES | {name: repository for name, (repository, _) in fetch.HUB.items()}
    model = result["model"]
    name = model if model in fetch.MODELS else Path(model).name
    return printable(name), hub_names.get(model)


def facts(result):
    """Say how a run was made, as far as it is known: "seed 0, 598 steps, commit 7643b46"."""
    known = {"seed": "seed {}", "steps": "{} steps", "commit": "commit {}"}
    parts = []
    for key, template in known.items():
        if result.get(key) is not None:
            parts.append(printable(template.format(result[key])))
    if result.get("clean") is False:
        parts.append("with changes that are in no commit")
    return ", ".join(parts)


def front_matter(result, library, relation=None):
    """Write a card's metadata, between lines of ---.

    library: the one that loads the folder. relation: how the folder relates to its base model,
    unless by "finetune". The licence is left out because nobody has stated it, and so is anything
    without a name on the hub.
    """
    name, base = backbone(result)
    task = TASKS[result["task"]]
    dataset, _ = hub_dataset(result)
    fields = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": library,
        "tags": ["pruning", "sparsity", OURS, result["method"]],
        "datasets": [dataset] if dataset else None,
        "metrics": [METRICS.get(metric, metric) for metric in task.metrics],
    }
    lines = [f"{key}: {to_yaml(value)}" for key, value in fields.items() if value is not None]
    title = to_yaml(f"{result['task']}-{name}-{result['method']}")
    lines += ["model-index:", f"- name: {title}", "  results:"]
    lines += result_lines(result, task)
    return "\n".join(["---", *lines, "---", "", ""])


def hub_dataset(result):
    """Return (data set on the hub, its configuration), or (None, None) if it is unknown."""
    if result["data_dir"]:  # the data may be the user's own
        return None, None
    return DATASETS.get(result["task"], (None, None))


def result_lines(result, task):
    """Write a card's results as lines of YAML, one entry per metric."""
    kind = "text-classification"
    if task.load:
        kind = "text-generation"
    elif task.every_token:
        kind = "question-answering"
    dataset, config = hub_dataset(result)
    data = {"name": result["task"], "type": dataset or result["task"]}
    if config:
        data["config"] = config

    lines = []
    for name, number in result["final"].items():
        metric, _, split = name.partition(" ")
        data["split"] = split or task.dev[0]
        entry = {
            "type": METRICS.get(metric, metric),
            "value": number,
            "name": f"{metric}, {facts(result)}",
        }
        lines.append(f"  - task: {to_yaml({'type': kind})}")
        lines.append(f"    dataset: {to_yaml(data)}")
        lines.append(f"    metrics: {to_yaml([entry])}")
    return lines


def to_yaml(value):
    """Write a value as JSON on one line, which is YAML too. Unprintable characters are escaped."""
    return printable(json.dumps(value, ensure_ascii=False))


def mask_card(result, kept, total):
    """Write the README.md of a folder with a run's mask, which keeps `kept` of `total` weights."""
    name, base = backbone(result)
    trained = "none of its weights was trained"
    if "vectors" in METHODS[result["method"]].trains:
        trained = "its biases and LayerNorms trained too, and are in the mask's file"
    head = ""
    if result["head"] == "classifier":
        head = " A fresh classifier trained too, and is in the mask's file."
    ask, flags = '--text "..."', "`--text`"
    if len(TASKS[result["task"]].text) == 2:
        ask += ' --pair "..."'
        flags += " and `--pair`"

    return front_matter(result, OURS, "adapter") + MASK_CARD.format(
        task=result["task"],
        method=result["method"],
        backbone=name,
        kept=kept,
        total=total,
        density=kept / total,
        sparsity=1 - kept / total,
        final=show(result["final"]),
        facts=facts(result),
        trained=trained,
        head=head,
        where="" if base else f", and BACKBONE the folder of {name}",
        model="" if base else " --model BACKBONE",
        ask=ask,
        flags=flags,
        data="; `--data-dir` names the data" if result["data_dir"] else "",
    )


def adapter_config(result, sha256, density):
    """Return what adapter_config.json holds.

    sha256: that of the backbone's model.safetensors, or None.
    """
    name, base = backbone(result)
    return {
        "base_model_name_or_path": base or name,
        "base_model_sha256": sha256,
        "base_model_fingerprint": result["fingerprint"],
        "format": MASKS,
        "task": result["task"],
        "method": result["method"],
        "density": density,
        "head": result["head"],
        "label_words": result["words"],
        "max_length": result["length"],
    }
