"""Lists of runs for the comparisons, and the settings that tuning found.

tools.experiments makes these runs and shows the lists. A run is identified by the arguments of
train.py. The comparisons follow tables 1 to 3 of Jiang et al., ACL 2023. Three lists are only
records and not generated here: lines of results/runs.jsonl name `tuning`, `abandoned` and
`earlier`, a comparison from before all methods had the same budget. Most lists but `main` use
settings that `tuning` found.

    for arguments in LISTS["main"]():
        ...  # "--task=movies --model=minilm --method=finetune --steps=1196 --seed=10 ..."
"""

import itertools
import shlex

# Steps in all lists but `main`, the same for all methods of a task. On GLUE they are a fifth to a
# half of the defaults.
STEPS = {
    "movies": 1196,
    "rte": 3120,
    "mrpc": 3450,
    "cola": 3216,
    "stsb": 3600,
    "sst2": 3159,
    "squad": 2870,
    "ptb": 820,  # ten epochs
}
# Every other task uses minilm. results/README.md says how the stand-in for GPT-2 is made.
MODELS = {"ptb": "standin"}
SEEDS = {"movies": 5, "rte": 5, "mrpc": 5, "cola": 5, "stsb": 5, "sst2": 3}
SPARSITIES = (0.5, 0.9)

# What tuning found for each method and sparsity. SMP has the paper's schedule: cubic, no warm-up.
MOVEMENT = {"weight_lr": 1e-4, "hold": 0.3, "schedule": "linear"}
TUNED = {
    ("finetune", None): {"weight_lr": 1e-4},
    ("magnitude", 0.5): {"weight_lr": 1e-4},
    ("magnitude", 0.9): {"weight_lr": 1e-4, "hold": 0.1},
    ("movement", 0.5): MOVEMENT,
    ("movement", 0.9): MOVEMENT,
}
for method, sparsity in itertools.product(("soft-movement", "l0"), SPARSITIES):
    TUNED[method, sparsity] = {"weight_lr": 1e-4}
for method in ("smp-s", "smp-l", "smp-g"):
    TUNED[method, 0.5] = {"lr": 4e-2}
    TUNED[method, 0.9] = {"lr": 1e-2}
TUNED["smp-w", 0.5] = {"lr": 4e-2, "warmup": 0.1}
TUNED["smp-w", 0.9] = {"lr": 1e-2, "warmup": 0.1}

# Soft movement and l0 keep a share of the weights that depends on the task, so their penalty must
# depend on it too.
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

# For language models: the best of five settings per method and sparsity on seed 0, by the
# perplexity of validation text.
PTB = {("finetune", None): {"weight_lr": 1e-3}}
for key in itertools.product(("p-pruning", "p-activation", "p-random"), (0.3, 0.5)):
    PTB[key] = {"weight_lr": 1e-3}
PTB["smp-s", 0.2] = {"lr": 0.1, "penalty": 0}
PTB["smp-s", 0.5] = {"penalty": 0}

# The list `main` gives every method the same budget: the same steps, fresh seeds that were not used
# for tuning, and for each row the flags that tools.tune chose.
EQUAL_STEPS = {"movies": 1196, "mrpc": 1380, "cola": 1340, "stsb": 1440, "sst2": 1500}
FRESH = range(10, 15)
CHOSEN = {
    "finetune": "--dropout --warmup=0.1 --weight-lr=5e-05",
    "finetune --head=classifier": "--dropout --warmup=0 --weight-lr=5e-05",
    "magnitude --sparsity=0.5": (
        "--dropout --hold=0.2 --ramp=0.5 --schedule=cubic --warmup=0 --weight-lr=0.0001"
    ),
    "magnitude --sparsity=0.9": (
        "--no-dropout --hold=0 --ramp=0.9 --schedule=cubic --warmup=0.1 --weight-lr=0.0004"
    ),
    "movement --sparsity=0.5": (
        "--no-dropout --hold=0.2 --ramp=0.9 --schedule=linear --warmup=0.1 --weight-lr=5e-05"
    ),
    "movement --sparsity=0.9": (
        "--dropout --hold=0.2 --ramp=0.5 --schedule=linear --warmup=0 --weight-lr=0.0002"
    ),
    "soft-movement --sparsity=0.5": (
        "--no-dropout --lr=0.01 --penalty=200 --warmup=0.1 --weight-lr=0.0002"
    ),
    "soft-movement --sparsity=0.9": (
        "--no-dropout --lr=0.02 --penalty=1600 --warmup=0 --weight-lr=0.0002"
    ),
    "l0 --sparsity=0.5": "--no-dropout --lr=0.02 --penalty=200 --warmup=0 --weight-lr=5e-05",
    "l0 --sparsity=0.9": "--no-dropout --lr=0.02 --penalty=400 --warmup=0.1 --weight-lr=0.0004",
    "ticket --sparsity=0.5": "--no-dropout --warmup=0 --weight-lr=0.0002",
    "ticket --sparsity=0.9": "--no-dropout --warmup=0.1 --weight-lr=0.0001",
    "smp-l --sparsity=0.5": (
        "--no-dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.7 --schedule=cubic --warmup=0.1"
    ),
    "smp-l --sparsity=0.9": (
        "--dropout --hold=0 --lr=0.01 --penalty=400 --ramp=0.7 --schedule=linear --warmup=0"
    ),
    "smp-s --sparsity=0.5": (
        "--dropout --hold=0 --lr=0.01 --penalty=400 --ramp=0.7 --schedule=cubic "
        "--temperature=1 --warmup=0.1"
    ),
    "smp-s --sparsity=0.9": (
        "--dropout --hold=0 --lr=0.02 --penalty=800 --ramp=0.5 --schedule=linear "
        "--temperature=1 --warmup=0.1"
    ),
    "smp-w --sparsity=0.5": (
        "--dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.9 --schedule=cubic "
        "--temperature=4 --warmup=0.1"
    ),
    "smp-w --sparsity=0.9": (
        "--dropout --hold=0 --lr=0.02 --penalty=400 --ramp=0.5 --schedule=linear "
        "--temperature=1 --warmup=0.1"
    ),
    "smp-bias --sparsity=0.5": (
        "--no-dropout --hold=0 --lr=0.04 --penalty=800 --ramp=0.9 --schedule=cubic "
        "--temperature=1 --warmup=0.1 --weight-lr=0.001"
    ),
    "smp-bias --sparsity=0.9": (
        "--dropout --hold=0 --lr=0.04 --penalty=400 --ramp=0.5 --schedule=linear "
        "--temperature=1 --warmup=0.1 --weight-lr=0.0003"
    ),
    "smp-2:4 --sparsity=0.5": (
        "--no-dropout --hold=0 --lr=0.02 --penalty=800 --ramp=0.5 --schedule=cubic --warmup=0.1"
    ),
}
TOGETHER = ("movies", "sst2")  # they share sentences, so averages count them as one task


def tuned(task, method, sparsity=None):
    """Return the flags {name: value} that tuning found for a method at a sparsity."""
    if task == "ptb":
        return PTB[method, sparsity]
    return TUNED.get((method, sparsity), {}) | BY_TASK.get((task, method, sparsity), {})


def earlier_recipe(task, method, sparsity):
    """Return the flags that restore the recipe `movies` had until commit 7643b46.

    All lists but `main` were run with it.
    """
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


def as_flags(flags):
    """Write flags as train.py takes them.

    {"weight_lr": 1e-4, "dropout": False, "lr": None} -> ["--weight-lr=0.0001", "--no-dropout"]
    """
    found = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        if value is True:
            found.append(f"--{name}")
        elif value is False:
            found.append(f"--no-{name}")
        elif value is not None:
            found.append(f"--{name}={value}")
    return found


def main_run(task, row, seed, flags):
    """Write the arguments of a run of `main`.

    row: a method with its sparsity. flags: its tuned flags on one line.
    """
    steps = EQUAL_STEPS[task]
    return f"--task={task} --model=minilm --method={row} --steps={steps} --seed={seed} {flags}"


def run(task, method, sparsity=None, seed=0, **flags):
    """Write the arguments of a run of any other list on one line, which identifies the run."""
    given = {
        "task": task,
        "model": MODELS.get(task, "minilm"),
        "method": method,
        "sparsity": sparsity,
        "steps": STEPS[task],
        "seed": seed,
    }
    flags = earlier_recipe(task, method, sparsity) | flags
    return shlex.join(as_flags(given | dict(sorted(flags.items()))))


def main_rows():
    """Map the arguments of each run of `main` to its row: all methods, tasks and fresh seeds."""
    rows = {}
    for (row, flags), task, seed in itertools.product(CHOSEN.items(), EQUAL_STEPS, FRESH):
        rows[main_run(task, row, seed, flags)] = row
    return rows


# --- the lists --------------------------------------------------------------------------------


def main():
    """Every method, with the same tuning budget and the same steps."""
    yield from main_rows()


def ablations():
    """No regularizer, a fresh head, one ranking for all weights, a threshold.

    All on two tasks and three seeds.
    """
    for sparsity in SPARSITIES:  # does movement need more steps than the others?
        for settings in ({"hold": 0}, {"hold": 0.3}, MOVEMENT):
            yield run("sst2", "movement", sparsity, steps=4 * STEPS["sst2"], **settings)
        yield run("mrpc", "movement", sparsity, steps=4 * STEPS["mrpc"], **MOVEMENT)
    for task, seed, sparsity in itertools.product(("mrpc", "sst2"), range(3), SPARSITIES):
        for method in ("smp-s", "smp-l"):
            flags = tuned(task, method, sparsity)
            yield run(task, method, sparsity, seed, **flags | {"penalty": 0})
            yield run(task, method, sparsity, seed, **flags | {"head": "classifier"})
        for method in ("smp-g", "smp-t", "l0", "random"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
        yield run(task, "movement", sparsity, seed, penalty=400, weight_lr=1e-4)


def units():
    """P-pruning, simpler choices of heads and neurons, SMP at the same sparsity, and dense."""
    for task, seeds in (("movies", 3), ("mrpc", 3), ("sst2", 1), ("squad", 1)):
        for seed in range(seeds):
            yield run(task, "finetune", seed=seed, **tuned(task, "finetune"))
            for sparsity in (0.2, 0.4, 0.6):
                for method in ("p-pruning", "p-activation", "p-random"):
                    yield run(task, method, sparsity, seed, **tuned(task, "finetune"))
                yield run(task, "smp-s", sparsity, seed)


def curve():
    """Accuracy over sparsity on movies, with the settings for 0.5, or for 0.9 from 0.8 on."""
    for seed in range(3):
        yield run("movies", "finetune", seed=seed, **tuned("movies", "finetune"))
        for sparsity in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97):
            for method in ("smp-s", "movement", "magnitude"):
                flags = tuned("movies", method, 0.5 if sparsity < 0.8 else 0.9)
                yield run("movies", method, sparsity, seed, **flags)


def steps():
    """Accuracy over the number of steps with the defaults: how many do smp-s and smp-w need?"""
    for seed, method, sparsity in itertools.product(range(3), ("smp-s", "smp-w"), SPARSITIES):
        for number in (40, 75, 150, 300, 598, 1196):
            yield run("movies", method, sparsity, seed, steps=number)


def rule():
    """smp-w on every task, after as many tuning runs as smp-s had on MRPC (in `earlier`)."""
    for task, seeds in SEEDS.items():
        for seed, sparsity in itertools.product(range(seeds), SPARSITIES):
            yield run(task, "smp-w", sparsity, seed, **tuned(task, "smp-w", sparsity))


def language():
    """GPT-2 on PTB: untouched, fine-tuned, without some heads and neurons, masked.

    The seeds were not used for tuning.
    """
    yield run("ptb", "smp-l", 0.0, steps=1, batch=1)  # untouched: no weight is removed
    for seed, (method, sparsity) in itertools.product((1, 2, 3), PTB):
        yield run("ptb", method, sparsity, seed, **tuned("ptb", method, sparsity))


LISTS = {make.__name__: make for make in (main, ablations, units, curve, steps, rule, language)}
