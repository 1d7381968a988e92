"""Time one training step and its parts, beside dense fine-tuning of the same model, on random weights.

Medians after a warm-up, the spread, the share of what the device's matrix units reach here, how far the step is from
its floor (see floor), and one JSON line.

    python -m tools.bench --layers 12 --hidden 768 --batch 32 --length 128 [--compile]      # bert-base
    python -m tools.bench --layers 6 --hidden 384 --batch 32 --length 64                    # MiniLM
    python -m tools.bench --gpt2 --layers 12 --hidden 768 --batch 32 --length 512           # GPT-2
    python -m tools.bench --inference --model minilm                                        # evaluation of a model
"""

import json
import resource
import statistics
import sys
import time

import torch

from data import Part
from extras import gpt2
from mask import METHODS, mean_sigmoid
from model import Bert, Config, load_model
from plumbing import cli, fetch, parallel
from plumbing.adam import set_rates
from plumbing.checkpoints import read_model
from plumbing.graphs import Recorded, compile_step
from train import Learner, make_forward_backward, train_step

DENSITY = 0.5
BERT_WORDS = 30522  # of their vocabularies
GPT2_WORDS = 50257


def parse_args(argv=None):
    parser = cli.Parser(
        prog="python -m tools.bench", description="Time one training step and its parts."
    )
    parser.add_argument("--layers", type=cli.up_to(1000), default=6, help="(6)")
    parser.add_argument(
        "--hidden",
        type=cli.up_to(16384),
        default=384,
        help="width (384); heads of 32, from 768 on 64",
    )
    parser.add_argument(
        "--gpt2", action="store_true", help="a language model of GPT-2's vocabulary instead of BERT"
    )
    parser.add_argument(
        "--batch",
        type=cli.up_to(65536),
        default=32,
        help="examples a step, over all processes (32)",
    )
    parser.add_argument("--length", type=cli.count, default=64, help="tokens an example (64)")
    parser.add_argument(
        "--steps", type=cli.up_to(10000), default=20, help="timed steps of each kind (20)"
    )
    learning = [name for name, method in METHODS.items() if "lr" in method.flags]
    parser.add_argument(
        "--method", choices=learning, default="smp-s", help="beside finetune (smp-s)"
    )
    cli.add_machine(parser)
    parser.add_argument("--compile", action="store_true", help="as in train.py")
    parser.add_argument(
        "--eager", action="store_true", help="as in train.py; so parts of a step can be timed"
    )
    parser.add_argument(
        "--inference", action="store_true", help="time evaluation of --model instead"
    )
    parser.add_argument("--model", metavar="NAME", help="a name, or a folder; with --inference")
    args = parser.parse_args(argv)
    if args.inference != (args.model is not None) or args.inference and args.compile:
        parser.error(
            "--inference needs --model, --model needs --inference, and evaluation is not compiled"
        )
    longest = 1024 if args.gpt2 else 512
    if args.hidden % 64 or args.length > longest or args.batch % parallel.processes():
        error = f"--hidden must be a multiple of 64, --length at most {longest}, --batch a multiple of the processes"
        parser.error(error)
    return args


def make_model(args):
    heads = args.hidden // (64 if args.hidden >= 768 else 32)
    if args.gpt2:
        model = gpt2.GPT2(
            gpt2.Config(GPT2_WORDS, 1024, args.hidden, args.layers, heads, 4 * args.hidden)
        )
    else:
        model = Bert(
            Config(BERT_WORDS, args.hidden, args.layers, heads, 4 * args.hidden, 512, 2),
            words=[3, 4],
        )
    for name, p in model.named_parameters():
        if "LayerNorm" not in name and p.ndim > 1:
            p.data.normal_(0, 0.02)
    return model.requires_grad_(False)


def make_batch(args, vocabulary, device):
    ids = torch.randint(
        vocabulary, (args.batch // parallel.processes(), args.length), device=device
    )
    labels = ids if args.gpt2 else ids[:, 0] % 2
    return Part(torch.stack([ids, torch.zeros_like(ids), torch.ones_like(ids)]), labels)


def flops(args):
    """Multiplications and additions of matrix products in a step: forward 1, gradients to inputs and weights 1 each.

    Of BERT's last layer, only keys and values see all tokens. GPT-2's head is counted without gradients to its weights,
    which dense training alone has, and attention without the half that a causal mask saves.
    """
    tokens = args.batch * args.length
    h = args.hidden
    layer = 2 * tokens * 12 * h * h + 4 * tokens * args.length * h
    if args.gpt2:
        return 3 * args.layers * layer + 2 * 2 * tokens * h * GPT2_WORDS
    last = 2 * tokens * 2 * h * h + 2 * args.batch * 10 * h * h
    return 3 * ((args.layers - 1) * layer + last)


def matrix_peak(device, dtype):
    """FLOP/s of a large square matrix product here."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / (min(timed(lambda: a @ b, device, 10)) / 1000)


def copy_bandwidth(device):
    """Bytes a second that copying a large tensor reads and writes here."""
    a = torch.randn(1 << (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (min(timed(lambda: b.copy_(a), device, 10)) / 1000)


def floor(args, learner, peak, bandwidth):
    """Milliseconds below which a step cannot be: its matrix products, and then, of all that learns, Adam's passes.

    Adam reads values, gradients and two moments and writes all but the gradients; a mask reads scores and weights.
    """
    moved = 7 * sum(p.nbytes for p in learner.parameters())
    if learner.masks:
        moved += sum(
            stack.nbytes
            for stack in [*learner.masks.scores.values(), *learner.masks.weights.values()]
        )
    return 1000 * (flops(args) / parallel.processes() / peak + moved / bandwidth)


def timed(work, device, steps, warmup=3):
    """Milliseconds of each of `steps` calls; on a GPU the mean of five: in training the host runs ahead."""
    wait = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    group = 1 if device.type == "cpu" else 5
    for _ in range(warmup):
        work()
    times = []
    for _ in range(-(-steps // group)):
        wait()
        start = time.perf_counter()
        for _ in range(group):
            work()
        wait()
        times.append((time.perf_counter() - start) * 1000 / group)
    return times


def peak_memory(device):
    """GiB: on CUDA the most allocated since the last reset, else the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def show(name, times, note=""):
    """Print a median and the spread -> the median."""
    median = statistics.median(times)
    print(f"{name:28}{median:10.2f} ms  ({min(times):.2f} to {max(times):.2f}){note}")
    return round(median, 3)


def time_step(args, method, device, dtype, peak, bandwidth):
    """Time whole training steps of a method, and by hand its parts, if it has masks -> {what: number}."""
    model = make_model(args).to(device).train()
    learner = Learner(model, METHODS[method], DENSITY, dtype)
    for scores in learner.masks.scores.values() if learner.masks else ():
        scores.data.normal_(0, 0.1)
    forward_backward = make_forward_backward(model, learner)
    if args.compile:
        compile_step(model, learner.masks)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        if not args.eager:
            forward_backward = Recorded(forward_backward, learner.parameters())
    adam = learner.optimizer(1e-5, 1e-5)
    set_rates(adam, 5, 10)
    parts = [make_batch(args, model.config.vocab_size, device)]
    density, penalty = torch.tensor([DENSITY, 10.0], device=device)
    times = timed(
        lambda: train_step(forward_backward, adam, parts, density, penalty), device, args.steps
    )

    seconds = statistics.median(times) / 1000
    tokens = round(args.batch * args.length / seconds)
    share = round(flops(args) / parallel.processes() / seconds / peak, 4)
    memory = round(peak_memory(device), 2)
    over = round(1000 * seconds / floor(args, learner, peak, bandwidth), 2)
    said = f"  {tokens:,} tokens/s, {share:.1%} of peak, {over} times its floor, {memory} GiB"
    found = {method: show(f"{method} step", times, said), f"{method} over its floor": over}
    found |= {
        f"{method} tokens/s": tokens,
        f"{method} share of peak": share,
        f"{method} GiB": memory,
    }
    if learner.masks and not args.compile and (args.eager or device.type == "cpu"):
        found |= time_parts(args, learner.masks, density)
    return found


def time_parts(args, masks, density):
    """What masking adds to a step, each part alone and launched by hand -> {part: milliseconds}."""
    importance = mean_sigmoid(masks.scores).detach()

    @torch.no_grad()
    def select():
        masks.method.masking(
            masks.method.rank(masks.weights, masks.scores), importance, density, exact=False
        )

    def mask():
        made = list(masks(density)[0].values())
        torch.autograd.backward(made, [torch.ones_like(weight) for weight in made])

    parts = {
        "select": select,
        "select and mask, both ways": mask,
        "regularize, both ways": lambda: mean_sigmoid(masks.scores).mean().backward(),
    }
    return {
        name: show(f"  {name}", timed(work, density.device, args.steps))
        for name, work in parts.items()
    }


@torch.inference_mode()
def time_inference(args, device, dtype):
    """Evaluation of a model: examples a second at this length -> {what: number}."""
    stored, tensors = read_model(fetch.model_folder(args.model))
    language = stored.get("model_type") == "gpt2"
    model = gpt2.load_gpt2(stored, tensors) if language else load_model(stored, tensors, [0, 1])
    model.to(device, dtype).eval()
    if args.length > model.config.longest_input:
        raise ValueError(
            f"--length: {args.model} takes {model.config.longest_input} tokens, not {args.length}"
        )
    inputs = make_batch(args, model.config.vocab_size, device).inputs
    times = timed(lambda: model(*inputs), device, args.steps)
    speed = args.batch / statistics.median(times) * 1000
    return {
        "evaluation": show("evaluation", times, f"  {speed:,.0f} examples/s"),
        "examples/s": round(speed, 1),
    }


@cli.one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    device, dtype, why = cli.choose_device(args.device, args.dtype)
    parallel.start(device)
    cli.set_up(deterministic=False, steps=0 if args.eager else cli.LONG)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{name}, {cli.dtype_name(dtype)} ({why}), torch {torch.__version__}, {parallel.processes()} process(es)"
    )
    print(
        "medians, in brackets the fastest and the slowest; parts are timed alone and overlap; a minute or two in all"
    )
    if args.inference:
        found = time_inference(args, device, dtype)
    else:
        peak = matrix_peak(device, dtype)
        bandwidth = copy_bandwidth(device)
        print(
            f"matrix products reach {peak / 1e12:.1f} TFLOP/s here, copies {bandwidth / 1e9:.0f} GB/s"
        )
        found = time_step(args, args.method, device, dtype, peak, bandwidth)
        found |= time_step(args, "finetune", device, dtype, peak, bandwidth)
        print(
            f"{args.method} takes {found[args.method] / found['finetune']:.2f} times the dense step"
        )
    of_training = ("layers", "hidden", "gpt2", "method", "compile", "eager")
    line = {
        key: value
        for key, value in vars(args).items()
        if not (args.inference and key in of_training)
    }
    line |= {"device": name, "dtype": cli.dtype_name(dtype), "processes": parallel.processes()}
    print(json.dumps(line | found | cli.code_version()["versions"]))
    parallel.stop()


if __name__ == "__main__":
    main()
