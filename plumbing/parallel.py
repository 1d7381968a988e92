"""Several processes of one run, one per GPU: their ranks, their shares and their sums.

Without torchrun there is one process, and every function returns at once.

    torchrun --standalone --nproc_per_node=2 train.py --task rte
"""

import os
import sys
import time

import torch
import torch.distributed as dist


def rank():
    """Return this process's number, from 0. Process 0 writes the files and prints."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def processes():
    """Return how many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def require_one_process(what):
    """Raise ValueError if there are several processes."""
    if processes() > 1:
        raise ValueError(f"{what} takes one process: start it with python, not with torchrun")


def start(device):
    """Connect to the other processes. Only process 0 prints from here on."""
    if processes() == 1:
        return
    if rank() > 0:
        sys.stdout = None
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shard(items):
    """Return this process's items. Each item belongs to exactly one process."""
    return items[rank() :: processes()]


def all_reduce(tensors):
    """Sum each tensor over the processes, in place -> the tensors."""
    if processes() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # one exchange for all
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
    return tensors


def stop():
    """Wait for the other processes, then disconnect."""
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads need the interpreter to release their last tensors. They abort if it has
        # exited already.
        time.sleep(0.2)
