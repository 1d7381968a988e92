"""Several processes, and a batch in parts: the same masks as one process with the whole batch.

Run by torchrun as a script, this file is the processes of its own test.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import load_model  # noqa: E402

import data  # noqa: E402
import eval as eval_  # noqa: E402
from mask import METHODS, density_at, penalty_at  # noqa: E402
from plumbing import parallel  # noqa: E402
from plumbing.checkpoints import cutting_tokenizer  # noqa: E402
from train import (  # noqa: E402
    Learner,
    make_forward_backward,
    make_optimizer,
    set_rates,
    train_step,
)

TOTAL = 12
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TORCHRUN += ["--local-addr=127.0.0.1"]  # the name of the machine may be known to no name server


def learn(folder, glue, parts):
    """12 steps of 10 of 96 examples, no dropout -> (masks, last losses).

    The last batch of an epoch has 6. Scores start apart: where they are almost equal, rounding
    decides which weight goes, and no two sums agree.
    """
    model = load_model(folder, [7, 8]).requires_grad_(False).eval()
    learner = Learner(model, METHODS["smp-s"], torch.float32)
    for scores in learner.masks.scores.values():
        scores.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    adam = make_optimizer(learner, 2e-2, 3e-5)
    forward_backward = make_forward_backward(model, learner)
    examples = data.load_split("movies", "train", glue, cutting_tokenizer(folder, 16))
    batches = data.training_batches(examples, 10, TOTAL, 0, parts=parts)
    for t, batch in enumerate(batches):
        set_rates(adam, t, TOTAL)
        density, penalty = torch.tensor([density_at(t, 9, 0.5), penalty_at(t, TOTAL)])
        losses = train_step(forward_backward, adam, batch, density, penalty)
    (losses,) = parallel.all_reduce([losses])
    return learner.masks.choose(0.5), losses


@pytest.mark.parametrize("way", ["parts", pytest.param("processes", marks=pytest.mark.slow)])
def test_the_same_masks_as_with_the_whole_batch(make_model, glue, tmp_path, way):
    """With ten other seeds no mask differs either, and losses differ by at most 1.2e-7."""
    model = make_model()
    masks, losses = learn(model, glue, 1)
    if way == "parts":
        others, other_losses = learn(model, glue, 3)
    else:
        ended = subprocess.run(
            [*TORCHRUN, __file__, model, glue, tmp_path], capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        others = load_file(tmp_path / "masks.safetensors")
        other_losses = others.pop("losses")
    assert all(masks[name].equal(others[name]) for name in masks)
    assert torch.allclose(losses, other_losses, atol=1e-5)


@pytest.mark.slow
def test_two_processes_from_end_to_end(make_model, glue, tmp_path, capsys):
    flags = ["--model", make_model(), "--data-dir", glue, "--steps", 12, "--batch", 10]
    flags += ["--length", 16]
    flags += ["--out", tmp_path / "run", "--device", "cpu", "--dtype", "float32", "--evals", 4]
    flags = [str(f) for f in flags]
    ended = subprocess.run([*TORCHRUN, ROOT / "train.py", *flags], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("saved ") == 1 and "on 2 x cpu" in ended.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "dev" in line] == [3, 6, 9, 12]
    eval_.main(
        [str(tmp_path / "run")]
    )  # alone, all of the dev set: the answers were gathered in order
    assert (
        f"accuracy {result['final']['accuracy']:.4f}\ntraining reported" in capsys.readouterr().out
    )


def test_shares_are_disjoint(as_process):
    shares = []
    for rank in range(3):
        as_process(rank, 3)
        shares.append(parallel.shard(list(range(8))))
    assert sorted(sum(shares, [])) == list(range(8))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    found, sums = learn(Path(sys.argv[1]), Path(sys.argv[2]), 2)
    if parallel.rank() == 0:
        save_file({**found, "losses": sums}, Path(sys.argv[3]) / "masks.safetensors")
    parallel.stop()
