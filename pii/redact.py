"""TODO."""

import contextlib
import os
import shutil
import tempfile
from collections import Counter

from tqdm import tqdm

from pii.rules import PLACEHOLDER
from pii.scan import not_allowed
from pii.text_files import files_of, open_text, segments

# Replacements as published: the private addresses are those of StarCoder's data.
PRIVATE = {
    4: ["172.16.31.10", "172.16.58.3", "172.16.17.32", "192.168.127.12", "192.168.3.11"],
    6: ["fd00:c2b6:b24b:be67:2827:688d:e6a1:6a3b", "fd00:a516:7c1b:17cd:6d81:2137:bd2a:2c5b", "fc00:e968:6179::de52:7100",
        "fc00:db20:35b:7399::5", "fdf8:f53e:61e4::18"],
}  # fmt: skip


def redacted(text, entities, addresses_seen):
    """The text with each entity replaced. addresses_seen: {address: its private one}, so that one address stays one throughout a file."""
    pieces, at = [], 0
    for start, end, category, _ in entities:
        pieces.append(text[at:start])
        value, at = text[start:end], end
        if category != "IP_ADDRESS":
            pieces.append(f"<{category}>")
            continue
        choices = PRIVATE[6 if ":" in value else 4]
        pieces.append(addresses_seen.setdefault(value, choices[len(addresses_seen) % len(choices)]))
    return "".join([*pieces, text[at:]])


def outside_placeholders(text, entities):
    """Entities without the parts that are placeholders: what was replaced stays as it is."""
    kept = []
    for entity in entities:
        at, begin = entity.start, max(0, entity.start - 20)  # a placeholder may reach into it
        for hole in PLACEHOLDER.finditer(text, begin, min(len(text), entity.end + 20)):
            if hole.start() < entity.end and hole.end() > entity.start:
                kept.append(entity._replace(start=at, end=max(at, hole.start())))
                at = hole.end()
        kept.append(entity._replace(start=at, end=max(at, entity.end)))
    return [entity for entity in kept if any(c.isalnum() for c in text[entity.start : entity.end])]


def version_of(path):
    """What differs after another program has written to a file, or put another there."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def room_beside(path):
    """Two paths for files on the disk of `path`; their directory is removed however this ends."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".redacting-") as room:
        yield os.path.join(room, "a"), os.path.join(room, "b")


def overwrite(file, source):
    """Gives a file, open for reading and writing bytes, the content of the file at `source`."""
    file.seek(0)
    with open(source, "rb") as f:
        shutil.copyfileobj(f, file)
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


def replace_content(path, new, backup):
    """Gives the file at `path` the content of the file `new`; it keeps its mode, owner and names.

    A rename does it whole or not at all. But the old content would stay under the file's other
    names, its hard links, and only root may give a new file to another owner. In these two cases
    the file is written over, and written back from `backup`, a path for a copy, if that fails or
    is stopped. The file's time becomes that of this change: make and backups go by it.
    """
    status = os.stat(path)
    try:
        os.chown(new, status.st_uid, status.st_gid)
        may_rename = status.st_nlink == 1
    except OSError:
        may_rename = False
    if may_rename:
        shutil.copystat(path, new)
        os.utime(new)
        os.replace(new, path)
        return
    with open(path, "r+b") as file:
        shutil.copyfile(path, backup)
        try:
            overwrite(file, new)
        except BaseException:  # KeyboardInterrupt and SystemExit are none of Exception's
            overwrite(file, backup)
            raise


def redact_once(detector, path, out, encoding, addresses_seen):
    """Writes `path` to `out` with all replaced that is found at first; returns it, counted."""
    counts = Counter()
    with open(path, "rb") as f, open(out, "wb") as g:
        for text, of_piece in segments(f, encoding):
            (entities,) = detector.find([text])
            entities = outside_placeholders(text, not_allowed(text, entities))
            counts.update(entity.category for entity in entities)
            g.write(redacted(text, entities, addresses_seen).encode(of_piece, "surrogatepass"))
        g.flush()
        os.fsync(g.fileno())
    return counts


def redact_file(detector, path, out, encoding="utf-8"):
    """Writes `path` to `out`, which may be the same, with everything replaced that is found; returns a Counter of categories.

    What replaces something can let the model see something more, so it is done again until nothing is found: to redact what is redacted
    changes nothing. Whole or not at all, with the same permissions; bytes outside of entities stay what they are.

    In place, a file in which nothing is found is not written to; nor is one that another program
    changed meanwhile, for which None is returned.
    """
    in_place = os.path.exists(out) and os.path.samefile(path, out)
    version = version_of(path)
    seen = {}
    with room_beside(out) as (redacted_path, other):
        counts = redact_once(detector, path, redacted_path, encoding, seen)
        again = counts
        while again:
            again = redact_once(detector, redacted_path, other, encoding, seen)
            counts = counts + again
            os.replace(other, redacted_path)
        if not in_place:
            shutil.copymode(path, redacted_path)
            os.replace(redacted_path, out)
        elif version_of(path) != version:
            return None
        elif counts:
            replace_content(out, redacted_path, other)
    return counts


def targets_of(paths, out, skipped):
    """{where it is written: path} of what `redact` is given. Raises ValueError as said there."""
    places = {}
    for path, name in files_of(paths, skipped):
        # In place, not a link, but what it names.
        target = os.path.realpath(path) if out is None else os.path.join(out, name)
        if out is not None and target in places:
            raise ValueError(f"{target}: two files would be written there; choose another --out")
        if out is not None and os.path.lexists(target):
            raise ValueError(f"{target}: exists already; choose another --out")
        places.setdefault(target, path)  # named twice, it is redacted once

    checked = set()
    for target in places if out is not None else ():
        folder = os.path.dirname(target)
        while len(folder) > len(out) and folder not in checked:
            checked.add(folder)
            if folder in places or os.path.lexists(folder) and not os.path.isdir(folder):
                raise ValueError(
                    f"{folder}: would be both a file and a directory; choose another --out"
                )
            folder = os.path.dirname(folder)
    return places


def redact(detector, paths, out=None):
    """Redacts files and directories into the directory `out`, or in place where that is None. Returns (found, skipped), two Counters.

    What cannot be read as text is copied as it is. Raises ValueError, before anything is written,
    where two files would get the same name, or a file and a directory, a copy exists, or `out` is a
    file or lies in a directory that is to be copied.
    """
    skipped, counts = Counter(), Counter()
    if out is not None and (not out or os.path.exists(out) and not os.path.isdir(out)):
        raise ValueError(f"{out or repr(out)}: not a directory; choose another --out")
    for path in paths if out is not None else ():
        if os.path.isdir(path) and os.path.join(os.path.realpath(out), "").startswith(
            os.path.join(os.path.realpath(path), "")
        ):
            raise ValueError(f"{out} lies in {path}; choose a directory outside of it")
    places = targets_of(paths, out, skipped)
    for target, path in tqdm(places.items(), desc="redacting", unit=" files", leave=False):
        opened = open_text(path, skipped)
        try:
            if opened:
                file, encoding = opened
                file.close()
                found = redact_file(detector, path, target, encoding)
                if found is None:
                    skipped["changed by another program meanwhile"] += 1
                else:
                    counts.update(found)
            elif out is not None and os.access(path, os.R_OK):
                with room_beside(target) as (copy, _):
                    shutil.copy(path, copy)
                    os.replace(copy, target)
        except UnicodeDecodeError:  # it began as UTF-32 and does not go on so
            skipped["unreadable"] += 1
        except FileNotFoundError:
            if os.path.exists(path):
                raise
            skipped["removed by another program meanwhile"] += 1
    return counts, skipped
