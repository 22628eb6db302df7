"""Replacing what was found, in copies or in place.

    bob@mail.org  ->  <EMAIL>
    8.8.8.8       ->  172.16.31.10      a private address, the same one throughout a file

Nothing of a user's is lost: bytes outside of entities stay what they are; a file is written whole
or not at all, with its mode, owner and names; a copy never replaces a file; what another program
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
        *("fd00:c2b6:b24b:be67:2827:688d:e6a1:6a3b", "fd00:a516:7c1b:17cd:6d81:2137:bd2a:2c5b"),
        *("fc00:e968:6179::de52:7100", "fc00:db20:35b:7399::5", "fdf8:f53e:61e4::18"),
    ],
}

# ---- one text ----------------------------------------------------------------------------------


def redacted(text, entities, addresses_seen):
    """The text with each entity replaced. addresses_seen: address -> its private one, added to."""
    parts = []
    at = 0  # up to here the text is in `parts`
    for start, end, category, _ in entities:
        replacement = f"<{category}>"
        if category == "IP_ADDRESS":
            # One that was seen before keeps its replacement; a new one gets the next in turn.
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
        at = entity.start  # up to here the entity is cut
        # A placeholder, of ten characters at most, may reach into the entity from either side.
        for hole in PLACEHOLDER.finditer(text, max(0, entity.start - 20), entity.end + 20):
            if hole.start() < entity.end and hole.end() > entity.start:
                kept.append(entity._replace(start=at, end=max(at, hole.start())))
                at = hole.end()
        kept.append(entity._replace(start=at, end=max(at, entity.end)))
    # What is left between two placeholders may be a blank, or nothing.
    return [entity for entity in kept if any(map(str.isalnum, text[entity.start : entity.end]))]


# ---- one file ----------------------------------------------------------------------------------


@contextlib.contextmanager
def room_beside(path):
    """Two paths for files on the disk of `path`. They are gone afterwards, however this ends."""
    # On the same disk a rename is atomic; in a directory of its own nothing has the same name.
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".redacting-") as room:
        yield os.path.join(room, "new"), os.path.join(room, "spare")


def redact_once(detector, path, out, encoding, addresses_seen, piece_size):
    """Writes `path` to `out` with what is found now replaced; returns a Counter of categories."""
    counts = Counter()
    with open(path, "rb") as source, open(out, "wb") as target:
        for text, of_piece in pieces(source, encoding, piece_size):
            # A line that is exempted stays, and so does what was replaced in a pass before.
            (entities,) = detector.find([text])
            entities = outside_placeholders(text, not_allowed(text, entities))
            counts.update(entity.category for entity in entities)
            # In its own encoding the rest of the text is the bytes that it was.
            text = redacted(text, entities, addresses_seen)
            target.write(text.encode(of_piece, "surrogatepass"))
        # It must be on the disk before it takes the place of a file: the power may fail.
        target.flush()
        os.fsync(target.fileno())
    return counts


def overwrite(file, source):
    """Gives a file, open for reading and writing bytes, the content of the file at `source`."""
    # Truncated last: on a full disk the old content must still fit when it is written back.
    file.seek(0)
    with open(source, "rb") as content:
        shutil.copyfileobj(content, file)
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


def replace_content(path, new, backup):
    """Gives the file at `path` the content of `new`. `backup`: a path for a copy."""
    # A rename does it whole or not at all. But under the file's other names, its hard links, the
    # old content would stay, and only root may give a new file to another owner.
    status = os.stat(path)
    may_rename = status.st_nlink == 1  # its only name
    try:
        os.chown(new, status.st_uid, status.st_gid)
    except OSError:
        may_rename = False
    if may_rename:
        shutil.copystat(path, new)
        os.utime(new)  # now: make and backups go by it
        os.replace(new, path)
        return

    # So the file is written over, and written back if that fails or is stopped.
    with open(path, "r+b") as file:
        shutil.copyfile(path, backup)
        try:
            overwrite(file, new)
        except BaseException:  # Ctrl-C and SIGTERM too, which are no Exception
            overwrite(file, backup)
            raise


def version_of(path):
    """What differs once another program has written to a file, or put another in its place."""
    # Device and number say which file it is; size and time, which content.
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def redact_file(detector, path, out, encoding="utf-8", piece_size=PIECE_SIZE):
    """Writes `path` to `out`, which may be the same file, with everything that is found replaced.

    Returns a Counter of categories; None if another program changed the file meanwhile.
    """
    # In place, `path` may be a link, and `out` is the file that it names.
    in_place = os.path.exists(out) and os.path.samefile(path, out)
    version = version_of(path)
    addresses_seen = {}
    with room_beside(out) as (new, spare):
        # A model may see more in what is redacted, and the pieces are cut elsewhere: look again,
        # until nothing is found.
        counts = redact_once(detector, path, new, encoding, addresses_seen, piece_size)
        more = counts
        while more:
            more = redact_once(detector, new, spare, encoding, addresses_seen, piece_size)
            counts = counts + more
            os.replace(spare, new)

        # Nothing of the user's has been touched up to here.
        if not in_place:
            shutil.copymode(path, new)
            os.replace(new, out)
        elif version_of(path) != version:
            return None  # and the other program's work stays
        elif counts:  # else nothing is written, not even the same again
            replace_content(out, new, spare)
    return counts


# ---- files and directories ---------------------------------------------------------------------


def check_out(out, paths):
    """Raises ValueError if copies of `paths` cannot be put into the directory `out`."""
    # An empty --out comes from an unset variable of a script; it is not the working directory.
    if not out or os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out or repr(out)}: not a directory; choose another --out")
    for root in filter(os.path.isdir, paths):
        # The next run would take the copies for files of the directory.
        if PurePath(os.path.realpath(out)).is_relative_to(os.path.realpath(root)):
            raise ValueError(f"{out} lies in {root}; choose a directory outside of it")


def copies_of(files, out):
    """{where its copy goes: path} of [(path, path below its root), ...].

    Raises ValueError if a copy exists already, or if two of them would need one name.
    """
    places = {}
    folders = set()  # that the copies need
    for path, name in files:
        target = os.path.join(out, name)
        if target in places:
            raise ValueError(f"{target}: two files would be written there; choose another --out")
        if os.path.lexists(target):  # a link that leads nowhere too
            raise ValueError(f"{target}: exists already; choose another --out")
        places[target] = path
        folders.update(os.path.join(out, folder) for folder in PurePath(name).parents)

    # Two directories that are copied into one may disagree, and so may what is there already.
    for folder in sorted(folders):
        if folder in places or os.path.lexists(folder) and not os.path.isdir(folder):
            words = "would be both a file and a directory; choose another --out"
            raise ValueError(f"{folder}: {words}")
    return places


def redact(detector, paths, out=None, piece_size=PIECE_SIZE):
    """Redacts files and directories into the directory `out`; in place if that is None.

    Returns two Counters: of categories found, and of files left as they are. Raises ValueError,
    before anything is written, as `files_of`, `check_out` and `copies_of` do.
    """
    counts = Counter()
    skipped = Counter()
    # {where it is written: what is read}
    if out is None:
        # Not a link but the file that it names; a file that is named twice is redacted once.
        places = {os.path.realpath(path): path for path, _ in files_of(paths, skipped)}
    else:
        check_out(out, paths)
        places = copies_of(files_of(paths, skipped), out)

    for target, path in tqdm(places.items(), desc="redacting", unit=" files", leave=False):
        encoding = readable_encoding(path, skipped)
        try:
            if encoding:
                found = redact_file(detector, path, target, encoding, piece_size)
                counts.update(found or {})
                if found is None:  # the next run will see it
                    skipped["changed by another program meanwhile"] += 1
            elif out is not None and os.access(path, os.R_OK):
                # What holds no text belongs to a copy of a repository all the same.
                with room_beside(target) as (new, _):
                    shutil.copy(path, new)
                    os.replace(new, target)
        except UnicodeDecodeError:  # it began as UTF-32 and does not go on so
            skipped["unreadable"] += 1
        except FileNotFoundError:
            if os.path.exists(path):  # it is the place of the copy that is gone
                raise
            skipped["removed by another program meanwhile"] += 1
    return counts, skipped
