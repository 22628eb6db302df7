"""Labelled documents: categories, spans of characters, labels of tokens, windows of tokens.

A file of labelled documents holds a line of JSON for each, in the layout of StarPII's data set:

    {"text": "# Ada Lovelace", "fragments": [{"category": "NAME", "position": [2, 14],
                                              "value": "Ada Lovelace"}]}

A classifier says something of each token, so the spans of characters become labels of tokens, IOB2
(Ramshaw and Marcus, 1995): B-NAME begins a name, I-NAME goes on with it, O is nothing; with six
categories that makes 13 classes. A long text is cut into overlapping windows.
"""

import json
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

CATEGORIES = ("NAME", "EMAIL", "KEY", "PASSWORD", "IP_ADDRESS", "USERNAME")
LABELS = ["O"] + [f"{tag}-{category}" for category in CATEGORIES for tag in "BI"]  # O, B-NAME, ...
NO_LABEL = -100  # of a token that neither teaches nor counts, for PyTorch's cross-entropy

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


class Span(NamedTuple):
    """Where something is in a text, as its labels say."""

    start: int  # in characters
    end: int  # behind the last
    category: str  # of CATEGORIES or IGNORED


class LabelledDocument(NamedTuple):
    """A text and what is to be found in it."""

    text: str
    spans: list  # of Span, sorted, without overlaps


class Window(NamedTuple):
    """A part of the tokens of a text."""

    start: int  # what the model sees: tokens start to end - 1
    end: int
    first: int  # what it judges of these: tokens first to last - 1
    last: int


# Reading labelled documents.


def parse_document(line):
    """(text, [(Span, its "value" or None), ...]) of a line of JSON, the spans sorted.

    Raises ValueError, TypeError, KeyError, AttributeError or RecursionError for any other line.
    """
    record = json.loads(line)
    text = record["text"]
    text.encode()  # raises for half a surrogate pair
    fragments = []
    for fragment in record["fragments"]:
        span = Span(*fragment["position"], fragment["category"])
        if [type(field) for field in span] != [int, int, str]:  # a bool is no position
            raise TypeError
        fragments.append((span, fragment.get("value")))
    return text, sorted(fragments, key=lambda fragment: fragment[0][:2])


def check_categories(fragments, place):
    """Raises ValueError, which names the place, for a category neither known nor ignored."""
    for span, _ in fragments:
        if span.category not in CATEGORIES and span.category not in IGNORED:
            known = ", ".join(CATEGORIES)
            raise ValueError(f"{place}: unknown category {span.category!r}; known: {known}")


def usable_spans(text, fragments, skipped):
    """[Span, ...] of those fragments that fit their text and do not overlap one before."""
    spans = []
    for span, value in fragments:
        fits = 0 <= span.start < span.end <= len(text)
        if not fits or value not in (None, text[span.start : span.end]):
            skipped["fragments that do not fit their text"] += 1
        elif spans and span.start < spans[-1].end:
            skipped["fragments that overlap another"] += 1
        else:
            spans.append(span)
    return spans


def read_labelled(path, skipped=None):
    """[LabelledDocument, ...] of a file of JSON lines with `text` and `fragments`.

    skipped: a Counter for the fragments that are left out. Raises ValueError, which names the line,
    for what is no such document, and for an unknown category.
    """
    skipped = Counter() if skipped is None else skipped
    documents = []
    with open(path, "rb") as file:  # as bytes, so that bad UTF-8 is an error of its line
        for number, line in enumerate(file, 1):
            try:
                text, fragments = parse_document(line)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                # The expected layout helps more than the parser's own message.
                layout = '{"text", "fragments": [{"category", "position"}, ...]}'
                raise ValueError(f"{path}:{number}: not a line of {layout}") from None
            check_categories(fragments, f"{path}:{number}")
            documents.append(LabelledDocument(text, usable_spans(text, fragments, skipped)))
    if not documents:
        raise ValueError(f"{path}: empty")
    return documents


# From spans to what a model is trained on.


def labels_of(offsets, spans):
    """(tokens,) int64: the number of each token's label, NO_LABEL in a span to be ignored.

    offsets: (tokens, 2), where each token begins and ends, in characters. A token that shares but
    one character with a span belongs to it.
    """
    labels = np.zeros(len(offsets), np.int64)
    for start, end, category in spans:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))  # token numbers
        if category in IGNORED:
            labels[inside] = NO_LABEL
        elif len(inside):  # else no token covers the span
            labels[inside] = LABELS.index(f"I-{category}")
            labels[inside[0]] = LABELS.index(f"B-{category}")
    return labels


def windows(length, room):
    """[Window, ...] of up to `room` tokens over a text of `length` tokens.

    Neighbours overlap by a quarter of `room` and hand over in the middle of it. So each token is
    judged in one window, and away from its edges, where the model sees less context.

    >>> for window in windows(20, 12): print(window)
    Window(start=0, end=12, first=0, last=10)
    Window(start=8, end=20, first=10, last=20)
    """
    step = room - room // 4
    # The last window ends with the text, so that it is full too.
    starts = [0]
    while starts[-1] + room < length:
        starts.append(min(starts[-1] + step, length - room))
    # Neighbours hand over in the middle of their overlap.
    meetings = [(left + room + right) // 2 for left, right in zip(starts, starts[1:])]
    edges = [0, *meetings, length]
    return [
        Window(start, min(start + room, length), first, last)
        for start, first, last in zip(starts, edges, edges[1:])
    ]


class LabelledWindows:
    """The windows of labelled documents: [i] -> (ids, labels), two int64 arrays of equal length.

    Each begins with <cls> and ends with <sep>, which have no label.
    """

    def __init__(self, documents, tokenizer, max_length):
        self.cls_id = tokenizer.cls_id
        self.sep_id = tokenizer.sep_id
        self.tokens = []  # of each document: (ids, labels), in small types, as they stay in memory
        self.places = []  # of each window: (the document's number, Window)
        few = len(documents) < 1000  # too quick for a bar
        bar = tqdm(documents, "tokenizing", unit=" documents", leave=False, disable=few)
        for number, (text, spans) in enumerate(bar):
            ids = np.array(tokenizer.encode(text), np.int32)
            offsets = np.array(tokenizer.offsets(text), np.int64).reshape(-1, 2)
            self.tokens.append((ids, labels_of(offsets, spans).astype(np.int16)))
            if len(ids):  # an empty text has no window to learn from
                self.places += [(number, window) for window in windows(len(ids), max_length - 2)]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        number, window = self.places[i]
        part = slice(window.start, window.end)
        ids, labels = self.tokens[number]
        return (
            np.concatenate([[self.cls_id], ids[part], [self.sep_id]], dtype=np.int64),  # (tokens,)
            np.concatenate([[NO_LABEL], labels[part], [NO_LABEL]], dtype=np.int64),  # (tokens,)
        )


def pack(sequences, device):
    """Arrays laid end to end, as a model takes them: (T,) int64 and cu_seqlens (B+1,) int32."""
    ends = np.cumsum([0] + [len(sequence) for sequence in sequences]).astype(np.int32)  # (B + 1,)
    tokens = torch.from_numpy(np.concatenate(sequences))  # (T,)
    return tokens.to(device), torch.from_numpy(ends).to(device)
