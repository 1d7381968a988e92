"""BERT and RoBERTa from scratch, as ordinary nn.Modules whose weights bear the names of published checkpoints.

The logit of a class is the logit of its label word, read at [CLS]. Nothing here prunes: `prunable()` names the weights
that a mask may touch. Sources: Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (arXiv 1907.11692).

    model = load_model(*plumbing.checkpoints.read_model(folder), words=[2053, 2748])
    logits = model(input_ids, token_type_ids, attention_mask)  # [B, 2]
"""

import warnings
from dataclasses import MISSING, dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# The six groups of prunable matrices, and where each stands inside a layer.
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
    """The part of a checkpoint's config.json that decides the computation, under the names there."""

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
    pad_token_id: int = 0
    model_type: str = "bert"
    # Of a model that lost whole heads and neurons, a number for each layer. Empty: the same in every layer.
    heads_per_layer: tuple = ()
    neurons_per_layer: tuple = ()

    @property
    def layers(self):
        """[(heads, neurons)] of each layer."""
        heads = self.heads_per_layer or [self.num_attention_heads] * self.num_hidden_layers
        neurons = self.neurons_per_layer or [self.intermediate_size] * self.num_hidden_layers
        return list(zip(heads, neurons, strict=True))

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def first_position(self):
        """RoBERTa counts positions from behind its padding id; the rows before are not used."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def longest_input(self):
        return self.max_position_embeddings - self.first_position


# --- the model -----------------------------------------------------------------------------------------------
# B texts of S tokens, H wide; heads of size D. In the encoder tokens are rows, [B * S, H]: that saves views and copies.


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        table = partial(nn.Embedding.from_pretrained, freeze=False)  # nn.Embedding would draw numbers in vain: 2 s more
        self.word_embeddings = table(torch.zeros(c.vocab_size, c.hidden_size))
        self.position_embeddings = table(torch.zeros(c.max_position_embeddings, c.hidden_size))
        self.token_type_embeddings = table(torch.zeros(c.type_vocab_size, c.hidden_size))
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.first = c.first_position

    def forward(self, input_ids, token_type_ids):
        positions = self.position_embeddings.weight[self.first : self.first + input_ids.shape[1]]  # [S, H]
        if self.first:  # RoBERTa: a padding token in a text has no place of its own; those behind it move up
            real = input_ids != self.first - 1
            positions = self.position_embeddings(real.cumsum(1) * real + self.first - 1)  # [B, S, H]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids) + positions  # [B, S, H]
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.size = c.head_size
        self.dropout = c.attention_probs_dropout_prob
        self.query = nn.Linear(c.hidden_size, heads * c.head_size)
        self.key = nn.Linear(c.hidden_size, heads * c.head_size)
        self.value = nn.Linear(c.hidden_size, heads * c.head_size)

    def forward(self, x, context, attend):
        if self.heads == 0:  # [B * S, 0]; the sum of all three, so that all get gradients, if empty ones
            return self.query(x) + self.key(x) + self.value(x)

        def split(rows):  # [B * S, heads * D] -> [B, heads, S, D]
            return rows.view(len(attend), -1, self.heads, self.size).transpose(1, 2)

        q = split(self.query(x))  # of x alone, which in the last layer are fewer tokens
        k = split(self.key(context))
        v = split(self.value(context))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)  # [B, heads, S, D]
        return mixed.transpose(1, 2).reshape(len(x), -1)  # -> [B, S, heads, D] -> [B * S, heads * D]


class AddNorm(nn.Module):
    """A projection, dropout, the residual, LayerNorm: how both halves of a BERT layer end."""

    def __init__(self, c, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # BERT normalises behind the residual


class Layer(nn.Module):
    def __init__(self, c, heads, neurons):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(c, heads), "output": AddNorm(c, heads * c.head_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, neurons)})
        self.output = AddNorm(c, neurons)

    def forward(self, x, context, attend):
        """New states of the tokens x [B * R, H], which attend to all tokens of context [B * S, H]."""
        x = self.attention["output"](self.attention["self"](x, context, attend), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)  # [B * R, H] -> [B * R, neurons] -> [B * R, H]


class Encoder(nn.Module):
    """Embeddings and layers: what checkpoints call `bert`."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(c, *sizes) for sizes in c.layers)})

    def forward(self, input_ids, token_type_ids, attention_mask, tokens=None):
        """[B, S] each -> states of the first `tokens` tokens (default: all) [B, tokens, H]."""
        batch, width = input_ids.shape
        x = self.embeddings(input_ids, token_type_ids).flatten(0, 1)  # [B, S, H] -> [B * S, H]
        # Added to the products of queries and keys: -inf at padding. [B, S] -> [B, 1, 1, S], for all heads and queries
        attend = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(attention_mask == 0, float("-inf"))
        attend = attend[:, None, None, :]
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = layer(x, x, attend)
        read = x.view(batch, width, -1)[:, :tokens].flatten(0, 1)  # [B * S, H] -> [B * tokens, H]
        return last(read, x, attend).view(batch, -1, x.shape[1])  # no others are read: a seventh of MiniLM's work saved


class Bert(nn.Module):
    """An encoder that classifies by label words, or by a classifier of its own.

    words: a token id for each class. parts: which of "cls" (masked-LM head), "pooler" and "classifier" there are.
    every_token: read every token instead of [CLS].
    """

    activation = staticmethod(F.gelu)  # of the neurons
    states = property(lambda self: self.bert)  # (inputs as of forward) -> what the last layer gives [B, S, H]

    def __init__(self, config, words, parts=(), every_token=False):
        super().__init__()
        self.config = config
        self.every_token = every_token
        self.register_buffer("words", torch.tensor(words, device="cpu"), persistent=False)  # in no checkpoint
        self.bert = Encoder(config)
        if "cls" in parts:  # the decoder is the word embedding, so only its bias is stored here
            predictions = nn.Module()
            predictions.transform = AddNorm(config, config.hidden_size)  # for its names; word_logits computes
            predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))
            self.cls = nn.ModuleDict({"predictions": predictions})
        if "pooler" in parts:
            self.bert.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        if "classifier" in parts:
            self.classifier = nn.Linear(config.hidden_size, len(self.words))

    @classmethod
    def of(cls, config, words, tensors, head="words", every_token=False):
        """A model of tensors {name: tensor}, which it keeps. Raises ValueError that names one that does not fit."""
        parts = {head, *(p for p in ("cls", "pooler", "classifier") if any(f"{p}." in name for name in tensors))}
        return filled(partial(cls, config, words, parts, every_token), tensors)

    def resized(self, config, tensors):
        """The same kind of model, in the same mode, with layers of another size."""
        return Bert.of(config, self.words.tolist(), tensors, every_token=self.every_token).train(self.training)

    def forward(self, input_ids, token_type_ids, attention_mask):
        """Token ids, segment ids and 0/1 mask, each [B, S] -> logits [B, C]; every_token: of the tokens [B, C, S]."""
        hidden = self.bert(input_ids, token_type_ids, attention_mask, tokens=None if self.every_token else 1)
        if not hasattr(self, "classifier"):
            logits = self.word_logits(hidden, self.words)
        else:
            if hasattr(self.bert, "pooler"):
                hidden = torch.tanh(self.bert.pooler["dense"](hidden))  # pretrained, to tell pairs of sentences
            logits = self.classifier(F.dropout(hidden, self.config.hidden_dropout_prob, self.training))
        if not self.every_token:
            return logits[:, 0]  # [B, 1, C] -> [B, C]: those of [CLS]
        logits = logits.transpose(1, 2)  # [B, S, C] -> [B, C, S]
        return logits.masked_fill(attention_mask[:, None, :] == 0, -1e4)  # padding is no answer

    def word_logits(self, hidden, words=slice(None)):
        """Hidden states [..., H] -> logits of the given words (default: the whole vocabulary) [..., words]."""
        rows = self.bert.embeddings.word_embeddings.weight[words]  # [words, H]
        if not hasattr(self, "cls"):
            return F.linear(hidden, rows)  # h . e_word
        head = self.cls["predictions"]  # dense, GELU, LayerNorm, tied decoder row, bias row
        hidden = head.transform.LayerNorm(F.gelu(head.transform.dense(hidden)))
        return F.linear(hidden, rows, head.bias[words])

    def compile_layers(self):
        """Let torch.compile fuse what a layer does, for all widths of batches at once."""
        for layer in self.bert.encoder["layer"]:
            layer.compile(dynamic=True)

    def prunable(self):
        """{group: {parameter name: weight [out, in]}}, six groups of one matrix a layer."""
        groups = {group: {} for group in GROUPS}
        for i, layer in enumerate(self.bert.encoder["layer"]):
            for group, path in GROUPS.items():
                groups[group][f"bert.encoder.layer.{i}.{path}.weight"] = layer.get_submodule(path).weight
        return groups

    @staticmethod
    def canonical(name):
        """A checkpoint's tensor name -> ours: RoBERTa's, LayerNorm.gamma/beta, encoders saved without `bert.`."""
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = rename(name, ROBERTA)
        return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"

    def published(self, tensors):
        """{our name: tensor} -> {name in checkpoints of this model_type: tensor}."""
        names = {} if self.config.model_type == "bert" else {ours: theirs for theirs, ours in ROBERTA.items()}
        return {rename(name, names): tensor for name, tensor in tensors.items()}


# --- loading, strictly: every tensor of a checkpoint is used once, or known to be unused -----------------------


def filled(make, tensors):
    """make() -> a model, here of the tensors {name: tensor}, which it keeps. Raises ValueError that names a misfit."""
    with torch.device("meta"), warnings.catch_warnings():  # no memory and no random numbers
        warnings.simplefilter("ignore", UserWarning)  # a layer without heads has nothing to initialize
        model = make()
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its lines name the tensors that are missing, unknown or misshapen
        raise ValueError(str(error).splitlines()[1].strip()[:200]) from None
    return model


# All families but the first are RoBERTa; with the padding id of each, for where config.json leaves it out.
FAMILIES = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1}
ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
PER_LAYER = ("heads_per_layer", "neurons_per_layer")

# Tensors that checkpoints carry and that no model uses, or none with that head.
NEVER_USED = ("cls.seq_relationship.", "bert.qa_outputs.")
UNUSED = {"words": ("bert.pooler.", "classifier."), "classifier": ("cls.",)}

# Stored copies of tied tensors: name in the file -> the tensor that must hold the same numbers.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

# RoBERTa's names for the same tensors.
ROBERTA = {
    "roberta.": "bert.",
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.": "cls.predictions.",
}


def read_config(stored, kind=Config, families=FAMILIES, only=ONLY):
    """config.json as a dict -> Config. Raises ValueError that names the key of a model that we cannot compute."""
    family = stored.get("model_type", "bert")
    if family not in list(families):
        raise ValueError(f"model_type is {family!r}; the models for this task are {', '.join(families)}")
    for name, value in only.items():
        if stored.get(name, value) != value:
            raise ValueError(f"{name} is {stored[name]!r}, and only {value!r} can be computed here")
    stored = {"pad_token_id": families[family]} | stored
    values = {"model_type": family}
    for field in fields(kind)[:-3]:  # all numbers; the last three are none
        name = field.name
        value = values[name] = stored.get(name, field.default)
        lowest = 1 if field.default is MISSING else 0
        highest = 1 if field.type is float else 1000 if "layer" in name else 1 << 24
        if value is MISSING:
            raise ValueError(f"it lacks {name}")
        if type(value) not in (int, field.type) or not lowest <= value <= highest:
            raise ValueError(f"{name} is {value!r}, not a number from {lowest} to {highest}")
    whole = kind(**values)  # before it lost any heads or neurons
    if whole.hidden_size % whole.layers[0][0]:
        raise ValueError("its width is not divisible by its number of attention heads")
    for name, most in zip(PER_LAYER, whole.layers[0], strict=True):
        counts = stored.get(name, [])
        fits = isinstance(counts, list) and len(counts) in (0, len(whole.layers))
        if not fits or not all(type(count) is int and 0 <= count <= most for count in counts):
            raise ValueError(f"{name} is {counts!r}, not a list of one number from 0 to {most} a layer")
        values[name] = tuple(counts)
    return kind(**values)


def rename(name, prefixes):
    """A name with the first of {old: new} prefixes that it has replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_model(stored, tensors, words, head="words", every_token=False, fresh=True):
    """config.json as a dict, {name in the checkpoint: float32 tensor} -> Bert, in training mode.

    words, every_token: see Bert. head: "words"; or "classifier", fresh or the checkpoint's, on its pooler if there is
    one. Raises ValueError that names what does not fit.
    """
    config = read_config(stored)
    ours = {}
    for name, tensor in tensors.items():
        if (known := Bert.canonical(name)) in ours:
            raise ValueError(f"{known} is there twice, once as {name}")
        ours[known] = tensor
    for copy, original in TIED.items():  # either may be stored, or both
        if copy in ours and not torch.equal(ours.setdefault(original, ours[copy]), ours.pop(copy)):
            raise ValueError(f"{copy} differs from {original}; only tied decoders are supported")
    unused = NEVER_USED + UNUSED[head] + (("classifier.",) if fresh else ())
    ours = {name: tensor for name, tensor in ours.items() if not name.startswith(unused)}
    if head == "classifier" and fresh:
        ours["classifier.weight"] = 0.02 * torch.randn(len(words), config.hidden_size)  # as BERT's authors do
        ours["classifier.bias"] = torch.zeros(len(words))
    return Bert.of(config, words, ours, head, every_token)
