"""Tasks on pieces of a text: which tokens are a name, a key, or whatever the fragments say.

A classifier says something of each token, so the spans of characters become labels of tokens, IOB2
(Ramshaw and Marcus, 1995): B-NAME begins a name, I-NAME goes on with it, O is nothing. A long text
is cut into overlapping windows.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from finetune.batches import batch_of, through_model
from finetune.records import Span
from finetune.scores import span_counts, span_scores
from finetune.task import Task
from starencoder import StarEncoderForTokenClassification

NO_LABEL = -100  # of a token that neither teaches nor counts, for PyTorch's cross-entropy


class TokenWindow(NamedTuple):
    """A part of the tokens of a text."""

    start: int  # what the model sees: tokens start to end - 1
    end: int
    first: int  # what it judges of these: tokens first to last - 1
    last: int


def labels_for(categories):
    """["O", "B-NAME", "I-NAME", ...] of ["NAME", ...]."""
    return ["O"] + [f"{tag}-{category}" for category in categories for tag in "BI"]


def token_labels(offsets, spans, labels, ignored=()):
    """(tokens,) int64: the number of each token's label, NO_LABEL in a span to be ignored.

    offsets: (tokens, 2), where each token begins and ends, in characters. A token that shares
    even one character with a span belongs to it. ignored: categories without a label.
    """
    numbers = np.zeros(len(offsets), np.int64)
    for start, end, category in spans:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))  # token numbers
        if category in ignored:
            numbers[inside] = NO_LABEL
        elif len(inside):  # else no token covers the span
            numbers[inside] = labels.index(f"I-{category}")
            numbers[inside[0]] = labels.index(f"B-{category}")
    return numbers


def token_windows(length, room):
    """[TokenWindow, ...] of up to `room` tokens over a text of `length` tokens.

    Neighbours overlap by a quarter of `room` and hand over in the middle of it. So each token is
    judged in one window, and away from its edges, where the model sees less context.

    >>> for window in token_windows(20, 12): print(window)
    TokenWindow(start=0, end=12, first=0, last=10)
    TokenWindow(start=8, end=20, first=10, last=20)
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
        TokenWindow(start, min(start + room, length), first, last)
        for start, first, last in zip(starts, edges, edges[1:])
    ]


class LabelledWindows:
    """The windows of labelled texts: [i] -> (ids, labels), two int64 arrays of equal length.

    Each begins with <cls> and ends with <sep>, which have no label. labels: names of all labels.
    """

    def __init__(self, records, tokenizer, positions, labels, ignored=()):
        self.cls_id = tokenizer.cls_id
        self.sep_id = tokenizer.sep_id
        self.tokens = []  # of each text: (ids, labels), in small types, as they stay in memory
        self.places = []  # of each window: (the text's number, TokenWindow)
        bar = tqdm(records, "tokenizing", unit=" texts", leave=False, delay=2)
        for number, record in enumerate(bar):
            (text,) = record.texts
            ids = np.array(tokenizer.encode(text), np.int32)
            offsets = np.array(tokenizer.offsets(text), np.int64).reshape(-1, 2)
            numbers = token_labels(offsets, record.target, labels, ignored)
            self.tokens.append((ids, numbers.astype(np.int16)))
            self.places += [(number, window) for window in token_windows(len(ids), positions - 2)]

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


class Fragments(Task):
    """Pieces of a text, each of a category."""

    measure = "f1"
    model_class = StarEncoderForTokenClassification
    ignored = ()  # categories that neither teach nor count

    def __init__(self, data, tokenizer, positions, config):
        self.tokenizer = tokenizer
        self.validation = data.validation
        self.categories = self.categories_of(data.training, data.validation)
        self.labels = labels_for(self.categories)
        self.overrides = {"id2label": dict(enumerate(self.labels))}
        self.windows = LabelledWindows(
            data.training, tokenizer, positions, self.labels, self.ignored
        )

    def categories_of(self, training, validation):
        """The names of the categories. Raises ValueError for one that only the validation has."""
        known = {span.category for record in training for span in record.target}
        if not known:
            raise ValueError("no line for training has a fragment")
        for record in validation:
            for span in record.target:
                if span.category not in known:
                    name = span.category
                    raise ValueError(f"a line for validation has a {name!r}, none for training has")
        return sorted(known)

    def __len__(self):
        return len(self.windows)

    def batch(self, examples, device):
        """A `Batch` of these windows, by their numbers."""
        ids, labels = zip(*(self.windows[i] for i in examples))
        labels = np.concatenate(labels)  # (T,)
        return batch_of(ids, labels, int((labels >= 0).sum()), device)

    def evaluate(self, model, autocast, ranks):
        """F1 of exact spans: of each category and, "f1", their mean."""
        mine = self.validation[ranks.rank :: ranks.world_size]
        found = find_spans(model, self.tokenizer, [r.texts[0] for r in mine], autocast)
        counts = span_counts([record.target for record in mine], found, self.categories)
        return span_scores(ranks.sum(counts), self.categories)


def find_spans(model, tokenizer, texts, autocast):
    """[[Span, ...], ...] of each text, sorted, by the most probable label of each token."""
    names = model.config.label_names
    found = []
    for text, probabilities in zip(texts, token_probabilities(model, tokenizer, texts, autocast)):
        labels = [names[number] for number in probabilities.argmax(1)]
        found.append(spans_of(text, tokenizer.offsets(text), labels))
    return found


def spans_of(text, offsets, labels):
    """[Span, ...] that IOB2 labels of tokens spell, without the blanks around them.

    An I- behind anything but its own category begins a span, as in seqeval.
    """
    spans = []
    previous = "O"
    for (start, end), label in zip(offsets, labels):
        tag, _, category = label.partition("-")
        if tag == "I" and previous[2:] == category:
            spans[-1] = spans[-1]._replace(end=end)
        elif label != "O":
            spans.append(Span(start, end, category))
        previous = label
    return [span for span in (trimmed(text, span) for span in spans) if span.start < span.end]


def trimmed(text, span):
    """A span without blanks at its ends: a token may begin with one."""
    inside = text[span.start : span.end]
    start = span.end - len(inside.lstrip())
    return span._replace(start=start, end=max(start, span.start + len(inside.rstrip())))


class Part(NamedTuple):
    """A window of a text, as the model reads it."""

    ids: np.ndarray  # of the tokens, with <cls> and <sep>
    begin: int  # in `ids`, of the tokens that are judged in it
    result: np.ndarray  # (tokens judged, C): where their probabilities belong


def token_probabilities(model, tokenizer, texts, autocast):
    """[(tokens, C) float32, ...] of what the model says of each token of each text.

    texts: without halves of surrogate pairs.
    """
    room = model.config.max_position_embeddings - 2
    # The result of a part is a view of its text's result.
    results = []
    parts = []
    for text in texts:
        ids = np.array(tokenizer.encode(text), np.int64)
        result = np.zeros((len(ids), model.config.num_labels), np.float32)
        results.append(result)
        windows = token_windows(len(ids), room) if len(ids) else []
        for start, end, first, last in windows:
            window = np.concatenate([[tokenizer.cls_id], ids[start:end], [tokenizer.sep_id]])
            parts.append(Part(window, 1 + first - start, result[first:last]))

    sequences = [part.ids for part in parts]
    for numbers, logits in through_model(model, sequences, autocast, "classifying"):
        of_batch = logits.softmax(-1).numpy()  # (T, C)
        at = 0  # where the part begins in the batch
        for part in (parts[number] for number in numbers):
            begin = at + part.begin
            part.result[:] = of_batch[begin : begin + len(part.result)]
            at += len(part.ids)
    return results
