"""Learn a task by switching off weights of a frozen BERT, or fine-tune it as the dense reference.

What it is: arguments, the loop, and the run folder (mask.safetensors, log.jsonl, result.json). What it is not: the
method, which is mask.py. Sources: Jiang et al., ACL 2023 (arXiv 2210.06210), and its authors' code for the recipe.

    python train.py                               # MiniLM on movie reviews: nothing to prepare, minutes on a laptop
    python train.py --task rte --sparsity 0.5     # the paper's setting: bert-base-uncased on GLUE
"""

import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.func import functional_call
from tqdm import tqdm

import data
from data import TASKS
from eval import Parser, add_common_arguments, choose_device, dtype_name, evaluate, load_backbone, one_line_errors, show
from mask import MASKING, Masks, density_at, pack_masks, penalty_at
from model import load_model

LOG_EVERY = 10  # steps between log lines; only there, and to evaluate, does the host wait for the device


def parse_args(argv=None):
    """Arguments with the task's defaults filled in. Exits with status 2 and one line when they make no sense."""
    parser = Parser(
        description="Learn a task by switching off weights of a frozen BERT.",
        epilog="The defaults of --model, --epochs, --batch, --length, --ramp and --evals are the task's: data.TASKS.",
    )
    parser.add_argument("--task", choices=TASKS, default="movies")
    parser.add_argument("--method", choices=(*MASKING, "finetune"), default="smp-s", help="default: smp-s")
    parser.add_argument("--sparsity", type=float, help="share of the prunable weights removed, in [0, 1); default 0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="run folder; default: runs/ and the settings")
    parser.add_argument("--lr", type=float, help="highest learning rate; default: 2e-2 for scores, 3e-5 for weights")
    parser.add_argument("--penalty", type=float, default=400.0, help="lambda of the regularizer at the end (400)")
    add_common_arguments(parser)
    parser.add_argument("--epochs", type=float, help="passes over the training set")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--length", type=int, help="longest input in tokens; longer ones are cut")
    parser.add_argument("--ramp", type=float, help="share of the steps in which the density falls to its target")
    parser.add_argument("--evals", type=int, help="evaluations in a run")
    args = parser.parse_args(argv)
    for name in ("model", "epochs", "batch", "length", "ramp", "evals"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(TASKS[args.task], name))
    dense = args.method == "finetune"
    if dense and args.sparsity:
        parser.error("--sparsity: finetune removes nothing; leave it away, or choose another --method")
    if args.sparsity is None:
        args.sparsity = 0.0 if dense else 0.5
    if args.lr is None:
        args.lr = 3e-5 if dense else 2e-2
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity is the share of weights removed, in [0, 1); got {args.sparsity}")
    if not 0 <= args.ramp <= 1:
        parser.error(f"--ramp is a share of the steps, in [0, 1]; got {args.ramp}")
    if not 0 <= args.penalty < math.inf:
        parser.error(f"--penalty must be at least 0; got {args.penalty}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be at least 0 and less than 2^63; got {args.seed}")
    for name in ("lr", "epochs", "steps", "batch", "evals"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            parser.error(f"--{name} must be greater than 0; got {value}")
    if args.out is None:
        model = Path(args.model).name
        args.out = Path("runs") / f"{args.task}-{model}-{args.method}-{args.sparsity:g}-seed{args.seed}"
    return args


class Dense:
    """All weights trained and none masked: stands where Masks does. Weights are kept in float32 and used in dtype."""

    def __init__(self, model, dtype):
        self.dtype = dtype
        self.weights = {n: p.detach().float().clone().requires_grad_() for n, p in model.named_parameters()}

    def parameters(self):
        return list(self.weights.values())

    def optimizer(self, lr):
        """AdamW that decays matrices only, as BERT was fine-tuned by its authors."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr, fused=True)

    def __call__(self, density):
        return {name: weight.to(self.dtype) for name, weight in self.weights.items()}, torch.zeros(())

    def baked(self, density):
        return {name: weight.detach().to(self.dtype) for name, weight in self.weights.items()}


def train_step(model, learner, optimizer, inputs, labels, step, total, density, penalty):
    """One step at learning rate lr (1 - step/total) -> (loss on the task, regularizer), detached, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * (1 - step / total)
        # The reference code's Adam adds eps to the uncorrected second moment; torch's to the corrected one.
        group["eps"] = 1e-8 / math.sqrt(1 - group["betas"][1] ** (step + 1))
    weights, regularizer = learner(density)
    loss = task_loss(functional_call(model, weights, inputs).float(), labels)
    optimizer.zero_grad()
    (loss + penalty * regularizer).backward()
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimizer.step()
    return loss.detach(), regularizer.detach()


def task_loss(logits, labels):
    """Cross-entropy of logits [B, C] with classes [B], or mean squared error of the one logit with scores [B]."""
    return F.mse_loss(logits[:, 0], labels) if labels.is_floating_point() else F.cross_entropy(logits, labels)


def check_run_folder(folder):
    """Raise ValueError unless the folder is new, empty, or holds an unfinished run, which the new one replaces."""
    if (folder / "result.json").exists():
        raise ValueError(f"--out: {folder} holds a finished run; name another folder or seed, or delete it")
    if folder.exists() and any(folder.iterdir()) and not (folder / "log.jsonl").exists():
        raise ValueError(f"--out: {folder} holds files that are not of a run; name another folder")


def prepare(args):
    """Everything that reads files -> (model in float32, train set, {name: dev set})."""
    task = TASKS[args.task]
    model, tokenizer = load_backbone(data.model_folder(args.model), task, args.length)
    train, *dev = (data.load_split(args.task, split, args.data_dir, tokenizer) for split in ("train", *task.dev))
    return model, train, dict(zip(task.dev, dev, strict=True))


def loop(args, model, learner, train, dev, device, total, log):
    """Train and evaluate -> list of evaluations, dicts with step, density and dev metrics; the last is the final one.

    Raises FloatingPointError when the loss is not finite.
    """
    final, ramp = 1 - args.sparsity, round(args.ramp * total)
    optimizer, metrics = learner.optimizer(args.lr), TASKS[args.task].metrics
    eval_steps = {math.ceil(total * i / args.evals) for i in range(1, args.evals + 1)}
    losses, evaluations = [], []
    batches = data.training_batches(train, args.batch, total, args.seed, device)
    bar = tqdm(batches, f"{args.task} {args.method}", total, dynamic_ncols=True)
    for step, (inputs, labels) in enumerate(bar):
        density, penalty = density_at(step, ramp, final), penalty_at(step, total, args.penalty)
        loss, regularizer = train_step(model, learner, optimizer, inputs, labels, step, total, density, penalty)
        losses.append(loss)
        done = step + 1
        if done % LOG_EVERY == 0 or done in eval_steps:
            loss, regularizer = torch.stack(losses).mean().item(), regularizer.item()
            losses.clear()
            if not math.isfinite(loss + penalty * regularizer):
                bar.close()
                raise FloatingPointError(f"the loss is {loss} at step {done}: try a smaller --lr, or --dtype float32")
            bar.set_postfix(loss=f"{loss:.3f}", density=f"{density:.3f}")
            log(step=done, loss=loss, density=density, penalty=penalty, regularizer=regularizer)
        if done in eval_steps:
            density = density_at(done, ramp, final)
            scores = evaluate(model, learner.baked(density), dev, metrics, device)
            evaluations.append({"step": done, "density": density, "dev": scores})
            log(**evaluations[-1])
            bar.write(f"step {done:5}  density {density:.3f}  dev {show(scores)}")
    return evaluations


def frozen_unchanged(model, masks, folder):
    """Whether every weight in memory, stacked ones included, still equals the file's (cast to the run's dtype)."""
    file, now = load_model(folder, model.words), model.state_dict() | masks.by_name(masks.weights)
    return all(torch.equal(t.to(now[n].dtype), now[n].cpu()) for n, t in file.state_dict().items())


def summarize(args, result, path):
    """What a finished run says last."""
    best = result["best"]
    print(f"final  dev {show(result['final'])}")
    print(f"best   dev {show(best['dev'])} at step {best['step']}, chosen on dev (as papers report)")
    if "kept" in result:
        print(f"kept   {result['kept']:,} of {result['prunable']:,} weights: density {result['density']:.6f}")
        print(f"frozen all weights are bit-identical to those of {args.model} (fingerprint {result['fingerprint'][:12]})")
    print(f"saved  {path} ({path.stat().st_size / 1e6:.1f} MB) after {result['seconds']:.0f} s")
    look = shlex.join(["python", "eval.py", str(args.out)])
    pair = ' --pair "..."' if len(TASKS[args.task].text) == 2 else ""
    print(f'next   {look}\n       {look} --text "..."{pair}')
    if args.method != "finetune":
        print(f"       {dense_command(args)}")


def dense_command(args):
    """The command of the dense reference point of a run: the same but for the method."""
    words = ["python", "train.py", "--task", args.task, "--method", "finetune"]
    for name in ("model", "data_dir", "seed", "epochs", "steps", "batch", "length", "device", "dtype"):
        if getattr(args, name) not in (None, 0, getattr(TASKS[args.task], name, None)):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join(words)


def finish(args, learner, model, fingerprint, evaluations, seconds, command):
    """Write what was learnt, check that the frozen weights did not move, write result.json -> (result, path)."""
    folder, density = data.model_folder(args.model), 1 - args.sparsity
    on_target = [e for e in evaluations if e["density"] == evaluations[-1]["density"]]
    parameter = next(model.parameters())
    result = {
        "task": args.task, "model": args.model, "method": args.method, "sparsity": args.sparsity, "seed": args.seed,
        "steps": evaluations[-1]["step"], "batch": args.batch, "length": args.length, "lr": args.lr, "ramp": args.ramp,
        "penalty": args.penalty, "data_dir": args.data_dir, "fingerprint": fingerprint,
        "device": parameter.device.type, "dtype": dtype_name(parameter.dtype),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "command": command,
        "final": evaluations[-1]["dev"],
        "best": max(on_target, key=lambda e: e["dev"][TASKS[args.task].metrics[0]]),
        "seconds": round(seconds, 1), "density": 1.0,
    }  # fmt: skip
    if isinstance(learner, Masks):
        masks, path = learner.exact(density), args.out / "mask.safetensors"
        kept, prunable = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        result |= {"density": kept / prunable, "kept": kept, "prunable": prunable}
        data.write_whole(path, pack_masks(masks, result))
        if not frozen_unchanged(model, learner, folder):
            raise ValueError(f"the frozen weights no longer equal those of {folder}; the run counts as unfinished")
    else:
        path = args.out / "model.safetensors"
        data.write_whole(path, save({name: weight.detach().cpu() for name, weight in learner.weights.items()}))
        for name in ("config.json", "tokenizer.json"):
            data.write_whole(args.out / name, (folder / name).read_bytes())
    data.write_whole(args.out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result, path


def main(argv=None):
    args, started = parse_args(argv), time.time()
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    torch.manual_seed(args.seed)
    with one_line_errors(ValueError, OSError):
        check_run_folder(args.out)
        device, dtype, why = choose_device(args.device, args.dtype)
        model, train, dev = prepare(args)
        args.out.mkdir(parents=True, exist_ok=True)
    fingerprint = model.fingerprint()
    if args.method == "finetune":
        learner = Dense(model.to(device), dtype)
        model.to(dtype)
    else:
        learner = Masks(model.to(device, dtype).requires_grad_(False).prunable(), args.method, 1 - args.sparsity)
        model.load_state_dict(learner.by_name(learner.weights), strict=False, assign=True)  # views: held once
    total = args.steps or math.ceil(args.epochs * math.ceil(len(train) / args.batch))
    sizes = " + ".join(str(len(examples)) for examples in dev.values())
    print(f"{args.task}: {len(train)} train and {sizes} dev examples; {total} steps of {args.batch}")
    print(f"{args.model}, {args.method}, sparsity {args.sparsity:g} (density {1 - args.sparsity:g}) -> {args.out}")
    print(f"on {device} in {dtype_name(dtype)}: {why}")

    with one_line_errors(OSError, FloatingPointError), open(args.out / "log.jsonl", "w") as file:
        log = lambda **line: print(json.dumps(line), file=file, flush=True)  # noqa: E731
        evaluations = loop(args, model, learner, train, dev, device, total, log)
    with one_line_errors(ValueError, OSError):
        result, path = finish(args, learner, model, fingerprint, evaluations, time.time() - started, command)
    summarize(args, result, path)


if __name__ == "__main__":
    main()
