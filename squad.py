"""SQuAD v1.1: extractive question answering with two label words read at every token.

What it is: reading, windows over long paragraphs, n-best decoding, exact match and F1, and a command that splits a
file by articles. What it is not: SQuAD 2.0 (questions without an answer). Sources: Rajpurkar et al., EMNLP 2016, for
data and metrics; Devlin et al. 2019 for windows and decoding.

    python train.py --task squad
    python squad.py dev-v1.1.json FOLDER --dev 8     # FOLDER/squad/{train,dev}-v1.1.json, 8 articles in dev
"""

import collections
import json
import os
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import fetch
from cli import Parser, one_line_errors

URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
STRIDE = 128  # tokens that neighbouring windows share
N_BEST, LONGEST_ANSWER = 20, 30  # candidates for start and end; tokens


@dataclass(frozen=True)
class Windows(data.Examples):
    """Examples whose labels are (start, end) token positions, (0, 0) where the window does not hold the answer."""

    owner: list  # number of each window's question
    spans: list  # of each window: characters of each token in the paragraph [S, 2]; -1 outside the paragraph
    questions: list  # dicts: id, question, context, answers [(character, text)]

    def asked(self):
        return len(self.questions)


def read_articles(path):
    """The articles of a SQuAD file, as it has them. Raises ValueError when it has none."""
    try:
        articles = json.loads(path.read_text("utf-8"))["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a SQuAD v1.1 file ({type(error).__name__}: {error})") from None
    if not isinstance(articles, list):
        raise ValueError(f"{path} is not a SQuAD v1.1 file: its data is no list of articles")
    return articles


def read_squad(path):
    """Questions of a file -> (list of dicts, notes on what is odd in the file but not fatal).

    Raises ValueError that names the file when it is not SQuAD v1.1 or holds no question.
    """
    articles = read_articles(path)
    try:
        questions = [
            {
                "id": str(qa["id"]),
                "question": str(qa["question"]).strip(),
                "context": str(paragraph["context"]),
                "answers": [(int(a["answer_start"]), str(a["text"])) for a in qa["answers"]],
            }
            for article in articles
            for paragraph in article.get("paragraphs") or ()
            for qa in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a SQuAD v1.1 file ({type(error).__name__}: {error})") from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    if unanswered := [q["id"] for q in questions if not q["answers"]]:
        raise ValueError(f"{path}: question {unanswered[0]} has no answer; SQuAD 2.0 is not supported")
    counts = {
        "answers do not stand where the file says": sum(misplaced(q, a) for q in questions for a in q["answers"]),
        "articles have no paragraphs": sum(not article.get("paragraphs") for article in articles),
    }
    return questions, [f"{path}: {count} {what}" for what, count in counts.items() if count]


def misplaced(question, answer):
    start, text = answer
    return question["context"][start : start + len(text)] != text


def label(spans, answer):
    """Token positions (start, end) of an answer (character, text) in a window; (0, 0) if it is not wholly there."""
    first, last = answer[0], answer[0] + len(answer[1])
    starts = np.flatnonzero((spans[:, 0] <= first) & (spans[:, 1] > first))
    ends = np.flatnonzero((spans[:, 0] < last) & (spans[:, 1] >= last))
    return (int(starts[0]), int(ends[0])) if len(starts) and len(ends) else (0, 0)


def make_windows(questions, tokenizer, length):
    """Cut question and paragraph into windows of `length` tokens -> Windows, labelled with each first answer.

    Raises ValueError for a question that leaves no room for the paragraph.
    """
    tokenizer.no_truncation()
    special = tokenizer.num_special_tokens_to_add(True)
    for question in questions:
        (encoded,) = data.encode_texts(tokenizer, [question["question"]])
        size = len(encoded.ids) - tokenizer.num_special_tokens_to_add(False)
        if size + special + STRIDE >= length:
            raise ValueError(f"question {question['id']} has {size} tokens, too many for --length {length}")
    tokenizer.enable_truncation(length, stride=STRIDE, strategy="only_second")
    windows = Windows([], [], [], length, [], [], questions)
    for start in tqdm(range(0, len(questions), 256), "cutting windows", leave=False):  # in parts: encodings are large
        part = questions[start : start + 256]
        encodings = data.encode_texts(tokenizer, [(q["question"], q["context"]) for q in part])
        for number, (question, encoding) in enumerate(zip(part, encodings, strict=True), start):
            for window in (encoding, *encoding.overflowing):
                inside = np.array([text == 1 for text in window.sequence_ids])
                spans = np.where(inside[:, None], np.array(window.offsets), -1)
                windows.ids.append(window.ids)
                windows.types.append(window.type_ids)
                windows.labels.append(label(spans, question["answers"][0]))
                windows.owner.append(number)
                windows.spans.append(spans)
    return windows


def load_split(name, split, data_dir, tokenizer):
    """Windows of a split ("train-v1.1", "dev-v1.1") from data_dir/squad/SPLIT.json (None: the cache, see data.py)."""
    task, path = data.TASKS[name], data.split_path(name, split, data_dir)
    if not path.exists():
        url = f"{os.environ.get('SQUAD_URL') or URL}/{split}.json"
        with fetch.fetched(url, path, f"put it at {path} by hand, or name its folder's parent with --data-dir") as part:
            fetch.check_digest(part, "md5", dict(zip((task.train, *task.dev), task.md5, strict=True))[split], url)
            part.replace(path)
    questions, notes = read_squad(path)
    for note in notes:
        print(note)
    if split == task.train:  # a misplaced answer would teach nonsense
        questions = [q for q in questions if not misplaced(q, q["answers"][0])]
    return make_windows(questions, tokenizer, tokenizer.truncation["max_length"])


def best_spans(logits, spans):
    """Logits [S, 2] and characters [S, 2] of a window -> (score, first character, last) of its best answer.

    Only spans of at most 30 tokens inside the paragraph count; score -inf and an empty span if there is none.
    """
    size = len(spans)  # logits may reach further, over padding
    scores = np.where(spans[:, :1] >= 0, logits[:size], -np.inf)
    start, end = (np.argsort(-scores[:, side], kind="stable")[:N_BEST] for side in (0, 1))
    total = scores[start, 0][:, None] + scores[end, 1][None, :]  # [starts, ends]
    tokens = end[None, :] - start[:, None] + 1
    total[(tokens < 1) | (tokens > LONGEST_ANSWER)] = -np.inf
    i, j = np.unravel_index(total.argmax(), total.shape)
    if total[i, j] == -np.inf:
        return -np.inf, 0, 0
    return total[i, j], spans[start[i], 0], spans[end[j], 1]


def answers(logits, windows):
    """Logits [N, S, 2] of Windows -> the best answer text to each question, over all its windows."""
    best = [(-np.inf, 0, 0)] * len(windows.questions)
    for window, owner, spans in zip(logits.numpy(), windows.owner, windows.spans, strict=True):
        best[owner] = max(best[owner], best_spans(window, spans), key=lambda found: found[0])
    return [q["context"][first:last] for q, (_, first, last) in zip(windows.questions, best, strict=True)]


def normalise(text):
    """Lower case, no punctuation, no articles, single spaces: as the official evaluation compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(predicted, true):
    """Harmonic mean of precision and recall over the words of two answers."""
    predicted, true = normalise(predicted).split(), normalise(true).split()
    shared = sum((collections.Counter(predicted) & collections.Counter(true)).values())
    return 2 * shared / (len(predicted) + len(true)) if shared else 0.0


def score(logits, windows):
    """{"f1": F1, "em": exact match}, each 0 to 1: the best over a question's answers, averaged over questions."""
    found = list(zip(answers(logits, windows), windows.questions, strict=True))
    best = [max(f1(text, true) for _, true in q["answers"]) for text, q in found]
    exact = [any(normalise(text) == normalise(true) for _, true in q["answers"]) for text, q in found]
    return {"f1": float(np.mean(best)), "em": float(np.mean(exact))}


def main(argv=None):
    parser = Parser(description="Split a SQuAD file by articles into a training and a dev file.")
    parser.add_argument("file", type=Path, help="a SQuAD v1.1 file")
    parser.add_argument("folder", type=Path, help="for --data-dir; gets squad/{train,dev}-v1.1.json")
    parser.add_argument("--dev", type=int, default=8, help="articles in the dev part, the last of the file (8)")
    args = parser.parse_args(argv)
    with one_line_errors():
        articles = read_articles(args.file)
        if not 0 < args.dev < len(articles):
            raise ValueError(f"--dev must be between 0 and {len(articles)}, the number of articles; got {args.dev}")
        for name, part in (("train", articles[: -args.dev]), ("dev", articles[-args.dev :])):
            path = args.folder / "squad" / f"{name}-v1.1.json"
            if path.exists():
                raise ValueError(f"{path} is there already; delete it or name another folder")
            fetch.write_whole(path, json.dumps({"version": "1.1", "data": part}, ensure_ascii=False).encode())
            print(f"{path}: {len(part)} articles")


if __name__ == "__main__":
    main()
