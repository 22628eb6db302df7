r"""The templates of the synthetic data: what is written into real code, with places for values.

The texts are in `templates/*.txt`; the header of each says how it is to be read. Two kinds:

    written     a line is a template: comments, code, data, harmless
    combined    each word in each style, as api_key and {kebab}="{value}" give api-key="{KEY}":
                assignments, phrases, and rows of tables

No template is in two of the splits train, validation and test, nor is a value (values.py) or an
excerpt of real code (synthesize.py). So a detector that learned the training data by heart gains
nothing from that in the test. But a few templates differ only in a blank or a quote.
"""

import hashlib
import re
from pathlib import Path
from string import Formatter

from finetune.records import Span
from pii.labels import CATEGORIES

SPLITS = {"train": 0.75, "validation": 0.05, "test": 0.2}  # of files, templates and values alike
FOLDER = Path(__file__).with_suffix("")  # pii/templates
WRITTEN = ("comments", "code", "data", "harmless")  # files; each is a group
TURNS = "train train test train train validation train test train train".split()
COMMENT_END = {"<!--": " -->", "/*": " */"}  # of the signs whose comments have one
PRIVATE_KEY = "-----BEGIN{kind} PRIVATE KEY-----"  # stands for a whole block, which is one KEY


def split_of(text):
    """The split in which a value, a template or a file may appear, by its hash."""
    digest = hashlib.sha256(text.encode(errors="replace")).digest()
    share = int.from_bytes(digest[:8]) / 2**64  # uniform in [0, 1)
    for split, part in SPLITS.items():
        share -= part
        if share < 0:
            return split
    return split  # the parts add up to 1 but for rounding


# Reading templates/*.txt.


def read_lines(name):
    """The lines of templates/`name`.txt below its header, which ends with a blank line."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    _, _, body = text.partition("\n\n")
    return [line for line in body.split("\n") if line]  # not stripped: blanks are part of them


def read_table(name):
    """{kind: [alternative, ...]} of a file of lines `kind: a | b | c`."""
    table = {}
    for line in read_lines(name):
        kind, _, alternatives = line.partition(": ")
        if alternatives.startswith("= "):  # `fake_key: = KEY`: the same as KEY
            table[kind] = table[alternatives.removeprefix("= ")]
        else:
            table.setdefault(kind, []).extend(alternatives.split(" | "))
    return table


# The templates of a split.


def written(name, split):
    """The templates of a written file that belong to a split."""

    def order(line):
        held = [category for category in CATEGORIES if f"{{{category}}}" in line]
        return held, hashlib.sha256(line.encode()).digest()

    # Ordered by what they hold, lines take turns: so each split has its share of every category.
    lines = sorted(read_lines(name), key=order)
    return [line for i, line in enumerate(lines) if TURNS[i % len(TURNS)] == split]


def replace_all(text, replacements):
    """The text with each key of a dict replaced by its value."""
    for old, new in replacements.items():  # str.format would need all places
        text = text.replace(old, new)
    return text


def combine(kind, words, styles):
    """All templates with one of the words in one of the styles, and a value of a kind."""
    found = []
    for word in words:
        first, *rest = word.split("_")
        spelled = {
            "{value}": f"{{{kind}}}",
            "{snake}": word,  # api_key
            "{UPPER}": word.upper(),  # API_KEY
            "{kebab}": word.replace("_", "-"),  # api-key
            "{camel}": first + "".join(map(str.title, rest)),  # apiKey
            "{lead}": word,  # written by
            "{Lead}": word[0].upper() + word[1:],  # Written by
        }
        found += [replace_all(style, spelled) for style in styles]
    return found


def rows():
    """All templates of rows, such as `| {NAME} | {EMAIL} |`."""
    found = []
    for kinds in read_lines("row_fields"):
        fields = [f"{{{kind}}}" for kind in kinds.split()]
        for style in read_lines("row_styles"):
            before, between, after = style.split("{}")
            found.append(before + between.join(fields) + after)
    return found


def templates_of(split):
    """{group: [template, ...]} of a split; every group, but the harmless, has every category.

    The group "assignments" is a list of such lists, one for each kind of value: first one of them
    is drawn, as otherwise the kinds with the most names would fill the data.
    """
    groups = {name: written(name, split) for name in WRITTEN}
    combined = []
    for name, words in read_table("assignment_names").items():
        # Three times as often as another kind: secrets are assigned, and few are in the rest.
        often = 3 if name in ("KEY", "PASSWORD") else 1
        combined += [combine(name, words, read_lines("assignment_styles"))] * often
    combined += [rows()] * 3  # drawn three times as often as one kind of assignment
    for name, words in read_table("phrase_leads").items():
        combined.append(combine(name, words, read_lines("phrase_styles")))

    # There are so many of these that hashes give each split its share. A template that is also in a
    # written file is left out, as it may be in another split there.
    elsewhere = {line for name in WRITTEN for line in read_lines(name)}
    groups["assignments"] = [
        [line for line in lines if line not in elsewhere and split_of(line) == split]
        for lines in combined
    ]
    return groups


def render(template, values, sign="#"):
    """(text, [Span, ...]) of a template whose places are filled from `values`, a `Values`.

    sign: begins a comment in the language around it.
    """
    if template == PRIVATE_KEY:
        text = values.private_key()
        return text, [Span(0, len(text), "KEY")]

    def choose(choice):
        return values.random.choice(choice[1].split("|"))

    # Choices come first: an alternative that is not taken must not draw a value.
    chosen = re.sub(r"\[\[(.*?)\]\]", choose, template)
    chosen = chosen.replace(r"\n", "\n").replace(r"\t", "\t")

    text = ""
    spans = []
    for literal, kind, size, _ in Formatter().parse(chosen):  # {kind} or {kind:size}
        text += literal
        if kind is None:  # behind the last place
            continue
        value = sign if kind == "c" else values.draw(kind, size)
        if kind in CATEGORIES:
            spans.append(Span(len(text), len(text) + len(value), kind))
        text += value
    if template.startswith("{c}"):
        text += COMMENT_END.get(sign, "")
    return text, spans
