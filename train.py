"""Learn a task by switching off weights of a frozen BERT, or fine-tune it as the dense reference.

    python train.py                               # MiniLM on movie reviews: nothing to prepare, minutes on a laptop
    python train.py --task rte --sparsity 0.5     # the paper's setting: bert-base-uncased on GLUE

The method itself is mask.py. The recipe is that of Jiang et al., ACL 2023 (arXiv 2210.06210), and of its authors' code.
"""

import math
import shlex
import sys
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip (it tells the threads of torch, before they start, how to wait)
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import data
import extras  # noqa: F401 (its methods and tasks; without the folder, delete this line)
from data import TASKS
from eval import densities, evaluate, load_backbone, load_run, read_result
from mask import METHODS, density_at, penalty_at
from model import PER_LAYER
from plumbing import cli, fetch, parallel
from plumbing.adam import make_optimizer, set_rates
from plumbing.checkpoints import pack_weights, tokenizer_bytes, tokenizer_config
from plumbing.files import json_bytes, pack_masks, read_json, sha256
from plumbing.graphs import Recorded, compile_step
from plumbing.progress import progress
from plumbing.run import Run, identity, interrupted_run
from plumbing.summary import evaluation, expected, opening, summary

LOG_EVERY = 10  # steps between log lines; only there, and to evaluate, does the host wait for the device

# --- flags ---------------------------------------------------------------------------------------------------


def make_parser():
    parser = cli.Parser(usage="python train.py [flags]", description=cli.WHAT, epilog=cli.EXAMPLES)
    what = parser.add_argument_group("what", "Where no default is named, it is the task's or the method's.")
    what.add_argument("--task", choices=TASKS, default="movies", metavar="TASK", help=f"{', '.join(TASKS)} (movies)")
    methods = f"{', '.join(METHODS)} (smp-s)"
    what.add_argument("--method", choices=METHODS, default="smp-s", metavar="METHOD", help=methods)
    cli.add_files(what)
    heads = ("words", "classifier")
    what.add_argument("--head", choices=heads, default="words", help="label words (default) or a fresh linear layer")
    what.add_argument("--teacher", metavar="RUN_DIR", help="a finished --method finetune to learn from")
    what.add_argument("--warmup", type=cli.share_below_one, default=0.0, help="share of steps in which rates rise (0)")
    some = parser.add_argument_group("method", "Flags that only some methods use.")
    some.add_argument("--sparsity", type=cli.share_below_one, help="share of weights, or of computation, removed (0.5)")
    some.add_argument("--lr", type=cli.positive, help="peak learning rate of the scores (smp-...: 2e-2)")
    some.add_argument("--weight-lr", type=cli.positive, help="that of weights (movies 1e-4, GLUE 3e-5, smp-bias 1e-3)")
    some.add_argument("--hold", type=cli.share, help="share of steps before pruning starts (0)")
    some.add_argument("--ramp", type=cli.share, help="share of steps after which the target is reached (movies: 0.9)")
    some.add_argument("--schedule", choices=("cubic", "linear"), help="of the density (BERT: cubic, else linear)")
    some.add_argument("--penalty", type=cli.not_negative, help="lambda of the regularizer (SMP: 400; on movies 800)")
    some.add_argument("--temperature", type=cli.positive, help="p of SMP-S (4 on movies, or where 70 %% stay; else 1)")
    for name, text in {name: text for method in METHODS.values() for name, text in method.help.items()}.items():
        some.add_argument(cli.flag(name), type=cli.positive, help=text)
    cli.add_training(parser)
    return parser


def parse_args(argv):
    """Flags with all defaults filled in, read-only from here on. Exits with one line when they make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume:
        if len(argv) > 1 + (argv[0] == "--resume"):
            parser.error("--resume takes the settings of its run, and no other flags")
        return args

    used = ({"weight_lr": None} if args.head == "classifier" else {}) | METHODS[args.method].flags
    some_use = {name for method in METHODS.values() for name in method.flags}
    for name in sorted(some_use - used.keys()):
        if getattr(args, name) is not None:
            known = ", ".join(cli.flag(other) for other in used)
            parser.error(f"{cli.flag(name)}: {args.method} does not use it; the method flags it takes are {known}")

    of_task = ["model", "batch", "length", "dropout"]
    of_task += [name for name in ("ramp", "weight_lr", "penalty", "temperature") if name in used]
    cli.fill(args, used)  # and where the method leaves it open, None, the task decides
    cli.fill(args, {name: getattr(TASKS[args.task], name) for name in of_task})
    cli.fill(args, {"sparsity": 0.0, "hold": 0.0, "ramp": 0.0, "penalty": 0.0})  # where the method does not use them
    if args.hold > args.ramp:
        parser.error(f"--hold must be at most --ramp, {args.ramp}; got {args.hold}")
    if args.accumulate * parallel.processes() > args.batch:
        parser.error(f"--batch must be at least {args.accumulate * parallel.processes()}: --accumulate times processes")

    name = f"{args.task}-{Path(args.model).name}-{args.method.replace(':', 'of')}-{args.sparsity:g}"
    name += "-classifier" if args.head == "classifier" else ""
    name += "-taught" if args.teacher else ""
    name += f"-{args.steps}steps" if args.steps else ""
    cli.fill(args, {"out": Path("runs") / f"{name}-seed{args.seed}"})
    return args


# --- what is learnt ------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """What a run learns of a frozen float32 model: masks, or None, and other weights. The rest is rounded to dtype.

    method: a row of METHODS. Other weights: a fresh classifier; vectors or all weights, where the method trains them.
    """

    def __init__(self, model, method, density, dtype, temperature=None):
        super().__init__()
        self.dtype = dtype
        groups = model.prunable() if method.masking else {}
        self.masks = method.module(groups, method, density, dtype, temperature) if groups else None
        masked = {name for weights in groups.values() for name in weights}
        trained = {}
        for name, weight in model.named_parameters():
            learns = method.trains_weights or method.vectors and weight.ndim == 1 or name.startswith("classifier.")
            if learns and name not in masked:
                trained[name] = weight.detach().float().clone()
        self.names = list(trained)  # a ParameterDict takes no names with dots
        self.weights = nn.ParameterList(trained.values())
        model.to(dtype)  # in place, and after the copies were taken
        if self.masks and not method.trains_weights:  # the stacked weights are held once
            model.load_state_dict(self.masks.by_name(self.masks.weights), strict=False, assign=True)

    @property
    def trained(self):
        """{name: parameter} of the other weights."""
        return dict(zip(self.names, self.weights, strict=True))

    def forward(self, density):
        """-> the weights of one step {name: tensor in dtype}, and the regularizer."""
        weights = {name: weight.to(self.dtype) for name, weight in self.trained.items()}
        if self.masks is None:  # dense fine-tuning: nothing is masked, nothing regularized
            return weights, torch.zeros((), device=density.device)
        masked, regularizer = self.masks(density)
        return masked | weights, regularizer

    def baked(self, density):
        """-> the weights for evaluation, under exact masks."""
        weights = self.masks.baked(density) if self.masks else {}
        return weights | {name: weight.detach().to(self.dtype) for name, weight in self.trained.items()}

    def optimizer(self, score_lr, weight_lr, decay=0.01):
        return make_optimizer(self.named_parameters(), "masks.scores.", score_lr, weight_lr, decay)


# --- one step ------------------------------------------------------------------------------------------------


def task_loss(logits, labels, taught=None, temperature=2.0):
    """Cross-entropy of logits [..., C] with classes [...], or mean squared error of the one logit with scores [B].

    With a teacher's logits, half of that and half tau^2 KL(teacher || student) at tau (regression: squared error).
    """
    if labels.is_floating_point():
        loss = F.mse_loss(logits[:, 0], labels)
        return loss if taught is None else 0.5 * loss + 0.5 * F.mse_loss(logits, taught)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())  # in one row: [..., C] -> [B, C]
    if taught is None:
        return loss
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(taught / temperature, dim=-1)
    kl = F.kl_div(student, teacher, reduction="sum", log_target=True) / labels.numel()  # KL(teacher || student)
    return 0.5 * loss + 0.5 * temperature**2 * kl  # tau^2 keeps the size of the gradients


def make_forward_backward(model, learner, teacher=None):
    """The method, as one function of tensors. teacher: a frozen model in evaluation mode, or None."""

    def forward_backward(inputs, labels, share, density, penalty):
        """Add the gradients of a data.Part -> [2]: loss on the task, regularizer. density, penalty: 0-dim tensors."""
        weights, regularizer = learner(density)  # W' = W * M(S)
        # tie_weights: no weight has two names here, and torch would look for such in every step.
        logits = functional_call(model, weights, tuple(inputs), tie_weights=False).float()  # [..., C]
        with torch.no_grad():
            taught = teacher(*inputs).float() if teacher else None
        loss = task_loss(logits, labels, taught)
        (share * (loss + penalty * regularizer)).backward()  # dL/dS = dL/dW' * W
        return torch.stack([loss, regularizer]).detach()

    return forward_backward


def train_step(forward_backward, optimizer, parts, density, penalty):
    """One step on the parts of a batch, see data.training_batches -> [2]: loss on the task and regularizer."""
    losses = 0.0
    for part in parts:  # gradients add up
        losses = losses + part.share * forward_backward(part.inputs, part.labels, part.share, density, penalty)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.all_reduce_gradients(parameters)  # over the processes: each has its part of the batch
    nn.utils.clip_grad_norm_(parameters, 1.0)  # of all together (reference code)
    optimizer.step()
    optimizer.zero_grad()
    return losses


# --- the run -------------------------------------------------------------------------------------------------


def load_everything(args):
    """-> (model in float32, folder of the model, teacher or None, train set, {name: dev set})."""
    task = TASKS[args.task]
    for split in ("train", *task.dev):  # before anything large is downloaded
        data.split_path(args.task, split, args.data_dir)
    folder = fetch.model_folder(args.model)
    model, tokenizer = load_backbone(folder, task, args.length, args.head)
    if METHODS[args.method].masking and len(set(model.config.layers)) > 1:
        raise ValueError(f"--method {args.method} needs layers of one size, which {args.model} lacks; try finetune")
    teacher = load_teacher(Path(args.teacher), args, tokenizer) if args.teacher else None
    train = data.load_split(args.task, "train", args.data_dir, tokenizer)
    dev = {split: data.load_split(args.task, split, args.data_dir, tokenizer) for split in task.dev}
    return model, folder, teacher, train, dev


def load_teacher(run, args, tokenizer):
    """The fine-tuned model of a run, frozen. Raises ValueError if it cannot teach this task to this model."""
    result = read_result(run)
    if METHODS[result["method"]].masking or "pruned_with" in result:
        raise ValueError(f"--teacher: {run} is a pruned model; a teacher must be fine-tuned")
    if result["task"] != args.task:
        raise ValueError(f"--teacher: {run} was trained on {result['task']}, not on {args.task}")
    _, _, teacher, its_tokenizer, _ = load_run(run)
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher: {run} has another vocabulary than {args.model}")
    if args.length > teacher.config.longest_input:
        raise ValueError(f"--teacher: {run} takes {teacher.config.longest_input} tokens; lower --length")
    return teacher.eval().requires_grad_(False)


def least_steps(sparsity):
    """With fewer, scores that start equal hardly differ, and the model guesses (measured with batches of 32)."""
    return 300 if sparsity <= 0.5 else 1200


def count_steps(args, examples):
    """--steps, or what --epochs come to; by default the task's epochs, but where data are few least_steps()."""
    epochs = args.epochs or TASKS[args.task].epochs
    steps = math.ceil(min(epochs * math.ceil(examples / args.batch), cli.MOST))
    return args.steps or (steps if args.epochs else max(steps, least_steps(args.sparsity)))


def make_schedule(args, kind, total, final):
    """[(density, penalty)] before each of the steps, and after the last."""
    hold = round(args.hold * total)  # in steps
    ramp = round(args.ramp * total)
    power = {"cubic": 3, "linear": 1}[kind]
    densities = [density_at(t, ramp, final, power, hold) for t in range(total + 1)]
    return [(density, penalty_at(t, total, args.penalty)) for t, density in enumerate(densities)]


def learn(args, run, model, learner, teacher, train, dev, schedule):
    """Train and evaluate; the last of run.evaluations is the final one.

    Raises FloatingPointError when the loss, or at an evaluation a score or weight, is not finite.
    """
    device = next(model.parameters()).device
    total = len(schedule) - 1
    # [total + 1] each: no step waits for the host. Densities in float64, as counts follow from them.
    densities_there, penalties_there = torch.tensor(schedule, dtype=torch.float64, device=device).T
    penalties_there = penalties_there.float()
    evals = min(args.evals or min(TASKS[args.task].evals, math.ceil(total / 10)), total)
    eval_steps = {math.ceil(total * i / evals) for i in range(1, evals + 1)}
    optimizer = learner.optimizer(args.lr, args.weight_lr, TASKS[args.task].decay)
    run.restore(learner, optimizer, total, TASKS[args.task].metrics)  # does nothing for a new run

    forward_backward = make_forward_backward(model, learner, teacher)
    if device.type == "cuda" and not args.eager:  # wrapped from outside, as torch.compile wraps a model
        forward_backward = Recorded(forward_backward, learner.parameters())
    if device.type == "cpu" and total - run.step > LOG_EVERY:
        some = data.training_batches(train, args.batch, 9, args.seed, parts=args.accumulate)
        evaluated = sum(step > run.step for step in eval_steps) * sum(map(len, dev.values())) / 3  # forward alone
        print(expected(forward_backward, optimizer, some, total - run.step + evaluated / args.batch))
    batches = data.training_batches(train, args.batch, total, args.seed, device, args.accumulate, first=run.step)
    bar = progress(batches, f"{args.task} {args.method}", total=total, initial=run.step, leave=True)
    recent = []  # losses since the last log line, on the device
    for step, parts in enumerate(bar, run.step):
        set_rates(optimizer, step, total, round(args.warmup * total))
        density, penalty = densities_there[step], penalties_there[step]
        recent.append(train_step(forward_backward, optimizer, parts, density, penalty))  # mask, learn, clip, Adam

        # once in a while: log, evaluate under the exact masks, save
        done = step + 1
        if done % LOG_EVERY == 0 or done in eval_steps:
            bar.set_postfix(run.report(done, recent, *schedule[step]), refresh=False)
            recent.clear()
        if done in eval_steps:
            if not all(p.isfinite().all() for p in learner.parameters()):
                raise FloatingPointError(f"scores or weights are not finite at step {done}: try a smaller --lr")
            parallel.check_equal(dict(learner.named_parameters()))
            density, _ = schedule[done]  # of the next step, so that the last is the target
            with torch.compiler.set_stance("force_eager"):  # as eval.py will compute it
                scores = evaluate(model, learner.baked(density), dev, TASKS[args.task].metrics, device)
            run.evaluated(step=done, density=density, dev=scores)
            bar.write(evaluation(**run.evaluations[-1]))
        if (done in eval_steps or run.stopped) and done < total:
            run.save(done, learner, optimizer)  # raises KeyboardInterrupt if it was asked to stop


def finish(args, run, model, learner, folder, description):
    """Write what was learnt, check that the frozen weights did not move, write result.json -> what it holds.

    description: what it also holds. Raises ValueError when a frozen weight moved.
    """
    density = 1 - args.sparsity  # of all prunable weights
    final = run.evaluations[-1]
    # Best on dev counts from when the target density is reached; a denser model would have an easier task.
    on_target = [line for line in run.evaluations if line["density"] == final["density"]]
    best = TASKS[args.task].best(on_target, key=lambda line: line["dev"][TASKS[args.task].metrics[0]])
    result = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    result |= {"words": TASKS[args.task].words, "steps": final["step"], "final": final["dev"], "best": best}
    result |= {"density": 1.0, "stored_numbers": sum(p.numel() for p in learner.weights), "stored_bits": 0}
    result |= {"sha256": {}, "seconds": round(run.seconds, 1), "command": shlex.join(["python", "train.py", *run.argv])}
    result |= cli.code_version() | description

    masks, others, trained = {}, {}, dict(learner.trained)
    if learner.masks:
        masks = learner.masks.choose(density)
        by_itself = learner.masks.choose(density, exact=False)
        kept, reached = (sum(mask.sum().item() for mask in found.values()) for found in (masks, by_itself))
        prunable = sum(mask.numel() for mask in masks.values())
        result |= {"kept": kept, "prunable": prunable, "density": kept / prunable, "reached": reached / prunable}
        result |= {"stored_bits": prunable, "densities": densities(learner.masks.names, masks)}

    files = {}
    if METHODS[args.method].trains_weights:
        if masks:
            trained |= learner.masks.baked(density, torch.float32)
            result["stored_numbers"] += kept
        content = pack_weights(model.published(trained))
        result["sha256"]["model.safetensors"] = sha256(content)
        config = read_json(folder / "config.json") | {name: getattr(model.config, name) for name in PER_LAYER}
        files = {"model.safetensors": content, "config.json": json_bytes(config)}
        files["tokenizer.json"] = tokenizer_bytes(folder)
        files["tokenizer_config.json"] = tokenizer_config(folder, model.config.longest_input)
    else:
        check_frozen(args, model, learner, folder)
        others = trained  # a fresh classifier, biases and LayerNorms, or nothing
    if masks:
        files["mask.safetensors"] = pack_masks(masks, result, others)
    run.finish(files, result)
    return result


def check_frozen(args, model, learner, folder):
    """Raise ValueError unless all weights that were not trained still equal the file's (cast to the run's dtype)."""
    now = model.state_dict() | learner.masks.by_name(learner.masks.weights)
    before, _ = load_backbone(folder, TASKS[args.task], args.length, args.head)
    for name, tensor in before.state_dict().items():
        if name not in learner.names and not torch.equal(tensor.to(now[name].dtype), now[name].cpu()):
            raise ValueError(f"{name} no longer equals that of {folder}; the run counts as unfinished")


@cli.one_line_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    run = interrupted_run(args.resume) if args.resume else Run(args.out, argv)
    args = parse_args(run.argv)  # of a resumed run, the flags that it began with
    torch.manual_seed(args.seed)  # of a fresh classifier
    device, dtype, why = cli.choose_device(args.device, args.dtype)
    parallel.start(device)
    with parallel.first_process_first():  # only one downloads
        model, folder, teacher, train, dev = load_everything(args)
    total = count_steps(args, len(train))
    cli.set_up(args.deterministic, 0 if args.eager else total)

    # What the run depends on besides its flags. A resumed run must find all of it unchanged.
    description = identity(folder, model) | {"device": device.type, "dtype": cli.dtype_name(dtype)}
    description["schedule"] = args.schedule or ("cubic" if model.config.model_type == "bert" else "linear")
    description |= {f"{name} digest": examples.digest() for name, examples in {"train": train, **dev}.items()}
    if teacher:
        description["teacher digest"] = identity(Path(args.teacher), teacher)["fingerprint"]
    run.check_identity(vars(args), description)

    method = METHODS[args.method]
    density = 1 - args.sparsity
    if method.before:  # whole heads and neurons may go before training
        model, facts = method.before(model, train, dev, args, device)
        description |= facts | {"config": str(model.config)}
        density = facts["density"]
    model.to(device).requires_grad_(False).train(args.dropout)
    teacher = teacher and teacher.to(device, dtype)
    learner = Learner(model, method, density, dtype, args.temperature)
    if args.compile:
        compile_step(model, learner.masks)

    schedule = make_schedule(args, description["schedule"], total, density)
    needed = least_steps(args.sparsity) if learner.masks and not method.trains_weights else 1
    sizes = len(train), sum(map(len, dev.values()))
    machine = f"{parallel.processes()} x {device} in {description['dtype']}: {why}"
    print("\n".join(opening(args, run, sizes, total, density, machine, needed)))
    torch.manual_seed(args.seed * parallel.processes() + parallel.rank())  # every process has dropout of its own
    with run:
        learn(args, run, model, learner, teacher, train, dev, schedule)
        if parallel.rank() == 0:
            result = finish(args, run, model, learner, folder, description)
            print("\n".join(summary(result, run.folder, dev, texts=len(TASKS[args.task].text))))
    parallel.stop()


if __name__ == "__main__":
    main()
