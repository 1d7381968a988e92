"""BERT and RoBERTa from scratch, as ordinary nn.Modules with the tensor names of checkpoints.

The logit of a class is the logit of its label word, read at [CLS]. Nothing here prunes:
`prunable()` names the weights that a mask may touch. Sources: Devlin et al. 2019 (arXiv
1810.04805), Liu et al. 2019 (arXiv 1907.11692).

    model, tokenizer = load_backbone(folder, data.TASKS["rte"], length=128)
    logits = model(input_ids, token_type_ids, attention_mask)  # [B, 2]
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.checkpoints import FAMILIES, build_from, cutting_tokenizer, read_config, read_model
from plumbing.files import prefix_errors
from plumbing.graphs import Dropout, dropout  # as torch's, but faster on a CPU

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
    """The part of config.json that decides the computation, under its names there."""

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
    # One number per layer, for a model that lost whole heads and neurons. Empty: all layers alike.
    heads_per_layer: tuple = ()
    neurons_per_layer: tuple = ()

    # The rest follows from these numbers.

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
        """RoBERTa counts positions from its padding id + 1. Padding has the one before."""
        return 0 if self.model_type == "bert" else self.pad_token_id + 1

    @property
    def longest_input(self):
        return self.max_position_embeddings - self.first_position


# --- the model ----------------------------------------------------------------------------------
#
# B texts of S tokens, states H wide, heads of size D. Inside the encoder each token is a row,
# [B * S, H]: this saves views and copies. The last layer has R rows per text, those that are read.


def embedding(rows, width):
    """An nn.Embedding of zeros.

    Initialising it would be wasted, and on the meta device it makes torch import its compiler: 2 s.
    """
    return nn.Embedding.from_pretrained(torch.zeros(rows, width), freeze=False)


class Embeddings(nn.Module):
    """Word, position and segment embeddings, added up and normalised."""

    def __init__(self, c):
        super().__init__()
        self.word_embeddings = embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = Dropout(c.hidden_dropout_prob)
        self.first = c.first_position

    def forward(self, input_ids, token_type_ids):
        if self.first == 0:
            positions = self.position_embeddings.weight[: input_ids.shape[1]]  # [S, H]
        else:
            # RoBERTa: positions begin behind the id of padding. Padding's own position is that id.
            padding = self.first - 1
            real = input_ids != padding
            index = real.cumsum(1) * real + padding  # [B, S]
            positions = self.position_embeddings(index)  # [B, S, H]
        words = self.word_embeddings(input_ids)  # [B, S, H]
        # Segments: 0 for the first text, 1 for its pair.
        x = words + self.token_type_embeddings(token_type_ids) + positions
        return self.dropout(self.LayerNorm(x))


def attention(q, k, v, attn_bias, p, causal=False):
    """Attention of queries q [B, heads, R, D] to k and v [B, heads, S, D] -> [B, heads, R, D].

    attn_bias is added to the scores: 0, or -inf where a query must not look. It is [B, 1, 1, S], or
    with `causal` GPT-2's mask [S, S].
    """
    if q.is_cpu and q.dtype == torch.bfloat16:
        scores = (q / q.shape[-1] ** 0.5) @ k.mT + attn_bias  # q k^T / sqrt(D): [B, heads, R, S]
        weights = dropout(scores.softmax(-1), p)  # how much of each value to take
        return weights @ v
    # The same as one kernel, which makes a causal mask itself. In training on a CPU in bfloat16, it
    # takes two to five times as long as the three lines.
    attn_bias = None if causal else attn_bias
    return F.scaled_dot_product_attention(q, k, v, attn_bias, p, causal)


class SelfAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads  # a pruned layer may have fewer than c says
        self.size = c.head_size  # D
        self.dropout = c.attention_probs_dropout_prob
        self.query = nn.Linear(c.hidden_size, heads * c.head_size)
        self.key = nn.Linear(c.hidden_size, heads * c.head_size)
        self.value = nn.Linear(c.hidden_size, heads * c.head_size)

    def forward(self, x, context, attn_bias):
        """x [B * R, H] attends to context [B * S, H] -> [B * R, heads * D]. See Layer."""
        if self.heads == 0:  # empty [B * R, 0]; the sum gives all three weights gradients
            return self.query(x) + self.key(x) + self.value(x)

        # Queries of the R tokens that are computed; keys and values of all S.
        batch = len(attn_bias)  # B
        q = self.split(self.query(x), batch)
        k = self.split(self.key(context), batch)
        v = self.split(self.value(context), batch)
        mixed = attention(q, k, v, attn_bias, self.dropout if self.training else 0.0)
        # [B, heads, R, D] -> [B, R, heads, D] -> [B * R, heads * D]
        return mixed.transpose(1, 2).reshape(len(x), -1)

    def split(self, rows, batch):
        """[B * S, heads * D] -> [B, heads, S, D]."""
        return rows.view(batch, -1, self.heads, self.size).transpose(1, 2)


class AddNorm(nn.Module):
    """A projection, dropout, the residual, LayerNorm: how both halves of a BERT layer end."""

    def __init__(self, c, inputs):
        super().__init__()
        # Post-norm, as in Devlin et al.: GPT-2 normalises before each half instead.
        self.dense = nn.Linear(inputs, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = Dropout(c.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    def __init__(self, c, heads, neurons):
        super().__init__()
        # Dicts, so that the tensors bear the names of checkpoints.
        attention = {"self": SelfAttention(c, heads), "output": AddNorm(c, heads * c.head_size)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, neurons)})
        self.output = AddNorm(c, neurons)

    def forward(self, x, context, attn_bias):
        """New states of the tokens x [B * R, H], which attend to all tokens of context [B * S, H].

        Usually both are the same. The last layer gets fewer tokens: only those that are read.
        """
        # Attention mixes tokens. The feed-forward network treats each token alone.
        x = self.attention["output"](self.attention["self"](x, context, attn_bias), x)
        inner = F.gelu(self.intermediate["dense"](x))  # [B * R, H] -> [B * R, neurons]
        return self.output(inner, x)  # -> [B * R, H]


class Encoder(nn.Module):
    """Embeddings and layers: what checkpoints call `bert`."""

    def __init__(self, c):
        super().__init__()
        # A list in a dict named layer: checkpoints say encoder.layer.0 and so on.
        self.embeddings = Embeddings(c)
        layers = nn.ModuleList(Layer(c, heads, neurons) for heads, neurons in c.layers)
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids, token_type_ids, attention_mask, tokens=None):
        """[B, S] each -> states of the first `tokens` tokens (default: all) [B, tokens, H]."""
        batch, width = input_ids.shape
        x = self.embeddings(input_ids, token_type_ids).flatten(0, 1)  # [B, S, H] -> [B * S, H]
        # Attention adds this to its scores: 0, and -inf at padding.
        attn_bias = torch.zeros_like(attention_mask, dtype=x.dtype)
        attn_bias.masked_fill_(attention_mask == 0, float("-inf"))
        attn_bias = attn_bias[:, None, None]  # [B, S] -> [B, 1, 1, S], for all heads and queries

        # Every layer but the last computes all tokens.
        *layers, last = self.encoder["layer"]
        for layer in layers:
            x = layer(x, x, attn_bias)
        # The last layer computes only what is read. For [CLS] alone that saves MiniLM a seventh.
        read = x.view(batch, width, -1)[:, :tokens].flatten(0, 1)  # [B * S, H] -> [B * tokens, H]
        return last(read, x, attn_bias).view(batch, -1, x.shape[1])


class Bert(nn.Module):
    """An encoder that classifies by label words, or by a classifier of its own.

    words: the token id of each class's label word. parts: which of "cls" (the masked-LM head),
    "pooler" and "classifier" there are. every_token: read every token instead of [CLS].
    """

    activation = staticmethod(F.gelu)  # what the neurons apply
    # (inputs) -> what the last layer gives [B, S, H], for methods that look inside a model.
    states = property(lambda self: self.bert)

    def __init__(self, config, words, parts=(), every_token=False):
        super().__init__()
        self.config = config
        self.every_token = every_token
        # On the CPU, as models are built on the meta device; in no checkpoint.
        self.register_buffer("words", torch.tensor(words, device="cpu"), persistent=False)
        self.bert = Encoder(config)
        if "cls" in parts:  # the decoder's weight is the word embedding; only its bias is stored
            predictions = nn.Module()
            # For the names of its tensors. Its forward never runs, see word_logits.
            predictions.transform = AddNorm(config, config.hidden_size)
            predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))
            self.cls = nn.ModuleDict({"predictions": predictions})
        if "pooler" in parts:
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.bert.pooler = nn.ModuleDict({"dense": dense})
        if "classifier" in parts:
            self.classifier = nn.Linear(config.hidden_size, len(self.words))

    def resized(self, config, tensors):
        """The same kind of model, in the same mode, with layers of another size."""
        words = self.words.tolist()
        return build_bert(config, words, tensors, "words", self.every_token).train(self.training)

    def forward(self, input_ids, token_type_ids, attention_mask):
        """Token ids, segment ids and 0/1 mask, each [B, S] -> logits [B, C].

        every_token: the logits of each token [B, C, S].
        """
        # [CLS] is the first token. Its state stands for the whole text.
        tokens = None if self.every_token else 1
        hidden = self.bert(input_ids, token_type_ids, attention_mask, tokens)
        if hasattr(self, "classifier"):
            logits = self.class_logits(hidden)
        else:
            logits = self.word_logits(hidden, self.words)
        if not self.every_token:
            return logits[:, 0]  # [B, 1, C] -> [B, C]: those of [CLS]
        logits = logits.transpose(1, 2)  # [B, S, C] -> [B, C, S]
        return logits.masked_fill(attention_mask[:, None, :] == 0, -1e4)  # padding is no answer

    def word_logits(self, hidden, words=slice(None)):
        """Hidden states [..., H] -> logits of these words (default: the vocabulary) [..., words].

        With a masked-LM head: dense, GELU, LayerNorm, tied decoder row, bias. Else h . e_word.
        """
        # The decoder is tied to the input embedding: one row for each word.
        rows = self.bert.embeddings.word_embeddings.weight[words]  # [words, H]
        if not hasattr(self, "cls"):
            return F.linear(hidden, rows)
        # The frozen head that was pretrained to guess masked words.
        head = self.cls["predictions"]
        hidden = head.transform.LayerNorm(F.gelu(head.transform.dense(hidden)))
        return F.linear(hidden, rows, head.bias[words])

    def class_logits(self, hidden):
        """Hidden states [..., H] -> logits of the classifier, on the pretrained pooler if any."""
        if hasattr(self.bert, "pooler"):
            hidden = torch.tanh(self.bert.pooler["dense"](hidden))
        hidden = F.dropout(hidden, self.config.hidden_dropout_prob, self.training)
        return self.classifier(hidden)

    def compile_layers(self):
        """Let torch.compile fuse what a layer does, for all widths of batches at once."""
        for layer in self.bert.encoder["layer"]:
            layer.compile(dynamic=True)

    def prunable(self):
        """{group: {parameter name: weight [out, in]}}, six groups of one matrix per layer."""
        groups = {group: {} for group in GROUPS}
        # Layer by layer, so that a group's matrices come in the order of the layers.
        for i, layer in enumerate(self.bert.encoder["layer"]):
            for group, path in GROUPS.items():
                name = f"bert.encoder.layer.{i}.{path}.weight"
                groups[group][name] = layer.get_submodule(path).weight
        return groups

    @staticmethod
    def canonical(name):
        """A checkpoint's tensor name -> ours: RoBERTa's, LayerNorm.gamma, names without `bert.`"""
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        name = rename(name, ROBERTA)
        return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"

    def published(self, tensors):
        """{our name: tensor} -> {name in checkpoints of this model_type: tensor}."""
        if self.config.model_type == "bert":
            return tensors
        names = {ours: theirs for theirs, ours in ROBERTA.items()}
        return {rename(name, names): tensor for name, tensor in tensors.items()}


# --- loading: every tensor of a checkpoint is used once, or known to be unused -------------------

ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}

# Tensors of checkpoints to leave out: for every head, and for one.
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


def load_backbone(folder, task, length, head="words", fresh=True):
    """A model folder -> (its model for a task, in training mode; its tokenizer).

    task: a row of data.TASKS. length: longest input in tokens. head: "words", or "classifier",
    which is fresh or the folder's own. Raises ValueError that names what does not fit.
    """
    if task.load:  # another kind of model, see extras/
        return task.load(folder, length, head)
    stored, tensors = read_model(folder)
    with prefix_errors(folder):
        config = read_config(stored, Config, FAMILIES, ONLY)
        if not 4 <= length <= config.longest_input:
            raise ValueError(
                f"--length {length}: the model takes 4 to {config.longest_input} tokens"
            )
        tokenizer = cutting_tokenizer(folder, length)
        # Does the tokenizer fit the model? Ids out of range would end in an index error.
        longest = ["a " * length] * len(task.text)  # one text, or a pair, to be cut
        text = tokenizer.encode(*longest)
        largest = max(*tokenizer.get_vocab().values(), *text.ids)
        if largest >= config.vocab_size or max(text.type_ids) >= config.type_vocab_size:
            raise ValueError("tokenizer.json has more words or segments than config.json allows")
        if not text.special_tokens_mask[0]:
            raise ValueError("tokenizer.json puts no [CLS] first, where the answer is read")
        # Each token says which text it is of; special tokens are of none.
        if len({*text.sequence_ids} - {None}) < len(task.text):
            raise ValueError(f"--length {length} leaves no room for every text")
        # One row of the vocabulary for each class. A classifier does not read them.
        words = [0] * len(task.words)
        if head == "words":
            words = label_word_ids(task.words.values(), tokenizer)
        return load_model(stored, tensors, words, head, task.every_token, fresh), tokenizer


def label_word_ids(words, tokenizer):
    """Label words -> their token ids. Raises ValueError for one of several tokens or two labels.

    Words follow a space, as in running text: RoBERTa's vocabulary knows "Ġyes", XLM-R's "▁yes", and
    BERT's does not see the space.
    """
    ids = []
    for word in words:
        encoded = tokenizer.encode(f" {word}", add_special_tokens=False)
        # Two classes with one word would have one logit.
        if len(encoded.ids) != 1 or encoded.tokens[0].lstrip("Ġ▁") != word or encoded.ids[0] in ids:
            raise ValueError(
                f"label word {word!r} is {encoded.tokens} in tokenizer.json, not one token of its "
                "own, or the word of two labels; choose another"
            )
        ids += encoded.ids
    return ids


def load_model(stored, tensors, words, head="words", every_token=False, fresh=True):
    """config.json as a dict, {name in the checkpoint: float32 tensor} -> Bert, in training mode.

    words, every_token: see Bert. head, fresh: see load_backbone. Raises ValueError that names what
    does not fit.
    """
    config = read_config(stored, Config, FAMILIES, ONLY)
    # All tensors under our names, each once.
    ours = {}
    for name, tensor in tensors.items():
        known = Bert.canonical(name)
        if known in ours:
            raise ValueError(f"{known} is there twice, once as {name}")
        ours[known] = tensor

    # Leave out what this head does not read; whatever else is unknown is an error.
    unused = NEVER_USED + UNUSED[head]
    if fresh:
        unused += ("classifier.",)
    ours = {name: tensor for name, tensor in ours.items() if not name.startswith(unused)}

    # Either of two tied tensors may be stored, or both.
    for copy, original in TIED.items():
        if copy in ours:
            copied = ours.pop(copy)
            kept = ours.setdefault(original, copied)
            if not torch.equal(kept, copied):
                raise ValueError(
                    f"{copy} differs from {original}; only tied decoders are supported"
                )

    if head == "classifier" and fresh:  # initialised by the rule of BERT's authors
        ours["classifier.weight"] = 0.02 * torch.randn(len(words), config.hidden_size)
        ours["classifier.bias"] = torch.zeros(len(words))
    return build_bert(config, words, ours, head, every_token)


def build_bert(config, words, tensors, head, every_token):
    """A Bert of tensors {name: tensor}, which it keeps. Raises ValueError for one that misfits."""
    parts = {"classifier"} if head == "classifier" else set()
    for part in ("cls", "pooler", "classifier"):
        if any(f"{part}." in name for name in tensors):
            parts.add(part)
    return build_from(partial(Bert, config, words, parts, every_token), tensors)


def rename(name, prefixes):
    """A name with the first of {old: new} prefixes that it has replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
