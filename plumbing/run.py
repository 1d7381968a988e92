"""A run's folder: one process writes to it, everything in it can be trusted, and an interrupted run continues.

log.jsonl has a line for each log interval and evaluation; checkpoint.safetensors, from the last evaluation or
interruption, is all that a run needs to continue as if it had never stopped; result.json is written last.

    run = Run(folder, argv)              # or interrupted_run(folder)
    with run:                            # holds the folder
        run.restore(learner, optimizer, total)  # does nothing for a new run
        for step in range(run.step, total):
            ...
            if run.stopped:
                run.save(step + 1, learner, optimizer)
        run.finish({"mask.safetensors": content}, result)
"""

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from plumbing import parallel
from plumbing.files import (
    check_types,
    digest,
    file_digest,
    json_bytes,
    lock,
    read_json,
    read_masks,
    seal,
    unseal,
    write_whole,
)

LOG, CHECKPOINT, RESULT = "log.jsonl", "checkpoint.safetensors", "result.json"
FORMAT = "smp-checkpoint-2"
# What result.json, or the description of a mask file, must say, beside much else.
DESCRIBED = {"task": str, "method": str, "model": str, "words": dict, "length": int, "head": str, "final": dict}
DESCRIBED |= {"fingerprint": str, "tokenizer": str, "config": str, "sha256": dict, "density": float, "device": str}
DESCRIBED |= {"dtype": str, "data_dir": (str, type(None))}
CHOICES = {"head": ("words", "classifier"), "dtype": ("float32", "bfloat16")}
# What a checkpoint says beside its tensors. identity: what the run depends on, by digest; seconds: spent so far; log:
# bytes of the log so far.
STATE = {"step": int, "evaluations": list, "argv": list, "identity": dict, "seconds": float, "log": int}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's


class Run:
    """A run in `folder`, of the command that argv has the words of; see interrupted_run for one that continues.

    Raises ValueError, here and again when the folder is held, if the folder is not new, empty or of a run that saved
    nothing, which the new one replaces.
    """

    def __init__(self, folder, argv, state=None):
        self.folder = Path(folder)
        self.argv = argv
        self.resumed = state is not None
        self.stopped = False  # whether SIGINT or SIGTERM came
        if not self.resumed:
            state = {"step": 0, "evaluations": [], "identity": {}, "seconds": 0.0, "log": 0}
            if parallel.rank() == 0:
                check_free(self.folder)
        self.step = state["step"]  # done before this process began
        self.evaluations = state["evaluations"]  # dicts, see evaluated
        self.identity = state["identity"]
        self.began = time.time() - state["seconds"]
        self.log_size = state["log"]  # what lies beyond came after the checkpoint, and will come again

    @property
    def seconds(self):
        return time.time() - self.began

    def check_identity(self, identity):
        """Raise ValueError when a resumed run is not on the model, data and device {what: value} that it began with."""
        for what, value in identity.items():
            if self.resumed and self.identity.get(what) != value:
                before = self.identity.get(what)
                raise ValueError(f"--resume: {what} is {value} now, and was {before} when the run began")
        self.identity = identity

    # --- holding the folder ---

    def __enter__(self):
        self.signals = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.pool = ThreadPoolExecutor(1)
        self.saving = None
        if parallel.rank() == 0:
            self.hold()
        return self

    def hold(self):
        """Lock the log, and clean up what a process that was killed left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / LOG, "a")  # noqa: SIM115 (open until the run ends: the lock is on it)
        lock(self.file)
        if not self.resumed:
            check_free(self.folder)  # again: another process may have written meanwhile
        for part in self.folder.glob(".part-*"):
            part.unlink(missing_ok=True)
        if size := os.path.getsize(self.file.name):  # a device such as /dev/full has no size
            self.file.truncate(min(self.log_size, size))

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self.pool.shutdown()
            for number, handler in self.signals.items():
                signal.signal(number, handler)
            if parallel.rank() == 0:
                self.file.close()

    def stop(self, *_):
        """Let the loop finish its step and save; the second time, stop at once."""
        if self.stopped:
            raise KeyboardInterrupt("what an evaluation saved is kept: --resume RUN_DIR continues from there")
        self.stopped = True

    # --- writing ---

    def log(self, **line):
        if parallel.rank() == 0:
            print(json.dumps(line), file=self.file, flush=True)

    def report(self, step, losses, density, penalty):
        """Log the mean loss since the last report, and the last regularizer -> what a progress bar shows of it.

        losses: tensors [2] of both, of this process's share. Raises FloatingPointError if they are not finite.
        """
        losses = torch.stack(losses)
        parallel.add_up([losses])
        losses, regularizers = losses.T.tolist()
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss + penalty * regularizers[-1]):
            raise FloatingPointError(f"the loss is {loss} at step {step}: try a smaller --lr, or float32")
        self.log(step=step, loss=loss, density=density, penalty=penalty, regularizer=regularizers[-1])
        return {"loss": f"{loss:.3f}", "density": f"{density:.3f}"}

    def evaluated(self, **line):
        """Log an evaluation, and keep it: a dict with step, density and dev metrics."""
        self.evaluations.append(line)
        self.log(**line)

    def save(self, step, learner, optimizer):
        """Write a checkpoint; then, if the run was asked to stop, raise KeyboardInterrupt.

        Several processes save none: each would need its own random numbers.
        """
        if parallel.processes() == 1:
            self.write_checkpoint(step, learner, optimizer)
        if self.stopped:
            alone = parallel.processes() == 1
            raise KeyboardInterrupt(f"python train.py --resume {self.folder} continues" if alone else "")

    def write_checkpoint(self, step, learner, optimizer):
        """In the background: bert-base's gigabyte takes longer than fifty steps."""
        tensors = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        for i, p in enumerate(learner.parameters()):
            tensors[f"parameter.{i}"] = p.detach()
            for moment in MOMENTS:
                tensors[f"{moment}.{i}"] = optimizer.state[p][moment]
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

        state = {"step": step, "evaluations": list(self.evaluations), "argv": self.argv, "identity": self.identity}
        state |= {"seconds": self.seconds, "log": os.path.getsize(self.file.name)}

        self.wait()
        path = self.folder / CHECKPOINT
        self.saving = self.pool.submit(lambda: write_whole(path, seal(FORMAT, tensors, state)))

    def wait(self):
        """Until the last checkpoint is written. Raises what writing it raised."""
        if self.saving:
            saving = self.saving
            self.saving = None
            saving.result()

    def restore(self, learner, optimizer, total):
        """Put the checkpoint of a resumed run back: parameters, Adam's moments, the state of the random numbers.

        total: steps of the run. Raises ValueError when the checkpoint is of another run.
        """
        if not self.resumed:
            return
        path = self.folder / CHECKPOINT
        tensors, state = read_checkpoint(path)
        parameters = list(learner.parameters())
        expected = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            expected["random.cuda"] = torch.cuda.get_rng_state()
        for i, p in enumerate(parameters):
            expected |= {f"parameter.{i}": p, f"step.{i}": torch.tensor(0.0), f"exp_avg.{i}": p, f"exp_avg_sq.{i}": p}

        # The optimizer trusts its state: a tensor of another shape would have it write beyond its end.
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
        if found != wanted or not 0 < state["step"] <= total or state["step"] != self.step:
            raise ValueError(f"{path} is the checkpoint of another run, or of another kind of device")
        try:
            torch.set_rng_state(tensors["random.cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random.cuda"])
        except RuntimeError as error:
            raise ValueError(f"{path} holds no valid state of random numbers: {error}") from None
        for i, p in enumerate(parameters):
            p.data.copy_(tensors[f"parameter.{i}"])
            optimizer.state[p] = {moment: tensors[f"{moment}.{i}"].to(p.device) for moment in MOMENTS}

    def finish(self, files, result):
        """Write {name: bytes}, then result.json, which makes the run finished."""
        self.wait()
        for name, content in files.items():
            write_whole(self.folder / name, content)
        write_whole(self.folder / RESULT, json_bytes(result))
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def interrupted_run(folder):
    """The run that stopped in a folder. Raises ValueError when it cannot continue."""
    if (folder / RESULT).exists():
        raise ValueError(f"--resume: {folder} is finished; look at it with: python eval.py {folder}")
    if not (folder / CHECKPOINT).exists():
        raise ValueError(f"--resume: there is no {folder / CHECKPOINT}; a run has one once it has evaluated")
    parallel.refuse("--resume")
    _, state = read_checkpoint(folder / CHECKPOINT)
    return Run(folder, state["argv"], state)


def identity(folder, model):
    """What ties a mask to its model: {"fingerprint": digest of all pretrained weights, "config", "tokenizer"}."""
    pretrained = {name: t for name, t in model.state_dict().items() if not name.startswith("classifier.")}
    tokenizer = file_digest(folder / "tokenizer.json")
    return {"fingerprint": digest(pretrained), "config": str(model.config), "tokenizer": tokenizer}


def check_free(folder):
    """Raise ValueError unless a folder is new, empty, or of a run that saved nothing."""
    if (folder / RESULT).exists():
        raise ValueError(f"--out: {folder} holds a finished run; name another folder or seed, or delete it")
    if (folder / CHECKPOINT).exists():
        raise ValueError(f"--out: {folder} holds an interrupted run; --resume {folder} continues it, or delete it")
    if folder.exists() and any(folder.iterdir()) and not (folder / LOG).exists():
        raise ValueError(f"--out: {folder} holds files that are not of a run; name another folder")


def read_description(run):
    """What describes a finished run's folder (result.json) or a mask file, a dict as DESCRIBED says.

    Raises ValueError when there is no finished run, or not of this code.
    """
    path = run if run.is_file() else run / RESULT
    if not path.exists():
        state = "an interrupted or still running" if (run / LOG).exists() else "no finished"
        saved = (run / CHECKPOINT).exists()
        remedy = f"python train.py --resume {run} continues it" if saved else "run its train.py command to the end"
        raise ValueError(f"{run} holds {state} run: there is no {path}; {remedy}")
    result = read_masks(path)[2] if run.is_file() else read_json(path)
    what = f"{path} is not the result of a run of this train.py"
    check_types(result, DESCRIBED, what)
    check_types(result["final"], dict.fromkeys(result["final"], float), what)
    for key, choices in CHOICES.items():
        if result[key] not in choices:
            raise ValueError(f"{what}: {key} is {result[key]!r}")
    return result


def read_checkpoint(path):
    """-> (tensors, state, see STATE). Raises ValueError when the file was altered or is not a checkpoint."""
    tensors, state = unseal(path, FORMAT)
    what = f"{path} is not a valid checkpoint"
    check_types(state, STATE, what)
    if min(state["step"], state["log"]) < 0 or not all(isinstance(word, str) for word in state["argv"]):
        raise ValueError(f"{what}: its step, log or argv")
    for evaluation in state["evaluations"]:
        check_types(evaluation, {"step": int, "density": float, "dev": dict}, what)
    return tensors, state
