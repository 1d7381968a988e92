"""One training step: masked weights, forward, loss, backward, clip, Adam; launched by hand or replayed as CUDA graphs.

What it is: what happens between a batch and the next state of the scores, or of the weights in fine-tuning. What it is
not: it reads no files, knows no task, and leaves schedules and batches to its caller. Sources: Jiang et al., ACL 2023
(arXiv 2210.06210); the optimizer follows the authors' code.

    learner = make_learner(model, "smp-s", 0.5, torch.bfloat16)
    run = make_run(Losses(model, learner))
    loss, regularizer = train_step(run, learner.optimizer(2e-2, 3e-5), [Part(inputs, labels)], schedule, step)
"""

import math
import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import parallel
from mask import METHODS, Masks


class Learner(nn.Module):
    """What a run learns: masks (mask.Masks, with weights if they train as well, or None) and other weights.

    trained: {name: parameter}, copied to float32; dtype: in which all is multiplied.
    """

    def __init__(self, masks, trained, dtype):
        super().__init__()
        self.masks, self.dtype, self.names = masks, dtype, list(trained)
        self.weights = nn.ParameterList(weight.detach().float().clone() for weight in trained.values())

    @property
    def trained(self):
        return dict(zip(self.names, self.weights, strict=True))

    def forward(self, density):
        """-> the weights of one step {name: tensor in dtype}, and the regularizer."""
        weights = {name: weight.to(self.dtype) for name, weight in self.trained.items()}
        if self.masks is None:
            return weights, torch.zeros((), device=density.device)
        masked, regularizer = self.masks(density)
        return masked | weights, regularizer

    def baked(self, density):
        """-> the weights for evaluation, under exact masks."""
        weights = self.masks.baked(density) if self.masks else {}
        return weights | {name: weight.detach().to(self.dtype) for name, weight in self.trained.items()}

    def optimizer(self, score_lr, weight_lr):
        """Adam on the scores; AdamW on trained weights, decaying only matrices, as BERT's authors fine-tune."""
        scores = {id(p) for p in self.masks.learnt.values()} if self.masks and self.masks.learnt else set()
        kinds = {"scores": [], "matrices": [], "vectors": []}
        for p in self.parameters():
            kinds["scores" if id(p) in scores else "matrices" if p.ndim > 1 else "vectors"].append(p)
        settings = {"scores": (score_lr, 0.0), "matrices": (weight_lr, 0.01), "vectors": (weight_lr, 0.0)}
        groups = [
            {"params": kinds[kind], "lr": lr, "highest_lr": lr, "weight_decay": decay}
            for kind, (lr, decay) in settings.items()
            if kinds[kind]
        ]
        return torch.optim.AdamW(groups, fused=True)


def make_learner(model, method, density, dtype, temperature=None):
    """Split a frozen float32 model into what is learnt, a Learner, and the rest, rounded in place to dtype.

    method, temperature: see mask.Masks; "finetune" has no masks.
    """
    row, prunable = METHODS[method], model.prunable()
    masks = Masks(prunable, method, density, dtype, temperature) if row.masking else None
    masked = {name for weights in prunable.values() for name in weights} if masks else set()
    trained = {
        name: weight
        for name, weight in model.named_parameters()
        if name not in masked and (row.trains_weights or name.startswith("classifier."))
    }
    learner = Learner(masks, trained, dtype)  # takes its copies before the model is rounded
    model.to(dtype)
    if masks and not row.trains_weights:  # so that the stacked weights are held once
        model.load_state_dict(masks.by_name(masks.weights), strict=False, assign=True)
    return learner


def task_loss(logits, labels, taught=None, temperature=2.0):
    """Cross-entropy of logits [B, C] with classes [B], or mean squared error of the one logit with scores [B].

    SQuAD: logits [B, S, 2] of start and end with positions [B, 2], the mean of both. With a teacher's logits, half of
    that and half tau^2 KL(teacher || student) at temperature tau (regression: the squared error to the teacher).
    """
    if labels.is_floating_point():
        loss = F.mse_loss(logits[:, 0], labels)
        return loss if taught is None else 0.5 * loss + 0.5 * F.mse_loss(logits, taught)
    loss = F.cross_entropy(logits, labels)
    if taught is None:
        return loss
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    kl = F.kl_div(student, teacher, reduction="sum", log_target=True) / labels.numel()
    return 0.5 * loss + 0.5 * temperature**2 * kl


class Losses(nn.Module):
    """A batch -> the loss on the task and the regularizer, of a frozen model with a Learner's weights in it.

    teacher: a frozen Bert in evaluation mode whose logits are learnt from as well, or None.
    """

    def __init__(self, model, learner, teacher=None):
        super().__init__()
        self.model, self.learner, self.teacher = model, learner, teacher

    def forward(self, inputs, labels, density):
        """inputs [3, B, S], see data.collate; density: 0-dim tensor -> [2]: loss, regularizer."""
        weights, regularizer = self.learner(density)
        with torch.no_grad():
            taught = self.teacher(*inputs).float() if self.teacher else None
        logits = functional_call(self.model, weights, tuple(inputs), tie_weights=False).float()
        return torch.stack([task_loss(logits, labels, taught), regularizer])


def backward(losses, part, schedule, last=True):
    """Add the gradients of a data.Part, share * (loss + lambda * regularizer) -> [2]: loss, regularizer, detached.

    losses: Losses, alone or in DistributedDataParallel, which exchanges gradients only in the last part of a step.
    schedule: tensor [2] of density and lambda, on the device, so that nothing waits for the host.
    """
    alone = last or not isinstance(losses, DistributedDataParallel)
    with nullcontext() if alone else losses.no_sync():
        both = losses(part.inputs, part.labels, schedule[0])
        (part.share * (both[0] + schedule[1] * both[1])).backward()
    return both.detach()


class Recorded:
    """`backward`, recorded as one CUDA graph for each kind of data.Part and then replayed.

    Small models are bound by launching a thousand kernels a step; a replay is one launch. Kinds are few, because widths
    are multiples of 4. All graphs share their memory, and leave their gradients in the same place. Several processes
    exchange gradients in every part, and so must record at the same time: that is what a part's kind is for.
    """

    def __init__(self, losses, stream):
        self.losses, self.stream, self.graphs = losses, stream, {}
        self.pool = torch.cuda.graph_pool_handle()
        self.parameters = [p for p in losses.parameters() if p.requires_grad]
        self.gradients = [torch.empty_like(p) for p in self.parameters]

    def __call__(self, part, schedule, last=True):
        key = part.kind or (*part.inputs.shape, part.share)
        if key not in self.graphs:
            self.graphs[key] = self.record(part, schedule)
        graph, inputs, labels, its_schedule, both = self.graphs[key]
        inputs.copy_(part.inputs)
        labels.copy_(part.labels)
        its_schedule.copy_(schedule)
        graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is not None:  # of the parts before
                p.grad = p.grad + gradient
            else:  # the next replay overwrites it
                p.grad = gradient if last else gradient.clone()
        return both.clone()

    def record(self, part, schedule):
        """-> (graph, its inputs, labels and schedule, its losses). Leaves the gradients so far as they are."""
        part, schedule = part._replace(inputs=part.inputs.clone(), labels=part.labels.clone()), schedule.clone()
        before = [p.grad for p in self.parameters]
        self.set_gradients(None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # before, libraries choose kernels and workspaces, and DDP its buckets
            for _ in range(2 if self.graphs or parallel.PROCESSES == 1 else 11):
                backward(self.losses, part, schedule)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.set_gradients(None)
        graph = torch.cuda.CUDAGraph()
        try:  # thread_local: NCCL's own threads may go on asking for the state of the device
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                both = backward(self.losses, part, schedule)
                torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error.add_note("A step that waits for the host (by .item(), say) cannot be recorded: try --eager.")
            raise
        self.set_gradients(before)
        return graph, part.inputs, part.labels, schedule, both

    def set_gradients(self, gradients):
        for p, gradient in zip(self.parameters, gradients or [None] * len(self.parameters), strict=True):
            p.grad = gradient


def make_run(losses, compiled=False, eager=False):
    """-> what does the forward and backward of a step; called like `backward`, without its first argument.

    compiled: let torch.compile fuse what a layer does. eager: on CUDA, launch every kernel of every step instead of
    recording a graph; slower, but anything may be done in a step.
    """
    cuda = next(losses.parameters()).device.type == "cuda"
    stream = torch.cuda.Stream() if cuda and not eager else None
    torch.backends.cuda.enable_cudnn_sdp(not eager)  # the fastest, but slow to launch: 5 ms in bert-base's eager step
    if compiled:
        for layer in losses.model.bert.encoder["layer"]:
            layer.compile(dynamic=True)
    if parallel.PROCESSES > 1:
        with torch.cuda.stream(stream) if stream else nullcontext(), warnings.catch_warnings():  # where it will be used
            warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13: it renames the last argument
            losses = DistributedDataParallel(losses, gradient_as_bucket_view=True, broadcast_buffers=False)
    return Recorded(losses, stream) if stream else partial(backward, losses)


def rate_at(step, total, warmup=0):
    """Share of the highest learning rate at a step: up in `warmup` steps, then down to 0 at total, both linearly."""
    return (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)


def train_step(run, optimizer, parts, schedule, step, rate=1.0):
    """One step at `rate` times the highest learning rates -> [2]: loss on the task, regularizer, on the device.

    run: see make_run; parts: as data.training_batches has them; step: from 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["highest_lr"] * rate
        # The reference code's Adam adds eps to the uncorrected second moment; torch's to the corrected one.
        group["eps"] = 1e-8 / math.sqrt(1 - group["betas"][1] ** (step + 1))
    optimizer.zero_grad()
    both = 0.0
    for number, part in enumerate(parts, 1):
        both = both + part.share * run(part, schedule, last=number == len(parts))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return both
