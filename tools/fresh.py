"""Make a GPT-2 with random weights, to train from scratch. A text gives it a tokenizer.

Without --text it makes only the weights, in a folder with a config.json and a tokenizer.json.

    python -m tools.fresh FOLDER --text wiki.train.tokens --vocabulary 8000 \\
        --layers 6 --hidden 384 --heads 6
    python train.py --task wikitext2 --model FOLDER --method finetune \\
        --weight-lr 1e-3 --epochs 20 --warmup 0.05
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from extras.gpt2 import GPT2, gpt2_config
from extras.lm import END
from plumbing import cli
from plumbing.checkpoints import WEIGHTS, open_tokenizer, pack_weights
from plumbing.files import (
    json_bytes,
    prefix_errors,
    read_json,
    read_lines,
    write_whole,
)
from tools.export import partial_folder


def make_tokenizer(path, vocabulary):
    """Train a byte-level BPE like GPT-2's on the lines of a text -> the bytes of tokenizer.json.

    vocabulary: how many entries it has at most; all bytes are among them, and the end of a text.
    """
    lines = [line + "\n" for line in read_lines(path)]  # as extras/lm.py reads them
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
    return tokenizer.to_str().encode()


def make_tensors(config, seed):
    """Draw random weights as GPT-2's authors do -> {published name: tensor}.

    They are normal with a standard deviation of 0.02, and less where residuals add up.
    """
    torch.manual_seed(seed)
    model = GPT2(config)
    for name, p in model.named_parameters():
        deviation = 0.02
        if "c_proj" in name:
            deviation /= math.sqrt(2 * config.n_layer)
        if p.ndim == 2:
            p.data.normal_(0, deviation)
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
    write_whole(folder / "config.json", json_bytes(config))
    write_weights(folder, args.seed)


def write_weights(folder, seed):
    config = gpt2_config(read_json(folder / "config.json"))
    write_whole(folder / WEIGHTS, pack_weights(make_tensors(config, seed)))


def parse_args(argv):
    parser = cli.Parser(prog="python -m tools.fresh", description="Make a GPT-2 of random weights.")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="new, or a model's that lacks the weights")
    add("--seed", type=cli.seed, default=0, help="seed for the weights (0)")
    add = parser.add_argument_group("for a new folder").add_argument
    add("--text", type=Path, metavar="FILE", help="train the tokenizer on this text")
    add("--vocabulary", type=cli.count, default=8000, help="most entries of the tokenizer (8000)")
    add("--layers", type=cli.up_to(1000), default=6, help="(6)")
    add("--hidden", type=cli.up_to(16384), default=384, help="width (384)")
    add("--heads", type=cli.up_to(16384), default=6, help="attention heads per layer (6)")
    add("--positions", type=cli.up_to(65536), default=512, help="longest input in tokens (512)")
    add("--dropout", type=cli.fraction_below_one, default=0.1, help="the same everywhere (0.1)")
    args = parser.parse_args(argv)

    if not args.text and not (args.folder / "config.json").exists():
        parser.error("--text: name a text to learn the tokenizer from")
    if args.hidden % args.heads:
        parser.error("--hidden must be a multiple of --heads")
    return args


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if (args.folder / WEIGHTS).exists() or (args.text and args.folder.exists()):
        raise ValueError(f"{args.folder} is there already; name a new folder")
    with prefix_errors(args.folder):
        if args.text:
            with partial_folder(args.folder.resolve()) as part:
                make_folder(part, args)
        else:
            write_weights(args.folder, args.seed)
    print(f"{args.folder}: random weights; train them with --model {args.folder} --method finetune")


if __name__ == "__main__":
    main()
