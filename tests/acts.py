"""The acts of train.py one by one, for tests that do something between them.

    args, run, job = prepared(argv)
    with run:
        train.learn(args, run, job)
        ...
        train.finish(args, run, job)
"""

from itertools import islice
from unittest import mock

import torch

import train
from plumbing.run import Run


def prepared(argv):
    """The first act of a command: -> its settings, its Run, and what prepare() got ready."""
    argv = [str(word) for word in argv]
    args = train.parse_args(argv)
    run = Run(args.out, argv)
    job = train.prepare(args, run)
    torch.manual_seed(args.seed)  # as main does, for dropout
    return args, run, job


def interrupt(argv, step):
    """Train up to a step, and no further, as if the process had ended there."""
    args, run, job = prepared(argv)
    stop_after(step, args, run, job)


def stop_after(step, args, run, job):
    """learn() of a new run, cut off after so many steps."""
    real = train.data.training_batches

    def batches(*args, **more):
        yield from islice(real(*args, **more), step)

    with run, mock.patch.object(train.data, "training_batches", batches):
        train.learn(args, run, job)
