"""Any file as text, in pieces: any encoding, any size, any line; binary files are left out.

    for text, encoding in pieces(file, encoding_of(file)):
        ...                       # text.encode(encoding, "surrogatepass") are the bytes of the file

A repository holds files of a gigabyte on one line, UTF-16 without a byte order mark, and Latin-1
between two lines of UTF-8. Each is read once, in memory for a few pieces, and each piece gives back
the bytes that it came from, so that redaction changes nothing else.
"""

import codecs
import os
import re
import unicodedata

PIECE_SIZE = 1_000_000  # bytes that are read at once

LINE_END = re.compile(r"\r\n?|\n")  # as in editors and in Python's `open`

SKIPPED_DIRECTORIES = {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv"}

# Byte order marks. UTF-32's comes first: one of them begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def files_of(paths, skipped):
    """[(path, path below its root), ...] of files and of those in directories, sorted.

    What is left out is counted in `skipped`. Raises ValueError for a path that is missing, and for
    a file named in `paths` that cannot be read.
    """
    found = []

    def unreadable(error):
        skipped["unreadable"] += 1

    for root in paths:
        if os.path.isfile(root):
            if not os.access(root, os.R_OK):
                raise ValueError(f"{root}: may not be read")
            found.append((root, os.path.basename(root)))
            continue
        if not os.path.isdir(root):
            raise ValueError(f"{root}: no such file or directory")

        for folder, folders, names in os.walk(root, onerror=unreadable):
            kept = sorted(set(folders) - SKIPPED_DIRECTORIES)
            if len(kept) < len(folders):
                left_out = len(folders) - len(kept)
                skipped["directories as .git, venv or node_modules"] += left_out
            folders[:] = kept  # os.walk goes into these
            for name in sorted(names):
                path = os.path.join(folder, name)
                # A link names a file that is read where it lies, or one outside of the root.
                if os.path.isfile(path) and not os.path.islink(path):
                    found.append((path, os.path.relpath(path, root)))
                else:
                    skipped["not a file"] += 1
    return found


def is_plain(text):
    """True if most characters are ASCII, and none is a control, private or unknown."""
    for c in set(text):
        if unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and not c.isspace():
            return False
    return 2 * sum(c.isascii() for c in text) > len(text)


def encoding_of(file):
    """The encoding of a file open for reading bytes, by its first 8 KiB; None if it holds no text.

    Text has no NUL. UTF-16 and UTF-32 have a byte order mark, or spell plain text if read as such.
    All else is "utf-8": `pieces` sees to what is not.
    """
    head = file.read(8192)
    file.seek(0)
    marked = [encoding for mark, encoding in MARKS.items() if head.startswith(mark)][:1]
    if not marked and b"\0" not in head:
        return "utf-8"

    for encoding in marked or MARKS.values():
        try:
            # An incremental decoder does not mind that the head may end within a character.
            text = codecs.getincrementaldecoder(encoding)("surrogatepass").decode(head)
        except UnicodeDecodeError:
            continue
        if "\0" not in text and (marked or text and is_plain(text)):
            return encoding
    return None


def readable_encoding(path, skipped):
    """The encoding of the file at `path`; None, and counted in `skipped`, if there is no text."""
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file)
            empty = not file.peek(1)
    except OSError:
        skipped["unreadable"] += 1
        return None
    if empty:
        skipped["empty"] += 1
        return None
    if encoding is None:
        skipped["binary"] += 1
    return encoding


def place_to_cut(text, size):
    """How many characters of a text, of which more is to come, are a piece; 0 to wait for more."""
    # Behind the last line. A \r at the end does not count yet: it may be half of a \r\n.
    cut = text.rfind("\n") + 1 or text.rfind("\r", 0, -1) + 1

    # A private key stays whole, if it is one: nothing is found of half a key.
    key = text.rfind("-----BEGIN")
    if key >= 0 and len(text) - key < 50_000 and "-----END" not in text[key:]:
        cut = min(cut, key)

    # A line without end is cut behind a word, or in the end anywhere.
    if not cut and len(text) > 2 * size:
        cut = max(text.rfind(" "), text.rfind(",")) + 1
    if not cut and len(text) > 4 * size:
        cut = len(text.removesuffix("\r"))
    return cut


def pieces(file, encoding="utf-8", size=PIECE_SIZE):
    """Yields (text, encoding) of a file open for reading bytes, cut behind lines.

    A piece has about `size` characters, of a line without end up to five times as many. All pieces,
    each encoded in its encoding with "surrogatepass", are the bytes of the file. A byte order mark
    is a piece of its own. A piece that is not UTF-8 is Latin-1, in which any bytes are text.

    Raises UnicodeDecodeError for a file that began as UTF-32 and does not go on so.
    """
    # Bytes that are not UTF-8 become halves of surrogate pairs, which UTF-8 cannot hold. UTF-16 may
    # hold them itself.
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    text = ""
    at_begin = True
    ended = False
    while not ended:
        block = file.read(size)
        ended = not block
        text += decoder.decode(block, final=ended and encoding == "utf-8")
        if at_begin and text.startswith("\ufeff"):
            yield "\ufeff", encoding
            text = text[1:]
        at_begin = False

        cut = len(text) if ended else place_to_cut(text, size)
        if cut:
            piece = text[:cut]
            yield utf8_or_latin1(piece) if encoding == "utf-8" else (piece, encoding)
        text = text[cut:]

    # The last character of UTF-16 or UTF-32 may lack some of its bytes.
    half = decoder.getstate()[0]
    if half:
        yield half.decode("latin-1"), "latin-1"


def utf8_or_latin1(text):
    """(text, its encoding) of a piece that was decoded as UTF-8 with "surrogateescape"."""
    try:
        text.encode()
        return text, "utf-8"
    except UnicodeEncodeError:
        return text.encode(errors="surrogateescape").decode("latin-1"), "latin-1"


def texts_of(path, skipped, size=PIECE_SIZE):
    """Yields the pieces of a file's text, without its byte order mark.

    A file that cannot be read, wholly or in part, is counted in `skipped`.
    """
    encoding = readable_encoding(path, skipped)
    if encoding is None:
        return
    try:
        with open(path, "rb") as file:
            for text, _ in pieces(file, encoding, size):
                if text != "\ufeff":
                    yield text
    except (OSError, UnicodeDecodeError):
        skipped["unreadable"] += 1


def line_starts(text):
    """[0, ...]: where the lines of a text begin."""
    return [0] + [end.end() for end in LINE_END.finditer(text)]
