"""Sources to a stream of distinct documents, and a document to its text.

A document is UTF-8 text, kept byte for byte; a second one of the same content is dropped. The hash
of the content alone decides whether it is held out, so a document stays where it is when sources
are added or reordered. What is left out is counted by its reason.
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

from tqdm import tqdm

from corpus.clean import unclean
from corpus.records import Document
from corpus.sources import no_progress, read, readers

BINARY = "binary (a NUL byte)"


class Item(NamedTuple):
    """A document as the sources have it: neither cleaned nor tokenized yet."""

    digest: bytes  # SHA-256 of its content
    size: int  # bytes of text
    document: Document
    source: str  # where it was read,
    number: int  # and how many documents that source has before it

    @property
    def share(self):
        """A number in [0, 1): the document is held out if it is below the share to be held out."""
        return int.from_bytes(self.digest[:8]) / 2**64


class Contents:
    """What the documents of a part are, those left out included."""

    def __init__(self):
        self.sources = {}  # path -> [number of the first document, number of the last]
        self._digest = hashlib.sha256()

    def add(self, item):
        """Adds the next document."""
        self.sources.setdefault(item.source, [item.number, item.number])[1] = item.number
        line = f"{item.share!r} {item.size} {item.document.language}\n"  # 53 bits of the hash
        self._digest.update(line.encode())

    @property
    def digest(self):
        """A hash of all documents, in hexadecimal."""
        return self._digest.hexdigest()


def documents(
    sources,  # paths
    skipped,  # a Counter: what is left out is added to it, by reason
    commits=False,  # read the histories of git repositories too
    languages=None,  # take only these
    limit=None,  # the most documents of each language
    description="reading",  # what the progress bar says
):
    """Yields an `Item` for each distinct document of the sources, in order.

    Raises ValueError for a source that is missing or damaged.
    """
    seen = set()  # 8 bytes of each digest: about 70 bytes of memory for a document
    taken = Counter()  # documents, by their language
    for item in _read_all(sources, skipped, commits, languages, description):
        key = item.digest[8:16]  # not the bytes that decide on the share
        language = item.document.language
        # In this order: a document counts against a limit only if it is taken.
        if key in seen:
            skipped["exact duplicate"] += 1
        elif limit is not None and taken[language] >= limit:
            skipped["over the limit of its language"] += 1
        else:
            seen.add(key)
            taken[language] += 1
            yield item


def _read_all(sources, skipped, commits, languages, description):
    """Yields the `Item`s of all sources, behind a progress bar over their bytes on disk."""
    # All are found before the first is read, so that the bar knows the end.
    found = [reader for source in sources for reader in readers(source, commits)]
    total = sum(source.size for source in found)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description) as bar:
        for source in found:

            def progress(n, absolute=False, start=bar.n, end=bar.n + source.size):
                # More may be read than was measured, as when a file grows.
                position = start + n if absolute else bar.n + n
                bar.update(min(position, end) - bar.n)

            yield from items_of(source, skipped, languages, progress)


def items_of(source, skipped, languages=None, progress=no_progress):
    """Yields an `Item` for each document of a `Source`, but for empty ones.

    languages: takes only these; None: all. The other arguments are those of `read`.
    """
    for number, document in enumerate(read(source.path, source.reader, skipped, progress)):
        content = document.content
        if not (content.strip() if isinstance(content, bytes) else content):
            skipped["empty"] += 1
        elif languages is not None and document.language not in languages:
            skipped["another language"] += 1
        else:
            yield _item_of(document, source.name, number)


def _item_of(document, source, number):
    """Hashes and measures a document."""
    content = document.content
    if isinstance(content, bytes):
        return Item(hashlib.sha256(content).digest(), len(content), document, source, number)
    # A record is hashed with its special tokens, and measured without them.
    size = sum(len(text.encode(errors="replace")) for _, text in content)
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return Item(digest, size, document, source, number)


def text_of(document, clean=False):
    """(pieces, None), or (None, why the document is left out).

    pieces: [(special token or "", text), ...]; a file is one piece, a record has several.
    clean: leave out files that `unclean` objects to. Records were filtered when they were read.
    """
    content = document.content
    if not isinstance(content, bytes):  # a record
        if any("\0" in text for _, text in content):
            return None, BINARY
        # JSON can spell half of a surrogate pair, which is no text: it becomes a question mark.
        pieces = [(token, text.encode(errors="replace").decode()) for token, text in content]
        return pieces, None

    if b"\0" in content:
        return None, BINARY
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None, "not UTF-8"
    reason = unclean(text) if clean else None  # last, as it takes the longest
    return (None, reason) if reason else ([("", text)], None)
