"""Mask files: what a run learnt, one bit a weight, in a safetensors file with the run's description.

What it is: the format, writing and checked reading. What it is not: it knows no method and no model, only names and
shapes. Sources: none; the format is this project's.

    content = pack_masks({"layer.0.weight": torch.ones(3, 5, dtype=torch.bool)}, {"task": "movies"})
    masks, run = load_masks(path, {"layer.0.weight": (3, 5)})
"""

import json
import math

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FORMAT = "smp-mask-1"


def pack_masks(masks, metadata):
    """{name: bool [out, in]} and a dict for people and checks -> bytes of a safetensors file, one bit a weight."""
    bits = {name: np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    header = {"format": FORMAT, "shapes": json.dumps(shapes), "run": json.dumps(metadata)}
    return save(bits, header)


def load_masks(path, shapes):
    """Read a mask file -> ({name: bool [out, in]}, metadata dict).

    shapes: {name: (out, in)} of the backbone's prunable weights; the file must hold exactly these.
    Raises ValueError that says why the file cannot be used.
    """
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a mask file of format {FORMAT}")
    stored = {name: tuple(shape) for name, shape in json.loads(header.get("shapes", "{}")).items()}
    if stored != {name: tuple(shape) for name, shape in shapes.items()} or stored.keys() != bits.keys():
        raise ValueError(f"{path} was made for a backbone of another shape")
    masks = {}
    for name, shape in stored.items():
        if bits[name].dtype != np.uint8 or bits[name].size != -(-math.prod(shape) // 8):
            raise ValueError(f"{path}: {name} has {bits[name].size} bytes, not one bit a weight")
        unpacked = np.unpackbits(bits[name], count=math.prod(shape)).reshape(shape)
        masks[name] = torch.from_numpy(unpacked.astype(bool))
    return masks, json.loads(header.get("run", "{}"))
