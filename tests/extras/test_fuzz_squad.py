"""SQuAD files, altered at random: they can be read, or they end in one line of error."""

import json

import pytest
from fuzzing import fuzz

import data
from plumbing import cli
from plumbing.checkpoints import cutting_tokenizer


@pytest.mark.parametrize("task", ["squad", "squad2"])
def test_squad_files(finished, survives, tmp_path, task):
    (tmp_path / "squad").mkdir()
    path = tmp_path / "squad" / data.TASKS[task].file.format("dev")
    context = "the film was good , it was fun . a bad film is dull and very bad"
    answer = {"answer_start": context.index("fun"), "text": "fun"}
    asked = {"id": "q0", "question": "is it", "answers": [answer]}
    both = [asked]
    if task == "squad2":
        both.append({"id": "q1", "question": "is it", "answers": [], "is_impossible": True})
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": both}]}]}))

    def read():
        with cli.one_line_errors():
            tokenizer = cutting_tokenizer(finished.parent / "model", 16)
            data.load_split(task, "dev", str(tmp_path), tokenizer)

    fuzz(path, survives, read)
