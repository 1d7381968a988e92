"""Make what a GPT-2 folder lacks: a tokenizer from a text, a configuration, random weights; to train one from scratch.

What the folder has already stays, so one with config.json and tokenizer.json alone gets weights.

    python -m tools.fresh FOLDER --text wiki.train.tokens --vocabulary 8000 --layers 6 --hidden 384 --heads 6
    python train.py --task wikitext2 --model FOLDER --method finetune --weight-lr 1e-3 --epochs 30
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from extras.gpt2 import GPT2, gpt2_config
from extras.lm import END
from plumbing.checkpoints import WEIGHTS, open_tokenizer, pack_weights
from plumbing.cli import Parser, count, one_line_errors, seed, share_below_one, up_to
from plumbing.files import json_bytes, named, read_json, regular, write_whole


def make_tokenizer(path, vocabulary):
    """A byte-level BPE like GPT-2's, of at most so many entries, learnt from the lines of a text -> tokenizer.json."""
    with named(path):
        lines = regular(path).read_bytes().decode("utf-8").splitlines(keepends=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that no text has an unknown token
    settings = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, **settings)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str().encode()


def make_tensors(config, number):
    """Random weights as GPT-2's authors start: normal, 0.02 wide, and less for what a residual adds up -> published."""
    torch.manual_seed(number)
    model = GPT2(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
        elif name.endswith(".bias"):
            p.data.zero_()
    return model.published(model.state_dict())


@one_line_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.fresh", description="Make what a GPT-2 folder lacks, with random weights.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one, or one that lacks files")
    parser.add_argument("--text", type=Path, metavar="FILE", help="learn tokenizer.json from this text")
    parser.add_argument("--vocabulary", type=count, default=8000, help="entries of the tokenizer, at most (8000)")
    parser.add_argument("--layers", type=up_to(1000), default=6, help="(6)")
    parser.add_argument("--hidden", type=up_to(16384), default=384, help="width (384)")
    parser.add_argument("--heads", type=up_to(16384), default=6, help="attention heads of a layer (6)")
    parser.add_argument("--positions", type=up_to(65536), default=512, help="longest input in tokens (512)")
    parser.add_argument("--dropout", type=share_below_one, default=0.1, help="everywhere (0.1)")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights (0)")
    args = parser.parse_args(argv)
    if (args.folder / WEIGHTS).exists():
        raise ValueError(f"{args.folder / WEIGHTS} is there already; delete it, or name another folder")
    tokenizer, config = args.folder / "tokenizer.json", args.folder / "config.json"
    if not tokenizer.exists():
        if args.text is None:
            raise ValueError(f"there is no {tokenizer}; name a text to learn one from with --text")
        write_whole(tokenizer, make_tokenizer(args.text, args.vocabulary))
    if not config.exists():
        shape = {"n_layer": args.layers, "n_embd": args.hidden, "n_head": args.heads, "n_positions": args.positions}
        known = open_tokenizer(args.folder)
        end = known.token_to_id(END)
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
        what = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
        what |= {"vocab_size": known.get_vocab_size(), "bos_token_id": end, "eos_token_id": end}
        write_whole(config, json_bytes(what | shape | dropout))
    with named(config):
        model_config = gpt2_config(read_json(config))
    write_whole(args.folder / WEIGHTS, pack_weights(make_tensors(model_config, args.seed)))
    print(f"{args.folder}: {model_config.n_layer} layers, {model_config.n_embd} wide, {model_config.vocab_size} tokens")


if __name__ == "__main__":
    main()
