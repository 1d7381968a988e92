"""train.py and eval.py end to end on tiny models, and what happens to bad input."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acts import prepared
from conftest import CONFIG, WIDE, bert_tensors, load_model
from oracle import roberta_name
from safetensors.torch import load_file
from tqdm import tqdm

import data
import eval as eval_
import mask
import train
from eval import load_run
from mask import SCHEDULES, SMP, Method, smp_s
from model import load_backbone
from plumbing import cli, files
from plumbing.cli import choose_device
from plumbing.files import MASKS, unseal
from plumbing.run import identity

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("method", ["smp-s", "smp-l"])
def test_a_run_from_end_to_end(run, capsys, method):
    before = {p: p.read_bytes() for p in run.model.iterdir()}
    folder, result = run("--method", method, "--sparsity", 0.3, "--evals", 3)
    out = capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.model.iterdir()} == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "log.jsonl",
        "mask.safetensors",
        "result.json",
    ]
    assert "no frozen weight has moved" in out and f"python eval.py {folder}" in out
    assert out.index("\ndensity ") < out.index("\nkept ")

    prunable = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert result["prunable"] == prunable and result["density"] == result["kept"] / prunable
    per_group = {
        "smp-s": lambda n: int(0.7 * 2 * n + 1e-6),
        "smp-l": lambda n: 2 * int(0.7 * n + 1e-6),
    }[method]
    assert result["kept"] == 4 * per_group(256) + 2 * per_group(384)
    assert (
        result["sparsity"] == 0.3
        and result["seed"] == 0
        and result["steps"] == 12
        and result["device"] == "cpu"
    )
    assert result["best"]["step"] == 12  # the only evaluation at the target density
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "dev" in line] == [4, 8, 12]
    assert log[-1]["dev"] == result["final"]
    assert [line["step"] for line in log if "loss" in line] == [4, 8, 10, 12]

    eval_.main([str(folder)])
    out = capsys.readouterr().out
    reported = f"accuracy {result['final']['accuracy']:.4f}"
    assert f"{reported}\ntraining reported {reported}" in out
    header, *layers, total = (
        line.split() for line in out[out.index("density ") :].splitlines()[:4]
    )
    masks = load_masks(folder, result)
    assert header == "density query key value attn output intermed. output".split()
    assert (
        layers[0][3]
        == f"{masks['bert.encoder.layer.0.attention.self.query.weight'].float().mean():.3f}"
    )
    assert total[1] == f"{int(0.7 * 512 + 1e-6) / 512 if method == 'smp-s' else 179 / 256:.4f}"

    eval_.main([str(folder), "--text", "a good film"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == {"terrible", "great"}
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(1, abs=2e-4)


def load_masks(folder, result):
    expected = identity(Path(result["model"]), load_model(Path(result["model"]), [5, 6]))
    loaded = load_run(folder)
    del result["digest"]
    assert loaded.result == result and expected.items() <= result.items()
    return loaded.masks


def test_finetune_learns_and_stands_on_its_own(run, capsys, tmp_path):
    folder, result = run("--method", "finetune", "--weight-lr", 5e-3, "--seed", 1, steps=120)
    losses = [json.loads(line).get("loss") for line in (folder / "log.jsonl").open()]
    losses = [loss for loss in losses if loss]  # other lines are evaluations
    assert losses[-1] < losses[0] and result["density"] == 1.0
    files = [
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "result.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in folder.iterdir()) == files
    old, new = load_file(run.model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert old.keys() == new.keys() and not any(
        old[n].equal(new[n]) for n in old if "query.weight" in n
    )
    shutil.rmtree(run.model)
    capsys.readouterr()
    eval_.main([str(folder)])
    reported = f"accuracy {result['final']['accuracy']:.4f}"
    assert f"{reported}\ntraining reported {reported}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mask_alone_learns(run):
    """Seeds 0 to 9 reach 0.95 to 1; guessing is 0.5."""
    _, result = run(
        "--sparsity", 0.3, "--lr", 0.1, "--penalty", 1, "--ramp", 0.5, "--evals", 1, steps=200
    )
    assert result["final"]["accuracy"] > 0.75


def test_hold_keeps_everything_for_a_while(run):
    folder, _ = run("--sparsity", 0.3, "--hold", 0.25, "--ramp", 0.5, steps=80)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    densities = {line["step"]: line["density"] for line in lines if "loss" in line}
    assert (
        densities[10]
        == densities[20]
        == 1
        > densities[30]
        > densities[40]
        > densities[50]
        == densities[80]
        == 0.7
    )


def test_same_seed_same_mask_other_seed_other_mask(run):
    masks = [
        (run("--seed", s, out=f"run{i}")[0] / "mask.safetensors").read_bytes()
        for i, s in enumerate((3, 3, 4))
    ]
    body = [
        m[8 + int.from_bytes(m[:8], "little") :] for m in masks
    ]  # behind the header, which names the folder
    assert body[0] == body[1] != body[2]


@pytest.mark.parametrize("pooler", [True, False])
def test_a_fresh_classifier_beside_a_mask(run, make_model, capsys, pooler):
    tensors = bert_tensors(CONFIG)
    if pooler:
        tensors |= {
            "bert.pooler.dense.weight": torch.eye(16),
            "bert.pooler.dense.bias": torch.zeros(16),
        }
    model = make_model("pooled", tensors)
    folder, result = run("--model", model, "--head", "classifier", steps=8)
    assert "no frozen weight has moved" in capsys.readouterr().out
    tensors, description = files.unseal(folder / "mask.safetensors", files.MASKS)
    head = {name: tensor for name, tensor in tensors.items() if name not in description["shapes"]}
    assert {n: tuple(t.shape) for n, t in head.items()} == {
        "classifier.weight": (2, 16),
        "classifier.bias": (2,),
    }
    assert 0 < head["classifier.bias"].abs().max() < 1e-3  # it moved, at 3e-5 a step
    loaded = load_run(folder).model
    assert hasattr(loaded.bert, "pooler") == pooler and loaded.classifier.bias.equal(
        head["classifier.bias"]
    )
    assert identity(model, loaded) == identity(model, load_model(model, [7, 8], "classifier"))
    eval_.main([str(folder)])
    reported = f"accuracy {result['final']['accuracy']:.4f}"
    assert f"{reported}\ntraining reported {reported}" in capsys.readouterr().out


def test_a_classifier_needs_no_label_words(run, fails):
    tokenizer = run.model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"great"', '"grand"'))
    assert "label word 'great'" in fails(train.main, run.argv(out="words"))
    for method in ("smp-s", "finetune"):
        folder, _ = run("--head", "classifier", "--method", method, out=method, steps=2)
        eval_.main([str(folder)])


def test_finetuned_classifier_and_roberta_names(run, make_model):
    names = {
        roberta_name(n): t
        for n, t in bert_tensors(CONFIG | {"max_position_embeddings": 34}).items()
    }
    changes = {"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 34}
    model = make_model("roberta", names, **changes)
    flags = ["--model", model, "--method", "finetune", "--head", "classifier"]
    folder, _ = run(*flags, steps=4)
    saved = load_file(folder / "model.safetensors")
    kept = {n for n in names if n.startswith("roberta.")} | {"classifier.weight", "classifier.bias"}
    assert saved.keys() == kept
    eval_.main([str(folder)])
    # SMP lowers the density of a RoBERTa in a straight line, unless it is told otherwise.
    for name, given in (("linear", []), ("cubic", ["--schedule", "cubic"])):
        _, result = run("--model", model, *given, out=name, steps=4)
        assert result["schedule"] == name
    assert run("--method", "finetune", out="dense", steps=2)[1]["schedule"] is None
    assert run(out="bert", steps=2)[1]["schedule"] == "cubic"


@pytest.mark.parametrize("method", ["smp-s", "finetune"])
def test_bits_of_a_mask_are_stored_where_there_is_one(run, method):
    """One bit per prunable weight, or one number per weight that trained."""
    _, result = run(
        "--method", method, *(["--sparsity", 0.75] if method != "finetune" else []), steps=2
    )
    whole = sum(tensor.numel() for tensor in load_file(run.model / "model.safetensors").values())
    prunable = 2 * (4 * 16 * 16 + 2 * 16 * 24)
    stored = {"smp-s": (prunable, 0), "finetune": (0, whole)}[method]
    assert (result["stored_bits"], result["stored_numbers"]) == stored


class Terminal(io.StringIO):
    """Stands for stderr on a terminal."""

    def isatty(self):
        return True


BESIDE = {"weight_lr": 1e-2}


@pytest.mark.parametrize(
    ("method", "part", "masked"),
    [
        (Method(smp_s, trains=("scores", "LayerNorm"), recipe=SMP | BESIDE), "LayerNorm", True),
        (Method(None, trains=("vectors",), recipe=BESIDE), "", False),
        (Method(None, trains=(".query.",), recipe=BESIDE), ".query.", False),
    ],
    ids=["LayerNorms beside a mask", "vectors alone", "named matrices alone"],
)
def test_what_trains_is_one_rule_for_training_and_loading(
    run, tables, capsys, method, part, masked
):
    """It moves, lies in the mask file, and is evaluated. All else is the backbone's, to the bit."""
    tables[0]["of one's own"] = method
    folder, result = run("--method", "of one's own", "--dtype", "float32")
    tensors, _ = unseal(folder / "mask.safetensors", MASKS)
    loaded = load_run(folder / "mask.safetensors")
    before, _ = load_backbone(run.model, loaded.task, 16)
    weights = dict(before.named_parameters())
    trained = {name for name in weights if part in name}
    if not part:  # biases and LayerNorms
        trained = {name for name in trained if weights[name].ndim == 1}
    assert tensors.keys() - loaded.masks.keys() == trained
    assert result["stored_numbers"] == sum(weights[name].numel() for name in trained)
    assert (len(loaded.masks) == 12) == masked and result["density"] == (0.5 if masked else 1)
    for name, weight in weights.items():
        same = torch.equal(weight, loaded.model.get_parameter(name))
        assert same if name not in trained else weight.isfinite().all()
    assert any(not torch.equal(weights[n], loaded.model.get_parameter(n)) for n in trained)
    capsys.readouterr()
    eval_.main([str(folder)])
    final = f"accuracy {result['final']['accuracy']:.4f}"
    assert f"{final}\ntraining reported {final}" in capsys.readouterr().out


def test_a_schedule_is_a_row_of_a_table(run, monkeypatch):
    """Half-way down a cosine, half of what will go has gone."""
    monkeypatch.setitem(SCHEDULES, "cosine", lambda t: (1 + math.cos(math.pi * t)) / 2)
    folder, _ = run("--schedule", "cosine", "--ramp", 1, "--sparsity", 0.4, steps=40)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    densities = {line["step"]: line["density"] for line in lines if "loss" in line}
    for step in (10, 20, 30):  # logged is the density of the last step
        expected = 0.6 + 0.4 * (1 + math.cos(math.pi * (step - 1) / 40)) / 2
        assert densities[step] == pytest.approx(expected)


def test_only_the_bar_of_training_stays_on_a_terminal(run, monkeypatch):
    bars, init = [], tqdm.__init__

    def spy(bar, *args, **settings):
        init(bar, *args, **settings)
        bars.append(bar)

    monkeypatch.setattr(tqdm, "__init__", spy)
    with contextlib.redirect_stderr(Terminal()):
        folder, _ = run("--evals", 2, steps=2)
        assert [bar.leave for bar in bars if bar.total == 2] == [True]  # steps
        assert len(bars) == 3 and sum(bar.leave for bar in bars) == 1  # and two evaluations
        bars.clear()
        eval_.main([str(folder)])
    assert [bar.leave for bar in bars] == [False]


def test_distillation_loss_by_hand():
    logits, taught = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    ce = math.log(1 + math.exp(-2.0))
    p, q = (
        1 / (1 + math.exp(2.0)),
        1 / (1 + math.exp(-1.0)),
    )  # of class 0 at temperature 2: teacher, student
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert train.task_loss(logits, torch.tensor([0]), taught).item() == pytest.approx(
        0.5 * ce + 0.5 * 4 * kl, rel=1e-5
    )
    score, said = torch.tensor([[3.0]]), torch.tensor([[5.0]])
    assert train.task_loss(score, torch.tensor([2.0]), said).item() == pytest.approx(
        0.5 * 1 + 0.5 * 4
    )


def test_a_teacher_is_asked_and_stays_as_it_is(run):
    dense, _ = run("--method", "finetune", "--weight-lr", 5e-3, out="dense", steps=20)
    before = (dense / "model.safetensors").read_bytes()
    folder, result = run("--teacher", dense, out="taught", steps=1)
    first, *_ = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    assert result["teacher"] == str(dense)

    # The loss of that step, with the answers of the dense run to the same batch.
    _, _, job = prepared(run.argv("--teacher", dense, out="again", steps=1))
    [(inputs, labels, _)] = next(data.training_batches(job.train, 8, 1, seed=0))
    taught = load_run(dense).model.eval()(*inputs)
    weights, _ = job.learner(torch.tensor(0.5, dtype=torch.float64))
    logits = torch.func.functional_call(job.model, weights, tuple(inputs))
    loss = train.task_loss(logits, labels, taught).item()
    assert first["loss"] == pytest.approx(loss, abs=1e-5)
    assert loss != pytest.approx(train.task_loss(logits, labels).item(), abs=1e-3)
    assert not job.teacher.training
    assert not any(weight.requires_grad for weight in job.teacher.parameters())

    # It computes in the dtype of the run that it teaches.
    _, _, half = prepared(run.argv("--teacher", dense, "--dtype", "bfloat16", out="half"))
    assert load_run(dense).result["dtype"] == "float32"
    assert {weight.dtype for weight in half.teacher.parameters()} == {torch.bfloat16}
    assert (dense / "model.safetensors").read_bytes() == before


def test_teachers_that_cannot_teach_are_refused(run, fails, make_model, tmp_path):
    def said(teacher, *flags):
        return fails(train.main, run.argv("--teacher", teacher, *flags, out="r"))

    pruned, _ = run(out="pruned", steps=2)
    assert "is a pruned model; a teacher must be fine-tuned" in said(pruned)
    dense, _ = run("--method", "finetune", out="dense", steps=2)
    assert "['movies', '0', '1'], not on ['rte', 'not_e" in said(dense, "--task", "rte")
    other = make_model("other")
    (other / "tokenizer.json").write_text(
        (other / "tokenizer.json").read_text().replace('"fun"', '"joy"')
    )
    foreign, _ = run("--method", "finetune", "--model", other, out="foreign", steps=2)
    assert "another vocabulary" in said(foreign)
    (dense / "model.safetensors").unlink()
    assert "model.safetensors" in said(dense)
    assert "there is no finished run" in said(tmp_path)


def test_bfloat16_and_pairs(run, capsys):
    folder, result = run("--task", "rte", "--dtype", "bfloat16", steps=4)
    assert result["dtype"] == "bfloat16" and math.isfinite(result["final"]["accuracy"])
    capsys.readouterr()
    eval_.main([str(folder), "--text", "it is good", "--pair", "a film is good"])
    assert "yes (entailment)" in capsys.readouterr().out
    _, dense = run(
        "--task", "rte", "--dtype", "bfloat16", "--method", "finetune", out="dense", steps=4
    )
    assert (
        load_file(run.model.parent / "dense" / "model.safetensors")["cls.predictions.bias"].dtype
        == torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_matrices_are_in_memory_once(make_model, dtype):
    """The model's are views of the stacks that the masks multiply."""
    model = load_model(make_model(), [5, 6])
    learner = train.Learner(model, mask.METHODS["smp-s"], dtype)
    for group, names in learner.masks.names.items():
        stack = learner.masks.weights[group]
        for name, matrix in zip(names, stack, strict=True):
            assert model.get_parameter(name).data_ptr() == matrix.data_ptr()


class OneWeight(torch.nn.Module):
    """Logits (w x, 0)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)

    def prunable(self):
        return {"g": {"w": self.w}}

    def forward(self, x):
        return torch.cat([self.w * x, torch.zeros(1, 1)], 1)


def test_adam_of_the_reference_code_by_hand():
    """Its eps stands outside the bias correction.

    lr sqrt(1 - b2) / (1 - b1) * m / (sqrt(v) + eps), with g = 3e-8.
    """
    model = OneWeight()
    learner = train.Learner(model, mask.METHODS["smp-l"], torch.float32)
    adam = train.make_optimizer(learner, 0.02, None)
    p = 1 / (
        1 + math.exp(-1e-7)
    )  # dL/dw of cross-entropy with logits (w x, 0) and class 1 is p x, x = 1e-7
    g = p * 1e-7
    forward_backward = train.make_forward_backward(model, learner)
    parts = [data.Part(torch.tensor([[[1e-7]]]), torch.tensor([1]))]
    train.set_rates(adam, 0, 10)
    train.train_step(forward_backward, adam, parts, *torch.tensor([1.0, 0.0]))
    expected = 0.02 * math.sqrt(0.001) / 0.1 * 0.1 * g / (math.sqrt(0.001) * g + 1e-8)
    assert learner.masks.scores["g"].item() == pytest.approx(-expected, rel=1e-3)
    train.set_rates(adam, 9, 10)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.002)


# --- bad input ---


@pytest.mark.parametrize("method", ["smp-s", "finetune"])
def test_a_table_of_only_empty_texts_trains(run, glue, method):
    for split in ("train", "dev"):
        rows = "".join(f"\t{n % 2}\n" for n in range(20))
        (glue / "movies" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    assert run("--method", method, steps=3)[1]["final"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", 1], "--sparsity"),
        (["--sparsity", -0.1], "--sparsity"),
        (["--sparsity", "nan"], "--sparsity"),
        (["--task", "rtee"], "--task"),
        (["--method", "smp"], "--method"),
        (["--method", "finetune", "--sparsity", 0.5], "--sparsity"),
        (["--batch", 0], "--batch"),
        (["--accumulate", 0], "--accumulate"),
        (["--lr", "inf"], "--lr"),
        (["--ramp", 2], "--ramp"),
        (["--hold", 0.7, "--ramp", 0.6], "--hold"),
        (["--penalty", "nan"], "--penalty"),
        (["--seed", -1], "--seed"),
        (["--step", 3], "--step"),
        (["--length", 33], "--length 33.*4 to 32"),
        (["--model", "nowhere"], "--model: there is no folder nowhere.*minilm, bert-base-uncased"),
        (["--data-dir", "nowhere"], "--data-dir or --dev: there is no /.*/movies/train.tsv"),
        (["--data-dir", __file__], "--data-dir: name the folder that holds the tasks' folders"),
    ],
)
def test_bad_arguments_end_in_one_line(run, tmp_path, fails, flags, message):
    assert re.search(message, fails(train.main, run.argv(*flags, out="r")))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_a_file(run, fails, name):
    (run.model / name).unlink()
    assert f"{run.model} has no {name}" in fails(train.main, run.argv())


def test_bad_data_ends_in_one_line(run, fails, glue):
    with open(glue / "movies" / "dev.tsv", "a") as file:
        file.write("good\t2\n")
    assert "dev.tsv:42: unknown label '2'" in fails(train.main, run.argv())
    (glue / "movies" / "dev.tsv").write_text("sentence\tlabel\n")
    assert "dev.tsv holds no examples" in fails(train.main, run.argv())
    (run.model / "tokenizer.json").write_text("{")
    assert "cannot read its tokenizer" in fails(train.main, run.argv())


def test_a_loss_that_is_not_finite(run):
    args, unfinished, job = prepared(run.argv(steps=80))
    job.model.bert.encoder["layer"][0].output.dense.bias.data[3] = math.inf
    expected = "the loss is nan and the regularizer nan at step 10: try a smaller --lr"
    with pytest.raises(FloatingPointError, match=expected), unfinished:
        train.learn(args, unfinished, job)
    assert [path.name for path in args.out.iterdir()] == ["log.jsonl"]


def test_an_infinite_regularizer_is_noticed(run):
    """The first step removes the weight without a score, so the loss is a number."""
    args, unfinished, job = prepared(run.argv("--method", "smp-l", steps=1))
    job.learner.masks.scores["query"].data[0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is \d.* regularizer nan"), unfinished:
        train.learn(args, unfinished, job)


@pytest.mark.parametrize(("method", "rate"), [("smp-s", "--lr"), ("finetune", "--weight-lr")])
def test_a_last_step_that_is_not_finite(run, tmp_path, fails, method, rate):
    argv = run.argv("--method", method, rate, 1e39, steps=1)
    assert "not finite" in fails(train.main, argv)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_folder_of_other_files_is_not_touched(run, fails):
    before = {p: p.read_bytes() for p in run.model.iterdir()}
    argv = run.argv("--method", "finetune", "--out", run.model)
    assert "--out" in fails(train.main, argv)
    assert {p: p.read_bytes() for p in run.model.iterdir()} == before


@pytest.mark.parametrize("method", ["smp-s", "finetune"])
def test_a_model_folder_that_vanishes_during_the_run(run, method):
    """A mask needs nothing of it any more. A model of its own needs config and tokenizer."""
    args, unfinished, job = prepared(run.argv("--method", method, steps=2))
    with unfinished:
        train.learn(args, unfinished, job)
        shutil.rmtree(run.model)
        if method == "finetune":
            with pytest.raises(OSError, match="No such file"):
                train.finish(args, unfinished, job)
        else:
            train.finish(args, unfinished, job)
    assert (args.out / "result.json").exists() == (method == "smp-s")


def test_a_tokenizer_for_another_model(run, make_model, fails):
    model = make_model("small", vocab_size=25)
    said = fails(train.main, run.argv("--model", model))
    assert "more words or segments than config.json allows" in said
    model = make_model("one", type_vocab_size=1, tensors=bert_tensors(CONFIG) | {
        "bert.embeddings.token_type_embeddings.weight": torch.ones(1, 16)})  # fmt: skip
    said = fails(train.main, run.argv("--model", model, "--task", "rte"))
    assert "more words or segments" in said
    run("--model", model, steps=2)  # one text, one segment


def test_only_a_run_that_wrote_nothing_is_overwritten(run, fails):
    folder, _ = run()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "holds a finished run" in fails(train.main, run.argv())
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for path in before:
        path.unlink()
    (folder / "log.jsonl").touch()  # of a run that ended before its first line
    run()


@pytest.mark.parametrize("where", ["stack", "replaced", "bias"])
def test_a_weight_that_moved_is_noticed(run, where):
    args, unfinished, job = prepared(run.argv(steps=2))
    with unfinished:
        train.learn(args, unfinished, job)
        if where == "stack":
            job.learner.masks.weights["query"][0, 0, 0] += 1e-6
        elif where == "replaced":
            stacks = job.learner.masks.weights
            stacks["query"] = 2 * stacks["query"]
        else:
            job.model.bert.encoder["layer"][1].output.LayerNorm.bias += 1e-6
        expected = "a frozen weight has moved, so the run counts as unfinished"
        with pytest.raises(ValueError, match=expected):
            train.finish(args, unfinished, job)
    assert not (args.out / "result.json").exists()


def test_device_and_dtype_choose_themselves(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_device()[:2] == (torch.device("cpu"), torch.float32)
    assert choose_device()[2] == "found cpu, without native bfloat16"
    with pytest.raises(ValueError, match="--device cuda: torch finds no such device"):
        choose_device("cuda")
    machine["bf16"] = True
    device, dtype, why = choose_device()
    assert (device.type, dtype) == ("cpu", torch.bfloat16) and "with native bfloat16" in why
    machine["mps"] = True
    assert choose_device()[:2] == (torch.device("mps"), torch.float32)
    machine["cuda"] = True
    assert choose_device()[:2] == (torch.device("cuda"), torch.bfloat16)
    assert choose_device("cpu", "bfloat16")[:2] == (torch.device("cpu"), torch.bfloat16)
    assert choose_device(dtype="float32")[1] == torch.float32


def test_what_a_method_keeps_by_itself_is_said(run, capsys, tables):
    """Whether it is more than was asked for, which is then cut, or less, which nothing fills up."""
    methods, _ = tables

    def half(importance, sizes, density, scores, exact):
        return mask.smp_l(importance, sizes, density / 2, scores, exact)

    def loose(importance, sizes, density, scores, exact):
        return mask.smp_l(importance, sizes, density if exact else density * 0 + 1, scores, exact)

    methods["half"] = mask.Method(half)
    run("--method", "half", steps=2)
    assert "keeps a share of 0.2500, for a sparsity of 0.5" in capsys.readouterr().out
    methods["loose"] = mask.Method(loose)
    run("--method", "loose", steps=2, out="loose")
    assert "keeps a share of 1.0000, for a sparsity of 0.5" in capsys.readouterr().out


def test_a_mistake_in_ones_own_code_shows_its_place_when_asked(run, fails, tables, monkeypatch):
    """A ValueError ends in one line: it may be the user's. SMP_TRACEBACK says where it arose."""

    def wrong(importance, sizes, density, scores, exact):
        raise ValueError("mine")

    methods, _ = tables
    methods["wrong"] = mask.Method(wrong)
    assert fails(train.main, run.argv("--method", "wrong")) == "error: mine"
    monkeypatch.setenv("SMP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mine"):
        train.main(run.argv("--method", "wrong", out="again"))


@pytest.mark.slow
def test_little_data_gets_steps_enough_unless_fewer_are_asked_for(run, capsys, make_model):
    """96 examples in batches of 8: two epochs would be 24 steps.

    Seeds 0 to 9 reach 0.9 to 1. Guessing is 0.5.
    """
    learns = ["--model", make_model("wide", **WIDE), "--lr", 0.05, "--penalty", 50]
    assert run(*learns, "--evals", 1, steps=None)[1]["final"]["accuracy"] > 0.7
    assert "300 steps of 8" in capsys.readouterr().out
    _, result = run("--epochs", 2, "--evals", 1, steps=None, out="epochs")
    assert result["steps"] == 24


def test_dense_training_starts_from_unrounded_weights(run):
    folder, _ = run("--method", "finetune", "--dtype", "bfloat16", "--weight-lr", 1e-12, steps=1)
    old, new = load_file(run.model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.allclose(old[n], new[n], atol=1e-7) for n in old)


@pytest.mark.slow
def test_the_commands_run_as_commands():
    command = [sys.executable, ROOT / "train.py", "--sparsity", "2"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (
        ended.returncode == 2 and "--sparsity" in ended.stderr and "Traceback" not in ended.stderr
    )


def test_a_movie_takes_a_recipe_of_its_own():
    def recipe(*argv):
        args = train.parse_args(argv)
        return args.batch, args.penalty, args.temperature, args.dropout

    assert recipe() == (16, 800, 4, False)
    assert recipe("--dropout", "--penalty", "5", "--temperature", "2") == (16, 5, 2, True)
    assert recipe("--task", "rte") == (32, 400, 1, True)


def test_defaults_give_way_in_their_order(tables):
    """A given flag comes before the method's row, that before the task's, that before RECIPE."""

    def settled(name, **given):
        return train.recipe({"task": "one", "method": "mine"} | given)[name]

    methods, tasks = tables
    recipe = {"ramp": None, "penalty": None}
    methods["mine"] = mask.Method(mask.smp_l, recipe=recipe)
    tasks["one"] = dataclasses.replace(tasks["rte"], recipe={"epochs": 3})
    assert (settled("ramp"), settled("penalty")) == (0.6, 400)
    tasks["one"] = dataclasses.replace(tasks["rte"], recipe={"ramp": 0.7})
    assert (settled("ramp"), settled("penalty")) == (0.7, 400)
    methods["mine"] = mask.Method(mask.smp_l, recipe=recipe | {"ramp": 0.8})
    assert settled("ramp") == 0.8 and settled("ramp", ramp=0.9) == 0.9
    assert settled("penalty", penalty=0.0) == 0.0  # zero is a value, too


def test_a_method_may_bring_defaults_for_flags_of_all_runs(tables):
    methods, _ = tables
    methods["mine"] = mask.Method(mask.smp_l, recipe=mask.SMP | {"epochs": 7, "warmup": 0.1})
    found = train.parse_args(["--method", "mine"])
    assert (found.epochs, found.warmup) == (7, 0.1)
    assert train.parse_args(["--method", "mine", "--epochs", "2"]).epochs == 2
    others = train.parse_args([])
    assert (others.epochs, others.warmup) == (1, 0)


def test_a_flag_that_the_method_does_not_take_is_off():
    """Whatever the task says: movies has a ramp, a penalty and a temperature."""
    dense = train.recipe({"method": "finetune"})
    off = {"sparsity": 0, "hold": 0, "ramp": 0, "penalty": 0, "lr": None, "schedule": None}
    assert off.items() <= dense.items() and dense["temperature"] is None
    assert train.recipe({})["weight_lr"] is None
    assert train.recipe({"head": "classifier"})["weight_lr"] == 1e-4
    assert train.recipe({"method": "smp-l"})["temperature"] is None


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (["--task", "rte"], {"epochs": 100, "batch": 32, "length": 128, "penalty": 400.0}),
        ([], {"epochs": 1, "batch": 16, "length": 64, "penalty": 800.0, "model": "minilm"}),
        (["--task", "rte", "--epochs", "7", "--method", "smp-l"], {"epochs": 7.0, "lr": 0.02}),
    ],
)
def test_help_prints_the_defaults_of_the_task_and_method(capsys, flags, numbers):
    with pytest.raises(SystemExit) as ended:
        train.main([*flags, "--help-all"])
    assert not ended.value.code
    # Lines join where the terminal is narrow: "--batch BATCH examples per step (32)".
    text = " ".join(capsys.readouterr().out.split())
    assert numbers.items() <= vars(train.parse_args(flags)).items()
    for name, value in numbers.items():
        after = text.split(f" {cli.flag(name)} {name.upper()} ")[1]
        assert after.split(" --")[0].split("(")[-1].startswith(f"{value})")


def test_help_breaks_no_name(capsys):
    """Names of methods and folders can be copied from it."""
    with pytest.raises(SystemExit):
        train.main(["--task", "rte", "--help"])
    words = re.split(r"[\s,()]+", capsys.readouterr().out)
    assert set(mask.METHODS) | set(data.TASKS) <= set(words)
    assert "runs/rte-bert-base-uncased-smp-s-0.5-seed0" in words


def test_what_a_command_without_flags_asks_for():
    """The README's numbers were made with these. A change here makes them another run's."""
    found = vars(train.parse_args([]))
    asked = {"task": "movies", "method": "smp-s", "model": "minilm", "head": "words", "seed": 0}
    asked |= {"sparsity": 0.5, "lr": 2e-2, "hold": 0, "ramp": 0.9}
    asked |= {"penalty": 800, "temperature": 4}
    asked |= {"epochs": 1, "batch": 16, "length": 64, "evals": 4, "warmup": 0, "accumulate": 1}
    asked |= {"dropout": False, "decay": 0.01, "least_steps": 300, "least_steps_per_eval": 10}
    asked["out"] = Path("runs/movies-minilm-smp-s-0.5-seed0")
    assert {name: value for name, value in found.items() if value is not None} == asked
    # The machine or nobody decides these.
    open_still = {name for name, value in found.items() if value is None}
    assert {"steps", "device", "dtype", "schedule", "teacher", "compile"} <= open_still
    flags = ["--steps", "9", "--head", "classifier", "--teacher", "t"]
    flags += ["--method", "smp-l", "--seed", "3"]
    name = "movies-minilm-smp-l-0.5-classifier-steps9-t-seed3"
    assert train.parse_args(flags).out == Path("runs") / name


def test_the_least_steps_are_the_measured_ones():
    """Half is still the easier kind."""
    for sparsity, least in ((0.5, 300), (0.51, 1200)):
        assert train.recipe({"sparsity": sparsity})["least_steps"] == least


def test_evaluations_are_as_many_as_fit(run):
    """Four on movies. A short run has one for each ten steps begun, and never more than steps."""
    for number, (steps, flags, at) in enumerate((
        (11, [], [6, 11]), (31, [], [8, 16, 24, 31]), (2, ["--evals", 3], [1, 2]),
    )):  # fmt: skip
        folder, _ = run(*flags, steps=steps, out=f"run{number}")
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "dev" in line] == at


def test_dropout_can_be_left_out(run, make_model):
    none = make_model("without", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = {}
    for name, flags in {
        "off": ["--no-dropout"],
        "on": ["--dropout"],
        "none": ["--dropout", "--model", none],
    }.items():
        folder, result = run(*flags, out=name)
        assert result["dropout"] == ("--dropout" in flags)
        found[name] = (folder / "log.jsonl").read_text()
    assert found["off"] == found["none"] != found["on"]


NO_TOOLS = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="tools/ is not there")


@pytest.mark.parametrize("module", ["train", "eval", pytest.param("tools.bench", marks=NO_TOOLS)])
def test_torch_and_numpy_find_their_settings_when_they_start(module):
    """What the environment holds in the moment in which the first of them would be imported."""
    names = "GOMP_SPINCOUNT", "NPY_DISABLE_CPU_FEATURES"
    code = f"""
import os, sys
class First:
    def find_spec(self, name, *_):
        if name in ("torch", "numpy"):
            sys.exit("/".join(os.environ.get(name, "nothing") for name in {names}))
sys.meta_path.insert(0, First())
import {module}
"""
    ours = {name: value for name, value in os.environ.items() if name not in names}

    def said(**more):
        words = [sys.executable, "-c", code]
        return subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env=ours | more
        ).stderr.strip()

    assert said() == "10000/AVX512_SKX X86_V4"
    assert said(GOMP_SPINCOUNT="5", NPY_DISABLE_CPU_FEATURES="") == "5/"


def test_short_runs_use_attention_that_needs_no_preparing():
    before, chosen = torch.backends.cuda.cudnn_sdp_enabled(), []
    for steps in (0, cli.LONG - 1, cli.LONG):
        cli.set_up(deterministic=False, steps=steps)
        chosen.append(torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert chosen == [False, False, True]
