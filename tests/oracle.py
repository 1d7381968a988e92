"""BERT out of torch's own encoder layer, to compare ours with, and RoBERTa's names."""

import torch
import torch.nn.functional as F
from torch import nn

IDS = torch.tensor([[2, 5, 9, 13, 3], [2, 7, 3, 0, 0]])
TYPES = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


def plain_bert(t, ids=IDS, types=TYPES, mask=MASK):
    """The same weights in nn.TransformerEncoderLayer -> last hidden states, masked-LM logits."""
    size = ids.shape[1]
    h = (
        t["bert.embeddings.word_embeddings.weight"][ids]
        + t["bert.embeddings.position_embeddings.weight"][:size]
    )
    h = h + t["bert.embeddings.token_type_embeddings.weight"][types]
    h = F.layer_norm(
        h, (16,), t["bert.embeddings.LayerNorm.weight"], t["bert.embeddings.LayerNorm.bias"], 1e-12
    )
    for n in range(2):
        at = f"bert.encoder.layer.{n}."
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.1, "gelu", 1e-12, batch_first=True).eval()
        qkv = [at + f"attention.self.{x}." for x in ("query", "key", "value")]
        state = {
            f"self_attn.in_proj_{x}": torch.cat([t[name + x] for name in qkv])
            for x in ("weight", "bias")
        }
        for ours, theirs in {
            "attention.output.dense": "self_attn.out_proj",
            "intermediate.dense": "linear1", "output.dense": "linear2",
            "attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2",
        }.items():  # fmt: skip
            state |= {f"{theirs}.{x}": t[f"{at}{ours}.{x}"] for x in ("weight", "bias")}
        layer.load_state_dict(state)
        h = layer(h, src_key_padding_mask=mask == 0)
    if "cls.predictions.bias" not in t:
        return h, None
    at = "cls.predictions.transform."
    head = F.gelu(F.linear(h, t[f"{at}dense.weight"], t[f"{at}dense.bias"]))
    head = F.layer_norm(head, (16,), t[f"{at}LayerNorm.weight"], t[f"{at}LayerNorm.bias"], 1e-12)
    return h, head @ t["bert.embeddings.word_embeddings.weight"].T + t["cls.predictions.bias"]


def roberta_name(name):
    """The name of a tensor in a checkpoint of BERT -> its name in one of RoBERTa."""
    name = name.replace("bert.", "roberta.", 1).replace("cls.predictions.transform.", "lm_head.")
    return name.replace("cls.predictions.", "lm_head.").replace(
        "lm_head.LayerNorm", "lm_head.layer_norm"
    )
