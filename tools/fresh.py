"""Make a GPT-2 of random weights, to train it from scratch: with a tokenizer that is learnt from a text.

Or only the weights, in a folder that has a config.json and a tokenizer.json.

    python -m tools.fresh FOLDER --text wiki.train.tokens --vocabulary 8000 --layers 6 --hidden 384 --heads 6
    python train.py --task wikitext2 --model FOLDER --method finetune --weight-lr 1e-3 --epochs 20 --warmup 0.05
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from extras.gpt2 import GPT2, gpt2_config
from extras.lm import END
from plumbing import cli
from plumbing.checkpoints import WEIGHTS, open_tokenizer, pack_weights
from plumbing.files import json_bytes, partial_folder, prefix_errors, read_json, require_regular_file, write_whole


def make_tokenizer(path, vocabulary):
    """A byte-level BPE like GPT-2's, of at most so many entries, learnt from the lines of a text -> tokenizer.json."""
    with prefix_errors(path):
        lines = require_regular_file(path).read_bytes().decode("utf-8-sig").splitlines(keepends=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = (
        pre_tokenizers.ByteLevel.alphabet()
    )  # all bytes, so that no text has an unknown token
    settings = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, **settings)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str().encode()


def make_tensors(config, seed):
    """Random weights as GPT-2's authors start: normal, 0.02 wide, and less for what a residual adds up -> published."""
    torch.manual_seed(seed)
    model = GPT2(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.data.normal_(0, 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
        elif name.endswith(".bias"):
            p.data.zero_()
    return model.published(model.state_dict())


def make_folder(folder, args):
    """Fill a folder with a tokenizer, a configuration and weights."""
    write_whole(folder / "tokenizer.json", make_tokenizer(args.text, args.vocabulary))
    tokenizer = open_tokenizer(folder)
    end = tokenizer.token_to_id(END)
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
    }
    config |= {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": end, "eos_token_id": end}
    config |= {
        "n_layer": args.layers,
        "n_embd": args.hidden,
        "n_head": args.heads,
        "n_positions": args.positions,
    }
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), args.dropout)
    write_whole(folder / "config.json", json_bytes(config))
    write_weights(folder, args.seed)


def write_weights(folder, seed):
    with prefix_errors(folder / "config.json"):
        config = gpt2_config(read_json(folder / "config.json"))
    write_whole(folder / WEIGHTS, pack_weights(make_tensors(config, seed)))


SHAPE = {
    "vocabulary": 8000,
    "layers": 6,
    "hidden": 384,
    "heads": 6,
    "positions": 512,
    "dropout": 0.1,
}
BYTES = 257  # entries of the smallest tokenizer: all bytes, and the end of a text


@cli.one_line_errors()
def main(argv=None):
    parser = cli.Parser(prog="python -m tools.fresh", description="Make a GPT-2 of random weights.")
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a new one, or one that lacks weights alone"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="learn the tokenizer from this text"
    )
    entries = cli.number(int, f"a whole number, at least {BYTES}", lambda x: BYTES <= x < 1 << 24)
    parser.add_argument(
        "--vocabulary", type=entries, help="entries of the tokenizer, at most (8000)"
    )
    parser.add_argument("--layers", type=cli.up_to(1000), help="(6)")
    parser.add_argument("--hidden", type=cli.up_to(16384), help="width (384)")
    parser.add_argument("--heads", type=cli.up_to(16384), help="attention heads of a layer (6)")
    parser.add_argument("--positions", type=cli.up_to(65536), help="longest input in tokens (512)")
    parser.add_argument("--dropout", type=cli.share_below_one, help="everywhere (0.1)")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the weights (0)")
    args = parser.parse_args(argv)
    given = [name for name in ("text", *SHAPE) if getattr(args, name) is not None]
    cli.fill(args, SHAPE)
    found = {path.name for path in args.folder.iterdir()} if args.folder.is_dir() else set()
    if {"config.json", "tokenizer.json"} <= found and WEIGHTS not in found:
        if given:
            parser.error(
                f"{cli.flag(given[0])}: the files of {args.folder} decide that; name a new folder"
            )
        write_weights(args.folder, args.seed)
    elif found or args.folder.is_file():
        raise ValueError(
            f"{args.folder} is neither new nor a model's folder that lacks weights alone; name another"
        )
    elif args.text is None:
        parser.error("--text: name a text to learn the tokenizer from")
    elif args.hidden % args.heads:
        parser.error(f"--hidden must be a multiple of --heads; got {args.hidden} and {args.heads}")
    else:
        with partial_folder(args.folder.resolve()) as part:
            make_folder(part, args)
    print(f"{args.folder}: random weights; train them with --model {args.folder} --method finetune")


if __name__ == "__main__":
    main()
