"""Finding in files and directories: reads their texts, and says where each entity stands.

Small files are shown to the detector many at once, as a model on a GPU is fast on many tokens only;
a long file comes in pieces (see `text_files`). A line that says `pii: allow` is exempted: it is how
an author says that what stands there may be seen.
"""

import bisect
import re
from typing import NamedTuple

from tqdm import tqdm

from pii.labels import Entity
from pii.text_files import PIECE_SIZE, files_of, line_starts, texts_of

ALLOWED = "pii: allow"

GATHER = 200_000  # characters of small files that the detector sees at once


class Piece(NamedTuple):
    """A text, and where in a file it begins."""

    path: str
    line: int  # lines before it
    column: int  # characters of its first line before it
    text: str


class Finding(NamedTuple):
    """An entity, and where in a file it stands."""

    path: str
    line: int  # from 1
    column: int  # from 1, in characters
    entity: Entity
    value: str


def not_allowed(text, entities):
    """Those entities none of whose lines says that they may stay."""
    if not entities or ALLOWED not in text:
        return entities
    starts = line_starts(text)
    allowed = {bisect.bisect(starts, mark.start()) for mark in re.finditer(ALLOWED, text)}
    kept = []
    for entity in entities:
        first = bisect.bisect(starts, entity.start)
        last = bisect.bisect(starts, entity.end - 1)
        if allowed.isdisjoint(range(first, last + 1)):
            kept.append(entity)
    return kept


def pieces_of(path, skipped, piece_size):
    """Yields the text of a file as `Piece`s. What cannot be read is counted in `skipped`."""
    line = 0
    column = 0
    for text in texts_of(path, skipped, piece_size):
        yield Piece(path, line, column, text)
        ends = text.count("\n") + text.count("\r") - text.count("\r\n")
        last_line = max(text.rfind("\n"), text.rfind("\r")) + 1
        line += ends
        column = len(text) - last_line + (0 if ends else column)


def find_in(detector, pieces):
    """Yields a `Finding` for each entity in pieces that the detector sees together."""
    found = detector.find([piece.text for piece in pieces])
    for (path, line, column, text), entities in zip(pieces, found):
        starts = line_starts(text) if entities else []
        for entity in not_allowed(text, entities):
            number = bisect.bisect(starts, entity.start)  # of its line in the piece, from 1
            place = entity.start - starts[number - 1] + 1
            if number == 1:
                place += column
            yield Finding(path, line + number, place, entity, text[entity.start : entity.end])


def scan(detector, paths, skipped, piece_size=PIECE_SIZE, gather=GATHER):
    """Yields a `Finding` for all that a detector finds in files and directories.

    What is left out is counted in `skipped`, a Counter. Raises ValueError for a path that is
    missing, and for a file named in `paths` that cannot be read.
    """
    waiting = []
    characters = 0
    for path, _ in tqdm(files_of(paths, skipped), desc="detecting", unit=" files", leave=False):
        for piece in pieces_of(path, skipped, piece_size):
            waiting.append(piece)
            characters += len(piece.text)
            if characters >= gather:
                yield from find_in(detector, waiting)
                waiting.clear()
                characters = 0
    yield from find_in(detector, waiting)
