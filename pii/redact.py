"""Replacing what was found, in copies or in place.

    bob@mail.org   ->  <EMAIL>              each category but IP addresses: its name
    8.8.8.8        ->  172.16.31.10         a private address, the same throughout a file

Nothing that a user has is lost: all bytes outside of entities stay what they are; a file is written
whole or not at all, with its mode, owner and names; a copy replaces no file; what another program
writes meanwhile stays. To redact what is redacted changes nothing.

Reference: Li et al., StarCoder, 2023, section 4, for the replacements.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import PurePath

from tqdm import tqdm

from pii.scan import not_allowed
from pii.text_files import PIECE_SIZE, files_of, pieces, readable_encoding

PLACEHOLDER = re.compile(r"<(?:NAME|EMAIL|KEY|PASSWORD|USERNAME)>")

# The private addresses of StarCoder's training data, as published: IPv4, and IPv6.
PRIVATE = {
    4: ["172.16.31.10", "172.16.58.3", "172.16.17.32", "192.168.127.12", "192.168.3.11"],
    6: [
        "fd00:c2b6:b24b:be67:2827:688d:e6a1:6a3b",
        "fd00:a516:7c1b:17cd:6d81:2137:bd2a:2c5b",
        "fc00:e968:6179::de52:7100",
        "fc00:db20:35b:7399::5",
        "fdf8:f53e:61e4::18",
    ],
}

# ---- texts -------------------------------------------------------------------------------------


def redacted(text, entities, addresses_seen):
    """The text with each entity replaced. entities: sorted, without overlaps.

    addresses_seen: a dict of address -> its private one, which remembers from text to text of a
    file, so that what was one address stays one.
    """
    parts = []
    at = 0
    for start, end, category, _ in entities:
        replacement = f"<{category}>"
        if category == "IP_ADDRESS":
            address = text[start:end]
            choices = PRIVATE[6 if ":" in address else 4]
            next_choice = choices[len(addresses_seen) % len(choices)]
            replacement = addresses_seen.setdefault(address, next_choice)
        parts += [text[at:start], replacement]
        at = end
    return "".join([*parts, text[at:]])


def outside_placeholders(text, entities):
    """The entities without those parts that are placeholders: what was replaced stays as it is."""
    kept = []
    for entity in entities:
        at = entity.start
        # A placeholder, of up to ten characters, may reach into the entity from either side.
        for hole in PLACEHOLDER.finditer(text, max(0, entity.start - 20), entity.end + 20):
            if hole.start() < entity.end and hole.end() > entity.start:
                kept.append(entity._replace(start=at, end=max(at, hole.start())))
                at = hole.end()
        kept.append(entity._replace(start=at, end=max(at, entity.end)))
    return [entity for entity in kept if any(c.isalnum() for c in text[entity.start : entity.end])]


# ---- one file ----------------------------------------------------------------------------------


def version_of(path):
    """What differs after another program has written to a file, or put another in its place."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def room_beside(path):
    """Two paths for files on the disk of `path`. They are gone afterwards, however this ends."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".redacting-") as room:
        yield os.path.join(room, "new"), os.path.join(room, "spare")


def redact_once(detector, path, out, encoding, addresses_seen, piece_size):
    """Writes `path` to `out` with all that is found replaced; returns a Counter of categories."""
    counts = Counter()
    with open(path, "rb") as source, open(out, "wb") as target:
        for text, of_piece in pieces(source, encoding, piece_size):
            (entities,) = detector.find([text])
            entities = outside_placeholders(text, not_allowed(text, entities))
            counts.update(entity.category for entity in entities)
            text = redacted(text, entities, addresses_seen)
            target.write(text.encode(of_piece, "surrogatepass"))
        target.flush()
        os.fsync(target.fileno())
    return counts


def overwrite(file, source):
    """Gives a file, open for reading and writing bytes, the content of the file at `source`."""
    file.seek(0)
    with open(source, "rb") as content:
        shutil.copyfileobj(content, file)
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


def replace_content(path, new, backup):
    """Gives the file at `path` the content of the file `new`; its mode, owner and names stay.

    A rename does it whole or not at all. But the old content would stay under the file's other
    names, its hard links, and only root may give a new file to another owner. In these two cases
    the file is written over, and written back from `backup`, a path for a copy, if that fails or is
    stopped. The time of the file becomes that of this change: make and backups go by it.
    """
    status = os.stat(path)
    may_rename = status.st_nlink == 1
    try:
        os.chown(new, status.st_uid, status.st_gid)
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
        except BaseException:  # Ctrl-C and SIGTERM too, which are no Exception
            overwrite(file, backup)
            raise


def redact_file(detector, path, out, encoding="utf-8", piece_size=PIECE_SIZE):
    """Writes `path` to `out`, which may be the same file, with everything that is found replaced.

    Returns a Counter of categories; None if another program changed the file meanwhile, which then
    is not written to. Nor is a file in which nothing is found, in place. A copy has the mode of its
    original.
    """
    in_place = os.path.exists(out) and os.path.samefile(path, out)
    version = version_of(path)
    addresses_seen = {}
    with room_beside(out) as (new, spare):
        # A model may see something more in what is redacted: again, until it finds nothing.
        counts = redact_once(detector, path, new, encoding, addresses_seen, piece_size)
        more = counts
        while more:
            more = redact_once(detector, new, spare, encoding, addresses_seen, piece_size)
            counts = counts + more
            os.replace(spare, new)

        if not in_place:
            shutil.copymode(path, new)
            os.replace(new, out)
        elif version_of(path) != version:
            return None
        elif counts:
            replace_content(out, new, spare)  # where a link is named, what it names
    return counts


# ---- files and directories ---------------------------------------------------------------------


def check_out(out, paths):
    """Raises ValueError if copies of `paths` cannot be put into the directory `out`."""
    if not out or os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out or repr(out)}: not a directory; choose another --out")
    for path in paths:
        if os.path.isdir(path):
            root = os.path.realpath(path)
            if os.path.commonpath([root, os.path.realpath(out)]) == root:
                raise ValueError(f"{out} lies in {path}; choose a directory outside of it")


def copies_of(files, out):
    """{where its copy goes: path} of [(path, path below its root), ...].

    Raises ValueError if a copy exists, or if two files, or a file and a directory, would need one
    name.
    """
    places = {}
    folders = set()
    for path, name in files:
        target = os.path.join(out, name)
        if target in places:
            raise ValueError(f"{target}: two files would be written there; choose another --out")
        if os.path.lexists(target):
            raise ValueError(f"{target}: exists already; choose another --out")
        places[target] = path
        folders.update(os.path.join(out, folder) for folder in PurePath(name).parents)

    for folder in sorted(folders):
        if folder in places or os.path.lexists(folder) and not os.path.isdir(folder):
            words = "would be both a file and a directory; choose another --out"
            raise ValueError(f"{folder}: {words}")
    return places


def copy_whole(path, out):
    """Copies a file with its mode; a reader of `out` finds all of it or nothing."""
    with room_beside(out) as (new, _):
        shutil.copy(path, new)
        os.replace(new, out)


def redact(detector, paths, out=None, piece_size=PIECE_SIZE):
    """Redacts files and directories into the directory `out`; in place if that is None.

    Returns two Counters: of the categories found, and of what is left as it is. What holds no text
    is copied as it is. Raises ValueError, before anything is written, for paths that are missing or
    may not be read, and for an `out` that `check_out` or `copies_of` refuse.
    """
    counts = Counter()
    skipped = Counter()
    if out is None:
        # Not a link but the file that it names; one that is named twice is redacted once.
        places = {os.path.realpath(path): path for path, _ in files_of(paths, skipped)}
    else:
        check_out(out, paths)
        places = copies_of(files_of(paths, skipped), out)

    for target, path in tqdm(places.items(), desc="redacting", unit=" files", leave=False):
        encoding = readable_encoding(path, skipped)
        try:
            if encoding is not None:
                found = redact_file(detector, path, target, encoding, piece_size)
                if found is None:
                    skipped["changed by another program meanwhile"] += 1
                else:
                    counts.update(found)
            elif out is not None and os.access(path, os.R_OK):
                copy_whole(path, target)
        except UnicodeDecodeError:  # it began as UTF-32 and does not go on so
            skipped["unreadable"] += 1
        except FileNotFoundError:
            if os.path.exists(path):
                raise
            skipped["removed by another program meanwhile"] += 1
    return counts, skipped
