"""What all commands share: errors in one line, flags, the choice of device and dtype.

What it is: the face that train.py, eval.py, bench.py and experiments.py have in common. What it is not: it knows no
task and no model. Sources: none.

    with one_line_errors():
        device, dtype, why = choose_device(args.device, args.dtype)
"""

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import parallel
from fetch import DISK_FULL

# What people or machines can get wrong; anything else is a mistake in the code, and keeps its traceback.
ERRORS = (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
FULL = "allocate memory"  # what torch says when a CPU's memory is, in a plain RuntimeError
SMALLER = "memory is full; make it smaller (train.py: --accumulate 2, --batch, --length), or take another --device"


@contextmanager
def one_line_errors():
    """Turn ERRORS, which name what to change, into one line on stderr and exit status 2."""
    try:
        yield
    except (*ERRORS, RuntimeError) as error:
        if not isinstance(error, ERRORS) and FULL not in str(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as said:
        print(f"\ninterrupted{'; ' * bool(str(said))}{said}", file=sys.stderr)
        raise SystemExit(130) from None


def describe(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or FULL in str(error):
        return SMALLER
    if isinstance(error, torch.AcceleratorError):
        reason = str(error).splitlines()[0]
        return f"the device failed ({reason}); python train.py --resume RUN_DIR goes on from the last evaluation"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: make room, or name another place (train.py: --out; eval.py: --export; downloads: SMP_CACHE)"
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()  # names in files may be anything


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated flags, and whose errors are one line, without the usage."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, None if parallel.RANK else f"error: {message} (see {self.prog} --help)\n")


def choose_device(device=None, dtype=None):
    """-> (torch.device, torch.dtype, why) from --device and --dtype, or by what the machine has."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    why = "as asked"
    if device is None:
        device = next(name for name, there in present.items() if there)
        why = {"cuda": "a CUDA GPU is there", "mps": "an Apple GPU is there", "cpu": "no GPU is there"}[device]
    elif not present[device]:
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no such device here")
    if dtype is None:
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        native |= device == "cpu" and cpu_computes_bf16()
        dtype = "bfloat16" if native else "float32"
        why += f"; the {device.upper()} {'computes bfloat16 natively' if native else 'has no bfloat16 of its own'}"
    return torch.device(device), getattr(torch, dtype), why


def cpu_computes_bf16():
    """Whether the processor multiplies matrices in bfloat16 itself (AVX512-BF16 or AMX), and so in half the time."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def make_deterministic():
    """Let torch choose algorithms that give the same bits every time; some are slower. To be called first."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nobody reads it here


def code_version():
    """{"commit": short hash of this code, "clean": whether no tracked file differs from it}, or {} if not in git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        ask([*git, "ls-files", "--error-unmatch", Path(__file__).name])  # or it is another repository that it lies in
        commit = ask([*git, "rev-parse", "--short", "HEAD"]).stdout
        changed = ask([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit.strip(), "clean": not changed}


def add_files(parser):
    """The flags for files that train.py and eval.py share."""
    parser.add_argument("--model", metavar="MODEL", help="minilm, bert-base-uncased, roberta-base, or a folder")
    parser.add_argument("--data-dir", metavar="FOLDER", help="a folder in GLUE's layout; default: download")


def add_machine(parser):
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is there")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 if native; eval: as trained"
    )


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
