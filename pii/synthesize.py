"""TODO."""

import json
import os
import random
import re
import sysconfig
from collections import Counter

from tqdm import tqdm

from common.files import write_whole
from corpus.build import documents, text_of
from pii.templates import SPLITS, render, split_of, templates
from pii.values import Values

COMMENT_SIGNS = {
    "//": """c cpp c-sharp java javascript typescript go rust scala kotlin swift dart php groovy solidity systemverilog verilog cuda glsl
             protocol-buffer zig thrift f-sharp stan""".split(),
    "--": "sql haskell lua ada elm vhdl agda idris applescript".split(),
    "%": "tex erlang prolog matlab".split(),
    ";;": "common-lisp clojure scheme racket emacs-lisp".split(),
    "<!--": "html xslt markdown java-server-pages".split(),
    "'": ["visual-basic"],
}


COMMENT_SIGN = {
    language: sign for sign, languages in COMMENT_SIGNS.items() for language in languages
}


# Lines of real files that may hold personal data already, which nobody has labelled.
PERSONAL = re.compile(
    r"author|copyright|\(c\)|written by|contribut|maintain|thanks|credit|[\w.]@\w|patch by|bug report|\b[A-Z][a-z]+ [A-Z][a-z]+\b|"
    r"password|passwd|secret|token|api.?key|\d+\.\d+\.\d+\.\d+|/home/|github\.com/|-----BEGIN|[A-Za-z0-9+/]{40}",
    re.IGNORECASE,
)


def excerpt(text, generator):
    """Some neighbouring lines of a real file, without those that may hold personal data."""
    lines = text.split("\n")
    size = generator.randint(4, 24)
    begin = generator.randrange(max(1, len(lines) - size))
    return [
        line
        for line in lines[begin : begin + size]
        if len(line) < 200 and not PERSONAL.search(line)
    ]


def compose(host, language, values, groups):
    """A document: an excerpt with some templates rendered into it, or, one time in four, templates alone."""
    random, sign = values.random, COMMENT_SIGN.get(language, "#")
    lines = excerpt(host, random) if random.random() < 0.75 else []
    for _ in range(random.randint(2, 7)):
        group = random.choice(
            [
                "comments",
                "code",
                "data",
                "harmless",
                "harmless",
                "assignments",
                "assignments",
                "assignments",
            ]
        )
        kind = groups[group] if group != "assignments" else random.choice(groups[group])
        lines.insert(random.randint(0, len(lines)), (random.choice(kind), group))
    text, fragments, indent = "", [], ""
    for line in lines:
        if isinstance(line, str):
            indent = line[: len(line) - len(line.lstrip())] if line.strip() else indent
            text += line + "\n"
            continue
        template, group = line
        rendered, found = render(template, values, sign)
        begin = len(text) + (len(indent) if group != "data" else 0)
        text += (indent if group != "data" else "") + rendered + "\n"
        fragments += [
            {"category": c, "position": [begin + a, begin + b], "value": rendered[a:b]}
            for c, a, b in found
        ]
    return {"text": text, "fragments": fragments}


def synthesize(sources, out, count=16_000, seed=0):
    """Writes `out`/train.jsonl, validation.jsonl and test.jsonl with `count` documents made from the files of `sources`, as `corpus` reads
    them; without any, of the standard library of the running Python.

    Returns {split: documents}. Raises ValueError for sources without files, and for an `out` that holds such files already."""
    sources = sources or [sysconfig.get_paths()["stdlib"]]
    paths = {split: os.path.join(out, f"{split}.jsonl") for split in SPLITS}
    for path in paths.values():
        if os.path.exists(path):
            raise ValueError(f"{path}: exists already; choose another directory or remove it")
    hosts = {split: [] for split in SPLITS}
    for _, _, document in documents(sources, Counter(), description="reading"):
        pieces, reason = text_of(document)
        if not reason and len(pieces) == 1 and not pieces[0][0]:
            hosts[split_of(pieces[0][1])].append((pieces[0][1], document.language))
        if sum(map(len, hosts.values())) >= 20_000:
            break
    if not all(hosts.values()):
        raise ValueError(
            f"too few files in {', '.join(sources)}: train, validation and test need some each"
        )
    if not all(round(count * part) for part in SPLITS.values()):
        raise ValueError(
            f"{count} documents are too few: train, validation and test need some each"
        )
    made = {}
    for split, part in SPLITS.items():
        values, groups = Values(split, random.Random(f"{seed} {split}")), templates(split)
        lines = []
        for _ in tqdm(range(round(count * part)), desc=f"writing {split}", unit=" documents"):
            host, language = values.random.choice(hosts[split])
            lines.append(json.dumps(compose(host, language, values, groups)))
        made[split] = lines
    os.makedirs(out, exist_ok=True)
    for split, lines in made.items():
        write_whole(paths[split], "\n".join(lines) + "\n")
    return {split: len(lines) for split, lines in made.items()}
