"""What only a GPU can show: no step waits for the host, and a recorded step is the step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mask
import train
from data import Part
from mask import METHODS
from model import Bert, Config
from plumbing.graphs import Recorded, compile_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
# Methods that change the model before training have ordinary steps.
STEPS = [name for name, method in METHODS.items() if not method.before]
needs_rivals = pytest.mark.skipif("l0" not in METHODS, reason="extras/ is not there")
TINY = Config(
    1000, 128, 2, 4, 256, 64, 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)


def make(method="smp-s", dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = Bert(TINY, [3, 4]).requires_grad_(False).cuda()
    for table in (module for module in model.modules() if isinstance(module, nn.Embedding)):
        nn.init.normal_(table.weight)  # a checkpoint would fill it
    learner = train.Learner(model, METHODS[method], dtype)
    for scores in learner.masks.scores.values() if learner.masks else ():
        scores.data.normal_(0, 0.1)
    return model, learner, train.make_forward_backward(model, learner)


def numbers(density, penalty):
    return torch.tensor(density, device="cuda"), torch.tensor(penalty, device="cuda")


def batch(rows, width, share=1.0):
    ids = torch.randint(
        0, 1000, (rows, width), generator=torch.Generator().manual_seed(width)
    ).cuda()
    return Part(
        torch.stack([ids, torch.zeros_like(ids), torch.ones_like(ids)]), ids[:, 0] % 2, share
    )


@pytest.mark.parametrize("method", STEPS)
def test_no_step_waits_for_the_host(method):
    _, learner, forward_backward = make(method)
    adam = train.make_optimizer(learner, 2e-2, 3e-5)
    parts, (density, penalty) = [batch(8, 16)], numbers(0.7, 10.0)
    train.set_rates(adam, 0, 10)
    train.train_step(forward_backward, adam, parts, density, penalty)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.set_rates(adam, 1, 10)
        train.train_step(forward_backward, adam, parts, density, penalty)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients_of(function, learner, parts, density, penalty):
    """-> (losses of the parts, gradients of the whole batch)."""
    learner.zero_grad()
    losses = [function(part.inputs, part.labels, part.share, density, penalty) for part in parts]
    return torch.stack(losses), [p.grad.clone() for p in learner.parameters()]


@pytest.mark.parametrize(
    "method", [name for name in STEPS if name != "l0"]
)  # whose gates are drawn
def test_recorded_gradients_are_the_gradients(method):
    """Of several shapes in turn, which share their memory, and of a batch in parts."""
    _, learner, plain = make(method)
    recorded = Recorded(plain, learner.parameters())
    shapes = [
        [batch(8, 16)],
        [batch(8, 24)],
        [batch(8, 16)],
        [batch(5, 24, 0.5), batch(5, 16, 0.5)],
        [batch(3, 24)],
    ]
    for number, parts in enumerate(shapes):
        density, penalty = numbers(1 - 0.1 * number, 10.0 * number)
        losses, gradients = gradients_of(plain, learner, parts, density, penalty)
        recorded_losses, recorded_gradients = gradients_of(
            recorded, learner, parts, density, penalty
        )
        assert torch.allclose(losses, recorded_losses, rtol=1e-4)
        for g, r in zip(gradients, recorded_gradients, strict=True):
            assert (g - r).norm() <= 1e-2 * g.norm()
    assert len(recorded.graphs) == 5


@needs_rivals
def test_a_replay_draws_new_gates():
    _, learner, plain = make("l0")
    recorded = Recorded(plain, learner.parameters())
    part = batch(8, 16)
    losses = [
        recorded(part.inputs, part.labels, 1.0, *numbers(0.7, 10.0))[0].item() for _ in range(4)
    ]
    assert len(set(losses)) == 4


def test_graphs_share_their_memory():
    _, learner, plain = make()
    recorded = Recorded(plain, learner.parameters())
    used = []
    for width in range(4, 64, 4):
        learner.zero_grad()
        part = batch(8, width)
        recorded(part.inputs, part.labels, 1.0, *numbers(0.7, 10.0))
        used.append(torch.cuda.memory_allocated())
    assert used[-1] - used[1] < sum(
        4 * p.numel() for p in learner.parameters()
    )  # not a set of gradients each


@needs_rivals
def test_deterministic_runs_give_the_same_bits(make_model, glue, tmp_path):
    """In processes of their own, because cuBLAS reads its settings once."""
    found = []
    for name in ("a", "b"):
        flags = [
            "--model",
            make_model(name),
            "--data-dir",
            glue,
            "--out",
            tmp_path / f"run-{name}",
            "--steps",
            40,
        ]
        script = [sys.executable, Path(train.__file__).with_name("train.py"), *flags]
        script += ["--length", "16"]
        subprocess.run(
            [str(a) for a in [*script, "--deterministic", "--method", "movement"]], check=True
        )
        found.append(
            [
                (tmp_path / f"run-{name}" / f"{file}.safetensors").read_bytes()
                for file in ("model", "mask")
            ]
        )
    masks = [
        mask[8 + int.from_bytes(mask[:8], "little") :] for _, mask in found
    ]  # behind the header with the folder
    assert found[0][0] == found[1][0] and masks[0] == masks[1]


def test_thresholds_without_sorting_are_near_enough():
    scores = torch.randn(3, 700_000, device="cuda") * torch.rand(700_000, device="cuda") ** 3
    for density in (0.03, 0.5, 0.97):
        k = torch.full((3,), int(density * 700_000), device="cuda")
        kept = (scores >= mask.about_kth_largest([scores], k[None])[0][:, None]).sum(1)
        assert ((kept - k).abs() <= 700).all()


def test_a_compiled_step_computes_the_same_and_is_not_compiled_for_every_width():
    _, learner, plain = make(dtype=torch.float32)
    model, compiled_learner, compiled = make(dtype=torch.float32)
    compile_step(model, compiled_learner.masks)
    compiled = Recorded(compiled, compiled_learner.parameters())
    compilations = []
    for width in range(8, 40, 4):
        parts, (density, penalty) = [batch(8, width)], numbers(0.7, 10.0)
        losses, gradients = gradients_of(plain, learner, parts, density, penalty)
        compiled_losses, compiled_gradients = gradients_of(
            compiled, compiled_learner, parts, density, penalty
        )
        assert torch.allclose(losses, compiled_losses, rtol=1e-4)
        for g, c in zip(gradients, compiled_gradients, strict=True):
            assert (g - c).norm() <= 1e-3 * g.norm()
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(compilations[2:])) == 1  # the first widths show what varies
