"""How well a detector does: precision, recall and F1 of spans, counted as seqeval does.

A span is right if its start, end and category are (Nakayama, seqeval, 2018):

    precision = right / found      recall = right / expected      F1 = their harmonic mean

Beside them stand those of overlapping spans, for which it is enough to touch one of that category.
The macro average is the mean over the categories that are there or found.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pii.labels import CATEGORIES, IGNORED
from training.ranks import Ranks


class Counts(NamedTuple):
    """What is counted of one category."""

    right: int = 0  # found with the right start and end
    found: int = 0  # by the detector
    expected: int = 0  # by the labels
    overlapped: int = 0  # of the expected, those that touch one found
    overlapping: int = 0  # of the found, those that touch one expected


def touches(span, others):
    """True if a span (start, end, ...) shares a character with one of the others."""
    return any(other[0] < span[1] and other[1] > span[0] for other in others)


def count_spans(expected, found):
    """{category: Counts} of two lists of spans or entities, which begin (start, end, category).

    What is found in a span to be ignored does not count.
    """
    ignored = [span for span in expected if span[2] in IGNORED]  # span: (start, end, category, ...)
    found = [span for span in found if not touches(span, ignored)]
    counts = {}
    for category in CATEGORIES:
        want = {span[:2] for span in expected if span[2] == category}  # {(start, end), ...}
        have = {span[:2] for span in found if span[2] == category}
        counts[category] = Counts(
            right=len(want & have),
            found=len(have),
            expected=len(want),
            overlapped=sum(touches(span, have) for span in want),
            overlapping=sum(touches(span, want) for span in have),
        )
    return counts


def score(counts):
    """{precision, recall, f1, overlap_..., support} of the `Counts` of a category."""

    # Of exact spans both are the same number. Of overlapping ones they differ: one that is found
    # may touch two that are expected.
    def rates(way, right_of_found, right_of_expected):
        precision = right_of_found / counts.found if counts.found else 0.0
        recall = right_of_expected / counts.expected if counts.expected else 0.0
        # By convention 0 if both are 0.
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return {f"{way}precision": precision, f"{way}recall": recall, f"{way}f1": f1}

    exact = rates("", counts.right, counts.right)
    overlap = rates("overlap_", counts.overlapping, counts.overlapped)
    return exact | overlap | {"support": int(counts.expected)}  # seqeval's name for it


def macro(rows):
    """The mean of the scores of some categories, and the sum of their support."""
    # Each category counts the same, however often it occurs.
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return mean | {"support": sum(row["support"] for row in rows)}


def scores(counts):
    """{category: its `score`} of {category: Counts}, and their mean as "macro".

    A category that is neither there nor found has no score.
    """
    table = {
        category: score(counted)
        for category, counted in counts.items()
        if counted.found or counted.expected  # else 0 / 0
    }
    return table | {"macro": macro(list(table.values()))} if table else {}


def evaluate_detector(find, documents, ranks=None, at_once=64, description="evaluating"):
    """The `scores` of a detector on documents as `read_labelled` gives them.

    find: from a list of texts to a list of entities for each. The documents are shared out over the
    ranks, which all get the scores of all.
    """
    ranks = ranks or Ranks()
    mine = documents[ranks.rank :: ranks.world_size]
    totals = np.zeros((len(CATEGORIES), len(Counts._fields)))  # one table, so one all-reduce
    begins = range(0, len(mine), at_once)
    for begin in tqdm(begins, description, leave=False, disable=ranks.rank != 0):
        part = mine[begin : begin + at_once]
        found = find([document.text for document in part])
        for document, entities in zip(part, found):
            totals += list(count_spans(document.spans, entities).values())  # in CATEGORIES' order
    rows = [Counts(*row) for row in ranks.sum(totals)]
    return scores(dict(zip(CATEGORIES, rows)))
