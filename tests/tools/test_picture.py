"""tools.picture and density maps: numbers by hand, 80 columns, and what is drawn."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from house import ROOT

import eval as eval_
from plumbing.cli import shaded_table
from tools import picture

GROUPS = {
    group: [f"{group}.{layer}" for layer in range(2)]
    for group in ("query", "key", "value", "attn_output", "intermediate", "output")
}


@pytest.fixture
def masks():
    made = {
        name: torch.zeros(4, 4, dtype=torch.bool) for names in GROUPS.values() for name in names
    }
    made["query.0"][:2] = True  # half: all of head 0, nothing of head 1
    made["attn_output.0"][:, 2:] = True  # all of head 1
    made["key.1"][0, 0] = True
    return made


def test_density_of_matrices_and_heads(masks):
    found = eval_.densities(GROUPS, masks)
    assert (
        found["query"] == [0.5, 0.0]
        and found["key"] == [0.0, 1 / 16]
        and found["output"] == [0.0, 0.0]
    )
    heads = picture.head_densities(GROUPS, masks, heads=2)
    assert np.allclose(heads, [[0.25, 0.25], [1 / 32, 0]])


def test_maps_fit_the_terminal(masks):
    lines = shaded_table(eval_.densities(GROUPS, masks))
    assert all(len(line) <= 80 for line in lines) and lines[0].split()[:3] == [
        "density",
        "query",
        "key",
    ]
    assert [line.split()[-1] for line in lines[1:]] == ["0.000", "0.000", "0.0000"]
    assert "█████ 0.500" in lines[1] and "░░░░░ 0.062" in lines[2] and "0.2500" in lines[3]
    (row,) = picture.head_map(np.full((1, 16), 0.5))[1:]
    assert len(row) <= 80 and row.count("░50") == 16  # all alike
    assert picture.head_map(np.zeros((1, 2)))[1].split() == ["layer", "0", "0", "0"]
    lines = shaded_table({"a": [0.42, 0.46, 0.5, 0.54]})
    assert [line.split()[2] for line in lines[1:-1]] == ["░" * 5, "▒" * 5, "▓" * 5, "█" * 5]
    lines = shaded_table({"a": [0.5, 0.501]})
    assert [line.split()[2] for line in lines[1:-1]] == ["░" * 5] * 2  # all alike


def test_comparison_by_hand(masks):
    other = {name: mask.clone() for name, mask in masks.items()}
    other["query.0"] = torch.zeros(4, 4, dtype=torch.bool)
    other["query.0"][1:3] = True  # shares one of two rows
    lines = picture.comparison(GROUPS, masks, other)
    assert all(len(line) <= 80 for line in lines)
    assert (
        lines[2].split()[2:4] == ["0.50", "(0.50)"]
        and "1.00 (0.50)" in lines[2]
        and "1.00 (0.06)" in lines[3]
    )
    shared, chance = (4 + 8 + 1) / 17, (8 * 0.5 + 8 * 0.5 + 1 / 16) / 17
    assert lines[-2] == (
        f"the second mask keeps {shared:.1%} of what the first keeps; "
        f"by chance it would be {chance:.1%}"
    )
    assert "shuffled labels" in lines[-1]
    nothing = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    assert " keeps 0.0% of what" in picture.comparison(GROUPS, nothing, masks)[-2]
    with pytest.raises(ValueError, match="different shapes"):
        picture.comparison(GROUPS, masks, {"query.0": masks["query.0"]})


@pytest.fixture
def both(finished):
    """The finished run's folder, and its mask as a file of its own."""
    return [str(finished), str(finished / "mask.safetensors")]


def test_what_people_see(capsys, both):
    eval_.main(both[:1])
    lines = capsys.readouterr().out.splitlines()
    found = [
        line.split()[0] for line in lines[1:7]
    ]  # whether it guesses comes behind, see test_train.py
    assert found == ["density", "layer", "layer", "all", "dev", "training"] and len(lines) <= 8
    picture.main(both[:1])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[4:]] == [
        "heads,",
        *["layer"] * 2,
    ]
    picture.main(both)
    said = capsys.readouterr().out.splitlines()[-2]
    assert " keeps 100.0% of what" in said and said.endswith("by chance it would be 50.0%")


def test_a_mask_that_was_handed_on_finds_the_cache(both, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SMP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (Path(both[0]).parent / "glue").rename(tmp_path / "cache" / "glue")
    eval_.main(both[1:])
    assert "dev (40 examples): accuracy" in capsys.readouterr().out


def test_plot_without_matplotlib(both, fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "drawn with matplotlib: pip install" in fails(
        picture.main, [both[0], "--out", tmp_path / "x.png"]
    )


def test_a_figure_needs_no_backend(tmp_path):
    """A notebook's own may be unknown here, so that matplotlib itself would refuse it."""
    pytest.importorskip("matplotlib")
    code = f"""
from pathlib import Path
from tools.picture import figure_of, save
save(figure_of(2, 2), Path({str(tmp_path / "x.png")!r}))
"""
    environment = os.environ | {"MPLBACKEND": "nowhere", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot(both, fails, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture.main([both[0], "--out", str(tmp_path / "x.png")])
    assert capsys.readouterr().out.endswith(".png\n")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    picture.main([both[1], "--out", str(tmp_path / "y.svg")])
    assert "<svg" in (tmp_path / "y.svg").read_text()
    loud = picture.top_of_scale(np.array([[0.43, 0.54]]))
    assert loud == pytest.approx(0.97)  # the colours of 0.43 and 0.54 differ by a ninth of all
    assert picture.top_of_scale(np.array([[0.8, 0.9]])) == 1
    assert picture.top_of_scale(np.array([[0.01, 0.09]])) == pytest.approx(0.1)
    assert picture.top_of_scale(np.zeros((2, 2))) > 0
    assert "x.bad: " in fails(picture.main, [both[0], "--out", tmp_path / "x.bad"])
    assert not (tmp_path / "x.bad").exists()
    picture.main([both[0], "--out", str(tmp_path / "plain")])  # the very name that it was given
    assert (tmp_path / "plain").read_bytes().startswith(b"\x89PNG")
    before = {path.name for path in tmp_path.iterdir()}
    assert f"{tmp_path} is a folder" in fails(picture.main, [both[0], "--out", tmp_path])
    assert {path.name for path in tmp_path.iterdir()} == before
    said = fails(picture.main, [*both, "--out", tmp_path / "x.png"])
    assert "leave it out to compare two" in said


def test_each_quantity_has_an_axis_of_its_own(finished):
    pytest.importorskip("matplotlib")
    curves = picture.curves_of(finished / "log.jsonl")
    assert list(curves) == ["density", "loss", "dev accuracy"]
    figure = picture.figure_of(5, 4)
    picture.draw_curves(figure, curves, 0.5)
    for axes, (name, points) in zip(figure.axes, curves.items(), strict=True):
        assert axes.get_title("left").startswith(name)
        low, high = axes.get_ylim()
        assert low == 0 and high >= 1
        assert list(zip(*axes.lines[0].get_data(), strict=True)) == points
    first = figure.axes[0]
    assert first.get_title("left").endswith(", target 0.5")
    assert list(first.lines[1].get_ydata()) == [0.5, 0.5]
    assert picture.curves_of(finished / "none.jsonl") == {}
