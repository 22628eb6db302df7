r"""The templates of the synthetic data: what is written into real code, with places for values.

The texts are in `templates/*.txt`; the header of each says how it is to be read. Two kinds:

    written     a line is a template: comments, code, data, harmless
    combined    each name in each style, as {kebab}="{value}" and api_key give api-key="{KEY}":
                assignments, rows of tables, phrases

No template is in two of the splits train, validation and test, nor is a value (values.py) or an
excerpt of real code (synthesize.py). So a detector that learned the training data by heart gets
nothing for it in the test. A few forms that differ only in a blank or a quote are in two splits.
"""

import hashlib
import re
from pathlib import Path
from string import Formatter

from pii.labels import CATEGORIES, Span

SPLITS = {"train": 0.75, "validation": 0.05, "test": 0.2}  # of files, templates and values alike
FOLDER = Path(__file__).with_suffix("")  # pii/templates
WRITTEN = ("comments", "code", "data", "harmless")
TURNS = "train train test train train validation train test train train".split()
PRIVATE_KEY = "-----BEGIN{kind} PRIVATE KEY-----"


def split_of(text):
    """The split in which a value, a template or a file may appear, by its hash."""
    digest = hashlib.sha256(text.encode(errors="replace")).digest()
    share = int.from_bytes(digest[:8]) / 2**64  # uniform in [0, 1)
    for split, part in SPLITS.items():
        share -= part
        if share < 0:
            return split
    return split  # the parts add up to 1 but for rounding


def read_lines(name):
    """The lines of templates/`name`.txt below its header, which ends with a blank line."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    _, _, body = text.partition("\n\n")
    return [line for line in body.split("\n") if line]


def read_table(name):
    """{kind: [alternative, ...]} of a file of lines `kind: a | b | c`."""
    table = {}
    for line in read_lines(name):
        kind, _, alternatives = line.partition(": ")
        if alternatives.startswith("= "):
            table[kind] = table[alternatives.removeprefix("= ")]
        else:
            table.setdefault(kind, []).extend(alternatives.split(" | "))
    return table


def written(name, split):
    """The templates of a written file that belong to a split.

    Lines take turns, ordered by what they hold, so that each split has its share of every category.
    """

    def order(line):
        held = [category for category in CATEGORIES if f"{{{category}}}" in line]
        return held, hashlib.sha256(line.encode()).digest()

    lines = sorted(read_lines(name), key=order)
    return [line for i, line in enumerate(lines) if TURNS[i % len(TURNS)] == split]


def assignments(kind, names):
    """All templates that assign a value of a kind to one of these names."""
    styles = read_lines("assignment_styles")
    found = []
    for name in names:
        first, *rest = name.split("_")
        spelled = {
            "{snake}": name,
            "{UPPER}": name.upper(),
            "{kebab}": name.replace("_", "-"),
            "{camel}": first + "".join(map(str.title, rest)),
            "{value}": f"{{{kind}}}",
        }
        found += [replace_all(style, spelled) for style in styles]
    return found


def phrases(kind, leads):
    """All templates in which one of these leads comes before a value of a kind."""
    styles = read_lines("phrase_styles")
    found = []
    for lead in leads:
        capital = lead[0].upper() + lead[1:]
        words = {"{lead}": lead, "{Lead}": capital, "{value}": f"{{{kind}}}"}
        found += [replace_all(style, words) for style in styles]
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


def replace_all(text, replacements):
    """The text with each key of a dict replaced by its value."""
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def templates_of(split):
    """{group: [template, ...]} of a split, with every category in it.

    The group "assignments" is a list of such lists, one for each kind of value: one of them is
    drawn first, as otherwise the kinds with the most names would fill the data.
    """
    groups = {name: written(name, split) for name in WRITTEN}
    combined = [assignments(*row) for row in read_table("assignment_names").items()]
    combined += [rows()] * 3
    combined += [phrases(*row) for row in read_table("phrase_leads").items()]

    # These are so many that their hashes give each split its share.
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

    # Choices first: an alternative that is not taken must not draw a value.
    def choose(choice):
        return values.random.choice(choice[1].split("|"))

    chosen = re.sub(r"\[\[(.*?)\]\]", choose, template)
    chosen = chosen.replace(r"\n", "\n").replace(r"\t", "\t")

    text = ""
    spans = []
    for literal, kind, size, _ in Formatter().parse(chosen):
        text += literal
        if kind is None:  # behind the last place
            continue
        value = sign if kind == "c" else values.draw(kind, size)
        if kind in CATEGORIES:
            spans.append(Span(len(text), len(text) + len(value), kind))
        text += value
    if sign == "<!--" and template.startswith("{c}"):
        text += " -->"
    return text, spans
