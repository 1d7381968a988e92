"""Model folders as other libraries write and read them: config, weights and tokenizer.

Only safetensors are read, because other formats could run code.

    stored, tensors = read_model(folder)  # for model.load_model
    tokenizer = open_tokenizer(folder)
"""

import math
import warnings
from dataclasses import MISSING, fields, replace
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.models import BPE

from plumbing.files import json_bytes, read_json, read_lines, require_regular_file
from plumbing.rows import Rows

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # lists the files when the weights are in several
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile put these before names
# Some checkpoints carry buffers that are not weights: position numbers, and GPT-2's causal mask.
BUFFERS = ("position_ids", "token_type_ids", ".attn.bias", ".attn.masked_bias")
PORTION = 256  # texts that are encoded at once
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# How the names of a family's tensors begin, if they have a prefix.
PREFIX = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta"}

# The special tokens of BERT, those of RoBERTa, and GPT-2's only one.
SPECIAL = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
    "eos_token": ("<|endoftext|>",),
}


def describe_missing(folder):
    """Say what is missing from a model folder, for example "has no config.json"; "" if nothing."""
    there = {path.name for path in folder.glob("*")}
    if "config.json" not in there:
        return "has no config.json"
    if not there & {"tokenizer.json", "vocab.txt"}:
        return "has no tokenizer.json"
    if there & {WEIGHTS, INDEX}:
        return ""
    if "pytorch_model.bin" in there:
        return (
            "has pytorch_model.bin, which is not read because it could run code; transformers' "
            f"model.save_pretrained(FOLDER, safe_serialization=True) writes it as {WEIGHTS}"
        )
    return f"has no {WEIGHTS} (python -m tools.fresh {folder} makes random ones for a GPT-2)"


def read_model(folder):
    """Read a model folder -> (config.json as a dict, {name: tensor in float32}).

    Raises ValueError that names what cannot be read.
    """
    stored = read_json(folder / "config.json")
    tensors = {}
    for path in weight_files(folder):
        tensors |= read_tensors(path)

    # The names of the tensors tell BERT from RoBERTa, whose positions begin elsewhere.
    for kind in {name.split(".")[0] for name in tensors} & set(PREFIX.values()):
        family = stored.setdefault("model_type", kind)
        if PREFIX.get(str(family), kind) != kind:
            raise ValueError(f"{folder}: model_type is {family!r}, but its tensors are {kind}.*")
    return stored, tensors


def weight_files(folder):
    """List the files that hold the weights: one, or those that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    try:
        names = read_json(folder / INDEX)["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (KeyError, TypeError, AttributeError):  # another shape of file
        raise ValueError(f"{folder / INDEX} has no weight_map") from None


def read_tensors(path):
    """Read the weights in a safetensors file -> {name: float32 tensor}.

    Raises ValueError if a weight is not a float of 16 bits or more, or not finite.
    """
    with open(require_regular_file(path), "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer, not the weights; run git lfs pull")
    try:
        stored = load_file(path)
    except (SafetensorError, KeyError) as error:  # KeyError: torch does not know the dtype
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None

    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(BUFFERS):
            continue
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise ValueError(
                f"{path}: weights must be finite floats of 16 bits or more, and {name} "
                f"({tensor.dtype}) is not"
            )
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        tensors[name] = tensor.float()
    return tensors


def pack_weights(tensors):
    """Pack weights {name: tensor} -> the bytes of a model.safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, {"format": "pt"})  # older versions of transformers insist on a format


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizer_bytes(folder):
    """Return the folder's tokenizer.json, or build one from its vocab.txt as BERT's authors did.

    Where there is a tokenizer.json, it alone counts: tokenizer_config.json may say something else
    about lower-casing, and is not read.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        return require_regular_file(path).read_bytes()
    path = folder / "vocab.txt"
    words = {word: i for i, word in enumerate(read_lines(path))}
    if not {"[CLS]", "[SEP]"} <= words.keys():
        raise ValueError(f"{path} has no [CLS] and [SEP]; give the folder a tokenizer.json")
    settings, added = vocabulary_settings(folder)
    tokenizer = BertWordPieceTokenizer(words, **settings)
    # Each of these is one token, whatever is in it. In the order of their ids.
    for token in sorted(added, key=added.get):
        tokenizer.add_special_tokens([token])
        if added[token] not in (math.inf, tokenizer.token_to_id(token)):
            raise ValueError(f"{path} leaves no id {added[token]} for the added token {token!r}")
    return tokenizer.to_str().encode()


def vocabulary_settings(folder):
    """What stands beside a vocab.txt -> (its tokenizer's settings, {added token: id, inf: any})."""
    settings, added = {}, {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json(folder / "tokenizer_config.json")
    if (folder / "added_tokens.json").exists():
        added = read_json(folder / "added_tokens.json")
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(number)
    for token in settings.get("additional_special_tokens", []):
        added.setdefault(token, math.inf)
    if settings.get("do_basic_tokenize", True) is not True or settings.get("never_split"):
        raise ValueError(
            f"{folder}: do_basic_tokenize and never_split are not supported with a vocab.txt; "
            "give the folder a tokenizer.json"
        )
    chosen = {
        "lowercase": settings.get("do_lower_case", True),
        "strip_accents": settings.get("strip_accents"),
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
    }
    return chosen, added


def open_tokenizer(folder):
    """Open the Tokenizer of a model folder. Raises ValueError that says why it cannot be read."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_bytes(folder).decode("utf-8-sig"))
        if isinstance(tokenizer.model, BPE):
            tokenizer.model.dropout = None  # it would read each text otherwise every time
        return tokenizer
    except Exception as error:  # the library raises bare Exceptions
        hint = ""
        if "variant" in str(error):
            hint = "; a newer version of tokenizers may have written it"
        raise ValueError(f"{folder}: its tokenizer is not valid: {error}{hint}") from None


def encode_texts(tokenizer, texts, **options):
    """Yield the encoding of each text, or pair. Raises ValueError for one that cannot be read.

    texts: any iterable. An encoding takes a hundred times as much memory as its text, so few are
    made at a time: let go of them.
    """
    texts = iter(texts)
    while portion := list(islice(texts, PORTION)):
        try:
            yield from tokenizer.encode_batch(portion, **options)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer.json cannot read a text: {error}") from None


def encode_rows(tokenizer, texts):
    """Texts, or pairs -> Rows of token ids, and Rows of segment ids."""
    ids, types = Rows(), Rows()
    for encoded in encode_texts(tokenizer, texts):
        ids.append(encoded.ids)
        types.append(encoded.type_ids)
    return ids, types


def tokenizer_config(folder, config):
    """Build tokenizer_config.json for a folder's tokenizer and a model with this config.

    PreTrainedTokenizerFast has transformers take tokenizer.json as it is. Any other class would
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
            values[field.name] = read_number(stored, field)
    whole = kind(**values)  # the model before it lost any heads or neurons
    heads, _ = whole.layers[0]
    if whole.hidden_size % heads:
        raise ValueError("its width is not divisible by its number of attention heads")

    counts = {}
    for name, most in zip(PER_LAYER, whole.layers[0], strict=True):
        counts[name] = read_counts(stored, name, len(whole.layers), most)
    return replace(whole, **counts)


def read_number(stored, field):
    """Read the number of a field. Raises ValueError if it is missing or out of range."""
    value = stored.get(field.name, field.default)
    lowest = 1 if field.default is MISSING else 0
    highest = 1000 if "layer" in field.name else 1 << 24
    if field.type is float:
        highest = 1
    return check_number(field.name, value, lowest, highest, field.type)


def read_counts(stored, name, layers, most):
    """Read heads_per_layer or neurons_per_layer: a number from 0 to `most` per layer, or none."""
    counts = stored.get(name, [])
    if not isinstance(counts, list) or len(counts) not in (0, layers):
        raise ValueError(f"{name} is {counts!r}, not a list of one number per layer")
    return tuple(check_number(name, count, 0, most) for count in counts)


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
    """Pack a model -> {name: bytes}, a folder like `folder`, but with these float32 tensors.

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
