"""The command line: one-line errors, checked flags, tables, device and dtype, the code's version.

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

# --- errors ---------------------------------------------------------------------------------------

# Users and machines cause these. Any other error is a mistake in the code and keeps its traceback.
ERRORS = (ValueError, OSError, FloatingPointError, torch.AcceleratorError)
# Torch raises a plain RuntimeError with one of these texts.
MEMORY_FULL = ("allocate memory", "bad_alloc", "can't start new thread")
PANIC = "PanicException"  # from tokenizers: not an Exception subclass, and not importable
NO_COMPILER = ("InductorError", "BackendCompilerFailed")  # from torch.compile
SMALLER = (
    "memory is full; use less of it (train.py: --accumulate 2, --batch, --length), "
    "or another --device"
)


@contextmanager
def one_line_errors():
    """Wrap a command's main: print an error that a user can fix as one line, and exit with 2.

    Exits with 130 after Ctrl-C. SMP_TRACEBACK=1 in the environment shows the traceback instead.
    """
    open_streams()
    try:
        yield
        sys.stdout.flush()  # now, because Python would print an error of its own at exit
    except KeyboardInterrupt as interrupt:
        line = "\ninterrupted"
        if str(interrupt):
            line += f"; {interrupt}"
        end(line, 130)
    except SystemExit as error:
        end("", error.code)
    except BrokenPipeError:  # the reader of the output has left, as in `| head -1`
        end("", 128 + 13)
    except BaseException as error:
        if os.environ.get("SMP_TRACEBACK") or not fixable(error):
            raise
        end(f"error: {describe(error)}", 2)


def open_streams():
    """Make printing safe: without a stdout, or with characters that the terminal cannot show."""
    # After `>&-` they are None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Line buffering keeps the two in order when both go to one log.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def end(line, status):
    """Print a last line, if any, and exit, even if the output is closed."""
    with suppress(OSError):
        if line:
            print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it again at exit)
    raise SystemExit(status) from None


def fixable(error):
    """Whether a user can fix it. Some of these errors have no class of their own."""
    if isinstance(error, ERRORS) or memory_full(error):
        return True
    return type(error).__name__ in (PANIC, *NO_COMPILER)


def memory_full(error):
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in MEMORY_FULL)


def describe(error):
    """Turn an error into one line that says what to do."""
    if memory_full(error):
        return SMALLER
    if type(error).__name__ == PANIC:
        return f"the model folder's tokenizer.json is damaged: {error}"
    if type(error).__name__ in NO_COMPILER:
        return f"--compile: torch cannot compile here ({printable(str(error))[:200]}); leave it out"
    if isinstance(error, torch.AcceleratorError):
        reason = str(error).splitlines()[0]
        return (
            f"the device failed ({reason}); "
            "python train.py --resume RUN_DIR continues from the last evaluation"
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"{error}; free some space, or use another disk "
            "(train.py: --out, for downloads: SMP_CACHE)"
        )
    return printable(str(error))


def printable(text):
    """Put a text on one line, and escape control characters and lone surrogates.

    Names in files may contain anything.
    """
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses abbreviated flags and prints an error as one line."""

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
        line = f"error: {message} (see {self.prog} --help)\n"
        self.exit(2, None if parallel.rank() else line)  # process 0 speaks for all


YES_OR_NO = argparse.BooleanOptionalAction  # --dropout and --no-dropout


def add_flags(parser, title, flags, defaults=None, exclusive=False):
    """Add a group of flags, {name: (kind, help)}. The parser gets no defaults.

    kind: a type, the choices, bool for a switch, or YES_OR_NO. defaults: {name: value}, only for
    the help text. exclusive: the user may give at most one of them.
    """
    group = parser.add_argument_group(title)
    if exclusive:
        group = group.add_mutually_exclusive_group()
    for name, (kind, text) in flags.items():
        default = (defaults or {}).get(name)
        if isinstance(default, bool):  # not "in (True, False)", as 1 == True
            default = {True: "yes", False: "no"}[default]
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
            # The help shows a few choices, {float32,bfloat16}. Many would fill it.
            settings["metavar"] = name.upper() if len(kind) > 4 else None
        short = ["-h"] if name == "help" else []
        group.add_argument(*short, flag(name), **settings)


def number(kind, allowed, fits):
    """Make a type for a flag: int or float, and only numbers for which fits(number) is true.

    allowed: names these numbers in the error.
    """

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fits nowhere
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}; got {text}")
        return value

    return read


def up_to(most):
    """Make a type for a flag: whole numbers from 1 to `most`."""
    return number(int, f"a whole number from 1 to {most:,}", lambda x: 1 <= x <= most)


MOST = 10_000_000  # keeps the memory in bounds: the schedule has an entry for each step
fraction = number(float, "a fraction from 0 to 1", lambda x: 0 <= x <= 1)
fraction_below_one = number(float, "a fraction, at least 0 and less than 1", lambda x: 0 <= x < 1)
positive = number(float, "greater than 0", lambda x: 0 < x < math.inf)
not_negative = number(float, "at least 0", lambda x: 0 <= x < math.inf)
warmth = number(float, "a number from 0.01 to 100", lambda x: 0.01 <= x <= 100)
count = up_to(MOST)
passes = number(float, f"greater than 0 and at most {MOST:,}", lambda x: 0 < x <= MOST)
seed = number(int, "a whole number, at least 0 and less than 2^63", lambda x: 0 <= x < 2**63)

MACHINE_FLAGS = {
    "device": (("cuda", "mps", "cpu"), "by default the first of them that is available"),
    "dtype": (
        ("float32", "bfloat16"),
        "by default bfloat16 where it is native, and in evaluation as in training",
    ),
}


def flag(name):
    return f"--{name.replace('_', '-')}"


# --- tables ---------------------------------------------------------------------------------------


def show(metrics):
    """Format {name: value} as one line: shares with four decimals, larger numbers with two.

    A metric of a second set follows in brackets: {"accuracy": 0.5, "accuracy dev_mismatched": 0.6}
    -> "accuracy 0.5000 (dev_mismatched 0.6000)".
    """
    parts = {}
    for name, value in metrics.items():
        metric, _, other = name.partition(" ")
        digits = 4 if abs(value) < 10 else 2
        text = f"{value:.{digits}f}"
        if other and metric in parts:
            parts[metric] += f" ({other} {text})"
        else:
            parts[name] = f"{name} {text}"
    return printable(", ".join(parts.values()))


WIDTH = 12  # characters per column, so that six of them and the rows' names fit into 80


def shaded_table(title, columns):
    """{name: [value of each layer]}, from 0 to 1 -> lines: a row per layer, and the means below.

    Each value has a bar beside it, darker for larger values.
    """
    table = np.array(list(columns.values())).T  # [layers, columns]
    names = [name.replace("_", " ").replace("intermediate", "intermed.") for name in columns]
    lines = [table_row(title, names)]
    for i, row in enumerate(table):
        cells = [f"{shade(value, table, WIDTH - 7)} {value:.3f}" for value in row]
        lines.append(table_row(f"layer {i}", cells))
    return [*lines, table_row("all", [f"{mean:.4f}" for mean in table.mean(0)])]


def table_row(first, cells):
    return f"{first:8}" + "".join(f"{cell:>{WIDTH}}" for cell in cells)


def shade(value, table, width):
    """A bar in one of four shades, from light for the table's lowest value to dark for its highest.

    0 gets an empty bar. If all values are alike, all bars are dark. A terminal without block
    characters gets plain ones.
    """
    shades = "░▒▓█" if (sys.stdout.encoding or "").lower().startswith("utf") else ".:+#"
    if not value:
        return " " * width
    lowest, highest = table.min(), table.max()
    place = 1.0  # from 0, the lowest, to 1, the highest
    if highest - lowest >= 0.01:
        place = (value - lowest) / (highest - lowest)
    return shades[min(math.floor(4 * place), 3)] * width


# --- the machine ----------------------------------------------------------------------------------


def choose_device(device=None, dtype=None, trained=None):
    """-> (torch.device, torch.dtype, why) from --device and --dtype, or from what the machine has.

    trained: the result of a run, to be evaluated in its dtype on the same kind of device. Raises
    ValueError if the machine lacks the device.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    why = "as asked"
    if device is None:  # the first that is present
        device = next(name for name, here in present.items() if here)
        why = "found no GPU" if device == "cpu" else "found a GPU"
    elif not present[device]:
        raise ValueError(f"--device {device}: torch {torch.__version__} finds no such device here")

    if dtype is None:
        if trained and device == trained["device"]:
            dtype = trained["dtype"]
            why = "as in training"
        elif computes_bf16(device):
            dtype = "bfloat16"
            why += f"; the {device.upper()} computes bfloat16 natively"
        else:
            dtype = "float32"
            why += f"; the {device.upper()} has no native bfloat16"
    return torch.device(device), getattr(torch, dtype), why


def computes_bf16(device):
    """Whether a kind of device multiplies matrices in bfloat16 itself, and so in half the time."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and cpu_computes_bf16()


def cpu_computes_bf16():
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


LONG = 20_000  # from so many steps on, preparing cuDNN's attention pays


def set_up(deterministic, steps):
    """Set torch up for a GPU. Call it before the first kernel.

    deterministic: compute the same bits every time, if slower. steps: how many are replayed from a
    graph; 0 if every kernel is launched.
    """
    # cuDNN's attention makes a step of bert-base 0.3 ms faster. But it needs half a second of
    # preparation for every shape of batch.
    torch.backends.cuda.enable_cudnn_sdp(steps >= LONG)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
        # By default torch then also fills new tensors, which nothing here reads before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False


def code_version():
    """The versions behind a result: Python's, torch's, and in a git checkout the code's.

    -> {"versions": {...}, "commit": hash, "clean": whether nothing was changed since}
    """
    found = {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    ask = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        # Fails if git does not track this file: it may lie inside another repository.
        ask([*git, "ls-files", "--error-unmatch", here.name])
        commit = ask([*git, "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = ask([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.CalledProcessError):
        return found
    return found | {"commit": commit, "clean": not changed}
