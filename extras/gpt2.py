"""GPT-2 (Radford et al. 2019) from scratch, as an ordinary nn.Module. model.py does this for BERT.

Weights have the names of published checkpoints. Two things differ inside. Matrices are [out, in]
like BERT's, while checkpoints hold them as [in, out]. And checkpoints hold query, key and value
side by side in c_attn. Here they are three matrices, because each is a group of its own.
`published()` undoes both.

    model = load_gpt2(*plumbing.checkpoints.read_model(folder))
    logits = model(input_ids)  # [B, S, V]: for the token after each
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from extras.head import softmax_loss, token_logits, token_loss
from model import attention, embedding
from plumbing.checkpoints import build_from, read_config
from plumbing.graphs import Dropout

# The groups of prunable matrices: {group: path inside a layer}.
GROUPS = {
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "attn_output": "attn.c_proj",
    "intermediate": "mlp.c_fc",
    "output": "mlp.c_proj",
}
THIRDS = ("query", "key", "value")  # c_attn holds them in this order
# Only these values are supported, under the names in config.json.
ONLY = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Config:
    """The part of config.json that decides the computation, under its names there."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int  # neurons per layer
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    model_type: str = "gpt2"  # read_config sets this one and the next two
    heads_per_layer: tuple = ()  # only in a model that lost some, see model.Config
    neurons_per_layer: tuple = ()

    # The names that BERT has for these.
    hidden_size = property(lambda self: self.n_embd)
    longest_input = property(lambda self: self.n_positions)
    head_size = property(lambda self: self.n_embd // self.n_head)

    @property
    def layers(self):
        """[(heads, neurons)], one pair per layer."""
        heads = self.heads_per_layer or [self.n_head] * self.n_layer
        neurons = self.neurons_per_layer or [self.n_inner] * self.n_layer
        return list(zip(heads, neurons, strict=True))


# --- the model: B texts of S tokens, H wide; heads of size D --------------------------------------


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.size = c.head_size
        self.attn_pdrop = c.attn_pdrop
        width = heads * c.head_size
        self.query = nn.Linear(c.n_embd, width)
        self.key = nn.Linear(c.n_embd, width)
        self.value = nn.Linear(c.n_embd, width)
        self.c_proj = nn.Linear(width, c.n_embd)
        self.dropout = Dropout(c.resid_pdrop)

    def forward(self, x, attn_bias):
        parts = [self.query(x), self.key(x), self.value(x)]  # [B, S, heads * D] each
        if self.heads == 0:
            # Nothing is left to mix. The empty sum gives all three parts their (empty) gradients.
            return self.dropout(self.c_proj(sum(parts)))
        # [B, S, heads * D] -> [B, heads, S, D]
        q, k, v = (part.unflatten(2, (self.heads, self.size)).transpose(1, 2) for part in parts)
        dropout = self.attn_pdrop if self.training else 0.0
        mixed = attention(q, k, v, attn_bias, dropout, causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, heads, S, D] -> [B, S, heads * D]
        return self.dropout(self.c_proj(mixed))  # [B, S, H]


class Block(nn.Module):
    def __init__(self, c, heads, neurons):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.attn = Attention(c, heads)
        self.ln_2 = nn.LayerNorm(c.n_embd, c.layer_norm_epsilon)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(c.n_embd, neurons), "c_proj": nn.Linear(neurons, c.n_embd)}
        )
        self.dropout = Dropout(c.resid_pdrop)

    def forward(self, x, attn_bias):
        # GPT-2 normalises before each half, BERT after it.
        x = x + self.attn(self.ln_1(x), attn_bias)
        inner = GPT2.activation(self.mlp["c_fc"](self.ln_2(x)))  # [B, S, H] -> [B, S, neurons]
        return x + self.dropout(self.mlp["c_proj"](inner))


class GPT2(nn.Module):
    """A language model whose head is the word embedding (tied)."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))  # gelu_new

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = embedding(config.n_positions, config.n_embd)
        self.dropout = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, *sizes) for sizes in config.layers)
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.softmax_loss = softmax_loss  # compile_layers() puts a compiled one in its place

    def resized(self, config, tensors):
        return build_from(partial(GPT2, config), tensors).train(self.training)

    def states(self, input_ids, token_type_ids=None, attention_mask=None):
        """Token ids [B, S] -> the last layer's output [B, S, H].

        BERT takes the other two arguments. Here they are ignored.
        """
        x = self.dropout(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]])
        # No token sees those after it: -inf above the diagonal, as in model.attention.
        length = x.shape[1]
        attn_bias = x.new_full((length, length), float("-inf")).triu(1)  # [S, S]
        for block in self.h:
            x = block(x, attn_bias)
        return self.ln_f(x)

    def forward(self, input_ids, token_type_ids=None, attention_mask=None, labels=None):
        """Token ids [B, S] -> logits for the token after each [B, S, V], or with labels the loss.

        Padding must come last, because the attention mask is ignored.
        """
        states = self.states(input_ids)
        if labels is None:
            return token_logits(states, self.wte.weight)
        states, labels = states.flatten(0, 1), labels.flatten()  # [B * S, H] and [B * S]
        return token_loss(states, self.wte.weight, labels, self.softmax_loss)

    def compile_layers(self):
        """Let torch.compile fuse the kernels of each layer, and of the loss."""
        for block in self.h:
            block.compile(dynamic=True)
        self.softmax_loss = torch.compile(softmax_loss)

    def prunable(self):
        """{group: {parameter name: weight [out, in]}}, six groups with one matrix per layer."""
        groups = {group: {} for group in GROUPS}
        for i, block in enumerate(self.h):
            for group, path in GROUPS.items():
                groups[group][f"h.{i}.{path}.weight"] = block.get_submodule(path).weight
        return groups

    @staticmethod
    def canonical(name):
        """Remove the prefix that some checkpoints put before a tensor's name."""
        return name.removeprefix("transformer.")

    def published(self, tensors):
        """{our name: tensor} -> {canonical name: tensor as checkpoints hold it}."""
        stored = {}
        for name, tensor in tensors.items():
            if ".attn.query." in name:  # join the three
                tensor = torch.cat([tensors[name.replace("query", third)] for third in THIRDS])
                name = name.replace("query", "c_attn")
            elif ".attn.key." in name or ".attn.value." in name:
                continue  # joined with the query
            stored[name] = turned(name, tensor)
        return stored


def turned(name, tensor):
    """Transpose a matrix of a layer: [in, out] in checkpoints, [out, in] here. Others stay."""
    if name.startswith("h.") and tensor.ndim == 2:
        return tensor.T.contiguous()
    return tensor


def gpt2_config(stored):
    """Make a Config from config.json as a dict.

    Raises ValueError that names the key of an unsupported value.
    """
    stored = {"model_type": None} | stored  # or read_config would take it for BERT's
    # Published files leave n_inner out.
    if stored.get("n_inner") is None and isinstance(stored.get("n_embd"), int):
        stored["n_inner"] = 4 * stored["n_embd"]
    return read_config(stored, Config, {"gpt2": 0}, ONLY)


def load_gpt2(stored, tensors):
    """Make a GPT2, in training mode, from config.json as a dict and {name: tensor}.

    Raises ValueError that names what does not fit.
    """
    known = {GPT2.canonical(name): tensor for name, tensor in tensors.items()}
    if len(known) < len(tensors):
        raise ValueError("it holds tensors twice, with and without the prefix transformer.")
    # The head is the word embedding. Some checkpoints hold a copy of it, or only the copy.
    head = known.pop("lm_head.weight", None)
    if head is not None:
        words = known.setdefault("wte.weight", head)
        if not torch.equal(head, words):
            raise ValueError(
                "lm_head.weight differs from wte.weight; only tied heads are supported"
            )

    ours = {}
    for name, tensor in known.items():
        tensor = turned(name, tensor)
        if ".attn.c_attn." not in name:
            ours[name] = tensor
            continue
        thirds = torch.atleast_1d(tensor).tensor_split(3)  # [3 * out, in], of a bias [3 * out]
        for third, part in zip(THIRDS, thirds, strict=True):
            ours[name.replace("c_attn", third)] = part
    return build_from(partial(GPT2, gpt2_config(stored)), ours)
