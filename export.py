"""Write a finished run as an ordinary model folder that other libraries load.

What it is: the backbone's own files with the removed weights set to zero, and a README that says how to use them.
What it is not: it makes nothing smaller or faster; zeros are multiplied like other numbers. Sources: none.

    python eval.py RUN --export FOLDER
"""

import json
import shutil

from safetensors import safe_open
from safetensors.torch import save

from data import TASKS
from fetch import write_whole
from model import canonical

COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
)

README = """# {task}, pruned to a density of {density:.4f}

{model} with the weights that {method} removed set to zero; nothing else changed{head}. Dev: {final}.

The logit of a class is the logit of its label word, read at {where}:

{words}

```python
import torch
from transformers import AutoTokenizer, {loader}

tokenizer, model = AutoTokenizer.from_pretrained("."), {loader}.from_pretrained(".").eval()
hidden = model(**tokenizer({text}, return_tensors="pt")){output}
print({logits})
```
"""


def export(folder, source, result, masks, words):
    """Fill a new folder from a model folder and the masks {name: bool} of a run on it; words: ids of the label words.

    Raises ValueError when the folder holds something already, or the run has a head that other libraries lack.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--export: {folder} holds files already; name another folder")
    if result["head"] != "words":
        raise ValueError("--export: a fresh head has no place in an ordinary model folder; it stays in the mask file")
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


def describe(result, tensors, ids, source):
    """The text of the exported folder's README."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    kind = "Roberta" if config.get("model_type") == "roberta" else "Bert"
    with_head = any(canonical(name).startswith("cls.") for name in tensors)
    at = "" if result["task"] == "squad" else "[:, 0]"
    words = "\n".join(
        f"- {label}: {word!r}, id {i}" for (label, word), i in zip(result["words"].items(), ids, strict=True)
    )
    embedding = "model.embeddings.word_embeddings.weight"
    return README.format(
        **{key: result[key] for key in ("task", "density", "model", "method")},
        final=", ".join(f"{name} {value:.4f}" for name, value in result["final"].items()),
        head=""
        if with_head
        else "; it has no masked-LM head, so the first state times the word's embedding is the logit",
        words=words,
        loader=f"{kind}ForMaskedLM" if with_head else f"{kind}Model",
        where="the first token" if at else "every token, for start and end of the answer",
        text='"a text", "its pair"' if len(TASKS[result["task"]].text) == 2 else '"a text"',
        output=(".logits" if with_head else ".last_hidden_state") + at,
        logits=f"hidden[..., {ids}]" if with_head else f"hidden @ {embedding}[{ids}].T",
    )
