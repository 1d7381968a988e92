"""Mask files: what a run learnt, one bit a weight or less, in one safetensors file with the run's description.

What it is: the format, writing, and reading that trusts nothing. What it is not: it knows no method and no model, only
names and shapes. Sources: none; the format is this project's.

    content = pack_masks({"layer.0.weight": torch.ones(3, 5, dtype=torch.bool)}, {"task": "movies"})
    masks, head, run = load_masks(path)

Format: a uint8 tensor for each matrix, its bits in rows, packed from the highest bit, and compressed with lzma where
that is shorter; float tensors of a fresh head, if there is one; metadata format, shapes and run (JSON), and the sha256
of it all.
"""

import hashlib
import json
import lzma
import math

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

FORMAT = "smp-mask-2"
MOST_WEIGHTS = 1 << 32  # of a file, so that a hostile one cannot ask for all memory


def pack_masks(masks, run, head=None):
    """{name: bool [out, in]}, a dict that describes the run, {name: float tensor} of a head -> bytes of a file."""
    packed = {name: np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
    tensors = {name: shortest(bits, masks[name].float().mean().item()) for name, bits in packed.items()}
    tensors |= {name: tensor.detach().cpu().numpy() for name, tensor in (head or {}).items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    header = {"format": FORMAT, "shapes": json.dumps(shapes), "run": json.dumps(run)}
    return save(tensors, header | {"sha256": digest(header, tensors)})


def shortest(bits, density):
    """Packed bits, or their lzma where that is shorter; tried only if chance leaves something to gain."""
    entropy = -sum(p * math.log2(p) for p in (density, 1 - density) if p)  # of a bit, in bits
    packed = np.frombuffer(lzma.compress(bits), np.uint8) if entropy < 0.95 else bits
    return min(bits, packed, key=len)


def digest(header, tensors):
    found = hashlib.sha256(json.dumps([header[key] for key in ("format", "shapes", "run")]).encode())
    for name, array in sorted(tensors.items()):
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()


def read(path):
    """A mask file -> (tensors {name: array}, shapes {name: [out, in]}, the run's description), nothing unpacked yet.

    Raises ValueError that says why the file cannot be used.
    """
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two: of numbers that numpy does not know
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a mask file of format {FORMAT}")
    if not {"shapes", "run", "sha256"} <= header.keys() or header["sha256"] != digest(header, tensors):
        raise ValueError(f"{path} was altered: its content is not what its sha256 says")
    try:
        shapes, run = json.loads(header["shapes"]), json.loads(header["run"])
        if not all(len(shape) == 2 and all(type(n) is int and n > 0 for n in shape) for shape in shapes.values()):
            raise ValueError("shapes that are none")
        if sum(math.prod(shape) for shape in shapes.values()) > MOST_WEIGHTS:
            raise ValueError("more weights than memory")
        if any(tensors[name].dtype != (np.uint8 if name in shapes else np.float32) for name in {*tensors, *shapes}):
            raise ValueError("numbers of another kind")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise wrong(path, error) from None
    return tensors, shapes, run


def load_masks(path, expected=None):
    """Read a mask file -> ({name: bool [out, in]}, {name: tensor of the head}, the run's description).

    expected: {name: shape} of the matrices that there must be. Raises ValueError that says why the file cannot be used.
    """
    tensors, shapes, run = read(path)
    if expected is not None and {name: tuple(shape) for name, shape in shapes.items()} != expected:
        raise ValueError(f"{path} was made for a backbone of another shape")
    try:
        masks = {name: unpacked(tensors.pop(name), shape) for name, shape in shapes.items()}
    except (ValueError, lzma.LZMAError) as error:
        raise wrong(path, error) from None
    return masks, {name: torch.from_numpy(array) for name, array in tensors.items()}, run


def wrong(path, error):
    return ValueError(f"{path} does not hold what its header says ({type(error).__name__}: {error})")


def unpacked(bits, shape):
    """A tensor of the file -> bool [out, in]. Raises ValueError or LZMAError when it is not one bit a weight."""
    weights = math.prod(shape)
    size = -(-weights // 8)
    if bits.size < size:
        bits = np.frombuffer(lzma.LZMADecompressor().decompress(bits.tobytes(), max_length=size + 1), np.uint8)
    if bits.size != size:
        raise ValueError(f"{bits.size} bytes for {weights} weights")
    return torch.from_numpy(np.unpackbits(bits, count=weights).reshape(shape).view(bool))
