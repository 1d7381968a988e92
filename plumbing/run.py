"""The folder of a run. One process writes to it, and an interrupted run can continue from it.

log.jsonl gets a line per log interval and per evaluation. checkpoint.safetensors holds everything
that a run needs to continue as if it had never stopped. result.json is written last, so a folder
that has one is complete.

    run = Run(folder, argv)  # or interrupted_run(folder)
    with run:  # holds the folder
        run.restore(learner, optimizer)
        for step in range(run.step, total):
            ...
            run.save(step + 1, learner, optimizer)
        run.finish({"mask.safetensors": content}, result)
"""

import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from plumbing import files, parallel
from plumbing.checkpoints import tokenizer_bytes
from plumbing.cli import MACHINE_FLAGS, code_version, flag
from plumbing.fetch import model_name

LOG, CHECKPOINT, RESULT = "log.jsonl", "checkpoint.safetensors", "result.json"
MASK = "mask.safetensors"
FORMAT = "smp-checkpoint-4"  # 3 had other settings in its identity
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state for each parameter
SAVE_EVERY = 60  # seconds between checkpoints: one of bert-base takes three to write


# Flags that are always in the name of a run's folder, or never.
NOT_CHANGES = {"task", "model", "method", "sparsity", "seed", "train", "out"}
NOT_CHANGES |= MACHINE_FLAGS.keys() | {"accumulate", "compile", "eager", "deterministic"}


def run_folder(values, changed):
    """Name a run's folder after what differs from the defaults.

    Such as runs/movies-minilm-smp-s-0.5-lr0.04-seed0.

    values: {flag: value}. changed: those that the user has set to another value than the default.
    """
    name = f"{values['task']}-{model_name(values['model'])}-{values['method']}"
    name += f"-{values['sparsity']:g}"
    for what in sorted(changed.keys() - NOT_CHANGES):
        value = changed[what]
        if isinstance(value, (int, float)):
            name += f"-{what}{value:g}"
        else:
            name += f"-{'-'.join(value) if isinstance(value, list) else Path(value).name}"
    name += f"-seed{values['seed']}"
    name = name.replace(":", "of")  # smp-2:4; Windows takes no colons
    return Path("runs") / re.sub(r"[^\w.,+ -]", "-", name)


class Run:
    """A run in `folder`. argv: the words of its command. The rest is from a checkpoint.

    Without a checkpoint the run is new, and its folder must be new or empty. Otherwise this raises
    ValueError, here or when it is entered.
    """

    def __init__(
        self,
        folder,
        argv,
        tensors=None,
        # The keys that save() writes:
        step=0,  # how many steps are done
        evaluations=(),  # dicts with step, density and dev metrics
        identity=None,  # everything that the run depends on, see check_identity
        seconds=0.0,  # computed so far
        log=0,  # the size of the log in bytes; lines beyond it will be logged again
    ):
        self.folder = Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        self.argv = argv
        self.tensors = tensors
        self.step = step  # done before this process began
        self.evaluations = list(evaluations)
        self.identity = identity or {}
        self.began = time.time() - seconds
        self.saved = 0.0  # when the last checkpoint was written
        self.saved_step = step  # and at which step
        self.log_size = log
        self.check_folder()

    def check_folder(self):
        """Raise ValueError if the run must not write into its folder."""
        if parallel.rank() > 0 or not self.folder.is_dir():
            return
        if (self.folder / RESULT).exists():
            raise ValueError(
                f"{self.folder} holds a finished run: python eval.py {self.folder} shows it; "
                "for a new one, name another --out or --seed, or delete it"
            )
        if self.tensors:
            return
        # A run that ended before its first checkpoint leaves an empty log.
        if any(path.is_dir() or path.stat().st_size for path in self.folder.iterdir()):
            raise ValueError(
                f"--out: {self.folder} holds other files; name another, or delete it. If they are "
                f"those of an interrupted run, --resume {self.folder} continues it"
            )

    def check_identity(self, flags, description):
        """Raise ValueError if a resumed run depends on anything that is different now.

        flags: {name: value}. description: {what: value}, the model, the data, the device and so on.
        """
        identity = {flag(name): str(value) for name, value in flags.items()} | description
        for what in ("--out", "--resume", "--table"):  # digests stand for the rows of a table
            identity.pop(what, None)
        for what, value in identity.items():
            before = self.identity.get(what, value)  # a new run has no identity yet
            if before != value:
                raise ValueError(
                    f"--resume: {what} is {value} now, and was {before} when the run began"
                )
        self.identity = identity

    # --- holding the folder ---

    def __enter__(self):
        self.file = self.hold() if parallel.rank() == 0 else None
        return self

    def hold(self):
        """Lock the folder -> its log, open, and cut to where the run continues.

        Closing the log unlocks the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / LOG, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        files.lock(file)
        self.check_folder()  # again: another process may have written before it was locked
        for part in self.folder.glob(".part-*"):  # of a run that was killed
            part.unlink()
        file.truncate(self.log_size)
        return file

    def __exit__(self, kind, *_):
        if self.file:
            self.file.close()
        if kind is KeyboardInterrupt and self.checkpoint.exists():
            print_stderr(
                f"python train.py --resume {self.folder} continues after step {self.saved_step}"
            )

    # --- writing ---

    def log(self, **line):
        if self.file:
            try:
                self.file.write(f"{json.dumps(line)}\n".encode())
            except OSError as error:
                print_stderr(f"a line of {self.file.name} is lost ({error})")

    def report(self, step, losses, density, penalty):
        """Log the mean loss since the last report, and the last regularizer.

        losses: per step a tensor [2] of loss and regularizer, this process's share. Returns what a
        progress bar shows. Raises FloatingPointError if one of them is not finite.
        """
        (sums,) = parallel.all_reduce([torch.stack(losses)])
        losses, regularizers = sums.T.tolist()  # [steps, 2] -> two lists
        loss = sum(losses) / len(losses)
        regularizer = regularizers[-1]
        if not math.isfinite(loss + regularizer):
            raise FloatingPointError(
                f"the loss is {loss} and the regularizer {regularizer} at step {step}: "
                "try a smaller --lr, or float32"
            )
        self.log(step=step, loss=loss, density=density, penalty=penalty, regularizer=regularizer)
        return {"loss": f"{loss:.3f}", "density": f"{density:.3f}"}

    def evaluated(self, **line):
        self.evaluations.append(line)
        self.log(**line)

    def save(self, step, learner, optimizer):
        """Write a checkpoint, if the last is a minute old. Several processes write none.

        If it cannot be written, say so and go on training.
        """
        if time.time() - self.saved < SAVE_EVERY or parallel.processes() > 1:
            return
        state = {
            "step": step,
            "evaluations": self.evaluations,
            "argv": self.argv,
            "identity": self.identity,
            "seconds": time.time() - self.began,
            "log": os.fstat(self.file.fileno()).st_size,
        }
        tensors = random_states() | training_state(learner, optimizer)
        try:
            files.write_whole(self.checkpoint, files.seal(FORMAT, tensors, state))
        except OSError as error:
            print_stderr(f"no checkpoint ({error}): training goes on, but could not be resumed")
        else:
            self.saved_step = step
        self.saved = time.time()

    def restore(self, learner, optimizer):
        """Load the checkpoint of a resumed run. A new run has none to load."""
        if not self.tensors:
            return
        stored, self.tensors = self.tensors, None  # not needed again
        torch.set_rng_state(stored["random.cpu"])
        if "random.cuda" in stored:
            torch.cuda.set_rng_state(stored["random.cuda"])
        for name, tensor in states_of(learner).items():
            tensor.copy_(stored[name])
        for i, p in enumerate(learner.parameters()):
            optimizer.state[p] = {name: stored[f"{name}.{i}"].to(p.device) for name in MOMENTS}

    def facts(self):
        """Describe the run itself, for result.json."""
        final = self.evaluations[-1]
        return code_version() | {
            "steps": final["step"],
            "final": final["dev"],
            "seconds": round(time.time() - self.began, 1),
            "command": shlex.join(["python", "train.py", *self.argv]),
        }

    def finish(self, contents, result):
        """Write files {name: bytes}. Then write result.json, which marks the run as finished."""
        for name, content in contents.items():
            files.write_whole(self.folder / name, content)
        files.write_whole(self.folder / RESULT, files.signed_json(result))
        self.checkpoint.unlink(missing_ok=True)


def print_stderr(*lines):
    """Print lines for people. What is for programs goes to stdout."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


# --- checkpoints ----------------------------------------------------------------------------------


def random_states():
    """{name: state of the random number generator}, one per kind of device."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def training_state(learner, optimizer):
    """{name: tensor} of the parameters, Adam's step and its moments. Not copies."""
    tensors = states_of(learner)
    for i, p in enumerate(learner.parameters()):
        for name in MOMENTS:
            tensors[f"{name}.{i}"] = optimizer.state[p][name]
    return tensors


def states_of(learner):
    """{name: tensor} of the parameters, and of buffers in which a method keeps a state."""
    tensors = learner.state_dict().values()
    return {f"parameter.{i}": tensor for i, tensor in enumerate(tensors)}


def interrupted_run(folder):
    """The interrupted Run in a folder. Raises ValueError if it cannot continue."""
    parallel.require_one_process("--resume")
    path = folder / CHECKPOINT
    if not path.exists():
        raise ValueError(
            f"--resume: there is no {path}; the run is finished, was new, or lies elsewhere"
        )
    tensors, state = files.unseal(path, FORMAT)
    return Run(folder, tensors=tensors, **state)


# --- finished runs --------------------------------------------------------------------------------


def identity(folder, model):
    """Describe the model that a mask belongs to: its pretrained weights, config and tokenizer."""
    pretrained = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier."):  # a classifier is fresh
            pretrained[name] = tensor
    return {
        "fingerprint": files.digest(pretrained),
        "config": str(model.config),
        "tokenizer": files.sha256(tokenizer_bytes(folder)),
    }


def read_description(run):
    """Read the description of a finished run. run: its folder, or a mask file.

    It is in the mask file, if there is one. Raises ValueError if the run is not finished, or the
    file was altered.
    """
    if (run / CHECKPOINT).exists() and not (run / RESULT).exists():
        raise ValueError(
            f"{run} holds an unfinished run; python train.py --resume {run} continues it"
        )
    mask = run / MASK if run.is_dir() else run
    if mask.exists():
        _, about = files.unseal(mask, files.MASKS)
        return about["run"]
    return files.read_signed_json(run / RESULT)
