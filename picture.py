"""Masks to look at: density maps for the terminal, a picture with the training curves, and two masks compared.

What it is: lines of text, and with matplotlib, which only `plot` needs, a PNG, SVG or PDF. What it is not: it loads and
evaluates nothing. Sources: none.

    print("\\n".join(density_map(densities(groups, masks))))
"""

import json
import sys

import numpy as np

WIDTH = 12  # of a column: six groups and the layer's name in 80 columns


def densities(groups, masks):
    """{group: [matrix names]}, masks {name: bool [out, in]} -> {group: [density of each layer]}."""
    return {group: [masks[name].float().mean().item() for name in names] for group, names in groups.items()}


def head_densities(groups, masks, heads):
    """-> [layers, heads]: share kept of the rows of query, key and value and the columns of the output of each head."""
    rows = [[masks[name] for name in groups[group]] for group in ("query", "key", "value")]
    rows.append([masks[name].T for name in groups["attn_output"]])
    return np.array([[m.float().reshape(heads, -1).mean(1).tolist() for m in kind] for kind in rows]).mean(0)


def shade(value, highest, width):
    """A bar of one shade, darker for more; plain signs where the terminal knows no blocks."""
    shades = " ░▒▓█" if (sys.stdout.encoding or "").lower().startswith("utf") else " .:+#"
    return shades[min(int(np.ceil(4 * value / highest)), 4) if highest else 0] * width


def header(first, names):
    short = (name.replace("_", " ").replace("intermediate", "intermed.") for name in names)
    return f"{first:8}" + "".join(f"{name:>{WIDTH}}" for name in short)


def density_map(found):
    """Lines of a table from densities(): layers by groups, shaded relative to the densest matrix."""
    table = np.array(list(found.values())).T  # [layers, groups]
    lines = [header("density", found)]
    for i, row in enumerate(table):
        cells = (f"{shade(v, table.max(), WIDTH - 7)} {v:.3f}" for v in row)
        lines.append(f"layer {i:<2}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    return [*lines, header("all", [f"{v:.4f}" for v in table.mean(0)])]


def head_map(found):
    """Lines: the density of each attention head in percent, a row a layer, from head_densities()."""
    lines = ["heads, % " + "".join(f"{h:>4}" for h in range(found.shape[1]))]
    for i, row in enumerate(found):
        lines.append(f"layer {i:<3}" + "".join(f" {shade(v, found.max(), 1)}{100 * v:2.0f}" for v in row))
    return lines


def comparison(groups, a, b):
    """Lines: of what mask a keeps, the share that b keeps too, and in brackets what chance would give.

    Chance: as many weights of each matrix as b keeps, drawn at random. Raises ValueError if they are of other shapes.
    """
    if {n: m.shape for n, m in a.items()} != {n: m.shape for n, m in b.items()}:
        raise ValueError("the two masks are of models of different shapes; they cannot be compared")
    both = {name: (a[name] & b[name]).float().mean().item() for name in a}
    kept = [densities(groups, masks) for masks in (a, b)]
    lines = ["share of the first mask's weights that the second keeps too (by chance)", header("shared", groups)]
    for i in range(len(next(iter(groups.values())))):
        cells = []
        for group, names in groups.items():
            share = both[names[i]] / kept[0][group][i] if kept[0][group][i] else 0.0
            cells.append(f"{share:.2f} ({kept[1][group][i]:.2f})")
        lines.append(f"layer {i:<2}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    kept_by_a = max(sum(int(mask.sum()) for mask in a.values()), 1)
    total = sum(int((a[n] & b[n]).sum()) for n in a) / kept_by_a
    chance = sum(a[n].sum().item() * b[n].float().mean().item() for n in a) / kept_by_a
    lines.append(f"{total:.3f} of what the first mask keeps is kept by the second too; chance would share {chance:.3f}")
    return lines


def read_log(path):
    """log.jsonl -> (loss lines, evaluation lines). Raises ValueError when it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [line for line in lines if "loss" in line], [line for line in lines if "dev" in line]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the log of a run: {error}") from None


def figure_of(width, height):
    """An empty matplotlib Figure. Raises ValueError when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures are drawn with matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    """Raises ValueError when matplotlib does not know the kind of file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plot_curves(path, curves, label):
    """Draw {name: [(sparsity, mean, standard deviation)]}; a curve of one point becomes a line across."""
    figure = figure_of(6, 3.6)
    axes = figure.subplots()
    for name, points in curves.items():
        if len(points) == 1:
            axes.axhline(points[0][1], ls="--", color="gray", label=name)
        else:
            sparsities, means, spreads = zip(*points, strict=True)
            axes.errorbar(sparsities, means, spreads, fmt="o-", capsize=3, label=name)
    axes.set_xlabel("sparsity: share of weights removed")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def plot(path, title, found, log):
    """Draw densities() and, from (loss lines, evaluation lines) of a log, the training curves."""
    figure = figure_of(11, 4.2)
    left, right = figure.subplots(1, 2)
    table = np.array(list(found.values())).T
    image = left.imshow(table, vmin=0, vmax=table.max(), cmap="viridis", aspect="auto")
    left.set_xticks(range(len(found)), [name.replace("_", "\n") for name in found], fontsize=8)
    left.set_yticks(range(len(table)), [f"layer {i}" for i in range(len(table))], fontsize=8)
    for (i, j), v in np.ndenumerate(table):
        color = "black" if v > 0.6 * table.max() else "white"
        left.text(j, i, f"{v:.3f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=left)
    left.set_title(f"{title}: share of weights kept", fontsize=10)
    losses, evaluations = log
    right.plot([line["step"] for line in losses], [line["density"] for line in losses], label="density")
    right.plot([line["step"] for line in losses], [line["loss"] for line in losses], label="training loss", lw=0.8)
    for metric in evaluations[0]["dev"] if evaluations else ():
        steps = [line["step"] for line in evaluations]
        right.plot(steps, [line["dev"][metric] for line in evaluations], "o-", label=f"dev {metric}")
    right.set_xlabel("step")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    save(figure, path)
