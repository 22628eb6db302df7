"""The hosts of the synthetic data: real files of many kinds, into which templates are written.

A host is any text file of a source: code, configuration, data, documentation. `host_kinds.txt`
says which kind a file is of; it leaves out licences, and what programs or other projects wrote.

    a kind          at most 1,500 files, so that none dominates
    a project       at most 60 files of a kind

Which files these are, hashes of their contents decide. All files of a project are in one split: an
archive is a project, and so is a directory. Files under 200 bytes, over 200 kB, and those under the
GNU General Public License are left out, as a detector that was trained on them may be passed on.
"""

import functools
import glob
import hashlib
import heapq
import os
import re
import sysconfig
from collections import Counter, defaultdict
from fnmatch import translate
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from corpus.clean import unclean
from corpus.languages import language_of
from corpus.records import Choice, Document
from corpus.sources import TABLES, read, readers
from pii.templates import SPLITS, split_of

PACKAGES = "corpora/packages"  # where `python -m corpus --fetch pii/packages.txt` puts them
MOST_OF_KIND = 1500  # files
MOST_OF_PROJECT = 60  # files of a kind
SMALLEST = 200  # bytes
LARGEST = 200_000  # bytes
LEFT_OUT = "left_out"  # the kind of what is no host
COPYLEFT = re.compile(r"General\s+Public\s+License", re.IGNORECASE)
# The program that the first line of a script names, and the kind, if that is another word.
PROGRAM = re.compile(rb"#!.*\b(bash|dash|zsh|sh|python|ruby|perl|php|node)")
PROGRAMS = {"bash": "shell", "dash": "shell", "zsh": "shell", "sh": "shell", "node": "javascript"}


class Host(NamedTuple):
    """A real file."""

    text: str
    kind: str  # of host_kinds.txt, or a language of corpus/languages.txt
    project: str = ""


# ---- kinds ---------------------------------------------------------------------------------------


@functools.cache
def _patterns():
    """[(kind, pattern of paths, pattern of names), ...] of host_kinds.txt, in its order."""
    text = Path(__file__).with_name("host_kinds.txt").read_text(encoding="utf-8")
    _, _, body = text.partition("\n\n")
    found = []
    for line in body.splitlines():
        kind, _, alternatives = line.partition(": ")
        globs = alternatives.split(" | ")
        of_paths = [translate(pattern) for pattern in globs if "/" in pattern]
        of_names = [translate(pattern) for pattern in globs if "/" not in pattern]
        # Without any, a pattern that fits nothing.
        found.append((kind, *(re.compile("|".join(p) or "(?!)") for p in (of_paths, of_names))))
    return found


@functools.lru_cache(100_000)
def _kind_by_path(path):
    """The kind of a file by host_kinds.txt, or None."""
    name = os.path.basename(path)
    for kind, of_paths, of_names in _patterns():
        if of_names.match(name) or of_paths.match(path):
            return kind
    return None


def kind_of(path, content=b""):
    """The kind of a file, LEFT_OUT if it is to be no host, or None if nobody knows it.

    >>> kind_of("a/.github/workflows/test.yml"), kind_of("a/b.yml"), kind_of("a/vendor/b.yml")
    ('workflow', 'yaml', 'left_out')
    """
    kind = _kind_by_path(path) or language_of(path, content)
    program = None if kind else PROGRAM.match(content)
    if program:
        name = program[1].decode()
        return PROGRAMS.get(name, name)
    return kind


# ---- which files ---------------------------------------------------------------------------------


def _choice_of(source, wanted):
    """What the readers of `corpus.sources` take of a source: hosts, as `Document`s of a kind."""

    def kind(name, content=b""):
        # Where a directory lies says nothing of what is in it.
        return kind_of(name.removeprefix(source), content)

    def may_be(name, is_file, size, skipped):
        return is_file and size <= LARGEST and (wanted or kind(name) != LEFT_OUT)

    def made_of(name, content, skipped):
        found = kind(name, content) or LEFT_OUT
        if digest_of(content) in wanted:
            return Document(found, content)
        if found == LEFT_OUT or len(content) < SMALLEST:
            return None
        return Document(found, content)

    return Choice(may_be, made_of)


def digest_of(content):
    """The first 16 digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def _host_files(source, wanted):
    """Yields the `Document` of each file of a source that may be a host, or is wanted."""

    def progress(size, absolute=False):
        pass  # the bar counts sources

    for path, reader, _ in readers(source):
        if not path.endswith(TABLES):  # whose rows say themselves what they are
            reader = functools.partial(reader, choice=_choice_of(source, wanted))
        for document in read(path, reader, Counter(), progress):
            if isinstance(document.content, bytes):  # not a commit or an issue
                yield document


def _text_of(content):
    """The text of a file, or None if it is to be no host."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    if "\0" in text or COPYLEFT.search(text) or unclean(text):
        return None
    return text


def _project_of(source):
    """The project of a source: "pypi-flask" of pypi-flask-3.0.3.tar.gz, or a directory's name."""
    name = os.path.basename(os.path.realpath(source))
    return name if os.path.isdir(source) else re.sub(r"(-v?\d|\.(tar|tgz|zip|whl)\b).*", "", name)


class _Smallest:
    """The hosts with the smallest digests of each kind, so many that memory is bounded."""

    def __init__(self, most):
        self.most = most  # of a kind
        self.heaps = defaultdict(list)  # {kind: [(-digest, host), ...]}, the largest digest first

    def takes(self, kind, digest):
        """True if a host of this digest would be one of them."""
        heap = self.heaps[kind]
        return len(heap) < self.most or -digest > heap[0][0]

    def add(self, digest, host):
        """Adds a host, and removes the one with the largest digest if there are too many."""
        heap = self.heaps[host.kind]
        heapq.heappush(heap, (-digest, host))
        if len(heap) > self.most:
            heapq.heappop(heap)

    def __iter__(self):
        """Yields (digest, host)."""
        for heap in self.heaps.values():
            for negative, host in heap:
                yield -negative, host


def default_sources():
    """The packages that were fetched or, if none were, the standard library of this Python."""
    return sorted(glob.glob(f"{PACKAGES}/*-*.*")) or [sysconfig.get_paths()["stdlib"]]


def read_hosts(sources, wanted=frozenset()):
    """({split: [Host, ...]}, {split: {digest: Host}}): files to be hosts, and those that are wanted.

    The hosts are in an order that hashes decide. wanted: the first 16 digits of the SHA-256 of files
    that are labelled; whatever they are, they are taken.

    A source is one of `corpus.sources`; [] stands for `default_sources`. If there are too few to
    give each split a project, every file counts as a project. Raises ValueError if a split has no
    files, and for a source that is missing or damaged.
    """
    sources = [os.fspath(source) for source in sources or default_sources()]
    by_project = {split_of(_project_of(source)) for source in sources} == set(SPLITS)
    most = MOST_OF_PROJECT if by_project else MOST_OF_KIND

    chosen = _Smallest(MOST_OF_KIND)
    known = {split: {} for split in SPLITS}
    seen = set()  # digests: a file that several projects have is in one split only
    for source in tqdm(sources, "reading", unit=" sources"):
        of_project = _Smallest(most)
        for kind, content in _host_files(source, wanted):
            digest = digest_of(content)
            if digest in wanted:
                host = Host(content.decode(), kind, _project_of(source))
                known[split_of(host.project)].setdefault(digest, host)
            number = int(digest, 16)
            if kind == LEFT_OUT or number in seen or not of_project.takes(kind, number):
                continue
            text = _text_of(content)
            if text is not None:
                seen.add(number)
                of_project.add(number, Host(text, kind, _project_of(source)))
        for number, host in of_project:
            chosen.add(number, host)

    hosts = {split: [] for split in SPLITS}
    for _, host in sorted(chosen):
        hosts[split_of(host.project if by_project else host.text)].append(host)
    if not all(hosts.values()):
        names = ", ".join(sources[:3])
        raise ValueError(f"too few files in {names}: train, validation and test need some each")
    return hosts, known
