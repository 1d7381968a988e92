"""Several processes of one run, one per GPU: their ranks, their order, their sums and checks.

Without torchrun there is one process, and every function returns at once.

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
    """Return this process's number, from 0. Process 0 writes the files and prints."""
    return int_from_environment("RANK", 0) if processes() > 1 else 0


def processes():
    """Return how many processes there are: torch's world size."""
    return int_from_environment("WORLD_SIZE", 1)


def int_from_environment(name, default):
    """Read a number that torchrun sets. Raises ValueError if it is something else."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < default:
        raise ValueError(f"{name} is {text!r}, which torchrun would not set; unset it")
    return int(text)


def require_one_process(what):
    """Raise ValueError if there are several processes. All but the first exit silently."""
    if rank() > 0:
        raise SystemExit(2)
    if processes() > 1:
        raise ValueError(f"{what} takes one process: start it with python, not with torchrun")


def start(device):
    """Join the other processes. Only process 0 prints from here on.

    On CUDA each process takes the GPU with its local rank. Raises ValueError if there are too
    few GPUs.
    """
    if processes() == 1:
        return
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"--nproc_per_node: this machine has {gpus} GPUs; there can be one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def first_process_first():
    """Let process 0 run the block before the others, so that only one process downloads."""
    if processes() > 1 and rank() > 0:
        try:
            dist.barrier()
        except RuntimeError:  # process 0 has exited and said why
            raise SystemExit(2) from None
    yield
    if processes() > 1 and rank() == 0:
        dist.barrier()


def shard(items):
    """Return this process's items. Each item belongs to exactly one process."""
    return items[rank() :: processes()]


def gather(items):
    """Invert shard: every process gets all items, in their order."""
    if processes() == 1:
        return items
    shards = [None] * processes()
    dist.all_gather_object(shards, items)
    total = sum(len(part) for part in shards)
    return [shards[i % processes()][i // processes()] for i in range(total)]


def all_reduce(tensors):
    """Sum each tensor over the processes -> the sums. The tensors may be overwritten."""
    if processes() == 1:
        return tensors

    if len(tensors) > 8:
        # One exchange, at the price of a copy, costs less than two hundred.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in pending:
        work.wait()
    return tensors


def all_reduce_gradients(parameters):
    """Replace each parameter's gradient with its sum over the processes."""
    sums = all_reduce([p.grad for p in parameters])
    for p, gradient in zip(parameters, sums, strict=True):
        p.grad = gradient  # a new tensor, if many were sent as one


def check_equal(tensors):
    """Raise FloatingPointError unless {name: tensor} is bit-identical in all processes."""
    if processes() > 1 and len(set(gather([digest(tensors)]))) > 1:
        raise FloatingPointError(
            "the processes no longer hold the same scores or weights; the run is worth nothing"
        )


def stop():
    """Leave the other processes, once all are ready to leave."""
    if processes() > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads need the interpreter to release their last tensors. They abort if it has
        # exited already.
        time.sleep(0.2)
