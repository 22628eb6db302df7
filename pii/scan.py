"""TODO."""

import bisect
import re

from tqdm import tqdm

from pii.rules import ALLOWED
from pii.text_files import GATHER, files_of, line_starts, size_of, texts_of


def not_allowed(text, entities):
    """Those entities whose lines do not say that they may stay."""
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


def scan(detector, paths, skipped, description="detecting"):
    """Yields (path, line, column, Entity, its text) for all that is found in files and directories; lines and columns count from 1."""
    files = files_of(paths, skipped)
    waiting = []  # (path, lines before it, characters of its first line before it, text)

    def found():
        for (path, line, column, text), entities in zip(
            waiting, detector.find([text for *_, text in waiting])
        ):
            starts = line_starts(text) if entities else []
            for entity in not_allowed(text, entities):
                number = bisect.bisect(starts, entity.start)  # from 1
                place = entity.start - starts[number - 1] + 1 + (column if number == 1 else 0)
                yield path, line + number, place, entity, text[entity.start : entity.end]
        waiting.clear()

    total = sum(size_of(path) for path, _ in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, leave=False) as bar:
        gathered = 0
        for path, _ in files:
            line, column, characters = 0, 0, 0
            for text in texts_of(path, skipped):
                waiting.append((path, line, column, text))
                ends = text.count("\n") + text.count("\r") - text.count("\r\n")
                line += ends
                begin = max(text.rfind("\n"), text.rfind("\r")) + 1
                column = len(text) - begin + (0 if ends else column)
                characters += len(text)
                gathered += len(text)
                if gathered >= GATHER:
                    yield from found()
                    gathered = 0
                bar.update(len(text))
            bar.update(size_of(path) - characters)  # more bytes than characters
        yield from found()
