"""Finding personal data and secrets in texts by a fine-tuned model, by rules, or by both.

    detector = Detector.from_pretrained("runs/pii", rules=True)
    (entities,) = detector.find(["host = '8.8.8.8'  # ask Kate"])

A text is read in overlapping windows; each token is judged in the window where it is farthest from
an edge. From the labels of the tokens to entities it is three steps:

    words_of     the tokens of a word are judged together
    spans_of     neighbouring words of one category are one span
    entity_of    a span begins and ends where words, quotes and addresses do

References: Li et al., StarCoder, 2023, section 4; Ramshaw & Marcus, 1995 (the B, I, O tags).
"""

import bisect
import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from corpus.tokenizer import Tokenizer
from pii.labels import CATEGORIES, LABELS, Entity, pack, windows
from pii.rules import addresses, by_rules, candidates, join, mails
from starencoder import StarEncoderForTokenClassification
from training.step import dtype_of

SUSPICIOUS = 0.1  # below, for all labels of all tokens, a text holds nothing, as most code does
SURE = 0.95  # a rule's address is none if the model gives that this probability

# ---- step 1: words -----------------------------------------------------------------------------

WORD = re.compile(r"[\w+/=-]{60,}|\w+(?:-\w+)*")  # a long one is base64


class Words(NamedTuple):
    """The W words of a text, as arrays. A token outside of any word is one of its own.

    All tokens of a word are given one category, the one that is most probable on average: a model
    that is sure of most of a key is right about the rest.
    """

    start: np.ndarray  # (W,) in characters, with a blank that shares its first token
    end: np.ndarray  # (W,)
    tokens: np.ndarray  # (W,) how many
    probabilities: np.ndarray  # (W, 1 + categories) means over its tokens; 0 is "nothing"
    begins: np.ndarray  # (W, categories) True if its first token is rather a B- than an I-


def words_of(text, offsets, probabilities):
    """`Words` of a text. offsets: (tokens, 2); probabilities: (tokens, len(LABELS))."""
    # A token belongs to the word in which its last character lies: a first one may be a blank.
    word_at = np.full(len(text), -1)  # (characters,)
    for number, match in enumerate(WORD.finditer(text)):
        word_at[match.start() : match.end()] = number
    word = word_at[offsets[:, 1] - 1]  # (tokens,)

    is_first = (word[1:] != word[:-1]) | (word[1:] < 0)
    first = np.flatnonzero(np.concatenate([[True], is_first]))  # (W,) token of each word
    tokens = np.diff(np.append(first, len(word)))

    pairs = probabilities[:, 1:].reshape(len(word), len(CATEGORIES), 2)  # B- and I-
    of_category = np.concatenate([probabilities[:, :1], pairs.sum(-1)], axis=1)
    return Words(
        start=offsets[first, 0],
        end=offsets[first + tokens - 1, 1],
        tokens=tokens,
        probabilities=np.add.reduceat(of_category, first) / tokens[:, None],
        begins=pairs[first, :, 0] >= pairs[first, :, 1],
    )


# ---- step 2: spans -----------------------------------------------------------------------------

# Signs that belong to a span if they stand between two of its words, without blanks.
JOINS = frozenset("-_.+/=~!?#$%^&*@:")

NAME = CATEGORIES.index("NAME")
USERNAME = CATEGORIES.index("USERNAME")


@dataclass
class Span:
    """Words from `first` to before `end` that are one entity."""

    first: int
    end: int
    category: int  # index in CATEGORIES


def spans_of(text, words):
    """[Span, ...]: words of a category, joined with their neighbours."""
    spans = []
    best = words.probabilities.argmax(1)
    for w in np.flatnonzero(best).tolist():
        category = int(best[w]) - 1
        last = spans[-1] if spans else None
        if last and last.end == w and {last.category, category} in ({NAME}, {NAME, USERNAME}):
            # Beside a word of a name, without a sign between them, is another.
            last.end = w + 1
            last.category = NAME
        elif last and last.category == category and goes_on(text, words, last, w):
            last.end = w + 1
        else:
            spans.append(Span(w, w + 1, category))
    return spans


def goes_on(text, words, span, w):
    """True if word `w`, which has the category of the span before it, belongs to that."""
    # A B- begins a new entity at the beginning of a word with a blank before it only.
    if text[words.start[w]].isspace() and words.begins[w, span.category]:
        return False
    between = text[words.end[span.end - 1] : words.start[w]] if span.end < w else ""
    return span.end == w or len(between) < 3 and set(between) <= JOINS


# ---- step 3: entities --------------------------------------------------------------------------

OPENING = " \t\r\n\"'`(<[{,;:|"
CLOSING = " \t\r\n\"'`)>]},;:|"
ALNUM = re.compile(r"[^\W_]")
PARTNER = {'"': '"', "'": "'", "`": "`", ">": "<"}

# Signs that, with letters and digits, may be a part of it. But what stands before a = or behind a
# -- is its name or an option, so that to the left it ends at these.
GOES_ON = {"KEY": "_+-=", "PASSWORD": "_+-.=$!#%^*"}


def stops_of(text, category):
    """Where a KEY or a PASSWORD cannot go on, to the left and to the right: two sorted lists.

    Looked up, not walked: each of a thousand pieces of one password would be walked to its ends.
    """
    right = re.escape(GOES_ON[category])
    left = re.escape(GOES_ON[category].replace("=", "").replace("-", ""))
    to_the_left = [stop.start() for stop in re.finditer(rf"[^\w{left}]", text)]
    to_the_right = [stop.start() for stop in re.finditer(rf"[^\w{right}]", text)]
    return [-1, *to_the_left], [*to_the_right, len(text)]


def snap(text, start, end, category, stops):
    """(start, end) of what is meant by the tokens of a span; None if that is nothing.

    Tokens share characters with quotes, blanks and brackets, and a model may miss the ends of a
    key. stops: a function from a category to `stops_of` this text.
    """
    # Without signs around it; up to the quote that closes the one before it, or to the @ behind
    # the password in a URL.
    start = end - len(text[start:end].lstrip(OPENING))
    quote = PARTNER.get(text[start - 1 : start])
    at = text.find(quote, start, end) if quote else -1
    end = at if at > 0 else end
    if category == "PASSWORD" and re.search(r"://[^:/\s]*:$", text[max(0, start - 60) : start]):
        at = text.rfind("@", start, end)
        end = at if at > 0 else end
    end = start + len(text[start:end].rstrip(CLOSING))

    # All of a key, but not the point at the end of a sentence.
    if category in GOES_ON and start < end:
        left, right = stops(category)
        start = left[bisect.bisect_left(left, start) - 1] + 1
        end = right[bisect.bisect_left(right, end)]
    if text[end : end + 1] in " \n":  # or at the end of the text
        while end > start and text[end - 1] == ".":
            end -= 1

    if category == "KEY" and (end - start < 12 or not any(map(str.isdigit, text[start:end]))):
        return None
    return (start, end) if ALNUM.search(text, start, end) else None


def whole_address(text, start, end, category):
    """(start, end) of the address that is written where the model sees one; None if there is none.

    Nor is one that is nobody's, as `rules` has it.
    """
    shift = max(0, start - 80)
    written = addresses if category == "IP_ADDRESS" else mails
    for a, b in written(text[shift : end + 80]):
        if a + shift < end and b + shift > start:
            return a + shift, b + shift
    return None


def entity_of(text, words, span, stops, threshold):
    """The Entity of a span; None if there is nothing, or its probability is below the threshold."""
    inside = slice(span.first, span.end)
    probabilities = words.probabilities[inside, span.category + 1]
    score = float(np.average(probabilities, weights=words.tokens[inside]))
    if score < threshold:
        return None
    category = CATEGORIES[span.category]
    start = int(words.start[span.first])
    place = snap(text, start, int(words.end[span.end - 1]), category, stops)
    if place and category in ("IP_ADDRESS", "EMAIL"):
        place = whole_address(text, *place, category)
    return Entity(*place, category, score) if place else None


def entities_of(text, offsets, probabilities, threshold=0.0):
    """[Entity, ...] that the labels of the tokens of a text spell, sorted, without overlaps.

    offsets: (tokens, 2) in characters. probabilities: (tokens, len(LABELS)).
    """
    words = words_of(text, offsets, probabilities)
    spans = spans_of(text, words)
    stops = functools.cache(functools.partial(stops_of, text))
    found = [entity_of(text, words, span, stops, threshold) for span in spans]
    return join(entity for entity in found if entity)


# ---- the detector ------------------------------------------------------------------------------


class Part(NamedTuple):
    """A window of a text, as the model reads it."""

    ids: np.ndarray  # with <cls> and <sep>
    probabilities: np.ndarray  # (tokens that it judges, len(LABELS)): a view, to be filled
    begin: int  # in `ids`, of the tokens that it judges


def batches_of(parts, tokens):
    """Yields lists of parts that have up to so many tokens together, or one part that has more."""
    batch = []
    size = 0
    for part in parts:
        if batch and size + len(part.ids) > tokens:
            yield batch
            batch = []
            size = 0
        batch.append(part)
        size += len(part.ids)
    if batch:
        yield batch


def encodable(text):
    """The text with `?` for each half of a surrogate pair, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


class Detector:
    """Finds entities by a fine-tuned model, by rules, or by both.

    model, tokenizer: None for the rules alone. rules: True to use the rules. threshold: the least
    score of what the model finds. categories: all others are left out.
    """

    def __init__(
        self, model=None, tokenizer=None, rules=False, threshold=0.5, categories=CATEGORIES
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.rules = rules
        self.threshold = threshold
        self.categories = set(categories)
        self.device = next(model.parameters()).device if model else None
        self.dtype = "auto"  # of the model's computation: bfloat16 if the device is fast at it

    @classmethod
    def from_pretrained(cls, directory, device="auto", **options):
        """Reads a directory that `python -m pii train` wrote. options: those of the class.

        Raises ValueError for a model with other classes, and for a device that is not there.
        """
        model = StarEncoderForTokenClassification.from_pretrained(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: its tokenizer has more tokens than its model")
        if list((model.config.id2label or {}).values()) != LABELS:
            words = "no PII detector (it has other classes); `python -m pii train` makes one"
            raise ValueError(f"{directory}: {words}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), tokenizer, **options)

    def find(self, texts):
        """[[Entity, ...], ...] of each text, sorted, without overlaps."""
        if self.model:
            found = map(self.find_in, texts, self.probabilities(texts))
        else:
            found = map(by_rules, texts)
        return [[e for e in entities if e.category in self.categories] for entities in found]

    def find_in(self, text, probabilities):
        """[Entity, ...] of a text for which the model gives these probabilities."""
        ruled = candidates(text) if self.rules else []
        suspicious = probabilities[:, 1:].max(initial=0) > SUSPICIOUS
        if not ruled and not suspicious:
            return []
        text = encodable(text)
        offsets = np.array(self.tokenizer.offsets(text))

        # What a rule takes for an address may be a version or a price: the model may be sure of it.
        kept = []
        for entity in ruled:
            if entity.category != "KEY":
                first = np.searchsorted(offsets[:, 1], entity.start, side="right")
                last = np.searchsorted(offsets[:, 0], entity.end)
                if probabilities[first:last, 0].mean() > SURE:
                    continue
            kept.append(entity)

        by_model = []
        if suspicious:
            by_model = entities_of(text, offsets, probabilities, self.threshold)
        return join(kept, by_model)

    @torch.no_grad()
    def probabilities(self, texts, tokens_at_once=16_384):
        """[(tokens, len(LABELS)) float32, ...]: what the model says of the tokens of each text."""
        cls_id, sep_id = self.tokenizer.cls_id, self.tokenizer.sep_id
        room = self.model.config.max_position_embeddings - 2
        results = []
        parts = []
        for text in texts:
            ids = np.array(self.tokenizer.encode(encodable(text)), np.int64)
            result = np.zeros((len(ids), len(LABELS)), np.float32)
            results.append(result)
            for start, end, first, last in windows(len(ids), room) if len(ids) else []:
                window = np.concatenate([[cls_id], ids[start:end], [sep_id]])
                parts.append(Part(window, result[first:last], 1 + first - start))

        bfloat16 = dtype_of(self, self.device) == "bfloat16"
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        for batch in batches_of(parts, tokens_at_once):
            with autocast:
                logits = self.model(*pack([part.ids for part in batch], self.device)).logits
            of_batch = logits.float().softmax(-1).cpu().numpy()
            at = 0
            for part in batch:
                begin = at + part.begin
                part.probabilities[:] = of_batch[begin : begin + len(part.probabilities)]
                at += len(part.ids)
        return results
