"""tools.page: its pictures are the mask to the bit, and nothing typed becomes HTML."""

import base64
import html.parser
import json
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WIDE

import train
from data import encode
from eval import load_run, predict
from plumbing.files import write_whole
from tools import page

VOID = {"meta", "link", "img", "br", "input"}  # elements without an end


@pytest.fixture
def run(make_model, glue, tmp_path):
    """run(*flags) -> a run's folder."""

    def go(*flags, model=None):
        model = model or make_model()
        given = ["--model", model, "--data-dir", glue, "--out", tmp_path / "run", "--steps", 20]
        given += ["--length", 16, *flags]
        train.main([str(a) for a in [*given, "--device", "cpu", "--evals", 2]])
        return tmp_path / "run"

    return go


@pytest.fixture
def made(finished, tmp_path):
    """made(*flags) -> (the page of a run, the run loaded)."""

    def go(*flags):
        page.main([str(a) for a in (finished, "--out", tmp_path / "page.html", *flags)])
        return (tmp_path / "page.html").read_text("utf-8"), load_run(finished)

    return go


class Balanced(html.parser.HTMLParser):
    """Checks that tags are closed in order. Keeps tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words += data

    def all(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def unpng(content):
    """A grey PNG of 1 or 8 bits -> uint8 [rows, columns]. Checks every checksum."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind] = body
        at += 12 + size
    width, height, depth, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [0, 0, 0, 0] and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()  # no filter
    return np.unpackbits(rows[:, 1:], axis=1, count=width) if depth == 1 else rows[:, 1:]


def pictures(parsed):
    """{id of a button: uint8 [rows, columns]} of a page."""
    buttons = [
        attributes for attributes in parsed.all("button") if "matrix" in attributes.get("class", "")
    ]
    images = [attributes for attributes in parsed.all("img") if attributes["alt"]]
    found = {}
    for button, image in zip(buttons, images, strict=True):
        found[button["id"]] = unpng(
            base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        )
    return found


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (16, 24)])
def test_a_png_holds_what_was_put_in(shape):
    rng = np.random.default_rng(0)
    bits, greys = rng.integers(0, 2, shape, np.uint8), rng.integers(0, 256, shape, np.uint8)
    assert np.array_equal(unpng(page.png(bits, 1)), bits)
    assert np.array_equal(unpng(page.png(greys, 8)), greys)


def test_blocks_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    found, highest = page.pictures({"m": mask}, 2)
    assert highest == 1 and unpng(found["m"]).tolist() == [
        [0, 255],
        [128, 0],
    ]  # of 4 weights, 2, 2 and 1
    found, highest = page.pictures({"m": torch.zeros(4, 4, dtype=torch.bool)}, 4)
    assert unpng(found["m"]).tolist() == [[255]]
    sparse = torch.zeros(4, 4, dtype=torch.bool)
    sparse[0, 0] = True
    found, highest = page.pictures({"m": sparse}, 2)
    assert highest == 0.25 and unpng(found["m"]).tolist() == [
        [0, 255],
        [255, 255],
    ]  # the densest is black


def test_the_page_holds_the_run_and_nothing_from_elsewhere(made):
    text, loaded = made()
    parsed = Balanced(text)
    assert len(text.encode()) < page.LARGEST
    written = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//\w|@import|url\(", written) and "default-src 'none'" in written
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (
            attributes.get("src", "data:").startswith("data:")
            and attributes.get("href", "data:,") == "data:,"
        )

    found, groups = pictures(parsed), loaded.model.prunable()
    for group, names in groups.items():
        for layer, name in enumerate(names):
            assert np.array_equal(
                found.pop(f"{group}-{layer}"), ~loaded.masks[name].numpy()
            )  # 0 is black is kept
    assert not found
    assert "1,792 of 3,584 weights are kept" in parsed.words and "seed 0, 20 steps" in parsed.words
    assert len(parsed.all("polyline")) == 3 and len(parsed.all("circle")) == 2
    final = loaded.result["final"]["accuracy"]
    assert f'<p class="number"><strong>{final:.3f}</strong> dev accuracy</p>' in text
    assert text.count('<p class="number">') == 1  # the dense model is not known
    for matrix in ("query", "key", "value", "attention output", "intermediate", "output"):
        assert text.count(f"\n{matrix} <strong>0.") == 2  # below its picture in each layer
    for word in ("density", "loss", "dev accuracy", *page.EXAMPLES[1]):
        assert word in parsed.words


def test_a_page_is_small_whatever_the_model(run, make_model, tmp_path):
    loaded = load_run(run(model=make_model(**WIDE)))
    log = tmp_path / "run" / "log.jsonl"
    whole = page.make_page(loaded, log, ("good",), {}).decode()
    assert pictures(Balanced(whole))["query-0"].shape == (64, 64)
    largest = len(whole) - 1000
    text = page.make_page(loaded, log, ("good",), {}, largest).decode()
    side = int(re.search(r"block of (\d+) × \1 weights", text)[1])
    assert side > 1 and len(text.encode()) < largest
    found = pictures(Balanced(text))
    assert (
        found["query-0"].shape == (64 // side, 64 // side)
        and found["intermediate-1"].shape[0] == 128 // side
    )


def test_a_lone_mask_has_a_page(finished, tmp_path):
    lone = tmp_path / "lone.safetensors"
    shutil.copy(finished / "mask.safetensors", lone)
    page.main([str(lone), "--out", str(tmp_path / "new" / "page.html")])
    parsed = Balanced((tmp_path / "new" / "page.html").read_text("utf-8"))
    assert "curves are in log.jsonl" in parsed.words and not parsed.all("svg")


def test_long_logs_are_thinned():
    points = [(step, step % 2) for step in range(10 * page.POINTS)]
    found = page.thinned(points)
    assert (
        len(found) == page.POINTS
        and found[0] == (4.5, 0.5)
        and page.thinned(points[:3]) == points[:3]
    )
    assert page.curve("flat", [(1, 2.0), (2, 2.0)]).count(">2</text") == 2  # a step and one value
    assert "NaN" not in page.curve("one", [(1, 2.0)]) and "nan" not in page.curve("one", [(1, 2.0)])


def lines_of(figure):
    """The horizontal lines and the curve of an SVG -> {class or "axis": [y]}, [y of the curve]."""
    parsed = Balanced(figure)
    lines = {}
    for line in parsed.all("line"):
        assert line["y1"] == line["y2"]
        lines.setdefault(line.get("class") or "axis", []).append(float(line["y1"]))
    (curve,) = parsed.all("polyline")
    return lines, [float(corner.split(",")[1]) for corner in curve["points"].split()]


def test_small_changes_look_small():
    """The axis goes from 0 at y = 130 to 1 at y = 15."""
    lines, curve = lines_of(page.curve("dev accuracy", [(1, 0.803), (2, 0.855)], "dense", 0.88))
    assert curve == pytest.approx([130 - 115 * 0.803, 130 - 115 * 0.855], abs=0.06)
    assert lines == {"axis": [130, 15], "dense": pytest.approx([130 - 115 * 0.88], abs=0.06)}
    lines, curve = lines_of(page.curve("loss", [(1, 2.0), (2, 1.0)]))  # from 0 to 2
    assert curve == [15, 72.5] and lines == {"axis": [130, 15, 130]}
    _, curve = lines_of(page.curve("dev mcc", [(1, -0.25), (2, 1.0)]))
    assert curve == [130, 15]
    _, curve = lines_of(page.curve("dev perplexity", [(1, 30.0), (2, 20.0)], "dense", 40.0))
    assert curve == [43.8, 72.5]


def test_the_dense_model_stands_beside_it(run, make_model, fails, tmp_path):
    out = tmp_path / "page.html"
    model = make_model()
    pruned = run(model=model).rename(tmp_path / "pruned")
    dense = run("--method", "finetune", "--steps", 2, model=model)
    page.main([str(pruned), "--out", str(out), "--dense", str(dense)])
    text = out.read_text("utf-8")
    value = json.loads((dense / "result.json").read_text())["final"]["accuracy"]
    assert f"<strong>{value:.3f}</strong> dense, fine-tuned</p>" in text
    assert f", dense {value:.3g}</figcaption>" in text and ", target 0.5</figcaption>" in text
    said = fails(page.main, [pruned, "--out", out, "--dense", pruned])
    assert "--dense: " in said and "no run of --method finetune with this task and model" in said


# --- heads ----------------------------------------------------------------------------------------


def test_cells_of_zero_are_muted():
    before = torch.tensor([0.4, 0.6])
    after = torch.tensor([[[0.4, 0.6], [0.40001, 0.59999], [0.3, 0.7], [0.6, 0.4]]])
    ((nothing, little, against, flips),) = page.change_rows(before, after, 1)
    assert [cell[0] for cell in (nothing, little, against)] == ["0.0", "0.0", "+10.0"]
    kinds = [re.search('class="(.*?)"', cell[1])[1] for cell in (nothing, little, against, flips)]
    assert kinds == ["zero", "zero", "moves", "flips"]


@pytest.mark.parametrize("task", ["movies", "stsb"])
def test_removed_heads_are_removed(run, finished, glue, task):
    """The same as if the attention's output projection read zeros in their place."""
    (glue / "STS-B").mkdir()
    for split in ("train", "dev"):
        rows = [
            f"the film is good\tit was {word}\t{score}"
            for word, score in (("dull", 0.5), ("fun", 4.5))
        ] * 20
        (glue / "STS-B" / f"{split}.tsv").write_text(
            "\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n"
        )
    loaded = load_run(finished if task == "movies" else run("--task", task))
    texts = ("the film was good",) if task == "movies" else ("the film was good", "a dull film")
    before, after = page.without_heads(loaded, texts)

    model, size = loaded.model, loaded.model.config.head_size
    model.load_state_dict(
        {name: model.state_dict()[name] * mask for name, mask in loaded.masks.items()}, strict=False
    )
    examples = encode([texts], [0], loaded.tokenizer)

    def answer():
        (logits,) = predict(model, {}, examples, "cpu")
        return logits.softmax(0) if task == "movies" else logits

    assert after.shape == (2, 4, 2 if task == "movies" else 1)
    assert torch.allclose(before, answer(), atol=1e-6)
    for layer, head in ((0, 0), (0, 3), (1, 2)):
        keep = torch.ones(16)
        keep[head * size : (head + 1) * size] = 0
        module = model.bert.encoder["layer"][layer].attention["output"].dense
        hook = module.register_forward_pre_hook(lambda _, inputs, keep=keep: (inputs[0] * keep,))
        assert torch.allclose(after[layer, head], answer(), atol=1e-6)
        hook.remove()
    assert (after - before).abs().max() > 1e-4

    text = page.sentence(loaded, texts)
    label = before.argmax() if task == "movies" else 0
    assert f'title="without head 2 of layer 1: {after[1, 2, label]:.4f}"' in text
    assert text.count('class="flips"') == int((after.argmax(2) != before.argmax()).sum())


def test_nothing_typed_or_stored_becomes_html(made, finished):
    bad = "<script>alert(1)</script> & \"good\" 'fun' $title"
    text, _ = made("--text", bad)
    parsed = Balanced(text)
    assert bad in parsed.words and len(parsed.all("script")) == 1
    log = finished / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "density": 1.0, "dev": {'<b onclick="x">': 0.5}}) + "\n")
    text, _ = made("--text", "x" * 9000)
    assert '<b onclick="x">' in Balanced(text).words and "x" * (page.SHOWN + 1) not in text
    assert not Balanced(text).all("b")


def test_a_folder_is_named_without_its_path(run, make_model, tmp_path):
    page.main([str(run(model=make_model("a<b>"))), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "backbone a&lt;b&gt;," in text and str(tmp_path) not in text


def test_language_models_have_a_page_without_heads(make_gpt2, texts, fails, tmp_path):
    argv = ["--task", "ptb", "--model", make_gpt2(), "--data-dir", texts, "--method", "smp-s"]
    argv += ["--penalty", 0]
    argv += ["--out", tmp_path / "run", "--steps", 3, "--length", 16, "--device", "cpu"]
    argv += ["--evals", 1]
    train.main([str(a) for a in argv])
    page.main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    parsed = Balanced((tmp_path / "page.html").read_text("utf-8"))
    assert "ptb has no classes" in parsed.words and len(pictures(parsed)) == 12
    assert "--text: " in fails(
        page.main, [tmp_path / "run", "--out", tmp_path / "page.html", "--text", "a"]
    )


def test_errors(run, finished, fails, tmp_path):
    folder, out = finished, tmp_path / "page.html"
    assert "the task takes 1 text(s); --text is the first, --pair the second" in fails(
        page.main, [folder, "--out", out, "--text", "a", "--pair", "b"]
    )
    assert "--text is the first" in fails(page.main, [folder, "--out", out, "--pair", "b"])
    missing = [folder, "--out", out, "--dense", tmp_path / "none"]
    assert "error: --dense: " in fails(page.main, missing)
    assert "--out" in fails(page.main, [folder])
    assert f"{tmp_path} is a folder" in fails(page.main, [folder, "--out", tmp_path])
    (tmp_path / "file").write_text("")
    said = fails(page.main, [folder, "--out", tmp_path / "file" / "page.html"])
    assert f"{tmp_path}/file" in said
    write_whole(folder / "log.jsonl", b"no log\n")
    assert "log.jsonl:1 is not a line" in fails(page.main, [folder, "--out", out])
    assert not out.exists()
    dense = run("--method", "finetune", "--steps", 2)
    assert "has no mask to look at" in fails(page.main, [dense, "--out", out])


# --- in a browser ---------------------------------------------------------------------------------


CHROMIUM = shutil.which("chromium")
CONFINED = bool(CHROMIUM) and Path(CHROMIUM).resolve().name == "snap"  # it reads no file below /tmp


needs_chromium = pytest.mark.skipif(
    not CHROMIUM or CONFINED, reason="there is no chromium here that reads any file"
)


def browse(folder, page):
    """Open a page of a folder, and run its script. stdout is then the page as it stands."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-sync", "--disable-background-networking", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'browser'}", "--enable-logging=stderr"]
    command += [f"file://{folder}/{page}"]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("clicks", "shown"),
    [
        (["next", "next"], "layer 0, value: 16 × 16, "),
        (["previous", "in", "fit"], "layer 1, output: 16 × 24, "),
        (["previous", "out", "next"], "layer 0, query: 16 × 16, "),
    ],
)
def test_next_previous_and_zoom(finished, tmp_path, clicks, shown):
    """After the last matrix comes the first. Zooming leaves no trace once a picture fits again."""
    loaded = load_run(finished)
    text = page.make_page(loaded, finished / "log.jsonl", ("good",), {}).decode()
    script = "".join(f'document.getElementById("{name}").click();' for name in clicks)
    text = text.replace("show(asked);", f"{{ show(asked); {script} }}")
    (tmp_path / "page.html").write_text(text)
    ended = browse(tmp_path, "page.html#query-0")
    assert "CONSOLE" not in ended.stderr, ended.stderr
    assert f'<h3 id="name">{shown}' in ended.stdout
    (width,) = re.findall(r'style="[^"]*width: (\d+)px', ended.stdout)
    size = 24 if "output" in shown else 16
    assert int(width) % size == 0 and int(width) >= 10 * size  # whole numbers, and it fills


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("side", [1, 2])
def test_the_page_opens_in_a_browser(run, make_model, tmp_path, side):
    """Its script reads a picture, and finds what the mask has; the console stays empty."""
    loaded = load_run(run(model=make_model(**WIDE)))
    texts = ("</script><script>document.title = 'broken'</script>",)
    text = page.make_page(loaded, tmp_path / "run" / "log.jsonl", texts, {})
    if side == 2:
        largest = len(text) - 1000
        text = page.make_page(loaded, tmp_path / "run" / "log.jsonl", texts, {}, largest)
    assert text.count(b"describe(0, 0)") == 1
    (tmp_path / "page.html").write_bytes(text.replace(b"describe(0, 0)", b"describe(9, 21)"))

    ended = browse(tmp_path, "page.html#attn_output-1")
    assert "CONSOLE" not in ended.stderr, ended.stderr
    (viewer,) = Balanced(ended.stdout).all("dialog")
    assert "open" in viewer and "<title>movies: a mask for model</title>" in ended.stdout

    mask = loaded.masks["bert.encoder.layer.1.attention.output.dense.weight"].float()
    rows, columns = slice(9 * side, 10 * side), slice(21 * side, 22 * side)
    (said,) = re.findall("<output>(.*)</output>", ended.stdout)
    numbers = [float(number) for number in re.findall(r"keeps? (\d\S+)", said)]
    assert numbers[0] == pytest.approx(
        mask[rows].mean().item(), abs=2e-3
    )  # it shows three digits of what was grey
    assert numbers[1] == pytest.approx(mask[:, columns].mean().item(), abs=2e-3)
    if side == 1:
        assert (
            said.startswith("row 9 keeps ") and " · column 21 (head 1) keeps " in said
        )  # heads of 16
        assert said.endswith("kept" if mask[9, 21] else "removed") and len(numbers) == 2
    else:
        assert (
            said.startswith("rows 18 to 19 keep ") and " · columns 42 to 43 (head 2) keep " in said
        )
        assert numbers[2] == pytest.approx(mask[rows, columns].mean().item(), abs=1e-2)
