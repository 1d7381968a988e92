"""Language modelling: perplexities by hand, runs with GPT-2, texts that go on, faults."""

import argparse
import io
import json
import math
import re
import zipfile

import pytest
import torch
from acts import interrupt
from conftest import GPT2_CONFIG, gpt2_tensors
from safetensors.torch import load_file

import data
import eval as eval_
import train
from data import TASKS
from extras import lm
from mask import Method
from plumbing.checkpoints import PORTION
from plumbing.cli import show
from plumbing.files import load_masks


def load(make_gpt2, length=8):
    return lm.load(make_gpt2(), length, "words")


def flags_of(make_gpt2, texts, tmp_path, *flags, name="run", model=None):
    given = ["--task", "ptb", "--model", model or make_gpt2(f"{name}-model"), "--data-dir", texts]
    given += ["--out", tmp_path / name, "--steps", 12, "--evals", 2, "--batch", 8, "--length", 16]
    return [str(flag) for flag in [*given, "--device", "cpu", *flags]]


def run(make_gpt2, texts, tmp_path, *flags, name="run", model=None):
    train.main(flags_of(make_gpt2, texts, tmp_path, *flags, name=name, model=model))
    return json.loads((tmp_path / name / "result.json").read_text())


# --- texts ----------------------------------------------------------------------------------------


def test_blocks_by_hand(make_gpt2, tmp_path, capsys):
    """Lines keep their ends, nothing is added, the remainder goes; labels are the tokens behind."""
    _, tokenizer = load(make_gpt2)
    path = tmp_path / "t.txt"
    # A byte-order mark and Windows' line ends do not count. The separator ends no line. The last
    # line has no end.
    path.write_bytes("\ufeff the film\r\n\nzx\u2028y it's 7".encode())
    blocks = lm.read_blocks(TASKS["ptb"], "train", path, tokenizer)
    tokenizer.no_truncation()
    lines = [" the film\n", "\n", "zx\u2028y it's 7\n"]
    ids = [i for line in lines for i in tokenizer.encode(line).ids]
    assert tokenizer.decode(ids) == "".join(lines) and len(ids) % 8
    count = len(ids) // 8
    assert (
        blocks.ids.tolist() == [ids[8 * n : 8 * n + 8] for n in range(count)]
        and len(blocks) == count
    )
    assert blocks.labels.tolist() == [row[1:] + [-100] for row in blocks.ids.tolist()]
    assert blocks.tokens_per_word == len(ids) / (
        2 + 0 + 3 + 1 + 3
    )  # words of the lines (\u2028 parts two), line ends
    said = capsys.readouterr().out
    assert f"9 words and line ends, {len(ids)} tokens; {count} blocks of 8" in said
    assert f"the last {len(ids) % 8} tokens are left out" in said
    inputs, labels = data.collate(blocks, [1, 0])
    assert (
        inputs[0].tolist() == blocks.ids[[1, 0]].tolist()
        and inputs[2].all()
        and not inputs[1].any()
    )
    assert labels.dtype == torch.int64 and labels.tolist() == blocks.labels[[1, 0]].tolist()


def test_many_lines_are_tokenised_one_by_one(make_gpt2, tmp_path):
    """More than are handed to the tokenizer at once, and one that is longer than a block."""
    _, tokenizer = load(make_gpt2)
    path = tmp_path / "t.txt"
    lines = ["the film is good " * 30 + "\n"] + ["a\n"] * (2 * PORTION + 99)
    path.write_text("".join(lines))
    blocks = lm.read_blocks(TASKS["ptb"], "train", path, tokenizer)
    assert tokenizer.truncation["max_length"] == 8
    tokenizer.no_truncation()
    ids = [i for line in lines for i in tokenizer.encode(line).ids]
    assert blocks.ids.flatten().tolist() == ids[: len(ids) // 8 * 8]
    tokenizer.enable_truncation(8)
    path.write_text("".join([lines[0].replace("good", "dull"), *lines[1:]]))
    assert lm.read_blocks(TASKS["ptb"], "train", path, tokenizer).digest() != blocks.digest()


def test_perplexity_by_hand(make_gpt2):
    """511 predictions of a block of 512, as it were: the last token of a block predicts nothing."""
    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 4] = 9.0  # a hit
    blocks = lm.Blocks.of(ids.numpy(), tokens_per_word=1.5)
    found = blocks.score(blocks.reduce_logits(logits, torch.from_numpy(blocks.labels)), ())
    losses = [
        -logits[n, s].log_softmax(0)[ids[n, s + 1]].item() for n in range(2) for s in range(3)
    ]
    hits = [logits[n, s].argmax() == ids[n, s + 1] for n in range(2) for s in range(3)]
    mean = sum(losses) / 6
    assert found["perplexity"] == pytest.approx(math.exp(mean)) and sum(hits) > 0
    assert found["word_perplexity"] == pytest.approx(math.exp(1.5 * mean))
    assert found["accuracy"] == pytest.approx(sum(hits).item() / 6)
    assert train.task_loss(logits, torch.from_numpy(blocks.labels)).item() == pytest.approx(
        mean, rel=1e-5
    )
    far = blocks.score(torch.full((2, 4, 2), 1e4), ())
    assert far["perplexity"] == math.exp(700)  # finite: JSON has no infinity


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["smp-s", pytest.param("smp-l", marks=pytest.mark.slow)])
def test_a_mask_learns_and_the_rest_stays(make_gpt2, texts, tmp_path, capsys, method):
    """Each mask keeps k, and the mask alone evaluates to the same. The run checks frozen weights.

    Of the first perplexity, seeds 0 to 9 leave 0.117 to 0.162; without learning it stays near 1.
    """
    flags = ["--method", method, "--steps", 80, "--lr", 0.1, "--penalty", 0, "--ramp", 0.5]
    result = run(make_gpt2, texts, tmp_path, *flags)
    log = read_log(tmp_path / "run")
    assert result["kept"] == 2 * (4 * 16 * 16 + 2 * 16 * 24) // 2 and result["stored_numbers"] == 0
    assert "no frozen weight has moved" in capsys.readouterr().out
    assert result["final"]["perplexity"] < 0.3 * math.exp(log[0]["loss"])
    assert result["final"].keys() == {
        f"{m}{s}" for m in TASKS["ptb"].metrics for s in ("", " test")
    }
    square = dict.fromkeys(("attn.query", "attn.key", "attn.value", "attn.c_proj"), [16, 16])
    shapes = square | {"mlp.c_fc": [24, 16], "mlp.c_proj": [16, 24]}
    shapes = {f"h.{i}.{path}.weight": shape for path, shape in shapes.items() for i in range(2)}
    masks, head = load_masks(tmp_path / "run" / "mask.safetensors", shapes)
    assert not head and sum(mask.sum().item() for mask in masks.values()) == result["kept"]
    if method == "smp-l":
        assert all(2 * mask.sum() == mask.numel() for mask in masks.values())
    eval_.main([str(tmp_path / "run" / "mask.safetensors")])
    final = show(result["final"])
    assert f": {final}\ntraining reported {final}" in capsys.readouterr().out
    assert re.match(r"perplexity [\d.]+, word_perplexity [\d.]+, .*perplexity test [\d.]+,", final)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_fine_tuning_is_without_decay_and_the_best_is_the_lowest(make_gpt2, texts, tmp_path):
    model = make_gpt2("model")
    flags = ["--method", "finetune", "--evals", 4, "--weight-lr", 1]
    result = run(make_gpt2, texts, tmp_path, *flags, model=model)
    folders = (model, tmp_path / "run")
    before, after = (load_file(at / "model.safetensors")["wpe.weight"] for at in folders)
    # No text reaches the positions from 16 on. Only decay would move them.
    assert before[16:].equal(after[16:]) and not before[:16].equal(after[:16])
    values = [line["dev"]["perplexity"] for line in read_log(tmp_path / "run") if "dev" in line]
    assert len(values) == 4 and result["best"]["dev"]["perplexity"] == min(values) < max(values)


def test_recipes_are_those_that_were_published():
    """Wang et al., LREC-COLING 2024: blocks of 512, plain Adam, an evaluation after each epoch."""
    lm_ = data.RECIPE | {"length": 512, "decay": 0.0, "model": "gpt2"}
    ten = lm_ | {"epochs": 10, "evals": 10, "weight_lr": 1e-4}
    expected = dict.fromkeys(("ptb", "wikitext103"), ten)
    expected["wikitext2"] = lm_ | {"epochs": 8, "evals": 8, "weight_lr": 5e-4}
    assert {name: data.RECIPE | TASKS[name].recipe for name in expected} == expected


def test_defaults_are_the_papers():
    for task, rate, epochs in (
        ("ptb", 1e-4, 10),
        ("wikitext2", 5e-4, 8),
        ("wikitext103", 1e-4, 10),
    ):
        args = train.parse_args(["--task", task, "--method", "finetune"])
        assert (args.weight_lr, args.epochs, args.batch, args.length) == (rate, epochs, 32, 512)
        assert args.model == "gpt2"
    assert train.parse_args(["--method", "finetune"]).weight_lr == 1e-4
    assert train.parse_args(["--task", "rte", "--method", "finetune"]).weight_lr == 3e-5
    assert (
        train.parse_args(["--task", "ptb", "--method", "p-pruning", "--weight-lr", "1"]).weight_lr
        == 1
    )
    assert train.parse_args(["--task", "ptb"]).weight_lr is None


def test_a_rows_own_default_comes_before_the_tasks(tables):
    methods, _ = tables
    methods["mine"] = Method(None, recipe={"weight_lr": 7e-4})
    assert train.parse_args(["--method", "mine"]).weight_lr == 7e-4
    assert train.parse_args(["--method", "mine", "--task", "ptb"]).weight_lr == 7e-4


def test_p_pruning_takes_units_and_its_folder_is_a_model(make_gpt2, texts, tmp_path, capsys):
    result = run(
        make_gpt2, texts, tmp_path, "--method", "p-pruning", "--sparsity", 0.4, "--ffn-share", 2
    )
    heads, neurons = (sum(kind) for kind in zip(*result["layers"], strict=True))
    assert (heads, neurons) != (8, 48) and result["tokens"] == 16
    # At length 16 a head costs 4 * 16 * 16 * 4 + 2 * 16^2 * 4, a neuron 2 * 16 * 16.
    costs = 6144, 512
    share = (heads * costs[0] + neurons * costs[1]) / (8 * costs[0] + 48 * costs[1])
    assert result["multiply_accumulates"] == pytest.approx(share) and 0.5 < share <= 0.6
    capsys.readouterr()
    eval_.main([str(tmp_path / "run")])
    said = capsys.readouterr().out
    left = [tuple(layer) for layer in result["layers"]]
    assert f"heads and neurons left in each layer: {left}\n" in said
    again = run(
        make_gpt2, texts, tmp_path, "--method", "finetune", name="again", model=tmp_path / "run"
    )
    assert again["config"] == result["config"]


def test_an_interrupted_run_ends_the_same(make_gpt2, texts, tmp_path):
    flags = ["--method", "smp-l", "--lr", 0.1]
    whole = run(make_gpt2, texts, tmp_path, *flags)
    interrupt(flags_of(make_gpt2, texts, tmp_path, *flags, name="cut"), step=9)
    assert not (tmp_path / "cut" / "result.json").exists()
    train.main(["--resume", str(tmp_path / "cut")])
    resumed = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert resumed["final"] == whole["final"]


def test_a_batch_in_parts_teaches_the_same(make_gpt2, texts, tmp_path):
    """Dense: rounding decides between scores that are almost equal. Ten seeds agree to 1e-7."""
    flags = ["--method", "finetune", "--weight-lr", 0.01]
    whole, parts = (
        run(make_gpt2, texts, tmp_path, *flags, "--accumulate", n, name=f"parts{n}") for n in (1, 2)
    )
    assert parts["final"]["perplexity"] == pytest.approx(whole["final"]["perplexity"], rel=1e-3)


def test_a_teacher_teaches_tokens(make_gpt2, texts, tmp_path):
    run(make_gpt2, texts, tmp_path, "--method", "finetune", name="taught-by")
    alone = run(make_gpt2, texts, tmp_path, "--lr", 0.1, name="alone")
    result = run(make_gpt2, texts, tmp_path, "--lr", 0.1, "--teacher", tmp_path / "taught-by")
    assert result["final"]["perplexity"] != alone["final"]["perplexity"]


# --- texts that go on -----------------------------------------------------------------------------


def test_a_text_goes_on(make_gpt2, texts, tmp_path, capsys, fails):
    """Greedy by hand; drawn, the same seed says the same.

    Of ten seeds, all say "good" at 0.776 to 0.905 after 60 steps, and draw three different texts.
    """
    run(make_gpt2, texts, tmp_path, "--method", "finetune", "--steps", 60, "--weight-lr", 0.02)
    capsys.readouterr()

    def said(*flags):
        eval_.main([str(a) for a in (tmp_path / "run", "--text", " the film is", *flags)])
        return capsys.readouterr().out

    loaded = eval_.load_run(tmp_path / "run")
    ids = loaded.tokenizer.encode(" the film is").ids
    loaded.model.eval()
    with torch.inference_mode():
        for _ in range(lm.CONTINUED):
            ids.append(int(loaded.model(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    lines = [" ".join(line.split()) for line in loaded.tokenizer.decode(ids).split("\n")]
    assert said() == "\n".join(lines) + "\n"
    assert said().startswith("the film is good")
    drawn = {seed: said("--temperature", 3, "--seed", seed) for seed in range(3)}
    assert len(set(drawn.values())) == 3 and drawn[1] == said("--temperature", 3, "--seed", 1)
    (tmp_path / "two.txt").write_text(" the film\n the show\n")
    eval_.main([str(tmp_path / "run"), "--text-file", str(tmp_path / "two.txt")])
    assert [line[:8] for line in capsys.readouterr().out.splitlines()] == ["the film", "the show"]
    assert "--pair and --temperature need --text" in fails(
        eval_.main, [tmp_path / "run", "--temperature", 1]
    )
    assert "--temperature: must be a number from 0.01" in fails(
        eval_.main, [tmp_path / "run", "--temperature", 0]
    )


def test_the_end_token_ends_a_text(make_gpt2):
    """The likeliest token is "b" twice, and then the end token."""
    _, tokenizer = load(make_gpt2)
    a, b, end = (tokenizer.token_to_id(token) for token in ("a", "b", lm.END))
    asked = []

    def logits_of(prompt):
        asked.append(prompt.ids[0])
        return torch.eye(300)[[b if len(asked) < 3 else end]]

    greedy = argparse.Namespace(temperature=None, seed=0)
    assert lm.format_answer(("a",), tokenizer, logits_of, greedy) == ["abb"]
    assert asked == [[a], [a, b], [a, b, b]]


def test_tokens_are_drawn_by_their_probabilities():
    """Three tokens have 0.6, 0.3 and 0.1. Temperature 1/2 draws them by the squares of these."""
    logits = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log() + 5

    def shares(temperature, words=4):
        tokens = lm.next_tokens([0], 8, words, lambda _: logits, temperature, 0, count=3000)
        drawn = list(tokens)
        return [drawn.count(token) / 3000 for token in range(4)]

    assert shares(1.0) == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.03)
    assert shares(0.5) == pytest.approx([0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46, 0], abs=0.03)
    assert shares(None) == [1, 0, 0, 0]
    # A row of the model that no token has is never drawn, however likely it seems.
    logits = logits.flip(1)
    assert shares(1.0, words=3)[3] == shares(None, words=3)[3] == 0


# --- downloads ------------------------------------------------------------------------------------


def test_texts_are_fetched_and_checked(server, make_gpt2, tmp_path):
    files, _ = server
    _, tokenizer = load(make_gpt2)
    text = b" the film is good \n" * 9
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        for split in ("train", "valid", "test"):
            zipped.writestr(f"wikitext-103/wiki.{split}.tokens", text)
            zipped.writestr(f"wikitext-2/wiki.{split}.tokens", text)
    files["/lm/wikitext-103-v1.zip"] = files["/lm/wikitext-2-v1.zip"] = archive.getvalue()
    files["/lm/ptb.valid.txt"] = text
    blocks = data.load_split("wikitext103", "train", None, tokenizer)
    assert (
        len(blocks) > 2
        and (tmp_path / "cache/glue/wikitext-103/wiki.test.tokens").read_bytes() == text
    )
    with pytest.raises(ValueError, match="wikitext-2/wiki.valid.tokens: md5 is"):
        data.load_split("wikitext2", "train", None, tokenizer)
    with pytest.raises(ValueError, match="ptb.valid.txt: md5 is"):
        data.load_split("ptb", "valid", None, tokenizer)
    assert {path.name for path in (tmp_path / "cache/glue").iterdir()} == {"wikitext-103"}
    with pytest.raises(
        OSError, match="put ptb.train.txt, ptb.valid.txt, ptb.test.txt into .*LM_URL names a mirror"
    ):
        data.load_split("ptb", "train", None, tokenizer)


# --- what people get wrong ------------------------------------------------------------------------


def test_what_is_refused(make_gpt2, make_model, glue, texts, tmp_path, fails):
    gpt2, bert = make_gpt2(), make_model()

    def error(*flags, task="ptb", model=gpt2, folder=texts):
        given = ["--task", task, "--model", model, "--data-dir", folder]
        given += ["--out", tmp_path / "out", "--length", 16]
        return fails(train.main, [*given, "--steps", 4, *flags])

    assert "model_type is 'bert'; the models for this task are gpt2" in error(model=bert)
    assert "model_type is 'gpt2'; the models for this task are bert," in error(
        task="rte", folder=glue
    )
    assert "--length 33: the model takes 4 to 32 tokens" in error("--length", 33)
    assert "--head classifier: a language model has no classes" in error("--head", "classifier")
    argv = ["--task", "movies", "--model", bert, "--data-dir", glue, "--method", "finetune"]
    argv += ["--out", tmp_path / "bert", "--steps", 2, "--length", 16]
    train.main([str(a) for a in argv])
    said = error("--teacher", tmp_path / "bert")
    assert "was trained on ['movies', '0', '1'], not on ['ptb']" in said
    config = (gpt2 / "config.json").read_text()
    (gpt2 / "config.json").write_text(json.dumps(json.loads(config) | {"vocab_size": 100}))
    assert "do not fit config.json: size mismatch for wte.weight" in error()
    (gpt2 / "config.json").write_text(config)
    (texts / "ptb" / "ptb.test.txt").write_text("a\n")
    assert "ptb.test.txt is shorter than a block of 16 tokens (it has 2); lower --length" in error()
    (texts / "ptb" / "ptb.test.txt").write_text("")
    assert "ptb.test.txt is shorter than a block" in error()
    (texts / "ptb" / "ptb.valid.txt").write_bytes(b"caf\xe9\n" * 99)
    assert "ptb.valid.txt is not UTF-8: 'utf-8' codec can't decode" in error()
    (texts / "ptb" / "ptb.train.txt").unlink()
    assert "--data-dir or --dev: there is no" in error()


def test_a_tokenizer_that_knows_more_than_the_model(make_gpt2):
    config = GPT2_CONFIG | {"vocab_size": 100}
    with pytest.raises(ValueError, match="tokenizer.json has more words than config.json allows"):
        lm.load(make_gpt2("few", gpt2_tensors(config), vocab_size=100), 8, "words")


def test_questions_a_language_model_cannot_answer(make_gpt2, texts, tmp_path, fails):
    run(make_gpt2, texts, tmp_path)
    assert "needs something to continue, and this text is empty" in fails(
        eval_.main, [tmp_path / "run", "--text", ""]
    )
    assert "the task takes 1 text(s), not 2" in fails(
        eval_.main, [tmp_path / "run", "--text", "a", "--pair", "b"]
    )


def test_bitdelta_takes_gpt2s_three_matrices_from_c_attn(make_gpt2, texts, tmp_path, capsys):
    """Each of query, key and value changes by one number, and what was no matrix is the teacher's.

    Embeddings do not train in finetune-encoder.
    """
    flags = ["--method", "finetune-encoder", "--weight-lr", "1e-2"]
    run(make_gpt2, texts, tmp_path, *flags, name="dense")
    model, dense = tmp_path / "dense-model", tmp_path / "dense"
    flags = ["--method", "bitdelta", "--teacher", dense]
    result = run(make_gpt2, texts, tmp_path, *flags, model=model)
    before, tuned, after = (
        load_file(folder / "model.safetensors") for folder in (model, dense, tmp_path / "run")
    )
    assert before.keys() == tuned.keys() == after.keys()
    matrices = {name for name in before if name.startswith("h.") and before[name].ndim == 2}
    bits = stored = 0
    for name, tensor in before.items():
        if name not in matrices:
            assert torch.equal(after[name], tuned[name])
            stored += 0 if torch.equal(tuned[name], tensor) else tensor.numel()
            continue
        bits += tensor.numel()
        for part in (after[name] - tensor).chunk(3 if "c_attn" in name else 1, dim=1):
            assert torch.allclose(part.abs(), part.abs().mean(), atol=1e-5)
    assert result["stored_bits"] == bits and result["stored_numbers"] == 2 * 6 + stored
    capsys.readouterr()
    eval_.main([str(tmp_path / "run")])
    assert f"training reported {show(result['final'])}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "bitfit", "finetune-encoder", "p-fisher"])
def test_what_bert_has_gpt2_has_too(make_gpt2, texts, tmp_path, capsys, method):
    flags = ["--method", method, "--weight-lr", "1e-2"]
    if method == "p-fisher":
        flags += ["--ffn-share", 1]
    result = run(make_gpt2, texts, tmp_path, *flags)
    before = load_file(tmp_path / "run-model" / "model.safetensors")
    if method != "bitfit":
        after = load_file(tmp_path / "run" / "model.safetensors")
        assert torch.equal(after["wte.weight"], before["wte.weight"]) == (method != "p-fisher")
    capsys.readouterr()
    eval_.main([str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert f"training reported {show(result['final'])}" in said
    assert f"): {show(result['final'])}" in said
