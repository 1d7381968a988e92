"""Learn a task by switching off weights of a frozen BERT, or fine-tune it as the dense reference.

    python train.py                             # MiniLM on film reviews: minutes on a laptop
    python train.py --task rte --sparsity 0.5   # bert-base-uncased on GLUE

The method itself is mask.py. The recipe is that of Jiang et al., ACL 2023 (arXiv 2210.06210), and
of its authors' code. `main`, at the end, has three acts: prepare, learn, finish.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import plumbing  # noqa: F401  # isort: skip (must come before torch: sets OpenMP's spin time)
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import data
import extras  # noqa: F401 (its methods and tasks; without the folder, delete this line)
from data import TASKS
from eval import densities, evaluate, load_run
from mask import METHODS, SCHEDULES, density_at, penalty_at
from model import load_backbone
from plumbing import cli, fetch, parallel
from plumbing.checkpoints import model_files
from plumbing.cli import count, fraction, fraction_below_one, not_negative, positive
from plumbing.files import digest, pack_masks, sha256
from plumbing.graphs import Recorded, compile_step
from plumbing.progress import Clock, progress
from plumbing.run import Run, identity, interrupted_run, run_folder
from plumbing.summary import evaluation, opening, summary

LOG_EVERY = 10  # steps between log lines; the host waits for the GPU only here and at evaluations

# --- flags ----------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python train.py                               film reviews: minutes on a CPU
  python train.py --sparsity 0.9                a tenth stays; takes more steps
  python train.py --task rte --method finetune  dense BERT, to compare with
"""
if data.tables.flags:  # extras/own.py is there
    EXAMPLES += "  python train.py --train reviews.csv           a table of your own\n"
TEXTS = {
    "usage": "python train.py [flags]",
    "description": "Learn which weights of a frozen BERT, or GPT-2, to keep.",
    "epilog": EXAMPLES,
}

# --help shows these, --help-all all.
SHORT = "task method model sparsity lr epochs steps batch seed out resume device "
SHORT += "train text_column label_column"

# {name: (type or choices, help)}. The defaults are recipe()'s, and --help prints them.
METHOD_FLAGS = {
    "sparsity": (fraction_below_one, "share of weights, or of computation, removed"),
    "lr": (positive, "peak learning rate of the scores"),
    "weight_lr": (positive, "peak learning rate of weights that train"),
    "hold": (fraction, "share of the steps before pruning starts"),
    "ramp": (fraction, "share of the steps after which the sparsity is reached"),
    "schedule": (SCHEDULES, "how the density falls; by default cubic for BERT, else linear"),
    "penalty": (not_negative, "lambda of the regularizer"),
    "temperature": (positive, "p of SMP-S: larger values even the layers out"),
}
# {title of a group in --help: its flags}
FLAGS = {
    "what": {
        "task": (TASKS, "what to learn"),
        "method": (METHODS, "which weights stay, and which train"),
        "model": (str, f"{', '.join(fetch.MODELS)}, a hub id, or a folder"),
        "data_dir": (str, "folder with the tasks' folders, instead of downloads"),
        "head": (("words", "classifier"), "label words, or a fresh linear layer"),
        "teacher": (str, "folder of a finished run of --method finetune, to learn from"),
    },
    "method (not every method takes all of these)": METHOD_FLAGS,
    "length": {
        "epochs": (positive, "passes over the training set; at least 300 or 1200 steps by default"),
        "steps": (count, "train for this many steps; overrides --epochs"),
        "batch": (count, "examples per step"),
        "length": (count, "longest input in tokens; longer ones are cut"),
        "warmup": (fraction_below_one, "share of the steps during which the rates rise"),
        "evals": (count, "evaluations per run; fewer if it is short"),
    },
    "run": {
        "seed": (cli.seed, "for batches, dropout and fresh weights"),
        "dropout": (cli.YES_OR_NO, "dropout in training, at the model's own rates"),
        "out": (Path, "folder of the run"),
        "resume": (Path, "continue the interrupted run in this folder"),
    },
    "machine": cli.MACHINE_FLAGS
    | {
        "accumulate": (count, "split each batch into this many parts"),
        "compile": (bool, "let torch.compile fuse the kernels of a step"),
        "eager": (bool, "on CUDA: launch every kernel, record no graphs"),
        "deterministic": (bool, "the same bits every time on a GPU; slower"),
    },
}


def flag_groups():
    """FLAGS, and those of extras/."""
    others = {}
    for name in sorted(method_flags() - METHOD_FLAGS.keys()):  # such as ffn_share
        others[name] = (positive, "used by a method in extras/")
    return FLAGS | {"your own table": data.tables.flags, "extras": others}


def method_flags():
    """Every flag that some method takes and others may not.

    A recipe may also have a default for a flag of all runs, such as epochs.
    """
    taken = {name for method in METHODS.values() for name in method.recipe}
    everywhere = set().union(*FLAGS.values()) - METHOD_FLAGS.keys()
    return taken - everywhere


# --- the recipe -----------------------------------------------------------------------------------

# Every run has these, whatever its task and method.
DEFAULTS = {
    "task": "movies",
    "method": "smp-s",
    "head": "words",
    "seed": 0,
    "warmup": 0.0,
    "accumulate": 1,
}
# A flag that the method does not take has one of these values, or None.
OFF = {"sparsity": 0.0, "hold": 0.0, "ramp": 0.0, "penalty": 0.0}


def recipe(given):
    """All settings of a run: {flag: value} as given, and the defaults of all other flags.

    A method's defaults override those of the task. The rest follow from the sparsity, and the
    schedule from the model, see prepare().
    """
    usual = DEFAULTS | data.tables.settings(given)
    chosen = usual | given
    method = METHODS[chosen["method"]]
    # Each line overrides those before it.
    usual |= data.RECIPE | data.task_of(chosen).recipe
    usual |= {name: value for name, value in method.recipe.items() if value is not None}
    values = usual | given
    # What this method does not use is off, whatever the task says.
    for name in method_flags() - used_flags(values):
        values[name] = OFF.get(name)

    # Even the layers out while most weights stay (reference code; not in the paper). A method
    # without a temperature has None here already.
    values.setdefault("temperature", 4.0 if 1 - values["sparsity"] >= 0.7 else 1.0)
    # By default, small datasets train for least_steps, with at most one evaluation per 10 steps
    # begun.
    values["least_steps"] = 0 if "epochs" in given else least_steps(values["sparsity"])
    values["least_steps_per_eval"] = 1 if "evals" in given else 10
    changed = {name: value for name, value in given.items() if value != usual.get(name)}
    values.setdefault("out", run_folder(values, changed))
    return values


def used_flags(settings):
    """The method flags that have an effect with these settings."""
    names = set(METHODS[settings["method"]].recipe)
    if settings["head"] == "classifier":  # it is a weight that trains
        names.add("weight_lr")
    return names


def least_steps(sparsity):
    """The fewest steps by default. With fewer, scores that start equal hardly differ."""
    return 300 if sparsity <= 0.5 else 1200


def parse_args(argv):
    """All settings, which nobody changes later. Exits with one line when they make no sense."""
    # No flag has a default in the parser, so what is not None was given.
    groups = flag_groups()
    parser = cli.grouped_parser(groups)
    parsed = vars(parser.parse_args(argv))
    wants_help = parsed.pop("help")
    given = {name: value for name, value in parsed.items() if value is not None}
    if wants_help:
        shown = SHORT if wants_help == "short" else None
        cli.grouped_parser(groups, recipe(given), shown, **TEXTS).print_help()
        parser.exit()
    # A resumed run reads its flags from its checkpoint, see main().
    if "resume" in given:
        if len(given) > 1:
            parser.error("--resume takes the settings of its run, and no other flags")
        return Namespace(**parsed)

    args = Namespace(**parsed | recipe(given))
    # A flag without effect would only mislead.
    allowed = used_flags(vars(args))
    for name in sorted(method_flags() & given.keys() - allowed):
        known = ", ".join(map(cli.flag, sorted(allowed)))
        parser.error(f"{cli.flag(name)}: {args.method} does not use it; its own flags are {known}")
    if Path(given.get("data_dir", "")).is_file():
        parser.error("--data-dir: name the folder that holds the tasks' folders, not a file")
    if args.hold > args.ramp:
        parser.error(f"--hold must be at most --ramp, {args.ramp}; got {args.hold}")
    return args


# --- what trains ----------------------------------------------------------------------------------


class Learner(nn.Module):
    """Everything that trains: masks (if any) and ordinary weights. The rest of the model is frozen.

    model: in float32; what is frozen is rounded to dtype, in place. method: a row of METHODS.
    """

    def __init__(self, model, method, dtype, temperature=None):
        super().__init__()
        self.dtype = dtype
        # First what is masked: six groups of stacked matrices, and their scores.
        self.masks = None
        if method.how_many:
            self.masks = method.masks(model.prunable(), method, dtype, temperature or 1.0)

        # Then ordinary weights that train: those that the method names.
        trained = method.trained(model)
        self.names = list(trained)  # a ParameterDict takes no names with dots
        assert self.masks or trained, f"nothing trains: no weight is named {method.trains}"
        self.weights = nn.ParameterList(w.detach().float().clone() for w in trained.values())

        # All the rest is frozen. The float32 copies are taken, so it may be rounded now.
        model.to(dtype)
        # The model's matrices become views of the stacks, so that memory holds them only once.
        if self.masks and "weights" not in method.trains:
            model.load_state_dict(self.masks.by_name(self.masks.weights), strict=False, assign=True)

    @property
    def trained(self):
        """{name: parameter} of the ordinary weights that train."""
        return dict(zip(self.names, self.weights, strict=True))

    def forward(self, density):
        """-> the weights of one step {name: tensor in dtype}, and the regularizer."""
        # Trained in float32, used in dtype. The cast is differentiable.
        weights = {name: weight.to(self.dtype) for name, weight in self.trained.items()}
        if self.masks is None:  # dense fine-tuning
            return weights, self.weights[0].new_zeros(())
        masked, regularizer = self.masks(density)
        return masked | weights, regularizer

    def final_weights(self, density):
        """-> the weights for evaluation {name: tensor in dtype}, under exact masks."""
        weights = self.masks.final_weights(density) if self.masks else {}
        for name, weight in self.trained.items():
            weights[name] = weight.detach().to(self.dtype)
        return weights


# --- the optimizer --------------------------------------------------------------------------------


def make_optimizer(learner, lr, weight_lr, decay=0.01):
    """Adam with peak rate lr for scores, AdamW with peak rate weight_lr for weights."""
    # Vectors are biases and LayerNorms. As BERT's authors do, only matrices decay.
    scores, matrices, vectors = [], [], []
    for name, parameter in learner.named_parameters():
        if name.startswith("masks.scores."):
            scores.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)

    groups = [
        {"params": scores, "lr": lr, "weight_decay": 0.0},
        {"params": matrices, "lr": weight_lr, "weight_decay": decay},
        {"params": vectors, "lr": weight_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def rate_at(step, total, warmup=0):
    """Share of the peak rate at a step: linearly up for `warmup` steps, then down to 0 at total."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (total - step) / (total - warmup)


def set_rates(optimizer, step, total, warmup=0):
    # A group is made with its peak rate. The first step stores it as "peak".
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("peak", group["lr"]) * rate_at(step, total, warmup)
        # The reference code adds eps before it corrects the bias of the moments, torch after it.
        group["eps"] = 1e-8 / math.sqrt(1 - group["betas"][1] ** (step + 1))


# --- one step -------------------------------------------------------------------------------------


def task_loss(logits, labels, teacher_logits=None, temperature=2.0):
    """Cross-entropy of logits [..., C] with classes [...]; regression: squared error of [B, 1].

    With a teacher's logits: half of that, and half of tau^2 KL(teacher || student) at temperature
    tau, or the squared error to the teacher.
    """
    if labels.is_floating_point():  # scores, as in STS-B
        loss = F.mse_loss(logits[:, 0], labels)
        if teacher_logits is None:
            return loss
        return 0.5 * loss + 0.5 * F.mse_loss(logits, teacher_logits)

    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())  # [..., C] -> [N, C]
    if teacher_logits is None:
        return loss
    # Soft targets: how likely the teacher finds each class, not only which is right.
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    kl = F.kl_div(student, teacher, reduction="sum", log_target=True) / labels.numel()
    return 0.5 * loss + 0.5 * temperature**2 * kl  # tau^2 keeps the size of the gradients


def make_forward_backward(model, learner, teacher=None):
    """The method as one function of tensors. teacher: a frozen model, or None."""

    def forward_backward(inputs, labels, share, density, penalty):
        """Backpropagate one data.Part: inputs [3, B, S], labels [B], share of the batch.

        -> [2]: task loss, regularizer. density and penalty are 0-dim tensors, so that a recorded
        graph can be given new values.
        """
        weights, regularizer = learner(density)  # W' = W * M(S), {name: [out, in]}

        # The forward pass with these weights in place of the model's own -> [B, C].
        # tie_weights=False: no weights are tied here, and looking for some costs time.
        logits = functional_call(model, weights, tuple(inputs), tie_weights=False).float()
        with torch.no_grad():
            teacher_logits = teacher(*inputs).float() if teacher else None

        # A part adds its share of the gradient of the whole batch.
        loss = task_loss(logits, labels, teacher_logits)
        (share * (loss + penalty * regularizer)).backward()  # dL/dS = dL/dW' * W
        return torch.stack([loss, regularizer]).detach()

    return forward_backward


def train_step(forward_backward, optimizer, parts, density, penalty):
    """One step on a batch, a list of data.Parts -> [2]: task loss and regularizer."""
    losses = 0.0
    for inputs, labels, share in parts:  # their gradients add up
        losses = losses + share * forward_backward(inputs, labels, share, density, penalty)

    # Gradients add up over processes, too. Each has computed its part of the batch.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parallel.all_reduce([p.grad for p in parameters])
    nn.utils.clip_grad_norm_(parameters, 1.0)  # one norm for all of them (reference code)
    optimizer.step()
    optimizer.zero_grad()
    return losses


# --- act one: prepare -----------------------------------------------------------------------------


class Job(NamedTuple):
    """What prepare() gets ready."""

    task: data.Task
    model: nn.Module  # frozen, on its device
    learner: Learner
    teacher: nn.Module | None
    train: data.Examples
    dev: dict  # {split: data.Examples}
    device: torch.device
    total: int  # steps
    density: float  # share of weights that stay in the end
    folder: Path  # where the model is
    frozen_sha256: str  # the digest of what must not move
    facts: dict  # what the run depends on besides its settings


def prepare(args, run):
    """Load model and data, and set up what trains -> Job."""
    method = METHODS[args.method]
    torch.manual_seed(args.seed)  # for a fresh classifier
    device, dtype, why = cli.choose_device(args.device, args.dtype)
    parallel.start(device)
    model, folder, teacher, sets = load_inputs(args)
    total = count_steps(args, len(sets["train"]))
    cli.set_up(args.deterministic, 0 if args.eager else total)

    # What the run depends on. A resumed run must find all of it unchanged.
    facts = identity(folder, model) | {"device": device.type, "dtype": cli.dtype_name(dtype)}
    facts |= {f"{split} digest": examples.digest() for split, examples in sets.items()}
    if teacher:
        facts["teacher digest"] = identity(Path(args.teacher), teacher)["fingerprint"]
        teacher.to(device, dtype)
    run.check_identity(vars(args), facts)
    if "schedule" in method.recipe:  # reference code: cubic for BERT, linear for RoBERTa
        usual = "cubic" if model.config.model_type == "bert" else "linear"
        facts["schedule"] = args.schedule or usual

    train = sets.pop("train")  # the others are dev sets
    facts["density"] = 1 - args.sparsity
    if method.before:  # whole heads and neurons may go, or layers change, before training
        model, more = method.before(model, train, sets, args, device)
        facts |= more | {"config": str(model.config)}
    # Freeze the model, and put beside it what trains. Its train mode only turns dropout on.
    model.to(device).requires_grad_(False).train(args.dropout)
    learner = Learner(model, method, dtype, args.temperature)
    if args.compile:
        compile_step(model, learner.masks)

    prefix = f"{parallel.processes()} x " if parallel.processes() > 1 else ""
    machine = f"{prefix}{device} in {facts['dtype']} ({why})"
    print(*opening(args, train, sets, total, facts["density"], machine), sep="\n")
    return Job(
        task=data.task_of(vars(args)), model=model, learner=learner, teacher=teacher,
        train=train, dev=sets, device=device, total=total, density=facts["density"],
        folder=folder, frozen_sha256=frozen_digest(model, learner), facts=facts,
    )  # fmt: skip


def load_inputs(args):
    """-> model in float32, its folder, teacher or None, {split: Examples}."""
    task = data.task_of(vars(args))
    splits = ("train", *task.dev)
    # Report a missing file before anything large is downloaded.
    for split in splits:
        data.split_path(task, split, args.data_dir)
    folder = fetch.model_folder(args.model)
    model, tokenizer = load_backbone(folder, task, args.length, args.head)
    # The matrices of a group are stacked, so all must have one shape.
    if METHODS[args.method].how_many and len(set(model.config.layers)) > 1:
        raise ValueError(
            f"--method {args.method} needs layers of one size, "
            f"which {args.model} lacks; try finetune"
        )
    # With a teacher (distillation), half of the loss is how far the student is from it.
    teacher = load_teacher(args, task, tokenizer) if args.teacher else None
    sets = {split: data.load_split(task, split, args.data_dir, tokenizer) for split in splits}
    return model, folder, teacher, sets


def load_teacher(args, task, tokenizer):
    """The fine-tuned model of a run, frozen. Raises ValueError if it cannot teach this task."""
    run = Path(args.teacher)
    loaded = load_run(run)
    result = loaded.result
    longest = loaded.model.config.longest_input
    if METHODS[result["method"]].how_many:
        raise ValueError(f"--teacher: {run} is a pruned model; a teacher must be fine-tuned")
    known, wanted = [result["task"], *result["words"]], [args.task, *task.words]
    if known != wanted:  # task and classes
        raise ValueError(f"--teacher: {run} was trained on {known}, not on {wanted}")
    # The teacher reads the student's inputs, so both must know the same tokens.
    if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--teacher: {run} has another vocabulary than {args.model}")
    if args.length > longest:
        raise ValueError(f"--teacher: {run} takes {longest} tokens; lower --length")
    return loaded.model.eval().requires_grad_(False)


def count_steps(args, rows):
    """--steps, or what --epochs come to, and by default at least args.least_steps."""
    per_epoch = math.ceil(rows / args.batch)  # one batch of an epoch may be smaller
    steps = math.ceil(min(args.epochs * per_epoch, cli.MOST))
    return args.steps or max(steps, args.least_steps)


def frozen_digest(model, learner):
    """sha256 of all tensors of the model that do not train."""
    tensors = model.state_dict()
    # Masked weights are made from the stacks, so these count, and not the model's own.
    if learner.masks:
        tensors |= learner.masks.by_name(learner.masks.weights)
    return digest({name: tensors[name] for name in tensors.keys() - learner.names})


# --- act two: learn -------------------------------------------------------------------------------


def make_schedule(args, total, final, schedule="cubic"):
    """[(density, penalty)] for steps 0 to total, all in advance. final: the density in the end."""
    # From shares of all steps to steps.
    hold = round(args.hold * total)
    ramp = round(args.ramp * total)
    return [
        (density_at(t, ramp, final, schedule, hold), penalty_at(t, total, args.penalty))
        for t in range(total + 1)
    ]


def evaluation_steps(args, total):
    """The steps after which a run is evaluated, at equal distances. The last one is `total`."""
    evals = min(args.evals, math.ceil(total / args.least_steps_per_eval))
    return {math.ceil(total * i / evals) for i in range(1, evals + 1)}


def schedule_on_device(schedule, device):
    """-> densities in float64 and penalties in float32, so that no step waits for the host."""
    # float64, because counts follow from the densities: float32 puts some off by one.
    densities, penalties = torch.tensor(schedule, dtype=torch.float64).T  # [total + 1] each
    if device.type != "mps":  # Apple's GPUs have no float64; there Masks counts on the host
        densities = densities.to(device)
    return densities, penalties.float().to(device)


def learn(args, run, job):
    """Train and evaluate. Raises FloatingPointError if a loss, score or weight is not finite."""
    learner, total = job.learner, job.total
    schedule = make_schedule(args, total, job.density, job.facts.get("schedule", "cubic"))
    densities, penalties = schedule_on_device(schedule, job.device)
    eval_steps = evaluation_steps(args, total)
    optimizer = make_optimizer(learner, args.lr, args.weight_lr, args.decay)
    run.restore(learner, optimizer)  # does nothing in a new run

    forward_backward = choose_step(job)
    if job.device.type == "cuda" and not args.eager:  # replayed as a CUDA graph
        forward_backward = Recorded(forward_backward, learner.parameters())

    batches = data.training_batches(
        job.train, args.batch, total, args.seed, job.device, args.accumulate, first=run.step
    )
    # How many steps an evaluation lasts. Without a backward pass, a row takes a third of the time.
    pause = sum(map(len, job.dev.values())) / args.batch / 3
    bar = progress(batches, args.method, Clock(total, run.step, eval_steps, pause), leave=True)
    recent = []  # losses since the last log line, on the device
    for step, parts in enumerate(bar, run.step):
        # One step: mask, learn, clip, Adam.
        set_rates(optimizer, step, total, round(args.warmup * total))
        losses = train_step(forward_backward, optimizer, parts, densities[step], penalties[step])
        recent.append(losses)

        # Once in a while: log, evaluate under the exact masks, save.
        done = step + 1
        log_now = done % LOG_EVERY == 0 or done in eval_steps
        if log_now:
            shown = run.report(done, recent, *schedule[step])  # raises if a loss is not finite
            bar.set_postfix(shown, refresh=False)
            recent.clear()
        if done in eval_steps:
            density, _ = schedule[done]  # schedule[total] is the target
            scores = evaluate_learner(job, done, density)
            run.evaluated(step=done, density=density, dev=scores)
            bar.write(evaluation(**run.evaluations[-1]))
        if log_now and done < total:
            run.save(done, learner, optimizer)  # at most once a minute


def choose_step(job):
    """-> forward_backward: the task's own, or the usual one."""
    task = job.task
    if task.step and not job.teacher:  # a language model's loss is inside; a teacher needs logits
        return task.step(job.model, job.learner)
    return make_forward_backward(job.model, job.learner, job.teacher)


def evaluate_learner(job, step, density):
    """{metric: value} on the dev sets, under exact masks of this density."""
    for parameter in job.learner.parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"scores or weights are not finite at step {step}: try a smaller --lr"
            )
    weights = job.learner.final_weights(density)
    with torch.compiler.set_stance("force_eager"):  # so that eval.py finds the same numbers
        return evaluate(job.model, weights, job.dev, job.task.metrics, job.device)


# --- act three: finish ----------------------------------------------------------------------------


def finish(args, run, job):
    """Write what was learned, then result.json, and say what came of it."""
    result = describe(args, run, job)
    trained = job.learner.trained
    files, masks = {}, {}
    # The mask of exactly the density that was asked for, and what it keeps of each matrix.
    if job.learner.masks:
        masks = job.learner.masks.choose(job.density)
        result |= mask_facts(job.learner.masks, masks, job.density)

    if "weights" in METHODS[args.method].trains:  # a whole model
        # Frozen weights are stored as they were used: after a bfloat16 run they are rounded.
        whole = job.model.state_dict() | trained
        if masks:
            whole |= job.learner.masks.final_weights(job.density, torch.float32)
            result["stored_numbers"] += result["kept"]
        files = model_files(job.folder, job.model.published(whole), job.model.config)
        result["sha256"] = {"model.safetensors": sha256(files["model.safetensors"])}
        trained = {}  # all of it is in that model
    elif frozen_digest(job.model, job.learner) != job.frozen_sha256:
        raise ValueError("a frozen weight has moved, so the run counts as unfinished")
    if masks or trained:  # one bit per weight, and what trained beside it
        files["mask.safetensors"] = pack_masks(masks, result, trained)
    run.finish(files, result)
    for line in summary(result, run.folder, files, job.dev):
        print(line)


def describe(args, run, job):
    """What result.json says about any run."""
    task = job.task
    # Only evaluations at the target density can be the best: a denser model has it easier.
    target = run.evaluations[-1]["density"]
    on_target = [line for line in run.evaluations if line["density"] == target]
    # All settings, what came of them, and what they depended on.
    result = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    result |= {
        "words": task.words,
        "best": task.best(on_target, key=lambda line: line["dev"][task.metrics[0]]),
        # Ordinary weights that trained. mask_facts() and a method's facts may replace these.
        "stored_numbers": sum(p.numel() for p in job.learner.weights),
        "stored_bits": 0,
        "sha256": {},
    }
    return result | run.facts() | job.facts


def mask_facts(learned, masks, density):
    """What result.json says about masks {name: bool [out, in]}, which are from `learned`."""
    # Counted, not computed: these are the numbers that the file really holds.
    kept = sum(int(mask.sum()) for mask in masks.values())
    untrimmed = sum(int(mask.sum()) for mask in learned.choose(density, exact=False).values())
    prunable = sum(mask.numel() for mask in masks.values())
    return {
        "kept": kept,
        "prunable": prunable,
        "density": kept / prunable,
        "reached": untrimmed / prunable,  # what training keeps
        "stored_bits": prunable,
        "densities": densities(learned.names, masks),
    }


# --- all three ------------------------------------------------------------------------------------


@cli.one_line_errors()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.resume:  # a resumed run continues with the flags that it began with
        run = interrupted_run(args.resume)
        print(f"{args.resume} continues after step {run.step}")
        args = parse_args(run.argv)
    else:
        run = Run(args.out, argv)
    job = prepare(args, run)
    torch.manual_seed(args.seed * parallel.processes() + parallel.rank())  # each its own dropout
    with run:
        learn(args, run, job)
        if parallel.rank() == 0:
            finish(args, run, job)
    parallel.stop()


if __name__ == "__main__":
    main()
