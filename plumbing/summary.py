"""The lines that train.py and eval.py print about a run.

for line in summary(result, folder, ["mask.safetensors"], {"dev": examples}):
    print(line)
"""

import math
import shlex
from collections import Counter

from plumbing.cli import shaded_table, show

OPENING = """\
{task}: {rows} train examples; {total} steps of {batch}
{model}, {method}, sparsity {sparsity:g} (density {density:.4g}) -> {out}
on {machine}"""
KEPT = "kept   {kept:,} of {prunable:,} weights: density {density:.6f}"
REACHED = "the training mask keeps a share of {reached:.4f}, for a sparsity of {sparsity:.4g}"
FROZEN = "no frozen weight has moved; the backbone is {model} ({fingerprint:.12})"
GUESSING = (
    "the model only guesses: the commonest answer alone has accuracy {:.4f}. Train longer (--steps)"
)


def evaluation(step, density, dev):
    """Format one evaluation as a line."""
    return f"step {step:5}  density {density:.3f}  dev {show(dev)}"


def opening(args, train, dev, total, density, machine):
    """Yield the lines to print before a run begins or continues.

    train: Examples. dev: {split: Examples}.
    """
    facts = {"rows": len(train), "total": total, "density": density, "machine": machine}
    yield OPENING.format(**vars(args), **facts)
    yield from cut_texts(args.length, {"train": train} | dev)


def cut_texts(length, sets):
    """Yield a line for each of {name: Examples} of which --length cuts texts."""
    for name, examples in sets.items():
        if examples.cut:
            count = examples.num_questions()
            yield f"--length {length} cuts {examples.cut:,} of {count:,} {name} texts"


def summary(result, folder, files, dev):
    """Yield the lines to print about a finished run.

    files: the names of what it wrote. dev: {split: Examples}.
    """
    yield f"final  dev {show(result['final'])}"
    best = result["best"]
    yield f"best   dev {show(best['dev'])} at step {best['step']}, at the final density"
    if "kept" in result:  # it has a mask
        yield from shaded_table(result["densities"])
        yield KEPT.format(**result)
        if abs(result["reached"] + result["sparsity"] - 1) > 0.01:  # it is not 1 - sparsity
            yield REACHED.format(**result)
    if not result["sha256"]:  # no model was saved, so train.py has checked what is frozen
        yield FROZEN.format(**result)
    for name in files:
        size = (folder / name).stat().st_size / 1e6
        yield f"saved  {folder / name} ({size:.1f} MB) after {result['seconds']:.0f} s"
    yield f"next   python eval.py {shlex.quote(str(folder))}"
    yield from guessing(result["final"], dev)


def guessing(metrics, dev):
    """Yield a line if the model is hardly better than one answer for every example.

    "Hardly" means that its accuracy lies within two standard errors of it.
    """
    if next(iter(metrics)) == "accuracy":
        labels = next(iter(dev.values())).labels  # of the first set, as the metric is
        commonest = max(Counter(labels).values()) / len(labels)
        error = math.sqrt(commonest * (1 - commonest) / len(labels))
        if metrics["accuracy"] < commonest + 2 * error:
            yield GUESSING.format(commonest)
