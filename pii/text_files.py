"""TODO."""

import codecs
import os
import unicodedata

from pii.rules import LINE_END

SEGMENT, GATHER = (
    1_000_000,
    200_000,
)  # bytes of a long file that are read at once; of small files that the model sees at once


SKIPPED_DIRECTORIES = {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv"}


# Byte order marks. UTF-32's comes first: one of them begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def is_plain(text):
    """Whether most characters are ASCII, and none is a control, private or unknown."""
    for c in set(text):
        if unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and not c.isspace():
            return False
    return 2 * sum(c.isascii() for c in text) > len(text)


def encoding_of(file):
    """The encoding of a file open for reading bytes, by its beginning; None where it holds no text.

    Text has no NUL. UTF-16 and UTF-32 have a byte order mark, or spell plain text if read as such.
    All else is "utf-8", see `segments`.
    """
    head = file.read(8192)
    file.seek(0)
    marked = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)
    if not marked and b"\0" not in head:
        return "utf-8"
    for encoding in [marked] if marked else MARKS.values():
        try:  # incrementally, as the head may end within a character
            text = codecs.getincrementaldecoder(encoding)("surrogatepass").decode(head)
        except UnicodeDecodeError:
            continue
        if "\0" not in text and (marked or text and is_plain(text)):
            return encoding
    return None


def segments(file, encoding="utf-8"):
    """The text of a file open for reading bytes, in pieces of about SEGMENT bytes that end with a line: yields (text, encoding).

    The pieces joined and encoded, with "surrogatepass", are the file's bytes. A byte order mark is
    a piece of its own: no part of what is found. Where UTF-8 fails, a piece is Latin-1, in which
    any bytes are text; UTF-16 may hold half pairs, and end within a character. Raises
    UnicodeDecodeError for what is no UTF-32.
    """
    decoder = None
    if encoding != "utf-8":
        decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    rest = b""
    at_begin = True
    while True:
        block = file.read(SEGMENT)
        ended = not block
        if decoder:  # cut as UTF-8
            block = decoder.decode(block).encode("utf-8", "surrogatepass")
        content = rest + block
        if at_begin and content.startswith(codecs.BOM_UTF8):
            yield "\ufeff", encoding
            content = content.removeprefix(codecs.BOM_UTF8)
        at_begin = False
        if ended and not content:
            break
        # Without \n, behind a \r; but not the one that ends the block: it may be half of a \r\n.
        cut = content.rfind(b"\n") + 1 or content.rfind(b"\r", 0, -1) + 1
        if ended:
            cut = len(content)
        begin = content.rfind(b"-----BEGIN")  # of a key, which stays whole
        open_key = begin >= 0 and b"-----END" not in content[begin:]
        if not ended and open_key and len(content) - begin < 50_000:
            cut = min(cut, begin)
        if not cut:  # a line without end: where a word ends, or else where a character does
            cut = (
                max(content.rfind(b" "), content.rfind(b",")) + 1
                if len(content) > 2 * SEGMENT
                else 0
            )
            if not cut and len(content) > 4 * SEGMENT:
                cut = len(content.removesuffix(b"\r"))
                while cut > len(content) - 3 and content[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut -= content[cut - 1] >= 0xC0
        piece, rest = content[:cut], content[cut:]
        if not piece:
            continue
        try:
            yield piece.decode("utf-8", "surrogatepass" if decoder else "strict"), encoding
        except UnicodeDecodeError:
            yield piece.decode("latin-1"), "latin-1"
    if decoder and decoder.getstate()[0]:
        yield decoder.getstate()[0].decode("latin-1"), "latin-1"


def files_of(paths, skipped):
    """[(path, path below its root), ...] of files and of those in directories, sorted.

    Raises ValueError for a path that is missing, and for a file named in `paths` that cannot be read: others are counted in `skipped`.
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
            if left := [f for f in folders if f in SKIPPED_DIRECTORIES]:
                skipped["directories as .git, venv or node_modules"] += len(left)
            folders[:] = sorted(f for f in folders if f not in SKIPPED_DIRECTORIES)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    found.append((path, os.path.relpath(path, root)))
                else:
                    skipped["not a file"] += 1
    return found


def open_text(path, skipped):
    """(a file, open for reading bytes; its encoding); None, and counted, where there is no text."""
    try:
        file = open(path, "rb")
        encoding = encoding_of(file)
        empty = not file.peek(1)
    except OSError:
        skipped["unreadable"] += 1
        return None
    if encoding and not empty:
        return file, encoding
    skipped["empty" if empty else "binary"] += 1
    file.close()
    return None


def texts_of(path, skipped):
    """Yields the pieces of a file's text without its byte order mark.

    A file that cannot be read, wholly or in part, is counted in `skipped`.
    """
    opened = open_text(path, skipped)
    if opened is None:
        return
    file, encoding = opened
    with file:
        try:
            for text, _ in segments(file, encoding):
                if text != "\ufeff":
                    yield text
        except (OSError, UnicodeDecodeError):
            skipped["unreadable"] += 1


def size_of(path):
    """The bytes of a file; 0 where another program has removed it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def line_starts(text):
    """Where lines begin. One ends with \\n, \\r\\n or \\r, as in editors and in Python's `open`."""
    return [0] + [end.end() for end in LINE_END.finditer(text)]
