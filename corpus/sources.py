"""TODO."""

import contextlib
import itertools
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib

from corpus.archives import read_tar, read_zip
from corpus.git_history import read_commits
from corpus.languages import SKIPPED_DIRECTORIES, may_be_source
from corpus.records import LARGEST, TOO_LARGE, file_document
from corpus.tables import read_jsonl, read_parquet


def walk(directory, unreadable=None):
    """(folder, its folders, its files) as of os.walk, sorted; no links or SKIPPED_DIRECTORIES.

    One level of os.walk at a time: Python 3.11's calls itself, and fails a thousand folders deep.
    unreadable: called with the error of a folder that cannot be read.
    """
    waiting = [directory]
    while waiting:
        level = os.walk(waiting.pop(), onerror=unreadable)
        for folder, folders, names in itertools.islice(level, 1):
            folders.sort()
            yield folder, folders, sorted(names)
            entered = [name for name in folders if name not in SKIPPED_DIRECTORIES]
            inner = [os.path.join(folder, name) for name in reversed(entered)]
            waiting += [path for path in inner if not os.path.islink(path)]


def files_in(directory, skipped=None):
    def unreadable(error):
        if skipped is not None:
            skipped["unreadable"] += 1

    for folder, folders, names in walk(directory, unreadable):
        if skipped is not None and (
            links := sum(os.path.islink(os.path.join(folder, f)) for f in folders)
        ):
            skipped["not a file"] += links  # they are not followed
        for name in names:
            yield os.path.join(folder, name)


def size_of(path):
    """Bytes of a file that may be a source; 0 of what is none, or is gone by now."""
    with contextlib.suppress(OSError):
        if may_be_source(path) and os.path.isfile(path):
            return os.path.getsize(path)
    return 0


def read_directory(source, skipped, progress):
    for path in files_in(source, skipped):
        if not os.path.isfile(
            path
        ):  # a link to nothing or to itself, a pipe: reading it would fail or never end
            skipped["not a file"] += 1
        elif not may_be_source(path):
            skipped["no known extension"] += 1
        else:
            try:
                with open(path, "rb") as f:
                    content = f.read(LARGEST + 1)
            except OSError:
                skipped["unreadable"] += 1
                continue
            progress(len(content))
            if len(content) > LARGEST:
                skipped[TOO_LARGE] += 1
            elif document := file_document(path, content, skipped):
                yield document


READERS = {
    read_tar: (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
    read_zip: (".zip", ".whl"),
    read_parquet: (".parquet",),
    read_jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
}


TABLES = READERS[read_parquet] + READERS[read_jsonl]


KINDS = "a directory, .tar(.gz, .xz, .bz2), .zip, .parquet or .jsonl(.gz, .zst)"


def _repositories(directory):
    """The git repositories in a directory, which may be one itself: with a work tree, or bare.

    Those inside a repository are its project's files, and not entered. Nor is a `.git` that leads
    elsewhere, a file or a link, but for that of the directory itself, which the user named.
    """
    for folder, folders, names in walk(directory):
        git = os.path.join(folder, ".git")
        named = folder == directory and os.path.lexists(git)
        plain = os.path.isdir(git) and not os.path.islink(git)
        bare = {"objects", "refs"} <= {*folders} and "HEAD" in names
        if named or plain or bare:
            yield folder
            folders.clear()


def readers(source, commits=False):
    """[(path, reader, bytes on disk), ...] of a source.

    Raises ValueError for one that is missing or of an unknown kind, OSError for one that cannot be
    read.

    A reader is a generator of `Document`; its arguments are the path, a Counter of what is left out, by reason, and a function that is
    told of progress in bytes. commits: the histories of the git repositories in a directory, too.
    """
    if os.path.isdir(source):
        os.scandir(source).close()  # a folder inside that cannot be read is counted; not this one
        size = sum(map(size_of, files_in(source)))
        if commits and not shutil.which("git"):
            raise ValueError("--commits: needs the git program")
        return [(source, read_directory, size)] + [
            (path, read_commits, 0) for path in (_repositories(source) if commits else [])
        ]
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or directory")
    for reader, endings in READERS.items():
        if source.endswith(endings):
            return [(source, reader, os.path.getsize(source))]
    raise ValueError(f"{source}: not a source; give {KINDS}")


def read(source, reader, skipped, progress):
    """The documents of a source by one of its `readers`. Raises ValueError for a damaged one."""
    import pyarrow

    archives = (
        tarfile.TarError,
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        lzma.LZMAError,
        zlib.error,
    )
    numbers = (ValueError, OverflowError, RecursionError)  # of a header that claims the impossible
    try:
        yield from reader(source, skipped, progress)
    except (OSError, pyarrow.ArrowException, *archives, *numbers) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
        words = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source}: damaged ({words}); fetch it again") from None
