"""Pairs of a docstring and its function, from all packages of this Python: to train a search on.

    {"query": the docstring's first paragraph, "code": the function without it, "package": ...}
    train.jsonl, validation.jsonl, test.jsonl      packages.json: what they were made from

The idea is CodeSearchNet's (Husain et al., 2019), and so are most filters; nothing is downloaded.
What is held out is held out by package, drawn by the hash of its name, so that no style, and no
author's wording, is known from training. The standard library is always in training, as the model
may have been pretrained on it. Of functions that are alike (`corpus.clean`), one is kept, the first
in the order of the splits: none in the test has a twin in training.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import sysconfig
from collections import Counter
from typing import NamedTuple

from tqdm import tqdm

from common.files import read_json, write_whole
from corpus.clean import NearDuplicates, signature_of
from corpus.sources import files_in
from finetune.bm25 import words_of
from finetune.functions import LARGEST, parsed, python_functions

SPLITS = ("train", "validation", "test")
HELD_OUT = {"validation": 0.05, "test": 0.10}  # shares of the packages
STANDARD_LIBRARY = "python"
MOST = 4000  # pairs of a package; a few packages would have half of all pairs

QUERY_WORDS = range(3, 41)
CODE_LINES = range(3, 61)  # from `def` on
LEAST_LETTERS = 0.8  # the share of ASCII letters among a query's characters, without spaces

# Folders of tests, and of copies of other packages.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "_vendored"}
SKIPPED_FOLDERS |= {"extern", "externals", "_extern", "third_party", "site-packages"}
# What ends the first paragraph of a docstring beside a blank line: fields, sections and examples.
END_OF_SUMMARY = re.compile(
    r"[:@]\w+[^:]*:(\s|$)|[\w*]+ ?\(.*\) ?:|>>>|\.\. |[-=~]{3}|```"
    r"|(Args|Arguments|Params|Parameters|Returns?|Raises|Yields|Examples?|Notes?|Usage)\b.{0,3}$"
)
# Queries that do not say what a function does.
WORTHLESS = re.compile(
    r"[^a-z`]|(see|same as|alias|not implemented|copied from|todo)\b|inherit|overrid"
    r"|.*(deprecated|obsolete|copyright|licen[sc]ed? |auto-?generated|docstring"
    r"|base class|super ?class|parent class)",
    re.IGNORECASE,
)


class Package(NamedTuple):
    """An installed package, or the standard library."""

    name: str
    version: str
    files: list  # paths of its Python files, sorted

    @property
    def split(self):
        """One of SPLITS."""
        if self.name == STANDARD_LIBRARY:
            return "train"
        number = _share(self.name)
        for split, share in HELD_OUT.items():
            if number < share:
                return split
            number -= share
        return "train"


class Pair(NamedTuple):
    """A function, and what it does in words."""

    query: str
    code: str
    package: str


# ---- packages ------------------------------------------------------------------------------------


def installed_packages():
    """Each `Package` of this Python, the standard library included, sorted by name."""
    library = sysconfig.get_paths()["stdlib"]
    files = [path for path in files_in(library, Counter()) if _is_wanted(path[len(library) :])]
    packages = {STANDARD_LIBRARY: Package(STANDARD_LIBRARY, platform.python_version(), files)}
    for distribution in importlib.metadata.distributions():
        # Half a package, which was removed or is being installed, has no name.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if not name:
            continue
        files = [
            str(distribution.locate_file(file))
            for file in sorted(distribution.files or [])
            if _is_wanted(str(file))
        ]
        # The first of a name on sys.path is the one that is imported.
        packages.setdefault(name, Package(name, distribution.version, files))
    return [packages[name] for name in sorted(packages) if packages[name].files]


def _is_wanted(path):
    """True for a Python file that is no test and no copy of another package's."""
    *folders, name = re.split(r"[/\\]", path.lower())
    if not name.endswith(".py") or name.startswith("test") or name.endswith("_test.py"):
        return False
    return name != "conftest.py" and SKIPPED_FOLDERS.isdisjoint(folders)


def _share(text):
    """A number in [0, 1), drawn by the hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


# ---- pairs ---------------------------------------------------------------------------------------


def make_pairs(out, packages=None, most=MOST):
    """Writes the pairs of all splits to the directory `out`. Returns {split: how many}.

    packages: each a `Package`; None: all that are installed. Does nothing if the pairs of the same
    packages, in the same versions, are there already.
    """
    packages = installed_packages() if packages is None else packages
    versions = {package.name: package.version for package in packages}
    recipe = {"packages": versions, "most_of_a_package": most}
    path = os.path.join(out, "packages.json")
    if os.path.exists(path):
        made = read_json(path)
        if made.get("recipe") == recipe:
            return made["pairs"]

    pairs = {split: [] for split in SPLITS}
    # In this order, so that what is like a training pair is missing from the test.
    packages = sorted(packages, key=_place)
    near = NearDuplicates()
    seen = set()  # of queries and of codes
    files = sum(len(package.files) for package in packages)
    with tqdm(total=files, unit="file", desc="docstrings") as progress:
        for package in packages:
            found = [pair for pair in _pairs_of(package, progress) if _is_new(pair, seen, near)]
            # The smallest hashes, as the first files are those of one part of the package.
            found.sort(key=_hash_of_code)
            pairs[package.split] += found[:most]

    os.makedirs(out, exist_ok=True)
    for split, rows in pairs.items():
        random.Random(0).shuffle(rows)
        lines = [json.dumps(pair._asdict()) + "\n" for pair in rows]
        write_whole(os.path.join(out, f"{split}.jsonl"), "".join(lines))
    counts = {split: len(rows) for split, rows in pairs.items()}
    write_whole(path, json.dumps({"recipe": recipe, "pairs": counts}, indent=1))
    return counts


def _place(package):
    """Where a package stands in the order in which they are read: the standard library first."""
    return SPLITS.index(package.split), package.name != STANDARD_LIBRARY, package.name


def _hash_of_code(pair):
    return _share(pair.code)


def _pairs_of(package, progress):
    """Yields each `Pair` of a package that passes the filters."""
    for path in package.files:
        progress.update()
        try:
            with open(path, "rb") as f:
                content = f.read(LARGEST + 1)
        except OSError:  # it was removed since the package was installed
            continue
        if len(content) > LARGEST:
            continue
        for function in python_functions(content.decode(errors="replace")):
            name = function.name.split(".")[-1]
            is_dunder = name.startswith("__") and name.endswith("__")
            query = query_of(function.docstring or "")
            if query and not is_dunder and _does_something(function.code):
                yield Pair(query, function.code, package.name)


def query_of(docstring):
    r"""The first paragraph of a docstring on one line; None if it is no good as a query.

    >>> query_of("Return the\n    larger number.\n    :param a: a number\n\nSlow.")
    'Return the larger number.'
    >>> query_of("Deprecated, use other().")
    """
    lines = []
    for line in docstring.strip().split("\n"):
        line = line.strip()
        if not line or END_OF_SUMMARY.match(line):
            break
        lines.append(line)
    words = [word for word in " ".join(lines).split() if "://" not in word]
    query = " ".join(words)
    letters = sum(c.isascii() and c.isalpha() for c in query)
    if len(words) not in QUERY_WORDS or letters < LEAST_LETTERS * len("".join(words)):
        return None
    return None if WORTHLESS.match(query) else query


def _does_something(code):
    """True for a function of some lines, and not one that only raises or passes."""
    lines = [line for line in code.split("\n") if line.strip()]
    header = next(i for i, line in enumerate(lines) if re.match(r"(async\s+)?def\b", line))
    if len(lines) - header not in CODE_LINES:
        return False
    tree = parsed(code)
    if tree is None:  # it lost what it had at the margin, such as a line behind a backslash
        return False
    body = tree.body[0].body
    statement = body[0]
    # `...` and a second docstring are constants.
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return len(body) > 1 or not (is_constant or isinstance(statement, ast.Pass | ast.Raise))


def _is_new(pair, seen, near):
    """True if neither the query nor the code, nor one like it, was there before."""
    keys = {pair.query.lower(), " ".join(pair.code.split())}
    if not seen.isdisjoint(keys):
        return False
    seen |= keys
    return not near.seen(signature_of(pair.code))


# ---- how much a query gives away -----------------------------------------------------------------

# Words that say nothing about what a function does.
STOP_WORDS = set(
    """
    a all also an and any are as at be been being but by can could did do does each else every for
    from given had has have here if in into is it its may might must no not of on one only or our
    should so some such that the their them then there these they this those to two was we were
    what when where whether which who whose will with without would you your
    class function get gets method object return returned returns set sets use used using
    """.split()
)
_DOUBLED = re.compile(r"([bdfgklmnprt])\1$")


def stem(word):
    """A word without plural, -ing, -ed and a final e.

    >>> [stem(word) for word in "files queries parsing stopped creates create class".split()]
    ['fil', 'query', 'pars', 'stop', 'creat', 'creat', 'class']
    """
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = _DOUBLED.sub(r"\1", word.removesuffix(ending))
            break
    return word.removesuffix("e") if len(word) > 3 else word


def words_found(pairs):
    """For each pair, the share of the query's content words that occur in its code, in [0, 1].

    Content words are those that are not in STOP_WORDS, compared by their `stem`. It is 1 for a
    query without any. A search by words needs them; one by meaning should not.
    """
    shares = []
    for pair in pairs:
        query = {stem(word) for word in words_of(pair["query"]) if word not in STOP_WORDS}
        code = {stem(word) for word in words_of(pair["code"])}
        shares.append(len(query & code) / len(query) if query else 1.0)
    return shares


def words_missing(pairs):
    """For each pair, True if no content word of the query occurs in its code."""
    return [share == 0 for share in words_found(pairs)]
