"""extras.squad: reading, windows, decoding and metrics by hand, and a run from end to end."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import load_model, write_tokenizer
from tokenizers import normalizers

import data
import eval as eval_
import train
from extras import squad
from plumbing import cli, fetch
from plumbing.checkpoints import cutting_tokenizer
from plumbing.summary import cut_texts

CONTEXT = "the film was good , it was fun . a bad film is dull and very bad"


def question(text, answer, at=None, number=0):
    at = CONTEXT.index(answer) if at is None else at
    return {"id": f"q{number}", "question": text, "answers": [{"answer_start": at, "text": answer}]}


def write_squad(path, questions, context=CONTEXT):
    path.parent.mkdir(parents=True, exist_ok=True)
    articles = [
        {"title": "t", "paragraphs": [{"context": context, "qas": questions}]},
        {"title": "no paragraphs"},
    ]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return cutting_tokenizer(tmp_path, 16)


def test_constants_are_those_that_were_published():
    """Windows of 384 share 128 tokens. Questions have 64, answers 30, as in BERT's code.

    Ten epochs are as in Jiang et al., who train 20 at 3 %.
    """
    found = (squad.STRIDE, squad.LONGEST_QUESTION, squad.LONGEST_ANSWER, squad.N_BEST)
    assert found == (128, 64, 30, 20)
    expected = {"epochs": 10, "length": 384, "ramp": 0.82}
    assert data.RECIPE | data.TASKS["squad"].recipe == data.RECIPE | expected


def windows_of(tokenizer, *questions, length=16, folder):
    return squad.make_windows(
        squad.read_squad(write_squad(folder / "s.json", questions))[0], tokenizer, length
    )


def test_windows_cover_the_paragraph_and_overlap_by_the_stride(tokenizer, tmp_path):
    w = windows_of(tokenizer, question("is it fun", "fun"), folder=tmp_path)
    assert all(len(ids) <= 16 for ids in w.ids) and set(w.owner) == {0} and len(w) > 2
    parts = [[tuple(s) for s in spans if s[0] >= 0] for spans in w.spans]
    words = [(0, 3), (4, 8), (9, 12), (13, 17)]
    assert parts[0][:4] == words
    # A third of 16 is less than the stride of long windows.
    assert all(a[-5:] == b[:5] for a, b in zip(parts, parts[1:], strict=False))
    assert parts[-1][-1] == (len(CONTEXT) - 3, len(CONTEXT))
    for spans, (start, end), ids in zip(w.spans, w.labels, w.ids, strict=True):
        if (start, end) != (0, 0):
            assert CONTEXT[spans[start][0] : spans[end][1]] == "fun"
        assert ids[:5] == w.ids[0][:5] and (spans[:5] == -1).all()  # [CLS] is it fun [SEP]
    assert sum(labels != (0, 0) for labels in w.labels) >= 1


def test_label_needs_the_whole_answer():
    spans = np.array([[-1, -1], [0, 3], [4, 8], [9, 12]])
    assert squad.label(spans, (4, "film was")) == (2, 3)
    assert squad.label(spans, (5, "il")) == (2, 2)  # within a token
    assert squad.label(spans, (9, "was good")) == squad.label(spans, (20, "x")) == (0, 0)


def test_decoding_stays_in_the_paragraph_in_order_and_short():
    spans = np.array([[-1, -1], [-1, -1], [0, 3], [4, 8], [9, 12], [13, 17]])
    logits = np.zeros((8, 2))  # two rows of padding
    logits[1] = 99  # the question
    logits[[6, 7]] = 99
    logits[4, 0], logits[2, 1], logits[5, 1] = 5, 9, 3  # best end before best start
    assert squad.best_span(logits.T, spans) == (9, 0, 3)  # 0 + 9 beats 5 + 3
    logits[2, 1] = 7
    assert squad.best_span(logits.T, spans) == (8, 9, 17)
    assert squad.best_span(logits.T, spans, longest=1) == (7, 0, 3)
    assert squad.best_span(logits.T, np.full((6, 2), -1))[0] == -np.inf


def test_decoding_equals_a_search_of_all_spans():
    rng = np.random.default_rng(0)
    for _ in range(30):
        spans = np.array([[-1, -1]] * 3 + [[i, i + 1] for i in range(12)])
        logits = rng.normal(size=(15, 2))
        every = [
            (logits[i, 0] + logits[j, 1], i - 3, j - 2)
            for i in range(3, 15)
            for j in range(i, min(i + 4, 15))
        ]
        assert squad.best_span(logits.T, spans, longest=4) == pytest.approx(max(every))


def test_perfect_logits_give_perfect_scores_and_the_best_window_wins(tokenizer, tmp_path):
    asked = [question("is it fun", "it was fun"), question("was it", "very bad", number=1)]
    w = windows_of(tokenizer, *asked, folder=tmp_path)
    logits = torch.full((len(w), 2, 16), -5.0)
    for n, (start, end) in enumerate(w.labels):
        logits[n, 0, start] = logits[n, 1, end] = 5.0
    texts, null = squad.answers(logits, w)
    assert texts == ["it was fun", "very bad"]
    # [CLS] scores -5 twice, or 5 twice where a window lacks the answer; the span scores 10.
    assert null == pytest.approx(1 / (1 + np.exp(20)))
    assert w.score(logits, ()) == {"f1": 1.0, "em": 1.0}


def test_metrics_by_hand():
    assert squad.normalise("The  Film, was A-ok!") == "film was aok"
    assert squad.f1("the good film", "Good, old film") == pytest.approx(2 * 2 / (2 + 3))
    assert squad.f1("x", "y") == 0.0
    questions = [
        {"context": "ab cd", "answers": a} for a in ([(0, "AB"), (3, "xx")], [(0, "ab cd")])
    ]
    w = squad.Windows([[1]], [[0]], [(0, 0)], 4, [0, 1], [np.array([[0, 2]])] * 2, questions)
    assert w.score(torch.zeros(2, 2, 4), ()) == {
        "f1": pytest.approx((1 + 2 / 3) / 2),
        "em": 0.5,
    }


def test_misplaced_answers_are_counted_not_fatal(tokenizer, tmp_path, capsys):
    for part, kept in (("dev", 2), ("train", 1)):  # what stands elsewhere would teach nonsense
        asked = [question("is it", "fun"), question("was it", "fun", at=0)]
        write_squad(tmp_path / "squad" / f"{part}-v1.1.json", asked)
        assert data.load_split("squad", part, tmp_path, tokenizer).num_questions() == kept
        out = capsys.readouterr().out
        assert (
            "answers that are not where the file says: 1" in out
            and "articles without paragraphs: 1" in out
        )
        assert ("left out 1 of 2 questions" in out) == (kept == 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not valid JSON"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', "KeyError: 'qas'"),
        ('{"data": {}}', "not a SQuAD file: it has no list"),
        ('{"data": []}', "holds no questions"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(ValueError, match=f"f.json.*{message}") as raised:
        squad.read_squad(tmp_path / "f.json")
    assert str(raised.value).count("f.json") == 1


@pytest.mark.parametrize("length", [16, 17, 18, 30])
def test_a_long_question_is_cut_and_windows_share_a_third(tokenizer, tmp_path, length):
    asked = question("is it fun " * 40, "fun"), question("is it", "dull")
    w = windows_of(tokenizer, *asked, length=length, folder=tmp_path)
    assert (w.long_questions, w.cut) == (1, 0)
    assert max(map(len, w.ids)) == length and w.num_questions() == 2
    sizes = {types.index(1) - 2 for types in w.types}  # of the questions, without [CLS] and [SEP]
    assert sizes == {length // 3, 2}
    parts = [
        [tuple(s) for s in spans if s[0] >= 0]
        for spans, owner in zip(w.spans, w.owner, strict=True)
        if not owner
    ]
    assert all(
        a[-(length // 3) :] == b[: length // 3] for a, b in zip(parts, parts[1:], strict=False)
    )


def test_long_questions_are_noted_once_and_are_no_cut_texts(tokenizer, tmp_path, capsys):
    """--length has not cut them: BERT's code keeps 64 tokens of a question at any length."""
    asked = question("is it fun " * 40, "fun"), question("is it", "dull")
    write_squad(tmp_path / "squad" / "dev-v1.1.json", asked)
    windows = data.load_split("squad", "dev", tmp_path, tokenizer)
    assert "questions longer than 5 tokens, which are cut: 1\n" in capsys.readouterr().out
    assert list(cut_texts(16, {"dev": windows})) == []
    write_squad(tmp_path / "squad" / "dev-v1.1.json", asked[1:])
    data.load_split("squad", "dev", tmp_path, tokenizer)
    assert "which are cut" not in capsys.readouterr().out


def test_too_short_windows_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="--length 15: question and paragraph need 16 tokens"):
        windows_of(tokenizer, question("is it", "fun"), length=15, folder=tmp_path)


@pytest.mark.parametrize(
    ("context", "answer", "found"),
    [
        ("the film was good", " film was ", "film was"),
        ("the film was good", "film\u200b", None),  # stands nowhere
        ("the \ufffdfilm\ue000 was", "\ufffdfilm\ue000", "film"),
        ("the film\u200b was good", "film\u200b", "film"),
        ("the fil\u0301m was baḋ", "baḋ", "baḋ"),
        ("the cafe\u0301 was good", "cafe\u0301", "cafe"),
        ("the film was good", "   ", None),
        ("the film was good", "", None),
    ],
)
def test_answers_that_tokens_do_not_cover_to_the_end(tokenizer, tmp_path, context, answer, found):
    tokenizer.normalizer = normalizers.BertNormalizer()
    at = max(context.find(answer), 0) if answer.strip() else 3
    asked = [
        question("is it", answer, at),
        question("is it", "was", context.index("was"), number=1),
    ]
    questions, _ = squad.read_squad(write_squad(tmp_path / "s.json", asked, context))
    w = squad.make_windows(questions, tokenizer, 16, training=True)
    assert w.num_questions() == 1 + (found is not None)
    if found:
        start, end = w.labels[0]
        assert context[w.spans[0][start][0] : w.spans[0][end][1]] == found


def test_a_training_file_without_one_usable_answer(tokenizer, tmp_path):
    write_squad(tmp_path / "squad" / "train-v1.1.json", [question("is it", "fun", at=0)])
    with pytest.raises(ValueError, match="train-v1.1.json: no answer is where the file says"):
        data.load_split("squad", "train", tmp_path, tokenizer)


def test_loss_is_the_mean_of_start_and_end_and_padding_gets_nothing(make_model):
    model = load_model(make_model(), [5, 6], every_token=True).eval()
    ids, mask = (
        torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    )
    logits = model(ids, torch.zeros_like(ids), mask)
    assert logits.shape == (2, 2, 4) and (logits[1, :, 3] == -1e4).all()
    expected = model.word_logits(model.bert(ids, torch.zeros_like(ids), mask), [5, 6])
    assert torch.allclose(logits.transpose(1, 2)[mask.bool()], expected[mask.bool()])
    where = torch.tensor([[1, 2], [0, 1]])
    logs = [-logits[b, side].log_softmax(0)[where[b, side]] for b in range(2) for side in range(2)]
    assert train.task_loss(logits, where).item() == pytest.approx(sum(logs).item() / 4, rel=1e-5)
    taught = logits.flip(0)
    pairs = [(taught[b, side] / 2, logits[b, side] / 2) for b in range(2) for side in range(2)]
    kls = [(t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum() for t, s in pairs]
    both = train.task_loss(logits, where, taught).item()
    assert both == pytest.approx(
        0.5 * sum(logs).item() / 4 + 0.5 * 4 * sum(kls).item() / 4, rel=1e-4
    )


@pytest.mark.parametrize("method", ["smp-s", "finetune"])
def test_a_run_from_end_to_end(make_model, tmp_path, capsys, method):
    asked = [
        question("is it fun", word, number=n)
        for n, word in enumerate(["fun", "dull", "good", "very bad"])
    ]
    for name in ("train", "dev"):
        write_squad(tmp_path / "squad" / f"{name}-v1.1.json", asked)
    out = tmp_path / "run"
    argv = ["--task", "squad", "--model", make_model(), "--data-dir", tmp_path, "--out", out]
    argv += ["--method", method]
    train.main(
        [
            str(a)
            for a in [
                *argv,
                "--steps",
                6,
                "--batch",
                4,
                "--length",
                16,
                "--device",
                "cpu",
                "--evals",
                1,
            ]
        ]
    )
    result = json.loads((out / "result.json").read_text())
    assert result["final"].keys() == {"f1", "em"}
    capsys.readouterr()
    eval_.main([str(out)])
    reported = cli.show(result["final"])
    assert f"{reported}\ntraining reported {reported}" in capsys.readouterr().out
    eval_.main([str(out), "--text", "is it fun", "--pair", CONTEXT])
    assert capsys.readouterr().out.strip() in CONTEXT

    # The official evaluation of v1.1 reads {id: text}. A test file has no answers.
    for one in asked:
        del one["answers"]
    eval_.main([str(out), "--predict", str(write_squad(tmp_path / "test.json", asked))])
    predicted = json.loads((out / "predictions.json").read_text())
    assert list(predicted) == ["q0", "q1", "q2", "q3"] and not (out / "na_prob.json").exists()
    assert all(text in CONTEXT for text in predicted.values())


# --- v2.0: questions without an answer ---


def unanswerable(text, number):
    plausible = [{"answer_start": 0, "text": "the film"}]
    more = {"answers": [], "is_impossible": True, "plausible_answers": plausible}
    return {"id": f"q{number}", "question": text} | more


def read_v2(folder, tokenizer, *questions, split="dev"):
    write_squad(folder / "squad" / f"{split}-v2.0.json", questions)
    return data.load_split("squad2", split, folder, tokenizer)


def test_the_answer_to_an_impossible_question_is_cls(tokenizer, tmp_path):
    asked = question("is it fun", "fun"), unanswerable("was it", 1), question("is it", "x", 0)
    for split, kept in (("dev", 3), ("train", 2)):  # a misplaced answer teaches nothing
        w = read_v2(tmp_path, tokenizer, *asked, split=split)
        assert w.num_questions() == kept
        labels = [[w.labels[i] for i in range(len(w)) if w.owner[i] == q] for q in range(2)]
        assert set(labels[0]) > {(0, 0)} and set(labels[1]) == {(0, 0)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            question("is it", "fun") | {"is_impossible": True},
            "1 answers, and is_impossible is True",
        ),
        (unanswerable("is it", 0) | {"is_impossible": False}, "0 answers, and is_impossible is F"),
    ],
)
def test_contradictions_are_refused(tokenizer, tmp_path, asked, message):
    with pytest.raises(ValueError, match=f"dev-v2.0.json: question q0 has {message}"):
        read_v2(tmp_path, tokenizer, asked)


def test_v1_takes_no_impossible_questions(tokenizer, tmp_path):
    write_squad(tmp_path / "squad" / "dev-v1.1.json", [unanswerable("is it", 7)])
    with pytest.raises(ValueError, match="question q7 has no answer; --task squad2 takes"):
        data.load_split("squad", "dev", tmp_path, tokenizer)


def test_scores_of_both_kinds_by_hand():
    """Five questions about "ab cd", each one window of [CLS], ab and cd."""
    spans = np.array([[-1, -1], [0, 2], [3, 5]])
    given = [[(0, "ab")], [(0, "ab cd")], [], [], [(3, "cd")]]
    questions = [{"context": "ab cd", "answers": answers} for answers in given]
    more = [range(5), [spans] * 5, questions]
    w = squad.PartlyAnswerable([[1]] * 5, [[0]] * 5, [(0, 0)] * 5, 3, *more)
    # The best span is "ab" everywhere, with 2 + 2. The others have 0 and less.
    logits = torch.zeros(5, 2, 3)
    logits[:, :, 1], logits[:, :, 2] = 2.0, -1.0
    logits[:, 0, 0] = torch.tensor([1.0, 3.0, 4.5, 2.0, 6.0])  # minus 4: -3, -1, 0.5, -2, 2
    texts, null = squad.answers(logits, w)
    assert texts == ["ab"] * 5
    assert null == pytest.approx(1 / (1 + np.exp(-np.array([-3, -1, 0.5, -2, 2]))))
    # By null: 0 (F1 1, EM 1), 3 (none is right), 1 (F1 2/3, EM 0), 2 (none is right), 4 (F1 0).
    # Of five, 0, 1, 2, ... answered have F1 2, 3, 2, 2 2/3, 1 2/3, 1 2/3; EM 2, 3, 2, 2, 1, 1.
    found = w.score(logits, ())
    expected = {"best_f1": 3 / 5, "best_em": 3 / 5, "threshold": null[0]}
    # Above 0.5 are 2 and 4: those answered are 0, 1 and 3.
    expected |= {"f1": (1 + 2 / 3 + 1) / 5, "em": 2 / 5}
    # At the threshold only 0 is answered.
    expected |= {"has_answer_f1": 1 / 3, "no_answer_f1": 1.0}
    assert found == pytest.approx(expected)


def test_of_several_windows_the_lowest_cls_counts():
    spans = np.array([[-1, -1], [0, 2], [3, 5]])
    questions = [{"context": "ab cd", "answers": []}]
    more = [[0, 0], [spans] * 2, questions]
    w = squad.PartlyAnswerable([[1]] * 2, [[0]] * 2, [(0, 0)] * 2, 3, *more)
    logits = torch.tensor([[[5.0, 0, 1], [5, 0, 1]], [[1, 3, 0], [1, 3, 0]]])
    texts, null = squad.answers(logits, w)  # the span with 6 is in the second, and so is 1 + 1
    assert texts == ["ab"] and null == pytest.approx([1 / (1 + np.exp(4))])


def test_the_threshold_equals_a_search_of_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        null = rng.integers(1, 8, 12) / 8  # some are equal
        right = rng.integers(0, 2, 12).astype(bool)
        given = np.where(right, 0, rng.random(12))
        every = [
            (np.where(null > threshold, right, given).mean(), -threshold)
            for threshold in (0, *null)
        ]
        score, threshold = squad.best_threshold(null, given, right)
        assert score == pytest.approx(max(every)[0])
        assert np.where(null > threshold, right, given).mean() == pytest.approx(score)


def test_an_article_is_an_exact_match_of_an_article():
    """Normalised, both texts are empty. The official evaluation of v2.0 gives them an F1 of 1."""
    questions = [{"context": "the ab", "answers": [(0, "the")]}]
    spans = np.array([[-1, -1], [0, 3], [4, 6]])
    w = squad.PartlyAnswerable([[1]], [[0]], [(0, 0)], 3, range(1), [spans], questions)
    logits = torch.zeros(1, 2, 3)
    logits[:, :, 1] = 9.0  # the span is "the"
    found = w.score(logits, ())
    assert (found["f1"], found["em"], found["best_f1"]) == (1, 1, 1)



def test_a_run_of_v2_from_end_to_end(make_model, tmp_path, capsys):
    asked = [question("is it fun", word, number=n) for n, word in enumerate(["fun", "dull"])]
    asked += [unanswerable("was it", n) for n in (2, 3)]
    for name in ("train", "dev"):
        path = write_squad(tmp_path / "squad" / f"{name}-v2.0.json", asked)
    out = tmp_path / "run"
    flags = ["--steps", 6, "--batch", 4, "--length", 16, "--device", "cpu", "--evals", 1]
    argv = ["--task", "squad2", "--model", make_model(), "--data-dir", tmp_path, "--out", out]
    train.main([str(a) for a in [*argv, *flags]])
    final = json.loads((out / "result.json").read_text())["final"]
    assert 0 <= final["threshold"] <= 1 and final["best_f1"] >= max(final["f1"], 0.5)
    capsys.readouterr()
    eval_.main([str(out)])
    assert f"dev (4 examples): {cli.show(final)}" in capsys.readouterr().out
    eval_.main([str(out), "--text", "is it fun", "--pair", CONTEXT])
    assert re.fullmatch(r".+ \(no answer: 0\.\d{4}\)\n", capsys.readouterr().out)

    # The predictions have the reported score, by the official rule.
    eval_.main([str(out), "--predict", str(path)])
    predicted = json.loads((out / "predictions.json").read_text())
    null = json.loads((out / "na_prob.json").read_text())
    assert all((text == "") == (null[key] > final["threshold"]) for key, text in predicted.items())
    scores = [squad.f1(predicted[f"q{n}"], word) for n, word in enumerate(["fun", "dull"])]
    scores += [predicted[f"q{n}"] == "" for n in (2, 3)]
    assert np.mean(scores) == pytest.approx(final["best_f1"])


def test_download_is_checked(server, tokenizer, monkeypatch):
    files, _ = server
    content = json.dumps(
        {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [question("is it", "fun")]}]}]}
    ).encode()
    monkeypatch.setitem(squad.MD5, "dev-v1.1.json", hashlib.md5(content).hexdigest())
    files["/squad/dev-v1.1.json"] = content[:-1]
    with pytest.raises(ValueError, match="dev-v1.1.json: md5"):
        data.load_split("squad", "dev", None, tokenizer)
    assert not list(fetch.cache().rglob("*.json"))
    files["/squad/dev-v1.1.json"] = content
    assert len(data.load_split("squad", "dev", None, tokenizer).questions) == 1
    files.clear()
    assert len(data.load_split("squad", "dev", None, tokenizer).questions) == 1
