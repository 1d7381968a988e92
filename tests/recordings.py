"""For the tests of replay.py: replay a folder, and alter a recorded number."""

import json

import pytest
import replay
from safetensors.torch import load_file, save_file


def replayed(folder, capsys):
    """-> (exit status, {quantity: largest deviation}, names of those beyond their bounds)."""
    with pytest.raises(SystemExit) as ended:
        replay.main([str(folder)])
    said = capsys.readouterr()
    return (
        ended.value.code,
        json.loads(said.out),
        {line.split(": ")[1] for line in said.err.splitlines()},
    )


def nudge_file(folder, name, key, numbers=8):
    """Alter a few numbers of a tensor of a file, by default of its first."""
    tensors = load_file(folder / name)
    key = key or next(iter(tensors))
    tensors[key].view(-1)[:numbers] = 1 - tensors[key].view(-1)[:numbers]
    save_file(tensors, folder / name)
