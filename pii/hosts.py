"""The hosts of the synthetic data: real files of many kinds, into which templates are written.

A host is any text file of a source: code, configuration, data, documentation. `host_kinds.txt`
says which kind a file is of, and leaves out licences, and what programs or other projects wrote.
So that none dominates, there are at most 1,500 hosts of a kind, and 60 of them from one project.
Which ones these are, hashes decide.

All hosts of a project are in one split. An archive is a project, and so is a directory. Left out
are files under 200 bytes or over 200 kB, and any that names the GNU General Public License, as a
detector that was trained on the hosts may be passed on.
"""

import functools
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

from corpus.documents import text_of
from corpus.languages import language_of
from corpus.packages import fetched, read_packages
from corpus.records import Choice, Document
from corpus.sources import TABLES, read, readers
from pii.templates import SPLITS, split_of

PACKAGES = "corpora/packages"  # where `python -m corpus --fetch pii/packages.txt` puts them
MOST_OF_KIND = 1500  # hosts
MOST_OF_PROJECT = 60  # hosts of a kind
SMALLEST = 200  # bytes
LARGEST = 200_000  # bytes
LEFT_OUT = "left_out"  # the kind of files that are no hosts
COPYLEFT = re.compile(r"General\s+Public\s+License", re.IGNORECASE)
# The program that the first line of a script names, and the kind, if that is another word.
PROGRAM = re.compile(rb"#!.*\b(bash|dash|zsh|sh|python|ruby|perl|php|node)")
PROGRAMS = {"bash": "shell", "dash": "shell", "zsh": "shell", "sh": "shell", "node": "javascript"}


class Host(NamedTuple):
    """A real file."""

    text: str
    kind: str  # of host_kinds.txt, or a language of corpus/languages.txt
    project: str = ""  # as "pypi-flask"


# ---- the kind of a file --------------------------------------------------------------------------


@functools.cache
def _patterns():
    """[(kind, pattern of a path that begins with a slash), ...] of host_kinds.txt, in its order."""
    text = Path(__file__).with_name("host_kinds.txt").read_text(encoding="utf-8")
    _, _, lines = text.partition("\n\n")
    found = []
    for line in lines.splitlines():
        kind, _, alternatives = line.partition(": ")
        globs = [glob.removeprefix("*/") for glob in alternatives.split(" | ")]
        patterns = [translate(f"*/{glob}") for glob in globs]
        found.append((kind, re.compile("|".join(patterns))))
    return found


def kind_of(path, content=b""):
    """The kind of a file, or None: by host_kinds.txt, by its language, or by its first line.

    >>> kind_of("a/.github/workflows/test.yml"), kind_of("a/b.yml"), kind_of("a/vendor/b.yml")
    ('workflow', 'yaml', 'left_out')
    """
    for kind, pattern in _patterns():
        if pattern.match(f"/{path}"):
            return kind
    program = PROGRAM.match(content)
    language = language_of(path, content)
    if language or not program:
        return language
    name = program[1].decode()
    return PROGRAMS.get(name, name)


# ---- the files of a source -----------------------------------------------------------------------


def _documents(source):
    """Yields the `Document`s of a source that may be hosts; their language is a kind."""

    def may_be(path, is_file, size, skipped):
        return is_file and size <= LARGEST

    def made_of(path, content, skipped):
        # Where a directory lies says nothing of what is in it.
        kind = kind_of(path.removeprefix(source), content)
        fits = SMALLEST <= len(content) <= LARGEST
        return Document(kind, content) if fits and kind not in (None, LEFT_OUT) else None

    for path, reader, _ in readers(source):
        if not path.endswith(TABLES):  # whose rows say themselves what they are
            reader = functools.partial(reader, choice=Choice(may_be, made_of))
        for document in read(path, reader, Counter(), _no_progress):
            if isinstance(document.content, bytes):  # not a commit or an issue
                yield document


def _no_progress(size, absolute=False):
    """Shows nothing: the bars of this file count sources."""


def _project_of(source):
    """The project of a source: "pypi-flask" of pypi-flask-3.0.3.tar.gz, or a directory's name."""
    name = os.path.basename(os.path.realpath(source))
    if os.path.isdir(source):
        return name
    return re.sub(r"(-v?\d|\.(tar|tgz|zip|whl|parquet|jsonl)\b).*", "", name)


# ---- all hosts -----------------------------------------------------------------------------------


def _has_room(heap, most, digest):
    """True if a digest is one of the `most` smallest so far."""
    return len(heap) < most or -digest > heap[0][0]


def _add(heap, most, digest, host):
    """Adds to [(-digest, host), ...], a heap of the `most` smallest digests, largest first."""
    heapq.heappush(heap, (-digest, host))
    if len(heap) > most:
        heapq.heappop(heap)


def _hosts_of(source, most, seen):
    """{kind: [(-digest, host), ...]} with the `most` smallest digests of a source.

    seen: digests of other sources' hosts, which are left out here. Its own are added.
    """
    heaps = defaultdict(list)
    project = _project_of(source)
    for document in _documents(source):
        heap = heaps[document.language]
        digest = int.from_bytes(hashlib.sha256(document.content).digest()[:8])
        # This comes first, as cleaning takes longer.
        if digest in seen or not _has_room(heap, most, digest):
            continue
        pieces, reason = text_of(document, clean=True)
        if not reason and not COPYLEFT.search(pieces[0][1]):
            seen.add(digest)
            _add(heap, most, digest, Host(pieces[0][1], document.language, project))
    return heaps


def default_sources():
    """The fetched ones of packages.txt or, if there are none, this Python's standard library."""
    listed = read_packages(Path(__file__).with_name("packages.txt"))
    paths = [fetched(package, PACKAGES) for package in listed]
    return [path for path in paths if path] or [sysconfig.get_paths()["stdlib"]]


def read_hosts(sources):
    """{split: [Host, ...]} of the text files of `sources`, in the order of their hashes.

    A source is one of `corpus.sources`; [] stands for `default_sources`. Where there are too few to
    give each split a project, files are split one by one. Raises ValueError if a split has none,
    and for a source that is missing or damaged.
    """
    sources = [os.fspath(source) for source in sources or default_sources()]
    by_project = {split_of(_project_of(source)) for source in sources} == set(SPLITS)
    most = MOST_OF_PROJECT if by_project else MOST_OF_KIND

    chosen = defaultdict(list)  # {kind: heap}
    seen = set()  # a file that several projects have is in one split only
    for source in tqdm(sources, "reading", unit=" sources"):
        for kind, heap in _hosts_of(source, most, seen).items():
            for negative, host in heap:
                _add(chosen[kind], MOST_OF_KIND, -negative, host)

    hosts = {split: [] for split in SPLITS}
    for _, host in sorted(pair for heap in chosen.values() for pair in heap):
        hosts[split_of(host.project if by_project else host.text)].append(host)
    if not all(hosts.values()):
        names = ", ".join(sources[:3])
        raise ValueError(f"too few files in {names}: train, validation and test need some each")
    return hosts


def labelled_texts(sources, wanted):
    """{split: {digest: text}} of those files whose digests are wanted, whatever kind they are of.

    A digest: the first 16 digits of a file's SHA-256. The split is that of the file's project, and
    of the first one if several have the file.
    """

    def may_be(name, is_file, size, skipped):
        return is_file and size <= LARGEST

    def made_of(name, content, skipped):
        return Document("", content) if digest_of(content) in wanted else None

    found = {split: {} for split in SPLITS}
    seen = set()
    for source in tqdm(sources or default_sources(), "reading labelled files", unit=" sources"):
        for path, reader, _ in readers(os.fspath(source)):
            if path.endswith(TABLES):
                continue
            chosen = functools.partial(reader, choice=Choice(may_be, made_of))
            for document in read(path, chosen, Counter(), _no_progress):
                digest = digest_of(document.content)
                if digest not in seen:
                    seen.add(digest)
                    found[split_of(_project_of(source))][digest] = document.content.decode()
    return found


def digest_of(content):
    """The first 16 digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]
