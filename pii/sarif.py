"""Findings as a SARIF 2.1.0 log, the format that GitHub's code scanning and many editors read.

A log says what was found where, and nothing of the values. Columns count characters (Unicode code
points), as `columnKind` says. GitHub reads no fingerprint but one of its own, which the action that
uploads a log adds; others find the one of `baseline.py`.

Reference: OASIS, Static Analysis Results Interchange Format (SARIF) 2.1.0, errata 01, 2023.
"""

import json
import os
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.files import write_whole
from pii.baseline import fingerprint
from pii.labels import CATEGORIES

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
ROOT = "%SRCROOT%"  # the name that viewers know for the directory to which paths are relative

# What to do about a finding.
REVOKE = "Revoke it first: it stays in the history of the repository. Then read it from elsewhere."
REPLACE = "Leave it out, or write a placeholder. It stays in the history of the repository."
EXEMPT = "If it may be seen, write `pii: allow` in its line, or add it to the baseline."


class Rule(NamedTuple):
    """What a log says of a category."""

    what: str
    level: str  # "error" or "warning"
    advice: str


RULES = {
    "NAME": Rule("the name of a person", "warning", REPLACE),
    "EMAIL": Rule("an e-mail address", "warning", REPLACE),
    "KEY": Rule("a key, a token or another secret", "error", REVOKE),
    "PASSWORD": Rule("a password", "error", REVOKE),
    "IP_ADDRESS": Rule("a public IP address", "warning", REPLACE),
    "USERNAME": Rule("the user name of a person", "warning", REPLACE),
}


def descriptor_of(category):
    """The reportingDescriptor of a category."""
    rule = RULES[category]
    return {
        "id": f"pii/{category}",
        "shortDescription": {"text": f"{category}: {rule.what}"},
        "fullDescription": {"text": f"What stands here looks like {rule.what}."},
        "help": {"text": f"{rule.advice} {EXEMPT}"},
        "defaultConfiguration": {"level": rule.level},
    }


def location_of(path):
    """The artifactLocation of a file: relative to the working directory, absolute outside of it."""
    # GitHub shows nothing in a file that is named by a link.
    path = Path(os.path.realpath(path))
    here = os.path.realpath(os.curdir)
    if not path.is_relative_to(here):
        return {"uri": path.as_uri()}
    # As bytes: a name need not be UTF-8. A colon would make it the scheme of a URI.
    name = os.fsencode(path.relative_to(here).as_posix())
    return {"uri": urllib.parse.quote(name), "uriBaseId": ROOT}


def result_of(finding, copies):
    """The result object of a `Finding`, which holds nothing of its value.

    copies: a Counter of the results before it, which gives the second copy of a value in a file
    another fingerprint than the first.
    """
    category = finding.entity.category
    rule = RULES[category]
    location = location_of(finding.path)
    region = {
        "startLine": finding.line,
        "startColumn": finding.column,
        "endLine": finding.end_line,
        "endColumn": finding.end_column,
    }
    digits = fingerprint(finding.value)
    copy = (location["uri"], category, digits)
    copies[copy] += 1
    text = f"{category}, score {finding.entity.score:.0%}: what stands here looks like {rule.what}."
    return {
        "ruleId": f"pii/{category}",
        "ruleIndex": CATEGORIES.index(category),
        "level": rule.level,
        "message": {"text": text},
        "locations": [{"physicalLocation": {"artifactLocation": location, "region": region}}],
        "partialFingerprints": {"valueHash/v1": f"{digits}:{copies[copy]}"},
    }


def write_log(path, findings):
    """Writes the log of a list of `Finding`s to `path`, whole or not at all."""
    copies = Counter()
    driver = {"name": "pii", "rules": [descriptor_of(category) for category in CATEGORIES]}
    run = {
        "tool": {"driver": driver},
        # Without a URI: where the working directory lies on this machine is nobody's business.
        "originalUriBaseIds": {ROOT: {"description": {"text": "The working directory."}}},
        "columnKind": "unicodeCodePoints",
        "newlineSequences": ["\r\n", "\n", "\r"],
        "results": [result_of(finding, copies) for finding in findings],
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    write_whole(path, json.dumps(log, indent=1) + "\n")
