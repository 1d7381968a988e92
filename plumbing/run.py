"""A run's folder: one process writes to it, everything in it can be trusted, and an interrupted run continues.

log.jsonl has a line for each log interval and evaluation; checkpoint.safetensors holds all that a run needs to continue
as if it had never stopped; result.json is written last.

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
# What else a run writes into its folder.
WRITTEN = {
    "mask.safetensors",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
FORMAT = "smp-checkpoint-2"
# What a checkpoint says beside its tensors. identity: what the run depends on; seconds: spent; log: bytes of the log.
STATE = {
    "step": int,
    "evaluations": list,
    "argv": list,
    "identity": dict,
    "seconds": float,
    "log": int,
}
# What result.json, or the description of a mask file, must say, beside much else.
DESCRIBED = {
    "task": str,
    "method": str,
    "model": str,
    "words": dict,
    "length": int,
    "head": str,
    "final": dict,
}
DESCRIBED |= {
    "fingerprint": str,
    "tokenizer": str,
    "config": str,
    "sha256": dict,
    "density": float,
    "device": str,
}
DESCRIBED |= {"dtype": str, "data_dir": (str, type(None))}
CHOICES = {"head": ("words", "classifier"), "dtype": ("float32", "bfloat16")}


class Run:
    """A run in `folder`. argv: the words of its command; state: what an interrupted run saved, see STATE.

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
            self.check_free()
        self.step = state["step"]  # done before this process began
        self.evaluations = state["evaluations"]  # dicts with step, density and dev metrics
        self.identity = state["identity"]
        self.began = time.time() - state["seconds"]
        self.log_size = state[
            "log"
        ]  # what lies beyond came after the checkpoint, and will come again

    @property
    def seconds(self):
        return time.time() - self.began

    def check_free(self):
        if parallel.rank() > 0 or not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"--out: {self.folder} is not a folder")
        found = {path.name for path in self.folder.iterdir()}
        if RESULT in found:
            raise ValueError(
                f"--out: {self.folder} holds a finished run; name another folder or seed, or delete it"
            )
        if CHECKPOINT in found:
            how = f"--resume {self.folder} continues it"
            raise ValueError(f"--out: {self.folder} holds an interrupted run; {how}, or delete it")
        others = {name for name in found - {LOG} if not files.PART.fullmatch(name)}
        if others - WRITTEN or found and not is_log(self.folder / LOG, empty=not others):
            raise ValueError(
                f"--out: {self.folder} holds files that are not of a run; name another folder"
            )

    def check_identity(self, flags, description):
        """Raise ValueError when a resumed run has other defaults, model, data or device than it began with.

        flags: {name: value}; description: of the rest, {what: value}.
        """
        identity = {
            flag(name): str(value) for name, value in flags.items() if name not in ("out", "resume")
        }
        identity |= description
        for what, value in identity.items() if self.resumed else ():
            before = self.identity.get(what)
            if before != value:
                raise ValueError(
                    f"--resume: {what} is {value} now, and was {before} when the run began"
                )
        self.identity = identity

    # --- holding the folder ---

    def __enter__(self):
        self.file = self.hold() if parallel.rank() == 0 else None
        self.pool = ThreadPoolExecutor(1)
        self.saving = None
        self.signals = {
            number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def hold(self):
        """-> the log, open, locked until it is closed, and cut to where the run continues."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open_log(self.folder / LOG)
        try:
            files.lock(file)
            # Again, now that nobody else writes: another process may have, meanwhile.
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
            for number, handler in self.signals.items():
                signal.signal(number, handler)
            if self.file:
                self.file.close()

    def stop(self, *_):
        """Let the loop finish its step and save; the second time, stop at once."""
        if self.stopped:
            raise KeyboardInterrupt(
                "what an evaluation saved is kept: --resume RUN_DIR continues from there"
            )
        self.stopped = True
        if parallel.rank() == 0:
            with suppress(OSError):  # not print, which may be at work just now
                os.write(
                    2, b"\nstopping once this step, or evaluation, is done; again to stop at once\n"
                )

    # --- writing ---

    def log(self, **line):
        if self.file:
            print(json.dumps(line), file=self.file, flush=True)

    def report(self, step, losses, density, penalty):
        """Log the mean loss since the last report, and the last regularizer -> what a progress bar shows of it.

        losses: tensors [2] of both, of this process's share. Raises FloatingPointError if they are not finite.
        """
        (sums,) = parallel.all_reduce([torch.stack(losses)])
        losses, regularizers = sums.T.tolist()
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
        """Write a checkpoint in the background; bert-base's gigabyte takes longer than fifty steps.

        Raises KeyboardInterrupt if the run was asked to stop. Several processes save nothing.
        """
        how = ""
        if parallel.processes() == 1:
            how = f"python train.py --resume {self.folder} continues"
            tensors = random_states() | training_state(learner, optimizer)
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            state = {
                "step": step,
                "evaluations": list(self.evaluations),
                "argv": self.argv,
                "identity": self.identity,
            }
            state |= {"seconds": self.seconds, "log": os.fstat(self.file.fileno()).st_size}
            self.wait()
            path = self.folder / CHECKPOINT
            self.saving = self.pool.submit(
                lambda: files.write_whole(path, files.seal(FORMAT, tensors, state))
            )
        if self.stopped:
            raise KeyboardInterrupt(how)

    def wait(self):
        """Until the last checkpoint is written. Raises what writing it raised."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def restore(self, learner, optimizer, total, metrics):
        """Put the checkpoint of a resumed run back.

        Raises ValueError when it is not of this run of `total` steps, whose evaluations hold these metrics.
        """
        if not self.resumed:
            return
        path = self.folder / CHECKPOINT
        stored, state = read_checkpoint(path)
        ours = random_states() | training_state(learner, optimizer)
        # The optimizer trusts its state: a tensor of another shape would have it write beyond its end.
        found, wanted = (
            {name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (stored, ours)
        )
        measured = all(line["dev"].keys() >= set(metrics) for line in state["evaluations"])
        if found != wanted or not measured or not 0 < state["step"] == self.step <= total:
            raise ValueError(
                f"{path} is the checkpoint of another run, or of another kind of device"
            )
        try:
            torch.set_rng_state(stored["random.cpu"])
            if "random.cuda" in stored:
                torch.cuda.set_rng_state(stored["random.cuda"])
        except RuntimeError as error:
            raise ValueError(f"{path} holds no valid state of random numbers: {error}") from None
        for name, tensor in training_state(learner, optimizer).items():
            tensor.copy_(stored[name])

    def facts(self):
        """What result.json says of the run itself."""
        final = self.evaluations[-1]
        seconds = round(self.seconds, 1)
        command = shlex.join(["python", "train.py", *self.argv])
        facts = {
            "steps": final["step"],
            "final": final["dev"],
            "seconds": seconds,
            "command": command,
        }
        return facts | code_version()

    def finish(self, contents, result):
        """Write {name: bytes}, then result.json, which makes the run finished."""
        self.wait()
        for name, content in contents.items():
            files.write_whole(self.folder / name, content)
        files.write_whole(self.folder / RESULT, files.json_bytes(result))
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


# --- checkpoints ---------------------------------------------------------------------------------------------


def random_states():
    """{name: state of the random numbers} of each kind of device."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def training_state(learner, optimizer):
    """{name: tensor}, the tensors themselves, of the parameters and of Adam's step and moments."""
    tensors = {}
    for i, p in enumerate(learner.parameters()):
        state = optimizer.state[p]
        if not state:  # before the first step
            state |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
            state["exp_avg_sq"] = torch.zeros_like(p)
        tensors |= {f"parameter.{i}": p.detach()} | {
            f"{key}.{i}": tensor.detach() for key, tensor in state.items()
        }
    return tensors


def read_checkpoint(path):
    """-> (tensors, state, see STATE). Raises ValueError when the file was altered or is not a checkpoint."""
    tensors, state = files.unseal(path, FORMAT)
    what = f"{path} is not a valid checkpoint"
    files.check_types(state, STATE, what)
    if min(state["step"], state["log"]) < 0 or not all(
        isinstance(word, str) for word in state["argv"]
    ):
        raise ValueError(f"{what}: its step, log or argv")
    for evaluation in state["evaluations"]:
        files.check_types(evaluation, {"step": int, "density": float, "dev": dict}, what)
        files.check_types(evaluation["dev"], dict.fromkeys(evaluation["dev"], float), what)
    return tensors, state


def interrupted_run(folder):
    """The run that stopped in a folder. Raises ValueError when it cannot continue."""
    parallel.require_one_process("--resume")
    state = check_interrupted(folder)
    return Run(folder, state["argv"], state)


def check_interrupted(folder, step=None):
    """-> the state of the checkpoint in a folder. Raises ValueError if there is none, or none of the given step."""
    if (folder / RESULT).exists():
        with suppress(
            ValueError, OSError
        ):  # one that a run left behind that was killed before it could remove it
            read_checkpoint(folder / CHECKPOINT)
            (folder / CHECKPOINT).unlink()
        raise ValueError(
            f"--resume: {folder} is finished; look at it with: python eval.py {folder}"
        )
    if not (folder / CHECKPOINT).exists():
        raise ValueError(
            f"--resume: there is no {folder / CHECKPOINT}; a run has one once it has evaluated"
        )
    _, state = read_checkpoint(folder / CHECKPOINT)
    if step not in (None, state["step"]):
        raise ValueError(
            f"--resume: another process has taken {folder} on to step {state['step']}; resume it again"
        )
    return state


def open_log(path):
    """-> a log, open to be appended to. Raises ValueError for a link, which could lead to somebody else's file."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; remove it")
    no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    return open(path, "a", opener=lambda path, flags: os.open(path, flags | no_link, 0o666))


def is_log(path, empty):
    """Whether a file begins as a run's log does; empty: whether an empty one counts."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        first = file.readline(1 << 16)
    try:
        return {"step", "density"} <= json.loads(first).keys() if first else empty
    except (ValueError, RecursionError, AttributeError):
        return False


# --- finished runs -------------------------------------------------------------------------------------------


def identity(folder, model):
    """What ties a mask to its model: {"fingerprint": digest of all pretrained weights, "config", "tokenizer"}."""
    pretrained = {
        name: t for name, t in model.state_dict().items() if not name.startswith("classifier.")
    }
    tokenizer = files.sha256(tokenizer_bytes(folder))
    return {
        "fingerprint": files.digest(pretrained),
        "config": str(model.config),
        "tokenizer": tokenizer,
    }


def read_description(run):
    """What describes a finished run's folder (result.json) or a mask file, a dict as DESCRIBED says.

    Raises ValueError when there is no finished run, or not of this code.
    """
    path = run if run.is_file() else run / RESULT
    if not run.exists():
        raise ValueError(f"there is no folder or file {run}")
    if not path.exists() and not (run / LOG).exists():
        raise ValueError(f"{run} is not the folder of a run: there is no {path}")
    if not path.exists():
        saved = (run / CHECKPOINT).exists()
        remedy = (
            f"python train.py --resume {run} continues it"
            if saved
            else "run its train.py command to the end"
        )
        raise ValueError(f"{run} holds an interrupted or still running run; {remedy}")
    result = files.read_masks(path)[1]["run"] if run.is_file() else files.read_json(path)
    what = f"{path} is not the result of a run of this train.py"
    files.check_types(result, DESCRIBED, what)
    files.check_types(result["final"], dict.fromkeys(result["final"], float), what)
    for key, choices in CHOICES.items():
        if result[key] not in choices:
            raise ValueError(f"{what}: {key} is {result[key]!r}")
    return result
