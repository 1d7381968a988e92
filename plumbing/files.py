"""Files that appear whole or not at all, and sealed files, which are refused when a bit of them has changed.

A sealed file is a safetensors file whose metadata hold a format, a description (JSON) and the sha256 of it all. Masks
and checkpoints are sealed files.

    write_whole(path, seal("smp-checkpoint-2", {"scores": tensor}, {"step": 300}))
    tensors, description = unseal(path, "smp-checkpoint-2")
"""

import errno
import hashlib
import json
import lzma
import math
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
PART = re.compile(r"\.part-[0-9a-f]{8}-.+")  # names of partial files
STALE = 24 * 60 * 60  # seconds after which a partial file is of a process that was killed
LARGEST_TEXT = 1 << 31  # bytes of a file that is read at once
MASKS = "smp-mask-3"

# --- one file, whole or not at all ---------------------------------------------------------------------------


@contextmanager
def partial_file(path):
    """A Path beside `path` to write to and then move there; what is not moved is removed. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, STALE)
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def partial_folder(folder):
    """A new folder to fill, which then takes the place of `folder`, a new or empty one; or else is removed."""
    with partial_file(folder) as part:
        part.mkdir()
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder, age=0):
    """Remove what is partial in a folder and so many seconds old: of processes that were killed."""
    for part in folder.glob(".part-*"):
        with suppress(OSError):  # another process may be quicker, or it may be another user's
            if not PART.fullmatch(part.name) or time.time() - part.lstat().st_mtime < age:
                continue
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


def write_whole(path, content):
    """Write bytes to a file that appears whole or not at all."""
    with partial_file(path) as part:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def regular(path):
    """The path itself, of a file that has an end. Raises ValueError if there is none, or it is a pipe or too large."""
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}")
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if found.st_size > LARGEST_TEXT and not str(path).endswith(".safetensors"):
        raise ValueError(f"{path} is larger than {LARGEST_TEXT:,} bytes")
    return path


def read_json(path):
    """Raises ValueError that names the file when it is not JSON."""
    regular(path)
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise ValueError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def named(path):
    """Put a file's or folder's name before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def lock(file):
    """Hold an open file until it is closed, where the system has locks. Raises ValueError when another process does."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is writing to {file.name}; wait for it, or name another --out"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{file.name}: this file system has no locks, so let only one process write there")


# --- what a file holds ---------------------------------------------------------------------------------------


def digest(tensors, description=""):
    """sha256 of a text and of tensors {name: tensor}, in the order of their names."""
    found = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()


def file_digest(path, algorithm="sha256"):
    with open(regular(path), "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def check_digest(content, algorithm, expected, name=None):
    """Raise ValueError unless the digest of bytes, or of the file at a Path, is the expected one."""
    if isinstance(content, bytes):
        found = hashlib.new(algorithm, content).hexdigest()
    else:
        found = file_digest(content, algorithm)
    if found != expected:
        raise ValueError(
            f"{name or content}: {algorithm} is {found}, not {expected}; it was altered or cut, and is not used"
        )


def check_types(stored, types, what):
    """Raise ValueError unless `stored` is a dict whose values under the keys of {key: type or types} are of them."""
    if not isinstance(stored, dict):
        raise ValueError(f"{what}: it is not an object")
    for key, kinds in types.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(stored.get(key)) not in kinds:  # not isinstance: True is no number
            raise ValueError(f"{what}: {key} is {stored.get(key)!r:.80}")


def seal(form, tensors, description):
    """-> bytes of a sealed file: tensors {name: tensor} and a description that JSON can hold."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    return save(
        tensors, {"format": form, "description": text, "sha256": digest(tensors, form + text)}
    )


def unseal(path, form):
    """A sealed file of this format -> (tensors, description). Raises ValueError that says why it cannot be used."""
    try:
        with safe_open(regular(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (
        SafetensorError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # the last: a dtype torch does not know
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != form:
        raise ValueError(f"{path} is not a file of format {form}")
    text = header.get("description", "")
    if header.get("sha256") != digest(tensors, form + text):
        raise ValueError(f"{path} was altered: its content is not what its sha256 says")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its description is not valid JSON: {error}") from None


# --- masks: one bit a weight, or less ------------------------------------------------------------------------


def pack_masks(masks, run, others):
    """-> bytes of a mask file.

    masks: {name: bool [out, in]}; run: a dict that describes the run; others: {name: float32 tensor} that trained.
    """
    tensors = {name: pack_bits(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return seal(MASKS, tensors | others, {"run": run, "shapes": shapes})


def pack_bits(mask):
    """bool [out, in] -> uint8: rows of bits, highest bit first; compressed with lzma where that is shorter."""
    bits = np.packbits(mask.cpu().numpy())
    density = mask.float().mean().item()
    entropy = -sum(p * math.log2(p) for p in (density, 1 - density) if p)  # of a bit, in bits
    if entropy < 0.95:  # above, chance leaves nothing to gain
        packed = np.frombuffer(lzma.compress(bits), np.uint8)
        bits = min(bits, packed, key=len)
    return torch.tensor(bits)


def unpack_bits(stored, shape):
    """The inverse of pack_bits. Raises ValueError or LZMAError when it is not one bit a weight."""
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        raise ValueError(f"a tensor {list(stored.shape)} of {stored.dtype}")
    weights = math.prod(shape)
    size = -(-weights // 8)
    bits = stored.numpy()
    if bits.size < size:  # max_length: a few bytes may unpack to gigabytes
        bits = np.frombuffer(
            lzma.LZMADecompressor().decompress(bits.tobytes(), max_length=size + 1), np.uint8
        )
    if bits.size != size:
        raise ValueError(f"{bits.size} bytes for {weights} weights")
    return torch.from_numpy(np.unpackbits(bits, count=weights).reshape(shape).view(bool))


def read_masks(path):
    """A mask file -> (tensors {name: tensor}, {"run": what describes the run, "shapes": {name: [out, in]}}).

    Nothing is unpacked yet. Raises ValueError that says why the file cannot be used.
    """
    tensors, description = unseal(path, MASKS)
    check_types(description, {"run": dict, "shapes": dict}, f"{path} does not hold what it says")
    return tensors, description


def load_masks(path, shapes):
    """Read a mask file -> ({name: bool [out, in]}, {name: float32 tensor that trained}, the run's description).

    shapes: {name: (out, in)} of the matrices that there must be. Raises ValueError that says why the file cannot be
    used.
    """
    tensors, description = read_masks(path)
    if description["shapes"] != {name: list(shape) for name, shape in shapes.items()}:
        raise ValueError(f"{path} was made for a backbone of another shape")
    masks = {}
    for name, shape in shapes.items():
        try:
            masks[name] = unpack_bits(tensors.pop(name), shape)
        except (KeyError, ValueError, lzma.LZMAError) as error:
            raise ValueError(f"{path} does not hold what it says: {name}: {error}") from None
    return masks, tensors, description["run"]
