"""maskfile.py: round trips, sizes, and files that were cut, altered or made to harm."""

import json
import lzma

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file

import maskfile
from maskfile import load_masks, pack_masks

RUN = {"task": "movies", "sparsity": 0.5}


def random_masks(density=0.5, shape=(30, 37), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.rand(shape, generator=g) < density for i in range(3)}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.97, 1.0])
def test_round_trip(tmp_path, density):
    masks, head = random_masks(density), {"classifier.weight": torch.randn(2, 5), "classifier.bias": torch.randn(2)}
    (tmp_path / "m").write_bytes(pack_masks(masks, RUN, head))
    loaded, loaded_head, run = load_masks(tmp_path / "m")
    assert run == RUN and loaded.keys() == masks.keys() and all(loaded[n].equal(m) for n, m in masks.items())
    assert loaded_head.keys() == head.keys() and all(loaded_head[n].equal(t) for n, t in head.items())


def test_one_bit_a_weight_and_less_where_few_remain():
    sizes = [len(pack_masks(random_masks(density, (800, 1000)), RUN)) for density in (0.5, 0.1, 0.03)]
    assert sizes[0] < 300_000 + 1000 and sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.25 * sizes[0]


def test_cut_or_altered_files_are_refused_wherever_it_is(tmp_path):
    whole, path = pack_masks(random_masks(), RUN, {"classifier.bias": torch.zeros(2)}), tmp_path / "m"
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_masks(path)
    for at in np.random.default_rng(0).integers(0, len(whole), 400):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="m (was altered|is not a|does not hold)"):
            load_masks(path)


def sealed(tensors, shapes, run="{}"):
    """A file whose sum is right, whatever else is wrong with it."""
    header = {
        "format": maskfile.FORMAT,
        "shapes": shapes if isinstance(shapes, str) else json.dumps(shapes),
        "run": run,
    }
    return save(tensors, header | {"sha256": maskfile.digest(header, tensors)})


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        ({"a": np.zeros(2, np.uint8)}, {"a": [3, 3, 9]}),
        ({"a": np.zeros(2, np.uint8)}, {"a": [-3, -5]}),
        ({"a": np.zeros(2, np.uint8)}, {"a": [1 << 40, 1 << 40]}),
        ({"a": np.zeros(2, np.uint8)}, {"a": 15}),
        ({"a": np.zeros(2, np.uint8)}, {"b": [3, 5]}),
        ({"a": np.zeros(2, np.uint8)}, [1]),
        ({"a": np.zeros(2, np.uint8)}, "{"),
        ({"a": np.zeros(2, np.float32)}, {"a": [3, 5]}),
        ({"a": np.frombuffer(lzma.compress(bytes(10**6)), np.uint8)}, {"a": [100, 100]}),
        ({"a": np.frombuffer(lzma.compress(bytes(10)), np.uint8)}, {"a": [100, 100]}),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, tensors, shapes):
    (tmp_path / "m").write_bytes(sealed(tensors, shapes))
    with pytest.raises(ValueError, match="does not hold what its header says"):
        load_masks(tmp_path / "m")


def test_other_files_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m")
    with pytest.raises(ValueError, match="not a mask file of format"):
        load_masks(tmp_path / "m")
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "m", {"format": maskfile.FORMAT})
    with pytest.raises(ValueError, match="was altered"):
        load_masks(tmp_path / "m")
