"""Labelled data: real code, into which personal data that is nobody's is written.

    document   = lines of a real file + 2 to 7 rendered templates (templates.py, values.py)
    train.jsonl, validation.jsonl, test.jsonl:
        {"text": ..., "fragments": [{"category": ..., "position": [start, end], "value": ...}, ...]}

which is the layout of the annotated set of StarPII (Li et al., StarCoder, 2023, section 4); that
set may not be redistributed. Lines of real files that may hold personal data are left out, as
nobody has labelled them. The splits share no files, values or templates.

Some blocks of real files were labelled by hand (real.jsonl). They join the training and the
validation if the packages that they are from were fetched. Files of which all is labelled also make
ordinary.jsonl, in which false alarms are counted.
"""

import bisect
import json
import os
import random
import re
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.files import write_whole
from pii.candidates import candidates
from pii.hosts import labelled_texts, read_hosts
from pii.look import leads
from pii.rules import found_by_rules
from pii.templates import SPLITS, read_table, render, templates_of
from pii.values import Values

# {kind: the sign that begins a comment, None if it has no comments}; "#" for all others.
COMMENT_SIGN = {
    kind: None if sign == "none" else sign
    for sign, kinds in read_table("comment_signs").items()
    for kind in kinds
}
REAL = Path(__file__).with_name("real.jsonl")
REAL_TIMES = {"train": 4, "validation": 1}  # how often a block that was labelled by hand is there
GROUPS = ["comments", "code", "data", "harmless", "harmless"] + ["assignments"] * 3  # by weight

# Excerpts are taken around such words more often than elsewhere: most false alarms stand there.
LOOKALIKE = re.compile(
    r"pass(?:w|ph)|\bpwd|secret|token|api.?key|auth|user|login|owner|licen[cs]e|copyright|by [A-Z]"
    r"|[A-Z][a-z]+ [A-Z][a-z]+|version|https?://|[0-9a-f]{20}",
)


class Planted(NamedTuple):
    """A template between the lines of a file."""

    template: str
    group: str  # of GROUPS


def ordinary_lines(text):
    """The lines of a real text without those that may hold personal data or a secret.

    Nobody has labelled them. Long lines, which are data, are left out, too.
    """
    starts = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))
    left_out = {bisect.bisect(starts, place) for place in leads(text)}  # numbers of lines, from 1
    for found in (*found_by_rules(text), *candidates(text)):
        first = bisect.bisect(starts, found.start)
        left_out.update(range(first, bisect.bisect(starts, found.end - 1) + 1))
    return [
        line
        for number, line in enumerate(text.split("\n"), 1)
        if number not in left_out and len(line) < 200
    ]


def excerpt(text, generator):
    """Some neighbouring lines of a real file, without those that may hold personal data."""
    lines = text.split("\n")
    size = generator.randint(4, 24)  # lines
    begin = generator.randrange(max(1, len(lines) - size))
    if generator.random() < 0.5:
        alike = [number for number, line in enumerate(lines) if LOOKALIKE.search(line)]
        if alike:
            begin = max(0, generator.choice(alike) - generator.randrange(size))
    return ordinary_lines("\n".join(lines[begin : begin + size]))


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
    """A document: an excerpt with some templates in it; or either of them alone.

    host: a `Host`. values: a `Values`, whose generator decides all. groups: of `templates_of`.
    """
    # Some documents have no code at all, as a table or a log has none.
    form = values.random.random()
    lines = excerpt(host.text, values.random) if form < 0.8 else []
    sign = COMMENT_SIGN.get(host.kind, "#")
    if form >= 0.2 or not "".join(lines).strip():  # and some have nothing but code
        plant(lines, values.random, groups, sign)

    text = ""
    found = []  # spans
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
            found.append((len(text) + start, len(text) + end, category))
        text += rendered + "\n"
    return {"text": text, "fragments": fragments_of(text, found)}


# ---- blocks of real files, labelled by hand ------------------------------------------------------


class Labels(NamedTuple):
    """What real.jsonl says of some real files. A digest: see `hosts.labelled_texts`."""

    blocks: dict  # digest -> [(start, end) or (start, end, spans within the block), ...]
    whole: set  # digests of files of which all blocks that the detector looks at are labelled


def read_real():
    """The `Labels` of real.jsonl: places and no values, in the files of packages.txt."""
    labels = Labels({}, set())
    with open(REAL, encoding="utf-8") as lines:
        for package in map(json.loads, lines):
            labels.blocks.update(package["files"])
            labels.whole.update(package.get("whole", []))
    return labels


def fragments_of(text, spans):
    """The spans of a text in the layout of a labelled document."""
    return [
        {"category": category, "position": [start, end], "value": text[start:end]}
        for start, end, category in spans
    ]


def real_documents(text, blocks):
    """The labelled blocks of a real file, each a document."""
    found = []
    for start, end, *spans in blocks:
        block = text[start:end]
        found.append({"text": block, "fragments": fragments_of(block, spans[0] if spans else [])})
    return found


def ordinary_document(text, blocks):
    """A real file, in which all that the detector looks at is labelled."""
    spans = []
    for begin, _, *inside in blocks:
        for start, end, category in inside[0] if inside else []:
            spans.append((begin + start, begin + end, category))
    return {"text": text, "fragments": fragments_of(text, spans)}


# ---- writing -------------------------------------------------------------------------------------


def synthesize(sources, out, count=16_000, seed=0):
    """Writes train.jsonl, validation.jsonl and test.jsonl with `count` documents into `out`.

    To them come the blocks that were labelled by hand, and ordinary.jsonl, of files that `sources`
    have. sources: as `python -m corpus` reads them; [] for `hosts.default_sources`. Returns {name:
    documents}. Raises ValueError if the sources or `count` are too small, and if `out` holds such
    files already.
    """
    sizes = {split: round(count * part) for split, part in SPLITS.items()}  # documents
    for name in (*SPLITS, "ordinary"):
        path = os.path.join(out, f"{name}.jsonl")
        if os.path.exists(path):  # they may be annotated by hand
            raise ValueError(f"{path}: exists already; choose another directory or remove it")
    if not all(sizes.values()):
        raise ValueError(f"{count} documents are too few: each split needs some")
    hosts = read_hosts(sources)  # after the quick checks
    labels = read_real()
    texts = labelled_texts(sources, labels.blocks)

    # Each split has its own generator, so it stays the same if another changes. All is made before
    # anything is written: stopped meanwhile, it leaves nothing behind.
    contents = {}
    for split, size in sizes.items():
        values = Values(split, random.Random(f"{seed} {split}"))
        groups = templates_of(split)
        documents = []
        for _ in tqdm(range(size), desc=f"writing {split}", unit=" documents"):
            host = values.random.choice(hosts[split])
            documents.append(compose(host, values, groups))
        if split != "test":  # which is synthetic alone
            for digest, text in texts[split].items():
                documents += real_documents(text, labels.blocks[digest]) * REAL_TIMES[split]
        contents[split] = documents
    ordinary = [
        ordinary_document(text, labels.blocks[digest])
        for digest, text in texts["validation"].items()
        if digest in labels.whole
    ]
    if ordinary:
        contents["ordinary"] = ordinary

    os.makedirs(out, exist_ok=True)
    for name, documents in contents.items():
        lines = [json.dumps(document) + "\n" for document in documents]
        write_whole(os.path.join(out, f"{name}.jsonl"), "".join(lines))
    return {name: len(documents) for name, documents in contents.items()}
