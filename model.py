"""BERT and RoBERTa as an ordinary nn.Module whose state-dict names are those of BERT checkpoints.

What it is: embeddings, post-norm encoder, optional masked-LM head, and a classifier that reads the logits of label
words at [CLS]. What it is not: it does not train, prune or tokenise, it reads no files (pretrained.py does), and it has
no decoder. Sources: Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (arXiv 1907.11692); names as published.

    model = Bert(Config(30522, 384, 6, 12, 1536, 512, 2), words=[2053, 2748])
    logits = model(input_ids, token_type_ids, attention_mask)  # [B, 2]
"""

import hashlib
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# The six groups of prunable matrices and where each stands inside a layer.
GROUPS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attn_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


@dataclass(frozen=True)
class Config:
    """The part of a checkpoint's config.json that decides the computation."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    model_type: str = "bert"
    pad_token_id: int = 0
    heads_per_layer: tuple = ()  # of models that lost whole heads and neurons; empty: the same in every layer
    neurons_per_layer: tuple = ()

    @property
    def layers(self):
        """(heads, neurons) of each layer."""
        heads = self.heads_per_layer or [self.num_attention_heads] * self.num_hidden_layers
        return list(zip(heads, self.neurons_per_layer or [self.intermediate_size] * len(heads), strict=True))

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def first_position(self):
        """RoBERTa counts positions from behind its padding id; the rows before are not used."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def longest_input(self):
        return self.max_position_embeddings - self.first_position


PER_LAYER = {"heads_per_layer": "num_attention_heads", "neurons_per_layer": "intermediate_size"}  # and its maximum


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.first = c.first_position

    def forward(self, input_ids, token_type_ids):
        positions = self.position_embeddings.weight[self.first : self.first + input_ids.shape[1]]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + positions
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Attention of some heads, each of size D."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.size, self.dropout = heads, c.head_size, c.attention_probs_dropout_prob
        self.query = nn.Linear(c.hidden_size, heads * c.head_size)
        self.key = nn.Linear(c.hidden_size, heads * c.head_size)
        self.value = nn.Linear(c.hidden_size, heads * c.head_size)

    def forward(self, x, context, attend):
        if not self.heads:  # [B * S, 0]; all three, so that all have gradients, if empty ones
            return self.query(x) + self.key(x) + self.value(x)
        split = [
            linear(t).view(len(attend), -1, self.heads, self.size).transpose(1, 2)  # [B * S, ...] -> [B, heads, S, D]
            for linear, t in ((self.query, x), (self.key, context), (self.value, context))
        ]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*split, attn_mask=attend, dropout_p=dropout)
        return mixed.transpose(1, 2).reshape(len(x), -1)  # [B, heads, S, D] -> [B * S, heads * D]


class AddNorm(nn.Module):
    """A projection, dropout, the residual, LayerNorm: how both halves of a BERT layer end."""

    def __init__(self, c, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    def __init__(self, c, heads, neurons):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(c, heads), "output": AddNorm(c, heads * c.head_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, neurons)})
        self.output = AddNorm(c, neurons)

    def forward(self, x, context, attend):
        """New states of the tokens x [B * R, H], which attend to all tokens of context [B * S, H]."""
        x = self.attention["output"](self.attention["self"](x, context, attend), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Encoder(nn.Module):
    """Embeddings and layers: what checkpoints call `bert`."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(c, *sizes) for sizes in c.layers)})

    def forward(self, input_ids, token_type_ids, attention_mask, tokens=None):
        """[B, S] each -> states of the first `tokens` tokens (default: all) [B, tokens, H]."""
        batch, width = input_ids.shape
        # [B, S, H] -> [B * S, H], which saves every linear layer two views, and autograd their inverses.
        x = self.embeddings(input_ids, token_type_ids).flatten(0, 1)
        # [B, S] -> [B, heads, queries, S], as what is added to the products; given a mask, every layer would make this.
        attend = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(attention_mask == 0, -math.inf)
        attend = attend[:, None, None, :]
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = layer(x, x, attend)
        read = x.view(batch, width, -1)[:, :tokens].flatten(0, 1)
        read = last(read, x, attend)  # nobody reads the other tokens: a seventh of MiniLM's work saved
        return read.view(batch, -1, x.shape[1])


class Predictions(nn.Module):
    """The masked-LM head. Its decoder is the word embedding, so of that only the bias is stored here."""

    def __init__(self, c):
        super().__init__()
        dense, norm = nn.Linear(c.hidden_size, c.hidden_size), nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, x):
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](x)))


class Bert(nn.Module):
    """An encoder that classifies by label words, or by a classifier of its own.

    config: Config; words: one token id a class; parts: which of "cls" (masked-LM head), "pooler" and "classifier"
    there are. every_token: read every token instead of [CLS].
    """

    every_token = False

    def __init__(self, config, words, parts=()):
        super().__init__()
        self.config = config
        self.register_buffer("words", torch.tensor(words, device="cpu"), persistent=False)
        self.bert = Encoder(config)
        if "cls" in parts:
            self.cls = nn.ModuleDict({"predictions": Predictions(config)})
        if "pooler" in parts:
            self.bert.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        if "classifier" in parts:
            self.classifier = nn.Linear(config.hidden_size, len(self.words))

    @classmethod
    def of(cls, config, words, tensors, head="words"):
        """A model of tensors {name: tensor}, which it keeps. Raises ValueError that names one that does not fit."""
        there = {part for part in ("cls", "pooler", "classifier") if any(f"{part}." in name for name in tensors)}
        with torch.device("meta"), warnings.catch_warnings():  # no memory and no random numbers
            warnings.simplefilter("ignore", UserWarning)  # a layer without heads has nothing to initialize
            model = cls(config, words, {head} | there)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"lacks {missing[0]} ({len(missing)} missing in all)")
        if unknown := sorted(tensors.keys() - expected.keys()):
            raise ValueError(f"has {unknown[0]}, which is not part of this model ({len(unknown)} such tensors)")
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"has {name} of shape {tuple(tensors[name].shape)}, config.json says {shape}")
        model.load_state_dict(tensors, assign=True)
        return model

    def forward(self, input_ids, token_type_ids, attention_mask):
        """Token ids, segment ids and 0/1 mask, each [B, S] -> logits of the classes [B, C]; every_token: [B, S, C]."""
        hidden = self.bert(input_ids, token_type_ids, attention_mask, tokens=None if self.every_token else 1)
        if not hasattr(self, "classifier"):
            logits = self.word_logits(hidden, self.words)
        else:
            if hasattr(self.bert, "pooler"):
                hidden = torch.tanh(self.bert.pooler["dense"](hidden))
            logits = self.classifier(F.dropout(hidden, self.config.hidden_dropout_prob, self.training))
        if not self.every_token:
            return logits[:, 0]
        return logits.masked_fill(attention_mask[:, :, None] == 0, -1e4)

    def word_logits(self, hidden, words=slice(None)):
        """Hidden states [..., H] -> logits of the given words (default: the whole vocabulary) [..., words].

        With a masked-LM head: dense, GELU, LayerNorm, tied decoder row, bias row. Without: h . e_word.
        """
        rows, bias = self.bert.embeddings.word_embeddings.weight[words], None
        if hasattr(self, "cls"):
            head = self.cls["predictions"]
            hidden, bias = head(hidden), head.bias[words]
        return F.linear(hidden, rows, bias)

    def prunable(self):
        """{group: {parameter name: weight [out, in]}}, six groups of one matrix a layer."""
        return {
            group: {
                f"bert.encoder.layer.{i}.{path}.weight": layer.get_submodule(path).weight
                for i, layer in enumerate(self.bert.encoder["layer"])
            }
            for group, path in GROUPS.items()
        }

    def fingerprint(self):
        """sha256 of all pretrained weights, by name: what ties a mask to its backbone."""
        return digest({n: t for n, t in self.state_dict().items() if not n.startswith("classifier.")})


def digest(tensors, described=""):
    """sha256 of a text and of tensors {name: tensor}, in the order of their names."""
    found = hashlib.sha256(described.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy())
    return found.hexdigest()
