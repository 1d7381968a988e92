"""What people would store for a task instead of a mask: biases, low-rank updates, signs.

- BitFit: Ben Zaken et al., ACL 2022 (arXiv 2106.10199). Biases and LayerNorms train, nothing else.
- LoRA: Hu et al., ICLR 2022 (arXiv 2106.09685). W' = W + B A, of rank r, for query and value.
- BitDelta: Liu et al., NeurIPS 2024 (arXiv 2402.10193). W' = W + a sign(D), where D is what
  fine-tuning has changed. One number a per matrix, which learns from the fine-tuned model.

The last two put layers of their own into the model. A finished run is an ordinary model, in which
W' has replaced W. Its result counts the numbers and bits that a task would have to store.

    python train.py --method lora --rank 8 --weight-lr 1e-3
    python train.py --method finetune-encoder --out dense
    python train.py --method bitdelta --teacher dense
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import task_of
from mask import METHODS, Method
from model import load_backbone

# --- layers that change a frozen weight -----------------------------------------------------------


class Changed(nn.Module):
    """A linear layer whose frozen weight W is used as W' = changed(W)."""

    learns = ()  # the names of its parameters that train

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight  # [out, in]
        self.bias = linear.bias

    def forward(self, x):
        learnt = [getattr(self, name) for name in self.learns]
        return F.linear(x, self.changed(self.weight, *learnt), self.bias)


class LowRank(Changed):
    """LoRA: W' = W + B A, with A [r, in] drawn at random and B [out, r] 0 at the start.

    The paper's factor alpha / r is 1 here.
    """

    learns = ("lora_a", "lora_b")

    def __init__(self, linear, rank):
        super().__init__(linear)
        out, width = linear.weight.shape
        self.lora_a = nn.Parameter(torch.empty(rank, width).uniform_(-1, 1) / width**0.5)
        self.lora_b = nn.Parameter(torch.zeros(out, rank))

    def changed(self, weight, a, b):
        return weight + b @ a


class Signs(Changed):
    """BitDelta: W' = W + a sign(D). At the start a is the mean of |D|."""

    learns = ("scale",)

    def __init__(self, linear, delta):
        super().__init__(linear)
        self.scale = nn.Parameter(delta.abs().mean().view(1))
        signs = torch.where(delta < 0, -1.0, 1.0)  # one bit each: there is no third value
        self.register_buffer("signs", signs, persistent=False)

    def changed(self, weight, scale):
        return weight + scale * self.signs


def change(model, name, layer):
    """Put a layer in place of the one with the weight `name`."""
    parent, child = name.removesuffix(".weight").rsplit(".", 1)
    setattr(model.get_submodule(parent), child, layer)


def fold(model, published, tensors):
    """The published() of a model with changed layers: their W' as ordinary weights.

    W' is computed in the model's own dtype, so that the saved model gives the same numbers.
    """
    tensors = dict(tensors)
    for path, layer in model.named_modules():
        if isinstance(layer, Changed):
            weight = layer.weight.detach()
            learnt = [tensors.pop(f"{path}.{name}").to(weight.dtype) for name in layer.learns]
            tensors[f"{path}.weight"] = layer.changed(weight, *learnt).float()
    return published(tensors)


def finish(model, numbers, bits=0):
    """-> what Method.before returns: the model, which folds itself, and facts for result.json."""
    model.published = partial(fold, model, model.published)
    return model, {"density": 1.0, "stored_numbers": numbers, "stored_bits": bits}


# --- before training ------------------------------------------------------------------------------


def low_rank(model, train, dev, args, device):
    """Method.before: LoRA for query and value. Raises ValueError for a rank that makes no sense."""
    width = model.config.hidden_size
    if args.rank > width or args.rank != int(args.rank):
        raise ValueError(f"--rank: must be a whole number up to {width}; got {args.rank:g}")
    numbers = 0
    for name, parameter in model.named_parameters():
        if name.startswith("classifier."):
            numbers += parameter.numel()
    groups = model.prunable()
    for name in [*groups["query"], *groups["value"]]:
        layer = LowRank(model.get_submodule(name.removesuffix(".weight")), int(args.rank))
        change(model, name, layer)
        numbers += layer.lora_a.numel() + layer.lora_b.numel()
    return finish(model, numbers)


def one_bit(model, train, dev, args, device):
    """Method.before: BitDelta. What the teacher has changed besides matrices is stored as it is.

    Raises ValueError without a teacher, and for one that is not of this model.
    """
    if not args.teacher:
        raise ValueError("--method bitdelta needs --teacher, the dense run that it stores")
    folder = Path(args.teacher)
    teacher, _ = load_backbone(folder, task_of(vars(args)), args.length, args.head, fresh=False)
    tuned = teacher.state_dict()
    matrices = {}
    for weights in model.prunable().values():
        matrices |= weights

    numbers = bits = 0
    for name, weight in list(model.named_parameters()):
        if name not in tuned or tuned[name].shape != weight.shape:
            raise ValueError(f"--teacher: {args.teacher} was not made of this --model and --head")
        if name in matrices:
            linear = model.get_submodule(name.removesuffix(".weight"))
            change(model, name, Signs(linear, tuned[name] - weight.detach()))
            numbers += 1
            bits += weight.numel()
        elif not same(weight, tuned[name]):
            weight.data = tuned[name]
            numbers += weight.numel()
    return finish(model, numbers, bits)


def same(weight, tuned):
    """Whether a fine-tuned model has this weight unchanged, but for rounding to 16 bits.

    A run in bfloat16 rounds what is frozen, and saves it like that.
    """
    return torch.equal(weight, tuned) or torch.equal(weight.bfloat16().float(), tuned)


# --- the rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter(Method):
    """A method that trains the parameters of its new layers, and stores a whole model."""

    learns_what: str = ""  # in words, for the card of an exported folder

    def trains_tensor(self, name, tensor):
        return name.endswith((*LowRank.learns, *Signs.learns)) or name.startswith("classifier.")


METHODS |= {
    "bitfit": Method(None, trains=("vectors",), recipe={"weight_lr": 3e-3}),
    "lora": Adapter(
        None,
        trains=("weights",),
        recipe={"weight_lr": 1e-3, "rank": 8.0},
        before=low_rank,
        learns_what="a low-rank change of each query and value matrix",
    ),
    "bitdelta": Adapter(
        None,
        trains=("weights",),
        recipe={"weight_lr": 1e-4},
        before=one_bit,
        learns_what="one number per matrix, by which the signs of the teacher's changes count",
    ),
}
