"""Time one training step and its parts, beside dense fine-tuning of the same model.

The weights are random, but for --model, which times the evaluation of a model instead. Prints
medians after a warm-up, their spread, how much of the device's peak a step reaches, how far it is
from the lower bound (see lower_bound_ms), and one JSON line.

    python -m tools.bench --layers 12 --hidden 768 --batch 32 --length 128 [--compile]   # bert-base
    python -m tools.bench --layers 6 --hidden 384 --batch 32 --length 64                 # MiniLM
    python -m tools.bench --gpt2 --layers 12 --hidden 768 --batch 32 --length 512        # GPT-2
    python -m tools.bench --model minilm                                                 # inference
"""

import json
import resource
import statistics
import sys
import time

import torch

from data import Part
from extras import gpt2, lm
from mask import METHODS, mean_sigmoid
from model import Bert, Config, load_model
from plumbing import cli, fetch, parallel
from plumbing.checkpoints import read_model
from plumbing.graphs import Recorded, compile_step
from train import Learner, make_forward_backward, make_optimizer, set_rates, train_step

DENSITY = 0.5
SCORED = [name for name, method in METHODS.items() if "scores" in method.trains]
BERT_WORDS = 30522  # vocabulary sizes
GPT2_WORDS = 50257


STEP_FLAGS = {
    "layers": (cli.up_to(1000), "how many"),
    "hidden": (cli.up_to(16384), "width; heads of 32 or 64"),
    "gpt2": (bool, "time a language model with GPT-2's vocabulary"),
    "method": (SCORED, "compared with finetune"),
    "no_dropout": (bool, "as in train.py"),
    "compile": (bool, "as in train.py"),
    "eager": (bool, "as in train.py; also times the parts of a step"),
}
DEFAULTS = dict.fromkeys(STEP_FLAGS, False) | {"layers": 6, "hidden": 384, "method": "smp-s"}


def parse_args(argv=None):
    parser = cli.Parser(
        prog="python -m tools.bench", description="Time one training step and its parts."
    )
    add = parser.add_argument
    add("--batch", type=cli.up_to(65536), default=32, help="examples per step, in all (32)")
    add("--length", type=cli.count, default=64, help="tokens per example (64)")
    add("--steps", type=cli.up_to(10000), default=20, help="timed steps of each kind (20)")
    add("--model", metavar="NAME", help="time the evaluation of this model, a name or a folder")
    cli.add_flags(parser, "machine", cli.MACHINE_FLAGS)
    cli.add_flags(parser, "without --model", STEP_FLAGS, DEFAULTS)
    args = parser.parse_args(argv)

    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.model:
            parser.error(f"{cli.flag(name)} is for training steps; leave it out, or --model")
    if args.hidden % 64:
        parser.error("--hidden must be a multiple of 64")
    if args.batch % parallel.processes():
        parser.error("--batch must be a multiple of the processes")
    return args


def make_model(args):
    """Make a frozen model of random weights."""
    heads = args.hidden // (64 if args.hidden >= 768 else 32)
    shape = args.hidden, args.layers, heads, 4 * args.hidden
    if args.gpt2:
        model = gpt2.GPT2(gpt2.Config(GPT2_WORDS, args.length, *shape))
    else:
        model = Bert(Config(BERT_WORDS, *shape, args.length, 2), words=[3, 4])
    for name, p in model.named_parameters():
        if "LayerNorm" not in name and p.ndim > 1:
            p.data.normal_(0, 0.02)
    return model.requires_grad_(False)


def make_batch(args, vocabulary, device):
    """Make this process's part of a batch of random tokens, all of one length."""
    rows = args.batch // parallel.processes()
    ids = torch.randint(vocabulary, (rows, args.length), device=device)
    labels = ids if args.gpt2 else ids[:, 0] % 2
    # Token ids, segments (all 0) and attention mask (no padding).
    return Part(torch.stack([ids, torch.zeros_like(ids), torch.ones_like(ids)]), labels)


def flops(args):
    """Count the multiplications and additions of all matrix products in a training step.

    A step takes three times the forward pass: one for itself, one for the gradients of the inputs
    and one for those of the weights. In BERT's last layer, only keys and values see all tokens.
    For GPT-2 the count leaves out the gradients of the head's weights, which only dense training
    needs, and includes the half of attention that a causal mask could save.
    """
    tokens = args.batch * args.length
    h = args.hidden
    matrices = 2 * 12 * h * h  # per token
    layer = tokens * (matrices + 4 * args.length * h)
    if args.gpt2:
        return 3 * args.layers * layer + 4 * tokens * h * GPT2_WORDS
    keys_and_values = 2 * tokens * 2 * h * h
    rest = 2 * args.batch * 10 * h * h
    return 3 * ((args.layers - 1) * layer + keys_and_values + rest)


def matrix_peak(device, dtype):
    """Measure the FLOP/s of a large square matrix product on this device."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = min(time_calls(lambda: a @ a, device, 10)) / 1000
    return 2 * n**3 / seconds


def copy_bandwidth(device):
    """Measure the bytes per second that copying a large tensor reads and writes."""
    size = 1 << (28 if device.type == "cuda" else 24)
    a = torch.randn(size, device=device)
    b = torch.empty_like(a)
    seconds = min(time_calls(lambda: b.copy_(a), device, 10)) / 1000
    return 2 * a.nbytes / seconds


def lower_bound_ms(args, learner, peak, bandwidth):
    """Milliseconds that a step takes at least: its matrix products, then its memory traffic.

    Adam reads values, gradients and two moments, and writes all but the gradients: seven passes
    over everything that trains. A mask also reads scores and weights.
    """
    moved = 7 * size_of(learner.parameters())
    if learner.masks:
        moved += size_of([*learner.masks.scores.values(), *learner.masks.weights.values()])
    products = flops(args) / parallel.processes() / peak
    return 1000 * (products + moved / bandwidth)


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def time_calls(work, device, steps, warmup=3):
    """Time `steps` calls -> a list of milliseconds.

    On a GPU each entry is the mean of five calls, since in training too the host runs ahead.
    """

    def wait():
        if device.type != "cpu":
            torch.accelerator.synchronize()

    group = 1 if device.type == "cpu" else 5
    for _ in range(warmup):
        work()
    times = []
    for _ in range(-(-steps // group)):  # rounded up
        wait()
        start = time.perf_counter()
        for _ in range(group):
            work()
        wait()
        times.append((time.perf_counter() - start) * 1000 / group)
    return times


def peak_memory(device):
    """Peak memory in GiB: since the last reset on CUDA, otherwise of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes, or kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_median(name, times, note=""):
    """Print a median and the spread -> the median."""
    median = statistics.median(times)
    print(f"{name:28}{median:10.2f} ms  ({min(times):.2f} to {max(times):.2f}){note}")
    return round(median, 3)


def time_step(args, method, device, dtype, peak, bandwidth):
    """Time whole training steps of a method, and the parts of masking -> {what: number}."""
    model = make_model(args).to(device).train(not args.no_dropout)
    learner = Learner(model, METHODS[method], dtype)
    if learner.masks:
        for scores in learner.masks.scores.values():
            scores.data.normal_(0, 0.1)
    make = lm.make_forward_backward if args.gpt2 else make_forward_backward
    forward_backward = make(model, learner)
    if args.compile:
        compile_step(model, learner.masks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        if not args.eager:
            forward_backward = Recorded(forward_backward, learner.parameters())
    adam = make_optimizer(learner, 1e-5, 1e-5)
    set_rates(adam, 5, 10)
    parts = [make_batch(args, model.config.vocab_size, device)]
    density = torch.tensor(DENSITY, dtype=torch.float64, device=device)
    penalty = torch.tensor(10.0, device=device)

    def step():
        train_step(forward_backward, adam, parts, density, penalty)

    times = time_calls(step, device, args.steps)
    lowest = lower_bound_ms(args, learner, peak, bandwidth)
    results = describe_step(args, method, times, peak, lowest, round(peak_memory(device), 2))
    if learner.masks and not args.compile and (args.eager or device.type == "cpu"):
        results |= time_parts(args, learner.masks, density)
    return results


def describe_step(args, method, times, peak, lowest, memory):
    """Print a step's times, beside the peak and the lower bound -> {what: number}."""
    milliseconds = statistics.median(times)
    tokens = round(1000 * args.batch * args.length / milliseconds)
    share = round(1000 * flops(args) / parallel.processes() / milliseconds / peak, 4)
    over = round(milliseconds / lowest, 2)
    note = f"  {tokens:,} tokens/s, {share:.1%} of peak, {over} times the lower bound, {memory} GiB"
    return {
        method: print_median(f"{method} step", times, note),
        f"{method} over its floor": over,
        f"{method} share of peak": share,
        f"{method} GiB": memory,
    }


def time_parts(args, masks, density):
    """Time what masking adds to a step, each part alone and without graphs -> {part: ms}."""
    importance = mean_sigmoid(masks.scores).detach()

    @torch.no_grad()
    def select():
        masks.choose_stacked(importance, density, exact=False)

    def mask():
        masked = list(masks(density)[0].values())
        torch.autograd.backward(masked, [torch.ones_like(weight) for weight in masked])

    def regularize():
        mean_sigmoid(masks.scores).mean().backward()

    parts = {
        "select": select,
        "select and mask, both ways": mask,
        "regularize, both ways": regularize,
    }
    results = {}
    print("its parts, timed alone; they overlap:")
    for name, work in parts.items():
        results[name] = print_median(f"  {name}", time_calls(work, density.device, args.steps))
    return results


@torch.inference_mode()
def time_inference(args, device, dtype):
    """Time the evaluation of a model at one length -> {what: number}."""
    stored, tensors = read_model(fetch.model_folder(args.model))
    if stored.get("model_type") == "gpt2":
        model = gpt2.load_gpt2(stored, tensors)
    else:
        model = load_model(stored, tensors, [0, 1])
    model.to(device, dtype).eval()
    longest = model.config.longest_input
    if args.length > longest:
        raise ValueError(f"--length: {args.model} takes {longest} tokens, not {args.length}")

    inputs = make_batch(args, model.config.vocab_size, device).inputs
    times = time_calls(lambda: model(*inputs), device, args.steps)
    speed = f"  {args.batch / statistics.median(times) * 1000:,.0f} examples/s"
    return {"evaluation": print_median("evaluation", times, speed)}


def compare(args, device, dtype):
    """Time the method and dense fine-tuning, beside the device's peak -> {what: number}."""
    print("this takes a minute or two")
    peak = matrix_peak(device, dtype)
    bandwidth = copy_bandwidth(device)
    print(
        f"matrix products reach {peak / 1e12:.1f} TFLOP/s here, copies {bandwidth / 1e9:.0f} GB/s"
    )
    results = {}
    for method in (args.method, "finetune"):
        results |= time_step(args, method, device, dtype, peak, bandwidth)
    print(
        f"{args.method} takes {results[args.method] / results['finetune']:.2f} times the dense step"
    )
    return results


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    device, dtype, why = cli.choose_device(args.device, args.dtype)
    parallel.start(device)
    cli.set_up(deterministic=False, steps=0 if args.eager else cli.LONG)
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    dtype_name = cli.dtype_name(dtype)
    print(
        f"{name}, {dtype_name} ({why}), torch {torch.__version__}\n"
        "Medians, with the fastest and the slowest in brackets:"
    )

    settings = dict(vars(args))
    if args.model:
        for unused in STEP_FLAGS:
            del settings[unused]
        results = time_inference(args, device, dtype)
    else:
        results = compare(args, device, dtype)
    settings |= {"device": name, "dtype": dtype_name, "processes": parallel.processes()}
    print(json.dumps(settings | results | cli.code_version()["versions"]))
    parallel.stop()


if __name__ == "__main__":
    main()
