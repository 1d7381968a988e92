"""Make a GPT-2 or a BERT with random weights, to train from scratch. A text gives it a tokenizer.

Without --text it makes only the weights, in a folder with a config.json and a tokenizer.json.

    python -m tools.fresh FOLDER --kind bert --text mine/mlm/train.txt --vocabulary 16384
    python train.py --model FOLDER --method finetune --task mlm --data-dir mine

    python -m tools.fresh FOLDER --kind gpt2 --text wiki.train.tokens
    python train.py --model FOLDER --method finetune --task wikitext2 \\
        --weight-lr 1e-3 --epochs 20 --warmup 0.05
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer

import model
from data import TASKS
from extras.gpt2 import GPT2, gpt2_config
from extras.lm import END
from plumbing import cli
from plumbing.checkpoints import WEIGHTS, describe_missing, pack_weights, read_config
from plumbing.files import json_bytes, prefix_errors, read_json, read_lines, write_whole
from tools.export import partial_folder

# --- GPT-2 ----------------------------------------------------------------------------------------


def gpt2_tokenizer(lines, vocabulary):
    """Train a byte-level BPE like GPT-2's: all bytes are in it, and the end of a text."""
    if vocabulary < 257:
        raise ValueError("--vocabulary: all bytes and the end of a text need 257 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes: no token is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def gpt2_settings(tokenizer, args):
    """The config.json of a new GPT-2."""
    end = tokenizer.token_to_id(END)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": end,
        "eos_token_id": end,
        "n_layer": args.layers,
        "n_embd": args.hidden,
        "n_head": args.heads,
        "n_positions": args.positions,
        "embd_pdrop": args.dropout,
        "attn_pdrop": args.dropout,
        "resid_pdrop": args.dropout,
    }


def gpt2_model(stored):
    return GPT2(gpt2_config(stored))


# --- BERT -----------------------------------------------------------------------------------------


def bert_tokenizer(lines, vocabulary):
    """Train a WordPiece vocabulary of lower-case words. The label words of all tasks are in it."""
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(lines, vocabulary, show_progress=False)
    pieces = tokenizer.get_vocab()
    pieces = sorted(pieces, key=pieces.get)  # by id: the rarest are the last
    labels = {word for task in TASKS.values() for word in task.words.values()}
    least = len(labels) + 5  # with [PAD], [UNK], [CLS], [SEP] and [MASK], which come first
    if vocabulary < least:
        raise ValueError(f"--vocabulary: the label words of all tasks need {least} or more")
    others = [piece for piece in pieces if piece not in labels]
    pieces = others[: vocabulary - len(labels)] + sorted(labels)
    return BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})


def bert_settings(tokenizer, args):
    """The config.json of a new BERT."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "hidden_act": "gelu",
        "vocab_size": tokenizer.get_vocab_size(),
        "pad_token_id": tokenizer.token_to_id("[PAD]"),
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "intermediate_size": 4 * args.hidden,
        "max_position_embeddings": args.positions,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": args.dropout,
        "attention_probs_dropout_prob": args.dropout,
    }


def bert_model(stored):
    config = read_config(stored, model.Config, model.FAMILIES, model.ONLY)
    return model.Bert(config, words=[0], parts={"cls"})  # with the masked-LM head


# --- both -----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    tokenizer: Callable  # (lines, vocabulary) -> a trained tokenizer with as many entries, or fewer
    settings: Callable  # (tokenizer, args) -> config.json as a dict
    model: Callable  # (config.json as a dict) -> the model
    flags: str  # for train.py


KINDS = {
    "bert": Kind(bert_tokenizer, bert_settings, bert_model, "--task mlm --data-dir mine"),
    "gpt2": Kind(
        gpt2_tokenizer,
        gpt2_settings,
        gpt2_model,
        "--task wikitext2 --weight-lr 1e-3 --epochs 20 --warmup 0.05",
    ),
}


def make_tensors(stored, seed):
    """Draw the weights of a model with this config.json -> {published name: tensor}.

    As its authors do: normal with a standard deviation of 0.02, and in GPT-2 less where residuals
    add up. Raises ValueError for a model_type that is not in KINDS.
    """
    if stored.get("model_type") not in KINDS:
        raise ValueError(f"config.json: model_type must be one of {', '.join(KINDS)}")
    torch.manual_seed(seed)
    fresh = KINDS[stored["model_type"]].model(stored)
    for name, p in fresh.named_parameters():
        deviation = 0.02
        if "c_proj" in name:
            deviation /= math.sqrt(2 * fresh.config.n_layer)
        if p.ndim == 2:
            p.data.normal_(0, deviation)
        elif name.endswith(".bias"):
            p.data.zero_()
    return fresh.published(fresh.state_dict())


def make_folder(folder, args):
    """Fill a folder with a tokenizer, a configuration and weights."""
    kind = KINDS[args.kind]
    lines = (line + "\n" for line in read_lines(args.text))
    tokenizer = kind.tokenizer(lines, args.vocabulary)
    write_whole(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_whole(folder / "config.json", json_bytes(kind.settings(tokenizer, args)))
    write_weights(folder, args.seed)


def write_weights(folder, seed):
    tensors = make_tensors(read_json(folder / "config.json"), seed)
    write_whole(folder / WEIGHTS, pack_weights(tensors))


FLAGS = {  # for a new folder
    "text": (Path, "train the tokenizer on this text"),
    "kind": (KINDS, "the architecture"),
    "vocabulary": (cli.count, "most entries of the tokenizer"),
    "layers": (cli.up_to(1000), "how many"),
    "hidden": (cli.up_to(16384), "width"),
    "heads": (cli.up_to(16384), "attention heads per layer"),
    "positions": (cli.up_to(65536), "longest input in tokens"),
    "dropout": (cli.fraction_below_one, "the same everywhere"),
}
DEFAULTS = {
    "kind": "gpt2",
    "vocabulary": 8000,
    "layers": 6,
    "hidden": 384,
    "heads": 6,
    "positions": 512,
    "dropout": 0.1,
}


def parse_args(argv):
    parser = cli.Parser(
        prog="python -m tools.fresh", description="Make a GPT-2 or a BERT of random weights."
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="new, or a model's that lacks the weights")
    add("--seed", type=cli.seed, default=0, help="seed for the weights (0)")
    cli.add_flags(parser, "for a new folder", FLAGS, DEFAULTS)
    args = parser.parse_args(argv)

    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.text:
            parser.error(f"{cli.flag(name)} needs --text, which makes a new folder")
    if args.hidden % args.heads:
        parser.error("--hidden must be a multiple of --heads, which is 6 by default")
    return args


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if args.text:
        with partial_folder(args.folder) as part:
            make_folder(part, args)
    else:
        missing = describe_missing(args.folder)
        if not missing.startswith(f"has no {WEIGHTS}"):
            raise ValueError(f"{args.folder} {missing or 'has weights'}; --text makes a new folder")
        with prefix_errors(args.folder):
            write_weights(args.folder, args.seed)
    kind = KINDS[read_json(args.folder / "config.json")["model_type"]]
    print(
        f"{args.folder}: random weights; train them with\n"
        f"python train.py --model {args.folder} --method finetune {kind.flags}"
    )


if __name__ == "__main__":
    main()
