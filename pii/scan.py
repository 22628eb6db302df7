"""Finding in files and directories: reads their texts, and says where each entity stands.

A line that says `pii: allow` is exempted: so an author says that what stands there may be seen.
"""

import bisect
import re
from typing import NamedTuple

from tqdm import tqdm

from pii.labels import Entity
from pii.text_files import BYTE_ORDER_MARK, PIECE_SIZE, files_of, pieces, readable_encoding

ALLOWED = "pii: allow"

LINE_END = re.compile(r"\r\n?|\n")  # as in editors and in Python's `open`

# The detector sees small files together, up to so many characters: a GPU is fast on many tokens.
GATHER = 1_000_000


class Piece(NamedTuple):
    """A text, and where in a file it begins."""

    path: str
    line: int  # how many lines are before it
    column: int  # how many characters of its first line are before it
    text: str


class Finding(NamedTuple):
    """An entity, and where in a file it stands."""

    path: str
    line: int  # from 1
    column: int  # from 1, in characters
    end_line: int  # of its last character
    end_column: int  # behind its last character
    entity: Entity
    value: str  # what stands there; see `masked`


def masked(value):
    """What may be shown of a value: two characters at most, and at most a third of it.

    Logs are read by many, and are kept for long.

    >>> masked("hunter2"), masked("toor"), masked("me")
    ('hu…', 't…', '…')
    """
    return value[: min(2, len(value) // 3)] + "…"


def line_starts(text):
    """[0, ...]: where the lines of a text begin."""
    return [0] + [end.end() for end in LINE_END.finditer(text)]


def not_allowed(text, entities):
    """The entities without those of which a line says that they may stay."""
    if not entities or ALLOWED not in text:
        return entities
    # Bisected: to count the lines before each of a thousand entities anew would be quadratic.
    starts = line_starts(text)
    allowed = {bisect.bisect(starts, mark.start()) for mark in re.finditer(ALLOWED, text)}
    kept = []
    for entity in entities:
        # From its first line to its last: a private key has many.
        first = bisect.bisect(starts, entity.start)
        last = bisect.bisect(starts, entity.end - 1)
        if allowed.isdisjoint(range(first, last + 1)):
            kept.append(entity)
    return kept


def pieces_of(path, skipped, piece_size):
    """Yields the text of a file as `Piece`s. What cannot be read is counted in `skipped`."""
    encoding = readable_encoding(path, skipped)
    if encoding is None:
        return
    line = 0  # of the next piece
    column = 0
    try:
        with open(path, "rb") as file:
            for text, _ in pieces(file, encoding, piece_size):
                if text == BYTE_ORDER_MARK:  # which has no column
                    continue
                yield Piece(path, line, column, text)
                # No piece ends within a \r\n, so lines can be counted piece by piece.
                starts = line_starts(text)
                column = len(text) - starts[-1] + (0 if starts[1:] else column)
                line += len(starts) - 1
    except (OSError, UnicodeDecodeError):  # a disk that fails; UTF-32 only at its beginning
        skipped["unreadable"] += 1


def find_in(detector, batch):
    """Yields a `Finding` for each entity in a list of `Piece`s; the detector sees them together."""
    found = detector.find([piece.text for piece in batch])
    for piece, entities in zip(batch, found):
        # Most pieces hold nothing.
        starts = line_starts(piece.text) if entities else []
        for entity in not_allowed(piece.text, entities):
            line, column = place_of(piece, starts, entity.start)
            end_line, last_column = place_of(piece, starts, entity.end - 1)
            value = piece.text[entity.start : entity.end]
            yield Finding(piece.path, line, column, end_line, last_column + 1, entity, value)


def place_of(piece, starts, at):
    """(line, column) of a character of a `Piece`, from 1 in its file. starts: its `line_starts`."""
    number = bisect.bisect(starts, at)  # of its line within the piece, from 1
    column = at - starts[number - 1] + 1
    if number == 1:  # the line began in a piece before
        column += piece.column
    return piece.line + number, column


def scan(detector, paths, skipped, piece_size=PIECE_SIZE, gather=GATHER):
    """Yields a `Finding` for each entity in files and directories; `skipped` as for `files_of`."""
    batch = []
    characters = 0  # in the batch
    files = files_of(paths, skipped)
    # The log of a hook, or of CI, is no place for a bar: None leaves it out.
    bar = tqdm(files, desc="detecting", unit=" files", leave=False, disable=None)
    for path, _ in bar:
        for piece in pieces_of(path, skipped, piece_size):
            batch.append(piece)
            characters += len(piece.text)
            if characters >= gather:  # at once for a long file
                yield from find_in(detector, batch)
                batch = []
                characters = 0
    yield from find_in(detector, batch)
