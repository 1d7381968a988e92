"""Several processes of one run, one a GPU: who is who, who goes first, what is shared and checked.

What it is: the little that train.py and eval.py need of torch.distributed, and nothing at all for a process alone.
What it is not: gradients are exchanged by DistributedDataParallel, see step.py.

    torchrun --standalone --nproc_per_node=2 train.py --task rte
"""

import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from model import digest

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the other processes; on CUDA each takes the GPU of its number on this machine. Only the first prints.

    Raises ValueError when there are too few GPUs.
    """
    if PROCESSES == 1:
        return
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node is more than the {torch.cuda.device_count()} GPUs that there are")
        torch.cuda.set_device(local)
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # as recording of NCCL's calls in graphs asks for
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


@contextmanager
def first_process_first():
    """The others wait until the first has done what follows; so only it downloads."""
    if PROCESSES > 1 and RANK:
        try:
            dist.barrier()
        except RuntimeError:  # the first has ended, and said why
            raise SystemExit(2) from None
    yield
    if PROCESSES > 1 and not RANK:
        dist.barrier()


def share(items):
    """This process's items: every one belongs to exactly one process."""
    return items[RANK::PROCESSES]


def gather(items):
    """The inverse of share, in every process: all items in their order."""
    if PROCESSES == 1:
        return items
    parts = [None] * PROCESSES
    dist.all_gather_object(parts, items)
    return [parts[i % PROCESSES][i // PROCESSES] for i in range(sum(map(len, parts)))]


def mean(tensor):
    """The mean over the processes, in place."""
    if PROCESSES > 1:
        dist.all_reduce(tensor)
        tensor /= PROCESSES
    return tensor


def check_equal(tensors):
    """Raise FloatingPointError unless all processes hold the same tensors {name: tensor}, to the bit."""
    if PROCESSES > 1 and len(set(gather([digest(tensors)]))) > 1:
        raise FloatingPointError("the processes no longer hold the same scores or weights; the run is worth nothing")


def stop():
    """Leave the other processes, when all are ready to."""
    if PROCESSES > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
