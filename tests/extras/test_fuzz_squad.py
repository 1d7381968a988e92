"""SQuAD files, altered at random: they can be read, or they end in one line of error."""

import json

from fuzzing import fuzz

import data
from plumbing import cli
from plumbing.checkpoints import cutting_tokenizer


def test_squad_files(finished, survives, tmp_path):
    (tmp_path / "squad").mkdir()
    path = tmp_path / "squad" / "dev-v1.1.json"
    context = "the film was good , it was fun . a bad film is dull and very bad"
    answer = {"answer_start": context.index("fun"), "text": "fun"}
    asked = {"id": "q0", "question": "is it", "answers": [answer]}
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}))

    def read():
        with cli.one_line_errors():
            tokenizer = cutting_tokenizer(finished.parent / "model", 16)
            data.load_split("squad", "dev", str(tmp_path), tokenizer)

    fuzz(path, survives, read)
