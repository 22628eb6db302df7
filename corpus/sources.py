"""What a corpus is made of, read one document at a time.

    a directory              source files, by languages.txt, and Jupyter notebooks; on request, the
                             history of the git repositories in it
    .tar .tar.gz .zip ...    the same files in an archive (archives.py)
    .parquet .jsonl ...      The Stack's files, commits and issues (tables.py)

Memory does not grow with a source, but for the names in a .zip. Documents over LARGEST are left out;
what is left out is counted, by reason.

Reference: Kocetkov et al., The Stack, 2022.
"""

import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from corpus.archives import read_tar, read_zip
from corpus.git_history import read_commits
from corpus.languages import SKIPPED_DIRECTORIES, may_be_source
from corpus.records import LARGEST, TOO_LARGE, file_document, may_be_document
from corpus.tables import read_jsonl, read_parquet


def walk(directory, unreadable=None):
    """(folder, its folders, its files) as of os.walk, sorted; no links or SKIPPED_DIRECTORIES.

    Only one level of os.walk at a time: Python 3.11's calls itself, and a stranger's folders may lie
    a thousand deep. unreadable: is called with the error of a folder that cannot be read.
    """
    waiting = [directory]
    while waiting:
        level = next(os.walk(waiting.pop(), onerror=unreadable), None)
        if level is None:
            continue
        folder, folders, names = level
        folders.sort()
        yield folder, folders, sorted(names)
        for name in reversed(folders):
            inner = os.path.join(folder, name)
            if name not in SKIPPED_DIRECTORIES and not os.path.islink(inner):
                waiting.append(inner)


def files_in(directory, skipped):
    """The paths of all files in a directory. Unreadable folders and links to folders are counted."""

    def unreadable(error):
        skipped["unreadable"] += 1

    for folder, folders, names in walk(directory, unreadable):
        paths = [os.path.join(folder, name) for name in folders]
        skipped.update("not a file" for path in paths if os.path.islink(path))
        for name in names:
            yield os.path.join(folder, name)


def size_of(path):
    """Bytes of a file that may be a source; 0 for any other, and for one that is gone by now."""
    try:
        return os.path.getsize(path) if may_be_source(path) and os.path.isfile(path) else 0
    except OSError:
        return 0


def read_directory(source, skipped, progress):
    """The documents of the files in a directory (see `readers`)."""
    for path in files_in(source, skipped):
        # isfile is false for links to nothing or to themselves, and for pipes, which never end.
        if not may_be_document(path, os.path.isfile(path), 0, skipped):
            continue
        try:
            with open(path, "rb") as f:
                content = f.read(LARGEST + 1)
        except OSError:
            skipped["unreadable"] += 1
            continue
        progress(len(content))
        if len(content) > LARGEST:
            skipped[TOO_LARGE] += 1
            continue
        document = file_document(path, content, skipped)
        if document:
            yield document


READERS = {
    read_tar: (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
    read_zip: (".zip", ".whl"),
    read_parquet: (".parquet",),
    read_jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
}
TABLES = READERS[read_parquet] + READERS[read_jsonl]
KINDS = "a directory, .tar(.gz, .xz, .bz2), .zip, .parquet or .jsonl(.gz, .zst)"


class Source(NamedTuple):
    """A source, and how to read it."""

    path: str
    reader: Callable  # a generator of `Document`; arguments: path, and two of those of `read`
    size: int  # bytes on disk, of which the reader tells its progress


def repositories(directory):
    """The paths of the git repositories in a directory, which may be one itself; also bare ones.

    Repositories inside a repository are its project's files, and not entered. A `.git` that leads
    elsewhere, as a file or a link, counts only in the directory that the user named: a stranger's
    might lead to a private one.
    """
    for folder, folders, names in walk(directory):
        path = os.path.join(folder, ".git")
        is_named = folder == directory and os.path.lexists(path)
        is_plain = os.path.isdir(path) and not os.path.islink(path)
        is_bare = {"objects", "refs"}.issubset(folders) and "HEAD" in names
        if is_named or is_plain or is_bare:
            yield folder
            folders.clear()


def readers(source, commits=False):
    """[`Source`, ...] of a path. commits: also the histories of the git repositories in it.

    Raises ValueError if it is missing or of an unknown kind, OSError if it cannot be read.
    """
    if os.path.isdir(source):
        os.scandir(source).close()  # raises; a folder inside that cannot be read is only counted
        if commits and not shutil.which("git"):
            raise ValueError("--commits: needs the git program")
        size = sum(map(size_of, files_in(source, Counter())))
        histories = repositories(source) if commits else []
        return [
            Source(source, read_directory, size),
            *(Source(path, read_commits, 0) for path in histories),
        ]
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or directory")
    for reader, endings in READERS.items():
        if source.endswith(endings):
            return [Source(source, reader, os.path.getsize(source))]
    raise ValueError(f"{source}: not a source; give {KINDS}")


# What the readers raise for a damaged file, besides pyarrow's error and OSError. The last three come
# from numbers in headers that cannot be.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    NotImplementedError,
    EOFError,
    lzma.LZMAError,
    zlib.error,
    ValueError,
    OverflowError,
    RecursionError,
)


def read(source, reader, skipped, progress):
    """The documents of one of the `readers` of a source.

    skipped: a Counter; what is left out is added to it, by reason. progress: is called with a
    number of bytes, read since the last call, or, with absolute=True, read so far.
    Raises ValueError if the source is damaged or cannot be read.
    """
    import pyarrow

    try:
        yield from reader(source, skipped, progress)
    except (OSError, pyarrow.ArrowException, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
        words = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source}: damaged ({words}); fetch it again") from None
