"""Logs and lines of results, altered at random: tools draw them, or end in one line of error."""

from fuzzing import fuzz_lines
from house import ROOT

from plumbing import cli
from tools import picture, runs


def test_logs(finished, survives):
    """What read_log lets through is drawn: matplotlib can count ticks for numbers of that size."""

    def read():
        with cli.one_line_errors():
            losses, evaluations = picture.read_log(finished / "log.jsonl")
            assert all(abs(line["loss"] + line["density"] + line["step"]) < 1e10 for line in losses)
            assert all(abs(value) < 1e10 for line in evaluations for value in line["dev"].values())

    fuzz_lines(finished / "log.jsonl", survives, read)


def test_lines_of_results(survives, tmp_path):
    """A line that is no result is named. The numbers of others are those of the tool itself."""
    lines = (ROOT / "results" / "runs.jsonl").read_text().splitlines()
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(lines[:12]))

    def read():
        with cli.one_line_errors():
            runs.read_results(path)

    fuzz_lines(path, survives, read)
