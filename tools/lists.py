"""What is run for the comparisons, and what tuning found. tools.experiments makes and shows these lists of runs.

A run is known by the arguments of train.py. What is compared follows tables 1 to 3 of Jiang et al., ACL 2023. Lists
that only record what was tried are not made here: the lines of results/runs.jsonl name `tuning`, `abandoned` and
`earlier`, a comparison before all had the same budget. Most lists but `main` have settings that `tuning` found.

    for arguments in LISTS["main"](): ...  # "--task=movies --model=minilm --method=finetune --steps=1196 --seed=0 ..."
"""

import itertools
import shlex

# Steps of all lists but `main`, the same for all methods of a task: for GLUE a fifth to a half of the defaults.
STEPS = {
    "movies": 1196,
    "rte": 3120,
    "mrpc": 3450,
    "cola": 3216,
    "stsb": 3600,
    "sst2": 3159,
    "squad": 2870,
}
STEPS |= {"ptb": 820}  # ten epochs
MODELS = {
    "ptb": "standin"
}  # of all other tasks minilm; results/README.md says how the stand-in for GPT-2 is made
SEEDS = {"movies": 5, "rte": 5, "mrpc": 5, "cola": 5, "stsb": 5, "sst2": 3}
SPARSITIES = (0.5, 0.9)

# What tuning found, by method and sparsity; for SMP with the paper's schedule, cubic without a warm-up.
MOVEMENT = {"weight_lr": 1e-4, "hold": 0.3, "schedule": "linear"}
TUNED = {
    ("finetune", None): {"weight_lr": 1e-4},
    ("magnitude", 0.5): {"weight_lr": 1e-4},
    ("magnitude", 0.9): {"weight_lr": 1e-4, "hold": 0.1},
    ("movement", 0.5): MOVEMENT,
    ("movement", 0.9): MOVEMENT,
}
TUNED |= {
    (method, sparsity): {"weight_lr": 1e-4}
    for method in ("soft-movement", "l0")
    for sparsity in SPARSITIES
}
TUNED |= {(method, 0.5): {"lr": 4e-2} for method in ("smp-s", "smp-l", "smp-g")}
TUNED |= {(method, 0.9): {"lr": 1e-2} for method in ("smp-s", "smp-l", "smp-g")}
TUNED |= {("smp-w", 0.5): {"lr": 4e-2, "warmup": 0.1}, ("smp-w", 0.9): {"lr": 1e-2, "warmup": 0.1}}
# Which share of the weights soft movement and l0 leave depends on the task, and so does what they need.
BY_TASK = {
    ("movies", "soft-movement", 0.5): {"penalty": 800},
    ("rte", "soft-movement", 0.5): {"penalty": 50},
    ("mrpc", "soft-movement", 0.5): {"penalty": 100, "warmup": 0.1},
    ("cola", "soft-movement", 0.5): {"penalty": 200},
    ("stsb", "soft-movement", 0.5): {"penalty": 100},
    ("sst2", "soft-movement", 0.5): {"penalty": 100, "warmup": 0.1},
    ("movies", "soft-movement", 0.9): {"penalty": 3200, "warmup": 0.1},
    ("rte", "soft-movement", 0.9): {"penalty": 800},
    ("mrpc", "soft-movement", 0.9): {"penalty": 800, "warmup": 0.1},
    ("cola", "soft-movement", 0.9): {"penalty": 1200},
    ("stsb", "soft-movement", 0.9): {"penalty": 1600},
    ("sst2", "soft-movement", 0.9): {"penalty": 800},
    ("mrpc", "l0", 0.5): {"penalty": 25},
    ("sst2", "l0", 0.5): {"penalty": 100},
    ("mrpc", "l0", 0.9): {"penalty": 100},
    ("sst2", "l0", 0.9): {"penalty": 800},
}


# Of language models, by method and sparsity: five settings each on seed 0, chosen by the perplexity of validation text.
PTB = {("finetune", None): {"weight_lr": 1e-3}}
PTB |= {
    key: {"weight_lr": 1e-3}
    for key in itertools.product(("p-pruning", "p-activation", "p-random"), (0.3, 0.5))
}
PTB |= {("smp-s", 0.2): {"lr": 0.1, "penalty": 0}, ("smp-s", 0.5): {"penalty": 0}}


# Every method with the same budget: steps, seeds that chose nothing, and for each row what tools.tune chose.
EQUAL_STEPS = {"movies": 1196, "mrpc": 1380, "cola": 1340, "stsb": 1440, "sst2": 1500}
FRESH = range(10, 15)
CHOSEN = {
    "finetune": "--dropout --warmup=0.1 --weight-lr=5e-05",
    "finetune --head=classifier": "--dropout --warmup=0 --weight-lr=5e-05",
    "magnitude --sparsity=0.5": "--dropout --hold=0.2 --ramp=0.5 --schedule=cubic --warmup=0 --weight-lr=0.0001",
    "magnitude --sparsity=0.9": "--no-dropout --hold=0 --ramp=0.9 --schedule=cubic --warmup=0.1 --weight-lr=0.0004",
    "movement --sparsity=0.5": "--no-dropout --hold=0.2 --ramp=0.9 --schedule=linear --warmup=0.1 --weight-lr=5e-05",
    "movement --sparsity=0.9": "--dropout --hold=0.2 --ramp=0.5 --schedule=linear --warmup=0 --weight-lr=0.0002",
    "soft-movement --sparsity=0.5": "--no-dropout --lr=0.01 --penalty=200 --warmup=0.1 --weight-lr=0.0002",
    "soft-movement --sparsity=0.9": "--no-dropout --lr=0.02 --penalty=1600 --warmup=0 --weight-lr=0.0002",
    "l0 --sparsity=0.5": "--no-dropout --lr=0.02 --penalty=200 --warmup=0 --weight-lr=5e-05",
    "l0 --sparsity=0.9": "--no-dropout --lr=0.02 --penalty=400 --warmup=0.1 --weight-lr=0.0004",
    "ticket --sparsity=0.5": "--no-dropout --warmup=0 --weight-lr=0.0002",
    "ticket --sparsity=0.9": "--no-dropout --warmup=0.1 --weight-lr=0.0001",
    "smp-l --sparsity=0.5": "--no-dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.7 --schedule=cubic --warmup=0.1",
    "smp-l --sparsity=0.9": "--dropout --hold=0 --lr=0.01 --penalty=400 --ramp=0.7 --schedule=linear --warmup=0",
    "smp-s --sparsity=0.5": "--dropout --hold=0 --lr=0.01 --penalty=400 --ramp=0.7 "
    "--schedule=cubic --temperature=1 --warmup=0.1",
    "smp-s --sparsity=0.9": "--dropout --hold=0 --lr=0.02 --penalty=800 --ramp=0.5 "
    "--schedule=linear --temperature=1 --warmup=0.1",
    "smp-w --sparsity=0.5": "--dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.9 "
    "--schedule=cubic --temperature=4 --warmup=0.1",
    "smp-w --sparsity=0.9": "--dropout --hold=0 --lr=0.02 --penalty=400 --ramp=0.5 "
    "--schedule=linear --temperature=1 --warmup=0.1",
    "smp-bias --sparsity=0.5": "--no-dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.9 "
    "--schedule=cubic --temperature=1 --warmup=0.1 --weight-lr=0.001",
    "smp-bias --sparsity=0.9": "--dropout --hold=0 --lr=0.04 --penalty=400 --ramp=0.5 "
    "--schedule=linear --temperature=1 --warmup=0.1 --weight-lr=0.0003",
    "smp-2:4 --sparsity=0.5": "--no-dropout --hold=0 --lr=0.02 --penalty=800 --ramp=0.5 --schedule=cubic --warmup=0.1",
}
TOGETHER = ("movies", "sst2")  # share sentences: in averages they count as one task


def tuned(task, method, sparsity=None):
    """What tuning found for a method at a sparsity, as flags."""
    if task == "ptb":
        return PTB[method, sparsity]
    return TUNED.get((method, sparsity), {}) | BY_TASK.get((task, method, sparsity), {})


def earlier(task, method, sparsity):
    """Flags that give `movies` its recipe of up to commit 7643b46, with which all lists but `main` were run."""
    if task != "movies":
        return {}
    flags = {"batch": 32, "dropout": True}
    if method.startswith("smp"):
        flags["penalty"] = 400
    else:
        flags["weight_lr"] = 3e-5
    if method in ("smp-s", "smp-w"):
        flags["temperature"] = 4 if sparsity is not None and sparsity <= 0.3 else 1
    return flags


def words(flags):
    """Flags as train.py takes them."""
    given = {name.replace("_", "-"): value for name, value in flags.items() if value is not None}
    switches = {True: "--{}", False: "--no-{}"}
    return [
        switches[v].format(name) if isinstance(v, bool) else f"--{name}={v}"
        for name, v in given.items()
    ]


def equal(task, row, seed, flags):
    """The arguments of a run with equal steps. row: a method, with its sparsity; flags: what is tuned, on one line."""
    return f"--task={task} --model=minilm --method={row} --steps={EQUAL_STEPS[task]} --seed={seed} {flags}"


def run(task, method, sparsity=None, seed=0, **flags):
    """The arguments of a run as one line, by which it is known."""
    given = {
        "task": task,
        "model": MODELS.get(task, "minilm"),
        "method": method,
        "sparsity": sparsity,
    }
    flags = earlier(task, method, sparsity) | flags
    return shlex.join(
        words(given | {"steps": STEPS[task], "seed": seed} | dict(sorted(flags.items())))
    )


def main_rows():
    """{arguments of a run: its row} of every method on every task with what tools.tune chose for it, by fresh seeds."""
    every = itertools.product(CHOSEN.items(), EQUAL_STEPS, FRESH)
    return {equal(task, row, seed, flags): row for (row, flags), task, seed in every}


def main():
    """Every method with the same budget of tuning and the same steps."""
    yield from main_rows()


def ablations():
    """Without the regularizer, with a fresh head, ranked together or by threshold; two tasks, three seeds."""
    for sparsity in SPARSITIES:  # whether movement needs more time than all others
        for settings in ({"hold": 0}, {"hold": 0.3}, MOVEMENT):
            yield run("sst2", "movement", sparsity, steps=4 * STEPS["sst2"], **settings)
        yield run("mrpc", "movement", sparsity, steps=4 * STEPS["mrpc"], **MOVEMENT)
    for task, seed, sparsity in itertools.product(("mrpc", "sst2"), range(3), SPARSITIES):
        for method in ("smp-s", "smp-l"):
            yield run(
                task, method, sparsity, seed, **tuned(task, method, sparsity) | {"penalty": 0}
            )
            yield run(
                task,
                method,
                sparsity,
                seed,
                **tuned(task, method, sparsity) | {"head": "classifier"},
            )
        for method in ("smp-g", "smp-t", "l0", "random"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
        yield run(task, "movement", sparsity, seed, penalty=400, weight_lr=1e-4)


def units():
    """P-pruning beside simpler choices of heads and neurons, SMP at the same share removed, and the dense model."""
    for task, seeds in (("movies", 3), ("mrpc", 3), ("sst2", 1), ("squad", 1)):
        for seed in range(seeds):
            yield run(task, "finetune", seed=seed, **tuned(task, "finetune"))
            for sparsity in (0.2, 0.4, 0.6):
                for method in ("p-pruning", "p-activation", "p-random"):
                    yield run(task, method, sparsity, seed, **tuned(task, "finetune"))
                yield run(task, "smp-s", sparsity, seed)


def curve():
    """Accuracy over sparsity of the default task, with what was tuned at 0.5, or from 0.8 on at 0.9."""
    for seed in range(3):
        yield run("movies", "finetune", seed=seed, **tuned("movies", "finetune"))
        for sparsity in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97):
            for method in ("smp-s", "movement", "magnitude"):
                flags = tuned("movies", method, 0.5 if sparsity < 0.8 else 0.9)
                yield run("movies", method, sparsity, seed, **flags)


def steps():
    """Accuracy over the number of steps, with the defaults: how many a mask needs, ranked by scores or by smp-w."""
    for seed, method, sparsity in itertools.product(range(3), ("smp-s", "smp-w"), SPARSITIES):
        for number in (40, 75, 150, 300, 598, 1196):
            yield run("movies", method, sparsity, seed, steps=number)


def rule():
    """smp-w on every task, with as many tuning runs as smp-s had on MRPC; that one is in `earlier`."""
    for task, seeds in SEEDS.items():
        for seed, sparsity in itertools.product(range(seeds), SPARSITIES):
            yield run(task, "smp-w", sparsity, seed, **tuned(task, "smp-w", sparsity))


def language():
    """GPT-2 on PTB: untouched; then, by seeds that tuning did not see, fine-tuned, with units gone before, masked."""
    yield run("ptb", "smp-l", 0.0, steps=1, batch=1)  # nothing is removed
    for seed, (method, sparsity) in itertools.product((1, 2, 3), PTB):
        yield run("ptb", method, sparsity, seed, **tuned("ptb", method, sparsity))


LISTS = {make.__name__: make for make in (main, ablations, units, curve, steps, rule, language)}
