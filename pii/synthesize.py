"""Labelled data from nothing: real code, into which personal data that is nobody's is written.

    document   = lines of a real file + 2 to 7 rendered templates (templates.py, values.py)
    train.jsonl, validation.jsonl, test.jsonl:
        {"text": ..., "fragments": [{"category": ..., "position": [start, end], "value": ...}, ...]}

which is the layout of the annotated set of StarPII (Li et al., StarCoder, 2023, section 4); that
set may not be redistributed. Lines of real files that may hold personal data are left out, as
nobody has labelled them. The splits share no files, values or templates.
"""

import json
import os
import random
import re
from typing import NamedTuple

from tqdm import tqdm

from common.files import write_whole
from pii.hosts import read_hosts
from pii.templates import SPLITS, read_table, render, templates_of
from pii.values import Values

# {kind: the sign that begins a comment, None if it has no comments}; "#" for all others.
COMMENT_SIGN = {
    kind: None if sign == "none" else sign
    for sign, kinds in read_table("comment_signs").items()
    for kind in kinds
}
GROUPS = ["comments", "code", "data", "harmless", "harmless"] + ["assignments"] * 3  # by weight

# What marks a line of a real file that may hold personal data.
PERSONAL = re.compile(
    r"author|copyright|\(c\)|written by|contribut|maintain|thanks|credit|[\w.]@\w|patch by|"
    r"bug report|\b[A-Z][a-z]+ [A-Z][a-z]+\b|password|passwd|secret|token|api.?key|"
    r"\d+\.\d+\.\d+\.\d+|/home/|github\.com/|-----BEGIN|[A-Za-z0-9+/]{40}",
    re.IGNORECASE,
)


class Planted(NamedTuple):
    """A template between the lines of a file."""

    template: str
    group: str  # of GROUPS


def excerpt(text, generator):
    """Some neighbouring lines of a real file, without those that may hold personal data."""
    lines = text.split("\n")
    size = generator.randint(4, 24)  # lines
    begin = generator.randrange(max(1, len(lines) - size))
    return [
        line
        for line in lines[begin : begin + size]
        if len(line) < 200 and not PERSONAL.search(line)  # long lines are data
    ]


def draw(generator, groups):
    """Any template, as a `Planted`."""
    group = generator.choice(GROUPS)  # the group first, as some are far larger
    templates = groups[group]
    if group == "assignments":  # a list for each kind of value
        templates = generator.choice(templates)
    return Planted(generator.choice(templates), group)


def plant(lines, generator, groups, sign):
    """Puts 2 to 7 templates between lines, a list that it changes.

    sign: begins a comment; None if the language has none, and then none are planted.
    """
    for _ in range(generator.randint(2, 7)):
        planted = draw(generator, groups)
        while sign is None and "{c}" in planted.template:
            planted = draw(generator, groups)
        lines.insert(generator.randint(0, len(lines)), planted)


def compose(host, values, groups):
    """A document: an excerpt with some templates in it or, one time in four, templates alone.

    host: a `Host`. values: a `Values`, whose generator decides all. groups: of `templates_of`.
    """
    # Some documents have no code at all, as a table or a log has none.
    lines = excerpt(host.text, values.random) if values.random.random() < 0.75 else []
    sign = COMMENT_SIGN.get(host.kind, "#")
    plant(lines, values.random, groups, sign)

    text = ""
    fragments = []
    indent = ""  # of the last line of the file that has one
    for line in lines:
        if isinstance(line, str):
            if line.strip():  # a blank line says nothing of the indentation
                indent = line[: len(line) - len(line.lstrip())]
            text += line + "\n"
            continue

        # A template is indented as the line above it. Data, such as a row of a table, is not.
        rendered, spans = render(line.template, values, sign)
        if line.group != "data":
            text += indent
        for start, end, category in spans:
            position = [len(text) + start, len(text) + end]
            value = rendered[start:end]
            fragments.append({"category": category, "position": position, "value": value})
        text += rendered + "\n"
    return {"text": text, "fragments": fragments}


def synthesize(sources, out, count=16_000, seed=0):
    """Writes train.jsonl, validation.jsonl and test.jsonl with `count` documents into `out`.

    sources: as `python -m corpus` reads them; [] for those of `hosts.default_sources`.
    Returns {split: documents}. Raises ValueError if the sources or `count` are too small, and if
    `out` holds such files already.
    """
    sizes = {split: round(count * part) for split, part in SPLITS.items()}  # documents
    paths = {split: os.path.join(out, f"{split}.jsonl") for split in SPLITS}
    for path in paths.values():  # they may be annotated by hand
        if os.path.exists(path):
            raise ValueError(f"{path}: exists already; choose another directory or remove it")
    if not all(sizes.values()):
        raise ValueError(f"{count} documents are too few: each split needs some")
    hosts = read_hosts(sources)  # after the quick checks

    # Each split has its own generator, so it stays the same if another changes. All is made before
    # anything is written: stopped meanwhile, it leaves nothing behind.
    contents = {}
    for split, size in sizes.items():
        values = Values(split, random.Random(f"{seed} {split}"))
        groups = templates_of(split)
        lines = []
        for _ in tqdm(range(size), desc=f"writing {split}", unit=" documents"):
            host = values.random.choice(hosts[split])
            lines.append(json.dumps(compose(host, values, groups)) + "\n")
        contents[split] = "".join(lines)

    os.makedirs(out, exist_ok=True)
    for split, content in contents.items():
        write_whole(paths[split], content)
    return sizes
