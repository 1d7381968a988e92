"""plumbing.files: masks in sealed files come back, and altered or harmful files do not."""

import lzma

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from plumbing.files import (
    MASKS,
    load_masks,
    pack_masks,
    seal,
    split_lines,
    unpack_bits,
    write_whole,
)

RUN = {"task": "movies", "sparsity": 0.5}


SHAPES = dict.fromkeys(("layer.0", "layer.1", "layer.2"), [30, 37])


def random_masks(density=0.5, shape=(30, 37), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.rand(shape, generator=g) < density for i in range(3)}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.97, 1.0])
def test_round_trip(tmp_path, density):
    masks, head = (
        random_masks(density),
        {"classifier.weight": torch.randn(2, 5), "classifier.bias": torch.randn(2)},
    )
    (tmp_path / "m").write_bytes(pack_masks(masks, RUN, head))
    loaded, loaded_head = load_masks(tmp_path / "m", SHAPES)
    assert loaded.keys() == masks.keys()
    assert all(loaded[n].equal(m) for n, m in masks.items())
    assert loaded_head.keys() == head.keys() and all(
        loaded_head[n].equal(t) for n, t in head.items()
    )


def test_one_bit_a_weight_and_less_where_few_remain():
    sizes = [
        len(pack_masks(random_masks(density, (800, 1000)), RUN, {})) for density in (0.5, 0.1, 0.03)
    ]
    assert sizes[0] < 300_000 + 1000 and sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.25 * sizes[0]


def test_cut_or_altered_files_are_refused_wherever_it_is(tmp_path):
    whole, path = (
        pack_masks(random_masks(), RUN, {"classifier.bias": torch.zeros(2)}),
        tmp_path / "m",
    )
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_masks(path, SHAPES)
    for at in np.random.default_rng(0).integers(0, len(whole), 400):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="m (was altered, or|is not a whole)"):
            load_masks(path, SHAPES)


TWO = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize("shapes", [{"a": [3, 3, 9]}, {"a": [-3, -5]}, {"a": 15}, {}, [1]])
def test_masks_of_other_shapes_are_refused(tmp_path, shapes):
    (tmp_path / "m").write_bytes(seal(MASKS, {"a": TWO}, {"run": {}, "shapes": shapes}))
    with pytest.raises(ValueError, match="for a backbone of another shape"):
        load_masks(tmp_path / "m", {"a": [3, 5]})


def test_no_more_is_unpacked_than_the_mask_holds():
    """A few bytes may be made to unpack to gigabytes."""
    bomb = torch.tensor(np.frombuffer(lzma.compress(bytes(10**7)), np.uint8))
    assert not unpack_bits(bomb, (400, 400)).any() and bomb.numel() < 20_000


def test_other_files_are_refused(tmp_path):
    save_file({"a": TWO}, tmp_path / "m")
    with pytest.raises(ValueError, match="was altered, or is not of format smp-mask"):
        load_masks(tmp_path / "m", {})
    save_file({"a": TWO}, tmp_path / "m", {"format": MASKS})
    with pytest.raises(ValueError, match="was altered"):
        load_masks(tmp_path / "m", {})
    (tmp_path / "m").write_bytes(seal("smp-checkpoint-2", {"a": TWO}, {"step": 3}))
    with pytest.raises(ValueError, match="was altered, or is not of format smp-mask"):
        load_masks(tmp_path / "m", {})


def test_lines_end_at_a_newline_alone():
    odd = "a\u2028\x85\x0c\x1cb"
    for text, lines in (("", []), ("\n", [""]), ("a\nb", ["a", "b"]), ("a\r\n\n", ["a", ""])):
        assert split_lines(text) == lines == text.splitlines()
    assert split_lines(f"{odd}\n{odd}") == [odd, odd]


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is a folder"):
        write_whole(tmp_path / "out", b"x")
    assert not list(tmp_path.glob(".part-*"))
