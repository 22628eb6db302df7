"""Any file as text, in pieces: any encoding, any size, any line; binary files are left out.

    for text, encoding in pieces(file, encoding_of(file)):
        ...                     # text.encode(encoding, "surrogatepass") are the bytes of the file

A repository holds a gigabyte on one line, UTF-16 without a byte order mark, and Latin-1 between two
lines of UTF-8. All of it is read with a few pieces in memory, and each piece gives back the bytes
that it came from, so that redaction changes nothing else.
"""

import codecs
import os
import re
import unicodedata

PIECE_SIZE = 1_000_000  # bytes that are read at once

# Dependencies, caches and the history of a repository: not its own text.
SKIPPED_DIRECTORIES = {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv"}

# The byte order mark, decoded and in bytes. UTF-32's comes first: one begins as UTF-16's does.
BYTE_ORDER_MARK = "\ufeff"
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

ODD = {"Cc", "Cn", "Co", "Cs"}  # Unicode's controls, and unknown, private and half characters

ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8


def files_of(paths, skipped):
    """[(path, path below its root), ...] of files and of those in directories, sorted.

    skipped: a Counter of what is left out. Raises ValueError for a path that is missing, and for a
    file named in `paths` that cannot be read.
    """
    found = []

    # A directory that may not be read is left out, with all that is in it.
    def unreadable(error):
        skipped["unreadable"] += 1

    for root in paths:
        if os.path.isfile(root):
            if not os.access(root, os.R_OK):
                raise ValueError(f"{root}: may not be read")
            found.append((root, os.path.basename(root)))
            continue
        if not os.path.isdir(root):  # or a pipe, a device
            raise ValueError(f"{root}: no such file or directory")
        if not os.access(root, os.R_OK | os.X_OK):
            raise ValueError(f"{root}: may not be read")

        for folder, folders, names in os.walk(root, onerror=unreadable):
            kept = sorted(set(folders) - SKIPPED_DIRECTORIES)
            if len(kept) < len(folders):
                left_out = len(folders) - len(kept)
                skipped["directories as .git, venv or node_modules"] += left_out
            folders[:] = kept  # os.walk goes into these, in this order
            for name in sorted(names):
                path = os.path.join(folder, name)
                # A link could lead out of the directory, and a pipe would never end.
                if os.path.isfile(path) and not os.path.islink(path):
                    found.append((path, os.path.relpath(path, root)))
                else:
                    skipped["not a file"] += 1
    return found


def encoding_of(file):
    """The encoding of a file open for reading bytes, by its first 8 KiB; None if it holds no text.

    "utf-8" may be any other encoding but UTF-16 and UTF-32: `pieces` sees to that.
    """
    # Text has no NUL character. UTF-16 and UTF-32 have NUL bytes, and most often a mark.
    head = file.read(8192)
    file.seek(0)
    marked = [encoding for mark, encoding in MARKS.items() if head.startswith(mark)]
    if not marked and b"\0" not in head:
        return "utf-8"

    # Read as each of them, the bytes must be text.
    for encoding in marked[:1] or MARKS.values():
        try:
            # An incremental decoder does not mind that the head may end within a character.
            text = codecs.getincrementaldecoder(encoding)("surrogatepass").decode(head)
        except UnicodeDecodeError:
            continue
        # Without a mark it may be binary, of which UTF-16 makes odd characters, or Chinese ones.
        odd = any(unicodedata.category(c) in ODD and not c.isspace() for c in set(text))
        plain = not odd and 2 * sum(map(str.isascii, text)) > len(text)
        if "\0" not in text and (marked or plain):
            return encoding
    return None


def readable_encoding(path, skipped):
    """The encoding of the file at `path`; None, and counted in `skipped`, if there is no text."""
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file)  # and goes back to the beginning
            empty = not file.peek(1)
    except OSError:  # no permission, or removed since it was listed
        skipped["unreadable"] += 1
        return None
    if empty or not encoding:
        skipped["empty" if empty else "binary"] += 1
        return None
    return encoding


def place_to_cut(text, size):
    """How many characters of a text, of which more is to come, are a piece; 0 to wait for more."""
    # Behind the last line. A \r at the end does not count yet: it may be half of a \r\n.
    cut = text.rfind("\n") + 1 or text.rfind("\r", 0, -1) + 1

    # A private key stays whole, up to a size that no key has: nothing is found of half a key.
    key = text.rfind("-----BEGIN")
    if key >= 0 and len(text) - key < 50_000 and "-----END" not in text[key:cut]:
        cut = min(cut, key)

    # A line without end is cut behind a word, or anywhere if it has none, to bound the memory.
    if not cut and len(text) > 2 * size:
        cut = max(text.rfind(" "), text.rfind(",")) + 1
    if not cut and len(text) > 4 * size:
        cut = len(text.removesuffix("\r"))
    return cut


def pieces(file, encoding="utf-8", size=PIECE_SIZE):
    """Yields (text, encoding) of a file open for reading bytes, cut behind lines.

    A piece has about `size` characters; of a line without end, up to five times as many. A byte
    order mark is a piece of its own. Where UTF-8 fails, a piece is Latin-1, in which any bytes are
    text. Raises UnicodeDecodeError for a file that began as UTF-32 and does not go on so.
    """
    # UTF-16 may hold halves of surrogate pairs. UTF-8 may not: in it, they stand for bytes that are
    # not UTF-8.
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    text = ""  # read, and not yet yielded
    at_begin = True
    ended = False
    while not ended:
        block = file.read(size)
        ended = not block
        # UTF-8 may end within a character: those bytes become halves too.
        text += decoder.decode(block, final=ended and encoding == "utf-8")
        if at_begin and text.startswith(BYTE_ORDER_MARK):
            yield BYTE_ORDER_MARK, encoding
            text = text[1:]
        at_begin = False

        # What is behind the cut waits for the next block; at the end, nothing waits.
        cut = len(text) if ended else place_to_cut(text, size)
        piece = text[:cut]
        text = text[cut:]
        # A piece is Latin-1 as a whole: text rarely changes its encoding between lines.
        if encoding == "utf-8" and ESCAPED.search(piece):
            yield piece.encode(errors="surrogateescape").decode("latin-1"), "latin-1"
        elif piece:
            yield piece, encoding

    # The last character of UTF-16 or UTF-32 may lack some of its bytes.
    half = decoder.getstate()[0]
    if half:
        yield half.decode("latin-1"), "latin-1"
