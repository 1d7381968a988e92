"""data.py: readers and their traps, and batches."""

import dataclasses
import json
import re

import numpy as np
import pytest
from conftest import rows_of, write_tokenizer
from tokenizers import Tokenizer, models, normalizers

import data
from data import RECIPE, TASKS, Task, batch_rows, collate, read_rows, training_batches
from model import label_word_ids, load_backbone
from plumbing.checkpoints import PORTION, cutting_tokenizer

RTE = TASKS["rte"]


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- readers ---


def test_columns_are_found_by_name_and_quotes_are_ordinary(tmp_path):
    text = "label\tsentence2\tindex\tsentence1\n"
    text += 'entailment\tb "x\t0\ta\u2028a\nnot_entailment\t"d\t1\tc'
    texts, labels = read_rows(write(tmp_path / "f", text), RTE)
    assert texts == [("a\u2028a", 'b "x'), ("c", '"d')] and labels == [
        1,
        0,
    ]  # the last line has no newline


def test_byte_order_mark_and_crlf(tmp_path):
    text = "\ufeffsentence\tlabel\r\nfine\t1\r\n"
    assert read_rows(write(tmp_path / "f", text), TASKS["sst2"]) == ([("fine",)], [1])


def test_headers_of_the_other_tasks(tmp_path):
    parses = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse".split()
    head = [
        "index",
        "promptID",
        "pairID",
        "genre",
        *parses,
        "sentence1",
        "sentence2",
        "label1",
        "gold_label",
    ]
    row = [*"0123", *["(x)"] * 4, "A man", 'a "woman', "neutral", "contradiction"]
    rows = "\t".join(head) + "\n" + "\t".join(row) + "\n"
    assert read_rows(write(tmp_path / "f", rows), TASKS["mnli"]) == ([("A man", 'a "woman')], [0])
    rows = "index\tquestion\tsentence\tlabel\n0\tWho\tHe\tentailment\n"
    assert read_rows(write(tmp_path / "f", rows), TASKS["qnli"]) == ([("Who", "He")], [1])


def test_recipes_are_those_that_were_published():
    """A number that changes here changes what everybody's next run is compared with."""
    # Jiang et al., ACL 2023. The longest input, the final lambda and batches of 32 or 64 are the
    # paper's. In its code the density falls over 0.59 (MNLI) or 0.56 (QQP) of the steps: 0.6 here.
    # Weights beside a mask and dense ones learn at 3e-5, and matrices decay by 0.01, as BERT's
    # authors have it. Twenty evaluations are ours.
    smp = {
        "batch": 32,
        "length": 128,
        "ramp": 0.6,
        "penalty": 400.0,
        "dropout": True,
    }
    smp |= {"weight_lr": 3e-5, "decay": 0.01, "evals": 20, "model": "bert-base-uncased"}
    epochs = {"rte": 100, "wnli": 60}  # small data sets; wnli is not in the paper
    expected = {name: smp | {"epochs": number} for name, number in epochs.items()}
    expected |= {
        name: smp | {"epochs": 12, "batch": 64} for name in ("sst2", "qnli", "mnli")
    }

    # Our own, for minutes on a CPU.
    movies = {
        "epochs": 1,
        "batch": 16,
        "length": 64,
        "ramp": 0.9,
        "penalty": 800.0,
        "temperature": 4.0,
    }
    movies |= {"dropout": False, "weight_lr": 1e-4, "decay": 0.01, "evals": 4, "model": "minilm"}
    expected["movies"] = movies
    assert {name: RECIPE | TASKS[name].recipe for name in expected} == expected
    assert {
        name: task.words
        for name, task in TASKS.items()
        if name in ("rte", "mnli", "sst2")
    } == {
        "rte": {"not_entailment": "no", "entailment": "yes"},
        "mnli": {"contradiction": "no", "neutral": "maybe", "entailment": "yes"},
        "sst2": {"0": "terrible", "1": "great"},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", ":2: 3 columns instead of 4"),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n\n",
            ":3: 1 columns instead of 4",
        ),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n",
            ":2: unknown label 'yes'; .* not_entailment, entail",
        ),
        ("index\tsentence1\tlabel\n0\ta\tentailment\n", ":1: 0 columns 'sentence2'"),
        ("index\tsentence1\tsentence2\tlabel\n", "holds no examples"),
        ("", "0 columns 'sentence1'"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    path = write(tmp_path / "dev.tsv", content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_rows(path, RTE)


# --- tokenising and batches ---


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    return cutting_tokenizer(tmp_path, 7)


def test_pairs_are_cut_at_the_longer_one_and_not_padded(tokenizer):
    e = data.encode(
        [("good", "bad film was very dull fun"), ("good", "unhappy")], [0, 1], tokenizer
    )
    tokens = [[tokenizer.id_to_token(t) for t in ids] for ids in e.ids]
    assert tokens == [
        "[CLS] good [SEP] bad film was [SEP]".split(),
        "[CLS] good [SEP] un ##happ ##y [SEP]".split(),
    ]
    assert [list(types) for types in e.types] == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert e.cut == 1  # the second fits just so


def test_cut_texts_are_counted_over_all_portions(tokenizer):
    """[CLS] and [SEP] leave room for five tokens."""
    texts = [("good " * (n % 8),) for n in range(3 * PORTION + 1)]
    e = data.encode(texts, [0] * len(texts), tokenizer)
    assert [len(ids) for ids in e.ids] == [min(n % 8, 5) + 2 for n in range(len(texts))]
    assert e.cut == sum(n % 8 > 5 for n in range(len(texts)))


@pytest.mark.parametrize(
    ("task", "part"), [("movies", "single"), ("rte", "single"), ("rte", "pair")]
)
def test_a_tokenizer_that_puts_nothing_before_a_text_is_refused(make_model, task, part):
    """A pair has a template of its own, which counts for tasks of two texts."""
    folder = make_model()
    stored = json.loads((folder / "tokenizer.json").read_text())
    bare = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    stored["post_processor"][part] = bare[:1] if part == "single" else bare
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    if (task, part) == ("rte", "single"):  # no single text is read
        load_backbone(folder, TASKS[task], 16)
    else:
        with pytest.raises(ValueError, match="tokenizer.json puts no .CLS. first"):
            load_backbone(folder, TASKS[task], 16)


def test_a_length_without_room_for_every_text_is_refused(make_model):
    """[CLS] a [SEP] b [SEP]: five tokens hold a pair, and three a single text."""
    folder = make_model()
    with pytest.raises(ValueError, match="--length 4 leaves no room for every text"):
        load_backbone(folder, TASKS["rte"], 4)
    load_backbone(folder, TASKS["rte"], 5)
    load_backbone(folder, TASKS["movies"], 4)


def test_two_labels_need_two_words(tokenizer):
    with pytest.raises(ValueError, match="label word 'yes' .*not one token of its own"):
        label_word_ids(["yes", "no", "yes"], tokenizer)


@pytest.mark.parametrize("mark", ["\u0120", "\u2581"])  # RoBERTa's, and SentencePiece's
def test_a_words_mark_of_the_space_before_it_is_no_part_of_it(mark):
    vocab = {f"{mark}yes": 0, "yes": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", mark)
    assert label_word_ids(["yes"], tokenizer) == [0]


def test_columns_by_number_in_a_file_of_any_width(tmp_path):
    task = Task("mine", (1,), 0, {"0": "no", "1": "yes"}, ("accuracy",))
    read = read_rows(write(tmp_path / "f", "0\ta film\n1\tb\n"), task)
    assert read == ([("a film",), ("b",)], [0, 1])
    with pytest.raises(ValueError, match="f:2: 3 columns instead of 2"):
        read_rows(write(tmp_path / "f", "0\ta\n1\tb\tc\n"), task)
    with pytest.raises(ValueError, match="f:1: 1 columns, and the task reads column 1"):
        read_rows(write(tmp_path / "f", "0\n"), task)


def test_columns_by_name_and_by_number(tmp_path):
    """A name says that there is a header. A number counts its columns."""
    path = write(tmp_path / "f", "id\ttext\tlabel\n7\ta film\t1\n8\tb\t0\n")
    for text, label in ((("text",), 2), ((1,), "label")):
        task = Task("mine", text, label, {"0": "no", "1": "yes"}, ("accuracy",))
        assert read_rows(path, task) == ([("a film",), ("b",)], [1, 0])
    with pytest.raises(ValueError, match="f:1: 3 columns, and the task reads column 3"):
        read_rows(path, Task("mine", ("text",), 3, {"0": "no", "1": "yes"}, ("accuracy",)))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    rows = "label\tsentence\tlabel\n1\ta\t0\n"
    with pytest.raises(ValueError, match="2 columns 'label' in the header"):
        read_rows(write(tmp_path / "f", rows), TASKS["sst2"])


def test_scores_have_the_range_that_the_task_says(tmp_path):
    free = Task("mine", ("text",), "score", {"score": "yes"}, ("pearson",))
    file = write(tmp_path / "f", "text\tscore\na\t-7.5\nb\t1e3\n")
    assert read_rows(file, free)[1] == [-7.5, 1000.0]
    with pytest.raises(ValueError, match="f:2: '-7.5' is not a score from 0 to 5"):
        read_rows(file, dataclasses.replace(free, scores=(0, 5)))
    for score in ("nan", "inf", "1e30"):  # the square of 1e30 is infinite in float32
        with pytest.raises(ValueError, match=f"f:2: '{score}' is not a score"):
            read_rows(write(tmp_path / "f", f"text\tscore\na\t{score}\n"), free)


def test_label_words_must_be_one_token(tokenizer):
    assert label_word_ids(RTE.words.values(), tokenizer) == [5, 6]
    for word in ("unhappy", "nowhere"):
        with pytest.raises(ValueError, match=f"label word '{word}'"):
            label_word_ids(["no", word], tokenizer)


def examples(n=203, seed=0):
    lengths = np.random.default_rng(seed).integers(3, 30, n)
    ids = [[i + 1] * k for i, k in enumerate(lengths)]
    return data.Examples(ids, [[0] * k for k in lengths], list(range(n)), 30)


def test_every_example_comes_once_an_epoch_in_batches_of_like_length():
    e = examples()
    batches = batch_rows(e, 4, np.random.default_rng(0))
    assert sorted(np.concatenate(batches)) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [4] * 50
    spread = [np.ptp([len(e.ids[r]) for r in rows]) for rows in batches]
    assert np.mean(spread) < 2  # 27 lengths over 51 batches
    assert (
        np.concatenate(batch_rows(e, 4)).tolist()
        == np.argsort([len(i) for i in e.ids], kind="stable").tolist()
    )


def test_training_order_follows_the_seed_and_changes_with_the_epoch():
    def labels(seed, steps=104):
        return [y.tolist() for [(_, y, *_)] in training_batches(examples(), 4, steps, seed)]

    assert labels(1) == labels(1) != labels(2)
    assert len(labels(1)) == 104
    assert labels(1)[:51] != labels(1)[51:102] and sorted(sum(labels(1)[51:102], [])) == list(
        range(203)
    )


@pytest.mark.parametrize("kind", [list, rows_of])
@pytest.mark.parametrize(("limit", "width"), [(9, 8), (7, 7)])
def test_collate_pads_to_a_multiple_of_four_within_the_limit(limit, width, kind):
    ids, types = kind([[7, 8], [5] * 6, [9]]), kind([[0, 1], [1] * 6, [1]])
    e = data.Examples(ids, types, [0, 1, 0], limit)
    (ids, types, mask), labels = collate(e, [0, 1])
    assert ids.tolist() == [[7, 8] + [0] * (width - 2), [5] * 6 + [0] * (width - 6)]
    assert types.tolist() == [[0, 1] + [0] * (width - 2), [1] * 6 + [0] * (width - 6)]
    assert mask.tolist() == [
        [1] * 2 + [0] * (width - 2),
        [1] * 6 + [0] * (width - 6),
    ] and labels.tolist() == [0, 1]
    assert collate(e, [2])[0][0].shape == (1, 4)


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_processes_and_parts_share_a_batch_without_overlap(processes, parts, size, as_process):
    rows, split = np.arange(100, 100 + size), []
    for rank in range(processes):
        as_process(rank, processes)
        split.append(data.split_batch(rows, parts))
    assert {len(s) for s in split} == {parts}  # or one process would wait for the others for ever
    taken = [r for s in split for part, share in s if share for r in part]
    assert sorted(taken) == rows.tolist()
    for s in split:
        for part, share in s:
            assert share == (len(part) / size if share else 0) and len(part) > 0
    assert sum(share for s in split for _, share in s) == pytest.approx(1)


def test_all_parts_of_a_batch_have_one_width(as_process):
    batches = []
    for rank in (0, 1):
        as_process(rank, 2)
        batches.append(list(training_batches(examples(), 5, 51, 0, parts=2)))
    for parts, other_parts in zip(*batches, strict=True):
        assert len({part.inputs.shape[2] for part in parts + other_parts}) == 1
