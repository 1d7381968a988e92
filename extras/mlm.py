"""Masked language modelling: pretrain a BERT on text of your own, and prune it afterwards.

In each block of a text, a fifth of the tokens becomes [MASK], and the model guesses them. Which
ones is drawn anew for each batch. Devlin et al. 2019 mask 15 %, and leave or replace some of these.
Larger shares, always masked, are no worse (Wettig et al., EACL 2023), and give more to guess.

    python -m tools.fresh FOLDER --kind bert --text mine/mlm/train.txt --vocabulary 16384
    python train.py --task mlm --data-dir mine --model FOLDER --method finetune
    python train.py --task movies --model RUN
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from data import TASKS, Examples, Task
from extras.lm import Blocks, token_ids
from model import Bert, load_backbone
from plumbing import fetch
from plumbing.checkpoints import build_from
from plumbing.files import json_bytes, prefix_errors, seal, sha256, unseal, write_whole

SHARE = 0.2  # of the tokens of a block are masked
TOKENS = "smp-tokens-1"  # the format of a file of token ids


def masked_count(size):
    """K, how many tokens of a block of `size` are masked. [CLS] and [SEP] never are."""
    return math.ceil(SHARE * (size - 2))


@dataclass(frozen=True)
class MaskedBlocks(Examples):
    """N blocks of S tokens, with [CLS] and [SEP]. K tokens of each are masked, and are its labels.

    ids is an array [N, S].
    """

    mask: int  # the id of [MASK]
    chosen: np.ndarray | None  # which tokens are masked [N, K]; None: they are drawn each time
    digest = Blocks.digest
    reduce_logits = Blocks.reduce_logits  # logits [B, K, V] -> loss and hit of each token [B, K, 2]

    def arrays(self, rows, width=None):
        """Row numbers [B] -> ids, segments and mask [3, B, S], and the masked tokens [B, K]."""
        chosen = draw(len(rows), self.limit) if self.chosen is None else self.chosen[rows]
        inputs = np.zeros((3, len(rows), self.limit), dtype=np.int64)
        inputs[0] = self.ids[rows]
        inputs[2] = 1  # a block has no padding
        labels = np.take_along_axis(inputs[0], chosen, axis=1)
        np.put_along_axis(inputs[0], chosen, self.mask, axis=1)
        return inputs, labels

    def score(self, reduced, metrics):
        """Losses and hits [N, K, 2] -> {name: number}.

        pseudo_perplexity: exp of the mean loss per masked token. accuracy: the share of hits.
        """
        loss, hit = reduced.double().mean((0, 1)).tolist()
        return {"pseudo_perplexity": math.exp(min(loss, 700)), "accuracy": hit}


def draw(blocks, size, generator=None):
    """Draw which tokens of blocks are masked -> positions [blocks, K], in ascending order.

    By default from torch's generator, whose state a checkpoint keeps.
    """
    highest = torch.rand(blocks, size - 2, generator=generator).topk(masked_count(size)).indices
    return highest.sort(dim=1).values.numpy() + 1  # behind [CLS]


def read_blocks(task, split, path, tokenizer):
    """Task.read: a text, a paragraph per line -> MaskedBlocks.

    In dev the same tokens are masked every time. Raises ValueError for a text that is not UTF-8 or
    shorter than a block.
    """
    size = tokenizer.truncation["max_length"]
    cls, sep = tokenizer.encode("").ids
    mask = tokenizer.token_to_id("[MASK]")
    ids = stored_ids(path, tokenizer)
    ids[ids == mask] = sep  # a text that says [MASK] has nothing there to guess
    inner = size - 2
    count = len(ids) // inner
    if not count:
        raise ValueError(f"{path} is shorter than a block of {size} tokens; lower --length")
    print(f"{path.name}: {len(ids):,} tokens; {count:,} blocks of {size}")
    blocks = np.empty((count, size), dtype=np.int32)
    blocks[:, 0], blocks[:, -1] = cls, sep
    blocks[:, 1:-1] = ids[: count * inner].reshape(count, inner)
    chosen = None if split == "train" else draw(count, size, torch.Generator().manual_seed(0))
    return MaskedBlocks(blocks, [], [], size, mask, chosen)  # types and labels follow from the ids


def stored_ids(path, tokenizer):
    """All token ids of a text [tokens]. The cache keeps them, as a large text takes minutes."""
    settings = json.loads(tokenizer.to_str()) | {"truncation": None}  # whatever --length is
    key = sha256(json_bytes([sha256(path.read_bytes()), settings]))
    store = fetch.cache() / "tokens" / f"{key}.safetensors"
    if not store.exists():
        ids, _ = token_ids(path, tokenizer)
        write_whole(store, seal(TOKENS, {"ids": torch.from_numpy(ids)}, path.name))
    with prefix_errors("delete this file, and it will be made again"):
        tensors, _ = unseal(store, TOKENS)
    return tensors["ids"].numpy()


class MaskedLM(Bert):
    """A BERT that guesses masked tokens. mask: the id of [MASK]."""

    def __init__(self, config, mask):
        super().__init__(config, words=[0], parts={"cls"})
        self.mask = mask

    def resized(self, config, tensors):
        return build_from(partial(MaskedLM, config, self.mask), tensors).train(self.training)

    def forward(self, input_ids, token_type_ids, attention_mask):
        """[B, S] each -> the logits of the K masked tokens [B, K, V], in their order."""
        hidden = self.bert(input_ids, token_type_ids, attention_mask)  # [B, S, H]
        # Masked tokens first. There are equally many in each block, so the host need not wait.
        order = (input_ids == self.mask).int().argsort(dim=1, descending=True, stable=True)
        masked = order[:, : masked_count(input_ids.shape[1]), None]  # [B, K, 1]
        hidden = hidden.gather(1, masked.expand(-1, -1, hidden.shape[2]))  # [B, K, H]
        return self.word_logits(hidden)


def load(folder, length, head):
    """Task.load: -> MaskedLM and its tokenizer. Raises ValueError that says what does not fit."""
    plain, tokenizer = load_backbone(folder, replace(TASKS["mlm"], load=None), length)
    mask = tokenizer.token_to_id("[MASK]")
    if head != "words" or mask is None or not hasattr(plain, "cls"):
        raise ValueError(f"{folder}: mlm needs [MASK], a masked-LM head, and no --head classifier")
    return build_from(partial(MaskedLM, plain.config, mask), plain.state_dict()), tokenizer


def format_answer(texts, tokenizer, logits_of, args):
    """Task.format_answer: there is none."""
    raise ValueError("--text: a masked language model has no answers; train it on a task first")


TASKS["mlm"] = Task(
    "mlm", ("text",), "", {}, ("pseudo_perplexity", "accuracy"),
    {"epochs": 3, "batch": 128, "dropout": False, "weight_lr": 3e-4, "warmup": 0.1},
    file="{}.txt", best=min, load=load, read=read_blocks, format_answer=format_answer,
)  # fmt: skip
