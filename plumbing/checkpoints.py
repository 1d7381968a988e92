"""Model folders as other libraries write and read them: config.json, model.safetensors, tokenizer.json.

stored, tensors = read_model(folder)  # for model.load_model
tokenizer = open_tokenizer(folder)
"""

import string

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from plumbing.files import json_bytes, read_json, regular

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names
# What some checkpoints carry, and that are no weights: whole numbers, and GPT-2's causal mask.
NO_WEIGHTS = ("position_ids", "token_type_ids", ".attn.bias", ".attn.masked_bias")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# BERT's special tokens, RoBERTa's, and GPT-2's only one.
SPECIAL = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
    "eos_token": ("<|endoftext|>",),
}


def lacks(folder):
    """What a folder lacks to be a model's, as a sentence; "" if nothing."""
    if not (folder / "config.json").exists():
        return "has no config.json"
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.txt").exists():
        return "has no tokenizer.json"
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        return ""
    if (folder / "pytorch_model.bin").exists():
        how = "model.save_pretrained(FOLDER, safe_serialization=True) of transformers writes it"
        return f"has pytorch_model.bin, which is not read because it could run code; {how} as {WEIGHTS}"
    return f"has no {WEIGHTS} (python -m tools.fresh {folder} makes random ones for a GPT-2)"


def read_model(folder):
    """-> (config.json as a dict, {name: tensor in float32}). Raises ValueError that names what cannot be read."""
    stored = read_json(folder / "config.json")
    if not isinstance(stored, dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object")
    paths = [folder / WEIGHTS]
    if not paths[0].exists():
        index = read_json(folder / INDEX)
        try:
            paths = [folder / str(name) for name in sorted(set(index["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX} has no weight_map") from None
    tensors = {}
    for path in paths:
        for name, tensor in read_tensors(path):
            if name in tensors:
                raise ValueError(f"{path} holds {name} twice")
            tensors[name] = tensor
    return stored, tensors


def read_tensors(path):
    """(name, tensor in float32) of a safetensors file. Raises ValueError for one that has a tensor of another kind."""
    with open(regular(path), "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a pointer of git-lfs, not the weights: run git lfs pull in its repository"
            )
    try:
        stored = load_file(path)
    except (SafetensorError, KeyError) as error:  # the latter: of numbers torch does not know
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    for name, tensor in stored.items():
        if name.endswith(NO_WEIGHTS):
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {name} is of {tensor.dtype}; weights must be floats of 16 bits or more"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        yield name, tensor.float()


def pack_weights(tensors):
    """{name: tensor} -> bytes of a model.safetensors; older versions of transformers refuse one without a format."""
    return save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"format": "pt"},
    )


# --- tokenizers ----------------------------------------------------------------------------------------------


def tokenizer_bytes(folder):
    """tokenizer.json of a folder; where there is none, one that is made of its vocab.txt as BERT's authors did."""
    if (folder / "tokenizer.json").exists():
        return regular(folder / "tokenizer.json").read_bytes()
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    words = {
        word: i
        for i, word in enumerate(regular(folder / "vocab.txt").read_text("utf-8").splitlines())
    }
    special = [(token, words[token]) for token in ("[CLS]", "[SEP]") if token in words]
    if len(special) < 2:
        raise ValueError(
            f"{folder / 'vocab.txt'} has no [CLS] and [SEP]; give the folder a tokenizer.json"
        )
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True) is not False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    template = {
        "single": "[CLS] $A [SEP]",
        "pair": "[CLS] $A [SEP] $B:1 [SEP]:1",
        "special_tokens": special,
    }
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.add_special_tokens([token for token, *_ in SPECIAL.values() if token in words])
    return tokenizer.to_str().encode()


def open_tokenizer(folder):
    """The Tokenizer of a model folder. Raises ValueError that says why it cannot be read."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_bytes(folder).decode("utf-8-sig"))
        check_growth(tokenizer.normalizer)
        return tokenizer
    except ValueError as error:
        raise ValueError(f"{folder}: its tokenizer.json is not valid: {error}") from None
    except Exception as error:  # the library raises bare Exceptions
        newer = "; it may be of a newer version of tokenizers" if "variant" in str(error) else ""
        raise ValueError(
            f"{folder / 'tokenizer.json'} is not a valid tokenizer: {error}{newer}"
        ) from None


def encode_texts(tokenizer, texts, **options):
    """encode_batch. Raises ValueError when the tokenizer cannot read a text, or the text is not Unicode."""
    try:
        return tokenizer.encode_batch(texts, **options)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"tokenizer.json cannot read a text: {error}") from None


def check_growth(normalizer, text=string.printable):
    """-> a text after a normalizer, or as it is. Raises ValueError if it grows a hundredfold: memory has an end."""
    if isinstance(normalizer, normalizers.Sequence):
        for part in normalizer:  # one by one, as all at once would have filled it
            text = check_growth(part, text)
    elif normalizer is not None:
        text = normalizer.normalize_str(text)
    if len(text) > 100 * len(string.printable):
        raise ValueError("its normalizer makes texts a hundred times longer")
    return text


def tokenizer_config(folder, length):
    """-> bytes of a tokenizer_config.json for a folder's tokenizer, for inputs of at most `length` tokens.

    It has transformers take tokenizer.json as it is. Any other class would put its own settings over it, and the one
    for BERT lowers the case.
    """
    vocabulary = open_tokenizer(folder).get_vocab()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    for name, tokens in SPECIAL.items():
        known = [token for token in tokens if token in vocabulary]
        if known:
            config[name] = known[0]
    return json_bytes(config)
