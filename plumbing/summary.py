"""The lines that train.py and eval.py print about a run, and the file of answers for GLUE's server.

for line in summary(result, folder, {"dev": examples}, texts=1):
    print(line)
"""

import math
import shlex
from collections import Counter

from plumbing.cli import flag, shaded_table, show
from plumbing.files import write_whole


def evaluation(step, density, dev):
    """Format one evaluation as a line."""
    return f"step {step:5}  density {density:.3f}  dev {show(dev)}"


def opening(args, run, train, dev, total, density, machine, needed):
    """Yield the lines to print before a run begins or continues.

    train: Examples. dev: {split: Examples}. needed: with fewer steps, such a run only guesses.
    """
    rows = sum(len(examples) for examples in dev.values())
    yield f"{args.task}: {len(train)} train, {rows} dev examples; {total} steps of {args.batch}"
    yield (
        f"{args.model}, {args.method}, "
        f"sparsity {args.sparsity:g} (density {density:.4g}) -> {run.folder}"
    )
    yield f"on {machine}"
    if total < needed:
        yield (
            f"{total} steps are few: on movies, smp-s needs about {needed} "
            "at this sparsity to do more than guess"
        )
    for line in run.evaluations:  # a resumed run has some from before
        yield evaluation(**line)


def summary(result, folder, dev, texts):
    """Yield the lines to print about a finished run.

    dev: {name: labelled Examples}. texts: how many texts the task takes, one or two.
    """
    best = result["best"]
    yield f"final  dev {show(result['final'])}"
    yield f"best   dev {show(best['dev'])} at step {best['step']}, chosen on dev"
    names = list(result["sha256"])
    if "kept" in result:  # it has a mask
        yield from mask_lines(result)
        names.append("mask.safetensors")
    for name in names:
        size = (folder / name).stat().st_size / 1e6
        yield f"saved  {folder / name} ({size:.1f} MB) after {result['seconds']:.0f} s"

    command = shlex.join(["python", "eval.py", str(folder)])
    pair = ' --pair "..."' if texts == 2 else ""
    yield f"next   {command}"
    yield f'       {command} --text "..."{pair}'
    if result["method"] != "finetune":
        yield f"       {dense_command(result)}"
    yield from guessing(result["final"], next(iter(dev.values())).labels, bool(result["sparsity"]))


def mask_lines(result):
    """Yield the lines about a run's mask."""
    yield from shaded_table("density", result["densities"])
    yield (
        f"kept   {result['kept']:,} of {result['prunable']:,} weights: "
        f"density {result['density']:.6f}"
    )
    target = 1 - result["sparsity"]
    reached = result["reached"]
    # Counts are rounded down: that may cost one weight per matrix.
    rounding = sum(map(len, result["densities"].values())) / result["prunable"]
    if abs(reached - target) > 1e-3 + rounding:
        what = "cut to" if reached > target else "less than"
        yield (
            f"the training mask keeps a share of {reached:.4f}, {what} the {target:.4g} asked for"
        )
    if not result["sha256"]:  # without a file of weights, all are frozen, and train.py checked them
        yield (
            f"frozen weights are bit-identical to those of {result['model']} "
            f"({result['fingerprint'][:12]})"
        )


# A dense model trained with these of a run's settings can be compared with it.
COMPARABLE = "task model data_dir head seed steps batch length weight_lr".split()


def dense_command(result):
    """The command that trains the dense model for comparison, with the same settings."""
    words = ["python", "train.py", "--method=finetune"]
    for name in COMPARABLE:
        if result[name] is not None:
            words.append(f"{flag(name)}={result[name]}")
    words.append("--dropout" if result["dropout"] else "--no-dropout")
    return shlex.join(words)


def guessing(metrics, labels, pruned):
    """[a line] if the model is hardly better than one answer for every example, else [].

    "Hardly" means that the first of metrics {name: value} lies within two standard errors of it.
    pruned: whether there is a sparsity to lower.
    """
    metric, value = next(iter(metrics.items()))
    if metric == "accuracy":
        chance = max(Counter(labels).values()) / len(labels)
        error = math.sqrt(chance * (1 - chance) / len(labels))
        what = f"the commonest answer alone has {chance:.4f}"
    elif metric in ("mcc", "pearson"):
        chance = 0.0
        error = 1 / math.sqrt(len(labels))
        what = "one answer for all has 0"
    else:
        return []
    if value > chance + 2 * error or value == 1:
        return []
    remedy = "Train longer (--steps)"
    if pruned:
        remedy += ", or remove less (--sparsity)"
    return [f"the model only guesses: {metric} is {value:.4f}, and {what}. {remedy}"]


def write_predictions(path, names, predicted):
    """Write predictions as GLUE's server takes them, and print the path.

    names: the labels in the order of the classes; a single name means regression. predicted [N]:
    class numbers, or scores.
    """
    if len(names) > 1:
        answers = [names[c] for c in predicted]
    else:
        answers = [f"{score:.3f}" for score in predicted.clip(0, 5)]  # STS-B's range
    rows = "".join(f"{n}\t{answer}\n" for n, answer in enumerate(answers))
    write_whole(path, f"index\tprediction\n{rows}".encode())
    print(f"{path}: {len(answers)} predictions")
