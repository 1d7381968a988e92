"""What makes a step fast from outside, and knows nothing about what it computes: torch.compile, and CUDA graphs.

A small model is bound by launching a thousand kernels a step. So a function is recorded once, and from then on
replayed in one launch:

    compile_step(model, masks)
    forward_backward = Recorded(forward_backward, parameters)
"""

import torch


def compile_step(model, masks):
    """Let torch.compile fuse the kernels of the layers and, on a GPU, those of the masks, if there are any.

    Of the masks `stacked`, not `forward`, whose by_name would copy each matrix; and not on a CPU, where numpy looks for
    the thresholds.
    """
    model.compile_layers()
    if masks and next(model.parameters()).is_cuda:
        masks.stacked = torch.compile(masks.stacked, dynamic=False)


class Recorded:
    """A function of tensors and numbers that adds gradients to `parameters`, recorded once for each kind of arguments.

    Arguments are of one kind when tensors have the same shapes and numbers are equal. The function returns a tensor.
    All graphs share their memory, and all leave their gradients in the same place.
    """

    def __init__(self, function, parameters):
        self.function = function
        self.parameters = list(parameters)
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self.graphs = {}  # kind of arguments -> (graph, its own arguments, its result)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, *arguments):
        kind = tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments)
        if kind not in self.graphs:
            self.graphs[kind] = self.record(arguments)
        graph, its_arguments, result = self.graphs[kind]
        for mine, given in zip(its_arguments, arguments, strict=True):
            if isinstance(given, torch.Tensor):
                mine.copy_(given)

        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is gradient:  # of an earlier part of this step: the replay would overwrite it
                p.grad = gradient.clone()
        graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad + gradient
        return result.clone()

    def record(self, arguments):
        """-> (graph, its own arguments, its result). Leaves the gradients so far as they are."""
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        before = [p.grad for p in self.parameters]

        self.set_gradients([None] * len(before))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            self.stream
        ):  # libraries choose their kernels and workspaces in the first two calls
            for _ in range(2):
                self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)

        self.set_gradients([None] * len(before))
        graph = torch.cuda.CUDAGraph()
        try:  # thread_local: NCCL's threads may ask for the state of the device meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = self.function(*arguments)
                torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error.add_note(
                "A step that waits for the host (by .item(), say) cannot be recorded: try --eager."
            )
            raise

        self.set_gradients(before)
        return graph, arguments, result

    def set_gradients(self, gradients):
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
