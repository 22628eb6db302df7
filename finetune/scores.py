"""Figures on held-out examples: 1 is the best, but for the squared error.

References: Voorhees, 1999 (reciprocal ranks); Husain et al., CodeSearchNet, 2019 (a function among
999 others); Nakayama, seqeval, 2018 (F1 of spans).
"""

import numpy as np

POOL = 1000  # candidates among which a query finds its code


def prefixed(name, figures):
    """{"accuracy": 0.5} as {"majority_accuracy": 0.5}."""
    return {f"{name}_{key}": value for key, value in figures.items()}


def f1(right, found, expected):
    """The harmonic mean of precision and recall; 0 if nothing is found or expected."""
    return 2 * right / (found + expected) if found + expected else 0.0


def class_scores(truth, predicted):
    """Accuracy and macro F1 of classes: bool arrays (n, C), which classes each example has.

    Accuracy asks for all classes of an example. The macro F1 is the mean over the classes that
    some example has.
    """
    right = (truth & predicted).sum(0)  # (C,)
    values = [f1(*counts) for counts in zip(right, predicted.sum(0), truth.sum(0)) if counts[2]]
    return {
        "accuracy": float((truth == predicted).all(1).mean()),
        "macro_f1": float(np.mean(values)) if values else 0.0,
    }


def number_scores(truth, predicted):
    """Spearman's rank correlation and the mean squared error of two arrays (n,)."""
    return {
        "spearman": correlation(ranks_of(truth), ranks_of(predicted)),
        "mse": float(np.mean((truth - predicted) ** 2)),
    }


def ranks_of(values):
    """The rank of each value, from 0; equal ones share the mean of theirs.

    >>> ranks_of(np.array([3, 1, 3, 2])).tolist()
    [2.5, 0.0, 2.5, 1.0]
    """
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


def correlation(a, b):
    """Pearson's; 0 if one of the arrays is constant."""
    a = a - a.mean()
    b = b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def span_counts(expected, found, categories):
    """(categories, 3) of exact spans: right, found and expected.

    expected, found: a list of `records.Span` for each text.
    """
    counts = np.zeros((len(categories), 3))
    for row, category in zip(counts, categories):
        want = places_of(expected, category)
        have = places_of(found, category)
        row += len(want & have), len(have), len(want)
    return counts


def places_of(texts, category):
    """{(number of the text, start, end), ...} of the spans of a category."""
    return {
        (number, span.start, span.end)
        for number, spans in enumerate(texts)
        for span in spans
        if span.category == category
    }


def span_scores(counts, categories):
    """F1 of exact spans: of each category that is there or found, and their mean as "f1"."""
    values = {f"f1/{category}": f1(*row) for category, row in zip(categories, counts) if any(row)}
    return {"f1": float(np.mean(list(values.values()))) if values else 0.0} | values


def search_scores(places):
    """Figures of search. places: (n,), the place of the right code for each query, from 1."""
    return {
        "mrr": float(np.mean(1 / places)),
        "recall@1": float(np.mean(places <= 1)),
        "recall@10": float(np.mean(places <= 10)),
    }


def pools(count):
    """Ranges of POOL candidates each, out of `count`; what is left over is in none.

    With fewer than POOL there is one pool, of all.
    """
    if count < POOL:
        return [range(count)]
    return [range(at, at + POOL) for at in range(0, count - POOL + 1, POOL)]


def place_of_right(similarities):
    """(n,) the place of each query's own code, from 1. similarities: (n queries, n codes).

    Code that is equally similar shares the places: half of it counts as better. A query whose own
    similarity is NaN, as of a model that has diverged, has the last place.
    """
    own = np.diagonal(similarities)[:, None]
    worse = (similarities < own).sum(1)
    equal = np.maximum((similarities == own).sum(1) - 1, 0)  # NaN does not even equal itself
    return len(similarities) - worse - equal / 2
