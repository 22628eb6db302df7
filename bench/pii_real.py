"""How well personal data and secrets are found in real code, and how fast, beside other detectors.

The files come from 49 packages of PyPI, npm and Debian (pii_packages.txt): open to all, in some
twenty languages. No package was chosen for what is in it, and no detector may be trained on one. Of
a package's text files of 500 bytes to 60 kB, without licences, translations, generated and minified
ones, those are taken whose paths have the smallest SHA-256, a dozen of one ending at most: up to
38,000 characters of tests, examples, configurations and documents; 58,000 with the rest; and 26,000
more of the first kind whose paths speak of users, mail, configurations or secrets. These last were
added when the others turned out to hold under a hundred secrets; by their paths, not their content.

All that any contender found in them has been read in its context and judged, once; and beside it
lines with a word such as password, token or author and a value. What none of these showed is
missing, so recall is an upper bound. The same line in several files of a package has one verdict. A
line of pii_labels.jsonl is a file:

    {"file": "pypi-name-1.0/path/in/archive", "sha256": ..., "judged": [[start, end, "KEY"], ...]}

NONE is what was found and is nothing; AMBIGUOUS counts neither for nor against. Places are in
characters; the values themselves stand nowhere in this repository.

A finding is right if it shares a character with a span of its category, where KEY and PASSWORD are
one category, as tools name them differently. Pieces of one span count once. A finding that touches
nothing judged is wrong, is counted as unjudged, and goes to runs/pii-unjudged.jsonl; `python -m
bench.pii_judge` takes the verdict. A tool is scored only on the categories that it looks for.

pii_before.json has what could not be found again: by the detector at commit 2a00f84, fine-tuned for
300 steps from a tiny pretrained encoder; and by the rules of gitleaks 8.30, which are read from its
program as a package of PyPI ships it, and applied with Python's regular expressions. That comes
near to gitleaks, but has not been compared with it.

KEY and PASSWORD together are 145 spans of 74 different values in 26 packages, half of the names
stand in two lists of credits, and 60 of the 68 IP addresses in two files. Differences of a few
percent say nothing.
"""

import hashlib
import importlib.util
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench.measure import python_files, report
from common.files import read_json, write_whole
from corpus.packages import fetch, read_packages
from pii import SHIPPED
from pii.detector import SECRETS, Detector
from pii.labels import CATEGORIES
from pii.peers import (
    PEERS,
    entities_reported,
    scan_with_credsweeper,
    scan_with_detect_secrets,
)
from pii.rules import RULE_CATEGORIES
from pii.scan import scan
from pii.text_files import pieces, readable_encoding

HERE = Path(__file__).parent
PACKAGES = HERE / "pii_packages.txt"
LABELS = HERE / "pii_labels.jsonl"
BEFORE = HERE / "pii_before.json"
FOLDER = Path("corpora/pii-test")  # the archives, and what is taken from them
UNJUDGED = Path("runs/pii-unjudged.jsonl")

VERDICTS = (*CATEGORIES, "NONE", "AMBIGUOUS")
ORDINARY = 20_000_000  # bytes of ordinary code, for the speed
AT_ONCE = 256  # files that a detector sees together


# ---- the labels ----------------------------------------------------------------------------------


class Span(NamedTuple):
    """A place in a file, and the verdict on it."""

    start: int  # in characters
    end: int  # behind the last
    verdict: str  # of VERDICTS


class LabelledFile(NamedTuple):
    """A file, and all that has been judged in it."""

    name: str  # "pypi-name-1.0/path/in/archive"
    sha256: str  # of its bytes
    judged: list  # of Span, sorted

    @property
    def stem(self):
        """The name of its archive, without the ending."""
        return self.name.split("/")[0]


def read_labels(path=LABELS):
    """[LabelledFile, ...]. Raises ValueError that names the line for one that is damaged."""
    files = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                spans = [Span(*span) for span in record["judged"]]
                files.append(LabelledFile(record["file"], record["sha256"], spans))
                _check_spans(spans)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: damaged ({error!r})") from None
    return files


def _check_spans(spans):
    """Raises ValueError for spans without order, without a verdict, or that contradict another."""
    if spans != sorted(spans):
        raise ValueError("spans without order")
    end = 0  # of what is no NONE so far
    for span in spans:
        if span.verdict not in VERDICTS or not 0 <= span.start < span.end:
            raise ValueError(f"no verdict: {list(span)}")
        if span.verdict != "NONE":
            if span.start < end:
                raise ValueError(f"overlaps another verdict: {list(span)}")
            end = span.end


def write_labels(files, path=LABELS):
    """Writes what `read_labels` reads."""
    text = ""
    for file in files:
        record = {"file": file.name, "sha256": file.sha256, "judged": sorted(file.judged)}
        text += json.dumps(record, ensure_ascii=False) + "\n"
    write_whole(path, text)


# ---- the files -----------------------------------------------------------------------------------


def labelled_files(folder=FOLDER, labels=LABELS):
    """([LabelledFile, ...], [path, ...]) of all files that can be had, fetched if they are missing.

    Raises ValueError for a file with other content than the one that was judged.
    """
    labelled = read_labels(labels)
    wanted = {}  # {name of an archive: {path in it: LabelledFile}}
    for file in labelled:
        wanted.setdefault(file.stem, {})[file.name.split("/", 1)[1]] = file
    for archive in fetch(read_packages(PACKAGES), folder):
        stem = archive.name.removesuffix(".tgz").partition(".tar.")[0]
        files = Path(folder, "files", stem)
        missing = [name for name in wanted[stem] if not (files / name).exists()]
        if missing:
            _unpack(archive, missing, files)

    # A registry may have dropped a package; the other files are still worth measuring.
    paths = [Path(folder, "files", file.name) for file in labelled]
    here = [(file, path) for file, path in zip(labelled, paths) if path.exists()]
    for file, path in here:
        if hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256:
            raise ValueError(f"{path}: not the file that was judged; remove it")
    if len(here) < len(labelled):
        print(f"{len(labelled) - len(here)} of {len(labelled)} files could not be had")
    return [file for file, _ in here], [str(path) for _, path in here]


def _unpack(archive, names, directory):
    """Writes these members of an archive below a directory."""
    with tarfile.open(archive) as tar:
        for name in names:
            content = tar.extractfile(name).read()
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def text_of(path):
    """The text of a file as the detector reads it: with its line ends and a byte order mark."""
    encoding = readable_encoding(path, Counter())
    with open(path, "rb") as file:
        return "".join(text for text, _ in pieces(file, encoding))


# ---- the contenders ------------------------------------------------------------------------------


class Contender(NamedTuple):
    """What finds, and what for."""

    find: Callable  # from ([path, ...], [text, ...]) to [[Entity, ...], ...]
    categories: tuple  # that it looks for
    is_timed: bool = True  # False if its findings are read from a file


def find_by_detector(detector, paths, texts):
    """[[Entity, ...], ...] of one of ours."""
    found = []
    for begin in range(0, len(texts), AT_ONCE):
        found += detector.find(texts[begin : begin + AT_ONCE])
    return found


def find_by_scanning(scan, paths, texts):
    """[[Entity, ...], ...] of a peer that scans files; in one process, as ours."""
    index = {os.path.realpath(path): number for number, path in enumerate(paths)}
    found = [set() for _ in paths]
    for line in scan(paths, processes=1):
        number = index[os.path.realpath(line.path)]
        found[number].update(entities_reported(line, texts[number]))
    return [sorted(entities) for entities in found]


def find_by_text(find, paths, texts):
    """[[Entity, ...], ...] of a peer that takes texts."""
    return find(texts)


def find_in_record(record, names, paths, texts):
    """[[(start, end, category, score), ...], ...] of findings that were written down."""
    return [record.get(name, []) for name in names]


def contenders(model, names):
    """{name: Contender}: those written down, ours, and the peers that are installed."""
    chosen = {}
    for name, record in read_json(BEFORE).items():
        categories = SECRETS if name.startswith("gitleaks") else CATEGORIES
        chosen[name] = Contender(partial(find_in_record, record, names), categories, False)

    rules = Detector(rules=True)
    both = Detector.from_pretrained(model, rules=True)
    chosen["rules"] = Contender(partial(find_by_detector, rules), RULE_CATEGORIES)
    chosen["model + rules"] = Contender(partial(find_by_detector, both), CATEGORIES)
    # What is lost by not showing the model all of a text.
    everywhere = Detector(
        both.model, both.tokenizer, rules=True, threshold=both.thresholds, everywhere=True
    )
    chosen["the same, everywhere"] = Contender(partial(find_by_detector, everywhere), CATEGORIES)

    # Those that take files see the names of the files, too: they depend on the kind of a file.
    scans = {
        "detect-secrets": partial(find_by_scanning, scan_with_detect_secrets),
        "credsweeper": partial(find_by_scanning, scan_with_credsweeper),
    }
    for name, peer in PEERS.items():
        if importlib.util.find_spec(peer.package):
            find = scans.get(name) or partial(find_by_text, peer.find)
            chosen[name] = Contender(find, peer.categories)
        else:
            print(f"{name} is not measured, as it is not installed")
    return chosen


# ---- the score -----------------------------------------------------------------------------------


class Tally(NamedTuple):
    """What is counted of one category."""

    right: set  # of judged spans that a finding of this category touches
    wrong: int  # findings that touch none, the unjudged ones among them
    found: int  # judged spans of this category that some finding touches
    expected: int  # judged spans of this category


def is_same(verdict, category):
    """True if a finding of this category is right where this is the verdict."""
    return verdict == category or verdict in SECRETS and category in SECRETS


def touching(spans, start, end):
    """The spans that share a character with start:end."""
    return [span for span in spans if span.start < end and start < span.end]


def is_found(span, entities):
    """True if one of the entities is right about a span."""
    return any(
        start < span.end and span.start < end and is_same(span.verdict, category)
        for start, end, category, _ in entities
    )


def judge(file, entities):
    """([(entity, Span), ...] that are right, [entity, ...] wrong, [entity, ...] unjudged)."""
    right = []
    wrong = []
    unjudged = []
    for entity in entities:
        start, end, category = entity[:3]
        spans = touching(file.judged, start, end)
        agreeing = [span for span in spans if is_same(span.verdict, category)]
        if agreeing:
            right.append((entity, agreeing[0]))
        elif not spans:
            unjudged.append(entity)
        elif all(span.verdict != "AMBIGUOUS" for span in spans):
            wrong.append(entity)
    return right, wrong, unjudged


def score(files, found, categories):
    """({category: Tally}, [(file name, entity), ...] that are unjudged) of a contender.

    found: [[(start, end, category, ...), ...], ...] in each file.
    """
    tallies = {category: Tally(set(), 0, 0, 0) for category in categories}
    unjudged = []
    for file, entities in zip(files, found):
        entities = [entity for entity in entities if entity[2] in categories]
        right, wrong, unknown = judge(file, entities)
        unjudged += [(file.name, entity) for entity in unknown]
        for entity, span in right:
            tallies[entity[2]].right.add((file.name, span))  # pieces of a span count once
        counts = Counter(entity[2] for entity in wrong + unknown)
        for category, tally in tallies.items():
            expected = [span for span in file.judged if span.verdict == category]
            tallies[category] = tally._replace(
                wrong=tally.wrong + counts[category],
                found=tally.found + sum(is_found(span, entities) for span in expected),
                expected=tally.expected + len(expected),
            )
    return tallies, unjudged


def cell(tallies):
    """Precision and recall of some tallies in percent, as "84.0 / 92.4"; "-" if there are none."""
    right = sum(len(tally.right) for tally in tallies)
    wrong = sum(tally.wrong for tally in tallies)
    found = sum(tally.found for tally in tallies)
    expected = sum(tally.expected for tally in tallies)
    if not tallies or not expected:
        return "-"
    precision = f"{100 * right / (right + wrong):.1f}" if right + wrong else "-"
    return f"{precision} / {100 * found / expected:.1f}"


def row_of(name, tallies, findings, unjudged, lines, speed):
    """A line of the table. findings, unjudged: how many; speed: in MB/s, or None."""
    row = {
        "precision / recall, %": name,
        "all": cell(list(tallies.values())),
        "secrets": cell([tallies[category] for category in SECRETS if category in tallies]),
    }
    for category in CATEGORIES:
        row[category] = cell([tallies[category]] if category in tallies else [])
    row["in 1,000 lines"] = f"{1000 * findings / lines:.2f}"
    wrong = sum(tally.wrong for tally in tallies.values())
    row["false in 1,000"] = f"{1000 * wrong / lines:.2f}"
    row["unjudged"] = f"{unjudged:,}"
    row["MB/s"] = f"{speed:.3f}" if speed else "-"
    return row


def write_unjudged(unjudged, path=UNJUDGED):
    """Writes {(file, start, end, category): (score, contender)} as JSON lines, without values."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = ""
    for (file, start, end, category), (probability, by) in sorted(unjudged.items()):
        record = dict(file=file, start=start, end=end, category=category)
        text += json.dumps(record | dict(score=round(probability, 4), by=by)) + "\n"
    write_whole(path, text)


def in_ordinary_code(model):
    """{what: figure}: the speed in Python's standard library and the packages beside it.

    They hold little, as most code does; the files of the score were chosen to hold more.
    """
    paths, size = python_files(ORDINARY)
    detector = Detector.from_pretrained(model, rules=True)
    begin = time.perf_counter()
    found = sum(1 for _ in scan(detector, paths, Counter()))
    seconds = time.perf_counter() - begin
    lines = sum(Path(path).read_bytes().count(b"\n") for path in paths)
    return {
        "MB": round(size / 1e6, 1),
        "MB/s": round(size / 1e6 / seconds, 3),
        "findings in 1,000 lines": round(1000 * found / lines, 2),
    }


def bench_pii(path=None, model=SHIPPED):
    """Looks through the files with each contender. model: a detector's directory."""
    files, paths = labelled_files()
    texts = [text_of(path) for path in paths]
    lines = sum(text.count("\n") for text in texts)
    size = sum(os.path.getsize(path) for path in paths)

    rows = []
    unjudged = {}
    everyone = contenders(model, [file.name for file in files])
    for name, contender in tqdm(everyone.items(), desc="detecting", leave=False):
        begin = time.perf_counter()
        found = contender.find(paths, texts)
        seconds = time.perf_counter() - begin
        tallies, unknown = score(files, found, contender.categories)
        for file, entity in unknown:
            unjudged[file, *entity[:3]] = (entity[3], name)
        count = sum(entity[2] in contender.categories for entities in found for entity in entities)
        speed = size / 1e6 / seconds if contender.is_timed else None
        rows.append(row_of(name, tallies, count, len(unknown), lines, speed))

    write_unjudged(unjudged)
    verdicts = Counter(span.verdict for file in files for span in file.judged)
    facts = {"files": len(files), "lines": lines, "bytes": size, "judged": dict(verdicts)}
    facts["model + rules in ordinary code"] = in_ordinary_code(model)
    print(f"in ordinary code: {facts['model + rules in ordinary code']}")
    report(path or "results/pii-real.json", "pii-real", rows, **facts)
    if unjudged:
        print(f"{len(unjudged):,} findings are unjudged and count as wrong: {UNJUDGED}")
