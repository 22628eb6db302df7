"""What a corpus is made of, read one document at a time.

    a directory             source files, by languages.txt, and Jupyter notebooks; on request, the
                            history of the git repositories in it
    .tar .tar.gz .zip ...   the same files in an archive (archives.py)
    .parquet .jsonl ...     The Stack's files, commits and issues; notebooks (tables.py)

Archives and tables may lie anywhere that fsspec reads: `s3://...`, `hf://...`, with wildcards.

Memory does not grow with a source, but for the names in a .zip. A document over LARGEST is left
out; whatever is left out is counted, by reason.

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
from itertools import islice
from typing import NamedTuple

from common.command_line import first_line
from corpus.archives import read_tar, read_zip
from corpus.git_history import read_commits
from corpus.languages import SKIPPED_DIRECTORIES, may_be_source
from corpus.records import LARGEST, SOURCE_FILES, TOO_LARGE
from corpus.remote import is_remote, remote_files
from corpus.tables import read_jsonl, read_parquet

# ---- directories ---------------------------------------------------------------------------------


def walk(directory, unreadable=None):
    """Yields (folder, its folders, its files), sorted, of a directory and of all folders in it.

    unreadable: is called with the error of a folder that cannot be read.
    """
    # Not entered: links, SKIPPED_DIRECTORIES, and what the caller removes from the folders.
    waiting = [directory]
    while waiting:
        # Only one level of os.walk at a time: Python 3.11's calls itself for the next, and a
        # stranger's folders may lie a thousand deep.
        for folder, folders, names in islice(os.walk(waiting.pop(), onerror=unreadable), 1):
            folders.sort()  # the same order on every machine
            yield folder, folders, sorted(names)
            inner = [os.path.join(folder, n) for n in folders if n not in SKIPPED_DIRECTORIES]
            waiting += [path for path in reversed(inner) if not os.path.islink(path)]


def files_in(directory, skipped):
    """Yields the paths of all files in a directory; folders that are not entered are counted."""

    def unreadable(error):
        skipped["unreadable"] += 1

    for folder, folders, names in walk(directory, unreadable):
        # A link may lead to a folder above, or out of the source.
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        skipped.update(["not a file"] * len(links))
        for name in names:
            yield os.path.join(folder, name)


def read_directory(source, skipped, progress, choice=SOURCE_FILES):
    """The documents of the files in a directory; a reader (see `Source`)."""
    for path in files_in(source, skipped):
        # A link to nothing or to itself is no file. Nor is a pipe: reading it would never end.
        if not choice.may_be(path, os.path.isfile(path), 0, skipped):
            continue
        try:
            with open(path, "rb") as f:
                content = f.read(LARGEST + 1)  # it may have grown, or have no size, as in /proc
        except OSError:  # it is gone, or private, or the disk is bad
            skipped["unreadable"] += 1
            continue
        progress(len(content))
        if len(content) > LARGEST:
            skipped[TOO_LARGE] += 1
        elif document := choice.made_of(path, content, skipped):
            yield document


def size_of(path):
    """Bytes of a file that may be a source, and 0 of any other."""
    # It may be gone since it was listed.
    try:
        return os.path.getsize(path) if may_be_source(path) and os.path.isfile(path) else 0
    except OSError:
        return 0


def repositories(directory):
    """Yields the git repositories in a directory, bare ones too; it may be one itself."""
    for folder, folders, names in walk(directory):
        path = os.path.join(folder, ".git")
        # A `.git` that is a link or a file leads to another directory. The user may name one that
        # does; a stranger's might lead to what is private.
        is_named = folder == directory and os.path.lexists(path)  # by the user
        is_plain = os.path.isdir(path) and not os.path.islink(path)
        # A bare repository is what would be in `.git`.
        is_bare = {"objects", "refs"}.issubset(folders) and "HEAD" in names
        if is_named or is_plain or is_bare:
            yield folder
            # Repositories inside a repository are its project's files: do not enter.
            folders.clear()


# ---- any source ----------------------------------------------------------------------------------

# The endings that tell what reads a file.
READERS = {
    read_tar: (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
    read_zip: (".zip", ".whl"),
    read_parquet: (".parquet",),
    read_jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
}
# Their records may name languages that are not in languages.txt.
TABLES = READERS[read_parquet] + READERS[read_jsonl]
KINDS = "a directory, .tar(.gz, .xz, .bz2), .zip, .parquet or .jsonl(.gz, .zst)"

# What a reader raises for a damaged file, besides OSError and pyarrow's errors.
BAD_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError)
BAD_PACKING = (EOFError, lzma.LZMAError, zlib.error)
BAD_NUMBER = (ValueError, OverflowError, RecursionError)  # a header claims what cannot be
# What clients of storage services raise without a number.
UNREADABLE = (FileNotFoundError, PermissionError, ConnectionError, TimeoutError)


class Source(NamedTuple):
    """A source, and how to read it."""

    path: str
    # Called with (path, skipped, progress), as `read` is; yields documents.
    reader: Callable
    size: int  # bytes on disk; 0 for a history

    @property
    def name(self):
        """The path, and for a history that it is one."""
        return f"{self.path} (commits)" if self.reader is read_commits else self.path


def readers(source, commits=False):
    """[`Source`, ...] of a path. commits: the histories of the git repositories in it, too.

    Raises ValueError if it is missing or of an unknown kind, OSError if it cannot be read.
    """
    if os.path.isdir(source):
        os.scandir(source).close()  # raises; a folder inside that cannot be read is only counted
        if commits and not shutil.which("git"):
            raise ValueError("--commits: needs the git program")
        # The Counter is dropped: files that are left out are counted when they are read.
        size = sum(map(size_of, files_in(source, Counter())))
        found = repositories(source) if commits else []
        histories = [Source(path, read_commits, 0) for path in found]
        return [Source(source, read_directory, size), *histories]
    if is_remote(source):
        return [Source(path, reader_of(path), size) for path, size in remote_files(source)]
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or directory")
    return [Source(source, reader_of(source), os.path.getsize(source))]


def reader_of(path):
    """What reads a file, by its name. Raises ValueError if it is of an unknown kind."""
    for reader, endings in READERS.items():
        if path.endswith(endings):
            return reader
    raise ValueError(f"{path}: not a source; give {KINDS}")


def no_progress(n, absolute=False):
    """The `progress` of a reader that nobody watches."""


def read(source, reader, skipped, progress=no_progress):
    """Yields each `Document` of a source, by one of its `readers`.

    skipped: a Counter, to which is added what is left out, by reason.
    progress: is called with bytes read since the last call, or, with absolute=True, in all.
    Raises ValueError if the source is damaged or cannot be read.
    """
    try:
        yield from reader(source, skipped, progress)
    except ImportError as error:
        raise ValueError(f"{source}: needs the {error.name} package (pip install it)") from None
    except (OSError, *BAD_ARCHIVE, *BAD_PACKING, *BAD_NUMBER) as error:
        # Any other OSError without a number is a damaged file, as gzip and pyarrow say it.
        if isinstance(error, UNREADABLE) or getattr(error, "errno", None):
            words = getattr(error, "strerror", None) or first_line(error)
            raise ValueError(f"{source}: cannot be read ({words})") from None
        # The first line of the error; some have no words.
        words = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source}: damaged ({words}); fetch it again") from None
    except Exception as error:  # of a storage service's client, which may be any
        if is_remote(source):
            raise ValueError(f"{source}: cannot be read ({first_line(error)})") from None
        raise
