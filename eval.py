"""Evaluate a finished run, show its mask, classify a sentence of one's own.

What it is: metrics, evaluate(), and the command that looks at runs. What it is not: it trains nothing, and writes
nothing but what --predict, --export and --plot ask for. Sources: Wang et al., GLUE (ICLR 2019) for the metrics.

    python eval.py RUN [--text "a warm and funny film"]
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

import data
import fetch
import parallel
import squad
from cli import Parser, add_files, add_machine, choose_device, dtype_name, one_line_errors
from data import TASKS, encode
from export import export, export_compact
from fetch import write_whole
from mask import apply_masks
from picture import comparison, densities, density_map, head_densities, head_map, plot, read_log
from pretrained import read_weights
from runs import load_run, read_result

EVAL_BATCH = 64  # one size everywhere: another would round differently

# --- metrics: (predicted classes or scores [N], true ones [N]) -> number -------------------------------------


def accuracy(predicted, true):
    return float((predicted == true).mean())


def f1(predicted, true):
    """F1 of class 1; 0 when there is no true positive."""
    hits = ((predicted == 1) & (true == 1)).sum()
    return float(2 * hits / max((predicted == 1).sum() + (true == 1).sum(), 1))


def correlation(predicted, true):
    """Pearson's r, which for two classes is Matthews' coefficient; 0 when one side is constant."""
    p, t = predicted - predicted.mean(), true - true.mean()
    spread = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / spread) if spread else 0.0


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[at]


def spearman(predicted, true):
    return correlation(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": correlation, "pearson": correlation, "spearman": spearman}


@torch.inference_mode()
def predict(model, weights, examples, device, progress=False):
    """Logits [N, C] (SQuAD: [N, S, C]) in the order of the examples, without dropout.

    `weights` {name: tensor} stand in for the model's own.
    """
    training = model.training
    model.eval()
    batches = data.batch_rows(examples, EVAL_BATCH)
    outputs = [
        functional_call(model, weights, tuple(data.collate(examples, rows, device)[0]), tie_weights=False).float().cpu()
        for rows in tqdm(parallel.share(batches), desc="evaluating", leave=False, disable=not progress)
    ]
    outputs = parallel.gather(outputs)
    model.train(training)
    if outputs[0].ndim == 3:  # logits of every token [B, S, C]: to one S
        outputs = [F.pad(x, (0, 0, 0, examples.limit - x.shape[1]), value=-1e4) for x in outputs]
    return torch.cat(outputs)[np.concatenate(batches).argsort()]


def decide(logits):
    """Logits [N, C] -> predicted classes [N], or for one logit (regression) the scores themselves."""
    return (logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0]).numpy()


def evaluate(model, weights, sets, metrics, device, progress=False):
    """{metric: value} of a model, with `weights` in place of its own, on sets {name: labelled Examples}.

    The first set gives the metrics their plain names; those of another (MNLI's dev_mismatched) get its name behind.
    """
    values = {}
    for number, (name, examples) in enumerate(sets.items()):
        logits = predict(model, weights, examples, device, progress)
        if isinstance(examples, squad.Windows):
            found = squad.score(logits, examples)
        else:
            predicted, true = decide(logits), np.array(examples.labels)
            found = {metric: METRICS[metric](predicted, true) for metric in metrics}
        values |= {f"{metric} {name}" if number else metric: value for metric, value in found.items()}
    return values


def load_split(name, split, data_dir, tokenizer):
    """Examples of a task's split, see data.load_split and squad.load_split."""
    return (squad if name == "squad" else data).load_split(name, split, data_dir, tokenizer)


def show(metrics):
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


# --- the command ---------------------------------------------------------------------------------------------


def classify(model, weights, tokenizer, task, text, device):
    """Lines: each label word and its probability, or the score, or the answer, for a tuple of one or two texts."""
    if len(text) != len(task.text):
        need = "--text and --pair" if len(task.text) == 2 else "--text without --pair"
        raise ValueError(f"this task takes {need}")
    if model.every_token:
        asked = {"id": "--text", "question": text[0], "context": text[1], "answers": [(0, "")]}
        windows = squad.make_windows([asked], tokenizer, tokenizer.truncation["max_length"])
        return squad.answers(predict(model, weights, windows, device), windows)
    logits = predict(model, weights, encode([text], [0], tokenizer), device)[0]
    if len(task.words) == 1:
        return [f"{logits.item():7.4f}  score"]
    rows = zip(task.words.items(), logits.softmax(0).tolist(), strict=True)
    return [f"{p:7.4f}  {word} ({label})" for (label, word), p in sorted(rows, key=lambda row: -row[1])]


SUBMISSION = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}  # GLUE's server wants MNLI-m and MNLI-mm


def write_predictions(model, weights, task, split, examples, path, device):
    """A test split's answers in the format of the GLUE server: index and label as in the training file, or score."""
    predicted = decide(predict(model, weights, examples, device, progress=True))
    if len(task.words) == 1:
        answers = [f"{score:.3f}" for score in predicted.clip(0, 5)]
    else:
        answers = [list(task.words)[c] for c in predicted]
    rows = "".join(f"{n}\t{answer}\n" for n, answer in enumerate(answers))
    write_whole(path, f"index\tprediction\n{rows}".encode())


def write_answers(model, weights, tokenizer, name, data_dir, folder, device):
    """write_predictions for each test split of a task, into a folder. Raises ValueError if it has none."""
    task = TASKS[name]
    if not task.test:
        raise ValueError(f"--predict: {name} has no test split")
    for split in task.test:
        path, examples = folder / f"{task.folder}{SUBMISSION[split]}.tsv", load_split(name, split, data_dir, tokenizer)
        write_predictions(model, weights, task, split, examples, path, device)
        print(f"{path}: {len(examples)} predictions")


def parse_args(argv):
    parser = Parser(description="Evaluate finished runs and show their masks.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder, or a mask file out of one")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--text", help="classify this sentence (squad: answer this question) instead")
    asked.add_argument("--predict", action="store_true", help="write the test split's answers for the GLUE server")
    asked.add_argument("--export", type=Path, metavar="FOLDER", help="write a model folder with the zeros in it")
    asked.add_argument("--export-compact", type=Path, metavar="FOLDER", help="write what is not dead as a folder")
    asked.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the mask and the training curves instead")
    parser.add_argument("--pair", help="the second sentence of tasks on pairs (squad: the paragraph)")
    add_files(parser)
    add_machine(parser)
    args = parser.parse_args(argv)
    if args.pair is not None and args.text is None:
        parser.error("--pair needs --text")
    for name in ("text", "predict", "export", "export_compact", "plot"):
        if len(args.runs) > 1 and getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is about one run, not {len(args.runs)}")
    if parallel.PROCESSES > 1:
        parser.error("eval.py is one process: start it with python, not with torchrun")
    return args


def main(argv=None):
    args = parse_args(argv)
    read = lru_cache(maxsize=1)(read_weights)  # the backbone of several masks is read once
    with one_line_errors():
        for run in args.runs:  # what is missing is said before anything is evaluated
            read_result(run)
        seen = [look(run, args, *load_run(run, args.model, read)) for run in args.runs]
        if len(seen) == 2 and all(masks for _, masks in seen):
            (groups, first), (_, second) = seen
            print("\n".join(comparison(groups, first, second)))
        elif len(seen) == 2:
            print("there are no two masks to compare: a run of each is needed whose method has one")


def look(run, args, result, folder, model, tokenizer, masks):
    """Do with a loaded run what the arguments ask for -> ({group: [matrix names]}, masks {name: bool})."""
    task, groups = TASKS[result["task"]], {group: list(weights) for group, weights in model.prunable().items()}
    device, dtype, why = choose_device(args.device, args.dtype)
    if args.dtype is None and device.type == result["device"]:
        dtype, why = getattr(torch, result["dtype"]), "as in training"
    if args.export:
        export(args.export, folder, result, masks, model.words.tolist())
        print(f"{args.export}: an ordinary model folder; its README.md says how to use it")
        return groups, masks
    if args.export_compact:
        print("\n".join(export_compact(args.export_compact, folder, result, masks, model, device, dtype)))
        return groups, masks
    if args.plot:
        draw(args.plot, run, result, groups, masks)
        return groups, masks
    model.to(device, dtype)
    masks = {name: mask.to(device) for name, mask in masks.items()}
    weights = apply_masks(model.state_dict(), masks)
    data_dir = args.data_dir or result["data_dir"]
    if not args.data_dir and data_dir and not Path(data_dir).is_dir():  # a mask that was handed on
        print(f"--data-dir: {data_dir}, which the run used, is not here; taking the files in {fetch.CACHE}")
        data_dir = None
    if args.text is not None:
        text = (args.text,) if args.pair is None else (args.text, args.pair)
        print("\n".join(classify(model, weights, tokenizer, task, text, device)))
    elif args.predict:
        folder = run if run.is_dir() else run.parent
        write_answers(model, weights, tokenizer, result["task"], data_dir, folder, device)
    else:
        sets = {split: load_split(result["task"], split, data_dir, tokenizer) for split in task.dev}
        which = f"{run}: " if len(args.runs) > 1 else ""
        where = f"{device} in {dtype_name(dtype)} ({why})"
        print(f"{which}{result['task']}, {result['method']}, {result['model']} on {where}")
        metrics = evaluate(model, weights, sets, task.metrics, device, progress=True)
        if masks and len(args.runs) == 1:
            print("\n".join(density_map(densities(groups, masks))))
            print("\n".join(head_map(head_densities(groups, masks, model.config.layers[0][0]))))
        elif model.config.heads_per_layer and len(args.runs) == 1:
            print("\n".join(f"layer {i}  {h:3} heads {n:5} neurons" for i, (h, n) in enumerate(model.config.layers)))
        examples = sum(examples.asked() for examples in sets.values())
        print(f"dev ({examples} examples): {show(metrics)}; training reported {show(result['final'])}")
    return groups, masks


def draw(path, run, result, groups, masks):
    """--plot: the mask of a run, and its training curves if its folder is there."""
    if not masks:
        raise ValueError(f"--plot: {run} has no mask to draw")
    log = run / "log.jsonl"
    title = f"{result['task']}, {result['method']}, density {result['density']:.2f}"
    plot(path, title, densities(groups, masks), read_log(log) if log.exists() else ([], []))
    print(f"{path}: the mask{' and the training curves' if log.exists() else ''}")


if __name__ == "__main__":
    main()
