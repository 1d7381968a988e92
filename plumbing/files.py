"""Atomic writes, and sealed files: nothing reads a file that was cut short or altered.

A sealed file is a safetensors file. Its metadata hold a format, a description (JSON) and the sha256
of everything. Masks and checkpoints are sealed files.

    write_whole(path, seal("smp-checkpoint-3", {"scores": tensor}, {"step": 300}))
    tensors, description = unseal(path, "smp-checkpoint-3")
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
PART = re.compile(r"\.part-[0-9a-f]{8}-.+")  # the names of partial files
STALE = 24 * 60 * 60  # seconds; an older partial file was left by a process that was killed
MAX_TEXT_BYTES = 1 << 31  # the largest file that is read in one piece, weights excepted
MASKS = "smp-mask-3"

# --- one file, whole or not at all ------------------------------------------------------------


@contextmanager
def partial_file(path):
    """Yield a Path beside `path`. Write to it, then move it to `path`; otherwise it is removed.

    The folder is created if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, STALE)
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def partial_folder(folder):
    """Yield a new folder to fill. It then replaces `folder`, which must be missing or empty.

    After an error it is removed.
    """
    with partial_file(folder) as part:
        part.mkdir()
        try:
            yield part
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder, age=0):
    """Remove partial files at least `age` seconds old, which killed processes left behind."""
    for part in folder.glob(".part-*"):
        with suppress(OSError):  # another process may be quicker, or another user may own it
            if not PART.fullmatch(part.name) or time.time() - part.lstat().st_mtime < age:
                continue
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


def write_whole(path, content):
    """Write bytes atomically: the file appears whole or not at all."""
    with partial_file(path) as part:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def require_regular_file(path):
    """Return the path. Raises ValueError if it is missing, too large, or a pipe or device.

    A pipe or a device may never end, so reading it could hang.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}")
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if info.st_size > MAX_TEXT_BYTES and not str(path).endswith(".safetensors"):
        raise ValueError(f"{path} is larger than {MAX_TEXT_BYTES:,} bytes")
    return path


def read_json(path):
    """Read a JSON file. Raises ValueError that names the file if it is not JSON."""
    require_regular_file(path)
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise ValueError(f"{path} is not valid JSON: {error}") from None


@contextmanager
def prefix_errors(path):
    """Put a path in front of the message of any ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{path}: "):  # it says so already
            raise
        raise ValueError(f"{path}: {error}") from None


def lock(file):
    """Lock an open file until it is closed. Raises ValueError if another process holds the lock.

    A system without locks gets a warning at most.
    """
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


# --- digests and seals ------------------------------------------------------------------------


def digest(tensors, description=""):
    """sha256 of a text and of tensors {name: tensor}, in the order of their names."""
    hasher = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return hasher.hexdigest()


def file_digest(path, algorithm="sha256"):
    with open(require_regular_file(path), "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def check_digest(content, algorithm, expected, name=None):
    """Raise ValueError unless bytes, or the file at a Path, have the expected digest."""
    if isinstance(content, bytes):
        found = hashlib.new(algorithm, content).hexdigest()
    else:
        found = file_digest(content, algorithm)
    if found != expected:
        raise ValueError(
            f"{name or content}: {algorithm} is {found}, not {expected}; "
            "it was altered or cut, and is not used"
        )


def check_types(stored, types, what):
    """Raise ValueError unless `stored` is a dict with a value of the right type for each key.

    types: {key: type, or a tuple of types}. The error begins with `what`.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{what}: it is not an object")
    for key, allowed in types.items():
        if not isinstance(allowed, tuple):
            allowed = (allowed,)
        if type(stored.get(key)) not in allowed:  # isinstance would accept True as an int
            raise ValueError(f"{what}: {key} is {stored.get(key)!r:.80}")


def seal(file_format, tensors, description):
    """Tensors {name: tensor} and a description that JSON can hold -> the bytes of a sealed file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(description)
    checksum = digest(tensors, file_format + text)
    return save(tensors, {"format": file_format, "description": text, "sha256": checksum})


def unseal(path, file_format):
    """Read a sealed file of this format -> (tensors, description).

    Raises ValueError that says why the file cannot be used.
    """
    try:
        with safe_open(require_regular_file(path), "pt") as file:
            header = file.metadata() or {}
            names = file.keys()  # safe_open cannot be iterated itself
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:
        # KeyError: torch does not know the dtype.
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if header.get("format") != file_format:
        found = header.get("format")
        raise ValueError(f"{path} is not a file of format {file_format}, but of {found}")

    text = header.get("description", "")
    if header.get("sha256") != digest(tensors, file_format + text):
        raise ValueError(f"{path} was altered: its content does not match its sha256")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its description is not valid JSON: {error}") from None


# --- masks: one bit per weight, or less -------------------------------------------------------


def pack_masks(masks, run, others):
    """Pack masks {name: bool [out, in]} -> the bytes of a mask file.

    run: a dict that describes the run. others: trained float32 tensors {name: tensor}.
    """
    tensors = {name: pack_bits(mask) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    return seal(MASKS, tensors | others, {"run": run, "shapes": shapes})


def pack_bits(mask):
    """bool [out, in] -> uint8 [bytes], eight weights per byte, the first in the highest bit.

    lzma compresses the bits further wherever that makes them shorter.
    """
    bits = np.packbits(mask.cpu().numpy())
    density = mask.float().mean().item()
    entropy = -sum(p * math.log2(p) for p in (density, 1 - density) if p)  # bits per weight
    if entropy < 0.95:  # above this, random bits leave nothing to gain
        packed = np.frombuffer(lzma.compress(bits), np.uint8)
        bits = min(bits, packed, key=len)
    return torch.tensor(bits)


def unpack_bits(stored, shape):
    """Invert pack_bits. Raises ValueError or LZMAError unless there is one bit per weight."""
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        raise ValueError(f"a tensor {list(stored.shape)} of {stored.dtype}")
    weights = math.prod(shape)
    size = -(-weights // 8)
    bits = stored.numpy()
    if bits.size < size:
        # max_length, because a few bytes may unpack to gigabytes
        unpacked = lzma.LZMADecompressor().decompress(bits.tobytes(), max_length=size + 1)
        bits = np.frombuffer(unpacked, np.uint8)
    if bits.size != size:
        raise ValueError(f"{bits.size} bytes for {weights} weights")
    return torch.from_numpy(np.unpackbits(bits, count=weights).reshape(shape).view(bool))


def read_masks(path):
    """Read a mask file, still packed -> (tensors, {"run": ..., "shapes": {name: [out, in]}}).

    "run" describes the run. Raises ValueError that says why the file cannot be used.
    """
    tensors, description = unseal(path, MASKS)
    check_types(description, {"run": dict, "shapes": dict}, f"{path} does not hold what it says")
    return tensors, description


def load_masks(path, shapes):
    """Read a mask file -> (masks {name: bool [out, in]}, other trained tensors, the run).

    shapes: {name: (out, in)} of the matrices that the file must cover. The other tensors are
    float32 {name: tensor}; the run is a dict. Raises ValueError that says why the file cannot
    be used.
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
