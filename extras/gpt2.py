"""GPT-2 from scratch, as an ordinary nn.Module: what model.py is for BERT, and no more. Radford et al. 2019.

Weights bear the names of published checkpoints. Two things differ inside: matrices are [out, in] like BERT's, where a
checkpoint has [in, out]; and c_attn, which holds query, key and value side by side, is taken apart, because each is a
group of its own. `published()` undoes both.

    model = load_gpt2(*plumbing.checkpoints.read_model(folder))
    logits = model(input_ids)  # [B, S, V]: of the token behind each
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.checkpoints import build_from, read_config

# The groups of prunable matrices, and where each stands inside a layer.
GROUPS = {
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "attn_output": "attn.c_proj",
    "intermediate": "mlp.c_fc",
    "output": "mlp.c_proj",
}
THIRDS = ("query", "key", "value")  # in this order in c_attn
ONLY = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Config:
    """The part of a checkpoint's config.json that decides the computation, under the names there."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int  # neurons of a layer
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    model_type: str = "gpt2"  # this and the next two are no numbers, see read_config
    heads_per_layer: tuple = ()  # of a model that lost some; see model.Config
    neurons_per_layer: tuple = ()

    hidden_size = property(lambda self: self.n_embd)  # as other models call it
    longest_input = property(lambda self: self.n_positions)
    head_size = property(lambda self: self.n_embd // self.n_head)

    @property
    def layers(self):
        """[(heads, neurons)] of each layer."""
        heads = self.heads_per_layer or [self.n_head] * self.n_layer
        neurons = self.neurons_per_layer or [self.n_inner] * self.n_layer
        return list(zip(heads, neurons, strict=True))


# --- the model: B texts of S tokens, H wide; heads of size D ----------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.size = c.head_size
        self.attn_pdrop = c.attn_pdrop
        self.query = nn.Linear(c.n_embd, heads * c.head_size)
        self.key = nn.Linear(c.n_embd, heads * c.head_size)
        self.value = nn.Linear(c.n_embd, heads * c.head_size)
        self.c_proj = nn.Linear(heads * c.head_size, c.n_embd)
        self.dropout = nn.Dropout(c.resid_pdrop)

    def forward(self, x):
        parts = [self.query(x), self.key(x), self.value(x)]  # [B, S, heads * D] each
        if self.heads == 0:
            return self.dropout(self.c_proj(sum(parts)))  # empty, but all three get gradients
        q, k, v = (
            part.unflatten(2, (self.heads, self.size)).transpose(1, 2) for part in parts
        )  # [B, heads, S, D]
        dropout = self.attn_pdrop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.dropout(
            self.c_proj(mixed.transpose(1, 2).flatten(2))
        )  # -> [B, S, heads * D] -> [B, S, H]


class Block(nn.Module):
    def __init__(self, c, heads, neurons):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.attn = Attention(c, heads)
        self.ln_2 = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(c.n_embd, neurons), "c_proj": nn.Linear(neurons, c.n_embd)}
        )
        self.dropout = nn.Dropout(c.resid_pdrop)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # GPT-2 normalises before each half, BERT behind
        inner = GPT2.activation(self.mlp["c_fc"](self.ln_2(x)))  # [B, S, H] -> [B, S, neurons]
        return x + self.dropout(self.mlp["c_proj"](inner))


class GPT2(nn.Module):
    """A language model whose head is the word embedding (tied)."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))  # gelu_new

    def __init__(self, config):
        super().__init__()
        self.config = config
        table = partial(nn.Embedding.from_pretrained, freeze=False)  # as in model.py
        self.wte = table(torch.zeros(config.vocab_size, config.n_embd))
        self.wpe = table(torch.zeros(config.n_positions, config.n_embd))
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, *sizes) for sizes in config.layers)
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def resized(self, config, tensors):
        return build_from(partial(GPT2, config), tensors).train(self.training)

    def states(self, input_ids, token_type_ids=None, attention_mask=None):
        """Token ids [B, S] -> what the last layer gives for every token [B, S, H]. The other two are for BERT."""
        x = self.dropout(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        """Token ids [B, S] -> logits of the token behind each [B, S, V]. Padding must come last: no mask is read."""
        return F.linear(self.states(input_ids), self.wte.weight)

    def compile_layers(self):
        """Let torch.compile fuse what a layer does."""
        for block in self.h:
            block.compile(dynamic=True)

    def prunable(self):
        """{group: {parameter name: weight [out, in]}}, six groups of one matrix a layer."""
        groups = {group: {} for group in GROUPS}
        for i, block in enumerate(self.h):
            for group, path in GROUPS.items():
                groups[group][f"h.{i}.{path}.weight"] = block.get_submodule(path).weight
        return groups

    @staticmethod
    def canonical(name):
        """A checkpoint's tensor name -> without the prefix that some have."""
        return name.removeprefix("transformer.")

    def published(self, tensors):
        """{our name: tensor} -> {canonical name: tensor as checkpoints hold it}."""
        found = {}
        for name, tensor in tensors.items():
            if ".attn.query." in name:
                tensor = torch.cat([tensors[name.replace("query", third)] for third in THIRDS])
                name = name.replace("query", "c_attn")
            elif ".attn.key." in name or ".attn.value." in name:
                continue
            found[name] = turned(name, tensor)
        return found


def turned(name, tensor):
    """The matrices of layers, [in, out] in checkpoints and [out, in] here; all others stay as they are."""
    return tensor.T.contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor


def gpt2_config(stored):
    """config.json as a dict -> Config. Raises ValueError that names the key of a model that we cannot compute."""
    stored = {"model_type": None} | stored
    if stored.get("n_inner") is None and isinstance(stored.get("n_embd"), int):  # as published
        stored["n_inner"] = 4 * stored["n_embd"]
    return read_config(stored, Config, {"gpt2": 0}, ONLY)


def load_gpt2(stored, tensors):
    """config.json as a dict, {name: tensor} -> GPT2, in training mode. Raises ValueError that names what misfits."""
    known = {GPT2.canonical(name): tensor for name, tensor in tensors.items()}
    if len(known) < len(tensors):
        raise ValueError("it holds tensors twice, with the prefix transformer. and without")
    head = known.pop("lm_head.weight", None)  # a stored copy
    if head is not None and not torch.equal(head, known.setdefault("wte.weight", head)):
        raise ValueError("lm_head.weight differs from wte.weight; only tied heads are supported")
    ours = {}
    for name, tensor in known.items():
        ours[name] = turned(name, tensor)
        if ".attn.c_attn." in name:
            joined = torch.atleast_1d(ours.pop(name))  # [3 * out, in], of a bias [3 * out]
            for third, part in zip(THIRDS, joined.tensor_split(3), strict=True):
                ours[name.replace("c_attn", third)] = part
    return build_from(partial(GPT2, gpt2_config(stored)), ours)
