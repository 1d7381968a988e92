"""What a command says: how a run begins, what came of it, whether it only guesses.

for line in summary(result, folder, {"dev": examples}, texts=1): print(line)
print("\n".join(guessing({"accuracy": 0.514}, labels, pruned=True)))
"""

import math
import shlex
from collections import Counter

from plumbing.cli import flag, shaded_table, show
from plumbing.files import write_whole


def evaluation(step, density, dev):
    """One evaluation as a line."""
    return f"step {step:5}  density {density:.3f}  dev {show(dev)}"


def opening(args, run, train, dev, total, density, machine, needed):
    """Lines on a run before it begins, or continues.

    train: Examples; dev: {split: Examples}; needed: steps below which such a run only guesses.
    """
    rows = sum(len(examples) for examples in dev.values())
    yield f"{args.task}: {len(train)} train, {rows} dev examples; {total} steps of {args.batch}"
    yield f"{args.model}, {args.method}, sparsity {args.sparsity:g} (density {density:.4g}) -> {run.folder}"
    yield f"on {machine}"
    if total < needed:
        yield f"{total} steps are few: on movies, smp-s needs about {needed} at this sparsity to do more than guess"
    for line in run.evaluations:  # of a resumed run, those before it was interrupted
        yield evaluation(**line)


def summary(result, folder, dev, texts):
    """Lines on a finished run: its metrics, its mask, its files, what to type next, and whether it guesses.

    dev: {name: labelled Examples}; texts: how many its task takes, one or two.
    """
    yield f"final  dev {show(result['final'])}"
    yield f"best   dev {show(result['best']['dev'])} at step {result['best']['step']}, chosen on dev"
    if "kept" in result:
        yield from shaded_table("density", result["densities"])
        yield f"kept   {result['kept']:,} of {result['prunable']:,} weights: density {result['density']:.6f}"
        asked = 1 - result["sparsity"]
        rounding = (
            sum(map(len, result["densities"].values())) / result["prunable"]
        )  # one weight a matrix
        if abs(result["reached"] - asked) > 1e-3 + rounding:
            what = "cut to" if result["reached"] > asked else "less than"
            yield f"training by itself keeps a share of {result['reached']:.4f}, {what} the {asked:.4g} asked for"
        if not result["sha256"]:
            yield f"frozen weights are bit-identical to those of {result['model']} ({result['fingerprint'][:12]})"
    for name in (*result["sha256"], *(["mask.safetensors"] if "kept" in result else [])):
        size = (folder / name).stat().st_size / 1e6
        yield f"saved  {folder / name} ({size:.1f} MB) after {result['seconds']:.0f} s"

    look = shlex.join(["python", "eval.py", str(folder)])
    yield f"next   {look}"
    yield f'       {look} --text "..."' + (' --pair "..."' if texts == 2 else "")
    if result["method"] != "finetune":  # the dense model, trained as long and as fast
        given = [
            "task",
            "model",
            "data_dir",
            "head",
            "seed",
            "steps",
            "batch",
            "length",
            "weight_lr",
        ]
        words = [f"{flag(name)}={result[name]}" for name in given if result[name] is not None]
        words.append("--dropout" if result["dropout"] else "--no-dropout")
        yield f"       {shlex.join(['python', 'train.py', '--method=finetune', *words])}"
    yield from guessing(result["final"], next(iter(dev.values())).labels, bool(result["sparsity"]))


def guessing(metrics, labels, pruned):
    """[a line] if the first of {metric: value} is within two standard errors of always the same answer, else [].

    pruned: whether there is a sparsity to lower.
    """
    metric, value = next(iter(metrics.items()))
    if metric == "accuracy":
        floor = max(Counter(labels).values()) / len(labels)
        error = math.sqrt(floor * (1 - floor) / len(labels))
        what = f"the commonest answer alone has {floor:.4f}"
    elif metric in ("mcc", "pearson"):
        floor, error = 0.0, 1 / math.sqrt(len(labels))
        what = "one answer for all has 0"
    else:
        return []
    if value > floor + 2 * error or value == 1:
        return []
    remedy = "Train longer (--steps)" + (", or remove less (--sparsity)" if pruned else "")
    return [f"the model only guesses: {metric} is {value:.4f}, and {what}. {remedy}"]


def write_predictions(path, names, decided):
    """Answers in the format of the GLUE server: index and label as in the training file, or score. Prints the path.

    names: labels in the order of the classes; decided [N]: class numbers, or scores if there is one name.
    """
    answers = (
        [names[c] for c in decided]
        if len(names) > 1
        else [f"{score:.3f}" for score in decided.clip(0, 5)]
    )
    rows = "".join(f"{n}\t{answer}\n" for n, answer in enumerate(answers))
    write_whole(path, f"index\tprediction\n{rows}".encode())
    print(f"{path}: {len(answers)} predictions")
