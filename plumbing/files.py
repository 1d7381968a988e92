"""Atomic writes, and sealed files: nothing reads a file that was cut short or altered.

A sealed file is a safetensors file. Its metadata hold a format, a description (JSON) and the sha256
of everything. Masks and checkpoints are sealed files.

    write_whole(path, seal("my-format-1", {"scores": tensor}, {"step": 300}))
    tensors, description = unseal(path, "my-format-1")
"""

import hashlib
import json
import lzma
import math
import os
import secrets
from contextlib import contextmanager, suppress

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

MASKS = "smp-mask-3"

# --- files, whole or not at all ---------------------------------------------------------------


def write_whole(path, content):
    """Write bytes atomically: the file appears whole or not at all. Its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    part = part_path(path)
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def part_path(path):
    """A new name beside a path, for what is not yet whole."""
    return path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")


def json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path):
    """Read a JSON file that holds an object -> dict. Raises ValueError if it does not."""
    with prefix_errors(f"{path} is not valid JSON"):
        stored = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(stored, dict):
            raise ValueError("it is not an object")
        return stored


def read_lines(path):
    """Yield the lines of a text, as split_lines finds them. Raises ValueError if it is not UTF-8.

    One at a time, because tables and texts may be large.
    """
    with open(path, "rb") as file, prefix_errors(f"{path} is not UTF-8"):
        for number, line in enumerate(file):
            text = line.decode("utf-8" if number else "utf-8-sig")
            yield text.removesuffix("\n").removesuffix("\r")


def split_lines(text):
    """A text -> its lines, which end at \\n or \\r\\n alone: it may hold other separators."""
    *lines, rest = text.split("\n")
    if rest:  # the last line need not end
        lines.append(rest)
    return [line.removesuffix("\r") for line in lines]


@contextmanager
def prefix_errors(prefix):
    """Put a prefix, such as a path, in front of the message of any ValueError raised inside."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # JSON may be nested too deeply
        raise ValueError(f"{prefix}: {str(error).removeprefix(f'{prefix}: ')}") from None


def lock(file):
    """Lock an open file until it is closed. Raises ValueError if another process holds the lock.

    Windows has no such locks, and neither do some network file systems. There, let only one process
    write to a folder.
    """
    with suppress(ImportError, OSError):  # no locks here
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is writing to {file.name}; wait for it, or name another --out"
            ) from None


# --- digests and seals ------------------------------------------------------------------------


def digest(tensors, description=""):
    """sha256 of a text and of tensors {name: tensor}, in the order of their names."""
    hasher = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return hasher.hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def check_digest(content, algorithm, expected, name):
    """Raise ValueError that names the file, unless bytes have the expected digest."""
    actual = hashlib.new(algorithm, content).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{name}: {algorithm} is {actual}, not {expected}; "
            "it was altered or cut, and is not used"
        )


def signed_json(values):
    """A dict that JSON can hold -> the bytes of a JSON file with its own sha256 in it."""
    return json_bytes(values | {"digest": sha256(json_bytes(values))})


def read_signed_json(path):
    """Invert signed_json. Raises ValueError if the file was altered."""
    stored = read_json(path)
    if stored.pop("digest", None) != sha256(json_bytes(stored)):
        raise ValueError(f"{path} was altered, or is the result of another version of train.py")
    return stored


def seal(file_format, tensors, description):
    """Tensors {name: tensor} and a description that JSON can hold -> the bytes of a sealed file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, header_of(file_format, tensors, json.dumps(description)))


def header_of(file_format, tensors, text):
    checksum = digest(tensors, file_format + text)
    return {"format": file_format, "description": text, "sha256": checksum}


def unseal(path, file_format):
    """Read a sealed file of this format -> (tensors, description).

    Raises ValueError that says why the file cannot be used.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            names = file.keys()  # safe_open cannot be iterated itself
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:
        # KeyError: torch does not know the dtype.
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    text = header.get("description", "")
    if header != header_of(file_format, tensors, text):
        raise ValueError(f"{path} was altered, or is not of format {file_format}")
    return tensors, json.loads(text)


# --- masks: one bit per weight, or less -------------------------------------------------------


def pack_masks(masks, run, others):
    """Pack masks {name: bool [out, in]} -> the bytes of a mask file.

    run: a dict that describes the run. others: trained float32 tensors {name: tensor}.
    """
    tensors = {name: pack_bits(mask) for name, mask in masks.items()}
    return seal(MASKS, tensors | others, {"run": run, "shapes": shapes_of(masks)})


def pack_bits(mask):
    """bool [out, in] -> uint8 [bytes], eight weights per byte, the first in the highest bit.

    lzma compresses the bits further wherever that makes them shorter.
    """
    bits = np.packbits(mask.cpu().numpy())
    density = mask.float().mean()
    if not 0.37 < density < 0.63:  # between these, random bits leave nothing to gain
        packed = np.frombuffer(lzma.compress(bits), np.uint8)
        bits = min(bits, packed, key=len)
    return torch.tensor(bits)


def unpack_bits(stored, shape):
    """Invert pack_bits -> bool [out, in]."""
    weights = math.prod(shape)
    size = math.ceil(weights / 8)
    bits = stored.numpy()
    if bits.size < size:
        # max_length, because a few bytes of a stranger's file may unpack to gigabytes
        unpacked = lzma.LZMADecompressor().decompress(bits.tobytes(), max_length=size)
        bits = np.frombuffer(unpacked, np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=weights).reshape(shape).view(bool))


def load_masks(path, shapes, others=None):
    """Read a mask file -> (masks {name: bool [out, in]}, other trained tensors in float32).

    shapes: {name: [out, in]} of the matrices that the file must cover. others: {name: shape} of the
    other tensors, by default any. Raises ValueError that says why the file cannot be used.
    """
    tensors, description = unseal(path, MASKS)
    if description["shapes"] != shapes:
        raise ValueError(f"{path} was made for a backbone of another shape")
    masks = {name: unpack_bits(tensors.pop(name), shape) for name, shape in shapes.items()}
    if others is not None and shapes_of(tensors) != others:
        raise ValueError(f"{path} holds other weights beside its mask than its method trains")
    return masks, tensors


def shapes_of(tensors):
    """{name: tensor} -> {name: shape}, as JSON holds it."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
