"""Model cards as the model hub reads them, and what an adapter says beside its weights: the words, no files.

A card is a README.md that begins with metadata in YAML. Whatever comes out of a run is written as JSON, which is YAML
too, so that no name can break it.

    text = front_matter(result, "transformers") + "# What it is"
"""

import json
from pathlib import Path

from data import TASKS
from mask import METHODS
from plumbing import fetch
from plumbing.cli import printable, show
from plumbing.files import MASKS

OURS = "static-model-pruning"  # the library, where only this code reads a folder
# Names on the hub, where they are others than ours: of models that come from elsewhere, of data sets, of metrics.
BACKBONES = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
DATASETS = {
    "squad": ("rajpurkar/squad", "plain_text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank"),
}
DATASETS |= {f"wikitext{n}": ("Salesforce/wikitext", f"wikitext-{n}-v1") for n in (2, 103)}
DATASETS |= {
    task: ("nyu-mll/glue", task) for task in "rte mrpc cola stsb sst2 qnli qqp mnli wnli".split()
}
METRICS = {
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "em": "exact_match",
}

MASK_CARD = """# {task}: a mask for {backbone}

One bit for each of {total:,} weights of {backbone} says whether it stays. {kept:,} do: density {density:.4f}, sparsity
{sparsity:.4f}. The backbone is not in this folder; {trained} (method {method}).{head}

Dev: {final} ({facts}).

## Use it

With the code of *Static Model Pruning, from scratch*, where FOLDER is this one{where}:

```sh
pip install -r requirements.txt
python eval.py FOLDER/mask.safetensors{model} {ask}
```

Without {flags} it evaluates the dev split again{data}. It refuses a file that was altered, and any other backbone than
the one that the mask was learnt for.

## Files

`mask.safetensors` is the mask, packed; `unpack_bits` in `plumbing/files.py` says how. `adapter_config.json` holds

| key | meaning |
|---|---|
| `base_model_name_or_path` | the backbone |
| `base_model_sha256` | of its `model.safetensors`; null if its weights stand in several files |
| `base_model_fingerprint` | sha256 of all its weights by name, however they are stored |
| `format` | of `mask.safetensors` |
| `task`, `method`, `density` | what was learnt, how, and the share of weights kept |
| `head`, `label_words` | what answers, and for each label the word whose logit counts |
| `max_length` | of inputs, in tokens |
"""


def backbone(result):
    """-> (what the model of a run is called, its name on the hub or None). Of a folder only the name, not the path."""
    known = BACKBONES | {name: repository for name, (repository, _) in fetch.HUB.items()}
    model = result["model"]
    return printable(model if model in fetch.MODELS else Path(model).name), known.get(model)


def facts(result):
    """How a run came to its result, as far as it is known: words of the seed, the steps and the commit."""
    known = {"seed": "seed {}", "steps": "{} steps", "commit": "commit {}"}
    told = [
        printable(form.format(result[key]))
        for key, form in known.items()
        if result.get(key) is not None
    ]
    return ", ".join(told + ["with changes that are in no commit"] * (result.get("clean") is False))


def front_matter(result, library, relation=None):
    """-> the lines of metadata of a card, between ---.

    library: the one that loads the folder; relation: to the base model, if it is not "finetune". The licence is left
    out, since nobody has stated it; so is what has no name on the hub.
    """
    _, base = backbone(result)
    task = TASKS[result["task"]]
    dataset, config = DATASETS.get(result["task"], (None, None))
    if result["data_dir"]:  # of one's own, perhaps
        dataset = None

    lines = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": library,
    }
    lines["tags"] = ["pruning", "sparsity", OURS, result["method"]]
    lines["datasets"] = [dataset] if dataset else None
    lines["metrics"] = [METRICS.get(metric, metric) for metric in task.metrics]
    text = [f"{key}: {value(found)}" for key, found in lines.items() if found is not None]

    name = f"{result['task']}-{backbone(result)[0]}-{result['method']}"
    kind = (
        "text-generation"
        if task.load
        else "question-answering"
        if task.every_token
        else "text-classification"
    )
    data = {
        "name": result["task"],
        "type": dataset or result["task"],
        "config": config if dataset else None,
    }
    text += ["model-index:", f"- name: {value(name)}", "  results:"]
    for name, number in result["final"].items():
        metric, _, split = name.partition(" ")
        data["split"] = split or task.dev[0]
        about = {
            "type": METRICS.get(metric, metric),
            "value": number,
            "name": f"{metric}, {facts(result)}",
        }
        text.append(f"  - task: {value({'type': kind})}")
        text.append(f"    dataset: {value({key: found for key, found in data.items() if found})}")
        text.append(f"    metrics: {value([about])}")
    return "\n".join(["---", *text, "---", "", ""])


def value(found):
    """A value of JSON on one line, which is a value of YAML too; what cannot be printed is escaped."""
    return printable(json.dumps(found, ensure_ascii=False))


def mask_card(result, kept, total):
    """The README.md of a folder that holds the mask of a run, which keeps so many of all prunable weights."""
    name, base = backbone(result)
    pair = len(TASKS[result["task"]].text) == 2
    words = {key: result[key] for key in ("task", "method")} | {
        "backbone": name,
        "kept": kept,
        "total": total,
    }
    words |= {"density": kept / total, "sparsity": 1 - kept / total}
    words |= {"final": show(result["final"]), "facts": facts(result)}
    own = result["head"] == "classifier"
    words["trained"] = "none of its weights was trained"
    if METHODS[result["method"]].vectors:
        words["trained"] = "its biases and LayerNorms trained too, and are in the mask's file"
    words["head"] = " A fresh classifier trained too, and is in the mask's file." if own else ""
    words["where"] = "" if base else f", and BACKBONE the folder of {name}"
    words["model"] = "" if base else " --model BACKBONE"
    words["ask"] = '--text "..."' + ' --pair "..."' * pair
    words["flags"] = "`--text`" + " and `--pair`" * pair
    words["data"] = "; `--data-dir` names the data" if result["data_dir"] else ""
    return front_matter(result, OURS, "adapter") + MASK_CARD.format(**words)


def adapter_config(result, sha256, density):
    """What adapter_config.json holds. sha256: of the backbone's model.safetensors, or None."""
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
