"""eval.py: finished runs, answers to texts, predictions for the server, bad input."""

import json
import shutil

import pytest
import torch
from conftest import CONFIG, bert_tensors, load_model

import data
import eval as eval_
from eval import load_run
from plumbing import cli
from plumbing.checkpoints import cutting_tokenizer
from plumbing.files import MASKS, seal, unseal
from plumbing.summary import guessing, summary


def test_evaluation_is_the_same_every_time(run, make_model, capsys):
    """Without dropout, whatever numbers were drawn before. It asks for no slower kernels."""
    high = make_model("dropping", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    folder, result = run(
        "--model", high, "--dropout", "--method", "finetune", "--weight-lr", 1e-2, steps=4
    )
    said = []
    for seed in range(2):
        torch.manual_seed(seed)
        capsys.readouterr()
        eval_.main([str(folder)])
        eval_.main([str(folder), "--text", "a good film"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"dev (40 examples): {cli.show(result['final'])}\n" in said[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_predictions_come_in_the_order_of_the_examples(run, glue):
    tokenizer = cutting_tokenizer(run.model, 16)
    dev = data.load_split("movies", "dev", glue, tokenizer)
    model = load_model(run.model, [7, 8])
    together = eval_.predict(model, {}, dev, "cpu")
    for i in (0, 7, 39):
        one = data.Examples([dev.ids[i]], [dev.types[i]], [0], dev.limit)
        assert torch.allclose(eval_.predict(model, {}, one, "cpu")[0], together[i], atol=1e-5)
    assert model.training  # as it was


def test_several_masks_of_one_backbone(run, capsys, fails):
    runs = [str(run("--task", task, out=task, steps=3)[0]) for task in ("movies", "rte")]
    capsys.readouterr()
    for folder in runs:
        eval_.main([folder])
    alone = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dev")]
    eval_.main([runs[0], f"{runs[1]}/mask.safetensors"])
    lines = capsys.readouterr().out.splitlines()
    dev = [line for line in lines if line.startswith("dev")]
    assert dev == alone and any(
        line.startswith(f"{runs[1]}/mask.safetensors: rte") for line in lines
    )
    command = [runs[0], "--text", "x", "--pair", "y"]
    assert "the task takes 1 text(s), not 2" in fails(eval_.main, command)


@pytest.mark.parametrize("head", ["words", "classifier"])
def test_a_mask_file_needs_nothing_but_its_backbone(run, fails, make_model, tmp_path, capsys, head):
    folder, result = run("--head", head)
    (tmp_path / "elsewhere").mkdir()
    alone = shutil.move(folder / "mask.safetensors", tmp_path / "elsewhere" / "good films.mask")
    shutil.rmtree(folder)
    capsys.readouterr()
    eval_.main([str(alone)])
    assert (
        f"accuracy {result['final']['accuracy']:.4f}\ntraining reported" in capsys.readouterr().out
    )
    assert [len(v) for v in result["densities"].values()] == [2] * 6
    other = make_model("other", tensors=bert_tensors(CONFIG, seed=9))
    assert "the fingerprint of" in fails(eval_.main, [alone, "--model", other])
    spoken = make_model("spoken")
    (spoken / "tokenizer.json").write_text((spoken / "tokenizer.json").read_text() + " ")
    assert "the tokenizer of" in fails(eval_.main, [alone, "--model", spoken])


def test_eval_refuses_what_does_not_fit(run, fails, make_model, tmp_path):
    folder, _ = run()
    other = make_model("other", tensors=bert_tensors(CONFIG, seed=9))
    assert "the fingerprint of" in fails(eval_.main, [folder, "--model", other])
    assert "there is no finished run" in fails(eval_.main, [tmp_path])
    (tmp_path / "checkpoint.safetensors").touch()
    assert "holds an unfinished run; python train.py --resume" in fails(eval_.main, [tmp_path])
    assert "--pair and --temperature need --text" in fails(eval_.main, [folder, "--pair", "b"])
    command = [folder, "--text", "a", "--pair", "b"]
    assert "the task takes 1 text(s), not 2" in fails(eval_.main, command)
    assert "--text-file: only a run with --train reads" in fails(
        eval_.main, [folder, "--text-file", "new.csv"]
    )
    said = fails(eval_.main, [folder, "--text-file", "none.txt"])
    assert said == "error: No such file or directory: 'none.txt'"
    path = folder / "mask.safetensors"
    ours = path.read_bytes()
    path.write_bytes(ours[:-1])
    assert "not a whole safetensors file" in fails(eval_.main, [folder])
    path.write_bytes(ours)
    tensors, about = unseal(path, MASKS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for change, message in (
        ({"words": {"0": "bad", "1": "good"}}, "TASKS has no task movies with the label words"),
        ({"task": "x"}, "TASKS has no task x"),
        ({"method": "x"}, "METHODS has no method x"),
    ):
        changed = about | {"run": about["run"] | change}
        path.write_bytes(seal(MASKS, tensors, changed))
        assert message in fails(eval_.main, [folder])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "result.json").write_text("{}")
    assert "was altered, or is the result of another" in fails(eval_.main, [tmp_path / "notes"])
    dense, _ = run("--method", "finetune", out="dense", steps=2)
    assert "this run saved a whole model" in fails(eval_.main, [dense, "--model", other])
    shutil.copy(other / "model.safetensors", dense)
    assert "model.safetensors: sha256" in fails(eval_.main, [dense])


def test_no_altered_result_makes_the_mask_optional(run, fails, capsys):
    """The mask file says what the run was. Without it, an altered result.json is refused."""
    folder, result = run(steps=2)
    capsys.readouterr()
    said = [eval_.main([str(folder), "--text", "a good film"]), capsys.readouterr().out]
    for key in result:
        renamed = {name if name != key else f"{name}x": value for name, value in result.items()}
        (folder / "result.json").write_text(json.dumps(renamed))
        assert [eval_.main([str(folder), "--text", "a good film"]), capsys.readouterr().out] == said
        kept = (folder / "mask.safetensors").rename(folder / "kept")
        assert "was altered" in fails(eval_.main, [folder, "--text", "a good film"])
        kept.rename(folder / "mask.safetensors")
    (folder / "mask.safetensors").unlink()
    (folder / "result.json").write_text(json.dumps(result))
    assert "No such file" in fails(eval_.main, [folder, "--text", "a good film"])


def test_other_data_than_the_runs_only_where_it_is_asked_for(
    run, glue, fails, tmp_path, cache_folder, capsys
):
    folder, result = run()
    cached = cache_folder / "glue"
    shutil.copytree(glue, cached)
    dev = glue / "movies" / "dev.tsv"
    dev.write_text("\n".join(dev.read_text().splitlines()[:-1]) + "\n")
    assert f"dev in {glue} is not the run's; --data-dir" in fails(eval_.main, [folder])
    eval_.main([str(folder), "--data-dir", str(glue)])
    assert "dev (39 examples)" in capsys.readouterr().out

    # Where the run's folder is gone, the downloads stand in, if they hold the same.
    moved = glue.rename(tmp_path / "moved")
    eval_.main([str(folder)])
    final = cli.show(result["final"])
    assert f"dev (40 examples): {final}\ntraining reported {final}" in capsys.readouterr().out
    shutil.copy(moved / "movies" / "dev.tsv", cached / "movies")
    assert f"dev in {cache_folder} is not the run's" in fails(eval_.main, [folder])


def test_mnli_reports_both_dev_sets(run, glue, capsys):
    (glue / "MNLI").mkdir()
    for n, split in enumerate(["train", "dev_matched", "dev_mismatched"]):
        rows = [f"a film\tgood\tneutral\t{['neutral', 'entailment'][i % 2]}" for i in range(4 + n)]
        head = "sentence1\tsentence2\tlabel1\tgold_label"
        (glue / "MNLI" / f"{split}.tsv").write_text("\n".join([head, *rows]))
    folder, result = run("--task", "mnli", steps=2)
    assert result["final"].keys() == {"accuracy", "accuracy dev_mismatched"}
    # Another file is one set, and counts once.
    capsys.readouterr()
    eval_.main([str(folder), "--dev", str(glue / "MNLI" / "dev_matched.tsv")])
    said = capsys.readouterr().out
    here = said.split("training reported")[0]
    assert "dev (5 examples): accuracy" in here and "dev_mismatched" not in here


def test_flags_that_exclude_each_other(finished, glue, fails):
    dev = glue / "movies" / "dev.tsv"
    for others in (["--text", "a film"], ["--data-dir", glue]):
        assert "not allowed with argument" in fails(eval_.main, [finished, "--dev", dev, *others])


def test_answers_to_texts_and_to_the_lines_of_a_file(finished, tmp_path, capsys, fails):
    folder = finished
    texts = ["a good film", "dull and very bad", ""]
    found = eval_.answers(load_run(folder), texts)
    assert [sorted(label for _, label in rows) for rows in found] == [["0", "1"]] * 3
    assert all(
        rows[0][0] >= rows[1][0] and rows[0][0] + rows[1][0] == pytest.approx(1) for rows in found
    )
    (tmp_path / "f.txt").write_text("\n".join(texts) + "\n")
    capsys.readouterr()
    eval_.main([str(folder), "--text-file", str(tmp_path / "f.txt")])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        [rows[0][1], f"{rows[0][0]:.4f}", text] for rows, text in zip(found, texts, strict=True)
    ]
    eval_.main([str(folder), "--text", texts[0]])
    first = capsys.readouterr().out.splitlines()[0].split()
    # Alone, a text is computed in another shape, which may round otherwise.
    assert float(first[0]) == pytest.approx(float(lines[0][1]), abs=2e-4)
    assert first[2] == f"({lines[0][0]})"
    (tmp_path / "f.txt").write_text("a \u2028 film\r\nx\x0by\n")  # two lines
    eval_.main([str(folder), "--text-file", str(tmp_path / "f.txt")])
    assert len(capsys.readouterr().out.split("\n")) == 2 + 1
    for content, message in (
        (b"a\nb\tc\n", "f.txt:2: the task takes 1 text(s)"),
        (b"caf\xe9\n", "f.txt is not UTF-8: 'utf-8' codec"),
    ):
        (tmp_path / "f.txt").write_bytes(content)
        assert message in fails(eval_.main, [folder, "--text-file", tmp_path / "f.txt"])


def test_no_texts_have_no_answers(finished):
    assert eval_.answers(load_run(finished), []) == []


def test_texts_that_are_cut_are_counted(run, glue, tmp_path, capsys):
    """With --length 8, [CLS] and [SEP] leave room for six words."""
    folder, _ = run("--length", 8, "--evals", 1, steps=1)
    out = capsys.readouterr().out
    for split in ("train", "dev"):
        rows = (glue / "movies" / f"{split}.tsv").read_text().splitlines()[1:]
        cut = sum(len(row.split()) - 1 > 6 for row in rows)  # the label is the last word
        assert cut > 0 and f"--length 8 cuts {cut} of {len(rows)} {split} texts\n" in out
    (tmp_path / "f.txt").write_text("a good film\n" + "a very good film " * 2 + "\n")
    eval_.main([str(folder), "--text-file", str(tmp_path / "f.txt")])
    said = capsys.readouterr()
    assert said.err == "--length 8 cuts 1 of 2 given texts\n" and len(said.out.splitlines()) == 2
    eval_.main([str(folder), "--text", "a good film"])
    assert capsys.readouterr().err == ""


def labelled(labels):
    """A dev set of these labels."""
    return {"dev": data.Examples([], [], labels, 8)}


def test_guessing_by_hand():
    dev = labelled([0] * 60 + [1] * 40)  # two standard errors of 0.6 are 0.098
    (said,) = guessing({"accuracy": 0.69}, dev)
    assert "the commonest answer alone has accuracy 0.6000" in said
    for metrics in ({"accuracy": 0.70, "f1": 0.0}, {"mcc": 0.0}):
        assert list(guessing(metrics, dev)) == []
    for labels in ([0, 0, 1, 1], [1] * 9):
        assert list(guessing({"accuracy": 1.0}, labelled(labels))) == []


@pytest.mark.parametrize(("reached", "shown"), [(0.495, False), (0.48, True), (0.52, True)])
def test_a_density_that_training_missed_is_shown(finished, reached, shown):
    result = json.loads((finished / "result.json").read_text())  # of a sparsity of 0.5
    lines = list(summary(result | {"reached": reached}, finished, [], labelled([0, 1])))
    line = f"the training mask keeps a share of {reached:.4f}, for a sparsity of 0.5"
    assert (line in lines) == shown


def test_a_result_that_is_a_guess_is_called_one(finished, monkeypatch, capsys):
    """The result is handed in, because rounding decides whether a short run only guesses."""
    result = json.loads((finished / "result.json").read_text())
    dev = labelled([0, 1] * 20)
    for value, guess in ((0.5, True), (1.0, False)):
        *_, last = summary(result | {"final": {"accuracy": value}}, finished, [], dev)
        assert last.startswith("the model only guesses") == guess

        # eval.py says the same. Its dev set has 20 texts of each class.
        monkeypatch.setattr(eval_, "evaluate", lambda *_, value=value: {"accuracy": value})
        eval_.main([str(finished)])
        said = capsys.readouterr().out
        assert f"dev (40 examples): accuracy {value:.4f}\n" in said
        assert said.splitlines()[-1].startswith("the model only guesses") == guess


def test_the_seed_is_the_one_that_help_names(capsys):
    with pytest.raises(SystemExit):
        eval_.parse_args(["--help"])
    assert "for the samples (0)" in capsys.readouterr().out
    assert eval_.parse_args(["RUN", "--text", "once"]).seed == 0
