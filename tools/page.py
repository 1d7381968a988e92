"""A mask as one page for the browser: where it keeps weights, how training went, what each head does for a text.

All is in the one file, which stays under 2 MB: it needs no server, no network and nothing beside it.

    python -m tools.page RUN --out page.html
    python -m tools.page RUN --out page.html --text "a text of one's own"
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

from data import TASKS, encode
from eval import densities, load_run, masked_weights, predict
from plumbing.cli import Parser, one_line_errors, printable, show
from plumbing.files import write_whole
from tools.picture import head_densities, read_log

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST = 2_000_000  # bytes of a page
POINTS = 300  # of a curve, at most
SHOWN = 2000  # characters of a text
EXAMPLES = {  # for a task that takes one text, or two
    1: ("slow at first, but warm and funny in the end",),
    2: ("the film made everybody laugh", "it was a comedy"),
}

# Colour scales, red, green and blue at equal steps; people who are colour-blind tell them apart, and so do printers.
MORE = np.array(
    [(255, 255, 217), (199, 233, 180), (65, 182, 196), (34, 94, 168), (8, 29, 88)]
)  # YlGnBu
CHANGE = np.array(
    [(230, 97, 1), (253, 184, 99), (255, 255, 255), (146, 178, 222), (33, 102, 172)]
)  # orange to blue


def safe(value):
    """Anything as HTML text, on one line."""
    return html.escape(printable(str(value)))


# --- tables in colour ----------------------------------------------------------------------------------------


def colour(share, scale):
    """-> (red, green, blue) at a share from 0 to 1 of a scale."""
    steps = np.linspace(0, 1, len(scale))
    return [round(float(np.interp(share, steps, channel))) for channel in scale.T]


def painted(share, scale):
    """-> CSS: that colour as the background, and the ink that reads best on it."""
    red, green, blue = colour(share, scale)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{ink}"


def coloured_table(names, rows):
    """An HTML table. names: of the columns; rows: for each layer its cells, (text, attributes)."""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = [f'<tr><th scope="col">layer</th>{head}</tr>']
    for i, row in enumerate(rows):
        cells = "".join(f"<td {attributes}>{text}</td>" for text, attributes in row)
        lines.append(f'<tr><th scope="row">{i}</th>{cells}</tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def legend(low, high, scale):
    stops = ",".join("rgb({},{},{})".format(*rgb) for rgb in scale.tolist())
    return f'<p class="legend">{low} <i style="background:linear-gradient(90deg,{stops})"></i> {high}</p>'


def density_table(names, table, form):
    """Densities [layers, columns] as a table. form: how to write one, a function."""
    low, high = table.min(), table.max()
    span = max(high - low, 0.01)
    rows = [[(form(v), f'style="{painted((v - low) / span, MORE)}"') for v in row] for row in table]
    return coloured_table(names, rows) + legend(form(low), form(high), MORE)


# --- training curves -----------------------------------------------------------------------------------------


def thinned(points):
    """(step, value) in at most POINTS groups of neighbours -> the mean of each."""
    groups = np.array_split(np.array(points, dtype=float), min(len(points), POINTS))
    return [tuple(group.mean(0)) for group in groups]


def curve(name, points, dots=False):
    """(step, value) of a curve -> a figure, an SVG with the lowest and highest value at its axis."""
    points = thinned(points)
    steps, values = np.array(points).T
    first, last = steps.min(), steps.max()
    low, high = values.min(), values.max()
    x = 44 + 261 * (steps - first) / max(last - first, 1)
    y = 130 - 115 * (values - low) / (high - low if high > low else 1)
    parts = ['<line x1="44" y1="130" x2="305" y2="130"/><line x1="44" y1="15" x2="305" y2="15"/>']
    parts.append(f'<text x="38" y="133" text-anchor="end">{low:.3g}</text>')
    if high > low:
        parts.append(f'<text x="38" y="18" text-anchor="end">{high:.3g}</text>')
    parts.append(
        f'<text x="44" y="146">{first:.0f}</text><text x="305" y="146" text-anchor="end">{last:.0f}</text>'
    )
    parts.append('<text x="174" y="146" text-anchor="middle">step</text>')
    parts.append(
        '<polyline points="'
        + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        + '"/>'
    )
    if dots:
        for a, b, step, value in zip(x, y, steps, values, strict=True):
            tip = f"<title>step {step:.0f}: {value:.4g}</title>"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3">{tip}</circle>')
    svg = f'<svg viewBox="0 0 310 152" role="img" aria-label="{safe(name)}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{safe(name)}</figcaption></figure>"


def curves(log):
    """The training curves of a log.jsonl, or a line that says that there is none."""
    losses, evaluations = read_log(log) if log.exists() else ([], [])
    found = [
        curve(name, [(line["step"], line[name]) for line in losses])
        for name in ("density", "loss")
        if losses
    ]
    for metric in evaluations[0]["dev"] if evaluations else ():
        points = [(line["step"], line["dev"][metric]) for line in evaluations]
        found.append(curve(f"dev {metric}", points, dots=True))
    if not found:
        return "<p>A mask alone does not say: the curves are in log.jsonl of its run folder.</p>"
    return '<div class="side curves">\n' + "\n".join(found) + "\n</div>"


# --- heads ---------------------------------------------------------------------------------------------------


def without_heads(loaded, texts):
    """What a run answers to a text, or a pair -> ([C] as it is, [layers, heads, C] with each head's output at zero).

    The answer is the probabilities of the classes; or of a regression the one score.
    """
    model = loaded.model
    weights = masked_weights(loaded, "cpu", torch.float32)
    examples = encode([texts], [0], loaded.tokenizer)
    size = model.config.head_size

    def answer(weights):
        (logits,) = predict(model, weights, examples, "cpu")  # [C]
        return logits.softmax(0) if len(logits) > 1 else logits

    layers = []
    for name in model.prunable()["attn_output"]:
        whole = weights[name]  # [H, heads * D]: columns are what the heads send
        heads = []
        for first in range(0, whole.shape[1], size):
            cut = whole.clone()
            cut[:, first : first + size] = 0  # only the bias is left, and that is no head's
            heads.append(answer(weights | {name: cut}))
        layers.append(torch.stack(heads))
    return answer(weights), torch.stack(layers)


def change_rows(before, after, chosen):
    """Rows of a table: how what was chosen changes without each head, from what without_heads() gives."""
    classes = len(before) > 1
    change = (after[..., chosen] - before[chosen]).tolist()  # [layers, heads]
    most = max(
        0.01 if classes else 0.1, *(abs(by) for row in change for by in row)
    )  # less is not worth a colour

    rows = []
    for i, row in enumerate(change):
        cells = []
        for head, by in enumerate(row):
            number = f"{100 * by:+.1f}" if classes else f"{by:+.2f}"
            number = (
                number.replace("-", "&minus;") if float(number) else number[1:]
            )  # no sign before 0.0
            tip = f"without head {head} of layer {i}: {after[i, head, chosen]:.4f}"
            flips = ' class="flips"' if int(after[i, head].argmax()) != chosen else ""
            style = painted(0.5 - 0.5 * by / most, CHANGE)
            cells.append((number, f'title="{tip}" style="{style}"{flips}'))
        rows.append(cells)
    return rows


def sentence(loaded, texts):
    """The answer to a text, and a table of how it changes without each head."""
    task = TASKS[loaded.result["task"]]
    if task.say:  # it answers with a span, or goes on with the text
        return f"<p>{safe(loaded.result['task'])} has no classes, so the page does not ask for one.</p>"
    before, after = without_heads(loaded, texts)
    chosen = int(before.argmax())
    if len(before) > 1:
        label, word = list(task.words.items())[chosen]
        said = f"<strong>{safe(word)}</strong> ({safe(label)}), with a probability of {before[chosen]:.4f}"
        unit = "that probability changes, in percentage points,"
        flipped = " A frame marks heads without which it gives another answer."
    else:
        said, unit, flipped = f"{before[0]:.2f}", "that score changes", ""

    shown = "".join(f"<p>{safe(text[:SHOWN])}{' …' * (len(text) > SHOWN)}</p>" for text in texts)
    return "\n".join([
        f"<blockquote>{shown}</blockquote>",
        f"<p>The pruned model says {said}. The table shows how {unit} when the output of one head is set to zero. "
        f"Blue heads speak for the answer: without them it falls. Orange heads speak against it.{flipped}</p>",
        f'<div class="wide changes">{coloured_table(range(after.shape[1]), change_rows(before, after, chosen))}</div>',
        legend("against", "for", CHANGE),
    ])  # fmt: skip


# --- the mask itself -----------------------------------------------------------------------------------------


def png(levels, depth):
    """uint8 [rows, columns], grey from 0 (black) up, of 1 or 8 bits a pixel -> the bytes of a PNG file."""
    height, width = levels.shape
    packed = (
        np.packbits(levels, axis=1) if depth == 1 else levels
    )  # each row begins with a new byte
    filtered = np.insert(packed, 0, 0, axis=1)  # 0: the row as it is

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(
        ">IIBBBBB", width, height, depth, 0, 0, 0, 0
    )  # grey, deflated, not interlaced
    body = zlib.compress(filtered.tobytes())
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def pictures(masks, side):
    """{name: bool [out, in]} -> ({name: PNG}, the density that is black): a pixel for each block of side x side.

    White is density 0. With side 1, a pixel is a weight and a bit.
    """
    if side == 1:
        return {name: png(~mask.numpy(), 1) for name, mask in masks.items()}, 1.0
    blocks = {}
    for name, mask in masks.items():
        blocks[name] = F.avg_pool2d(mask.float()[None], side, ceil_mode=True)[
            0
        ]  # at the edges, blocks are smaller
    highest = max(1e-6, *(block.max().item() for block in blocks.values()))
    return {
        name: png((255 - 255 * b / highest).round().byte().numpy(), 8) for name, b in blocks.items()
    }, highest


def layer_cards(groups, masks, head_size, side):
    """The pictures of each layer, as buttons that open them."""
    found, highest = pictures(masks, side)
    cards = []
    for i, names in enumerate(zip(*groups.values(), strict=True)):
        parts, told = [], []
        for group, name in zip(groups, names, strict=True):
            mask = masks[name]
            rows, columns = mask.shape
            called = group.replace("_", " ").replace("attn", "attention")
            density = mask.float().mean().item()
            about = f"layer {i}, {called}: {rows} × {columns}, density {density:.4f}"
            data = f'data-side="{side}" data-highest="{highest}"'
            if group in ("query", "key", "value"):
                data += f' data-rows-per-head="{head_size}"'
            if group == "attn_output":
                data += f' data-columns-per-head="{head_size}"'
            source = base64.b64encode(found[name]).decode()
            image = f'<img alt="the mask of {about}" src="data:image/png;base64,{source}">'
            opening = f'<button type="button" class="matrix {group}" id="{group}-{i}" title="{about}" {data}>'
            parts.append(f"{opening}{image}</button>")
            told.append(f"{called} {density:.3f}")
        parts.append(f"<div><h3>Layer {i}</h3>{', '.join(told)}</div>")
        cards.append('<div class="layer">\n' + "\n".join(parts) + "\n</div>")
    return "\n".join(cards)


# --- the page ------------------------------------------------------------------------------------------------


def heading(loaded):
    """{title, what, found}: what the run is, and what it came to."""
    result, masks = loaded.result, loaded.masks
    model = printable(
        Path(result["model"]).name
    )  # the page may travel; where a folder stood is nobody's business
    kept = sum(mask.sum().item() for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    what = f"Task {result['task']}, backbone {model}, method {result['method']}. "
    what += f"{kept:,} of {total:,} weights are kept: density {kept / total:.4f}, sparsity {1 - kept / total:.4f}."
    known = {"seed": "seed {}", "steps": "{} steps", "seconds": "{} seconds", "commit": "commit {}"}
    facts = [form.format(result[key]) for key, form in known.items() if result.get(key) is not None]
    found = (
        f"Dev {show(result['final'])} ({', '.join([*facts, result['device'], result['dtype']])})."
    )
    title = f"{result['task']}: a mask for {model}"
    return {"title": safe(title), "what": safe(what), "found": safe(found)}


def make_page(loaded, log, texts):
    """-> the page as bytes, with the finest pictures for which there is room."""
    model, masks = loaded.model, loaded.masks
    groups = {group: list(weights) for group, weights in model.prunable().items()}
    table = np.array(list(densities(groups, masks).values())).T  # [layers, groups]
    heads = head_densities(groups, masks, model.config.layers[0][0])  # [layers, heads]
    digits = 0 if heads.max() > 0.1 else 1  # of percents
    names = [
        group.replace("attn_", "attention ").replace("intermediate", "inter&shy;mediate")
        for group in groups
    ]
    parts = heading(loaded) | {
        "densities": density_table(names, table, lambda v: f"{v:.3f}"),
        "heads": density_table(range(heads.shape[1]), heads, lambda v: f"{100 * v:.{digits}f}"),
        "curves": curves(log),
        "sentence": sentence(loaded, texts),
    }
    template = Template(TEMPLATE.read_text("utf-8"))
    side = 1
    while True:
        told = "A pixel is a weight: black is kept, white is removed."
        if side > 1:
            told = f"A pixel is a block of {side} × {side} weights; white keeps none of them, darker ones more."
        layers = layer_cards(groups, masks, model.config.head_size, side)
        page = template.substitute(parts, pictures=told, layers=layers).encode()
        if len(page) < LARGEST:
            return page
        side *= 2


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.page", description="Write one page to look at a mask in a browser."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder, or a mask file out of one"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page")
    parser.add_argument(
        "--text", help="show what each attention head does for this text; default: one of ours"
    )
    parser.add_argument("--pair", help="the second text, where the task takes two")
    parser.add_argument("--model", metavar="FOLDER", help="where the backbone stands now")
    args = parser.parse_args(argv)
    loaded = load_run(args.run, args.model)
    if not loaded.masks:
        raise ValueError(f"{args.run} has no mask to look at")
    texts = read_texts(TASKS[loaded.result["task"]], args)
    page = make_page(loaded, args.run / "log.jsonl", texts)
    try:
        write_whole(args.out, page)
    except OSError as error:
        raise ValueError(f"--out: {args.out} cannot be written: {error.strerror}") from None
    print(f"{args.out}: {len(page) / 1e6:.2f} MB, for any browser")


def read_texts(task, args):
    """--text and --pair, or an example. Raises ValueError when the task takes another number of texts, or none."""
    if args.text is None and args.pair is not None:
        raise ValueError("--pair needs --text")
    if args.text is None:
        return EXAMPLES[len(task.text)]
    if task.say:
        raise ValueError(
            "--text: heads are shown for an answer of one class or score, which this task has not"
        )
    texts = (args.text,) if args.pair is None else (args.text, args.pair)
    if len(texts) != len(task.text):
        raise ValueError(
            f"this task takes {'--text and --pair' if args.pair is None else '--text without --pair'}"
        )
    return texts


if __name__ == "__main__":
    main()
