"""SQuAD v1.1: answers are spans of a paragraph; two label words, read at every token, mark their start and end.

Questions without an answer (SQuAD 2.0) are refused. Sources: Rajpurkar et al., EMNLP 2016, for data and metrics;
Devlin et al. 2019 for windows over long paragraphs and n-best decoding.

    python train.py --task squad
"""

import os
import re
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from data import TASKS, Examples, Task
from plumbing import fetch
from plumbing.checkpoints import encode_texts
from plumbing.files import read_json
from plumbing.progress import progress

URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
MD5 = {
    "train-v1.1.json": "981b29407e0affa3b1b156f72073b945",
    "dev-v1.1.json": "3e85deb501d4e538b6bc56f786231552",
}
STRIDE = 128  # tokens that neighbouring windows share, at most a third of a window
LONGEST_QUESTION = 64  # tokens, at most a third of a window; longer ones are cut
SHORTEST_WINDOW = 16  # tokens: thirds of fewer leave no room for the special tokens
N_BEST = 20  # candidates for start and end
LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Windows(Examples):
    """Examples whose labels are (start, end) token positions, (0, 0) where the window does not hold the answer."""

    owner: list  # number of each window's question
    spans: list  # of each window: characters of each token in the paragraph [S, 2]; -1 outside the paragraph
    questions: list  # dicts: id, question, context, answers [(character, text)]

    def num_questions(self):
        return len(self.questions)

    def reduce_logits(self, logits, labels):
        """Logits [B, 2, S] of the tokens -> all of one S, that of the longest window allowed."""
        return F.pad(logits, (0, self.limit - logits.shape[2]), value=-1e4)

    def score(self, logits, names, metrics):
        """{"f1": F1, "em": exact match}, each 0 to 1: the best over a question's answers, averaged over questions."""
        best, exact = [], []
        for text, question in zip(answers(logits, self), self.questions, strict=True):
            true = [answer for _, answer in question["answers"]]
            best.append(max(f1(text, answer) for answer in true))
            exact.append(any(normalise(text) == normalise(answer) for answer in true))
        return {"f1": float(np.mean(best)), "em": float(np.mean(exact))}


# --- files ---------------------------------------------------------------------------------------------------


def fetch_squad(task, split):
    """Download a split of SQuAD v1.1 into the cache."""
    name = task.file.format(split)
    path = fetch.cache() / "glue" / task.folder / name
    url = f"{(os.environ.get('SQUAD_URL') or URL).rstrip('/')}/{name}"
    remedy = f"put it at {path} by hand, or name its folder's parent with --data-dir"
    fetch.fetch_file(url, path, MD5[name], remedy)


def read_articles(path):
    """The articles of a SQuAD file, as it has them. Raises ValueError when it has none."""
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), list):
        raise ValueError(f"{path} is not a SQuAD v1.1 file: it has no list of articles under data")
    return stored["data"]


def read_squad(path):
    """Questions of a file -> (list of dicts, notes on what is odd in the file but not fatal).

    Raises ValueError that names the file when it is not SQuAD v1.1 or holds no question.
    """
    questions = []
    empty = elsewhere = 0
    try:
        for article in read_articles(path):
            paragraphs = article.get("paragraphs") or []
            empty += not paragraphs
            for paragraph in paragraphs:
                for asked in paragraph["qas"]:
                    found = [(int(a["answer_start"]), str(a["text"])) for a in asked["answers"]]
                    question = {"id": str(asked["id"]), "question": str(asked["question"]).strip()}
                    question |= {"context": str(paragraph["context"]), "answers": found}
                    questions.append(question)
                    elsewhere += sum(misplaced(question, answer) for answer in found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a SQuAD v1.1 file ({type(error).__name__}: {error})"
        ) from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    for question in questions:
        if not question["answers"]:
            raise ValueError(
                f"{path}: question {question['id']} has no answer; SQuAD 2.0 is not supported"
            )
    notes = {
        "answers that are not where the file says": elsewhere,
        "articles without paragraphs": empty,
    }
    return questions, [f"{path}: {what}: {count}" for what, count in notes.items() if count]


def misplaced(question, answer):
    start, text = answer
    return question["context"][start : start + len(text)] != text


def trimmed(answer):
    """An answer (character, text) -> its (first, last) character, without what BERT drops at its ends."""
    start, text = answer
    seen = [i for i, character in enumerate(text) if not dropped(character)]
    return (start + seen[0], start + seen[-1] + 1) if seen else (start, start)


def dropped(character):
    """Spaces, controls, signs of no meaning, and the accent that follows its letter as a character of its own."""
    return (
        character.isspace()
        or character == "\ufffd"
        or unicodedata.category(character) in ("Mn", "Cc", "Cf", "Co")
    )


def label(spans, answer):
    """Token positions (start, end) of an answer (character, text) in a window; (0, 0) if it is not wholly there."""
    first, last = trimmed(answer)
    starts = np.flatnonzero((spans[:, 0] <= first) & (spans[:, 1] > first))
    ends = np.flatnonzero((spans[:, 0] < last) & (spans[:, 1] >= last))
    return (int(starts[0]), int(ends[0])) if last > first and len(starts) and len(ends) else (0, 0)


def cut(question, tokenizer):
    """A question as far as the tokenizer, cutting, reads it."""
    (encoded,) = encode_texts(tokenizer, [question])
    return question[: max(end for _, end in encoded.offsets)]


def make_windows(questions, tokenizer, length, training=False):
    """Cut question and paragraph into windows of `length` tokens -> Windows, labelled with each first answer.

    In training, a question whose answer is in none of its windows is left out. Raises ValueError for too short windows.
    """
    if length < SHORTEST_WINDOW:
        raise ValueError(
            f"--length {length}: question and paragraph need {SHORTEST_WINDOW} tokens or more"
        )
    special = tokenizer.num_special_tokens_to_add(False)
    tokenizer.enable_truncation(min(LONGEST_QUESTION, length // 3) + special)
    texts = [(cut(q["question"], tokenizer), q["context"]) for q in questions]
    tokenizer.enable_truncation(length, stride=min(STRIDE, length // 3), strategy="only_second")

    windows = Windows([], [], [], length, [], [], [])
    for start in progress(
        range(0, len(questions), 256), "cutting windows"
    ):  # in parts: encodings are large
        part = slice(start, start + 256)
        for question, encoding in zip(
            questions[part], encode_texts(tokenizer, texts[part]), strict=True
        ):
            add_windows(windows, question, [encoding, *encoding.overflowing], training)
    return windows


def add_windows(windows, question, encodings, training):
    """Append a question's windows; in training none of a question whose answer is not where the file says."""
    answer = question["answers"][0]
    spans, labels = [], []
    for encoding in encodings:
        inside = np.array([text == 1 for text in encoding.sequence_ids])
        spans.append(np.where(inside[:, None], np.array(encoding.offsets), -1))
        labels.append(label(spans[-1], answer))
    if training and (
        misplaced(question, answer) or set(labels) == {(0, 0)}
    ):  # it would teach nonsense
        return

    windows.ids.extend(encoding.ids for encoding in encodings)
    windows.types.extend(encoding.type_ids for encoding in encodings)
    windows.labels.extend(labels)
    windows.owner.extend([len(windows.questions)] * len(encodings))
    windows.spans.extend(spans)
    windows.questions.append(question)


def read_windows(task, path, tokenizer):
    """Task.read: a SQuAD file -> Windows of the length at which the tokenizer cuts; what is odd in it is printed.

    Raises ValueError when no question can be learnt from.
    """
    questions, notes = read_squad(path)
    training = path.name == task.file.format("train")
    windows = make_windows(questions, tokenizer, tokenizer.truncation["max_length"], training)
    if lost := len(questions) - windows.num_questions():
        why = "their answers are not where it says, or longer than a window (--length)"
        notes.append(f"{path}: left out {lost} of {len(questions)} questions; {why}")
    if not len(windows):
        raise ValueError(
            f"{path}: no answer is where the file says, or all are longer than a window (--length)"
        )
    for note in notes:
        print(note)
    return windows


# --- answers -------------------------------------------------------------------------------------------------


def best_spans(logits, spans):
    """Logits [2, S] and characters [S, 2] of a window -> (score, first character, last) of its best answer.

    Only spans of at most 30 tokens inside the paragraph count; score -inf and an empty span if there is none.
    """
    size = len(spans)  # logits may reach further, over padding
    scores = np.where(spans[:, 0] >= 0, logits[:, :size], -np.inf)
    start, end = np.argsort(-scores, kind="stable")[:, :N_BEST]  # tokens
    total = scores[0, start][:, None] + scores[1, end][None, :]  # [starts, ends]
    tokens = end[None, :] - start[:, None] + 1
    total[(tokens < 1) | (tokens > LONGEST_ANSWER)] = -np.inf
    i, j = np.unravel_index(total.argmax(), total.shape)
    if total[i, j] == -np.inf:
        return -np.inf, 0, 0
    return total[i, j], spans[start[i], 0], spans[end[j], 1]


def answers(logits, windows):
    """Logits [N, 2, S] of Windows -> the best answer text to each question, over all its windows."""
    best = [(-np.inf, 0, 0)] * len(windows.questions)
    for window, owner, spans in zip(logits.numpy(), windows.owner, windows.spans, strict=True):
        best[owner] = max(best[owner], best_spans(window, spans), key=lambda found: found[0])
    return [
        q["context"][first:last]
        for q, (_, first, last) in zip(windows.questions, best, strict=True)
    ]


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces: as the official evaluation compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(predicted, true):
    """Harmonic mean of precision and recall over the words of two answers."""
    predicted = normalise(predicted).split()
    true = normalise(true).split()
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true)) if shared else 0.0


def format_answer(texts, tokenizer, logits_of, args):
    """Task.format_answer: the answer to a question (texts[0]) from a paragraph (texts[1]), a line."""
    question = {"id": "--text", "question": texts[0], "context": texts[1], "answers": [(0, "")]}
    windows = make_windows([question], tokenizer, tokenizer.truncation["max_length"])
    return answers(logits_of(windows), windows)


TASKS["squad"] = Task(
    "squad", ("question", "context"), "answers", {"start": "no", "end": "yes"}, ("f1", "em"),
    {"epochs": 10, "length": 384, "ramp": 0.82}, test=(), file="{}-v1.1.json", fetch=fetch_squad, every_token=True, read=read_windows, format_answer=format_answer,
)  # fmt: skip
