"""Time one training step and its parts, beside dense fine-tuning of the same model, on random weights.

Medians after a warm-up, the spread, the share of what the device's matrix units reach here, and one JSON line.

    python -m tools.bench --layers 12 --hidden 768 --batch 32 --length 128 [--compile]      # bert-base
    python -m tools.bench --layers 6 --hidden 384 --batch 32 --length 64                    # MiniLM
"""

import json
import resource
import statistics
import sys
import time
from functools import partial

import torch
from torch.func import functional_call

from data import Part
from mask import METHODS, mean_sigmoid
from model import Bert, Config, load_model
from plumbing import fetch, parallel
from plumbing.adam import set_rates
from plumbing.cli import (
    Parser,
    add_machine,
    choose_device,
    code_version,
    count,
    dtype_name,
    one_line_errors,
    set_up,
)
from plumbing.graphs import Recorded
from train import Learner, make_forward_backward, train_step

DENSITY = 0.5


def parse_args(argv=None):
    parser = Parser(prog="python -m tools.bench", description="Time one training step and its parts.")
    parser.add_argument("--layers", type=count, default=6, help="(6)")
    parser.add_argument("--hidden", type=count, default=384, help="width (384); heads of 32, or 64 from 768 on")
    parser.add_argument("--batch", type=count, default=32, help="examples a step, over all processes (32)")
    parser.add_argument("--length", type=count, default=64, help="tokens an example (64)")
    parser.add_argument("--steps", type=count, default=20, help="timed steps of each kind (20)")
    masking = [name for name, method in METHODS.items() if method.masking and not method.trains_weights]
    parser.add_argument("--method", choices=masking, default="smp-s", help="beside finetune (smp-s)")
    add_machine(parser)
    parser.add_argument("--compile", action="store_true", help="as in train.py")
    parser.add_argument("--eager", action="store_true", help="as in train.py; so parts of a step can be timed")
    parser.add_argument("--inference", action="store_true", help="time evaluation with baked weights instead")
    parser.add_argument("--model", metavar="NAME", help="with --inference: time this model or folder, as it is")
    args = parser.parse_args(argv)
    if args.model and not args.inference:
        parser.error("--model needs --inference")
    if args.hidden % 64 or args.length > 512 or args.batch % parallel.processes():
        parser.error("--hidden must be a multiple of 64, --length at most 512, --batch a multiple of the processes")
    if args.inference and args.compile:
        parser.error("--inference: evaluation is not compiled; leave out --compile")
    return args


def make_model(args):
    heads = args.hidden // (64 if args.hidden >= 768 else 32)
    config = Config(30522, args.hidden, args.layers, heads, 4 * args.hidden, 512, 2)
    model = Bert(config, words=[3, 4])
    for name, p in model.named_parameters():
        if "LayerNorm" not in name and p.ndim > 1:
            p.data.normal_(0, 0.02)
    return model.requires_grad_(False)


def flops(args):
    """Multiplications and additions of matrix products in a step: forward 1, gradients to inputs and weights 1 each.

    Of the last layer, only keys and values see all tokens.
    """
    tokens = args.batch * args.length
    h = args.hidden
    layer = 2 * tokens * 12 * h * h + 4 * tokens * args.length * h
    last = 2 * tokens * 2 * h * h + 2 * args.batch * 10 * h * h
    return 3 * ((args.layers - 1) * layer + last)


def matrix_peak(device, dtype):
    """FLOP/s of a large square matrix product here."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (min(timed(lambda: a @ b, device, 10)) / 1000)


def wait(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def timed(work, device, steps, warmup=3):
    """Milliseconds of each of `steps` calls; on a GPU the mean of five: in training the host runs ahead."""
    for _ in range(warmup):
        work()
    group = 1 if device.type == "cpu" else 5
    times = []
    for _ in range(-(-steps // group)):
        wait(device)
        start = time.perf_counter()
        for _ in range(group):
            work()
        wait(device)
        times.append((time.perf_counter() - start) * 1000 / group)
    return times


def peak_memory(device):
    """GiB: on CUDA the most allocated since the last reset, else the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def make_batch(args, device):
    ids = torch.randint(1000, 2000, (args.batch // parallel.processes(), args.length), device=device)
    return Part(torch.stack([ids, torch.zeros_like(ids), torch.ones_like(ids)]), ids[:, 0] % 2)


def time_steps(args, method, device, dtype):
    """-> (milliseconds of whole training steps, the objects that made them)."""
    model = make_model(args).to(device).train()
    learner = Learner(model, METHODS[method], DENSITY, dtype)
    for scores in learner.masks.scores.values() if learner.masks else ():
        scores.data.normal_(0, 0.1)
    forward_backward = make_forward_backward(model, learner)
    if args.compile:
        for layer in model.bert.encoder["layer"]:
            layer.compile(dynamic=True)
    if device.type == "cuda" and not args.eager:
        forward_backward = Recorded(forward_backward, learner.parameters())
    adam = learner.optimizer(1e-5, 1e-5)
    set_rates(adam, 5, 10)
    part = make_batch(args, device)
    density, penalty = torch.tensor([DENSITY, 10.0], device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timed(lambda: train_step(forward_backward, adam, [part], density, penalty), device, args.steps)
    return times, (model, learner, adam, part)


def time_parts(args, device, model, learner, adam, part):
    """{part: milliseconds of each call}, each alone and launched by hand; so their sum is more than a step."""
    masks = learner.masks
    density = torch.tensor(DENSITY, device=device)
    weights = {name: w.detach().requires_grad_() for name, w in masks(density)[0].items()}
    gradients = {name: torch.randn_like(w) for name, w in weights.items()}
    importance = mean_sigmoid(masks.scores).detach()

    @torch.no_grad()
    def select():
        masks.method.masking(masks.scores, importance, density, exact=False)

    def mask():
        made, _ = masks(density)
        torch.autograd.backward(list(made.values()), list(gradients.values()))

    def forward():
        logits = functional_call(model, weights, tuple(part.inputs), tie_weights=False).float()
        return torch.nn.functional.cross_entropy(logits, part.labels)

    mask()  # so that clipping and Adam find gradients
    parts = {
        "select": select,
        "select and mask, both ways": mask,
        "regularize, both ways": lambda: mean_sigmoid(masks.scores).mean().backward(),
        "forward": torch.no_grad()(forward),
        "forward and backward": lambda: forward().backward(),
        "clip": lambda: torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0),
        "Adam": adam.step,
    }
    return {name: timed(work, device, args.steps) for name, work in parts.items()}


def show(name, times, note=""):
    median = statistics.median(times)
    print(f"{name:28}{median:10.2f} ms  ({min(times):.2f} to {max(times):.2f}){note}")
    return round(median, 3)


def time_training(args, device, dtype):
    """Times of a pruning and a dense step, printed -> {what: number}."""
    found = {}
    peak = matrix_peak(device, dtype)
    by_hand = parallel.processes() == 1 and not args.compile and (args.eager or device.type != "cuda")
    print(f"matrix products of {dtype_name(dtype)} reach {peak / 1e12:.1f} TFLOP/s here")
    for method in (args.method, "finetune"):
        times, objects = time_steps(args, method, device, dtype)
        seconds = statistics.median(times) / 1000
        memory = peak_memory(device)
        speed = args.batch * args.length / seconds
        share = flops(args) / parallel.processes() / seconds / peak
        note = f"  {speed:,.0f} tokens/s, {share:.1%} of peak, {memory:.2f} GiB"
        found[method] = show(f"{method} step", times, note)
        numbers = {"tokens/s": round(speed), "share of peak": round(share, 4), "GiB": round(memory, 2)}
        found |= {f"{method} {what}": number for what, number in numbers.items()}
        if by_hand and method != "finetune":
            for part, part_times in time_parts(args, device, *objects).items():
                found[part] = show(f"  {part}", part_times)
        del objects  # and with them their memory
    print(f"{args.method} takes {found[args.method] / found['finetune']:.2f} times the dense step")
    return found


@torch.inference_mode()
def time_inference(args, device, dtype):
    """Evaluation with baked weights: examples a second at this length."""
    if args.model:
        model = load_model(fetch.model_folder(args.model), [0, 1]).to(device, dtype).eval()
        weights = {}
        if args.length > model.config.longest_input:
            raise ValueError(f"--length: {args.model} takes {model.config.longest_input} tokens, not {args.length}")
    else:
        model = make_model(args).to(device).eval()
        weights = Learner(model, METHODS[args.method], DENSITY, dtype).baked(DENSITY)
    inputs = tuple(make_batch(args, device).inputs % model.config.vocab_size)
    times = timed(partial(functional_call, model, weights, inputs, tie_weights=False), device, args.steps)
    speed = args.batch / statistics.median(times) * 1000
    median = show("evaluation", times, f"  {speed:,.0f} examples/s, {speed * args.length:,.0f} tokens/s")
    if not args.model:
        print("zeros are multiplied like other numbers: sparsity makes no difference")
    return {"evaluation": median, "examples/s": round(speed, 1)}


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors():
        device, dtype, why = choose_device(args.device, args.dtype)
        parallel.start(device)
        set_up(deterministic=False, eager=args.eager)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        print(f"{name}, {dtype_name(dtype)} ({why}), torch {torch.__version__}, {parallel.processes()} process(es)")
        shape = args.model or f"{args.layers} layers of {args.hidden}"
        launched = "" if args.eager or args.inference or device.type != "cuda" else ", recorded as CUDA graphs"
        compiled = ", compiled" if args.compile else ""
        print(f"{shape}, batch {args.batch}, length {args.length}{launched}{compiled}")
        print("medians, in brackets the fastest and the slowest; parts are timed alone and overlap")
        found = (time_inference if args.inference else time_training)(args, device, dtype)
    left_out = ("device", "dtype", *(("layers", "hidden", "method") if args.model else ("model",)))
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    line = {"device": name, "dtype": dtype_name(dtype), "processes": parallel.processes()} | settings | found
    print(json.dumps(line | code_version()["versions"]))
    parallel.stop()


if __name__ == "__main__":
    main()
