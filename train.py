"""Learn a task by switching off weights of a frozen BERT, or fine-tune it as the dense reference.

What it is: the loop, and the run folder (mask.safetensors, log.jsonl, result.json). What it is not: the method, which
is mask.py, or the flags, which are arguments.py. Sources: Jiang et al., ACL 2023 (arXiv 2210.06210), and its authors'
code for the recipe.

    python train.py                               # MiniLM on movie reviews: nothing to prepare, minutes on a laptop
    python train.py --task rte --sparsity 0.5     # the paper's setting: bert-base-uncased on GLUE
"""

import hashlib
import json
import math
import os
import platform
import shlex
import signal
import statistics
import time
from contextlib import closing, contextmanager

import torch
from safetensors.torch import save
from tqdm import tqdm

import cluster
import data
import fetch
import parallel
import summary
from arguments import MOST_STEPS, parse_args
from checkpoint import CHECKPOINT, in_background, restore, save_checkpoint
from cli import choose_device, code_version, dtype_name, make_deterministic, one_line_errors
from data import TASKS
from eval import evaluate, load_split, show
from mask import METHODS, density_at, penalty_at
from maskfile import pack_masks
from picture import densities
from pretrained import load_model, published
from runs import load_backbone, load_run, plain, read_result, tokenizer_digest
from shrink import config_json
from step import Losses, make_learner, make_run, rate_at, train_step

LOG_EVERY = 10  # steps between log lines; only there, and to evaluate, does the host wait for the device


def check_run_folder(folder):
    """Raise ValueError unless the folder is new, empty, or of a run that saved nothing, which the new one replaces."""
    if (folder / "result.json").exists():
        raise ValueError(f"--out: {folder} holds a finished run; name another folder or seed, or delete it")
    if (folder / CHECKPOINT).exists():
        raise ValueError(f"--out: {folder} holds an interrupted run; --resume {folder} goes on, or delete it")
    if folder.exists() and any(folder.iterdir()) and not (folder / "log.jsonl").exists():
        raise ValueError(f"--out: {folder} holds files that are not of a run; name another folder")


def prepare(args):
    """Everything that reads files -> (model in float32, teacher or None, train set, {name: dev set}).

    Makes the run folder; so of several processes, only the first can tell whether it was free.
    """
    task = TASKS[args.task]
    if not parallel.RANK and not args.resume:
        check_run_folder(args.out)
    for split in (task.train, *task.dev):  # before anything large is downloaded
        data.split_path(args.task, split, args.data_dir)
    model, tokenizer = load_backbone(fetch.model_folder(args.model), task, args.length, args.head)
    if METHODS[args.method].masking and len(set(model.config.layers)) > 1:
        raise ValueError(f"--method {args.method} needs layers of one size, which {args.model} lacks; try finetune")
    teacher = load_teacher(args, tokenizer) if args.teacher else None
    train, *dev = (load_split(args.task, split, args.data_dir, tokenizer) for split in (task.train, *task.dev))
    args.out.mkdir(parents=True, exist_ok=True)
    return model, teacher, train, dict(zip(task.dev, dev, strict=True))


def described(train, dev, teacher, device, dtype):
    """What a run depends on beside its command and its backbone, for check_identity."""
    sets = {"train": train.digest()} | {name: examples.digest() for name, examples in dev.items()}
    sets |= {"teacher": teacher.fingerprint()} if teacher else {}
    return sets | {"device": device.type, "dtype": dtype_name(dtype)}


def check_identity(args, identity):
    """Raise ValueError when a resumed run is not on the backbone, data and device that it began with; note them."""
    for what, value in identity.items() if args.resume else ():
        if args.identity.get(what) != value:
            raise ValueError(f"--resume: {what} is {value} now, and was {args.identity.get(what)} when the run began")
    args.identity = identity


def load_teacher(args, tokenizer):
    """The fine-tuned model of --teacher, frozen. Raises ValueError if it cannot teach this task to this model."""
    result = read_result(args.teacher)
    if METHODS[result["method"]].masking:
        raise ValueError(f"--teacher: {args.teacher} is a run of {result['method']}; a teacher must be fine-tuned")
    if result["task"] != args.task:
        raise ValueError(f"--teacher: {args.teacher} was trained on {result['task']}, not on {args.task}")
    _, _, teacher, its_tokenizer, _ = load_run(args.teacher)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher: {args.teacher} has another vocabulary than {args.model}")
    if args.length > teacher.config.longest_input:
        raise ValueError(f"--teacher: {args.teacher} takes {teacher.config.longest_input} tokens; lower --length")
    return teacher.eval().requires_grad_(False)


def loop(args, losses, train, dev, device, total, log):
    """Train and evaluate -> list of evaluations, dicts with step, density and dev metrics; the last is the final one.

    Raises FloatingPointError when the loss, or at an evaluation a score or weight, is not finite.
    """
    learner = losses.learner
    hold, ramp = (round(share * total) if learner.masks else 0 for share in (args.hold, args.ramp))
    final = 1 - args.sparsity if learner.masks else args.density
    optimizer, warmup = learner.optimizer(args.lr, args.weight_lr), round(args.warmup * total)
    run = make_run(losses, args.compile, args.eager)
    metrics, power = TASKS[args.task].metrics, {"cubic": 3, "linear": 1}[args.schedule]
    densities = (density_at(max(t - hold, 0), ramp - hold, final, power) for t in range(total + 1))
    schedule = [(density, penalty_at(t, total, args.penalty)) for t, density in enumerate(densities)]
    schedule_there = torch.tensor(schedule, device=device)
    eval_steps = {math.ceil(total * i / args.evals) for i in range(1, args.evals + 1)}
    state = {"step": 0, "evaluations": []}
    if args.resume:
        state = restore(args.out / CHECKPOINT, learner, optimizer, total)
    start, evaluations, recent = state["step"], state["evaluations"], []
    world = {"rank": parallel.RANK, "processes": parallel.PROCESSES, "parts": args.accumulate}
    batches = data.training_batches(train, args.batch, total, args.seed, device, **world, first=start)
    settings = {"initial": start, "dynamic_ncols": True, "disable": parallel.RANK > 0}
    bar = tqdm(batches, f"{args.task} {args.method}", total, **settings)
    with closing(bar), Stopped() as stopped, in_background() as start_saving:
        for step, parts in enumerate(bar, start):
            rate = rate_at(step, total, warmup)
            recent.append(train_step(run, optimizer, parts, schedule_there[step], step, rate))
            done = step + 1
            if done % LOG_EVERY == 0 or done in eval_steps:
                report(done, recent, *schedule[step], bar, log)
                recent.clear()
            if done in eval_steps:
                if not all(p.isfinite().all() for p in learner.parameters()):
                    raise FloatingPointError(f"scores or weights are not finite at step {done}: try a smaller --lr")
                parallel.check_equal(dict(learner.named_parameters()))
                density = schedule[done][0]  # of the next step, so that the last is the target
                with torch.compiler.set_stance("force_eager"):  # as eval.py will compute it
                    scores = evaluate(losses.model, learner.baked(density), dev, metrics, device)
                evaluations.append({"step": done, "density": density, "dev": scores})
                log(**evaluations[-1])
                bar.write(f"step {done:5}  density {density:.3f}  dev {show(scores)}")
            if (done in eval_steps or stopped) and done < total and parallel.PROCESSES == 1:
                spent, size = time.time() - args.started, (args.out / "log.jsonl").stat().st_size
                state = {"step": done, "evaluations": evaluations, "argv": args.argv, "spent": spent, "log": size}
                state["identity"] = args.identity
                start_saving(save_checkpoint(args.out / CHECKPOINT, learner, optimizer, state))
            if stopped and done < total:
                resumable = parallel.PROCESSES == 1
                raise KeyboardInterrupt(f"python train.py --resume {args.out} goes on" if resumable else "")
    return evaluations


def report(step, losses, density, penalty, bar, log):
    """Log the mean loss since the last report and the last regularizer. Raises FloatingPointError if not finite."""
    losses, regularizers = parallel.mean(torch.stack(losses)).T.tolist()
    loss, regularizer = sum(losses) / len(losses), regularizers[-1]
    if not math.isfinite(loss + penalty * regularizer):
        raise FloatingPointError(f"the loss is {loss} at step {step}: try a smaller --lr, or float32")
    bar.set_postfix(loss=f"{loss:.3f}", density=f"{density:.3f}")
    log(step=step, loss=loss, density=density, penalty=penalty, regularizer=regularizer)


class Stopped(list):
    """Empty until SIGINT or SIGTERM comes; so that a step is finished and saved first."""

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        if self:  # the second time is meant
            raise KeyboardInterrupt("what an evaluation saved is kept: --resume RUN_DIR goes on from there")
        self.append(number)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def frozen_unchanged(args, model, learner, folder):
    """Whether all weights that were not trained, stacked ones included, equal the file's (cast to the run's dtype)."""
    now = model.state_dict() | learner.masks.by_name(learner.masks.weights)
    file = load_model(folder, model.words.tolist(), args.head).state_dict()
    return all(torch.equal(t.to(now[n].dtype), now[n].cpu()) for n, t in file.items() if n not in learner.names)


def finish(args, learner, model, known, evaluations, seconds, command):
    """Write what was learnt, check that the frozen weights did not move, write result.json -> what it holds.

    known: what it also holds.
    """
    folder, density = fetch.model_folder(args.model), 1 - args.sparsity
    # Best on dev counts from when the target density is reached; a denser model would have an easier task.
    on_target = [e for e in evaluations if e["density"] == evaluations[-1]["density"]]
    parameter = next(model.parameters())
    result = {
        "task": args.task, "model": args.model, "method": args.method, "sparsity": args.sparsity, "seed": args.seed,
        "steps": evaluations[-1]["step"], "batch": args.batch, "length": args.length, "lr": args.lr, "ramp": args.ramp,
        "hold": args.hold, "weight_lr": args.weight_lr, "warmup": args.warmup, "temperature": args.temperature,
        "penalty": args.penalty, "schedule": args.schedule, "head": args.head, "deterministic": args.deterministic,
        "teacher": args.teacher and str(args.teacher), "data_dir": args.data_dir,
        "device": parameter.device.type, "dtype": dtype_name(parameter.dtype),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "command": command,
        "words": TASKS[args.task].words, "final": evaluations[-1]["dev"], "sha256": {},
        "best": max(on_target, key=lambda e: e["dev"][TASKS[args.task].metrics[0]]),
        "seconds": round(seconds, 1), "density": 1.0, "stored_bits": 0, "tokenizer": tokenizer_digest(folder),
        "stored_numbers": sum(p.numel() for p in learner.weights),
    }  # fmt: skip
    result |= code_version() | known
    trained, row = learner.trained, METHODS[args.method]
    if learner.masks:
        masks = learner.masks.exact(density)
        kept, prunable = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        result |= {"density": kept / prunable, "kept": kept, "prunable": prunable}
        result |= {"reached": learner.masks.reached(density), "stored_bits": prunable}
        result["stored_numbers"] += kept if row.trains_weights else 0
        result["densities"] = densities(learner.masks.names, masks)
        if not row.trains_weights and not frozen_unchanged(args, model, learner, folder):
            raise ValueError(f"the frozen weights no longer equal those of {folder}; the run counts as unfinished")
    if row.trains_weights:
        trained |= learner.masks.baked(density, torch.float32) if learner.masks else {}
        content = save({published(n, model.config.model_type): w.detach().cpu() for n, w in trained.items()})
        result["sha256"] = {"model.safetensors": hashlib.sha256(content).hexdigest()}
        fetch.write_whole(args.out / "model.safetensors", content)
        fetch.write_whole(args.out / "config.json", config_json(folder, model.config))
        fetch.write_whole(args.out / "tokenizer.json", (folder / "tokenizer.json").read_bytes())
    if learner.masks:
        packed = pack_masks(masks, result, {} if row.trains_weights else trained)
        fetch.write_whole(args.out / "mask.safetensors", packed)
    fetch.write_whole(args.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    (args.out / CHECKPOINT).unlink(missing_ok=True)
    return result


def main(argv=None):
    args = parse_args(argv)
    args.started = time.time() - args.spent
    command = shlex.join(["python", "train.py", *args.argv])
    torch.manual_seed(args.seed)
    with one_line_errors():
        if args.deterministic:
            make_deterministic()
        device, dtype, why = choose_device(args.device, args.dtype)
        parallel.start(device)
        with parallel.first_process_first():
            model, teacher, train, dev = prepare(args)
        args.density = 1.0  # of what is left before training
        known = {"fingerprint": model.fingerprint(), "config": plain(model.config)}
        check_identity(args, known | described(train, dev, teacher, device, dtype))
        if METHODS[args.method].units:
            tokens = statistics.mean(len(ids) for examples in dev.values() for ids in examples.ids)
            settings = {"sparsity": args.sparsity, "ffn_share": args.ffn_share, "device": device, "seed": args.seed}
            model, facts = cluster.prune(model, METHODS[args.method].units, train, tokens, **settings)
            known |= facts | {"config": plain(model.config), "ffn_share": args.ffn_share}
            args.density = facts["density"]
            print(cluster.describe(facts))
    args.schedule = args.schedule or {"bert": "cubic", "roberta": "linear"}[model.config.model_type]
    model.to(device).requires_grad_(False)
    learner = make_learner(model, args.method, 1 - args.sparsity, dtype, args.temperature)
    losses = Losses(model, learner, teacher and teacher.to(device, dtype))
    total = args.steps or math.ceil(min(args.epochs * math.ceil(len(train) / args.batch), MOST_STEPS))
    sizes = " + ".join(str(len(examples)) for examples in dev.values())
    padding = f"{data.padding(train, args.batch):.1%} of it padding"
    print(f"{args.task}: {len(train)} train and {sizes} dev examples; {total} steps of {args.batch}, {padding}")
    density = 1 - args.sparsity if learner.masks else args.density
    print(f"{args.model}, {args.method}, sparsity {args.sparsity:g} (density {density:.4g}) -> {args.out}")
    print(f"on {parallel.PROCESSES} x {device} in {dtype_name(dtype)}: {why}")

    torch.manual_seed(args.seed * parallel.PROCESSES + parallel.RANK)  # every process has dropout of its own
    with one_line_errors(), log_file(args) as log:
        evaluations = loop(args, losses, train, dev, device, total, log)
        if not parallel.RANK:
            seconds = time.time() - args.started
            result = finish(args, learner, model, known, evaluations, seconds, command)
            print("\n".join(summary.lines(result, args.argv, args.out)))
    parallel.stop()


@contextmanager
def log_file(args):
    """A function that writes a line of log.jsonl; in all processes but the first, nothing.

    The run folder is this process's as long as the file is open.
    """
    if parallel.RANK:
        yield lambda **line: None
        return
    with open(args.out / "log.jsonl", "a") as file:
        fetch.lock(file)
        if not args.resume:
            check_run_folder(args.out)  # again: another process may have written there meanwhile
        for part in args.out.glob(".part-*"):  # of a run that was killed while it wrote
            part.unlink(missing_ok=True)
        if size := os.path.getsize(file.name):  # after a checkpoint comes what will come again
            file.truncate(min(args.log, size) if args.resume else 0)
        yield lambda **line: print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
