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
from corpus.sources import read, readers

BINARY = "binary (a NUL byte)"


class Item(NamedTuple):
    """A distinct document as the sources have it: neither cleaned nor tokenized yet."""

    digest: bytes  # SHA-256 of its content
    size: int  # bytes of text
    document: Document

    @property
    def share(self):
        """A number in [0, 1): the document is held out if it is below the share to be held out."""
        return int.from_bytes(self.digest[:8]) / 2**64


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
    for document in _read_all(sources, skipped, commits, description):
        item = _item_of(document)
        key = item.digest[8:16]  # not the bytes that decide on the share
        language, content = document
        # In this order: a document counts against a limit only if it is taken.
        if not (content.strip() if isinstance(content, bytes) else content):
            skipped["empty"] += 1
        elif key in seen:
            skipped["exact duplicate"] += 1
        elif languages is not None and language not in languages:
            skipped["another language"] += 1
        elif limit is not None and taken[language] >= limit:
            skipped["over the limit of its language"] += 1
        else:
            seen.add(key)
            taken[language] += 1
            yield item


def _read_all(sources, skipped, commits, description):
    """Yields the `Document`s of all sources, behind a progress bar over their bytes on disk."""
    # All are found before the first is read, so that the bar knows the end.
    found = [reader for source in sources for reader in readers(source, commits)]
    total = sum(size for _, _, size in found)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description) as bar:
        for path, reader, size in found:

            def progress(n, absolute=False, start=bar.n, end=bar.n + size):
                # More may be read than was measured, as when a file grows.
                position = start + n if absolute else bar.n + n
                bar.update(min(position, end) - bar.n)

            yield from read(path, reader, skipped, progress)


def _item_of(document):
    """Hashes and measures a document."""
    content = document.content
    if isinstance(content, bytes):
        return Item(hashlib.sha256(content).digest(), len(content), document)
    # A record is hashed with its special tokens, and measured without them.
    size = sum(len(text.encode(errors="replace")) for _, text in content)
    return Item(hashlib.sha256(json.dumps(content).encode()).digest(), size, document)


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
