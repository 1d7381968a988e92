"""Masks to look at: the density of each attention head, two masks compared, a drawing.

The drawing shows the mask beside the training curves.

    python -m tools.picture RUN                  # density of matrices and heads
    python -m tools.picture RUN RUN              # how much of the first mask the second keeps too
    python -m tools.picture RUN --out map.png    # needs matplotlib
"""

import json
import os
from io import BytesIO
from pathlib import Path

import numpy as np

from eval import densities, load_run
from plumbing.cli import Parser, one_line_errors, shade, shaded_table, table_row
from plumbing.files import prefix_errors, shapes_of, split_lines, write_whole

LARGEST = 1e9  # matplotlib would take for ever to place the ticks of larger numbers
# What is raised by a line that is not JSON, holds something else or is nested too deeply.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def head_densities(groups, masks, heads):
    """Share of weights that each head keeps -> [layers, heads].

    A head owns rows of query, key and value, and columns of the attention output.
    """
    kinds = []  # [4 kinds, layers, heads]
    for group in ("query", "key", "value", "attn_output"):
        layers = []
        for name in groups[group]:
            mask = masks[name].T if group == "attn_output" else masks[name]
            by_head = mask.float().reshape(heads, -1)
            layers.append(by_head.mean(1).tolist())
        kinds.append(layers)
    return np.array(kinds).mean(0)


def head_map(shares):
    """Lines with the density of each attention head in percent, one row per layer.

    shares: what head_densities() returns.
    """
    layers, heads = shares.shape
    lines = ["heads, % " + "".join(map("{:>4}".format, range(heads)))]
    for i in range(layers):
        line = f"layer {i:<3}"
        for value in shares[i]:
            line += f" {shade(value, shares, 1)}{100 * value:2.0f}"
        lines.append(line)
    return lines


def comparison(groups, a, b):
    """Lines with the share of mask a's weights that mask b keeps too, and in brackets by chance.

    By chance: if b's weights were drawn at random, as many per matrix as it keeps. Raises
    ValueError if the masks have different shapes.
    """
    if shapes_of(a) != shapes_of(b):
        raise ValueError("the two masks are of models of different shapes; they cannot be compared")
    names = [group.replace("_", " ").replace("intermediate", "intermed.") for group in groups]
    title = "share of the first mask's weights that the second keeps too (by chance)"
    lines = [title, table_row("shared", names)]

    totals = np.zeros(3)  # weights that a keeps, that b keeps of them, and by chance
    for i, layer in enumerate(zip(*groups.values(), strict=True)):
        cells = []
        for name in layer:
            kept = a[name].sum().item()
            shared = (a[name] & b[name]).sum().item()
            chance = b[name].float().mean().item()
            cells.append(f"{shared / max(kept, 1):.2f} ({chance:.2f})")
            totals += [kept, shared, kept * chance]
        lines.append(table_row(f"layer {i}", cells))

    _, share, by_chance = totals / max(totals[0], 1)
    lines.append(
        f"the second mask keeps {share:.1%} of what the first keeps; "
        f"by chance it would be {by_chance:.1%}"
    )
    lines.append("how much of it is the task? compare with a mask trained on shuffled labels")
    return lines


# --- pictures ---------------------------------------------------------------------------------


def figure_of(width, height):
    """Make an empty matplotlib Figure. Raises ValueError if matplotlib is missing."""
    # A figure needs no backend. A notebook names its own here, which may not be installed.
    os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures are drawn with matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Save a figure in the format of the file's suffix, by default as PNG.

    Raises ValueError if matplotlib does not know the format.
    """
    buffer = BytesIO()
    with prefix_errors(path):
        figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=110)
    write_whole(path, buffer.getvalue())


def plot_prices(path, curves):
    """Draw what a task stores against its score: {method: [(MB, mean, standard deviation)]}."""
    figure = figure_of(7.2, 3.6)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.errorbar(*zip(*points, strict=True), fmt="o-", label=name)
    axes.set(
        xscale="log",
        xlabel="MB per task, beside the backbone",
        ylabel="mean dev score of the tasks",
    )
    figure.legend(loc="outside right upper")
    save(figure, path)


def read_log(path):
    """Read log.jsonl, if there is one -> (losses, evaluations), two lists of dicts.

    A loss has step, density and loss. An evaluation has step and dev, {metric: number}. Raises
    ValueError that names a line which does not belong in a run's log.
    """
    losses, evaluations = [], []
    if not path.exists():  # as beside a mask file that was taken out of its folder
        return losses, evaluations
    text = path.read_text("utf-8", "replace")
    for number, content in enumerate(split_lines(text), 1):
        try:
            line = json.loads(content)
            if "dev" in line:
                evaluations.append(line)
                numbers = line["dev"].values()
                if line["dev"].keys() != evaluations[0]["dev"].keys():
                    raise ValueError
            else:
                losses.append(line)
                numbers = line["density"], line["loss"]
            if not all(abs(value) < LARGEST for value in (line["step"], *numbers)):
                raise ValueError
        except MALFORMED:
            raise ValueError(f"{path}:{number} is not a line of a run's log; take it out") from None
    return losses, evaluations


def curves_of(log):
    """Read a run's log, if there is one -> {"density", "loss" or "dev ...": [(step, value)]}."""
    losses, evaluations = read_log(log)
    curves = {}
    for name in ("density", "loss") if losses else ():
        curves[name] = [(line["step"], line[name]) for line in losses]
    for metric in evaluations[0]["dev"] if evaluations else ():
        curves[f"dev {metric}"] = [(line["step"], line["dev"][metric]) for line in evaluations]
    return curves


def plot_run(path, run, shares, log):
    """Draw densities() of a loaded run beside its training curves, if there is a log of them."""
    curves = curves_of(log)
    result = run.result
    figure = left = figure_of(11, 4.4)
    if curves:
        left, right = figure.subfigures(1, 2)
        draw_curves(right, curves, result["density"])
    axes = left.subplots()
    draw_densities(axes, shares)
    axes.set_title(f"{result['task']}, {result['method']}: share of weights kept", fontsize=10)
    save(figure, path)


def draw_curves(figure, curves, target):
    """Draw curves {name: [(step, value)]} below each other, and the target density."""
    panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker=".")
        # The axis holds 0 and 1, so that small changes look small.
        axes.set_ylim(min(0, *values), 1.05 * max(1, *values))
        axes.grid(alpha=0.3)
        title = f"{name} {values[-1]:.3g}"
        if name == "density":
            title += f", target {target:.3g}"
            axes.axhline(target, ls="--", color="gray", lw=0.8)
        axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def top_of_scale(table):
    """Colours of densities go from 0 to twice their mean, so that 0.43 and 0.54 look alike."""
    return max(table.max(), min(1, 2 * table.mean().round(3)), 0.01)


def draw_densities(axes, shares):
    """Draw densities {group: [value per layer]} as a heat map with numbers."""
    table = np.array(list(shares.values())).T  # [layers, groups]
    layers, columns = table.shape
    high = top_of_scale(table)
    image = axes.imshow(table, vmin=0, vmax=high, cmap="YlGnBu", aspect="auto")
    names = [name.replace("_", "\n") for name in shares]
    axes.set_xticks(range(columns), names, fontsize=8)
    axes.set_yticks(range(layers), [f"layer {i}" for i in range(layers)], fontsize=8)
    for (i, j), value in np.ndenumerate(table):
        color = "black" if value < 0.6 * high else "white"
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
    axes.figure.colorbar(image, ax=axes)


# --- the command ------------------------------------------------------------------------------


def load_masked(path, model):
    """Load a run. Raises ValueError if it has no mask."""
    run = load_run(path, model)
    if not run.masks:
        raise ValueError(f"{path} has no mask to look at")
    return run


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.picture",
        description="Look at the mask of a run, or compare those of two.",
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="one or two run folders or mask files")
    add("--out", type=Path, metavar="FILE.png", help="draw the mask and the training curves")
    add("--model", metavar="FOLDER", help="where the backbone is now")
    args = parser.parse_args(argv)
    if len(args.runs) > (1 if args.out else 2):
        parser.error("--out draws one run; leave it out to compare two")
    first, *others = [load_masked(path, args.model) for path in args.runs]
    groups = first.model.prunable()
    shares = densities(groups, first.masks)
    if others:
        lines = comparison(groups, first.masks, others[0].masks)
    elif args.out:
        plot_run(args.out, first, shares, args.runs[0] / "log.jsonl")
        lines = [args.out]
    else:
        heads = head_densities(groups, first.masks, first.model.config.layers[0][0])
        lines = shaded_table(shares) + head_map(heads)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
