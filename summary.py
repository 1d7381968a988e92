"""What a finished run says last: its metrics beside the dense reference, its mask, its files, and what to type next.

What it is: lines of text, made of result.json. What it is not: it computes nothing. Sources: none.

    print("\\n".join(lines(read_result(run), ["--seed", "1"], run)))
"""

import shlex

from data import TASKS
from eval import show
from mask import METHODS
from picture import density_map

# Known dense reference points of (task, model, steps), see results/README.md.
DENSE = {("movies", "minilm", 598): "accuracy 0.865 +- 0.005, three seeds, fine-tuned at --weight-lr 1e-4"}
DENSE_LR = {"minilm": "1e-4"}  # where another than the default is known to be better
OF_PRUNING = (
    "--method --sparsity --lr --ramp --hold --schedule --penalty --temperature --teacher --ffn-share --out".split()
)


def lines(result, argv, folder):
    """What result.json holds, the words after train.py, the run folder -> lines."""
    best, row = result["best"], METHODS[result["method"]]
    found = [f"final  dev {show(result['final'])}"]
    found.append(f"best   dev {show(best['dev'])} at step {best['step']}, chosen on dev (as papers report)")
    known = DENSE.get((result["task"], result["model"], result["steps"]))
    if known and result["method"] != "finetune":
        found.append(f"dense  dev {known}")
    if "densities" in result:
        found += density_map(result["densities"])
        found.append(f"kept   {result['kept']:,} of {result['prunable']:,} weights: density {result['density']:.6f}")
        if abs(result["reached"] - result["density"]) > 1e-3:
            share = f"{result['reached']:.4f}"
            found.append(f"training by itself keeps a share of {share}; no more is kept than was asked for")
        if not row.trains_weights:
            found.append(
                f"frozen weights are bit-identical to those of {result['model']} ({result['fingerprint'][:12]})"
            )
    saved = [folder / name for name in ("mask.safetensors", *result["sha256"]) if (folder / name).exists()]
    sizes = " and ".join(f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in saved)
    found.append(f"saved  {sizes} after {result['seconds']:.0f} s")
    look = shlex.join(["python", "eval.py", str(folder)])
    pair = ' --pair "..."' if len(TASKS[result["task"]].text) == 2 else ""
    found += [f"next   {look}", f'       {look} --text "..."{pair}']
    if result["method"] != "finetune":
        found.append(f"       {dense_command(argv, result['model'])}")
    return found


def dense_command(argv, model):
    """The command of the dense reference point of a run: its own words, less those about pruning."""
    kept, value_follows = [], False
    for word in argv:
        if value_follows or word.partition("=")[0] in OF_PRUNING:
            value_follows = not value_follows and "=" not in word
        else:
            kept.append(word)
    if model in DENSE_LR and not any(word.startswith("--weight-lr") for word in kept):
        kept += ["--weight-lr", DENSE_LR[model]]
    return shlex.join(["python", "train.py", *kept, "--method", "finetune"])
