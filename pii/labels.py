"""TODO."""

import json
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

CATEGORIES = ("NAME", "EMAIL", "KEY", "PASSWORD", "IP_ADDRESS", "USERNAME")


LABELS = ["O"] + [
    f"{tag}-{category}" for category in CATEGORIES for tag in "BI"
]  # the class of a token


class Entity(NamedTuple):
    """Something found in a text."""

    start: int  # in characters
    end: int
    category: str  # of CATEGORIES
    score: float  # the model's mean probability; 1 where a rule found it


class Span(NamedTuple):
    """Where an entity is said to be in a text."""

    start: int  # in characters
    end: int
    category: str


# Categories of the annotated set that are no category here. They neither teach nor count.
IGNORED = set(
    "EMAIL_EXAMPLE NAME_EXAMPLE USERNAME_EXAMPLE KEY_EXAMPLE PASSWORD_EXAMPLE IP_EXAMPLE AMBIGUOUS ID SSH_KEY".split()
)


def read_labelled(path, skipped=None):
    """[(text, [(start, end, category), ...]), ...] of a file of JSON lines with `text` and `fragments`, sorted by their start.

    skipped: a Counter for fragments that are left out: out of range, not what their `value` says, overlapping one before.
    Raises ValueError that names the line for what is not such a document, and for a category that is neither known nor to be ignored.
    """
    skipped, documents = Counter() if skipped is None else skipped, []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                text, spans = record["text"], []
                text.encode()  # half a surrogate pair is no text
                fragments = [
                    (*fragment["position"], fragment["category"], fragment.get("value"))
                    for fragment in record["fragments"]
                ]
                if not all(
                    list(map(type, fragment[:-1])) == [int, int, str] for fragment in fragments
                ):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(
                    f'{path}:{number}: not a line of {{"text", "fragments": [{{"category", "position"}}, ...]}}'
                ) from None
            for start, end, category, value in sorted(fragments, key=lambda fragment: fragment[:2]):
                if category not in CATEGORIES and category not in IGNORED:
                    raise ValueError(
                        f"{path}:{number}: unknown category {category!r}; known: {', '.join(CATEGORIES)}"
                    )
                if (
                    not 0 <= start < end <= len(text)
                    or value is not None
                    and text[start:end] != value
                ):
                    skipped["fragments that do not fit their text"] += 1
                elif spans and start < spans[-1][1]:
                    skipped["fragments that overlap another"] += 1
                else:
                    spans.append((start, end, category))
            documents.append((text, spans))
    if not documents:
        raise ValueError(f"{path}: empty")
    return documents


def labels_of(offsets, spans):
    """(tokens,) int64: the label of each token, -100 where a category is ignored. offsets: (tokens, 2); spans: sorted, without overlaps."""
    labels = np.zeros(len(offsets), np.int64)
    for start, end, category in spans:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if category in IGNORED:
            labels[inside] = -100
        elif len(inside):
            labels[inside] = LABELS.index(f"I-{category}")
            labels[inside[0]] = LABELS.index(f"B-{category}")
    return labels


class LabelledWindows:
    """The windows of labelled documents, as `[i] -> (ids, labels)`: int64 arrays with <cls> and <sep>, which have no label."""

    def __init__(self, documents, tokenizer, max_length):
        self.documents, self.places, room = [], [], max_length - 2
        for text, spans in tqdm(
            documents,
            desc="tokenizing",
            unit=" documents",
            leave=False,
            disable=len(documents) < 1000,
        ):
            ids, offsets = (
                np.array(tokenizer.encode(text), np.int32),
                np.array(tokenizer.offsets(text), np.int64).reshape(-1, 2),
            )
            self.places += [
                (len(self.documents), start, end)
                for start, end, _, _ in windows(len(ids), room)
                if end > start
            ]
            self.documents.append((ids, labels_of(offsets, spans).astype(np.int16)))
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        d, start, end = self.places[i]
        ids, labels = (array[start:end].astype(np.int64) for array in self.documents[d])
        return np.concatenate([[self.cls_id], ids, [self.sep_id]]), np.concatenate(
            [[-100], labels, [-100]]
        )


def windows(length, room):
    """Overlapping windows over a text of `length` tokens, of up to `room` each: [(start, end, first, last), ...].

    Each token is judged in one of them, that with first <= token < last. Neighbours overlap by a quarter of `room`, and meet in its middle.

    >>> windows(20, 12)
    [(0, 12, 0, 10), (8, 20, 10, 20)]
    """
    overlap = room // 4
    starts = [0]
    while starts[-1] + room < length:
        starts.append(min(starts[-1] + room - overlap, length - room))
    meet = [0] + [(a + room + b) // 2 for a, b in zip(starts, starts[1:])] + [length]
    return [
        (start, min(start + room, length), first, last)
        for start, first, last in zip(starts, meet, meet[1:])
    ]


def pack(sequences, device):
    """(T,) int64 and cu_seqlens (B+1,) int32 of arrays laid end to end."""
    lengths = np.cumsum([0] + [len(s) for s in sequences]).astype(np.int32)
    return torch.from_numpy(np.concatenate(sequences)).to(device), torch.from_numpy(lengths).to(
        device
    )
