"""Make a training step faster without knowing what it computes.

Three ways: torch.compile, CUDA graphs, and on a CPU random numbers that are drawn four at a time.

A step of a small model launches a thousand kernels, and the launches take longer than the work.
A CUDA graph records them once and replays them in one launch:

    compile_step(model, masks)
    forward_backward = Recorded(forward_backward, parameters)
"""

import torch
import torch.nn.functional as F
from torch import nn


def compile_step(model, masks):
    """Let torch.compile fuse the kernels of the layers and, on a GPU, those of the masks, if any.

    It compiles `masks.stacked` and not `forward`, because `by_name` in forward would copy each
    matrix. On a CPU numpy finds the thresholds, which torch cannot compile.
    """
    model.compile_layers()
    if masks and next(model.parameters()).is_cuda:
        masks.stacked = torch.compile(masks.stacked, dynamic=False)


class Recorded:
    """A function that adds gradients to `parameters`, recorded once per kind of arguments.

    The function takes tensors and numbers and returns a tensor. Arguments are of the same kind if
    their tensors have the same shapes and their numbers are equal. All graphs share one memory
    pool, and all leave their gradients in the same tensors.
    """

    def __init__(self, function, parameters):
        self.function = function
        self.parameters = list(parameters)
        self.gradients = []  # the first graph's own tensors; later graphs copy theirs into them
        self.graphs = {}  # kind of arguments -> (graph, its static arguments, its result)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, *arguments):
        kind = tuple(getattr(a, "shape", a) for a in arguments)
        if kind not in self.graphs:
            self.graphs[kind] = self.record(arguments)

        # A graph always reads the tensors it was recorded with, so copy the arguments into them.
        graph, static_arguments, result = self.graphs[kind]
        for static, argument in zip(static_arguments, arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                static.copy_(argument)

        # The replay overwrites the gradients of an earlier part of this step.
        earlier = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        graph.replay()
        for p, gradient, before in zip(self.parameters, self.gradients, earlier, strict=True):
            p.grad = gradient if before is None else before + gradient
        return result.clone()

    def record(self, arguments):
        """Record the function -> (graph, its static arguments, its result).

        The gradients so far stay as they are.
        """
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        before = [p.grad for p in self.parameters]

        # In their first two calls, libraries choose their kernels and workspaces.
        for p in self.parameters:
            p.grad = None
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.function(*arguments)
            self.function(*arguments)

        # thread_local: NCCL's threads may query the device while this one records.
        for p in self.parameters:
            p.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
            result = self.function(*arguments)
            gradients = [p.grad for p in self.parameters]
            if self.gradients:
                torch._foreach_copy_(self.gradients, gradients)
            else:
                self.gradients = gradients

        for p, gradient in zip(self.parameters, before, strict=True):
            p.grad = gradient
        return graph, arguments, result


def dropout(x, p):
    """F.dropout in training: an element becomes 0 with probability p, or else is divided by 1 - p.

    On AMD's CPUs, torch draws a number for each element, one after the other. That was a fifth of a
    step. Here each number of 64 bits does for four elements.
    """
    threshold = round(p * 2**16)  # of 16 bits: p is met to 2^-17
    if not x.is_cpu or threshold in (0, 2**16) or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    # As 16 bits each, from -2^15 to 2^15 - 1.
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = draws >= threshold - 2**15
    return x * (kept.to(x.dtype) / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x
