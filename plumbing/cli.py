"""What all commands share: errors in one line, checked flags, the choice of device and dtype, the code's version.

@one_line_errors()
def main(argv=None):
    device, dtype, why = choose_device(args.device, args.dtype)
"""

import argparse
import math
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from plumbing import parallel
from plumbing.files import DISK_FULL

# --- errors --------------------------------------------------------------------------------------------------

# What people or machines can get wrong. Anything else is a mistake in the code, and keeps its traceback.
ERRORS = (
    ValueError,
    OSError,
    FloatingPointError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
)
MEMORY_FULL = (
    "allocate memory",
    "bad_alloc",
    "can't start new thread",
)  # a plain RuntimeError says so
PANIC = "PanicException"  # of the tokenizers library: no Exception, and nowhere to be imported from
NO_COMPILER = ("InductorError", "BackendCompilerFailed")  # of torch.compile
SMALLER = "memory is full; make it smaller (train.py: --accumulate 2, --batch, --length), or use another --device"


@contextmanager
def one_line_errors():
    """For a command's main: turn what people can get wrong into one line on stderr and exit status 2."""
    open_streams()
    try:
        yield
        sys.stdout.flush()  # not later, when Python would print an error of its own
    except KeyboardInterrupt as said:
        end("\ninterrupted" + (f"; {said}" if str(said) else ""), 130)
    except SystemExit as error:
        end("", error.code)
    except BrokenPipeError:  # whoever read the output has left: `| head -1`
        end("", 128 + 13)
    except BaseException as error:
        if os.environ.get("SMP_TRACEBACK") or not isinstance(error, ERRORS) and not known(error):
            raise
        end(f"error: {describe(error)}", 2)


def open_streams():
    """Let a command print where there is nowhere to print to, and what the terminal's encoding lacks."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None after >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace", line_buffering=True
            )  # in a log, lines in their order


def end(line, status):
    """Print a last line and leave, whatever has become of the output."""
    with suppress(OSError):
        if line:
            print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it once more)
    raise SystemExit(status) from None


def known(error):
    """Whether an error that is of no kind of its own is one that people can do something about."""
    return memory_full(error) or type(error).__name__ in (PANIC, *NO_COMPILER)


def memory_full(error):
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in MEMORY_FULL)


def describe(error):
    """An error as one line that says what to do."""
    if memory_full(error):
        return SMALLER
    if type(error).__name__ == PANIC:
        return f"the model folder's tokenizer.json is damaged: {error}"
    if type(error).__name__ in NO_COMPILER:
        return f"--compile: torch cannot compile here ({printable(str(error))[:200]}); leave it out"
    if isinstance(error, torch.AcceleratorError):
        reason = str(error).splitlines()[0]
        return f"the device failed ({reason}); python train.py --resume RUN_DIR continues from the last evaluation"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"{error}: make room, or choose another place (train.py: --out; downloads: SMP_CACHE)"
        )
    return printable(str(error))


def printable(text):
    """Text on one line, with controls and half characters escaped: names in files may hold anything."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- flags ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags, whose errors are one line without the usage."""

    def __init__(self, **settings):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):  # argparse would drop the value
                self.error(f"{word}: -- is not a value")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        message = printable(message.removeprefix("argument "))
        self.exit(2, None if parallel.rank() else f"error: {message} (see {self.prog} --help)\n")


YES_OR_NO = argparse.BooleanOptionalAction  # --dropout and --no-dropout


def add_flags(parser, title, flags, defaults=None, exclusive=False):
    """Add a group of flags, {name: (kind, help)}, none of which has a default of its own.

    kind: a type; the choices; bool for a switch; or YES_OR_NO. defaults {name: value}: for the help
    text. exclusive: at most one of them may be given.
    """
    group = parser.add_argument_group(title)
    if exclusive:
        group = group.add_mutually_exclusive_group()
    for name, (kind, text) in flags.items():
        default = (defaults or {}).get(name)
        if default is not None:
            text = f"{text} ({default})"
        settings = {"help": text.replace("%", "%%")}
        if kind is bool:
            settings["action"] = "store_true"
        elif kind is YES_OR_NO:
            settings["action"] = YES_OR_NO
        elif callable(kind):
            settings["type"] = kind
        else:
            settings["choices"] = kind
            settings["metavar"] = name.upper() if len(kind) > 4 else None
        group.add_argument(flag(name), **settings)


def number(kind, what, fits):
    """A type for a flag: a number of this kind that fits, or an error that says what it must be."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {what}; got {text}")
        return value

    return read


def up_to(most):
    """A type for a flag: a whole number from 1 to this one."""
    return number(int, f"a whole number from 1 to {most:,}", lambda x: 1 <= x <= most)


MOST = 10_000_000  # of steps, for one: each has an entry in the schedule
fraction = number(float, "a fraction from 0 to 1", lambda x: 0 <= x <= 1)
fraction_below_one = number(float, "a fraction, at least 0 and less than 1", lambda x: 0 <= x < 1)
positive = number(float, "greater than 0", lambda x: 0 < x < math.inf)
not_negative = number(float, "at least 0", lambda x: 0 <= x < math.inf)
warmth = number(float, "a number from 0.01 to 100", lambda x: 0.01 <= x <= 100)
count = up_to(MOST)
passes = number(float, f"greater than 0 and at most {MOST:,}", lambda x: 0 < x <= MOST)
seed = number(int, "a whole number, at least 0 and less than 2^63", lambda x: 0 <= x < 2**63)

MACHINE_FLAGS = {
    "device": (("cuda", "mps", "cpu"), "the first that is available by default"),
    "dtype": (("float32", "bfloat16"), "bfloat16 by default if native; evaluation: as in training"),
}


def flag(name):
    return f"--{name.replace('_', '-')}"


# --- what people look at: tables -----------------------------------------------------------------------------


def show(metrics):
    """{name: value} as text, shares with four decimals, larger numbers with two.

    What further sets add, "accuracy dev_mismatched", stands in brackets behind the metric.
    """
    parts = {}
    for name, value in metrics.items():
        metric, _, other = name.partition(" ")
        number = f"{value:.{4 if abs(value) < 10 else 2}f}"
        if other and metric in parts:
            parts[metric] += f" ({other} {number})"
        else:
            parts[name] = f"{name} {number}"
    return printable(", ".join(parts.values()))


WIDTH = 12  # of a column: six of them and the rows' names in 80 columns


def shaded_table(title, columns):
    """{name: [value of each layer]}, from 0 to 1 -> lines: layers by columns, darker for more, and the mean of all."""
    table = np.array(list(columns.values())).T  # [layers, columns]
    names = [name.replace("_", " ").replace("intermediate", "intermed.") for name in columns]
    lines = [table_row(title, names)]
    for i, row in enumerate(table):
        lines.append(
            table_row(f"layer {i}", [f"{shade(v, table, WIDTH - 7)} {v:.3f}" for v in row])
        )
    return [*lines, table_row("all", [f"{v:.4f}" for v in table.mean(0)])]


def table_row(first, cells):
    return f"{first:8}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def shade(value, table, width):
    """A bar of one shade, from light for the lowest of a table to dark for its highest; empty for 0.

    Where all are alike, all are dark. Plain signs where the terminal knows no blocks.
    """
    shades = " ░▒▓█" if (sys.stdout.encoding or "").lower().startswith("utf") else " .:+#"
    lowest, highest = table.min(), table.max()
    place = (value - lowest) / (highest - lowest) if highest - lowest >= 0.01 else 1.0
    darkness = 1 + min(math.floor(4 * place), 3) if value else 0
    return shades[darkness] * width


# --- the machine ---------------------------------------------------------------------------------------------


def choose_device(device=None, dtype=None, trained=None):
    """-> (torch.device, torch.dtype, why) from --device and --dtype, or by what the machine has.

    trained: the result of a run, whose dtype counts on a device of its kind. Raises ValueError when
    the machine lacks the device.
    """
    trained = trained or {"device": None, "dtype": None}
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    why = "as asked"
    if device is None:
        device = next(name for name, there in present.items() if there)
        why = {
            "cuda": "a CUDA GPU is there",
            "mps": "an Apple GPU is there",
            "cpu": "no GPU is there",
        }[device]
    elif not present[device]:
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no such device here")
    if dtype is None and device == trained["device"]:
        dtype = trained["dtype"]
        why = "as in training"
    elif dtype is None:
        native = device == "cpu" and cpu_computes_bf16()
        native |= device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
        why += f"; the {device.upper()} {'computes bfloat16 natively' if native else 'has no bfloat16 of its own'}"
    return torch.device(device), getattr(torch, dtype), why


def cpu_computes_bf16():
    """Whether the processor multiplies matrices in bfloat16 itself (AVX512-BF16 or AMX), and so in half the time."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


LONG = 20_000  # steps, from which preparing cuDNN's attention pays


def set_up(deterministic, steps):
    """Before the first kernel: attention that suits so many steps; deterministic: the same bits every time, if slower.

    steps: that are recorded; 0 where kernels are launched one by one.
    """
    # cuDNN's is 0.3 ms faster in a step of bert-base, but takes half a second to prepare for every shape of batch.
    torch.backends.cuda.enable_cudnn_sdp(steps >= LONG)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nobody reads it here


def code_version():
    """The versions behind a number: python, torch, and if the code is in git the commit and whether it is clean."""
    found = {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    ask = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        ask(
            [*git, "ls-files", "--error-unmatch", here.name]
        )  # or it lies inside another repository
        commit = ask([*git, "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = ask([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return found
    return found | {"commit": commit, "clean": not changed}
