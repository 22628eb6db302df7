"""Documents to tokens, on all cores.

    items -> chunks of about CHUNK_BYTES -> worker processes -> tokens, in the order of the items

A chunk is what a process is handed at once. It belongs to one part of the corpus, and is encoded
only if that part is wanted: other parts are read over.
"""

import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from corpus.clean import signature_of
from corpus.documents import text_of
from corpus.tokenizer import Tokenizer

TOO_SHORT = "under 2 tokens"
CHUNK_BYTES = 1_000_000  # of text: handing over a chunk costs little beside the work on it


class Chunk(NamedTuple):
    """Items of one part."""

    part: int  # its number
    items: list  # of `Item`


class Encoded(NamedTuple):
    """What becomes of a document."""

    tokens: np.ndarray | None = None  # None: it is left out, or read over
    reason: str | None = None  # why it is left out
    signature: object = None  # for `NearDuplicates.seen`


def chunks_of(stream, part_bytes):
    """Cuts a stream of items into chunks. A part ends where it has part_bytes of text."""
    part = 0  # its number
    part_size = 0  # bytes of text, up to here
    chunk_size = 0  # as well
    items = []
    for item in stream:
        items.append(item)
        part_size += item.size
        chunk_size += item.size
        part_is_full = part_size >= part_bytes
        if part_is_full or chunk_size >= CHUNK_BYTES:
            yield Chunk(part, items)
            items = []
            chunk_size = 0
        if part_is_full:
            part += 1
            part_size = 0
    if items:  # the last part may be a short one
        yield Chunk(part, items)


class Encoder(NamedTuple):
    """How documents become tokens. It goes to a worker process along with each chunk."""

    directory: str  # holds the tokenizer
    clean: bool
    near_dedup: bool
    dtype: np.dtype  # of tokens

    def encode_all(self, items, tokenize):
        """The `Encoded` of each item. tokenize: False if their part is not wanted."""
        return [self.encode(item.document, tokenize) for item in items]

    def encode(self, document, tokenize):
        """The `Encoded` of a document."""
        pieces, reason = text_of(document, self.clean)
        if reason:
            return Encoded(reason=reason)
        signature = None
        if self.near_dedup:
            # Also of what is read over: a document of this part may be like one of another.
            signature = signature_of("\n".join(text for _, text in pieces))
        if not tokenize:  # the part is there already
            return Encoded(signature=signature)
        tokens = tokens_of(pieces, self.directory, self.dtype)
        if tokens is None:
            return Encoded(reason=TOO_SHORT, signature=signature)
        return Encoded(tokens, signature=signature)


def tokens_of(pieces, directory, dtype):
    """The tokens of a document; None if they are too few to be cut into a pair.

    pieces: as from `text_of`. directory: holds the tokenizer.
    """
    tokenizer = _tokenizer(directory)
    ids = []
    for special_token, text in pieces:
        if special_token:  # in records only; in a file, text that looks like one is text
            ids.append(tokenizer.special_tokens[special_token])
        ids += tokenizer.encode(text)
    return np.array(ids, dtype) if len(ids) >= 2 else None


@functools.cache
def _tokenizer(directory):
    """The only state of a worker process: a tokenizer takes too long to load for every chunk."""
    return Tokenizer.from_pretrained(directory)


def end_with_parent():
    """Makes a worker process end when its parent is killed, or it would wait for work forever."""

    def wait_and_end():
        multiprocessing.parent_process().join()
        os._exit(1)  # sys.exit would only end the thread

    threading.Thread(target=wait_and_end, daemon=True).start()


def encode_in_order(
    chunks,
    encoder,
    wanted,  # a function of a part's number: True if its items are to be tokenized
    workers,  # processes
):
    """Yields (part, item, `Encoded`) for each item, in order.

    Raises ValueError if a process dies.
    """
    # Without this, each process warns of the threads that trained the tokenizer.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    in_flight = deque()  # (chunk, the future of its results)

    def land():
        chunk, future = in_flight.popleft()
        results = future.result() if future else itertools.repeat(Encoded())
        for item, encoded in zip(chunk.items, results):
            yield chunk.part, item, encoded

    try:
        with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
            for chunk in chunks:
                future = None  # nothing to be done
                if wanted(chunk.part) or encoder.near_dedup:
                    future = pool.submit(encoder.encode_all, chunk.items, wanted(chunk.part))
                in_flight.append((chunk, future))
                if len(in_flight) > 3 * workers:  # so no process waits while results are written
                    yield from land()
            while in_flight:
                yield from land()
    except BrokenProcessPool:
        words = "a worker process was killed (for the memory it took?)"
        raise ValueError(f"{words}; the same command goes on from here") from None
