"""Other detectors, measured beside this one: detect-secrets, credsweeper, presidio's patterns.

The data are labelled documents, or the samples in a clone of CredSweeper. Each tool is used as it
comes, and scored only on the categories that it covers: detect-secrets and credsweeper on keys and
passwords, presidio on addresses (its other recognizers need a language model).
"""

import importlib.util
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from common.command_line import first_line
from common.files import read_json, write_whole
from finetune.records import Span
from pii.detector import Detector
from pii.labels import CATEGORIES, Entity, LabelledDocument, read_labelled
from pii.rules import RULE_CATEGORIES
from pii.scores import evaluate_detector, macro

# A secret is a password if its kind contains one of these words, and a key otherwise.
PASSWORD_WORDS = "password passwd credential auth salt nonce".split() + ["secret keyword"]

# What credsweeper reports that is no secret, or not surely one.
NO_SECRETS = ["UUID", "IPv4", "IPv6", "Nonce", "Salt", "Certificate", "AWS S3 Bucket"]
NO_SECRETS += ["Firebase Domain", "Bitbucket Client ID", "Tencent WeChat API App ID"]


class Contender(NamedTuple):
    """A detector to be measured."""

    find: Callable  # from [text, ...] to [[Entity, ...], ...]
    categories: tuple  # those that it covers
    package: str = ""  # to install, if it is a peer


class Report(NamedTuple):
    """A secret that a tool found in a file."""

    path: str
    line: int  # from 1
    value: str
    category: str


def category_of(kind):
    """The category of what a peer calls `kind`."""
    if "Public IP" in kind:  # detect-secrets reports them too
        return "IP_ADDRESS"
    return "PASSWORD" if any(word in kind.lower() for word in PASSWORD_WORDS) else "KEY"


# The peers. Each is imported when it is used: they are not among the requirements.


def scan_with_detect_secrets(paths, processes=None):
    """Yields a `Report` of all that detect-secrets finds in files.

    processes: how many share the work; None for one on each core.
    """
    from detect_secrets.core.secrets_collection import SecretsCollection
    from detect_secrets.settings import default_settings

    with default_settings():  # its plugins and filters as they come
        secrets = SecretsCollection()
        secrets.scan_files(*paths, num_processors=processes or os.cpu_count())
        for path, secret in secrets:
            category = category_of(secret.type)
            yield Report(path, secret.line_number, secret.secret_value, category)


def scan_with_credsweeper(paths, processes=None):
    """Yields a `Report` of each secret that credsweeper finds in files, as the other does."""
    from credsweeper import CredSweeper
    from credsweeper.file_handler.files_provider import FilesProvider

    # With its rules, filters and model.
    sweeper = CredSweeper(pool_count=processes or os.cpu_count())
    sweeper.run(content_provider=FilesProvider(paths))
    for candidate in sweeper.credential_manager.get_credentials():
        if candidate.rule_name in NO_SECRETS:
            continue
        category = category_of(candidate.rule_name)
        for line in candidate.line_data_list:  # a user name and its password make one candidate
            yield Report(line.path, line.line_num, line.value, category)


def find_by_scanning(texts, scan):
    """[[Entity, ...], ...] of what a function that scans files finds in texts."""
    found = [set() for _ in texts]
    with tempfile.TemporaryDirectory() as directory:
        # These tools take files. A file's name says which text it holds.
        paths = [os.path.join(directory, f"{number:06d}.txt") for number in range(len(texts))]
        for path, text in zip(paths, texts):
            with open(path, "w", encoding="utf-8", newline="") as file:  # keeps line ends
                file.write(text)
        reports = list(scan(paths))

    for report in reports:
        index = int(os.path.basename(report.path)[:6])
        found[index].update(entities_reported(report, texts[index]))
    return [sorted(entities) for entities in found]


def entities_reported(report, text):
    """[Entity] of a `Report` on a file with this text; [] if the value is not in that line."""
    lines = text.split("\n")
    if not report.value or not 1 <= report.line <= len(lines):
        return []
    # A report gives a line and a value; assume the first place in that line.
    place = lines[report.line - 1].find(report.value)
    if place < 0:
        return []
    start = sum(len(line) + 1 for line in lines[: report.line - 1]) + place  # characters
    return [Entity(start, start + len(report.value), report.category, 1.0)]


def find_by_presidio(texts):
    """[[Entity, ...], ...] of what presidio's pattern recognizers find in texts."""
    from presidio_analyzer.predefined_recognizers import EmailRecognizer, IpRecognizer

    recognizers = [  # (what finds, its name for it, ours)
        (EmailRecognizer(), "EMAIL_ADDRESS", "EMAIL"),
        (IpRecognizer(), "IP_ADDRESS", "IP_ADDRESS"),
    ]
    found = []
    for text in texts:
        entities = []
        for recognizer, name, category in recognizers:
            for result in recognizer.analyze(text, [name], None) or []:
                entities.append(Entity(result.start, result.end, category, result.score))
        found.append(sorted(entities))
    return found


find_by_detect_secrets = partial(find_by_scanning, scan=scan_with_detect_secrets)
find_by_credsweeper = partial(find_by_scanning, scan=scan_with_credsweeper)
PEERS = {
    "detect-secrets": Contender(find_by_detect_secrets, ("KEY", "PASSWORD"), "detect_secrets"),
    "credsweeper": Contender(find_by_credsweeper, ("KEY", "PASSWORD"), "credsweeper"),
    "presidio patterns": Contender(find_by_presidio, ("EMAIL", "IP_ADDRESS"), "presidio_analyzer"),
}


def contenders(detector, peers):
    """{name: Contender}: the model, the rules, both, and the peers that are installed."""
    found = {"rules": Contender(Detector(rules=True).find, RULE_CATEGORIES)}
    if detector.model:
        parts = (detector.model, detector.tokenizer)
        model = Detector(*parts, rules=False, threshold=detector.thresholds)
        both = Detector(*parts, rules=True, threshold=detector.thresholds)
        found = {"model": Contender(model.find, CATEGORIES)} | found  # as the table has them
        found["model + rules"] = Contender(both.find, CATEGORIES)
    # A missing peer is reported, and the others are still measured.
    for name, peer in PEERS.items() if peers else ():
        if importlib.util.find_spec(peer.package):
            found[name] = peer
        else:
            install = f"pip install {peer.package.replace('_', '-')}"
            print(f"{name} is not measured, as it is not installed ({install})")
    return found


# The data.


def credsweeper_samples(clone):
    """[LabelledDocument, ...] of the samples of CredSweeper's own tests, from a clone of it.

    The labels are what CredSweeper itself is expected to report there (tests/data/output.json): no
    human's, and made for one of the peers.
    """
    places = {}  # {file name: [(line, first column, behind the last, category), ...]}
    for entry in read_json(os.path.join(clone, "tests", "data", "output.json"), list):
        rule = entry["rule"]
        # A doubtful secret counts neither as missed nor as a false alarm.
        category = "AMBIGUOUS" if rule in NO_SECRETS else category_of(rule)
        for found in entry["line_data_list"]:
            place = (found["line_num"], found["value_start"], found["value_end"], category)
            places.setdefault(os.path.basename(found["path"]), []).append(place)

    documents = []
    folder = os.path.join(clone, "tests", "samples")
    for name in sorted(os.listdir(folder)):
        try:
            with open(os.path.join(folder, name), encoding="utf-8", newline="") as file:
                text = file.read()  # columns are counted in characters
        except (UnicodeDecodeError, IsADirectoryError):  # archives and documents
            continue
        documents.append(LabelledDocument(text, spans_of(text, places.get(name, []))))
    return documents


def spans_of(text, places):
    """[Span, ...] of a list of (line, first column, behind the last, category)."""
    begins = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))  # of lines
    spans = [
        Span(begins[line - 1] + start, begins[line - 1] + end, category)
        for line, start, end, category in places
        if line < len(begins)
    ]
    # Of two that overlap the first is kept, of two that begin together the longer.
    kept = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        apart = not kept or span.start >= kept[-1].end
        if apart and span.start < span.end <= len(text):
            kept.append(span)
    return kept


def read_documents(path):
    """[LabelledDocument, ...] of a file of JSON lines, or of a clone of CredSweeper."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "tests", "data", "output.json")):
            raise ValueError(f"{path}: neither labelled documents nor a clone of CredSweeper")
        try:
            return credsweeper_samples(path)
        except (TypeError, KeyError) as error:  # of another version
            words = "not the tests of CredSweeper as they are known here"
            raise ValueError(f"{path}: {words} ({first_line(error)})") from None
    skipped = Counter()
    documents = read_labelled(path, skipped)
    for reason, count in skipped.items():
        print(f"left out: {count:,} {reason}")
    return documents


# The comparison.


def compare(detector, path, peers=False, out=None):
    """A table of how well detectors do on labelled documents, or on a clone of CredSweeper.

    detector: a `Detector`; its model, the rules and both are measured, and with `peers` the other
    tools that are installed. The scores go to the file `out` as JSON.
    """
    documents = read_documents(path)
    if out:
        open(out, "a").close()  # fail now rather than after minutes of measuring

    results = {}  # {contender: {category: its scores}}
    for name, (find, categories, package) in contenders(detector, peers).items():
        at_once = len(documents) if package else 64  # a peer starts processes for each call
        table = evaluate_detector(find, documents, at_once=at_once, description=name)
        # Without an entity in the data, recall is undefined; a tool is scored on what it covers.
        rows = {
            category: row
            for category, row in table.items()
            if category in categories and row["support"]
        }
        # Means over different sets of categories cannot be compared.
        if categories == CATEGORIES and len(rows) > 1:
            rows["macro"] = macro(list(rows.values()))
        results[name] = rows

    if out:
        data = os.path.basename(os.path.normpath(path))
        facts = {"data": data, "documents": len(documents), "thresholds": detector.thresholds}
        write_whole(out, json.dumps(facts | {"scores": results}, indent=1) + "\n")
    return markdown(results)


def markdown(results):
    """Two tables in percent, of exact and of overlapping spans: a row for each contender."""
    known = {category for rows in results.values() for category in rows}
    columns = [category for category in (*CATEGORIES, "macro") if category in known]  # in order
    text = ""
    for way, title in (("", "exact"), ("overlap_", "overlapping")):
        text += f"\n| {title}: P / R / F1 | {' | '.join(columns)} |\n"
        text += "|" + "---|" * (len(columns) + 1) + "\n"
        for name, rows in results.items():
            cells = [cell(rows.get(category), way) for category in columns]
            text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def cell(row, way):
    """The scores of a category as "84.0 / 92.4 / 88.0"; "-" if there are none."""
    if row is None:
        return "-"
    return " / ".join(f"{100 * row[way + key]:.1f}" for key in ("precision", "recall", "f1"))
