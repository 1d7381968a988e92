"""What is run for the comparisons: lists of runs, and what tuning found. tools.experiments makes and shows them.

A run is known by the arguments of train.py. What is compared follows tables 1 to 3 of Jiang et al., ACL 2023.

    for arguments in LISTS["main"](): ...  # "--task=movies --model=minilm --method=finetune --steps=1196 --seed=0 ..."
"""

import itertools
import shlex

# Steps of MiniLM's runs, the same for all methods of a task: for GLUE a fifth to a half of the defaults.
STEPS = {"movies": 1196, "rte": 3120, "mrpc": 3450, "cola": 3216, "stsb": 3600, "sst2": 3159, "squad": 2870}
SEEDS = {"movies": 5, "rte": 5, "mrpc": 5, "cola": 5, "stsb": 5, "sst2": 3}
SPARSITIES = (0.5, 0.9)
COMPARED = ("magnitude", "movement", "soft-movement", "smp-l", "smp-s")

# What the list `tuning` found, by method and sparsity; for SMP with the paper's schedule, cubic without a warm-up.
MOVEMENT = {"weight_lr": 1e-4, "hold": 0.3, "schedule": "linear"}
TUNED = {
    ("finetune", None): {"weight_lr": 1e-4},
    ("magnitude", 0.5): {"weight_lr": 1e-4},
    ("magnitude", 0.9): {"weight_lr": 1e-4, "hold": 0.1},
    ("movement", 0.5): MOVEMENT,
    ("movement", 0.9): MOVEMENT,
}
TUNED |= {(method, sparsity): {"weight_lr": 1e-4} for method in ("soft-movement", "l0") for sparsity in SPARSITIES}
TUNED |= {(method, 0.5): {"lr": 4e-2} for method in ("smp-s", "smp-l", "smp-g")}
TUNED |= {(method, 0.9): {"lr": 1e-2} for method in ("smp-s", "smp-l", "smp-g")}
# What it prefers for SMP beyond that, by sparsity, on one seed.
SMP_MORE = {0.5: {"warmup": 0.1}, 0.9: {"schedule": "linear"}}
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


def tuned(task, method, sparsity=None):
    """What tuning found for a method at a sparsity, as flags."""
    return TUNED.get((method, sparsity), {}) | BY_TASK.get((task, method, sparsity), {})


def words(flags):
    """Flags as train.py takes them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]


def run(task, method, sparsity=None, seed=0, **flags):
    """The arguments of a run as one line, by which it is known."""
    given = {"task": task, "model": "minilm", "method": method, "sparsity": sparsity}
    return shlex.join(words(given | {"steps": STEPS[task], "seed": seed} | dict(sorted(flags.items()))))


def main():
    """Every method on every task, tuned, with equal steps."""
    for task, seeds in SEEDS.items():
        for seed in range(seeds):
            yield run(task, "finetune", seed=seed, **tuned(task, "finetune"))
            for method, sparsity in itertools.product(COMPARED, SPARSITIES):
                yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
            # What the others gained from, SMP may gain from too: on seed 0 of MRPC it does.
            for method, (sparsity, more) in itertools.product(("smp-l", "smp-s"), SMP_MORE.items()):
                yield run(task, method, sparsity, seed, **tuned(task, method, sparsity) | more)


def ablations():
    """Without the regularizer, with a fresh head, ranked together or by threshold; two tasks, three seeds."""
    for sparsity in SPARSITIES:  # whether movement needs more time than all others
        for settings in ({"hold": 0}, {"hold": 0.3}, MOVEMENT):
            yield run("sst2", "movement", sparsity, steps=4 * STEPS["sst2"], **settings)
        yield run("mrpc", "movement", sparsity, steps=4 * STEPS["mrpc"], **MOVEMENT)
    for task, seed, sparsity in itertools.product(("mrpc", "sst2"), range(3), SPARSITIES):
        for method in ("smp-s", "smp-l"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity) | {"penalty": 0})
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity) | {"head": "classifier"})
        for method in ("smp-g", "smp-t", "l0", "random"):
            yield run(task, method, sparsity, seed, **tuned(task, method, sparsity))
        yield run(task, "movement", sparsity, seed, penalty=400, weight_lr=1e-4)


def abandoned():
    """What tuning chose before: movement without its late start or its schedule, lambdas of another task."""
    for seed, (sparsity, penalty) in itertools.product(range(3), ((0.5, 25), (0.9, 100), (0.9, 400))):
        yield run("sst2", "l0", sparsity, seed, penalty=penalty, weight_lr=1e-4)
    everywhere = {0.5: [50], 0.9: [800]}  # lambdas of soft movement, without a warm-up
    own = {("movies", 0.5): [400], ("movies", 0.9): [6400], ("sst2", 0.5): [200]}
    for task, seeds in SEEDS.items():
        for seed, sparsity in itertools.product(range(seeds), SPARSITIES):
            yield run(task, "movement", sparsity, seed, lr=1e-3)
            yield run(task, "movement", sparsity, seed, hold=0.3, weight_lr=1e-4)
            for penalty in everywhere[sparsity] + own.get((task, sparsity), []):
                yield run(task, "soft-movement", sparsity, seed, penalty=penalty, weight_lr=1e-4)


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


RATE = {"weight_lr": (1e-4,)}
WARM = RATE | {"warmup": (0.1,)}
RATES = {"weight_lr": (3e-5, 1e-4)}
WARMUPS = {"weight_lr": (3e-5, 1e-4, 3e-4), "warmup": (0, 0.1)}
STSB = {"lr": (1e-2,), "seed": (0, 3)}  # where SMP-S is weak
OTHERS = "rte cola stsb sst2"
# Of each method its own knobs: tasks, methods, sparsities, and values of flags, all with all.
GRIDS = (
    ("mrpc", "finetune", (None,), WARMUPS),
    ("mrpc", "magnitude", SPARSITIES, WARMUPS),
    ("mrpc", "magnitude movement", SPARSITIES, RATES | {"hold": (0.1, 0.3)}),
    ("mrpc", "magnitude", SPARSITIES, RATE | {"hold": (0, 0.1, 0.3), "schedule": ("linear",)}),
    ("mrpc", "movement", SPARSITIES, WARMUPS | {"lr": (1e-3, 1e-2)}),
    ("mrpc", "movement", SPARSITIES, RATE | {"penalty": (50, 400)}),  # whether the regularizer is what it lacks
    ("mrpc", "movement", SPARSITIES, RATE | {"steps": (4 * STEPS["mrpc"],)}),
    ("movies", "movement", (0.5,), RATES | {"hold": (0, 0.3), "lr": (1e-3, 1e-2, 3e-2)}),
    ("movies", "movement", (0.3, 0.7, 0.8, 0.95, 0.97), RATE | {"hold": (0.3,), "seed": (0, 1, 2)}),
    ("mrpc movies", "movement", SPARSITIES, RATE | {"hold": (0.5,), "lr": (1e-2, 3e-2)}),
    ("mrpc movies", "movement", SPARSITIES, RATE | {"hold": (0.1, 0.3), "schedule": ("linear",), "seed": (0, 1, 2)}),
    ("mrpc", "soft-movement", SPARSITIES, RATES | {"penalty": (10, 50, 100, 400, 800, 1600)}),
    ("movies", "soft-movement", (0.5,), RATE | {"penalty": (50, 200, 400, 800, 1600)}),
    ("movies", "soft-movement", (0.9,), RATE | {"penalty": (800, 1600, 3200, 4800, 6400)}),
    ("movies", "soft-movement", (0.5,), WARM | {"penalty": (200, 400, 800)}),
    ("movies", "soft-movement", (0.5,), WARM | {"penalty": (400,), "seed": (1, 2, 3, 4)}),
    ("movies", "soft-movement", (0.9,), WARM | {"penalty": (800, 1600, 3200, 6400)}),
    (f"mrpc {OTHERS}", "soft-movement", (0.5,), WARM | {"penalty": (50, 100, 200, 400)}),
    (f"mrpc {OTHERS}", "soft-movement", (0.9,), WARM | {"penalty": (400, 800, 1600, 3200)}),
    ("mrpc cola stsb sst2", "soft-movement", (0.9,), WARM | {"penalty": (1200,)}),
    (OTHERS, "soft-movement", (0.5,), RATE | {"penalty": (50, 100, 200, 400)}),
    (OTHERS, "soft-movement", (0.9,), RATE | {"penalty": (800, 1200, 1600, 3200)}),
    ("mrpc", "l0", (0.5,), RATE | {"penalty": (10,)}),
    ("mrpc", "l0", SPARSITIES, RATE | {"penalty": (25, 50, 100, 400)}),
    ("mrpc", "l0", (0.5,), RATE | {"lr": (3e-2, 1e-1), "penalty": (50, 200)}),
    ("mrpc", "l0", (0.9,), RATE | {"lr": (3e-2, 1e-1), "penalty": (200, 800)}),
    ("mrpc", "l0", (0.5,), WARM | {"penalty": (25, 50)}),
    ("mrpc", "l0", (0.9,), WARM | {"penalty": (50, 100)}),
    ("sst2", "l0", (0.5,), RATE | {"penalty": (25, 50, 100, 200)}),
    ("sst2", "l0", (0.5,), WARM | {"penalty": (100,)}),
    ("sst2", "l0", (0.9,), RATE | {"penalty": (100, 200, 400, 800, 1600)}),
    ("sst2", "l0", (0.9,), WARM | {"penalty": (400, 800)}),
    ("mrpc", "smp-s", SPARSITIES, {"lr": (1e-2, 2e-2, 4e-2), "penalty": (100, 400)}),
    ("mrpc", "smp-s", SPARSITIES, {"lr": (1e-2, 4e-2), "schedule": ("linear",)}),
    ("mrpc", "smp-s", SPARSITIES, {"lr": (1e-2, 4e-2), "warmup": (0.1,)}),
    (f"movies {OTHERS}", "smp-s", (0.5,), {"lr": (1e-2, 2e-2)}),
    (f"movies {OTHERS}", "smp-s", (0.9,), {"lr": (5e-3, 2e-2)}),
    ("stsb", "smp-s", (0.9,), STSB | {"lr": (2e-2,)}),
    ("stsb", "smp-s", (0.9,), STSB | {"penalty": (100, 200, 800)}),
    ("stsb", "smp-s", (0.9,), STSB | {"ramp": (0.4, 0.8)}),
    ("stsb", "smp-s", (0.9,), STSB | {"hold": (0.1,)}),
    ("stsb", "smp-s", (0.9,), STSB | {"warmup": (0.1,)}),
    ("stsb", "smp-s", (0.9,), STSB | {"temperature": (4,)}),
)


def tuning():
    """What TUNED and BY_TASK were chosen from, with seed 0 if no other is named."""
    for tasks, methods, sparsities, grid in GRIDS:
        for task, method, sparsity in itertools.product(tasks.split(), methods.split(), sparsities):
            for values in itertools.product(*grid.values()):
                yield run(task, method, sparsity, **dict(zip(grid, values, strict=True)))


LISTS = {make.__name__: make for make in (main, ablations, units, curve, tuning, abandoned)}
