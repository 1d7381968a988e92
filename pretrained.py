"""A folder's config.json and model.safetensors -> a Bert, strictly: every tensor is used once or known to be unused.

What it is: what checkpoints call things, and everything that can be wrong with their files. What it is not: it
downloads nothing, and computes nothing. Sources: names as published by the authors of BERT and RoBERTa.

    model = load_model("folder/with/config.json and model.safetensors", words=[2053, 2748])
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import PER_LAYER, Bert, Config

# Tensors that checkpoints carry and that no model here uses, or none with that head.
UNUSED = ("cls.seq_relationship.", "bert.embeddings.position_ids")
UNUSED_BY_HEAD = {"words": ("bert.pooler.", "classifier."), "classifier": ("cls.",)}

# Stored copies of tied tensors: name in the file -> the tensor that must hold the same numbers.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

# RoBERTa's names for the same tensors.
ROBERTA = {
    "roberta.": "bert.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.": "cls.predictions.",
}

SUPPORTED = {"hidden_act": ["gelu"], "position_embedding_type": ["absolute"], "model_type": ["bert", "roberta"]}
FIELDS = [field for field in fields(Config) if field.name not in PER_LAYER]
LARGEST = {"num_hidden_layers": 1000}  # each takes time to make, before the weights show that they are not there


def load_config(folder):
    """Read FOLDER/config.json. Raises ValueError that names the key when it is no model we can compute."""
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text("utf-8"))
        values = {f.name: stored[f.name] if f.default is MISSING else stored.get(f.name, f.default) for f in FIELDS}
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    for field in FIELDS:
        value, lowest = values[field.name], int(field.default is MISSING)
        highest = LARGEST.get(field.name, 1 << 24 if field.type is int else 1)
        if field.name in SUPPORTED:
            if value not in SUPPORTED[field.name]:
                raise ValueError(f"{path}: {field.name} is {value!r}, not {' or '.join(SUPPORTED[field.name])}")
        elif type(value) not in (int, field.type) or not lowest <= value <= highest:
            wanted = f"{field.type.__name__} of at least {lowest} and at most {highest}"
            raise ValueError(f"{path}: {field.name} is {value!r}, not {wanted}")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise ValueError(f"{path}: hidden_size is not divisible by num_attention_heads")
    for name, highest in PER_LAYER.items():
        counts = stored.get(name, [])
        if not isinstance(counts, list) or len(counts) not in (0, values["num_hidden_layers"]):
            raise ValueError(f"{path}: {name} is not a list of one number a layer")
        if not all(type(count) is int and 0 <= count <= values[highest] for count in counts):
            raise ValueError(f"{path}: {name} has a number that is not in 0 to {highest}")
        values[name] = tuple(counts)
    return Config(**values)


def canonical(name):
    """A checkpoint's tensor name -> this model's: RoBERTa's, LayerNorm.gamma/beta, encoders saved without `bert.`."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    for theirs, ours in ROBERTA.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"


def published(name, model_type):
    """The inverse of canonical: the name under which checkpoints of this model_type store a tensor."""
    for theirs, ours in ROBERTA.items() if model_type == "roberta" else ():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def read_weights(path):
    """Tensors of a safetensors file in float32 under canonical names, without the unused and the tied ones.

    Raises ValueError for an unreadable file, a tensor stored twice, or a decoder that is not tied.
    """
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name, tensor in stored.items():
        if canonical(name) in tensors:
            raise ValueError(f"{path} holds {canonical(name)} twice, once as {name}")
        if not canonical(name).startswith(UNUSED):
            if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise ValueError(f"{path}: {name} is of {tensor.dtype}; weights of 16, 32 or 64 bits are known")
            tensors[canonical(name)] = tensor.float()
    for copy, original in TIED.items():
        if copy in tensors and not torch.equal(tensors.pop(copy), tensors.get(original, torch.empty(0))):
            raise ValueError(f"{path}: {copy} differs from {original}; only tied decoders are supported")
    return tensors


def load_model(folder, words, head="words", fresh=True, read=read_weights):
    """A folder with config.json and model.safetensors -> Bert in float32 on the CPU, in training mode.

    head: "words", or "classifier": fresh, or the file's; on the file's pooler where there is one. read: as
    read_weights; one that remembers lets several models share what they do not change.
    Raises ValueError that names the tensor when one is missing, unknown or misshapen, and when a word id lies
    outside the vocabulary; OSError when a file is missing.
    """
    path = Path(folder) / "model.safetensors"
    config, tensors = load_config(folder), read(path)
    if max(words) >= config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has more words than the vocab_size of config.json")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNUSED_BY_HEAD[head])}
    if head == "classifier" and fresh:
        tensors["classifier.weight"] = 0.02 * torch.randn(len(words), config.hidden_size)
        tensors["classifier.bias"] = torch.zeros(len(words))
    try:
        return Bert.of(config, words, tensors, head)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
