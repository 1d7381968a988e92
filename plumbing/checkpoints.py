"""Model folders as other libraries write and read them: config, weights and tokenizer.

Only safetensors are read, because other formats could run code.

    stored, tensors = read_model(folder)  # for model.load_model
    tokenizer = open_tokenizer(folder)
"""

import warnings
from dataclasses import MISSING, fields
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from plumbing.files import json_bytes, read_json, read_lines
from plumbing.rows import Rows

WEIGHTS = "model.safetensors"
# Some checkpoints carry buffers that are not weights: position numbers, and GPT-2's causal mask.
BUFFERS = ("position_ids", "token_type_ids", ".attn.bias", ".attn.masked_bias")
PORTION = 64  # texts that are encoded at once

# {model_type: padding id, unless config.json has one}. All but BERT are RoBERTa.
FAMILIES = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1}

# The special tokens of BERT, those of RoBERTa, and GPT-2's only one.
SPECIAL = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
    "eos_token": ("<|endoftext|>",),
}
BERT = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")


def describe_missing(folder):
    """Say what is missing from a model folder, for example "has no config.json"; "" if nothing."""
    there = {path.name for path in folder.glob("*")}
    if "config.json" not in there:
        return "has no config.json"
    if not there & {"tokenizer.json", "vocab.txt"}:
        return "has no tokenizer.json"
    if weight_files(folder):
        return ""
    if "pytorch_model.bin" in there:
        return (
            "has pytorch_model.bin, which is not read because it could run code; transformers' "
            f"model.save_pretrained(FOLDER, safe_serialization=True) writes it as {WEIGHTS}"
        )
    return f"has no {WEIGHTS}; python -m tools.fresh makes a folder with random weights"


def read_model(folder):
    """Read a model folder -> (config.json as a dict, {name: tensor in float32}).

    Raises ValueError that names what cannot be read.
    """
    stored = read_json(folder / "config.json")
    tensors = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)

    # The names of the tensors tell BERT from RoBERTa, whose positions begin elsewhere.
    for kind in ("bert", "roberta"):
        if any(name.startswith(f"{kind}.") for name in tensors):
            family = stored.setdefault("model_type", kind)  # or a relative, such as camembert
            # A list, because the file may hold an unhashable value.
            if family in list(FAMILIES) and (family == "bert") != (kind == "bert"):
                raise ValueError(
                    f"{folder}: model_type is {family!r}, but its tensors are {kind}.*"
                )
    return stored, tensors


def weight_files(folder):
    """List the files that hold the weights: one, or the parts of a large model."""
    whole = folder / WEIGHTS
    return [whole] if whole.exists() else sorted(folder.glob("model-*.safetensors"))


def read_tensors(path):
    """Read the weights in a safetensors file -> {name: float32 tensor}.

    Raises ValueError if a weight is not a float of 16 bits or more, or not finite.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, KeyError) as error:  # KeyError: torch does not know the dtype
        raise ValueError(
            f"{path} is not a whole safetensors file: {error}; "
            "if it is a git-lfs pointer, run git lfs pull"
        ) from None

    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(BUFFERS):
            continue
        if tensor.itemsize == 1 or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{path}: weights must be finite floats of 16 bits or more, and {name} "
                f"({tensor.dtype}) is not"
            )
        # DataParallel and torch.compile put these before names.
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        tensors[name] = tensor.float()
    return tensors


def pack_weights(tensors):
    """Pack weights {name: tensor} -> the bytes of a model.safetensors file, in float32."""
    tensors = {name: t.detach().cpu().float().contiguous() for name, t in tensors.items()}
    return save(tensors, {"format": "pt"})  # older versions of transformers insist on a format


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizer_bytes(folder):
    """Return the folder's tokenizer.json, or build one from its vocab.txt as BERT's authors did.

    Where there is a tokenizer.json, it alone counts: tokenizer_config.json may say something else
    about lower-casing, and is not read. BPE dropout is switched off: with it, the same text is
    split differently each time.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        stored = read_json(path)
        if not stored["model"].get("dropout"):
            return path.read_bytes()
        stored["model"]["dropout"] = None
        return json_bytes(stored)

    path = folder / "vocab.txt"
    words = {word: i for i, word in enumerate(read_lines(path))}
    settings = optional_json(folder / "tokenizer_config.json")
    settings |= optional_json(folder / "special_tokens_map.json")
    added = optional_json(folder / "added_tokens.json")  # {token: its id}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[content_of(token)] = int(number)
    refuse_unsupported(settings)
    tokenizer = BertWordPieceTokenizer(  # which insists on [CLS] and [SEP] among the words
        words | added,
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    # Each of these is one token, whatever is in it.
    more = settings.get("additional_special_tokens") or []
    tokenizer.add_special_tokens([*added, *map(content_of, more)])
    return tokenizer.to_str().encode()


def refuse_unsupported(settings):
    """Raise ValueError that names a setting beside a vocab.txt which would be ignored."""
    allowed = {"do_basic_tokenize": (None, True)}
    allowed |= dict.fromkeys(("never_split", "extra_special_tokens"), (None, [], {}))
    allowed |= dict.fromkeys((*SPECIAL, "bos_token"), (None, *BERT))
    for key, values in allowed.items():
        if content_of(settings.get(key)) not in values:
            raise ValueError(
                f"{key} is {settings[key]!r}, which is not supported with a vocab.txt; "
                "give the folder a tokenizer.json"
            )


def content_of(token):
    """A token as settings have it, as a text or as a dict -> its text."""
    return token["content"] if isinstance(token, dict) else token


def optional_json(path):
    return read_json(path) if path.exists() else {}


def open_tokenizer(folder):
    """Open the Tokenizer of a model folder. Raises ValueError that says why it cannot be read."""
    try:
        return Tokenizer.from_str(tokenizer_bytes(folder).decode("utf-8-sig"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"{folder}: cannot read its tokenizer (or it is of a newer version): {error}"
        ) from None


def encode_texts(tokenizer, texts, **options):
    """Yield the encoding of each text, or pair. Raises ValueError for one that cannot be read.

    texts: any iterable. What truncation cuts off stays in memory as long as an encoding does: 20 MB
    for two texts of 600 words each and a length of 64. So few texts are encoded at a time; let go
    of their encodings.
    """
    texts = iter(texts)
    while portion := list(islice(texts, PORTION)):
        try:
            yield from tokenizer.encode_batch(portion, **options)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer.json cannot read a text: {error}") from None


def encode_rows(tokenizer, texts):
    """Texts, or pairs -> Rows of token ids, Rows of segment ids, and how many texts were cut."""
    ids, types, cut = Rows(), Rows(), 0
    for encoded in encode_texts(tokenizer, texts):
        ids.append(encoded.ids)
        types.append(encoded.type_ids)
        cut += bool(encoded.overflowing)  # holds what was cut off
    return ids, types, cut


def tokenizer_config(folder, config):
    """Build tokenizer_config.json for a folder's tokenizer and a model with this config.

    PreTrainedTokenizerFast makes transformers use tokenizer.json as it is. Any other class would
    override some of its settings, and the one for BERT lowercases the text.
    """
    vocabulary = open_tokenizer(folder).get_vocab()
    inputs = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 1) > 1:  # BERT tells the texts of a pair apart
        inputs.insert(1, "token_type_ids")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.longest_input,
        "model_input_names": inputs,  # versions of transformers differ in what they assume
    }
    for name, tokens in SPECIAL.items():
        for token in tokens:
            if token in vocabulary:
                config.setdefault(name, token)
    return json_bytes(config)


def cutting_tokenizer(folder, length):
    """Open a model folder's tokenizer, and set it to cut at `length` tokens and not to pad.

    It cuts the longer text of a pair first. Raises ValueError if it cannot read every text.
    """
    tokenizer = open_tokenizer(folder)
    tokenizer.enable_truncation(length, strategy="longest_first")
    tokenizer.no_padding()  # published files carry settings of their own
    list(encode_texts(tokenizer, [("a \u2603", "b")]))  # does a token stand for unknown characters?
    return tokenizer


# --- configurations -------------------------------------------------------------------------------

PER_LAYER = ("heads_per_layer", "neurons_per_layer")
LARGEST = 1 << 24  # no number of a model is larger, and torch can multiply any two of these


def read_config(stored, kind, families, only):
    """Make a config, a dataclass of type `kind`, from config.json as a dict.

    The fields have the names of the file. families: {model_type: padding id}. only: {key: the one
    value that is supported}. Raises ValueError that names the key of an unsupported value.
    """
    family = stored.get("model_type", "bert")
    if family not in list(families):  # a list, because the file may hold an unhashable value
        known = ", ".join(families)
        raise ValueError(f"model_type is {family!r}; the models for this task are {known}")
    for name, value in only.items():
        if stored.get(name, value) != value:
            raise ValueError(f"{name} is {stored[name]!r}, and only {value!r} can be computed here")

    stored = {"pad_token_id": families[family]} | stored
    values = {"model_type": family}
    for field in fields(kind):
        if field.type in (int, float):
            lowest = 1 if field.default is MISSING else 0
            highest = 1000 if "layer" in field.name else LARGEST
            value = stored.get(field.name, field.default)
            values[field.name] = check_number(field.name, value, lowest, highest, field.type)

    layers = values.get("num_hidden_layers") or values["n_layer"]  # BERT's name, and GPT-2's
    for name in PER_LAYER:
        counts = stored.get(name, [])
        if not isinstance(counts, list) or len(counts) not in (0, layers):
            raise ValueError(f"{name} is {counts!r}, not a list of one number per layer")
        values[name] = tuple(check_number(name, count, 0, LARGEST) for count in counts)
    return kind(**values)


def check_number(name, value, lowest, highest, kind=int):
    if type(value) not in (int, kind) or not lowest <= value <= highest:
        found = "missing" if value is MISSING else repr(value)
        raise ValueError(f"{name} is {found}, not a number from {lowest} to {highest}")
    return value


# --- models ---------------------------------------------------------------------------------------


def build_from(make, tensors):
    """Build the model that make() returns from tensors {name: tensor}, without copying them.

    Raises ValueError that names a missing, unknown or misshapen tensor.
    """
    # On the meta device, make() takes no memory and draws no random numbers.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer without heads: nothing to initialise
        model = make()
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its second line names the first such tensor
        reason = str(error).splitlines()[1].strip()[:200]
        raise ValueError(f"the weights do not fit config.json: {reason}") from None
    return model


def model_files(folder, tensors, config):
    """Pack a model -> {name: bytes}, a folder like `folder`, but with these tensors.

    The layer sizes are those of config.
    """
    stored = read_json(folder / "config.json")
    stored |= {"dtype": "float32", "torch_dtype": "float32"}  # for transformers 5, and for 4
    for name in PER_LAYER:
        if getattr(config, name):
            stored[name] = getattr(config, name)
    return {
        WEIGHTS: pack_weights(tensors),
        "config.json": json_bytes(stored),
        "tokenizer.json": tokenizer_bytes(folder),
        "tokenizer_config.json": tokenizer_config(folder, config),
    }
