"""SQuAD v1.1: find the answer to a question as a span of a paragraph.

The model scores two label words at every token, one for the start of the answer and one for its
end. Questions without an answer (SQuAD 2.0) are not supported. Data and metrics follow Rajpurkar et
al., EMNLP 2016. Windows over long paragraphs and n-best decoding follow Devlin et al. 2019.

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
from extras.glue import fetch_file
from plumbing import fetch
from plumbing.checkpoints import encode_texts
from plumbing.files import read_json
from plumbing.progress import progress
from plumbing.rows import Rows

URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
MD5 = {
    "train-v1.1.json": "981b29407e0affa3b1b156f72073b945",
    "dev-v1.1.json": "3e85deb501d4e538b6bc56f786231552",
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

    The label is the (start, end) token of the answer, (0, 0) if the window does not contain it.
    """

    owner: list  # per window the index of its question
    # Per window [S, 2]: where each token begins and ends in the paragraph, or -1 outside it.
    spans: list
    questions: list  # dicts: id, question, context, answers [(first character, text)]

    def num_questions(self):
        return len(self.questions)

    def reduce_logits(self, logits, labels):
        """Pad logits [B, 2, S] to the longest S that is allowed, so that batches can be joined."""
        return F.pad(logits, (0, self.limit - logits.shape[2]), value=-1e4)

    def score(self, logits, names, metrics):
        """{"f1": F1, "em": exact match}, both from 0 to 1, averaged over the questions.

        A question with several true answers counts the one that fits best.
        """
        best, exact = [], []
        for text, question in zip(answers(logits, self), self.questions, strict=True):
            true = [answer for _, answer in question["answers"]]
            best.append(max(f1(text, answer) for answer in true))
            exact.append(any(normalise(text) == normalise(answer) for answer in true))
        return {"f1": float(np.mean(best)), "em": float(np.mean(exact))}


# --- files ----------------------------------------------------------------------------------------


def fetch_squad(task, split):
    """Task.fetch: download a split of SQuAD v1.1 into the cache."""
    name = task.file.format(split)
    path = fetch.cache() / "glue" / task.folder / name
    url = f"{(os.environ.get('SQUAD_URL') or URL).rstrip('/')}/{name}"
    remedy = f"put it at {path} by hand, or name its folder's parent with --data-dir"
    fetch_file(url, path, MD5[name], remedy)


def read_articles(path):
    """Return the list of articles in a SQuAD file. Raises ValueError if it has none."""
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), list):
        raise ValueError(f"{path} is not a SQuAD v1.1 file: it has no list of articles under data")
    return stored["data"]


def read_squad(path):
    """Read the questions of a file -> (list of dicts, notes on oddities that are not fatal).

    Raises ValueError that names the file if it is not SQuAD v1.1 or has no questions.
    """
    questions = []
    empty = 0
    try:
        for article in read_articles(path):
            paragraphs = article.get("paragraphs") or []
            empty += not paragraphs
            for paragraph in paragraphs:
                questions += read_paragraph(paragraph)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a SQuAD v1.1 file ({type(error).__name__}: {error})"
        ) from None
    if not questions:
        raise ValueError(f"{path} holds no questions")

    elsewhere = 0
    for question in questions:
        if not question["answers"]:
            raise ValueError(
                f"{path}: question {question['id']} has no answer; SQuAD 2.0 is not supported"
            )
        elsewhere += sum(misplaced(question, answer) for answer in question["answers"])
    notes = {
        "answers that are not where the file says": elsewhere,
        "articles without paragraphs": empty,
    }
    return questions, [f"{path}: {what}: {count}" for what, count in notes.items() if count]


def read_paragraph(paragraph):
    """Yield the questions about a paragraph, see Windows.questions."""
    for asked in paragraph["qas"]:
        found = [(int(a["answer_start"]), str(a["text"])) for a in asked["answers"]]
        yield {
            "id": str(asked["id"]),
            "question": str(asked["question"]).strip(),
            "context": str(paragraph["context"]),
            "answers": found,
        }


def misplaced(question, answer):
    """Whether the paragraph has another text where the answer should be."""
    start, text = answer
    return question["context"][start : start + len(text)] != text


def trimmed(answer):
    """An answer (first character, text) -> where the part that BERT reads begins and ends."""
    start, text = answer
    read = [i for i, character in enumerate(text) if not dropped(character)]
    if not read:
        return start, start
    return start + read[0], start + read[-1] + 1


def dropped(character):
    """Whether BERT drops a character: space, control, format, or an accent after its letter."""
    return (
        character.isspace()
        or character == "\ufffd"
        or unicodedata.category(character) in ("Mn", "Cc", "Cf", "Co")
    )


def label(spans, answer):
    """The (start, end) token of an answer in a window. (0, 0) if it is not wholly in the window."""
    first, last = trimmed(answer)
    begin, end = spans.T  # [S, 2] -> two of [S]
    with_first = (begin <= first) & (end > first)  # the token of the first character
    with_last = (begin < last) & (end >= last)
    if last > first and with_first.any() and with_last.any():
        return int(with_first.argmax()), int(with_last.argmax())
    return 0, 0


def cut(question, tokenizer):
    """The part of a question that the tokenizer keeps when it truncates."""
    (encoded,) = encode_texts(tokenizer, [question])
    return question[: max(end for _, end in encoded.offsets)]


def make_windows(questions, tokenizer, length, training=False):
    """Cut questions and their paragraphs into Windows of `length` tokens.

    Each is labelled with the first of its answers. In training, a question is left out if none of
    its windows contains the answer. Raises ValueError if the windows are too short.
    """
    if length < SHORTEST_WINDOW:
        raise ValueError(
            f"--length {length}: question and paragraph need {SHORTEST_WINDOW} tokens or more"
        )
    special = tokenizer.num_special_tokens_to_add(False)
    tokenizer.enable_truncation(min(LONGEST_QUESTION, length // 3) + special)
    texts = [(cut(q["question"], tokenizer), q["context"]) for q in questions]
    tokenizer.enable_truncation(length, stride=min(STRIDE, length // 3), strategy="only_second")

    windows = Windows(Rows(), Rows(), [], length, [], [], [])
    pairs = zip(questions, encode_texts(tokenizer, texts), strict=True)
    for question, encoding in progress(pairs, "cutting windows", total=len(questions)):
        add_windows(windows, question, [encoding, *encoding.overflowing], training)
    return windows


def add_windows(windows, question, encodings, training):
    """Append a question's windows. In training, skip a question that would teach nonsense."""
    answer = question["answers"][0]
    spans, labels = [], []
    for encoding in encodings:
        # Text 0 is the question, text 1 the paragraph. Special tokens belong to neither.
        inside = np.array([text == 1 for text in encoding.sequence_ids])  # [S]
        offsets = np.array(encoding.offsets, np.int32)
        spans.append(np.where(inside[:, None], offsets, np.int32(-1)))  # [S, 2]
        labels.append(label(spans[-1], answer))
    nowhere = set(labels) == {(0, 0)}
    if training and (nowhere or misplaced(question, answer)):
        return

    for encoding in encodings:
        windows.ids.append(encoding.ids)
        windows.types.append(encoding.type_ids)
    windows.labels.extend(labels)
    windows.owner.extend([len(windows.questions)] * len(encodings))
    windows.spans.extend(spans)
    windows.questions.append(question)


def read_windows(task, path, tokenizer):
    """Task.read: a SQuAD file -> Windows, as long as the tokenizer's truncation. Prints oddities.

    Raises ValueError if every question would be left out.
    """
    questions, notes = read_squad(path)
    training = path.name == task.file.format("train")
    windows = make_windows(questions, tokenizer, tokenizer.truncation["max_length"], training)
    if lost := len(questions) - windows.num_questions():
        notes.append(
            f"{path}: left out {lost} of {len(questions)} questions; their answers are not "
            "where it says, or longer than a window (--length)"
        )
    if not len(windows):
        raise ValueError(
            f"{path}: no answer is where the file says, or all are longer than a window (--length)"
        )
    for note in notes:
        print(note)
    return windows


# --- answers --------------------------------------------------------------------------------------


def best_spans(logits, spans, longest=LONGEST_ANSWER):
    """Find the best answer in a window -> (score, where it begins, where it ends in the paragraph).

    logits [2, S'], where S' may reach over padding. spans [S, 2]. The answer has at most `longest`
    tokens, all inside the paragraph. If there is none, the score is -inf and the span is empty.
    """
    inside = spans[:, 0] >= 0  # [S]
    scores = np.where(inside, logits[:, : len(spans)], -np.inf)  # [2, S]
    # Pair the 20 best starts with the 20 best ends.
    starts, ends = np.argsort(-scores, kind="stable")[:, :N_BEST]  # tokens [20] each
    total = scores[0, starts][:, None] + scores[1, ends]  # [20, 20]
    tokens = ends - starts[:, None] + 1  # [20, 20]: the lengths
    total[(tokens < 1) | (tokens > longest)] = -np.inf
    i, j = np.unravel_index(total.argmax(), total.shape)
    score = total[i, j]
    if score == -np.inf:
        return score, 0, 0
    return score, spans[starts[i], 0], spans[ends[j], 1]


def answers(logits, windows):
    """Logits [N, 2, S] of Windows -> per question the text of the best answer in its windows."""
    texts = [""] * len(windows.questions)
    best = [-np.inf] * len(windows.questions)  # the score of each text
    for window, owner, spans in zip(logits.numpy(), windows.owner, windows.spans, strict=True):
        score, first, last = best_spans(window, spans)
        if score > best[owner]:
            best[owner] = score
            texts[owner] = windows.questions[owner]["context"][first:last]
    return texts


def normalise(text):
    """Normalise an answer like the official evaluation: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(predicted, true):
    """The harmonic mean of precision and recall, over the words of two answers."""
    predicted = normalise(predicted).split()
    true = normalise(true).split()
    shared = sum((Counter(predicted) & Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true)) if shared else 0.0


def format_answer(texts, tokenizer, logits_of, args):
    """Task.format_answer: answer a question (texts[0]) from a paragraph (texts[1]) -> [answer]."""
    question = {"id": "--text", "question": texts[0], "context": texts[1], "answers": [(0, "")]}
    windows = make_windows([question], tokenizer, tokenizer.truncation["max_length"])
    return answers(logits_of(windows), windows)


TASKS["squad"] = Task(
    "squad", ("question", "context"), "answers", {"start": "no", "end": "yes"}, ("f1", "em"),
    {"epochs": 10, "length": 384, "ramp": 0.82}, file="{}-v1.1.json", fetch=fetch_squad,
    every_token=True, read=read_windows, format_answer=format_answer,
)  # fmt: skip
