"""Model folders as other libraries write and read them: config.json, model.safetensors, tokenizer.json.

    contents = {"tokenizer.json": ..., "tokenizer_config.json": tokenizer_config(folder)}
"""

from safetensors.torch import save
from tokenizers import Tokenizer

from plumbing.files import json_bytes

# BERT's special tokens, and RoBERTa's.
SPECIAL = {
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def pack_weights(tensors):
    """{name: tensor} -> bytes of a model.safetensors; older versions of transformers refuse one without a format."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})


def tokenizer_config(folder, length):
    """-> bytes of a tokenizer_config.json for a folder's tokenizer.json, for inputs of at most `length` tokens.

    It has transformers take tokenizer.json as it is. Any other class would put its own settings over it, and the one
    for BERT lowers the case.
    """
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    for name, tokens in SPECIAL.items():
        for token in tokens:
            if token in vocabulary:
                config[name] = token
                break
    return json_bytes(config)
