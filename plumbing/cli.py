"""The command line: one-line errors, checked flags, tables, device and dtype, the code's version.

@one_line_errors()
def main(argv=None):
    device, dtype, why = choose_device(args.device, args.dtype)
"""

import argparse
import os
import platform
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch

# --- errors ---------------------------------------------------------------------------------------

MEMORY = (
    "memory is full; use less of it (train.py: --accumulate 2, --batch, --length), "
    "or another --device"
)
COMPILE = "--compile: torch cannot compile here; leave it out"
CAPTURE = "a step that waits for the GPU, in .item() say, cannot be recorded; try --eager"
# What to do about an error that has such a word in its class or text. The first that fits counts.
ADVICE = {
    "MemoryError": MEMORY,  # Python's
    "allocate memory": MEMORY,  # the operating system's, and torch's
    "bad_alloc": MEMORY,  # C++'s
    "can't start new thread": MEMORY,
    "InductorError": COMPILE,
    "BackendCompilerFailed": COMPILE,
    "No space left": "the disk is full; use another (train.py: --out; for downloads: SMP_CACHE)",
    "PanicException": "the model folder's tokenizer.json is damaged",  # from tokenizers
    "home directory": "SMP_CACHE: name a folder for downloads",  # from Path.expanduser
    "stream is capturing": CAPTURE,
    "during capture": CAPTURE,
    "invalid device ordinal": "--nproc_per_node: there can be one process per GPU",
    "AcceleratorError": "the device failed; python train.py --resume RUN_DIR continues",
    "third_party/gloo": "another process has failed",
}


@contextmanager
def one_line_errors():
    """Wrap a command's main: print an error that a user can fix as one line, and exit with 2.

    Exits with 130 after Ctrl-C. SMP_TRACEBACK=1 in the environment shows the traceback instead.
    """
    with suppress(AttributeError):  # a notebook's stream cannot do this
        # Any character can be printed, and a log has the lines of stdout and stderr in order.
        encoding = None if sys.stdout.isatty() else "utf-8"  # as files are read here
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace", line_buffering=True)
    status = 2
    try:
        yield
        print(end="", flush=True)
        return
    except BrokenPipeError:  # the reader of the output has left, as in `| head -1`
        line = ""
        status = 141
    except KeyboardInterrupt:
        line = "interrupted\n"
        status = 130
    except BaseException as error:
        line = describe(error)
        if not line or os.environ.get("SMP_TRACEBACK"):
            raise

    sys.stderr.write(line)
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None  # or Python flushes it again at exit, and prints an error of its own
    raise SystemExit(status)


def describe(error):
    """-> one line that says what to do about an error, or None for a mistake in the code."""
    text = printable(str(error).removeprefix("[Errno 2] "))  # a file that does not exist
    for word, advice in ADVICE.items():
        if word in repr(error):
            return f"error: {advice}: {text:.300}\n"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return f"error: {text}\n"
    return None


def printable(text):
    """Put a text on one line, and escape control characters and lone surrogates."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- flags ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses abbreviated flags and prints an error as one line."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise ValueError(message.removeprefix("argument "))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks no name at its hyphens, so that it can be copied."""

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)


YES_OR_NO = argparse.BooleanOptionalAction  # --dropout and --no-dropout


def grouped_parser(groups, defaults=None, shown=None, **texts):
    """A Parser with these groups of flags, {title: flags}, see add_flags.

    --help sets `help` to "short", and --help-all to "all". shown: the names of the only flags to
    have, in one group.
    """
    if shown:
        every = {name: flag for flags in groups.values() for name, flag in flags.items()}
        groups = {"flags": {name: every[name] for name in shown.split() if name in every}}
    formatter = partial(HelpFormatter, max_help_position=28, width=80)
    parser = Parser(formatter_class=formatter, add_help=False, **texts)
    add = partial(parser.add_argument, action="store_const", dest="help")
    add("-h", "--help", const="short", help="these flags, with the defaults of --task and --method")
    add("--help-all", const="all", help="all flags")
    for title, flags in groups.items():
        add_flags(parser, title, flags, defaults)
    return parser


def add_flags(parser, title, flags, defaults=None, exclusive=False):
    """Add a group of flags, {name: (kind, help)}. The parser gets no defaults.

    kind: a type, the choices, bool for a switch, YES_OR_NO, or list if it may be given twice.
    defaults: {name: value}, only for the help text. exclusive: the user may give at most one.
    """
    group = parser.add_argument_group(title)
    if exclusive:
        group = group.add_mutually_exclusive_group()
    for name, (kind, text) in flags.items():
        default = (defaults or {}).get(name)
        if default is not None and default is not False:
            text += f" ({default})"

        settings = {"metavar": name.rpartition("_")[2].upper()}
        if kind is bool:
            settings = {"action": "store_true", "default": None}
        elif kind is list:
            settings["action"] = "append"
        elif kind is YES_OR_NO:
            settings = {"action": kind}
        elif callable(kind):
            settings["type"] = kind
        else:
            settings["choices"] = kind
            text += f": {', '.join(kind)}"
        group.add_argument(flag(name), help=text, **settings)


def flag(name):
    return f"--{name.replace('_', '-')}"


def number(kind, low, high):
    """Make a type for a flag: numbers from `low` to `high`. kind: int or float."""

    def read(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low:,} to {high:,}; got {text}")

    return read


def up_to(most):
    return number(int, 1, most)


MOST = 10_000_000  # keeps the memory in bounds: the schedule has an entry for each step
count = up_to(MOST)
seed = number(int, 0, 10**18)
fraction = number(float, 0, 1)
fraction_below_one = number(float, 0, 0.9999)
positive = number(float, 1e-100, 1e100)
not_negative = number(float, 0, 1e100)

MACHINE_FLAGS = {
    "device": (("cuda", "mps", "cpu"), "by default a GPU, if there is one"),
    "dtype": (
        ("float32", "bfloat16"),
        "default: bfloat16 if the hardware has it; in evaluation as in training",
    ),
}

# --- tables ---------------------------------------------------------------------------------------


def show(metrics):
    """Format {name: value} as one line: {"mcc": 0.5, "f1": 0.6} -> "mcc 0.5000, f1 0.6000"."""
    return printable(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def shaded_table(columns):
    """{name: [density of each layer]} -> lines: a row per layer, and the means below.

    Each density has a bar beside it, darker for larger ones.
    """
    table = np.column_stack(list(columns.values()))  # [layers, columns]
    names = [name.replace("_", " ").replace("intermediate", "intermed.") for name in columns]
    lines = [table_row("density", names)]
    for i, row in enumerate(table):
        lines.append(table_row(f"layer {i}", [f"{shade(x, table, 5)} {x:.3f}" for x in row]))
    return [*lines, table_row("all", [f"{mean:.4f}" for mean in table.mean(0)])]


# Six cells fit into 80 columns.
def table_row(first, cells):
    return f"{first:8}" + "".join(f"{cell:>12}" for cell in cells)


def shade(value, table, width):
    """A bar in one of four shades, from light for the table's lowest value to dark for its highest.

    Values that differ by less than a hundredth look alike. 0 gets an empty bar.
    """
    if not value:
        return " " * width
    place = (value - table.min()) / (np.ptp(table) + 0.01)  # from 0 to almost 1
    return "░▒▓█"[int(4 * place)] * width


# --- the machine ----------------------------------------------------------------------------------


def choose_device(device=None, dtype=None):
    """-> (torch.device, torch.dtype, why) from --device and --dtype, or from what the machine has.

    Raises ValueError if the machine lacks the device.
    """
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    device = device or best.type
    if device not in (best.type, "cpu"):
        raise ValueError(f"--device {device}: torch finds no such device here")

    # Does the device itself multiply in bfloat16, and so in half the time?
    native = device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = dtype or ("bfloat16" if native else "float32")
    why = f"found {best.type}, {'with' if native else 'without'} native bfloat16"
    return torch.device(device), getattr(torch, dtype), why


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


LONG = 20_000  # steps; in a shorter run, preparing cuDNN's attention takes longer than it saves


def set_up(deterministic, steps):
    """Set torch up for a GPU. Call it before the first kernel.

    deterministic: compute the same bits every time, if slower. steps: how many are replayed from a
    graph; 0 if every kernel is launched.
    """
    # cuDNN's attention makes a step of bert-base 0.3 ms faster. But it needs half a second of
    # preparation for every shape of batch.
    torch.backends.cuda.enable_cudnn_sdp(steps >= LONG)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)


def code_version():
    """The versions behind a result: Python's, torch's, and in a git checkout the code's.

    -> {"versions": {...}, "commit": hash, and "-dirty" if other code was there}
    """
    facts = {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    with suppress(OSError):  # git is not installed
        commit = git("describe --always --exclude=*")
        if git("status --porcelain :/*.py"):  # changed, or new, such as extras/mine.py
            commit += "-dirty"
        if commit:  # empty outside of a checkout
            facts["commit"] = commit
    return facts


def git(command):
    """What a git command says about this code; "" outside of a checkout."""
    return subprocess.run(
        ["git", "-C", os.path.dirname(__file__), *command.split()], capture_output=True, text=True
    ).stdout.strip()
