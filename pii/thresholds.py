"""From which score on a finding is reported: a threshold for each category, found on held-out data.

    thresholds.json, beside the model:
        {"KEY": {"threshold": 0.7, "scores": [0.02, ..., 0.99]}, ...}

`threshold` is what a category is reported from by default. `scores` are those that the model gave
to n true entities of the validation, in order; one that it did not find has the score 0. By them
`for_recall` finds a threshold that keeps a share of all entities, not only of these n: if another
one comes from where these came from, its score is as likely in any of the n + 1 gaps between them.
So it is below the k-th lowest with a probability of at most k / (n + 1), whatever the model is.

Reference: Vovk, Gammerman & Shafer, Algorithmic learning in a random world, 2005 (split conformal
prediction).
"""

import json
import os

import numpy as np

from common.files import read_json, write_whole
from pii.labels import CATEGORIES

FILE = "thresholds.json"
DEFAULT = 0.5  # of a model without that file
MOST_SCORES = 1000  # of a category, to be kept
MOST_FALSE = 1.0  # false alarms in 1,000 lines of ordinary code
LEAST_PRECISION = 0.9  # on the validation
LEAST_THRESHOLD = 0.1


def for_recall(scores, recall):
    """The threshold that keeps a share `recall` of a category's entities; 0 if none is sure to.

    recall: above 0, at most 1. scores: of n true entities. Of all entities like them at least
    `recall` score that much or more, on average over the choice of the n.

    >>> for_recall([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0.8)
    0.2
    """
    k = int((len(scores) + 1) * (1 - recall) + 1e-9)  # 1e-9: 10 * (1 - 0.8) is below 2
    return sorted(scores)[k - 1] if k else 0.0


def precise_threshold(right, wrong):
    """The lowest threshold with LEAST_PRECISION. right, wrong: scores of what was found so."""
    for threshold in np.arange(LEAST_THRESHOLD, 1.0, 0.01).round(2).tolist():
        kept = sum(score >= threshold for score in right)
        if kept >= LEAST_PRECISION * (kept + sum(score >= threshold for score in wrong)):
            return threshold
    return 1.0


def with_few_alarms(thresholds, scores, most):
    """{group: threshold}, raised so that at most `most` of all false alarms are left.

    scores: {group: those of its false alarms}. Each group may keep at most `each` of them, and
    `each` is the largest number for which all together are at most `most`.
    """
    scores = {
        group: sorted((score for score in of_one if score >= thresholds[group]), reverse=True)
        for group, of_one in scores.items()
    }
    each = max(most, 0)
    while each and sum(min(len(of_one), each) for of_one in scores.values()) > most:
        each -= 1
    raised = {}
    for group, of_one in scores.items():
        # Just above the best one that is too many.
        too_many = of_one[each] + 1e-4 if len(of_one) > each else 0.0
        raised[group] = round(max(thresholds[group], float(too_many)), 4)
    return raised


def write_thresholds(directory, thresholds, scores):
    """Writes thresholds.json. Both: by category."""
    table = {}
    for category in CATEGORIES:
        ordered = sorted(scores.get(category, []))
        # Every n-th keeps their distribution.
        kept = ordered[:: len(ordered) // MOST_SCORES + 1]
        table[category] = {"threshold": thresholds[category], "scores": kept}
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
    write_whole(os.path.join(directory, FILE), f"{{{lines}}}\n")


def read_thresholds(directory, recall=None):
    """{category: threshold} of a detector's directory. recall: the share to be kept, or None.

    Raises ValueError for a damaged file, and for a recall that nothing was measured for.
    """
    path = os.path.join(directory, FILE)
    if not os.path.exists(path):
        if recall is not None:
            raise ValueError(f"--recall needs {path}, which `python -m pii train` writes")
        return dict.fromkeys(CATEGORIES, DEFAULT)
    table = read_json(path, dict)
    try:
        if recall is None:
            return {category: checked(table[category]["threshold"]) for category in CATEGORIES}
        return {
            category: for_recall([checked(score) for score in table[category]["scores"]], recall)
            for category in CATEGORIES
        }
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: no thresholds of a detector; train it again") from None


def checked(score):
    """A score or a threshold as a float. Raises TypeError or ValueError if it is none."""
    # With NaN, nothing would ever be found. `with_few_alarms` may go just above 1.
    if not 0 <= float(score) <= 1.001:
        raise ValueError(f"{score} is no probability")
    return float(score)
