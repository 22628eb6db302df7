"""TODO."""

import numpy as np
from tqdm import tqdm

from pii.labels import CATEGORIES, IGNORED
from training.ranks import Ranks


def count_spans(expected, found, text=None):
    """{category: [right, found, expected, overlapped, overlapping]} of two lists of (start, end, category), counted as seqeval does.

    An entity is right where start, end and category are. overlapped: of the expected, those that one found of their category touches;
    overlapping: of the found, those that touch one expected. Found ones that touch an ignored one do not count.
    """
    ignored = [(s, e) for s, e, category in expected if category in IGNORED]
    found = [f for f in found if not any(s < f[1] and e > f[0] for s, e in ignored)]
    counts = {}
    for category in CATEGORIES:
        want, have = ({(s, e) for s, e, c in spans if c == category} for spans in (expected, found))
        touch = lambda a, others: any(s < a[1] and e > a[0] for s, e in others)
        counts[category] = np.array(
            [
                len(want & have),
                len(have),
                len(want),
                sum(touch(w, have) for w in want),
                sum(touch(h, want) for h in have),
            ]
        )
    return counts


def scores(counts):
    """{category: {precision, recall, f1, overlap_..., support}} of summed counts, and "macro", their mean.

    A category that is neither there nor found has no score, and is not in the mean.
    """
    table = {}
    ratio = lambda a, b: float(a / b) if b else 0.0
    for category, (right, found, expected, overlapped, overlapping) in counts.items():
        if not found and not expected:
            continue
        row = {"precision": ratio(right, found), "recall": ratio(right, expected)}
        row |= {
            "overlap_precision": ratio(overlapping, found),
            "overlap_recall": ratio(overlapped, expected),
            "support": int(expected),
        }
        for way in ("", "overlap_"):
            p, r = row[f"{way}precision"], row[f"{way}recall"]
            row[f"{way}f1"] = ratio(2 * p * r, p + r)
        table[category] = row
    if table:
        table["macro"] = {
            key: float(np.mean([row[key] for row in table.values()]))
            for key in next(iter(table.values()))
        }
        table["macro"]["support"] = sum(
            row["support"] for name, row in table.items() if name != "macro"
        )
    return table


def evaluate_detector(find, documents, ranks=None, at_once=64, description="evaluating"):
    """The `scores` of a function from texts to lists of entities, on documents as `read_labelled` gives them, shared out over the ranks."""
    ranks = ranks or Ranks()
    counts = {category: np.zeros(5) for category in CATEGORIES}
    mine = documents[ranks.rank :: ranks.world_size]
    for i in tqdm(
        range(0, len(mine), at_once), desc=description, leave=False, disable=ranks.rank != 0
    ):
        part = mine[i : i + at_once]
        for (_, expected), found in zip(part, find([text for text, _ in part])):
            for category, n in count_spans(expected, [tuple(e[:3]) for e in found]).items():
                counts[category] += n
    totals = np.array(ranks.sum(np.stack([counts[c] for c in CATEGORIES])))
    return scores(dict(zip(CATEGORIES, totals)))
