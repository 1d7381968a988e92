"""tools.bench: that it runs and counts right; what it measures is not tested."""

import json

import pytest
import torch

import train
from mask import METHODS
from tools import bench

SMALL = ["--layers", "3", "--hidden", "64", "--batch", "2", "--length", "8", "--steps", "1"]
SMALL += ["--device", "cpu"]


@pytest.fixture
def peaks_are_known(monkeypatch):
    """Measuring them takes seconds."""
    monkeypatch.setattr(bench, "matrix_peak", lambda *_: 1e12)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda *_: 1e12)


@pytest.mark.parametrize("method", ["smp-s", "movement"])
def test_a_line_of_json_comes_last(capsys, peaks_are_known, method):
    bench.main([*SMALL, "--dtype", "float32", "--method", method])
    out = capsys.readouterr().out
    line = json.loads(out.splitlines()[-1])
    assert "takes a minute" in out and "overlap" in out and "times the lower bound" in out
    assert (
        line["layers"] == 3
        and line["device"].endswith("CPU threads")
        and line["dtype"] == "float32"
    )
    assert line[method] > 0 < line["finetune"] and line["select"] > 0


def test_a_model_of_ones_own(capsys, make_model, fails):
    folder = str(make_model())
    bench.main([*SMALL[4:], "--model", folder])
    out = capsys.readouterr().out
    line = json.loads(out.splitlines()[-1])
    assert "takes a minute" not in out and "overlap" not in out  # that is about training steps
    assert (
        line["model"] == folder
        and line["evaluation"] > 0
        and "layers" not in line
        and "method" not in line
    )
    missing = ["--model", f"{folder}/x", "--device", "cpu"]
    assert "there is no folder" in fails(bench.main, missing)
    for flag in bench.STEP_FLAGS:
        given = [bench.cli.flag(flag)]
        given += {"layers": ["6"], "hidden": ["384"], "method": ["smp-s"]}.get(flag, [])
        said = fails(bench.main, ["--model", folder, "--device", "cpu", *given])
        assert f"{given[0]} is for training steps" in said
    long = ["--model", folder, "--length", 64, "--device", "cpu"]
    assert "--length: " in fails(bench.main, long)


def test_operations_by_hand():
    args = bench.parse_args(SMALL)
    # Per token and layer: 12 weight matrices of 64 x 64, and products with 8 keys and 8 values.
    # Each product and its sum are 2 operations.
    layer = 16 * 2 * (12 * 64 * 64 + 2 * 8 * 64)
    last = 16 * 2 * 2 * 64 * 64 + 2 * 2 * (
        10 * 64 * 64 + 2 * 8 * 64
    )  # keys and values of all, the rest of two [CLS]
    assert bench.flops(args) == pytest.approx(3 * (2 * layer + last), rel=1e-2)


def test_the_lower_bound_by_hand():
    """With one operation and one byte per second.

    Adam passes 7 times over scores of 4 bytes, and one pass is over them and the weights.
    """
    args = bench.parse_args(SMALL)
    learner = train.Learner(bench.make_model(args), METHODS["smp-s"], torch.bfloat16)
    scores = 3 * (4 * 64 * 64 + 2 * 64 * 256)
    moved = 7 * 4 * scores + 4 * scores + 2 * scores
    assert bench.lower_bound_ms(args, learner, 1, 1) == 1000 * (bench.flops(args) + moved)


def test_a_language_model_is_timed_too(capsys, make_gpt2, peaks_are_known):
    bench.main([*SMALL, "--dtype", "float32", "--gpt2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        line["gpt2"] and line["smp-s"] > 0 < line["finetune"] and line["smp-s over its floor"] > 1
    )
    # All layers see all tokens. The head is a product forward and one for the gradients of its
    # inputs.
    layer = 16 * 2 * (12 * 64 * 64 + 2 * 8 * 64)
    head = 2 * 2 * 16 * 64 * 50257
    assert bench.flops(bench.parse_args([*SMALL, "--gpt2"])) == 3 * 3 * layer + head
    bench.main([*SMALL[4:], "--model", str(make_gpt2())])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["evaluation"] > 0


def test_shapes_that_cannot_be_are_refused(fails):
    assert "--hidden must be a multiple of 64" in fails(bench.main, ["--hidden", "100"])
    assert "--steps: must be a whole number from 1" in fails(bench.main, ["--steps", "0"])
    assert "--steps: must be a whole number from 1 to 10,000" in fails(
        bench.main, ["--steps", "99999999999999999999"]
    )
    assert "--layers: must be a whole number from 1 to 1,000" in fails(
        bench.main, ["--layers", "10000000"]
    )
