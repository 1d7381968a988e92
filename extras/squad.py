"""SQuAD: find the answer to a question as a span of a paragraph.

The model scores two label words at every token, one for the start of the answer and one for its
end. In v2.0, a third of the questions has no answer: theirs is the span from [CLS] to [CLS]. Data
and metrics follow Rajpurkar et al., EMNLP 2016 and ACL 2018. Windows over long paragraphs and
n-best decoding follow Devlin et al. 2019.

    python train.py --task squad   # v1.1
    python train.py --task squad2  # v2.0
    python eval.py RUN --predict dev-v2.0.json
"""

import os
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data import TASKS, Examples, Task
from extras.glue import fetch_file, write_beside
from plumbing import fetch
from plumbing.checkpoints import encode_texts
from plumbing.files import json_bytes, read_json
from plumbing.progress import progress
from plumbing.rows import Rows

URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
MD5 = {
    "train-v1.1.json": "981b29407e0affa3b1b156f72073b945",
    "dev-v1.1.json": "3e85deb501d4e538b6bc56f786231552",
    "train-v2.0.json": "62108c273c268d70893182d5cf8df740",
    "dev-v2.0.json": "246adae8b7002f8679c027697b0b7cf8",
}
# All in tokens.
STRIDE = 128  # neighbouring windows share so many, or a third of a short window
LONGEST_QUESTION = 64  # longer questions are cut, in a short window to a third of it
SHORTEST_WINDOW = 16  # a third of fewer leaves no room for the special tokens
LONGEST_ANSWER = 30

N_BEST = 20  # candidates for the start, and for the end


@dataclass(frozen=True)
class Windows(Examples):
    """Examples that are windows: a question and a part of its paragraph.

    The label is the (start, end) token of the answer. It is (0, 0), which is [CLS], if the window
    does not contain the answer, or if there is none.
    """

    owner: list  # per window, the index of its question
    # Per window [S, 2]: the characters of the paragraph where each token begins and ends. Both are
    # -1 for the tokens of the question, and for special ones.
    spans: list
    questions: list  # dicts, see read_paragraph
    long_questions: int = 0  # how many questions were cut

    def num_questions(self):
        return len(self.questions)

    def reduce_logits(self, logits, labels):
        """Pad logits [B, 2, S] to the longest S that is allowed, so that batches can be joined."""
        return F.pad(logits, (0, self.limit - logits.shape[2]), value=-1e4)

    def score(self, logits, metrics):
        """{"f1": F1, "em": exact match}, both from 0 to 1, averaged over the questions.

        A question with several true answers counts the one that fits best.
        """
        texts, _ = answers(logits, self)
        f1_mean, em_mean = grades(texts, self.questions).mean(0)
        return {"f1": float(f1_mean), "em": float(em_mean)}


class PartlyAnswerable(Windows):
    """Windows of questions of which some have no answer, as in SQuAD v2.0."""

    def score(self, logits, metrics):
        """-> {metric: number from 0 to 1}, means over the questions.

        f1, em: a question gets no answer where that is more probable than 0.5. best_f1, best_em:
        where it is more probable than a threshold, each with the best one for these questions, as
        the official evaluation finds it. threshold: that of best_f1. has_answer_f1, no_answer_f1:
        F1 at this threshold, of the questions with and without an answer.
        """
        texts, na_prob = answers(logits, self)
        impossible = np.array([not question["answers"] for question in self.questions])  # [Q]
        scores = grades(texts, self.questions)  # [Q, 2]: F1 and exact match
        # An exact match has an F1 of 1, even of texts without a word to share (official v2.0).
        scores[:, 0] = scores.max(1)
        best_f1, threshold = best_threshold(na_prob, scores[:, 0], impossible)
        best_em, _ = best_threshold(na_prob, scores[:, 1], impossible)
        numbers = {"best_f1": best_f1, "best_em": best_em, "threshold": threshold}

        # To give no answer scores 1 where there is none, and 0 elsewhere.
        halfway = np.where(na_prob[:, None] > 0.5, impossible[:, None], scores)  # [Q, 2]
        numbers["f1"], numbers["em"] = halfway.mean(0)
        tuned = np.where(na_prob > threshold, impossible, scores[:, 0])  # [Q]
        numbers["has_answer_f1"] = tuned[~impossible].sum() / max((~impossible).sum(), 1)
        numbers["no_answer_f1"] = tuned[impossible].sum() / max(impossible.sum(), 1)
        return {name: float(value) for name, value in numbers.items()}


# --- files ----------------------------------------------------------------------------------------


def fetch_squad(task, split):
    """Task.fetch: download a split of SQuAD into the cache.

    Raises ValueError if its MD5 is not the known one, and OSError if the server cannot be reached.
    """
    name = task.file.format(split)
    path = fetch.cache() / "glue" / task.folder / name
    base = (os.environ.get("SQUAD_URL") or URL).rstrip("/")
    remedy = f"put it at {path} by hand, or name its folder's parent with --data-dir"
    fetch_file(f"{base}/{name}", path, MD5[name], remedy)


def read_articles(path):
    """Return the list of articles in a SQuAD file. Raises ValueError if it has none."""
    stored = read_json(path)
    if not isinstance(stored.get("data"), list):
        raise ValueError(f"{path} is not a SQuAD file: it has no list of articles under data")
    return stored["data"]


def read_squad(path):
    """Read the questions of a file -> (list of dicts, notes on oddities that are not fatal).

    Raises ValueError that names the file if it is not of SQuAD's form or has no questions.
    """
    articles = read_articles(path)
    questions = []
    empty = 0
    try:
        for article in articles:
            paragraphs = article.get("paragraphs") or []
            empty += not paragraphs
            for paragraph in paragraphs:
                questions += read_paragraph(paragraph)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a SQuAD file ({type(error).__name__}: {error})") from None
    if not questions:
        raise ValueError(f"{path} holds no questions")

    elsewhere = 0
    for question in questions:
        for answer in question["answers"]:
            elsewhere += misplaced(question, answer)
    notes = []
    if elsewhere:
        notes.append(f"{path}: answers that are not where the file says: {elsewhere}")
    if empty:
        notes.append(f"{path}: articles without paragraphs: {empty}")
    return questions, notes


def read_paragraph(paragraph):
    """Yield the questions about a paragraph: {id, question, context, impossible, answers}.

    answers: [(first character, text)]. A test file has none.
    """
    for entry in paragraph["qas"]:
        answers = []
        for answer in entry.get("answers", []):
            answers.append((int(answer["answer_start"]), str(answer["text"])))
        yield {
            "id": str(entry["id"]),
            "question": str(entry["question"]).strip(),
            "context": str(paragraph["context"]),
            "impossible": bool(entry.get("is_impossible", not answers)),
            "answers": answers,
        }


def check_answers(path, questions, kind):
    """Raise ValueError for a question without an answer, unless it says so and kind allows it."""
    for question in questions:
        place = f"{path}: question {question['id']}"
        count = len(question["answers"])
        impossible = question["impossible"]
        if kind is Windows and not count:
            raise ValueError(f"{place} has no answer; --task squad2 takes such files")
        if kind is not Windows and impossible == bool(count):
            raise ValueError(f"{place} has {count} answers, and is_impossible is {impossible}")


def misplaced(question, answer):
    """Whether the paragraph has another text where the answer should be."""
    start, text = answer
    return question["context"][start : start + len(text)] != text


def trimmed(answer):
    """An answer (first character, text) -> where the part that BERT reads begins and ends."""
    start, text = answer
    read = [i for i, character in enumerate(text, start) if not dropped(character)]
    if not read:
        return start, start
    return read[0], read[-1] + 1


def dropped(character):
    """Whether BERT drops a character: space, control, format, or an accent after its letter."""
    return (
        character.isspace()
        or character == "\ufffd"
        or unicodedata.category(character) in ("Mn", "Cc", "Cf", "Co")
    )


def label(spans, answer):
    """The (start, end) token of an answer in a window. (0, 0) if it is not wholly in the window.

    spans [S, 2], see Windows. answer: (first character, text).
    """
    first, last = trimmed(answer)
    begin, end = spans.T  # two of [S]
    with_first = (begin <= first) & (first < end)  # the token of the first character
    with_last = (begin < last) & (last <= end)
    if first < last and with_first.any() and with_last.any():
        return int(with_first.argmax()), int(with_last.argmax())
    return 0, 0


def make_windows(questions, tokenizer, length, training=False, kind=Windows):
    """Cut questions and their paragraphs into Windows of `length` tokens.

    Each is labelled with the first of its answers. In training, a question is left out if it has an
    answer, but none of its windows contains it. kind: Windows or PartlyAnswerable. Raises
    ValueError if the windows are too short.
    """
    if length < SHORTEST_WINDOW:
        raise ValueError(
            f"--length {length}: question and paragraph need {SHORTEST_WINDOW} tokens or more"
        )
    pairs, long_questions = cut_questions(questions, tokenizer, longest_question(length))
    windows = kind(Rows(), Rows(), [], length, [], [], [], long_questions)  # none yet

    tokenizer.enable_truncation(length, stride=min(STRIDE, length // 3), strategy="only_second")
    encoded = zip(questions, encode_texts(tokenizer, pairs), strict=True)
    for question, encoding in progress(encoded, "cutting windows", total=len(questions)):
        # The encoding is the first window, and holds the others.
        add_windows(windows, question, [encoding, *encoding.overflowing], training)
    return windows


def longest_question(length):
    """How many tokens of a question windows of `length` tokens keep."""
    return min(LONGEST_QUESTION, length // 3)


def cut_questions(questions, tokenizer, longest):
    """Cut questions to `longest` tokens -> ([(question, paragraph)], how many were longer)."""
    tokenizer.enable_truncation(longest + tokenizer.num_special_tokens_to_add(False))
    encodings = encode_texts(tokenizer, [question["question"] for question in questions])
    pairs = []
    longer = 0
    for question, encoding in zip(questions, encodings, strict=True):
        characters = np.max(encoding.offsets)  # where the last token that is kept ends
        pairs.append((question["question"][:characters], question["context"]))
        longer += bool(encoding.overflowing)
    return pairs, longer


def add_windows(windows, question, encodings, training):
    """Append a question's windows. In training, skip a question that would teach nonsense.

    encodings: one per window, of the question and a part of the paragraph.
    """
    answers = question["answers"][:1]  # one, or none
    labels = []
    spans = []
    for encoding in encodings:
        span = np.array(encoding.offsets, np.int32)  # [S, 2]
        # Text 0 is the question, text 1 the paragraph. Special tokens belong to neither.
        span[np.array(encoding.sequence_ids) != 1] = -1
        spans.append(span)
        labels.append(label(span, answers[0]) if answers else (0, 0))
    if training and answers and (misplaced(question, answers[0]) or not np.any(labels)):
        return

    for encoding in encodings:
        windows.ids.append(encoding.ids)
        windows.types.append(encoding.type_ids)
        windows.owner.append(len(windows.questions))
    windows.labels.extend(labels)
    windows.spans.extend(spans)
    windows.questions.append(question)


def read_windows(task, split, path, tokenizer, kind=Windows):
    """Task.read: a SQuAD file -> Windows, as long as the tokenizer's truncation. Prints oddities.

    kind: Windows or PartlyAnswerable. Raises ValueError if every question would be left out.
    """
    questions, notes = read_squad(path)
    check_answers(path, questions, kind)
    length = tokenizer.truncation["max_length"]
    windows = make_windows(questions, tokenizer, length, split == "train", kind)
    if not len(windows):
        raise ValueError(
            f"{path}: no answer is where the file says, or all are longer than a window (--length)"
        )
    if windows.long_questions:
        notes.append(
            f"{path}: questions longer than {longest_question(length)} tokens, which are cut: "
            f"{windows.long_questions}"
        )
    left_out = len(questions) - windows.num_questions()
    if left_out:
        notes.append(
            f"{path}: left out {left_out} of {len(questions)} questions; their answers are not "
            "where it says, or longer than a window (--length)"
        )
    for note in notes:
        print(note)
    return windows


# --- answers --------------------------------------------------------------------------------------


def best_span(logits, spans, longest=LONGEST_ANSWER):
    """Find the best answer in a window -> (score, where it begins, where it ends in the paragraph).

    logits [2, S'], where S' may reach over padding. spans [S, 2]. The answer has at most `longest`
    tokens, all inside the paragraph. If there is none, the score is -inf, and no span is meant.
    """
    inside = spans[:, 0] >= 0  # [S]
    scores = np.where(inside, logits[:, : len(spans)], -np.inf)  # [2, S]
    # Pair the 20 best starts with the 20 best ends.
    starts, ends = np.argsort(-scores, kind="stable")[:, :N_BEST]  # tokens [20] each
    starts = starts[:, None]  # [20, 1]
    totals = scores[0, starts] + scores[1, ends]  # [20, 20]
    lengths = ends - starts + 1  # [20, 20], in tokens
    totals[(lengths < 1) | (lengths > longest)] = -np.inf

    i, j = divmod(totals.argmax(), len(ends))
    return totals[i, j], spans[starts[i, 0], 0], spans[ends[j], 1]


def answers(logits, windows):
    """Logits [N, 2, S] of Windows -> the best answer to each question, in any of its windows.

    Beside the texts, the probability [Q] that there is none: the sigmoid of how much more [CLS] as
    start and end scores than the best span. Of several windows, the one where [CLS] scores least
    counts (BERT's code).
    """
    count = len(windows.questions)
    texts = [""] * count
    best = np.full(count, -np.inf)  # the score of each text
    cls = np.full(count, np.inf)
    for window, owner, spans in zip(logits.numpy(), windows.owner, windows.spans, strict=True):
        cls[owner] = min(cls[owner], window[0, 0] + window[1, 0])
        score, first, last = best_span(window, spans)
        if score > best[owner]:
            context = windows.questions[owner]["context"]
            texts[owner] = context[first:last]
            best[owner] = score
    return texts, torch.from_numpy(cls - best).sigmoid().numpy()


def best_threshold(na_prob, scores, impossible):
    """-> the best mean score that a threshold gives, and that threshold.

    na_prob [Q]: the probability that a question has no answer. scores [Q]: those of the best spans.
    impossible [Q]: whether it has no answer. Above the threshold, a question gets no answer, and
    its score is `impossible` instead. The lowest of equally good thresholds counts, and 0 leaves
    all questions without an answer (official evaluation).
    """
    order = np.argsort(na_prob, kind="stable")
    thresholds = np.append(0, na_prob[order])  # [Q + 1]: the n-th answers n questions
    # Each question that is answered gains its span's score, and loses that of no answer.
    gains = np.cumsum((scores - impossible)[order])
    totals = impossible.sum() + np.append(0, gains)
    # Equal probabilities are answered together: only the last of them is a threshold.
    totals[:-1][thresholds[:-1] == thresholds[1:]] = -np.inf
    n = totals.argmax()
    return totals[n] / len(na_prob), thresholds[n]


def normalise(text):
    """Normalise an answer like the official evaluation: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def grades(texts, questions):
    """Texts and what was asked -> [Q, 2]: F1 and exact match with the true answer that fits best.

    The true answer to a question without answers is an empty text.
    """
    scores = np.zeros((len(texts), 2))
    for row, text, question in zip(scores, texts, questions, strict=True):
        for _, true in question["answers"] or [(0, "")]:
            row[0] = max(row[0], f1(text, true))
            row[1] = max(row[1], normalise(text) == normalise(true))
    return scores


def f1(predicted, true):
    """The harmonic mean of precision and recall, over the words of two answers."""
    predicted = normalise(predicted).split()
    true = normalise(true).split()
    shared = (Counter(predicted) & Counter(true)).total()
    return 2 * shared / max(len(predicted) + len(true), 1)


def format_answer(texts, tokenizer, logits_of, args, kind=Windows):
    """Task.format_answer: answer a question (texts[0]) from a paragraph (texts[1]) -> [answer].

    PartlyAnswerable adds how probable it is that there is none.
    """
    question = {"question": texts[0], "context": texts[1], "answers": []}
    windows = make_windows([question], tokenizer, tokenizer.truncation["max_length"])
    (text,), (na_prob,) = answers(logits_of(windows), windows)
    if kind is PartlyAnswerable:
        text += f" (no answer: {na_prob:.4f})"
    return [text]


def predict(path, run, loaded, logits_of):
    """Task.predict: write answers to a SQuAD file as the official evaluation reads them.

    A run of squad2 answers "" above the threshold that was tuned on its dev set. It also writes the
    probabilities that there is no answer.
    """
    questions, _ = read_squad(path)
    tokenizer, final = loaded.tokenizer, loaded.result["final"]
    windows = make_windows(questions, tokenizer, tokenizer.truncation["max_length"])
    texts, na_prob = answers(logits_of(windows), windows)
    ids = [question["id"] for question in questions]
    if "threshold" in final:
        for i in np.flatnonzero(na_prob > final["threshold"]):
            texts[i] = ""
        written = dict(zip(ids, na_prob.tolist(), strict=True))
        write_beside(run, "na_prob.json", json_bytes(written))
    write_beside(run, "predictions.json", json_bytes(dict(zip(ids, texts, strict=True))))


TASKS["squad"] = Task(
    "squad", ("question", "context"), "answers", {"start": "no", "end": "yes"}, ("f1", "em"),
    {"epochs": 10, "length": 384, "ramp": 0.82}, file="{}-v1.1.json", fetch=fetch_squad,
    every_token=True, read=read_windows, format_answer=format_answer, predict=predict,
)  # fmt: skip
TASKS["squad2"] = replace(
    TASKS["squad"],
    metrics=("best_f1", "best_em"),
    file="{}-v2.0.json",
    read=partial(read_windows, kind=PartlyAnswerable),
    format_answer=partial(format_answer, kind=PartlyAnswerable),
)
