"""The folder of a run. One process writes to it, and an interrupted run can continue from it.

log.jsonl gets a line per log interval and per evaluation. checkpoint.safetensors holds everything
that a run needs to continue as if it had never stopped. result.json is written last, so a folder
that has one is complete.

    run = Run(folder, argv)  # or interrupted_run(folder)
    with run:  # holds the folder
        run.restore(learner, optimizer, total, metrics)
        for step in range(run.step, total):
            ...
            run.save(step + 1, learner, optimizer)
        run.finish({"mask.safetensors": content}, result)
"""

import json
import math
import os
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from plumbing import files, parallel
from plumbing.checkpoints import tokenizer_bytes
from plumbing.cli import code_version, flag

LOG, CHECKPOINT, RESULT = "log.jsonl", "checkpoint.safetensors", "result.json"
# The other files that a run writes into its folder.
WRITTEN = {
    "mask.safetensors",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
FORMAT = "smp-checkpoint-3"  # 2 had other settings in its identity
# A checkpoint holds these beside its tensors.
STATE = {
    "step": int,  # how many steps are done
    "evaluations": list,  # see Run.evaluations
    "argv": list,  # the words of the command
    "identity": dict,  # everything that the run depends on, see check_identity
    "seconds": float,  # computed so far
    "log": int,  # the size of the log in bytes
}
# result.json, and the description of a mask file, must hold these. They hold much else.
DESCRIBED = {
    "task": str,
    "method": str,
    "model": str,
    "words": dict,
    "length": int,
    "head": str,
    "final": dict,
    "fingerprint": str,
    "tokenizer": str,
    "config": str,
    "sha256": dict,
    "density": float,
    "device": str,
    "dtype": str,
    "data_dir": (str, type(None)),
}
CHOICES = {"head": ("words", "classifier"), "dtype": ("float32", "bfloat16")}


class Run:
    """A run in `folder`. argv: the words of its command. state: from a checkpoint, see STATE.

    Without a state the run is new. Its folder must be new or empty, or the folder of a run that
    saved nothing, which the new run replaces. Otherwise this raises ValueError, here or when it is
    entered.
    """

    def __init__(self, folder, argv, state=None):
        self.folder = Path(folder)
        self.checkpoint = self.folder / CHECKPOINT
        self.argv = argv
        self.resumed = state is not None
        self.stopped = False  # whether SIGINT or SIGTERM has arrived
        if not self.resumed:
            state = {"step": 0, "evaluations": [], "identity": {}, "seconds": 0.0, "log": 0}
            self.check_free()
        self.step = state["step"]  # done before this process began
        self.evaluations = state["evaluations"]  # dicts with step, density and dev metrics
        self.identity = state["identity"]
        self.began = time.time() - state["seconds"]
        # The lines beyond were logged after the checkpoint. They will be logged again.
        self.log_size = state["log"]

    @property
    def seconds(self):
        return time.time() - self.began

    def check_free(self):
        """Raise ValueError if a new run must not write into the folder."""
        if parallel.rank() > 0 or not self.folder.exists():
            return
        what = f"--out: {self.folder}"
        if not self.folder.is_dir():
            raise ValueError(f"{what} is not a folder")
        found = {path.name for path in self.folder.iterdir()}
        if RESULT in found:
            raise ValueError(
                f"{what} holds a finished run; name another folder or seed, or delete it"
            )
        if CHECKPOINT in found:
            raise ValueError(
                f"{what} holds an interrupted run; --resume {self.folder} continues it, "
                "or delete it"
            )

        # A run that ended before its first checkpoint leaves a log, and perhaps other files.
        others = {name for name in found - {LOG} if not files.PART.fullmatch(name)}
        only_ours = others <= WRITTEN and is_log(self.folder / LOG, empty=not others)
        if found and not only_ours:
            raise ValueError(f"{what} holds files that no run wrote; name another folder")

    def check_identity(self, flags, description):
        """Raise ValueError if a resumed run depends on anything that is different now.

        flags: {name: value}. description: {what: value}, the model, the data, the device and so on.
        """
        identity = {
            flag(name): str(value) for name, value in flags.items() if name not in ("out", "resume")
        }
        identity |= description
        for what, value in identity.items():
            before = self.identity.get(what)
            if self.resumed and before != value:
                raise ValueError(
                    f"--resume: {what} is {value} now, and was {before} when the run began"
                )
        self.identity = identity

    # --- holding the folder ---

    def __enter__(self):
        self.file = self.hold() if parallel.rank() == 0 else None
        self.pool = ThreadPoolExecutor(1)
        self.saving = None  # the last checkpoint, while it is written
        self.handlers = {}  # the handlers so far, to be put back
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.stop)
        return self

    def hold(self):
        """Lock the folder -> its log, open, and cut to where the run continues.

        Closing the log unlocks the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open_log(self.folder / LOG)
        try:
            files.lock(file)
            # Check again, as another process may have written before the folder was locked.
            if self.resumed:
                check_interrupted(self.folder, self.step)
            else:
                self.check_free()
        except ValueError:
            file.close()
            raise
        files.remove_parts(self.folder)
        if size := os.fstat(file.fileno()).st_size:
            file.truncate(min(self.log_size, size))
        return file

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self.pool.shutdown()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.file:
                self.file.close()

    def stop(self, *_):
        """Let the loop finish its step and save. The second time, stop at once."""
        if self.stopped:
            raise KeyboardInterrupt(
                "--resume RUN_DIR continues from the last evaluation, if there was one"
            )
        self.stopped = True
        if parallel.rank() == 0:
            line = b"\nstopping after this step or evaluation; interrupt again to stop at once\n"
            with suppress(OSError):
                os.write(2, line)  # the signal may have come in the middle of a print

    # --- writing ---

    def log(self, **line):
        if self.file:
            print(json.dumps(line), file=self.file, flush=True)

    def report(self, step, losses, density, penalty):
        """Log the mean loss since the last report, and the last regularizer.

        losses: per step a tensor [2] of loss and regularizer, this process's share. Returns what a
        progress bar shows. Raises FloatingPointError if one of them is not finite.
        """
        (sums,) = parallel.all_reduce([torch.stack(losses)])
        losses, regularizers = sums.T.tolist()  # [steps, 2] -> two lists
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss + penalty * regularizers[-1]):
            raise FloatingPointError(
                f"the loss is {loss} at step {step}: try a smaller --lr, or float32"
            )
        self.log(
            step=step, loss=loss, density=density, penalty=penalty, regularizer=regularizers[-1]
        )
        return {"loss": f"{loss:.3f}", "density": f"{density:.3f}"}

    def evaluated(self, **line):
        self.evaluations.append(line)
        self.log(**line)

    def save(self, step, learner, optimizer):
        """Write a checkpoint. Raises KeyboardInterrupt if the run was asked to stop.

        Several processes save nothing.
        """
        how = ""
        if parallel.processes() == 1:
            how = f"python train.py --resume {self.folder} continues"
            # Copies, because training goes on meanwhile.
            tensors = random_states() | training_state(learner, optimizer)
            copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            state = {
                "step": step,
                "evaluations": list(self.evaluations),
                "argv": self.argv,
                "identity": self.identity,
                "seconds": self.seconds,
                "log": os.fstat(self.file.fileno()).st_size,
            }
            # Writing bert-base's gigabyte takes longer than fifty steps, so a thread does it.
            self.wait()
            self.saving = self.pool.submit(write_checkpoint, self.checkpoint, copies, state)
        if self.stopped:
            raise KeyboardInterrupt(how)

    def wait(self):
        """Wait until the last checkpoint is written. Raises any error from writing it."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def restore(self, learner, optimizer, total, metrics):
        """Load the checkpoint of a resumed run. A new run has none to load.

        Raises ValueError unless it comes from this run: a run of `total` steps, with these metrics
        in its evaluations.
        """
        if not self.resumed:
            return
        stored, state = read_checkpoint(self.checkpoint)
        ours = training_state(learner, optimizer)

        # The optimizer trusts its state: it would write beyond the end of a tensor too small.
        same_tensors = shapes(stored) == shapes(random_states() | ours)
        same_metrics = all(line["dev"].keys() >= set(metrics) for line in state["evaluations"])
        same_step = 0 < state["step"] == self.step <= total
        if not (same_tensors and same_metrics and same_step):
            raise ValueError(
                f"{self.checkpoint} is the checkpoint of another run, or of another kind of device"
            )

        try:
            torch.set_rng_state(stored["random.cpu"])
            if "random.cuda" in stored:
                torch.cuda.set_rng_state(stored["random.cuda"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.checkpoint} holds no valid state of random numbers: {error}"
            ) from None
        for name, tensor in ours.items():
            tensor.copy_(stored[name])

    def facts(self):
        """Describe the run itself, for result.json."""
        final = self.evaluations[-1]
        facts = {
            "steps": final["step"],
            "final": final["dev"],
            "seconds": round(self.seconds, 1),
            "command": shlex.join(["python", "train.py", *self.argv]),
        }
        return facts | code_version()

    def finish(self, contents, result):
        """Write files {name: bytes}. Then write result.json, which marks the run as finished."""
        self.wait()
        for name, content in contents.items():
            files.write_whole(self.folder / name, content)
        files.write_whole(self.folder / RESULT, files.json_bytes(result))
        self.checkpoint.unlink(missing_ok=True)


# --- checkpoints ----------------------------------------------------------------------------------


def random_states():
    """{name: state of the random number generator}, one per kind of device."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def training_state(learner, optimizer):
    """{name: tensor} of the parameters, Adam's step and its moments. Not copies."""
    tensors = {}
    for i, p in enumerate(learner.parameters()):
        tensors[f"parameter.{i}"] = p.detach()
        state = optimizer.state[p]
        if not state:  # before its first step, Adam has none
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        for key, tensor in state.items():
            tensors[f"{key}.{i}"] = tensor.detach()
    return tensors


def shapes(tensors):
    """{name: tensor} -> {name: (shape, dtype)}."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def write_checkpoint(path, tensors, state):
    files.write_whole(path, files.seal(FORMAT, tensors, state))


def read_checkpoint(path):
    """-> (tensors, state). Raises ValueError if the file was altered or is not a checkpoint."""
    tensors, state = files.unseal(path, FORMAT)
    what = f"{path} is not a valid checkpoint"
    files.check_types(state, STATE, what)
    words = all(isinstance(word, str) for word in state["argv"])
    if min(state["step"], state["log"]) < 0 or not words:
        raise ValueError(f"{what}: its step, log or argv")
    for evaluation in state["evaluations"]:
        files.check_types(evaluation, {"step": int, "density": float, "dev": dict}, what)
        files.check_types(evaluation["dev"], dict.fromkeys(evaluation["dev"], float), what)
    return tensors, state


def interrupted_run(folder):
    """The interrupted Run in a folder. Raises ValueError if it cannot continue."""
    parallel.require_one_process("--resume")
    state = check_interrupted(folder)
    return Run(folder, state["argv"], state)


def check_interrupted(folder, step=None):
    """-> the state in a folder's checkpoint. Raises ValueError if it has none.

    step: the checkpoint must be of this step, if given.
    """
    path = folder / CHECKPOINT
    if (folder / RESULT).exists():
        # A run that is killed after its last write leaves its checkpoint. Remove it.
        with suppress(ValueError, OSError):
            read_checkpoint(path)
            path.unlink()
        raise ValueError(
            f"--resume: {folder} is finished; look at it with: python eval.py {folder}"
        )
    if not path.exists():
        raise ValueError(f"--resume: there is no {path}; a run writes one at each evaluation")
    _, state = read_checkpoint(path)
    if step not in (None, state["step"]):
        raise ValueError(
            f"--resume: another process has taken {folder} on to step {state['step']}; "
            "resume it again"
        )
    return state


def open_log(path):
    """Open a log to append to it. Raises ValueError for a link, which could name any other file."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; remove it")
    no_link = getattr(os, "O_NOFOLLOW", 0)  # 0 on Windows, which has no such flag
    return open(path, "a", opener=lambda path, flags: os.open(path, flags | no_link, 0o666))


def is_log(path, empty):
    """Whether a file begins as a run's log does. empty: whether an empty file counts."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        first = file.readline(1 << 16)
    if not first:
        return empty
    try:
        return {"step", "density"} <= json.loads(first).keys()
    except (ValueError, RecursionError, AttributeError):
        return False


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
    """Read the description of a finished run, see DESCRIBED. run: its folder, or a mask file.

    Raises ValueError if the run is not finished, or was not made by this code.
    """
    if not run.exists():
        raise ValueError(f"there is no folder or file {run}")
    if run.is_file():
        path = run
        _, about = files.read_masks(path)
        result = about["run"]
    else:
        path = run / RESULT
        if not path.exists():
            raise ValueError(describe_unfinished(run))
        result = files.read_json(path)

    what = f"{path} is not the result of a run of this train.py"
    files.check_types(result, DESCRIBED, what)
    files.check_types(result["final"], dict.fromkeys(result["final"], float), what)
    for key, choices in CHOICES.items():
        if result[key] not in choices:
            raise ValueError(f"{what}: {key} is {result[key]!r}")
    return result


def describe_unfinished(folder):
    """Say why a folder has no result, and what to do."""
    if not (folder / LOG).exists():
        return f"{folder} is not the folder of a run: there is no {folder / RESULT}"
    remedy = "run its train.py command to the end"
    if (folder / CHECKPOINT).exists():
        remedy = f"python train.py --resume {folder} continues it"
    return f"{folder} holds an interrupted or still running run; {remedy}"
