"""GLUE's metrics: (predicted classes or scores [N], true ones [N]) -> a number.

    METRICS["accuracy"](predicted, true)
"""

import numpy as np


def accuracy(predicted, true):
    return float((predicted == true).mean())


def f1(predicted, true):
    """F1 of class 1; 0 when there is no true positive."""
    hits = ((predicted == 1) & (true == 1)).sum()  # true positives
    return float(2 * hits / max((predicted == 1).sum() + (true == 1).sum(), 1))


def correlation(predicted, true):
    """Pearson's r, which for two classes is Matthews' coefficient; 0 when one side is constant."""
    p = predicted - predicted.mean()
    t = true - true.mean()
    spread = np.sqrt((p * p).sum() * (t * t).sum())
    return float((p * t).sum() / spread) if spread else 0.0


def ranks(values):
    """Ranks from 1; equal values share their mean rank."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)  # at: place of each value among them
    return (counts.cumsum() - (counts - 1) / 2)[at]


def spearman(predicted, true):
    return correlation(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": correlation, "pearson": correlation, "spearman": spearman}
