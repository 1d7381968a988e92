"""tools.fresh with a BERT: its vocabulary, its weights, and what reads it."""

import math

import numpy as np
import pytest
import torch

from data import TASKS
from extras import mlm
from model import label_word_ids, load_backbone
from plumbing.files import read_json
from tools import fresh


@pytest.fixture
def make_bert(tmp_path):
    """Make a folder from a text in which no label word occurs often enough to become a token."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdefg"], 5)) for _ in range(40)]
    lines = [" ".join(rng.choice(words, 9)) for _ in range(50)]
    (tmp_path / "text").write_text("A great FILM\n" + "\n".join(lines))

    def make(name, *flags):
        given = [tmp_path / name, "--kind", "bert", "--text", tmp_path / "text"]
        given += ["--vocabulary", 64, "--layers", 2, "--hidden", 16, "--heads", 2]
        fresh.main([str(word) for word in [*given, "--positions", 32, "--dropout", 0, *flags]])
        return tmp_path / name

    return make


def test_a_bert_has_every_label_word(make_bert):
    folder = make_bert("m")
    model, tokenizer = load_backbone(folder, TASKS["rte"], 16)
    assert tokenizer.get_vocab_size() == 64 == model.config.vocab_size
    for task in TASKS.values():
        assert len(label_word_ids(task.words.values(), tokenizer)) == len(task.words)
    assert tokenizer.encode("GREAT").tokens == ["[CLS]", "great", "[SEP]"]


def test_a_vocabulary_has_room_for_the_label_words(make_bert, tmp_path, fails):
    labels = {word for task in TASKS.values() for word in task.words.values()}
    flags = ["--kind", "bert", "--text", tmp_path / "text", "--vocabulary"]
    said = fails(fresh.main, [tmp_path / "few", *flags, len(labels) + 4])
    assert f"--vocabulary: the label words of all tasks need {len(labels) + 5} or more" in said
    assert not (tmp_path / "few").exists()
    folder = make_bert("m", "--vocabulary", len(labels) + 5)
    _, tokenizer = load_backbone(folder, TASKS["rte"], 16)
    assert tokenizer.get_vocab().keys() == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} | labels


def test_it_says_how_to_train_each_kind(make_bert, tmp_path, capsys):
    bert = make_bert("m")
    gpt2 = make_bert("n", "--kind", "gpt2", "--vocabulary", 257)
    (bert / "model.safetensors").unlink()
    fresh.main([str(bert)])  # the weights alone: config.json says what it is
    said = capsys.readouterr().out
    text = " ".join(fresh.__doc__.replace("\\", "").split())
    for folder, task, times in ((bert, "mlm", 2), (gpt2, "wikitext2", 1)):
        words = f"python train.py --model {folder} --method finetune --task {task} "
        assert said.count(words) == times
        (line,) = {line for line in said.splitlines() if words in line}
        assert line.replace(str(folder), "FOLDER") in text  # as the docstring has it


def test_its_weights_are_those_of_its_seed(make_bert, tmp_path):
    """Normal with a deviation of 0.02, zero biases, LayerNorms of one."""
    folders = make_bert("a"), make_bert("b"), make_bert("c", "--seed", 1)
    first, second, other = (mlm.load(folder, 16, "words")[0].state_dict() for folder in folders)
    assert all(first[name].equal(second[name]) for name in first)
    name = "bert.embeddings.word_embeddings.weight"
    assert not first[name].equal(other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * 64 * 16))
    norms = [tensor for name, tensor in first.items() if name.endswith("LayerNorm.weight")]
    assert len(norms) == 6 and all((tensor == 1).all() for tensor in norms)
    assert first["cls.predictions.bias"].abs().sum() == 0
    assert "cls.predictions.transform.dense.weight" in first


def test_what_it_cannot_make(make_bert, tmp_path, fails):
    folder = make_bert("m")
    assert "m holds files already" in fails(fresh.main, [folder, "--kind", "bert", "--text", "x"])
    assert "--hidden must be a multiple of --heads" in fails(
        fresh.main, [tmp_path / "n", "--text", tmp_path / "text", "--heads", "5"]
    )
    (folder / "model.safetensors").unlink()
    for given in (["--layers", 6], ["--kind", "gpt2"], ["--dropout", 0.1]):
        assert f"{given[0]} needs --text" in fails(fresh.main, [folder, *given])
    fresh.main([str(folder)])  # the weights alone
    config = read_json(folder / "config.json")
    assert (folder / "model.safetensors").exists() and config["model_type"] == "bert"
    with pytest.raises(ValueError, match="model_type must be one of bert, gpt2"):
        fresh.make_tensors(config | {"model_type": "t5"}, 0)
    assert torch.isfinite(fresh.make_tensors(config, 0)["bert.embeddings.LayerNorm.bias"]).all()
