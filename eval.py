"""Evaluate a finished run, show its mask, classify a sentence of your own.

    python eval.py RUN                                  # a run folder, or a mask file out of one
    python eval.py RUN --text "a warm and funny film"

From Python: `answers(load_run(path), ["a warm and funny film"])`.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import plumbing  # noqa: F401  # isort: skip (must come before torch: sets OpenMP's spin time)
import numpy as np
import torch
from torch.func import functional_call

import data
import extras  # noqa: F401 (its methods and tasks; without the folder, delete this line)
from mask import METHODS
from model import load_backbone
from plumbing import cli, fetch, parallel
from plumbing.files import check_digest, load_masks, shapes_of
from plumbing.progress import progress
from plumbing.run import identity, print_stderr, read_description
from plumbing.summary import cut_texts, guessing

# --- evaluation -----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model, weights, examples, device):
    """Logits of N examples [N, ...] in their order, reduced as the examples say, without dropout.

    `weights` {name: tensor} stand in for the model's own.
    """
    training = model.training
    model.eval()  # no dropout
    # Rows of similar length stand together, so that little is computed on padding.
    batches = data.batch_rows(examples, examples.eval_batch)
    outputs = []
    for rows in progress(batches, "evaluating", delay=2):
        inputs, labels = data.collate(examples, rows, device)
        # A forward pass as in training, with the given weights.
        logits = functional_call(model, weights, tuple(inputs), tie_weights=False).float()
        # A language model has a logit for every word: keep only what the score needs.
        outputs.append(examples.reduce_logits(logits, labels).cpu())
    model.train(training)

    # From the order of the batches back to that of the examples.
    return torch.cat(outputs)[np.concatenate(batches).argsort()]


def evaluate(model, weights, sets, metrics, device):
    """{metric: value} of a model with these weights {name: tensor} on sets {name: Examples}.

    From the second set on (MNLI's dev_mismatched), the set's name follows that of the metric.
    """
    values = {}  # {"accuracy": 0.84, "accuracy dev_mismatched": 0.85}
    for name, examples in sets.items():
        # The first set's metrics have plain names.
        logits = predict(model, weights, examples, device)
        suffix = f" {name}" if values else ""
        for metric, value in examples.score(logits, metrics).items():
            values[metric + suffix] = value
    return values


# --- finished runs --------------------------------------------------------------------------------


class Loaded(NamedTuple):
    # What load_run() returns.
    result: dict  # result.json
    task: data.Task
    folder: Path  # where the model is
    model: torch.nn.Module
    tokenizer: object
    masks: dict  # {name: bool [out, in]}; empty if the run has none


def load_run(run, model_name=None):
    """A finished run's folder, or a mask file -> Loaded. Raises ValueError for what misfits."""
    run = Path(run)
    result = read_result(run)
    task, method = data.task_of(result), METHODS[result["method"]]
    # If the model's weights trained, the run's folder holds a whole model: --model makes no sense.
    has_model = "weights" in method.trains
    if has_model and (run.is_file() or model_name):
        raise ValueError(
            f"{run}: this run saved a whole model; name its folder, and leave out --model"
        )
    # A mask needs the backbone that it was made for; trained weights lie in the run's folder.
    folder = run if has_model else fetch.model_folder(model_name or result["model"])
    if has_model:
        path = run / "model.safetensors"
        check_digest(path.read_bytes(), "sha256", result["sha256"].get(path.name), path)
    fresh = not has_model  # beside a mask, load_masks_into() fills the fresh classifier
    model, tokenizer = load_backbone(folder, task, result["length"], result["head"], fresh)

    # A mask on other weights, or words read by another tokenizer, would give nonsense.
    for what, value in identity(folder, model).items():
        if has_model and what == "fingerprint":  # its weights have moved on since
            continue
        if value != result[what]:
            raise ValueError(
                f"--model: the {what} of {folder} is not the one that {run} was trained with"
            )
    # A whole model without masks (finetune, LoRA) has no mask file.
    masks = {}
    if method.how_many or not has_model:
        masks = load_masks_into(model, run, result)
    return Loaded(result, task, folder, model, tokenizer, masks)


def read_result(run):
    """The result of a run's folder or mask file. Raises ValueError if it is not for this code."""
    # Whether it is a result at all is plumbing's question. Here: do we know its task and method?
    try:
        result = read_description(run)
    except FileNotFoundError:
        raise ValueError(f"{run}: there is no finished run or mask file here") from None
    if result["method"] not in METHODS:
        raise ValueError(f"{run}: METHODS has no method {result['method']}")
    # Other label words would read the same logits as other answers.
    task, words = data.task_of(result), result["words"]
    if task is None or words != task.words:
        raise ValueError(f"{run}: TASKS has no task {result['task']} with the label words {words}")
    return result


def load_masks_into(model, run, result):
    """-> masks {name: bool [out, in]}. What trained beside them goes into the model.

    Raises ValueError for a file of another run, backbone or method.
    """
    path = run if run.is_file() else run / "mask.safetensors"
    method = METHODS[result["method"]]
    # A fresh classifier, or biases and LayerNorms, may have trained beside the mask.
    beside = {} if "weights" in method.trains else method.trained(model)
    # The masks must be those of this model's matrices, of this run, and nothing else.
    masks, others = load_masks(path, shapes_of(method.masked(model)), shapes_of(beside))
    model.load_state_dict(others, strict=False)
    return masks


def load_sets(result, splits, data_dir, tokenizer):
    """{split: Examples} from a folder, or by default the run's own data, unchanged."""
    run_data = result["data_dir"]
    if run_data and not Path(run_data).exists():
        run_data = None  # a mask from another machine; the cache may have its data
    folder, task = data_dir or run_data, data.task_of(result)
    sets = {split: data.load_split(task, split, folder, tokenizer) for split in splits}
    # A run's number means nothing on rows that have changed since.
    for split, examples in sets.items():
        if not data_dir and result.get(f"{split} digest") not in (None, examples.digest()):
            raise ValueError(
                f"{split} in {folder or fetch.cache()} is not the run's; "
                "--data-dir FOLDER evaluates on other data"
            )
    return sets


def densities(groups, masks):
    """{group: matrix names, or a dict of them}, {name: bool [out, in]} -> {group: [densities]}."""
    by_group = {}
    # Groups and layers come in the model's order.
    for group, names in groups.items():
        by_group[group] = [masks[name].float().mean().item() for name in names]
    return by_group


def masked_weights(loaded, device, dtype):
    """Move a loaded run's model to a device -> {name: weight under the mask [out, in]}."""
    model = loaded.model.to(device, dtype)
    # W' = W * M, once and for all. Without masks this is empty, and the model's own weights count.
    masks = loaded.masks.items()
    return {name: model.get_parameter(name).detach() * mask.to(device) for name, mask in masks}


# --- answers to texts -----------------------------------------------------------------------------


def answers(loaded, texts, logits_of=None):
    """Texts, or pairs as tuples -> for each [(probability, label)], the likeliest first.

    A regression gives [(score, "")]. logits_of: Examples -> logits [N, C], by default on the CPU in
    float32. Not for tasks that answer with spans.
    """
    if not texts:
        return []
    labels = list(loaded.task.words)  # in class order
    if logits_of is None:
        weights = masked_weights(loaded, "cpu", torch.float32)
        logits_of = partial(predict, loaded.model, weights, device="cpu")
    texts = [(text,) if isinstance(text, str) else text for text in texts]
    logits = logits_of(data.encode(texts, [0] * len(texts), loaded.tokenizer))  # [N, C]
    if len(labels) == 1:
        zero, unit = loaded.task.scale
        return [[(zero + unit * logit, "")] for logit in logits[:, 0].tolist()]

    # Softmax over the classes, then the likeliest first.
    ranked = []
    for probabilities in logits.softmax(1).tolist():
        ranked.append(sorted(zip(probabilities, labels, strict=True), reverse=True))
    return ranked


def answer_texts(loaded, logits_of, args):
    """Lines: the answer to --text, or one for each line of --text-file, as TSV."""
    task = loaded.task
    if args.text_file and task.answer_file:  # a table with columns of its own
        return task.answer_file(args.text_file, partial(answers, loaded, logits_of=logits_of))
    texts = read_texts(args, len(task.text))
    if task.format_answer:  # a span, or the continuation of a text
        blocks = [task.format_answer(text, loaded.tokenizer, logits_of, args) for text in texts]
        return [" ".join(lines) for lines in blocks] if args.text_file else blocks[0]

    lines = []
    ranked = answers(loaded, texts, logits_of)
    if args.text_file:  # the likeliest label of each text
        for answer, text in zip(ranked, texts, strict=True):
            p, label = answer[0]
            # A regression has no label.
            lines.append("\t".join([label, f"{p:.4f}", *text]).lstrip("\t"))
    else:  # every label of the one text
        for p, label in ranked[0]:
            word = task.words.get(label, "score")
            name = word if label in ("", word) else f"{word} ({label})"
            lines.append(f"{p:7.4f}  {name}")
    return lines


def read_texts(args, width):
    """--text and --pair, or the lines of --text-file with tabs between -> tuples of texts.

    Raises ValueError, which names the line, for one without `width` texts.
    """
    if args.text_file:  # tabs separate the two texts of a pair
        if args.text_file.suffix.lower() == ".csv":
            raise ValueError(
                "--text-file: only a run with --train reads a CSV; name a file with a text per line"
            )
        texts = list(data.read_cells(args.text_file))
    else:
        texts = [[text for text in (args.text, args.pair) if text is not None]]
    for number, text in enumerate(texts, 1):
        if len(text) != width:
            place = f"{args.text_file}:{number}" if args.text_file else "--text and --pair"
            raise ValueError(f"{place}: the task takes {width} text(s), not {len(text)}")
    return [tuple(text) for text in texts]


# --- the command ----------------------------------------------------------------------------------

WHAT_FLAGS = {
    "text": (str, "classify, answer or continue this text"),
    "text_file": (Path, "the same for each line of a file; after --train, each row of a table"),
    "predict": (Path, "answer GLUE's test.tsv, or a file of SQuAD, as its server takes it"),
    "dev": (str, "evaluate this file instead of the run's dev set"),
    "data_dir": (str, "evaluate on the data in this folder, which holds the tasks' folders"),
}
TEXT_FLAGS = {
    "pair": (str, "the second sentence, or the paragraph, where the task takes two texts"),
    "temperature": (cli.number(float, 0.01, 100), "sample at this temperature (language models)"),
    "seed": (cli.seed, "for the samples"),
}


def parse_args(argv):
    parser = cli.Parser(description="Evaluate finished runs and show their masks.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or a mask file out of one"
    )
    parser.add_argument("--model", help="the backbone of a mask file, if it is somewhere else")
    cli.add_flags(parser, "one of these", WHAT_FLAGS, exclusive=True)
    cli.add_flags(parser, "with --text", TEXT_FLAGS, {"seed": 0})
    cli.add_flags(parser, "machine", cli.MACHINE_FLAGS)
    parser.set_defaults(seed=0)
    args = parser.parse_args(argv)
    if args.text is None and (args.pair is not None or args.temperature is not None):
        parser.error("--pair and --temperature need --text")
    return args


def evaluate_run(run, args):
    """Do with a run what the arguments ask for."""
    loaded = load_run(run, args.model)
    result, task = loaded.result, loaded.task
    device, dtype, why = cli.choose_device(args.device, args.dtype)
    if args.dtype is None and device.type == result["device"]:  # as in training
        dtype = getattr(torch, result["dtype"])
    weights = masked_weights(loaded, device, dtype)

    def logits_of(examples):
        print_stderr(*cut_texts(result["length"], {"given": examples}))
        return predict(loaded.model, weights, examples, device)

    # One of three: answer texts, answer a whole test file, or evaluate.
    if args.text is not None or args.text_file:
        if len(args.runs) > 1:
            print(run)
        for line in answer_texts(loaded, logits_of, args):
            print(line)
    elif args.predict:
        task.predict(args.predict, run, loaded, logits_of)
    else:
        splits = task.dev[:1] if args.dev else task.dev  # one file is one set
        sets = load_sets(result, splits, args.dev or args.data_dir, loaded.tokenizer)
        method = result.get("pruned_with", result["method"])
        print(f"{run}: {result['task']}, {method} on {device} in {cli.dtype_name(dtype)} ({why})")
        metrics = evaluate(loaded.model, weights, sets, task.metrics, device)
        show_run(loaded, sets, metrics)


def show_run(loaded, sets, metrics):
    """Print a run's mask, and its metrics on the dev sets."""
    model = loaded.model
    if loaded.masks:
        for line in cli.shaded_table(densities(model.prunable(), loaded.masks)):
            print(line)
    if model.config.heads_per_layer:  # P-pruning took some out
        print(f"heads and neurons left in each layer: {model.config.layers}")
    # The metrics of further dev sets follow, with their names.
    questions = sum(examples.num_questions() for examples in sets.values())
    print(f"dev ({questions} examples): {cli.show(metrics)}")
    print(f"training reported {cli.show(loaded.result['final'])}")
    for line in guessing(metrics, sets):
        print(line)


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    parallel.require_one_process("eval.py")
    cli.set_up(deterministic=False, steps=0)
    for run in args.runs:
        evaluate_run(run, args)


if __name__ == "__main__":
    main()
