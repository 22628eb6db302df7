"""TODO."""

import ast
import glob
import importlib.util
import json
import os
import tempfile
from collections import Counter

import numpy as np

from common.command_line import first_line
from common.files import read_json, write_whole
from pii.detector import Detector
from pii.labels import CATEGORIES, Entity, read_labelled
from pii.rules import RULE_CATEGORIES
from pii.scores import evaluate_detector, scores

PASSWORD_KINDS = (
    "password",
    "passwd",
    "basic auth",
    "secret keyword",
    "credential",
    "sql",
    "auth",
    "salt",
    "nonce",
)


PEERS = {  # the package, and the categories that it covers
    "detect-secrets": ("detect_secrets", ("KEY", "PASSWORD")),
    "credsweeper": ("credsweeper", ("KEY", "PASSWORD")),
    "presidio patterns": ("presidio_analyzer", ("EMAIL", "IP_ADDRESS")),
}


def category_of(kind):
    """The category of what a peer calls it."""
    kind = kind.lower()
    if "ip" in kind.split() or kind.startswith("ipv") or "public ip" in kind:
        return "IP_ADDRESS"
    if "mail" in kind.split() or kind == "email":
        return "EMAIL"
    return "PASSWORD" if any(word in kind for word in PASSWORD_KINDS) else "KEY"


def _at(text, line, value, category):
    """[Entity] of a value in a line (from 1) of a text, or []."""
    lines = text.split("\n")
    if not 1 <= line <= len(lines) or not value:
        return []
    column = lines[line - 1].find(value)
    begin = sum(len(other) + 1 for other in lines[: line - 1])
    return (
        [Entity(begin + column, begin + column + len(value), category, 1.0)] if column >= 0 else []
    )


def _in_files(texts, scan):
    """[[Entity, ...], ...] of what `scan` finds in files with these texts: it returns [(path, line, value, category), ...]."""
    found = [[] for _ in texts]
    with tempfile.TemporaryDirectory() as directory:
        paths = [os.path.join(directory, f"{i:06d}.txt") for i in range(len(texts))]
        for path, text in zip(paths, texts):
            with open(path, "w", encoding="utf-8", newline="") as f:
                f.write(text)
        for path, line, value, category in scan(paths):
            found[int(os.path.basename(path)[:6])] += _at(
                texts[int(os.path.basename(path)[:6])], line, value, category
            )
    return [sorted(set(entities)) for entities in found]


def scan_with_detect_secrets(paths):
    """Yields (path, line, value, category) of what it finds in files, on all cores."""
    from detect_secrets.core.secrets_collection import SecretsCollection
    from detect_secrets.settings import default_settings

    with default_settings():
        secrets = SecretsCollection()
        secrets.scan_files(*paths, num_processors=os.cpu_count())
        for path, secret in secrets:
            yield path, secret.line_number, secret.secret_value, category_of(secret.type)


def scan_with_credsweeper(paths):
    """The same."""
    from credsweeper import CredSweeper
    from credsweeper.file_handler.files_provider import FilesProvider

    sweeper = CredSweeper(pool_count=os.cpu_count())
    sweeper.run(content_provider=FilesProvider(paths))
    for candidate in sweeper.credential_manager.get_credentials():
        for line in candidate.line_data_list:
            yield line.path, line.line_num, line.value, category_of(candidate.rule_name)


def detect_secrets(texts):
    """What detect-secrets finds with its default plugins and filters."""
    return _in_files(texts, scan_with_detect_secrets)


def credsweeper(texts):
    """What credsweeper finds with its rules, filters and model as it comes."""
    return _in_files(texts, scan_with_credsweeper)


def presidio(texts):
    """What presidio's pattern recognizers for addresses find; the others need a language model, or are about other things."""
    from presidio_analyzer.predefined_recognizers import EmailRecognizer, IpRecognizer

    recognizers = {
        "EMAIL": (EmailRecognizer(), "EMAIL_ADDRESS"),
        "IP_ADDRESS": (IpRecognizer(), "IP_ADDRESS"),
    }
    found = []
    for text in texts:
        entities = []
        for category, (recognizer, name) in recognizers.items():
            entities += [
                Entity(r.start, r.end, category, r.score)
                for r in recognizer.analyze(text, [name], None) or []
            ]
        found.append(sorted(entities))
    return found


FIND = {"detect-secrets": detect_secrets, "credsweeper": credsweeper, "presidio patterns": presidio}


def contenders(detector, peers):
    """{name: (find, the categories it covers)}: the rules, the model, both, and the peers that are installed."""
    found = {}
    if detector.model:
        found["model"] = (
            Detector(detector.model, detector.tokenizer, False, detector.threshold).find,
            CATEGORIES,
        )
    found["rules"] = (Detector(rules=True).find, RULE_CATEGORIES)
    if detector.model:
        both = Detector(detector.model, detector.tokenizer, True, detector.threshold)
        found["model + rules"] = (both.find, CATEGORIES)
    for name, (package, covered) in PEERS.items() if peers else ():
        if importlib.util.find_spec(package) is None:
            print(
                f"{name} is not installed (pip install {package.replace('_', '-')}), so it is not measured"
            )
        else:
            found[name] = (FIND[name], covered)
    return found


# What credsweeper reports that is no secret, or not surely one.
NO_SECRETS = {"UUID", "IPv4", "IPv6", "AWS S3 Bucket", "Firebase Domain", "Nonce", "Salt", "Certificate"} | {
    "Bitbucket Client ID", "Tencent WeChat API App ID"
}  # fmt: skip


def credsweeper_samples(clone):
    """The samples of CredSweeper's own tests, from a clone of its repository, as `read_labelled` returns them.

    The labels are what CredSweeper itself is expected to report there (tests/data/output.json): no human's, and made for one of the peers.
    """
    spans = {}
    for entry in read_json(os.path.join(clone, "tests", "data", "output.json"), list):
        for place in entry["line_data_list"]:
            category = "AMBIGUOUS" if entry["rule"] in NO_SECRETS else category_of(entry["rule"])
            spans.setdefault(os.path.basename(place["path"]), []).append(
                (place["line_num"], place["value_start"], place["value_end"], category)
            )
    documents = []
    for name in sorted(os.listdir(os.path.join(clone, "tests", "samples"))):
        try:
            with open(
                os.path.join(clone, "tests", "samples", name), encoding="utf-8", newline=""
            ) as f:
                text = f.read()
        except (UnicodeDecodeError, IsADirectoryError):  # archives and documents
            continue
        starts = np.cumsum([0] + [len(line) + 1 for line in text.split("\n")]).tolist()
        found = [
            (starts[line - 1] + a, starts[line - 1] + b, category)
            for line, a, b, category in spans.get(name, [])
            if line < len(starts)
        ]
        kept = []
        for span in sorted(found, key=lambda span: (span[0], -span[1])):
            if span[0] < span[1] <= len(text) and (not kept or span[0] >= kept[-1][1]):
                kept.append(span)
        documents.append((text, kept))
    return documents


def detect_secrets_payloads(clone):
    """[(line, whether it holds a secret, category), ...] of detect-secrets' own tests, from a clone of its repository.

    They are the parametrizations (payload, should_flag) of tests/plugins: tuples of a string and a bool. Other plugins' than for secrets,
    and what is not written out, are left out.
    """
    found = {}
    for path in sorted(
        glob.glob(os.path.join(glob.escape(clone), "tests", "plugins", "*_test.py"))
    ):
        plugin = os.path.basename(path)
        if plugin.startswith(("ip_", "email")):
            continue
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Tuple | ast.List) and len(node.elts) == 2:
                payload, flag = (getattr(part, "value", None) for part in node.elts)
                if isinstance(payload, str) and isinstance(flag, bool) and payload.strip():
                    found[payload] = (
                        payload,
                        flag,
                        "PASSWORD" if plugin.startswith(("keyword", "basic_auth")) else "KEY",
                    )
    return list(found.values())


def flagged(find, payloads, at_once):
    """The scores of a function that finds entities, by whole payloads: is there a secret in it?"""
    counts = {category: np.zeros(3) for category in ("KEY", "PASSWORD")}  # right, found, expected
    for i in range(0, len(payloads), at_once):
        part = payloads[i : i + at_once]
        for (_, expected, category), entities in zip(part, find([payload for payload, *_ in part])):
            said = any(entity.category in counts for entity in entities)
            counts[category] += (said and expected, said, expected)
    return scores({category: [*n, n[0], n[0]] for category, n in counts.items()})


def compare(detector, path, peers=False, out=None):
    """Measures on labelled documents, or on the samples in a clone of CredSweeper or detect-secrets; the details go to `out`.

    Returns a table for people: precision, recall and F1 by category, of exact and of overlapping spans.
    """
    documents, payloads, results, skipped = [], [], {}, Counter()
    if out and (os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or ".")):
        raise ValueError(f"{out}: no file can be written there")  # now, not after the measurement
    try:
        if not os.path.isdir(path):
            documents = read_labelled(path, skipped)
        elif os.path.exists(os.path.join(path, "tests", "data", "output.json")):
            documents = credsweeper_samples(path)
        elif not (payloads := detect_secrets_payloads(path)):
            raise ValueError(
                f"{path}: give labelled documents, or a clone of CredSweeper or detect-secrets"
            )
    except (TypeError, KeyError, SyntaxError) as error:
        raise ValueError(
            f"{path}: not the tests of CredSweeper or detect-secrets as they are known here ({first_line(error)})"
        ) from None
    for reason, n in skipped.items():
        print(f"left out: {n:,} {reason}")
    for name, (find, covered) in contenders(detector, peers).items():
        at_once = len(documents) + len(payloads) if name in PEERS else 64
        table = (
            flagged(find, payloads, at_once)
            if payloads
            else evaluate_detector(find, documents, at_once=at_once, description=name)
        )
        labelled = [category for category in CATEGORIES if table.get(category, {}).get("support")]
        results[name] = {category: table[category] for category in labelled if category in covered}
        rows = list(results[name].values())
        if len(covered) == len(CATEGORIES) and len(rows) > 1:
            results[name]["macro"] = {
                key: float(np.mean([row[key] for row in rows])) for key in rows[0]
            }
    if out:
        facts = {
            "data": os.path.basename(os.path.normpath(path)),
            "documents": len(documents) + len(payloads),
            "threshold": detector.threshold,
            "scores": results,
        }
        write_whole(out, json.dumps(facts, indent=1) + "\n")
    return tables(results, {"": "lines"} if payloads else {"": "exact", "overlap_": "overlapping"})


def tables(results, ways):
    """Markdown, in percent: a row for each contender, a column for each category; of exact spans, and of overlapping ones."""
    columns, text = (
        [
            name
            for name in (*CATEGORIES, "macro")
            if any(name in table for table in results.values())
        ],
        "",
    )
    for way, title in ways.items():
        text += (
            f"\n| {title}: P / R / F1 | "
            + " | ".join(columns)
            + " |\n|"
            + "---|" * (len(columns) + 1)
            + "\n"
        )
        for name, table in results.items():
            cells = []
            for category in columns:
                row = table.get(category)
                cells.append(
                    " / ".join(
                        f"{100 * row[way + key]:.1f}" for key in ("precision", "recall", "f1")
                    )
                    if row
                    else "-"
                )
            text += f"| {name} | " + " | ".join(cells) + " |\n"
    return text
