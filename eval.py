"""Evaluate a finished run, show its mask, classify a sentence of one's own.

    python eval.py RUN                                  # a run folder, or a mask file out of one
    python eval.py RUN --text "a warm and funny film"
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import plumbing  # noqa: F401  # isort: skip (before torch, see there)
import torch
from torch.func import functional_call

import data
import extras  # noqa: F401 (its methods and tasks; without the folder, delete this line)
from data import TASKS
from mask import METHODS
from model import load_model, read_config
from plumbing import cli, fetch, parallel
from plumbing.checkpoints import read_model
from plumbing.files import check_digest, load_masks, prefix_errors, require_regular_file
from plumbing.metrics import METRICS
from plumbing.progress import progress
from plumbing.run import identity, read_description
from plumbing.summary import guessing, write_predictions

# --- evaluation ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, weights, examples, device):
    """What the examples keep of the model's logits [N, ...], in their order, without dropout.

    `weights` {name: tensor} stand in for the model's own.
    """
    training = model.training
    model.eval()  # no dropout
    batches = data.batch_rows(examples, examples.eval_batch)
    outputs = []
    for rows in progress(parallel.shard(batches), "evaluating", delay=2):
        inputs, labels = data.collate(examples, rows, device)
        logits = functional_call(model, weights, tuple(inputs), tie_weights=False).float()
        outputs.append(examples.keep(logits, labels).cpu())
    model.train(training)
    order = torch.cat([torch.as_tensor(rows) for rows in batches]).argsort()  # batches are of like length
    return torch.cat(parallel.gather(outputs))[order]


def evaluate(model, weights, sets, metrics, device):
    """{metric: value} of a model, with `weights` in place of its own, on sets {name: labelled Examples}.

    From the second set on (MNLI's dev_mismatched), the name of the set follows that of the metric.
    """
    values = {}
    for name, examples in sets.items():
        found = examples.score(predict(model, weights, examples, device), metrics, METRICS)
        values |= {f"{metric} {name}" if values else metric: value for metric, value in found.items()}
    return values


# --- finished runs -------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    result: dict  # result.json
    folder: Path  # of the model
    model: torch.nn.Module
    tokenizer: object
    masks: dict  # {name: bool [out, in]}; empty if the run has none


def load_backbone(folder, task, length, head, fresh=True):
    """-> (the task's model with this head, fresh or the folder's; tokenizer). Raises ValueError for what misfits."""
    if task.load:
        return task.load(folder, length, head)
    stored, tensors = read_model(folder)
    with prefix_errors(folder):
        config = read_config(stored)
    tokenizer = data.load_tokenizer(folder, length)
    probe = tokenizer.encode(*"ab"[: len(task.text)])  # with what the tokenizer puts around texts
    with prefix_errors(folder):
        if not 4 <= length <= config.longest_input:
            raise ValueError(f"--length {length}: the model takes 4 to {config.longest_input} tokens")
        ids = [*tokenizer.get_vocab().values(), *probe.ids]
        if max(ids) >= config.vocab_size or max(probe.type_ids) >= config.type_vocab_size:
            raise ValueError("tokenizer.json has more words or segments than config.json allows")
        words = data.label_word_ids(task, tokenizer) if head == "words" else [0] * len(task.words)  # not read
        return load_model(stored, tensors, words, head, task.every_token, fresh), tokenizer


def read_result(run):
    """What describes a finished run's folder or a mask file. Raises ValueError if this code cannot evaluate it."""
    result = read_description(run)
    if result["method"] not in METHODS:
        raise ValueError(f"{run}: METHODS has no method {result['method']}")
    if result["task"] not in TASKS or result["words"] != TASKS[result["task"]].words:
        raise ValueError(f"{run}: TASKS has no task {result['task']} with the label words {result['words']}")
    return result


def load_run(run, model_name=None):
    """A finished run's folder, or a mask file -> Loaded. Raises ValueError that says what does not fit."""
    result = read_result(run)
    method = METHODS[result["method"]]
    own = method.trains_weights
    if own and (run.is_file() or model_name):
        raise ValueError(f"{run}: this run trained weights of its own; name its folder, and leave out --model")
    folder = run if own else fetch.model_folder(model_name or result["model"])
    if own:
        check_digest(run / "model.safetensors", "sha256", result["sha256"].get("model.safetensors"))
    model, tokenizer = load_backbone(folder, TASKS[result["task"]], result["length"], result["head"], not own)
    for what, found in identity(folder, model).items():
        if found != result[what] and not (own and what == "fingerprint"):
            raise ValueError(f"--model: the {what} of {folder} is not the one that {run} was trained with")
    if method.masking is None:  # the method decides whether there must be a mask, not the file
        return Loaded(result, folder, model, tokenizer, {})

    mask_file = run if run.is_file() else run / "mask.safetensors"
    shapes = {name: w.shape for weights in model.prunable().values() for name, w in weights.items()}
    masks, others, described = load_masks(mask_file, shapes)
    if described != result:  # the mask file is sealed, result.json is not
        raise ValueError(f"{run}: mask.safetensors and result.json are of different runs")
    weights = {} if own else dict(model.named_parameters())
    expected = {n: w.shape for n, w in weights.items() if n.startswith("classifier.") or method.vectors and w.ndim == 1}
    if expected != {name: tensor.shape for name, tensor in others.items()}:
        raise ValueError(f"{mask_file} holds other weights beside its mask than {result['method']} trains")
    model.load_state_dict(others, strict=False)
    return Loaded(result, folder, model, tokenizer, masks)


def load_sets(result, splits, data_dir, tokenizer):
    """{split: Examples} of a folder, or by default of the run. Raises ValueError if the run's have changed since."""
    known = result["data_dir"]
    folder = data_dir or (known if known and Path(known).is_dir() else None)  # None: a mask that was handed on
    sets = {split: data.load_split(result["task"], split, folder, tokenizer) for split in splits}
    for split, examples in sets.items():
        if not data_dir and result.get(f"{split} digest") not in (None, examples.digest()):
            raise ValueError(f"{split} in {folder or fetch.cache()} is not the run's; --data-dir allows for other data")
    return sets


def densities(groups, masks):
    """{group: matrix names}, masks {name: bool [out, in]} -> {group: [density of each layer]}."""
    return {group: [masks[name].float().mean().item() for name in names] for group, names in groups.items()}


# --- the command ---------------------------------------------------------------------------------------------


def masked_weights(loaded, device, dtype):
    """Move a loaded run's model there -> {name: tensor}, its weights under the masks."""
    model = loaded.model.to(device, dtype)
    return {name: model.get_parameter(name).detach() * mask.to(device) for name, mask in loaded.masks.items()}


def answers(loaded, texts, read=None):
    """Texts, or pairs as tuples -> for each [(probability, label)], the likeliest first; of a regression [(score, "")].

    read: Examples -> logits [N, C]; by default on the CPU in float32. Not for tasks that answer with spans.
    """
    labels = list(TASKS[loaded.result["task"]].words)
    texts = [(text,) if isinstance(text, str) else text for text in texts]
    read = read or partial(predict, loaded.model, masked_weights(loaded, "cpu", torch.float32), device="cpu")
    logits = read(data.encode(texts, [0] * len(texts), loaded.tokenizer))  # [N, C]
    if len(labels) == 1:
        return [[(score, "")] for score in logits[:, 0].tolist()]
    return [sorted(zip(row, labels, strict=True), reverse=True) for row in logits.softmax(1).tolist()]


def read_texts(path, width):
    """Lines of a file -> tuples of `width` texts, with tabs between. Raises ValueError that names the line."""
    content = require_regular_file(path).read_bytes()
    with prefix_errors(path):
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    texts = [tuple(line.removesuffix("\r").split("\t")) for line in lines]
    for number, text in enumerate(texts, 1):
        if len(text) != width:
            raise ValueError(f"{path}:{number}: the task takes {width} texts with tabs between, not {len(text)}")
    return texts


def tell(loaded, task, read, args):
    """Lines: the answers to --text, or to each line of --text-file as TSV."""
    if args.text_file:
        texts = read_texts(args.text_file, len(task.text))
    else:
        texts = [(args.text,) if args.pair is None else (args.text, args.pair)]
        if len(texts[0]) != len(task.text):
            raise ValueError(f"this task takes {'--text and --pair' if args.pair is None else '--text without --pair'}")
    if task.say:
        said = [task.say(text, loaded.tokenizer, read, args) for text in texts]
        return [" ".join(lines) for lines in said] if args.text_file else said[0]
    found = answers(loaded, texts, read)
    if args.text_file:
        return ["\t".join([rows[0][1], f"{rows[0][0]:.4f}", *text]) for rows, text in zip(found, texts, strict=True)]
    words = {label: f"{word} ({label})" for label, word in task.words.items()}
    return [f"{p:7.4f}  {words.get(label, 'score')}" for p, label in found[0]]


SUBMISSION = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}  # GLUE's server wants MNLI-m and MNLI-mm


def parse_args(argv):
    parser = cli.Parser(description="Evaluate finished runs and show their masks.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or a mask file out of one")
    cli.add_texts(parser)
    cli.add_files(parser)
    cli.add_machine(parser)
    args = parser.parse_args(argv)
    for needing in ("pair", "temperature"):
        if getattr(args, needing) is not None and args.text is None:
            parser.error(f"--{needing} needs --text")
    return args


def look(run, args):
    """Do with a run what the arguments ask for."""
    loaded = load_run(run, args.model)
    result, _, model, tokenizer, masks = loaded
    task = TASKS[result["task"]]
    device, dtype, why = cli.choose_device(args.device, args.dtype, (result["device"], result["dtype"]))
    weights = masked_weights(loaded, device, dtype)
    read = partial(predict, model, weights, device=device)
    if args.text is not None or args.text_file:
        print("\n".join([str(run)] * (len(args.runs) > 1) + tell(loaded, task, read, args)))
        return

    if args.predict and not task.test:
        raise ValueError(f"--predict: {result['task']} has no test split")
    sets = load_sets(result, task.test if args.predict else task.dev, args.data_dir, tokenizer)
    if args.predict:
        for split, examples in sets.items():
            path = (run if run.is_dir() else run.parent) / f"{task.folder}{SUBMISSION[split]}.tsv"
            write_predictions(path, list(task.words), data.decide(read(examples)))
        return

    method = cli.printable(str(result.get("pruned_with", result["method"])))
    print(f"{run}: {result['task']}, {method} on {device} in {cli.dtype_name(dtype)} ({why})")
    metrics = evaluate(model, weights, sets, task.metrics, device)
    if masks:
        print("\n".join(cli.shaded_table("density", densities(model.prunable(), masks))))
    for i, (heads, neurons) in enumerate(model.config.layers if model.config.heads_per_layer else ()):
        print(f"layer {i}  {heads:3} heads {neurons:5} neurons")
    asked = sum(examples.asked() for examples in sets.values())
    found = [f"dev ({asked} examples): {cli.show(metrics)}", f"training reported {cli.show(result['final'])}"]
    print("\n".join([*found, *guessing(metrics, next(iter(sets.values())).labels, bool(result.get("sparsity")))]))


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    parallel.require_one_process("eval.py")
    cli.set_up(deterministic=False, steps=0)
    for run in args.runs:
        look(run, args)


if __name__ == "__main__":
    main()
