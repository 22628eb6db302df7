"""Labelled documents: categories of personal data, and the labels that tokens get for them.

A file of labelled documents holds a line of JSON for each, in the layout of StarPII's data set:

    {"text": "# Ada Lovelace", "fragments": [{"category": "NAME", "position": [2, 14],
                                              "value": "Ada Lovelace"}]}

A classifier says something of each token, so the spans of characters become labels of tokens; with
six categories that makes 13 classes. `finetune/tokens.py` does that for any categories.
"""

from collections import Counter
from typing import NamedTuple

from finetune.records import read_records
from finetune.tokens import labels_for, token_labels

CATEGORIES = ("NAME", "EMAIL", "KEY", "PASSWORD", "IP_ADDRESS", "USERNAME")
LABELS = labels_for(CATEGORIES)  # O, B-NAME, I-NAME, ...

# Categories of the annotated set that are none here; a detector may find them or not.
IGNORED = frozenset(
    "EMAIL_EXAMPLE NAME_EXAMPLE USERNAME_EXAMPLE KEY_EXAMPLE PASSWORD_EXAMPLE IP_EXAMPLE "
    "AMBIGUOUS ID SSH_KEY".split()
)


class Entity(NamedTuple):
    """Something found in a text."""

    start: int  # in characters
    end: int  # behind the last
    category: str  # of CATEGORIES
    score: float  # the model's mean probability; 1 if a rule found it


class LabelledDocument(NamedTuple):
    """A text and what is to be found in it."""

    text: str
    spans: list  # of records.Span, sorted, without overlaps


def read_labelled(path, skipped=None):
    """[LabelledDocument, ...] of a file of JSON lines with `text` and `fragments`.

    skipped: a Counter for the fragments that are left out. Raises ValueError, which names the line,
    for what is no such document, and for an unknown category.
    """
    data = read_records(path, Counter() if skipped is None else skipped)
    if data.kind.target != "fragments":
        raise ValueError(f'{path}: lines of {data.kind}, not with "fragments"')
    documents = [LabelledDocument(*record.texts, record.target) for record in data.records]
    for number, document in enumerate(documents, 1):
        check_categories(document.spans, f"{path}:{number}")
    return documents


def check_categories(spans, place):
    """Raises ValueError, which names the place, for a category neither known nor ignored."""
    for span in spans:
        if span.category not in CATEGORIES and span.category not in IGNORED:
            known = ", ".join(CATEGORIES)
            raise ValueError(f"{place}: unknown category {span.category!r}; known: {known}")


def labels_of(offsets, spans):
    """(tokens,) int64: the number of each token's label, -100 in a span to be ignored.

    offsets: (tokens, 2), where each token begins and ends, in characters.
    """
    return token_labels(offsets, spans, LABELS, IGNORED)
