"""Checkpoints: all that a run needs to go on as if it had never stopped, in one safetensors file.

What it is: scores or weights, Adam's moments, the state of the random numbers, and a JSON description beside them.
What it is not: it decides neither when to save nor where to go on. Sources: none.

    save_checkpoint(path, learner, optimizer, {"step": 300})
    state = restore(path, learner, optimizer)
"""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fetch import write_whole


def tensors_of(learner, optimizer):
    """{name: tensor} of the parameters and of what the optimizer keeps for each."""
    parameters = list(learner.parameters())
    kept = {f"{key}.{i}": t for i, p in enumerate(parameters) for key, t in optimizer.state[p].items()}
    return kept | {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}


def save_checkpoint(path, learner, optimizer, state):
    """Write a file that appears whole or not at all; state: a dict for JSON."""
    tensors = tensors_of(learner, optimizer) | {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_whole(path, save({n: t.cpu().contiguous() for n, t in tensors.items()}, {"state": json.dumps(state)}))


def read_state(path):
    """The description in a checkpoint. Raises ValueError when it is none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of train.py: {error}") from None


def restore(path, learner, optimizer):
    """Put a checkpoint back -> its description. Raises ValueError when it is of another run."""
    parameters = list(learner.parameters())
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for i, p in enumerate(parameters):
        stored = tensors.get(f"parameter.{i}")
        if stored is None or stored.shape != p.shape:
            raise ValueError(f"{path} is the checkpoint of another run")
        p.data.copy_(stored)
        moments = {key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {key: moment.to(p.device) for key, moment in moments.items()}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return read_state(path)
