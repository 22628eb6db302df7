"""Finding personal data and secrets in texts by a fine-tuned model, by rules, or by both.

    detector = Detector.from_pretrained("runs/pii", rules=True)
    (entities,) = detector.find(["host = '8.8.8.8'  # ask Kate"])

A text is cut into blocks (look.py), and the model sees those in which something may be. In a block

    rules        find addresses and keys of known formats (rules.py)
    candidates   for other keys and passwords (candidates.py) are judged by the model: the mean over
                 their tokens says whether they are one
    the model    finds names and user names by itself; secrets that it finds without a candidate are
                 mostly wrong, so they are dropped

The rules decide, but the model may overrule an e-mail address if it is sure that it is none. From
the labels of tokens to entities it is three steps:

    words_of     the tokens of a word are judged together
    phrases_of   neighbouring words of one category are one phrase
    entity_of    a phrase begins and ends where words, quotes and addresses do

References: Li et al., StarCoder, 2023, section 4; Ramshaw & Marcus, 1995 (the B, I, O tags).
"""

import bisect
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from corpus.tokenizer import Tokenizer
from finetune.tokens import token_probabilities
from pii import look
from pii.candidates import Candidate, candidates
from pii.labels import CATEGORIES, LABELS, Entity
from pii.rules import addresses, by_rules, found_by_rules, join, mails
from pii.thresholds import read_thresholds
from starencoder import StarEncoderForTokenClassification
from training.step import autocast_to, dtype_of

SUSPICIOUS = 0.1  # if no token is something with more than this probability, nothing is found
SECRETS = ("KEY", "PASSWORD")

# Accounts that are nobody's, and words that stand where a user name may stand.
NOBODY = frozenset(
    "root admin administrator user username users test guest nobody anonymous default postgres"
    " ubuntu runner www-data string str none null true false required optional self this name"
    " login owner author password token value key id type object the a an is not must".split()
)
SURE = 0.95  # the model overrules an e-mail address of the rules if it is this sure that it is none

# ---- step 1: words -----------------------------------------------------------------------------

WORD = re.compile(r"[\w+/=-]{60,}|\w+(?:-\w+)*")  # a long one is base64


class Words(NamedTuple):
    """The W words of a text, as arrays. C: categories.

    All tokens of a word have one category, the one that is most probable on average: a model that
    is sure of most of a key is right about the rest. A token outside of any word is one of its own.
    """

    start: np.ndarray  # (W,) in characters, with a blank that shares the first token
    end: np.ndarray  # (W,)
    tokens: np.ndarray  # (W,) how many it has
    probabilities: np.ndarray  # (W, 1 + C) means over its tokens; column 0 is "nothing"
    begins: np.ndarray  # (W, C) True if its first token is rather a B- than an I-


def words_of(text, offsets, probabilities):
    """`Words` of a text. offsets: (tokens, 2); probabilities: (tokens, len(LABELS))."""
    # A token belongs to the word that its last character lies in: a first one may be a blank.
    word_at = np.full(len(text), -1)  # (characters,)
    for number, match in enumerate(WORD.finditer(text)):
        word_at[match.start() : match.end()] = number
    word = word_at[offsets[:, 1] - 1]  # (tokens,)

    # Between words each token stands for itself.
    is_first = (word[1:] != word[:-1]) | (word[1:] < 0)  # (tokens - 1,)
    first = np.flatnonzero(np.append(True, is_first))  # (W,) the first token of each
    tokens = np.diff(np.append(first, len(word)))  # (W,)

    # A category is as probable as its B- and its I- together.
    pairs = probabilities[:, 1:].reshape(len(word), len(CATEGORIES), 2)  # (tokens, C, 2)
    of_category = np.concatenate([probabilities[:, :1], pairs.sum(-1)], axis=1)  # (tokens, 1 + C)
    return Words(
        start=offsets[first, 0],
        end=offsets[first + tokens - 1, 1],
        tokens=tokens,
        probabilities=np.add.reduceat(of_category, first) / tokens[:, None],
        begins=pairs[first, :, 0] >= pairs[first, :, 1],
    )


# ---- step 2: phrases ---------------------------------------------------------------------------

# A sign between two words of one category, without blanks, belongs to them.
JOINS = frozenset("-_.+/=~!?#$%^&*@:")

NAME = CATEGORIES.index("NAME")
USERNAME = CATEGORIES.index("USERNAME")


@dataclass
class Phrase:
    """Words that are one entity: those with first <= number < end."""

    first: int
    end: int
    category: int  # index in CATEGORIES


def phrases_of(text, words):
    """[Phrase, ...]: words of a category, joined with their neighbours."""
    phrases = []
    best = words.probabilities.argmax(1)  # (W,)
    for w in np.flatnonzero(best).tolist():
        category = int(best[w]) - 1
        last = phrases[-1] if phrases else None
        if last and last.end == w and {last.category, category} in ({NAME}, {NAME, USERNAME}):
            # Beside a word of a name, without a sign between them, is another.
            last.end = w + 1
            last.category = NAME
        elif last and last.category == category and goes_on(text, words, last, w):
            last.end = w + 1
        else:
            phrases.append(Phrase(w, w + 1, category))
    return phrases


def goes_on(text, words, phrase, w):
    """True if word `w`, which has the category of the phrase before it, belongs to that."""
    # A B- begins another entity only if there is a blank before it: not in the middle of a key.
    if text[words.start[w]].isspace() and words.begins[w, phrase.category]:
        return False
    # What stands between the two is nothing, or up to two signs.
    between = text[words.end[phrase.end - 1] : words.start[w]]
    return phrase.end == w or len(between) < 3 and set(between) <= JOINS


# ---- step 3: entities --------------------------------------------------------------------------

# Signs that may share a token with the beginning, or with the end, of what is meant.
OPENING = " \t\r\n\"'`(<[{,;:|"
CLOSING = " \t\r\n\"'`)>]},;:|"
CLOSED_BY = {'"': '"', "'": "'", "`": "`", ">": "<"}  # the last is <b>what a tag holds</b>

ALNUM = re.compile(r"[^\W_]")


def snap(text, start, end):
    """(start, end) of what the tokens of a phrase mean, or None."""
    # A value behind a quote ends at the next one.
    start = end - len(text[start:end].lstrip(OPENING))
    closing = CLOSED_BY.get(text[start - 1 : start])
    at = text.find(closing, start, end) if closing else -1
    end = at if at > 0 else end
    end = start + len(text[start:end].rstrip(CLOSING))

    # The full stop behind it is no part of it.
    if text[end : end + 1] in " \r\n":  # or at the end of the text
        while end > start and text[end - 1] == ".":
            end -= 1
    return (start, end) if ALNUM.search(text, start, end) else None


def whole_address(text, start, end, category):
    """(start, end) of the address that is written where the model sees one; None if none is."""
    shift = max(0, start - 80)  # the model may have missed as much of it
    written = addresses if category == "IP_ADDRESS" else mails
    for a, b in written(text[shift : end + 80]):
        if a + shift < end and b + shift > start:
            return a + shift, b + shift
    return None


def entity_of(text, words, phrase, thresholds):
    """The Entity of a phrase; None if there is none, or one of too low a probability."""
    inside = slice(phrase.first, phrase.end)
    probabilities = words.probabilities[inside, phrase.category + 1]
    score = float(np.average(probabilities, weights=words.tokens[inside]))
    category = CATEGORIES[phrase.category]
    if score < thresholds.get(category, 0.0):
        return None
    start = int(words.start[phrase.first])
    end = int(words.end[phrase.end - 1])
    place = snap(text, start, end)
    # Addresses that are nobody's are left out, as by the rules.
    if place and category in ("IP_ADDRESS", "EMAIL"):
        place = whole_address(text, *place, category)
    return Entity(*place, category, score) if place else None


def entities_of(text, offsets, probabilities, thresholds=None):
    """[Entity, ...] that the labels of the tokens of a text spell, sorted, without overlaps.

    None is a KEY or a PASSWORD: their ends are those of candidates. offsets: (tokens, 2) in
    characters. probabilities: (tokens, len(LABELS)). thresholds: the least score of each category;
    None for all.
    """
    words = words_of(text, offsets, probabilities)
    phrases = [p for p in phrases_of(text, words) if CATEGORIES[p.category] not in SECRETS]
    found = [entity_of(text, words, phrase, thresholds or {}) for phrase in phrases]
    return join([entity for entity in found if entity])


# ---- the detector ------------------------------------------------------------------------------


class Known(NamedTuple):
    """What is known of a text before a model sees it."""

    ruled: list  # of Entity, sorted: addresses and known formats of keys, by the rules
    secrets: list  # of Candidate, sorted: what stands where a key or a password may stand
    blocks: list  # of (start, end): what the model is to see, of `look.blocks`


class Block(NamedTuple):
    """A part of a text that the model sees."""

    number: int  # of the text
    start: int
    end: int


class Detector:
    """Finds entities by a fine-tuned model, by rules, or by both.

    model, tokenizer: None for the rules alone. rules: True to use the rules. threshold: the least
    score of what the model finds, a number or one for each category. categories: all others are
    left out. everywhere: True to show the model all of a text, not only where something may be.
    """

    def __init__(
        self,
        model=None,
        tokenizer=None,
        rules=False,
        threshold=0.5,
        categories=CATEGORIES,
        everywhere=False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.rules = rules
        self.thresholds = threshold
        if not isinstance(threshold, dict):
            self.thresholds = dict.fromkeys(CATEGORIES, threshold)
        self.categories = set(categories)
        self.everywhere = everywhere
        self.device = next(model.parameters()).device if model else None
        self.dtype = "auto"  # of the model's computation: bfloat16 if the device is fast at it

    @classmethod
    def from_pretrained(cls, directory, device="auto", recall=None, **options):
        """Reads a directory that `python -m pii train` wrote. options: as of the class.

        recall: the share of entities that the thresholds are to keep; None for those that
        training found best (see thresholds.py). Without effect beside a `threshold`.

        Raises ValueError for a model with other classes, and for a device that is not there.
        """
        model = StarEncoderForTokenClassification.from_pretrained(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: its tokenizer has more tokens than its model")
        if model.config.label_names != LABELS:
            words = "no PII detector (it has other classes); `python -m pii train` makes one"
            raise ValueError(f"{directory}: {words}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if "threshold" not in options:
            options["threshold"] = read_thresholds(directory, recall)
        return cls(model.to(device).eval(), tokenizer, **options)

    def find(self, texts):
        """[[Entity, ...], ...] of each text, sorted, without overlaps."""
        if self.model:
            # A half of a surrogate pair, which no tokenizer takes, becomes a question mark.
            texts = [text.encode(errors="replace").decode() for text in texts]
            found = self.find_by_model(texts)
        else:
            found = map(by_rules, texts)
        return [[e for e in entities if e.category in self.categories] for entities in found]

    def find_by_model(self, texts):
        """As `find`. All blocks of all texts go through the model together."""
        known = [self.known_of(text) for text in texts]
        blocks = [Block(i, *place) for i, of_text in enumerate(known) for place in of_text.blocks]
        parts = [texts[block.number][block.start : block.end] for block in blocks]

        found = [[] for _ in texts]
        for block, part, probabilities in zip(blocks, parts, self.probabilities(parts)):
            ruled = within(known[block.number].ruled, block)
            secrets = within(known[block.number].secrets, block)
            entities = self.entities_in_block(part, probabilities, ruled, secrets)
            found[block.number] += [moved(entity, block.start) for entity in entities]
        # What began in one block may reach into the next, in which something was found, too.
        return [join(entities) for entities in found]

    def known_of(self, text):
        """What is `Known` of a text."""
        # The model is to see addresses even if it has to find them without the rules.
        ruled = sorted(found_by_rules(text))
        secrets = candidates(text)
        pieces = look.blocks(text)
        if not self.everywhere:
            places = [found.start for found in (*ruled, *secrets)] + look.leads(text)
            pieces = look.blocks_with(pieces, sorted(places))
        if not self.rules:
            return Known([], secrets, pieces)
        # Where both see something, the rules know better.
        apart = [found for found in join(ruled, secrets) if isinstance(found, Candidate)]
        return Known(ruled, apart, pieces)

    def entities_in_block(self, text, probabilities, ruled, secrets):
        """[Entity, ...] of a block whose tokens have these probabilities (tokens, len(LABELS)).

        ruled, secrets: those of `Known` that begin in it.
        """
        suspicious = 1 - probabilities[:, 0].min(initial=1) > SUSPICIOUS
        if not ruled and not suspicious:
            return []
        offsets = np.array(self.tokenizer.offsets(text)).reshape(-1, 2)  # (tokens, 2)

        # Only for e-mail addresses is the context better evidence than the form.
        kept = []
        for entity in ruled:
            nothing = mean_over(entity, offsets, probabilities)[0]
            if entity.category != "EMAIL" or not nothing > SURE:
                kept.append(entity)
        if not suspicious:
            return join(kept)

        judged = []
        for secret in secrets:
            entity = judge(secret, mean_over(secret, offsets, probabilities))
            if entity.score >= self.thresholds[entity.category]:
                judged.append(entity)
        own = entities_of(text, offsets, probabilities, self.thresholds)
        own = [entity for entity in own if plausible(text, entity)]
        return join(kept, judged, own)

    def probabilities(self, texts):
        """[(tokens, len(LABELS)) float32, ...] of what the model says of each token of each text.

        texts: without halves of surrogate pairs.
        """
        autocast = autocast_to(dtype_of(self, self.device), self.device)
        return token_probabilities(self.model, self.tokenizer, texts, autocast)


def plausible(text, entity):
    """False for what cannot be of its category by its shape, whatever the model says."""
    value = text[entity.start : entity.end]
    if entity.category == "NAME":
        # A capital, or a letter of a script that has none; no part of a path or an identifier.
        letters = any(char.isupper() or char.isalpha() and not char.isascii() for char in value)
        return letters and not re.search(r"[\d_=/\\(){}<>$@]|\w\.\w\w", value)
    if entity.category == "USERNAME":
        return bool(re.fullmatch(r"[\w.-]{2,39}", value)) and value.lower() not in NOBODY
    return True


def within(spans, block):
    """The spans, sorted, that begin in a block, as places in it."""
    first = bisect.bisect_left(spans, (block.start,))
    behind = bisect.bisect_left(spans, (block.end,))
    return [moved(span, -block.start) for span in spans[first:behind]]


def moved(span, by):
    """A span so many characters further."""
    return span._replace(start=span.start + by, end=span.end + by)


def mean_over(span, offsets, probabilities):
    """(len(LABELS),): the mean over the tokens of a span."""
    first = np.searchsorted(offsets[:, 1], span.start, side="right")
    last = np.searchsorted(offsets[:, 0], span.end)
    return probabilities[first : max(last, first + 1)].mean(0)


def judge(secret, mean):
    """The Entity of a candidate for a secret. mean: (len(LABELS),), of its tokens.

    The model says whether it is a secret, of either category; where it stands says of which.
    """
    score = sum(mean[LABELS.index(f"{tag}-{category}")] for tag in "BI" for category in SECRETS)
    return Entity(secret.start, secret.end, secret.category, float(score))
