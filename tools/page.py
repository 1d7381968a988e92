"""A mask as one page for the browser: where it keeps weights, its training, what each head does.

The page is a single file under 2 MB. It needs no server, no network and no other file.

    python -m tools.page RUN --out page.html
    python -m tools.page RUN --out page.html --text "a text of one's own"
    python -m tools.page RUN --out page.html --dense RUN  # beside a run of --method finetune
"""

import base64
import html
import struct
import zlib
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F

from data import encode
from eval import densities, masked_weights, predict, read_result
from extras.own import describe_table
from plumbing.cli import Parser, one_line_errors, printable, show
from plumbing.fetch import model_name
from plumbing.files import prefix_errors, write_whole
from tools.export import facts
from tools.picture import curves_of, head_densities, load_masked, top_of_scale

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST = 2_000_000  # bytes of a page
POINTS = 300  # most points of a curve
SHOWN = 2000  # characters of a text that are shown
EXAMPLES = {  # by the number of texts that the task takes
    1: ("slow at first, but warm and funny in the end",),
    2: ("the film made everybody laugh", "it was a comedy"),
}


def scale_of(colours):
    """Colours at equal steps, such as "ffffff e66101" -> uint8 [steps, 3]: red, green, blue."""
    return np.frombuffer(bytes.fromhex(colours), np.uint8).reshape(-1, 3)


# Both work for colour-blind people and in print.
YELLOW_TO_BLUE = scale_of("ffffd9 c7e9b4 41b6c4 225ea8 081d58")
ORANGE_TO_BLUE = scale_of("e66101 fdb863 ffffff 92b2de 2166ac")

CURVE = """<figure><figcaption>{name} <strong>{end:.3g}</strong>{mark}</figcaption>
<svg viewBox="0 0 310 152" role="img" aria-label="{name}">
<line x1="44" y1="130" x2="305" y2="130"/><line x1="44" y1="15" x2="305" y2="15"/>
<text x="38" y="133" text-anchor="end">{low:.3g}</text>
<text x="38" y="18" text-anchor="end">{high:.3g}</text>
<text x="44" y="146">{first:.0f}</text>
<text x="174" y="146" text-anchor="middle">step</text>
<text x="305" y="146" text-anchor="end">{last:.0f}</text>
<line class="{marked}" x1="44" y1="{level:.1f}" x2="305" y2="{level:.1f}"/>
<polyline points="{corners}"/>{dots}
</svg></figure>"""
DOT = '<circle cx="{:.1f}" cy="{:.1f}" r="3"><title>step {:.0f}: {:.4g}</title></circle>'
SENTENCE = """<blockquote>{shown}</blockquote>
<p>The pruned model says {answer}. The table shows how {what} when the output of one
head is set to zero. Blue: it falls without this head. Orange: it rises.{flips}</p>
<div class="wide changes">{table}</div>
{legend}"""
CLASS = "<strong>{}</strong> ({}), with a probability of {:.4f}"
FLIPS = " A frame marks heads without which it gives another answer."
BUTTON = """<button type="button" class="matrix {group}" id="{group}-{layer}" {data}
title="layer {layer}, {title}: {rows} × {columns}, density {density:.4f}">
<img alt="the mask of layer {layer}, {title}" src="data:image/png;base64,{image}">
{title} <strong>{density:.3f}</strong></button>"""
NUMBER = '<p class="number"><strong>{:.3f}</strong> {}</p>'
WHAT = """Task {task}, backbone {name}, method {method}. {kept:,} of {prunable:,} weights are
kept: density {density:.4f}, sparsity {removed:.4f}."""


def escape_html(value):
    """Turn any value into HTML text on one line."""
    return html.escape(printable(str(value)))


# --- tables in colour -------------------------------------------------------------------------


def colour(share, scale):
    """Interpolate a scale at a share from 0 to 1 -> [red, green, blue]."""
    steps = np.linspace(0, 1, len(scale))
    return [round(float(np.interp(share, steps, channel))) for channel in scale.T]


def cell_style(share, scale):
    """Return CSS with the colour as the background, and ink that is readable on it."""
    rgb = colour(share, scale)
    brightness = np.dot(rgb, (0.299, 0.587, 0.114))  # from 0 to 255, as the eye sees it
    ink = "#000" if brightness > 140 else "#fff"
    return "background:rgb({},{},{});color:{}".format(*rgb, ink)


def coloured_table(names, rows):
    """Make an HTML table with one row per layer.

    names: the columns. rows: for each layer its cells, (text, HTML attributes).
    """
    head = "".join(map('<th scope="col">{}</th>'.format, names))
    lines = ["<table>", f'<tr><th scope="col">layer</th>{head}</tr>']
    for i, row in enumerate(rows):
        line = f'<tr><th scope="row">{i}</th>'
        for text, attributes in row:
            line += f"<td {attributes}>{text}</td>"
        lines.append(f"{line}</tr>")
    return "\n".join([*lines, "</table>"])


def legend(low, high, scale):
    stops = ",".join("rgb({},{},{})".format(*rgb) for rgb in scale.tolist())
    bar = f'<i style="background:linear-gradient(90deg,{stops})"></i>'
    return f'<p class="legend">{low} {bar} {high}</p>'


def density_table(names, table, write):
    """Make a table of densities [layers, columns]. write: a function that formats a density."""
    high = top_of_scale(table)
    rows = []
    for layer in table:
        cells = []
        for value in layer:
            style = cell_style(value / high, YELLOW_TO_BLUE)
            cells.append((write(value), f'style="{style}"'))
        rows.append(cells)
    return coloured_table(names, rows) + legend("0", write(high), YELLOW_TO_BLUE)


# --- training curves --------------------------------------------------------------------------


def thinned(points):
    """Average (step, value) points within at most POINTS groups of neighbours."""
    groups = np.array_split(np.array(points, dtype=float), min(len(points), POINTS))
    return [tuple(group.mean(0)) for group in groups]


def curve(name, points, marked="", level=0):
    """Draw a curve of (step, value) points as an SVG figure.

    marked, level: the name and value of a dashed line. The axis holds 0 and 1, so that small
    changes look small.
    """
    steps, values = np.array(thinned(points)).T
    first, last = steps.min(), steps.max()
    shown = [0, 1, level, *values]
    low, high = min(shown), max(shown)

    def height(value):
        return 130 - 115 * (value - low) / (high - low)

    x = 44 + 261 * (steps - first) / max(last - first, 1)  # there may be just one step
    y = height(values)
    corners = " ".join(map("{:.1f},{:.1f}".format, x, y))
    dots = ""
    if name.startswith("dev"):  # evaluations are few
        dots = "".join(map(DOT.format, x, y, steps, values))
    return CURVE.format(
        name=escape_html(name),
        end=values[-1],
        low=low,
        high=high,
        first=first,
        last=last,
        mark=f", {marked} {level:.3g}" if marked else "",
        marked=marked,
        level=height(level),
        corners=corners,
        dots=dots,
    )


def curves(log, marks):
    """Draw the training curves of a log.jsonl, or say that there is none.

    marks: {name of a curve: (name, value) of its dashed line}.
    """
    figures = []
    for name, points in curves_of(log).items():
        figures.append(curve(name, points, *marks.get(name, ())))
    if not figures:
        return "<p>A mask file has no curves: the curves are in log.jsonl of its run folder.</p>"
    return '<div class="side curves">\n' + "\n".join(figures) + "\n</div>"


# --- heads ------------------------------------------------------------------------------------


def without_heads(loaded, texts):
    """Answer a text, or a pair, with all heads and without each head -> ([C], [layers, heads, C]).

    An answer is the probabilities of the classes, or a single score for regression. A head is
    removed by setting its output to zero.
    """
    model = loaded.model
    weights = masked_weights(loaded, "cpu", torch.float32)
    examples = encode([texts], [0], loaded.tokenizer)
    size = model.config.head_size

    def answer(weights):
        (logits,) = predict(model, weights, examples, "cpu")  # [C]
        if len(logits) > 1:
            return logits.softmax(0)
        zero, unit = loaded.task.scale
        return zero + unit * logits

    layers = []
    for name in model.prunable()["attn_output"]:
        whole = weights[name]  # [H, heads * D]: the columns read the heads
        heads = []
        for first in range(0, whole.shape[1], size):
            cut = whole.clone()
            cut[:, first : first + size] = 0  # the bias stays: it belongs to no head
            heads.append(answer(weights | {name: cut}))
        layers.append(torch.stack(heads))
    return answer(weights), torch.stack(layers)


def change_rows(before, after, chosen):
    """Make rows of a table: how the chosen answer changes without each head.

    before, after: what without_heads() returns. chosen: the index of a class, or 0.
    """
    classes = len(before) > 1
    change = after[..., chosen] - before[chosen]  # [layers, heads]
    smallest = 0.01 if classes else 0.1  # the least change that gets the full colour
    most = max(smallest, change.abs().max().item())

    rows = []
    for layer, row in enumerate(change.tolist()):
        cells = []
        for head, by in enumerate(row):
            answer = after[layer, head]
            tip = f"without head {head} of layer {layer}: {answer[chosen]:.4f}"
            text = signed(by, classes)
            style = cell_style(0.5 - 0.5 * by / most, ORANGE_TO_BLUE)
            kind = "zero" if text in ("0.0", "0.00") else "moves"
            if int(answer.argmax()) != chosen:
                kind = "flips"
            cells.append((text, f'title="{tip}" class="{kind}" style="{style}"'))
        rows.append(cells)
    return rows


def signed(change, classes):
    """Write a change with its sign, as HTML: "+1.5". That of a probability is in points."""
    number = f"{100 * change:+.1f}" if classes else f"{change:+.2f}"
    if float(number) == 0:
        number = number[1:]  # no sign
    return number.replace("-", "&minus;")


def sentence(loaded, texts):
    """Show the answer to a text, and a table of how it changes without each head."""
    task = loaded.task
    if task.format_answer:  # the task answers with a span, or continues the text
        name = escape_html(loaded.result["task"])
        return f"<p>{name} has no classes, so the page does not ask for one.</p>"
    before, after = without_heads(loaded, texts)
    chosen = int(before.argmax())
    if len(before) > 1:
        label, word = list(task.words.items())[chosen]
        answer = CLASS.format(escape_html(word), escape_html(label), before[chosen])
        what = "that probability changes, in percentage points,"
        flips = FLIPS
    else:
        answer, what, flips = f"{before[0]:.2f}", "that score changes", ""

    shown = ""
    for text in texts:
        dots = " …" if len(text) > SHOWN else ""
        shown += f"<p>{escape_html(text[:SHOWN])}{dots}</p>"
    return SENTENCE.format(
        shown=shown,
        answer=answer,
        what=what,
        flips=flips,
        table=coloured_table(range(after.shape[1]), change_rows(before, after, chosen)),
        legend=legend("rises", "falls", ORANGE_TO_BLUE),
    )


# --- the mask itself --------------------------------------------------------------------------


def png(levels, depth):
    """Encode grey levels, uint8 [rows, columns], as a PNG file -> bytes.

    depth: bits per pixel, 1 or 8. Level 0 is black.
    """
    height, width = levels.shape
    if depth == 1:
        levels = np.packbits(levels, axis=1)  # each row begins with a new byte
    filtered = np.insert(levels, 0, 0, axis=1)  # filter type 0: each row is stored as it is

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    # The zeros: grey, deflated, standard filters, not interlaced.
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    file += chunk(b"IDAT", zlib.compress(filtered.tobytes()))
    return file + chunk(b"IEND", b"")


def pictures(masks, side):
    """Draw masks {name: bool [out, in]} -> ({name: PNG}, the density that is black).

    Each pixel is a block of side x side weights. White is density 0. With side 1, a pixel is one
    weight and takes one bit.
    """
    if side == 1:
        return {name: png(~mask.numpy(), 1) for name, mask in masks.items()}, 1.0
    blocks = {}
    highest = 1e-6
    for name, mask in masks.items():
        # ceil_mode: the blocks at the edges may be smaller
        blocks[name] = F.avg_pool2d(mask.float()[None], side, ceil_mode=True)[0]
        highest = max(highest, blocks[name].max().item())
    images = {}
    for name, block in blocks.items():
        grey = (255 - 255 * block / highest).round().byte()
        images[name] = png(grey.numpy(), 8)
    return images, highest


def layer_cards(groups, masks, head_size, side):
    """Show the pictures of each layer, as buttons that open them."""
    images, highest = pictures(masks, side)
    # What the script of the page reads of a button, by group.
    data = dict.fromkeys(groups, f'data-side="{side}" data-highest="{highest}"')
    for group in ("query", "key", "value"):
        data[group] += f' data-rows-per-head="{head_size}"'
    data["attn_output"] += f' data-columns-per-head="{head_size}"'

    cards = []
    for layer, names in enumerate(zip(*groups.values(), strict=True)):
        buttons = ['<div class="layer">', f"<h3>Layer {layer}</h3>"]
        for group, name in zip(groups, names, strict=True):
            rows, columns = masks[name].shape
            button = BUTTON.format(
                group=group,
                layer=layer,
                title=group.replace("attn_", "attention "),
                density=masks[name].float().mean().item(),
                rows=rows,
                columns=columns,
                data=data[group],
                image=base64.b64encode(images[name]).decode(),
            )
            buttons.append(button)
        cards.append("\n".join([*buttons, "</div>"]))
    return "\n".join(cards)


# --- the page ---------------------------------------------------------------------------------


def heading(loaded, dense):
    """Describe the run and its result -> {"title": ..., "what": ..., "found": ..., "numbers": ...}.

    dense: {metric: value} of the dense model, as far as known. The first metric is shown large.
    """
    result = loaded.result
    name = printable(model_name(result["model"]))  # without its path: the page may be published
    table = describe_table(result.get("table"))
    parts = {
        "title": f"{result['task']}: a mask for {name}",
        "what": WHAT.format_map(result | {"name": name, "removed": 1 - result["density"]}),
        "found": f"Dev {show(result['final'])} ({facts(result)}). {table}",
    }
    parts = {key: escape_html(text) for key, text in parts.items()}
    metric, value = next(iter(result["final"].items()))
    parts["numbers"] = NUMBER.format(value, f"dev {escape_html(metric)}")
    if metric in dense:
        parts["numbers"] += NUMBER.format(dense[metric], "dense, fine-tuned")
    return parts


def make_page(loaded, log, texts, dense, largest=LARGEST):
    """Make the page -> bytes. Its pictures are as fine as the largest size allows.

    dense: {metric: value} of the dense model, as far as known.
    """
    model, masks = loaded.model, loaded.masks
    groups = model.prunable()
    names = [
        group.replace("attn_", "attention ").replace("intermediate", "inter&shy;mediate")
        for group in groups
    ]
    table = np.array(list(densities(groups, masks).values())).T  # [layers, groups]
    heads = head_densities(groups, masks, model.config.layers[0][0])  # [layers, heads]
    digits = 0 if heads.max() > 0.1 else 1  # decimal digits of the percentages
    parts = heading(loaded, dense)
    parts["densities"] = density_table(names, table, lambda v: f"{v:.3f}")
    parts["heads"] = density_table(range(heads.shape[1]), heads, lambda v: f"{100 * v:.{digits}f}")
    marks = {f"dev {metric}": ("dense", value) for metric, value in dense.items()}
    marks["density"] = ("target", loaded.result["density"])
    parts["curves"] = curves(log, marks)
    parts["sentence"] = sentence(loaded, texts)

    template = Template(TEMPLATE.read_text("utf-8"))
    side = 1
    while True:
        parts["pictures"] = "A pixel is a weight: black is kept, white is removed."
        if side > 1:
            parts["pictures"] = (
                f"A pixel is a block of {side} × {side} weights. "
                "White keeps none of them, and darker blocks keep more."
            )
        parts["layers"] = layer_cards(groups, masks, model.config.head_size, side)
        page = template.substitute(parts).encode()
        if len(page) < largest:
            return page
        side *= 2


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.page", description="Write one page to look at a mask in a browser."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or the mask file from one")
    add("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    add("--text", help="show each attention head's part in the answer to this text")
    add("--pair", help="the second text, if the task takes two")
    add("--dense", type=Path, metavar="RUN", help="a run of --method finetune to show beside it")
    add("--model", metavar="FOLDER", help="where the backbone is now")
    args = parser.parse_args(argv)
    loaded = load_masked(args.run, args.model)
    texts = texts_of(loaded.task, args.text, args.pair)
    dense = dense_result(args.dense, loaded.result) if args.dense else {}
    page = make_page(loaded, args.run / "log.jsonl", texts, dense)
    write_whole(args.out, page)
    print(f"{args.out}: {len(page) / 1e6:.2f} MB, for any browser")


def dense_result(run, result):
    """Return {metric: value} of a run of dense fine-tuning. Raises ValueError if it is another."""
    with prefix_errors("--dense"):
        dense = read_result(run)
        wanted = {"method": "finetune", "task": result["task"], "model": result["model"]}
        if not wanted.items() <= dense.items():
            raise ValueError(f"{run} is no run of --method finetune with this task and model")
        return dense["final"]


def texts_of(task, text, pair):
    """Return --text and --pair, or an example. Raises ValueError if the task takes others."""
    width = len(task.text)
    if text is None and pair is None:
        return EXAMPLES[width]
    if task.format_answer:
        raise ValueError(
            "--text: heads are shown for an answer of one class or score; this task has neither"
        )
    if text is None or (pair is None) != (width == 1):
        raise ValueError(f"the task takes {width} text(s); --text is the first, --pair the second")
    return (text, pair)[:width]


if __name__ == "__main__":
    main()
