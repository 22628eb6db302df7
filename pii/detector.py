"""TODO."""

import bisect
import functools
import re

import numpy as np
import torch

from corpus.tokenizer import Tokenizer
from pii.labels import CATEGORIES, LABELS, Entity, pack, windows
from pii.rules import addresses, by_rules, join, mails
from starencoder import StarEncoderForTokenClassification
from training.step import dtype_of

SURE = 0.95  # a rule's address that the model gives this probability of being nothing is none


GOES_ON = {
    "KEY": "_+-=",
    "PASSWORD": "_+-.=$!#%^*",
}  # the signs that with letters and digits belong to one


ALNUM = re.compile(r"[^\W_]")


CLOSING = {'"': '"', "'": "'", "`": "`", ">": "<"}


def stops_of(text, category):
    """Where a KEY or a PASSWORD cannot go on to its left, and to its right: two sorted lists."""
    right = re.escape(GOES_ON[category])
    left = re.escape(GOES_ON[category].replace("=", "").replace("-", ""))
    return [
        [stop.start() for stop in re.finditer(rf"[^\w{left}]", text)],
        [stop.start() for stop in re.finditer(rf"[^\w{right}]", text)],
    ]


def snap(text, start, end, category, stops):
    """(start, end) of what the tokens of an entity cover, without the quotes, blanks and brackets that share tokens with it; or None.

    stops: from a category to `stops_of` this text, only called for those that go on.
    """
    while start < end and text[start] in " \t\r\n\"'`(<[{,;:|":
        start += 1
    closing = CLOSING.get(text[start - 1 : start])
    if closing and (at := text.find(closing, start, end)) > 0:
        end = at
    if (
        category == "PASSWORD"
        and re.search(r"://[^:/\s]*:$", text[max(0, start - 60) : start])
        and (at := text.rfind("@", start, end)) > 0
    ):
        end = at
    while end > start and text[end - 1] in " \t\r\n\"'`)>]},;:|":
        end -= 1
    if category in GOES_ON and start < end:
        left, right = stops(category)
        before = bisect.bisect_left(left, start) - 1
        start = left[before] + 1 if before >= 0 else 0
        behind = bisect.bisect_left(right, end)
        end = right[behind] if behind < len(right) else len(text)
    if text[end : end + 1] in " \n":  # the end of a sentence
        while end > start and text[end - 1] == ".":
            end -= 1
    if category == "KEY" and (end - start < 12 or not any(c.isdigit() for c in text[start:end])):
        return None
    return (start, end) if ALNUM.search(text, start, end) else None


WORD = re.compile(r"[\w+/=-]{60,}|\w+(?:-\w+)*")  # a long one is base64


JOINS = frozenset(
    "-_.+/=~!?#$%^&*@:"
)  # a sign between two words of one category, without blanks, belongs to them


def entities_of(text, offsets, probabilities, threshold=0.0):
    """The entities that the labels of the tokens of a text spell, but for addresses that are nobody's.

    offsets: (tokens, 2), in characters. probabilities: (tokens, len(LABELS)). All tokens of a word have one category, the one that is most
    probable on average: a model that is sure of most of a key is right about the rest. A B- begins a new entity at the beginning of a word
    with a blank before it; elsewhere it goes on.
    """
    of_category = np.stack(
        [probabilities[:, 0]]
        + [probabilities[:, k] + probabilities[:, k + 1] for k in range(1, len(LABELS), 2)],
        1,
    )
    words = np.array([match.span() for match in WORD.finditer(text)] or np.zeros((0, 2)), np.int64)
    word = np.searchsorted(
        words[:, 1], offsets[:, 1] - 1, side="right"
    )  # of the last character of each token: the word that it may lie in
    inside = word < len(words)
    inside[inside] = words[word[inside], 0] < offsets[inside, 1]
    begins = np.flatnonzero(
        np.concatenate([[True], ~inside[1:] | ~inside[:-1] | (word[1:] != word[:-1])])
    )  # the first token of each
    lengths = np.diff(np.append(begins, len(offsets)))
    mean = np.add.reduceat(of_category, begins) / lengths[:, None]  # (words, categories)
    best = mean.argmax(1)
    spans = []  # [first word, behind the last, category]
    for w in np.flatnonzero(best).tolist():
        k, first = best[w], begins[w]
        inner = (
            not text[offsets[first, 0]].isspace()
            or probabilities[first, 2 * k] > probabilities[first, 2 * k - 1]
        )
        if (
            spans
            and spans[-1][1] == w
            and 1 in (spans[-1][2], k)
            and {spans[-1][2], k} <= {1, 1 + CATEGORIES.index("USERNAME")}
        ):
            spans[-1][1:] = (
                w + 1,
                1,
            )  # beside a word of a name without a sign between them is another
            continue
        if spans and spans[-1][2] == k and inner:
            between = (
                text[offsets[begins[spans[-1][1]] - 1, 1] : offsets[first, 0]]
                if spans[-1][1] < w
                else ""
            )
            if spans[-1][1] == w or len(between) < 3 and set(between) <= JOINS:
                spans[-1][1] = w + 1
                continue
        spans.append([w, w + 1, k])
    # Looked up, not walked: each of a thousand pieces of one password would be walked to its ends.
    stops = functools.cache(functools.partial(stops_of, text))
    found = []
    for v, w, k in spans:
        category, end = CATEGORIES[k - 1], begins[w] if w < len(begins) else len(offsets)
        score = float(np.average(mean[v:w, k], weights=lengths[v:w]))
        place = None
        if score >= threshold:
            start, behind = int(offsets[begins[v], 0]), int(offsets[end - 1, 1])
            place = snap(text, start, behind, category, stops)
        if place and category in (
            "IP_ADDRESS",
            "EMAIL",
        ):  # the one that is written there, and whole
            shift = max(0, place[0] - 80)
            near = text[shift : place[1] + 80]
            written = addresses(near) if category == "IP_ADDRESS" else mails(near)
            place = next(
                (
                    (a + shift, b + shift)
                    for a, b in written
                    if a + shift < place[1] and b + shift > place[0]
                ),
                None,
            )
        if place:
            found.append(Entity(*place, category, score))
    return join(found, [])


class Detector:
    """Finds entities by a fine-tuned model, by rules, or by both.

    model, tokenizer: None for the rules alone. rules: whether to use them. threshold: the least score of what the model finds.
    """

    def __init__(
        self, model=None, tokenizer=None, rules=False, threshold=0.5, categories=CATEGORIES
    ):
        self.model, self.tokenizer, self.rules, self.threshold, self.categories = (
            model,
            tokenizer,
            rules,
            threshold,
            set(categories),
        )
        self.device, self.dtype = next(model.parameters()).device if model else None, "auto"

    @classmethod
    def from_pretrained(cls, directory, device="auto", **options):
        """Reads a directory that `train` wrote. Raises ValueError for a model with other classes, and for a device that is not there."""
        model, tokenizer = (
            StarEncoderForTokenClassification.from_pretrained(directory),
            Tokenizer.from_pretrained(directory),
        )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: its tokenizer has more tokens than its model")
        if model.config.id2label is None or list(model.config.id2label.values()) != LABELS:
            raise ValueError(
                f"{directory}: no PII detector (its classes are not those of pii.py); fine-tune one with `python pii.py train`"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), tokenizer, **options)

    def find(self, texts):
        """[[Entity, ...], ...] of each text, sorted, without overlaps."""
        if not self.model:
            found = [by_rules(text) for text in texts]
        else:
            judged = [
                (text, *self.judged(text, probabilities))
                for text, probabilities in zip(texts, self.probabilities(texts))
            ]
            found = [
                join(by_rules(text, veto) if self.rules else [], by_model)
                for text, by_model, veto in judged
            ]
        return [[e for e in of_text if e.category in self.categories] for of_text in found]

    @torch.no_grad()
    def probabilities(self, texts, tokens_at_once=16_384):
        """[(tokens, len(LABELS)) float32, ...]: what the model says of the tokens of each text."""
        room, results, places, sequences = self.model.config.max_position_embeddings - 2, [], [], []
        for t, text in enumerate(texts):
            ids = np.array(self.tokenizer.encode(text.encode(errors="replace").decode()), np.int64)
            results.append(np.zeros((len(ids), len(LABELS)), np.float32))
            for place in windows(len(ids), room) if len(ids) else []:
                places.append((t, *place))
                sequences.append(
                    np.concatenate(
                        [[self.tokenizer.cls_id], ids[place[0] : place[1]], [self.tokenizer.sep_id]]
                    )
                )
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype_of(self, self.device) == "bfloat16"
        )
        i = 0
        while i < len(sequences):
            j, size = i, 0
            while (
                j < len(sequences)
                and (size := size + len(sequences[j])) <= tokens_at_once
                or j == i
            ):
                j += 1
            with autocast:
                logits = self.model(*pack(sequences[i:j], self.device)).logits.float()
            probabilities = logits.softmax(-1).cpu().numpy()
            begin = 1  # behind <cls>
            for (t, start, _, first, last), sequence in zip(places[i:j], sequences[i:j]):
                a = begin + first - start
                results[t][first:last] = probabilities[a : a + last - first]
                begin += len(sequence)
            i = j
        return results

    def judged(self, text, probabilities):
        """(the entities that the probabilities spell, whether the model is sure that a span, (start, end), is none)."""
        offsets = functools.cache(
            lambda: np.array(self.tokenizer.offsets(text.encode(errors="replace").decode()))
        )

        def veto(start, end):
            first, last = (
                np.searchsorted(offsets()[:, 1], start, side="right"),
                np.searchsorted(offsets()[:, 0], end),
            )
            return probabilities[first:last, 0].mean() > SURE

        if not probabilities[:, 1:].max(initial=0) > 0.1:  # as in most code
            return [], veto
        return entities_of(
            text.encode(errors="replace").decode(), offsets(), probabilities, self.threshold
        ), veto
