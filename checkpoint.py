"""Checkpoints: all that a run needs to go on as if it had never stopped, in one safetensors file.

What it is: scores or weights, Adam's moments, the state of the random numbers, and a JSON description beside them.
What it is not: it decides neither when to save nor where to go on. Sources: none.

    with in_background() as start:
        start(save_checkpoint(path, learner, optimizer, {"step": 300, ...}))
    state = restore(path, learner, optimizer, total=598)
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fetch import write_whole
from model import digest

CHECKPOINT = "checkpoint.safetensors"  # in a run folder
# What describes a checkpoint: argv and identity are the run's; seconds spent and bytes of the log so far.
STATE = {"step": int, "evaluations": list, "argv": list, "identity": dict, "spent": float, "log": int}


def tensors_of(learner, optimizer):
    """{name: tensor} of the parameters and of what the optimizer keeps for each."""
    parameters = list(learner.parameters())
    kept = {f"{key}.{i}": t for i, p in enumerate(parameters) for key, t in optimizer.state[p].items()}
    return kept | {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}


def save_checkpoint(path, learner, optimizer, state):
    """-> a function that writes what now is to a file that appears whole or not at all.

    state: a dict for JSON with the keys of STATE.
    """
    tensors = tensors_of(learner, optimizer) | {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    described = json.dumps(state)
    return lambda: write_whole(path, save(tensors, {"state": described, "sha256": digest(tensors, described)}))


@contextmanager
def in_background():
    """A function that starts another and returns; first it waits for the one before, and raises what that raised.

    bert-base's gigabyte of scores and moments takes longer to reach a disk than fifty steps.
    """
    with ThreadPoolExecutor(1) as pool:
        before = []

        def start(work=None):
            if before:
                before.pop().result()
            if work:
                before.append(pool.submit(work))

        try:
            yield start
        finally:
            start()


def read(path):
    """A checkpoint -> (description, a dict with the keys of STATE; tensors {name: tensor}).

    Raises ValueError when it is none, or was altered.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if header["sha256"] != digest(tensors, header["state"]):
            raise ValueError("it was altered, its content is not what its sha256 says")
        state = json.loads(header["state"])
        if not all(type(state[key]) is kind for key, kind in STATE.items()) or min(state["log"], state["step"]) < 0:
            raise ValueError("its description is none")
        if not all(type(e["dev"]) is dict and e["step"] >= 0 and 0 <= e["density"] <= 1 for e in state["evaluations"]):
            raise ValueError("its evaluations are none")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a checkpoint of train.py: {error}") from None
    return state, tensors


def restore(path, learner, optimizer, total):
    """Put a checkpoint back -> its description.

    total: steps of the run. Raises ValueError when the file was altered, or is of another run.
    """
    parameters = list(learner.parameters())
    state, tensors = read(path)
    moments, expected = ("step", "exp_avg", "exp_avg_sq"), {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        expected["random.cuda"] = torch.cuda.get_rng_state()
    for i, p in enumerate(parameters):
        expected |= {f"parameter.{i}": p, f"step.{i}": torch.tensor(0.0), f"exp_avg.{i}": p, f"exp_avg_sq.{i}": p}
    # The optimizer trusts its state: one of another shape would have it write outside of it.
    there = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if there != {name: (like.shape, like.dtype) for name, like in expected.items()} or not 0 < state["step"] <= total:
        raise ValueError(f"{path} is the checkpoint of another run, or of another kind of device")
    try:
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in expected:
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except RuntimeError as error:
        raise ValueError(f"{path} holds no state of random numbers: {error}") from None
    for i, p in enumerate(parameters):
        p.data.copy_(tensors[f"parameter.{i}"])
        optimizer.state[p] = {key: tensors[f"{key}.{i}"].to(p.device) for key in moments}
    return state
