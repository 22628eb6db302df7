"""Training data: JSON lines, whose keys say what kind of task it is.

    {"text": "def f(): ...", "label": "python"}                 one class: a string or an int
    {"text": "def f(): ...", "labels": ["web", "tests"]}        any number of classes
    {"text": "def f(): ...", "score": 0.7}                      a number
    {"text": "# Ada Lovelace", "fragments": [{"category": "NAME", "position": [2, 14]}]}
                                                                pieces, in characters
    {"query": "parse a date", "code": "def f(): ..."}           a query, and the code it asks for

With {"text_a": ..., "text_b": ...} for "text", the first three are tasks on pairs. Other keys are
ignored.
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

HELD_OUT = 0.1  # share of the lines, if there is no file for validation
TEXTS = (("text",), ("text_a", "text_b"), ("query", "code"))
TARGETS = ("label", "labels", "score", "fragments")
LARGEST_SCORE = 1e37  # a model is written in float32, which ends at 3.4e38


class Kind(NamedTuple):
    """What the lines of a file hold."""

    texts: tuple  # of TEXTS
    target: str  # of TARGETS, or "code" for search

    def __str__(self):
        names = dict.fromkeys([*self.texts, self.target])
        return "{" + ", ".join(f'"{name}"' for name in names) + "}"


KINDS = [Kind(texts, target) for texts in TEXTS[:2] for target in TARGETS[:3]]
KINDS += [Kind(("text",), "fragments"), Kind(("query", "code"), "code")]


class Span(NamedTuple):
    """A piece of a text."""

    start: int  # in characters
    end: int  # behind the last
    category: str


class Record(NamedTuple):
    """A line, once checked."""

    texts: tuple  # one str, or two
    target: object  # by kind: str, frozenset of str, float, list of Span; None for search


class Records(NamedTuple):
    """What a file holds."""

    kind: Kind
    records: list  # of Record
    sha256: str  # of the file


def read_records(path, skipped):
    """The `Records` of a file of JSON lines.

    skipped: a Counter for the fragments that are left out. Raises ValueError, which names the line,
    for a line that is none of the kinds above or not of the first line's, and for an empty text.
    """
    kind = None
    records = []
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # as bytes, so that bad UTF-8 is an error of its line
        for number, line in enumerate(file, 1):
            digest.update(line)
            try:
                fields = parse_line(line)
                kind = kind or kind_of(fields)
                if kind_of(fields) != kind:
                    raise ValueError(f"a line of {kind_of(fields)}, but the first is of {kind}")
                records.append(record_of(fields, kind, skipped))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: empty")
    return Records(kind, records, digest.hexdigest())


def parse_line(line):
    """The JSON object in a line, as a dict."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


def kind_of(fields):
    """The one `Kind` whose keys are there. Raises ValueError if it is none or more than one."""
    texts = [names for names in TEXTS if all(name in fields for name in names)]
    targets = [name for name in TARGETS if name in fields]
    if not targets and ("query", "code") in texts:
        targets = ["code"]
    if len(texts) == len(targets) == 1 and Kind(texts[0], targets[0]) in KINDS:
        return Kind(texts[0], targets[0])
    known = ", ".join(map(str, KINDS))
    raise ValueError(f"its keys are those of no task, or of two; tasks: {known}")


def record_of(fields, kind, skipped):
    """The `Record` of a line's fields. Raises ValueError for values that do not fit its kind."""
    texts = tuple(fields[name] for name in kind.texts)
    for name, text in zip(kind.texts, texts):
        check_text(name, text)
    value = fields[kind.target]
    if kind.target == "label":
        target = class_name(value)
    elif kind.target == "labels":
        if not isinstance(value, list):
            raise ValueError(f'"labels" must be a list, got {shown(value)}')
        target = frozenset(map(class_name, value))
    elif kind.target == "score":
        if type(value) not in (int, float) or not abs(value) <= LARGEST_SCORE:
            words = f"a finite number, at most {LARGEST_SCORE:g}"
            raise ValueError(f'"score" must be {words}, got {shown(value)}')
        target = float(value)
    elif kind.target == "fragments":
        target = usable_spans(texts[0], parse_fragments(value), skipped)
    else:
        target = None
    return Record(texts, target)


def check_text(name, text):
    """Raises ValueError unless `text` is a text from which something can be learned."""
    if not isinstance(text, str):
        raise ValueError(f'"{name}" must be a text, got {shown(text)}')
    if not text.strip():
        raise ValueError(f'"{name}" is empty')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" holds half a surrogate pair') from None


def class_name(value):
    """The name of a class, of a string or an int."""
    if type(value) not in (str, int) or value == "":
        raise ValueError(f"a class must be a string or an int, got {shown(value)}")
    check_text("label", str(value))
    return str(value)


def shown(value):
    """A value for an error message."""
    return repr(value)[:40]


# ---- fragments -----------------------------------------------------------------------------------


def parse_fragments(value):
    """[(Span, its "value" or None), ...], sorted. Raises ValueError for any other layout."""
    fragments = []
    try:
        for fragment in value:
            span = Span(*fragment["position"], fragment["category"])
            if [type(field) for field in span] != [int, int, str]:  # a bool is no position
                raise TypeError
            fragments.append((span, fragment.get("value")))
    except (TypeError, KeyError, AttributeError):
        layout = '[{"category": "NAME", "position": [start, end]}, ...]'
        raise ValueError(f'"fragments" must be {layout}') from None
    for span, _ in fragments:
        check_text("category", span.category)
    return sorted(fragments, key=lambda fragment: fragment[0][:2])


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


# ---- training and validation ---------------------------------------------------------------------


class Data(NamedTuple):
    """What a fine-tuning learns from, and what it is measured on."""

    kind: Kind
    training: list  # of Record
    validation: list
    sha256: dict  # {"train_sha256": of its file, ...}


def read_data(train, validation, say):
    """The `Data` of two files of JSON lines; of one, a tenth of it held out, if `validation` is "".

    say: is told what was left out. Raises ValueError if the files do not fit together.
    """
    skipped = Counter()
    data = read_records(train, skipped)
    training = data.records
    sha256 = {"train_sha256": data.sha256, "validation_sha256": ""}
    if validation:
        other = read_records(validation, skipped)
        if other.kind != data.kind:
            raise ValueError(f"{validation}: lines of {other.kind}; {train} is of {data.kind}")
        held_out = other.records
        sha256["validation_sha256"] = other.sha256
    else:
        training, held_out = hold_out(training, train, skipped)
    for reason, count in (+skipped).items():  # those above 0
        say(f"left out: {count:,} {reason}")
    return Data(data.kind, training, held_out, sha256)


def hold_out(records, path, skipped):
    """(training, validation): a tenth is held out, by a hash of the first text.

    Records with the same first text are on one side. A record whose class is in no other is for
    training, and a query for code that is held out is left out, counted in `skipped`. Raises
    ValueError if a side is empty.
    """
    training = []
    validation = []
    for record in records:
        digest = hashlib.sha256(record.texts[0].encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32
        (validation if held_out else training).append(record)

    known = set().union(*map(classes_of, training))
    training += [record for record in validation if not classes_of(record) <= known]
    validation = [record for record in validation if classes_of(record) <= known]

    if records[0].target is None:  # search
        held_out_code = {record.texts[1] for record in validation}
        kept = [record for record in training if record.texts[1] not in held_out_code]
        skipped["queries whose code is held out"] += len(training) - len(kept)
        training = kept

    if not training or not validation:
        words = "too few lines to hold out a tenth; give some in a file of their own"
        raise ValueError(f"{path}: {words}, by --validation")
    return training, validation


def classes_of(record):
    """The classes that a record teaches."""
    target = record.target
    if isinstance(target, str):
        return {target}
    if isinstance(target, frozenset):
        return target
    return {span.category for span in target} if isinstance(target, list) else set()
