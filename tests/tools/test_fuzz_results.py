"""Logs and lines of results, altered at random: tools draw them, or end in one line of error."""

import json

from fuzzing import fuzz_lines
from house import ROOT

from plumbing import cli
from tools import experiments, picture


def test_logs(finished, survives):
    """What read_log lets through is drawn: matplotlib can count ticks for numbers of that size."""

    def read():
        with cli.one_line_errors():
            losses, evaluations = picture.read_log(finished / "log.jsonl")
            assert all(abs(line["loss"] + line["density"] + line["step"]) < 1e10 for line in losses)
            assert all(abs(value) < 1e10 for line in evaluations for value in line["dev"].values())

    fuzz_lines(finished / "log.jsonl", survives, read)


def test_lines_of_results(survives, tmp_path):
    lines = (ROOT / "results" / "runs.jsonl").read_text().splitlines()
    wanted = set(experiments.commands("curve"))
    chosen = [line for line in lines if json.loads(line)["command"] in wanted][:12]
    (tmp_path / "runs.jsonl").write_text("\n".join(chosen))
    argv = ["table", "curve", "--results", str(tmp_path)]
    fuzz_lines(tmp_path / "runs.jsonl", survives, lambda: experiments.main(argv))
