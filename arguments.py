"""The arguments of train.py: flags, defaults, and what makes no sense.

What it is: a command line -> all settings of a run, those of the task and the method filled in; of an interrupted run,
those that it began with. What it is not: it reads no data and no model. Sources: none.

    args = parse_args(["--task", "rte", "--sparsity", "0.9"])
"""

import math
import sys
from pathlib import Path

import parallel
from checkpoint import CHECKPOINT, read
from cli import Parser, add_files, add_machine, one_line_errors
from data import TASKS
from mask import METHODS, smp_s

MOST_STEPS = 10_000_000  # each has an entry in the schedule


def make_parser():
    """The flags, in groups."""
    parser = Parser(
        usage="python train.py [flags]",
        description="Learn a task by switching off weights of a frozen BERT.",
        epilog="Defaults that are not named are the task's (data.TASKS) or the method's (mask.METHODS).",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--task", choices=TASKS, default="movies", metavar="TASK", help=f"{', '.join(TASKS)} (movies)")
    methods = f"{', '.join(METHODS)} (smp-s)"
    what.add_argument("--method", choices=METHODS, default="smp-s", metavar="METHOD", help=methods)
    what.add_argument("--sparsity", type=float, help="share of weights removed; p-...: of multiply-accumulates (0.5)")
    what.add_argument("--seed", type=int, default=0, help="of batches, dropout and fresh weights (0)")
    what.add_argument("--out", type=Path, metavar="FOLDER", help="run folder; default: runs/ and the settings")
    what.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with an interrupted run; no other flags")
    add_files(what)
    method = parser.add_argument_group("method")
    method.add_argument("--lr", type=float, help="highest learning rate of the scores (smp-...: 2e-2, else 1e-2)")
    method.add_argument("--weight-lr", type=float, help="the same of weights that train (3e-5)")
    method.add_argument("--warmup", type=float, default=0.0, help="share of the steps in which both rise (0)")
    method.add_argument("--hold", type=float, help="share of the steps before any weight is removed (0)")
    method.add_argument("--ramp", type=float, help="share of the steps after which the target is reached (movies: 0.9)")
    method.add_argument("--schedule", choices=("cubic", "linear"), help="of the density; default: linear for RoBERTa")
    method.add_argument("--penalty", type=float, help="lambda of the regularizer at the end (400, if there is one)")
    method.add_argument("--temperature", type=float, help="p of SMP-S; default: 4 when most weights stay, else 1")
    method.add_argument("--head", choices=("words", "classifier"), help="label words, or a fresh linear layer")
    method.add_argument("--teacher", type=Path, metavar="RUN_DIR", help="a finished --method finetune to learn from")
    method.add_argument("--ffn-share", type=float, help="p-...: what neurons lose for 1 that heads lose (5)")
    length = parser.add_argument_group("length")
    length.add_argument("--epochs", type=float, help="passes over the training set (movies: 2)")
    length.add_argument("--steps", type=int, help="train for so many steps, whatever --epochs says")
    length.add_argument("--batch", type=int, help="examples a step (movies: 32)")
    length.add_argument("--length", type=int, help="longest input in tokens; longer ones are cut (movies: 64)")
    length.add_argument("--evals", type=int, help="evaluations in a run (movies: 4)")
    machine = parser.add_argument_group("machine")
    add_machine(machine)
    machine.add_argument("--accumulate", type=int, default=1, metavar="PARTS", help="take a batch in so many parts (1)")
    machine.add_argument("--compile", action="store_true", help="let torch.compile fuse the kernels of a step")
    machine.add_argument("--eager", action="store_true", help="on CUDA: launch each kernel of a step, record no graphs")
    machine.add_argument("--deterministic", action="store_true", help="the same bits every time on a GPU too; slower")
    return parser


def parse_args(argv=None):
    """Arguments with the task's defaults filled in. Exits with status 2 and one line when they make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    args.argv, args.spent = sys.argv[1:] if argv is None else argv, 0.0
    if args.resume:
        args = continued(parser, args)
    else:  # what has begun may go on
        refuse_unused(args, parser.error)
    fill_defaults(args)
    check_ranges(args, parser.error)
    return args


def refuse_unused(args, error):
    """Call error with one line that names the flag if one is given that the method does not use."""
    row = METHODS[args.method]
    used = {
        "sparsity": (row.masking or row.units or not args.sparsity, "removes nothing; leave it away"),
        "temperature": (row.masking is smp_s, "gives layers no share by their importance; smp-s does"),
        "ffn_share": (row.units, "removes no heads and neurons; leave it away"),
        "weight_lr": (row.trains_weights or args.head == "classifier", "trains no weights; its scores have --lr"),
    }
    used |= dict.fromkeys(("lr", "penalty"), (row.learns_scores, "learns no scores; its weights have --weight-lr"))
    unscheduled = "has no schedule of the density; leave it away"
    used |= dict.fromkeys(("hold", "ramp", "schedule"), (row.masking, unscheduled))
    for name, (is_used, why) in used.items():
        if getattr(args, name) is not None and not is_used:
            error(f"--{name.replace('_', '-')}: {args.method} {why}")


def continued(parser, args):
    """The arguments of the run that --resume names. Exits with status 2 and one line when it cannot go on."""
    if len(args.argv) > 1 + (args.argv[0] == "--resume") or parallel.PROCESSES > 1:
        parser.error("--resume takes the settings of its run: no other flags, and one process")
    path = args.resume / CHECKPOINT
    with one_line_errors():
        if (args.resume / "result.json").exists():
            raise ValueError(f"--resume: {args.resume} is finished; look at it with: python eval.py {args.resume}")
        if not path.exists():
            raise ValueError(f"--resume: there is no {path}; a run has one once it has evaluated")
        state, _ = read(path)
        if not all(isinstance(word, str) and word not in ("-h", "--help") for word in state["argv"]):
            raise ValueError(f"{path} is not a checkpoint of train.py: its command is none")
    again = parser.parse_args(state["argv"])
    again.argv, again.spent, again.log, again.identity = (state[key] for key in ("argv", "spent", "log", "identity"))
    again.resume = again.out = args.resume
    return again


def fill_defaults(args):
    """Put the defaults of the task and the method where no flag was given."""
    for name in ("model", "epochs", "batch", "length", "ramp", "evals"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(TASKS[args.task], name))
    row = METHODS[args.method]
    lr = row.score_lr if row.learns_scores else None
    of_method = {"lr": lr, "penalty": row.penalty, "head": row.head, "ffn_share": 5.0, "weight_lr": 3e-5, "hold": 0.0}
    for name, value in of_method.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.sparsity is None:
        args.sparsity = 0.5 if row.masking or row.units else 0.0
    if args.out is None:
        parts = [args.task, Path(args.model).name, args.method, f"{args.sparsity:g}"]
        parts += ["classifier"] * (args.head == "classifier") + ["taught"] * bool(args.teacher)
        parts += [f"{args.steps}steps"] * bool(args.steps) + [f"seed{args.seed}"]
        args.out = Path("runs") / "-".join(parts)


def check_ranges(args, error):
    """Call error with one line that names the flag if a number is out of its range."""
    if not 0 <= args.sparsity < 1:
        error(f"--sparsity is the share of weights removed, in [0, 1); got {args.sparsity}")
    if not 0 <= args.ramp <= 1:
        error(f"--ramp is a share of the steps, in [0, 1]; got {args.ramp}")
    if not 0 <= args.hold <= args.ramp:
        error(f"--hold is a share of the steps, from 0 to that of --ramp, {args.ramp}; got {args.hold}")
    if not 0 <= args.warmup < 1:
        error(f"--warmup is a share of the steps, in [0, 1); got {args.warmup}")
    if not 0 <= args.penalty < math.inf:
        error(f"--penalty must be at least 0; got {args.penalty}")
    if not 0 <= args.seed < 2**63:
        error(f"--seed must be at least 0 and less than 2^63; got {args.seed}")
    if METHODS[args.method].units and parallel.PROCESSES > 1:
        error(f"--method {args.method} chooses its heads and neurons in one process: start it with python")
    for name in ("lr", "weight_lr", "temperature", "epochs", "steps", "batch", "evals", "accumulate", "ffn_share"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            error(f"--{name.replace('_', '-')} must be greater than 0; got {value}")
    if args.epochs > MOST_STEPS or (args.steps or 0) > MOST_STEPS:
        error(f"--steps and --epochs can be at most {MOST_STEPS:,}")
    if args.accumulate * parallel.PROCESSES > args.batch:
        processes = f"{parallel.PROCESSES} process(es)"
        error(f"--accumulate: a batch of {args.batch} has no {args.accumulate} parts in {processes}")
