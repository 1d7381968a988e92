"""Several processes of one run, one for each GPU: who is who, who goes first, what they add up and compare.

A process alone is the only one: every function then returns at once.

    torchrun --standalone --nproc_per_node=2 train.py --task rte
"""

import os
import sys
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from plumbing.files import digest


def rank():
    """This process's number, from 0. Process 0 writes the files and prints."""
    return environment("RANK", 0) if processes() > 1 else 0


def processes():
    return environment("WORLD_SIZE", 1)


def environment(name, default):
    """A number that torchrun sets. Raises ValueError when it is set to something else."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < default:
        raise ValueError(f"{name} is {text!r}, which torchrun would not set; unset it")
    return int(text)


def refuse(what):
    """Raise ValueError if there are several processes; all but the first end without a word."""
    if rank() > 0:
        raise SystemExit(2)
    if processes() > 1:
        raise ValueError(f"{what} takes one process: start it with python, not with torchrun")


def start(device):
    """Join the other processes. On CUDA each takes the GPU of its number on this machine; only process 0 prints.

    Raises ValueError when there are too few GPUs.
    """
    if processes() == 1:
        return
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(
                f"--nproc_per_node: this machine has {gpus} GPUs, one for each process at most"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def first_process_first():
    """The others wait until process 0 has done what follows, so that only one downloads."""
    if processes() > 1 and rank() > 0:
        try:
            dist.barrier()
        except RuntimeError:  # process 0 has ended, and said why
            raise SystemExit(2) from None
    yield
    if processes() > 1 and rank() == 0:
        dist.barrier()


def share(items):
    """This process's items; each item belongs to exactly one process."""
    return items[rank() :: processes()]


def gather(items):
    """The inverse of share: all items in their order, in every process."""
    if processes() == 1:
        return items
    shares = [None] * processes()
    dist.all_gather_object(shares, items)
    total = sum(len(part) for part in shares)
    return [shares[i % processes()][i // processes()] for i in range(total)]


def add_up(tensors):
    """-> the sum of each tensor over the processes; the tensors themselves may become these sums."""
    if processes() == 1:
        return tensors
    if len(tensors) > 8:  # one exchange, for the price of a copy, costs less than two hundred
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in pending:
        work.wait()
    return tensors


def add_up_gradients(parameters):
    """Give each parameter the sum of its gradients over the processes, a new tensor where many went as one."""
    for p, gradient in zip(parameters, add_up([p.grad for p in parameters]), strict=True):
        p.grad = gradient


def check_equal(tensors):
    """Raise FloatingPointError unless all processes hold the same tensors {name: tensor}, to the bit."""
    if processes() > 1 and len(set(gather([digest(tensors)]))) > 1:
        raise FloatingPointError(
            "the processes no longer hold the same scores or weights; the run is worth nothing"
        )


def stop():
    """Leave the other processes once all are ready to."""
    if processes() > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads need the interpreter to let go of their last tensors; one that is gone has them abort.
        time.sleep(0.2)
