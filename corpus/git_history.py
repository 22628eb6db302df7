"""Reads the history of a git repository: how each commit changed each file.

A stranger's repository can make git run any command. Its configuration names programs that fetch
missing objects, compare files or check signatures, and it has hooks. So git never runs in it, but
in an empty repository of our own, which borrows the packs and the loose objects of the stranger's,
the name of its newest commit, and where a shallow history ends. Configuration, hooks, attributes,
references and alternates stay behind.

Left out: merges, new files, renames, and all branches but the current one. Repositories whose
references are a reftable, whose objects lie elsewhere (`git clone --shared`) or are not all there
(partial clones) are refused.
"""

import contextlib
import os
import re
import stat
import subprocess
import tempfile
from typing import NamedTuple

from corpus.languages import language_of, may_be_source
from corpus.records import LARGEST, TOO_LARGE, Damaged, Document, commit_record

COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1, or SHA-256


# ---- what is borrowed ----------------------------------------------------------------------------


def is_plain_file(path):
    """True for a file that is no link, which may lead elsewhere, and no pipe, which never ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte in the path
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def read_text(path, most=-1):
    """The first `most` characters of a plain file, without space around; "" if there is none."""
    if not is_plain_file(path):
        return ""
    with open(path, encoding="utf-8", errors="surrogateescape") as f:
        return f.read(most).strip()


def git_directories(repository):
    """The directory of a repository's HEAD, and that of its objects and references.

    They differ in a linked work tree, whose `.git` is a file that names the first.
    """
    own = os.path.join(repository, ".git")
    if not os.path.lexists(own):
        own = repository  # bare
    if not os.path.isfile(own):
        return own, os.path.realpath(own)
    own = os.path.join(repository, read_text(own, 5000).removeprefix("gitdir:").strip())
    shared = os.path.join(own, read_text(os.path.join(own, "commondir"), 5000))
    return own, os.path.realpath(shared)


def head_commit(own, shared):
    """The name of the commit that HEAD stands for. Raises Damaged if there is none.

    own, shared: the `git_directories`.
    """
    text = read_text(os.path.join(own, "HEAD"), 5000)
    for _ in range(5):  # a reference may stand for another, and two for each other
        reference = text.removeprefix("ref:").strip()
        if COMMIT.fullmatch(reference):
            return reference
        if not reference.startswith("refs/") or ".." in reference:
            break
        text = read_text(os.path.join(shared, reference), 5000)
        if not text:
            packed = read_text(os.path.join(shared, "packed-refs")).split("\n")
            lines = [line.partition(" ") for line in packed]
            text = next((commit for commit, _, name in lines if name == reference), "")
    if os.path.isdir(os.path.join(shared, "reftable")):
        raise Damaged("its references are a reftable, which is not read here")
    raise Damaged("its HEAD stands for no commit")


def borrow(repository, bare):
    """Makes the empty directory `bare` a git repository with the history of another.

    Raises Damaged if that has no commit, or names files elsewhere.
    """
    own, shared = git_directories(repository)
    objects = os.path.join(shared, "objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise Damaged("its objects lie in another repository, as after git clone --shared")

    head = head_commit(own, shared)
    shallow = read_text(os.path.join(shared, "shallow")).split("\n")
    is_sha1 = len(head) == 40
    files = {
        "HEAD": head,
        "config": f"[core]\nbare = true\nrepositoryformatversion = {0 if is_sha1 else 1}\n"
        + ("" if is_sha1 else "[extensions]\nobjectFormat = sha256\n"),
        "shallow": "\n".join(line for line in shallow if COMMIT.fullmatch(line)),
    }
    for name, text in files.items():
        with open(os.path.join(bare, name), "w") as f:
            f.write(text)
    os.makedirs(os.path.join(bare, "refs"))
    os.makedirs(os.path.join(bare, "objects", "pack"))

    # Links to the files, not to the folder `pack`: it may hold more than packs and their indexes.
    for folder in os.listdir(objects):
        if not re.fullmatch("pack|[0-9a-f]{2}", folder):
            continue
        path = os.path.join(objects, folder)
        check_objects(objects, folder)
        if folder != "pack":
            os.symlink(path, os.path.join(bare, "objects", folder))
            continue
        for name in os.listdir(path):
            if name.endswith((".pack", ".idx")):
                os.symlink(os.path.join(path, name), os.path.join(bare, "objects", folder, name))


def check_objects(objects, folder):
    """Raises Damaged if a folder of objects leads elsewhere, or holds other than plain files."""
    path = os.path.join(objects, folder)
    if os.path.islink(objects) or os.path.islink(path):
        raise Damaged(f"objects/{folder} is a link")
    for name in os.listdir(path):
        read_by_git = folder != "pack" or name.endswith((".pack", ".idx"))
        if read_by_git and not is_plain_file(os.path.join(path, name)):
            raise Damaged(f"objects/{folder}/{name} is not a plain file")


# ---- what git is asked ---------------------------------------------------------------------------


@contextlib.contextmanager
def git(bare, *arguments, **pipes):
    """Runs git in a repository of our own, without the user's configuration and variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_DIR": bare,
        "HOME": bare,
        "XDG_CONFIG_HOME": bare,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        # Nothing should make it fetch; if something does, it fails.
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_TERMINAL_PROMPT": "0",
    }
    pipes["stdout"] = subprocess.PIPE
    with subprocess.Popen(["git", *arguments], cwd=bare, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


class Blobs:
    """Gives the content of files in a history.

    One process is asked for an object's size, and the other for its content, if that is not too
    large: a packed blob may be a thousand times larger than its pack.
    """

    def __init__(self, sizes, contents, largest):
        self.sizes = sizes
        self.contents = contents
        self.largest = largest

    def read(self, name):
        """The bytes of a file, or None if it is too large."""
        kind, size = self._ask(self.sizes, name)
        if kind != b"blob" or size > self.largest:
            return None
        self._ask(self.contents, name)
        return self.contents.stdout.read(size + 1)[:-1]  # a newline follows

    def _ask(self, process, name):
        process.stdin.write(name + b"\n")
        process.stdin.flush()
        words = process.stdout.readline().split()
        if len(words) != 3:
            raise Damaged(f"git has no object {name.decode()}; a partial clone lacks some")
        return words[1], int(words[2])


class Change(NamedTuple):
    """How a commit changed a file."""

    subject: str
    path: str
    is_file: bool  # before and after; not a link or a submodule
    old: bytes  # the names of the two blobs
    new: bytes


LOG = """log --no-merges --no-show-signature --encoding=UTF-8 --raw --no-abbrev --no-renames
--diff-filter=M -z --format=%x01%s HEAD""".split()


def changes(stream):
    """Yields the `Change`s that `git log` writes with the arguments above.

    A commit is \\1 and its subject; each of its changes is ":mode mode old new M", and then the path.
    NUL bytes stand between them.
    """
    subject = ""
    fields = nul_separated(stream)
    for field in fields:
        field = field.lstrip(b"\n")
        if field.startswith(b"\1"):
            subject = field[1:].decode(errors="replace")
        elif field.startswith(b":"):
            old_mode, new_mode, old, new, _ = field.split()
            path = next(fields, b"").decode(errors="replace")
            is_file = old_mode.startswith(b":100") and new_mode.startswith(b"100")
            yield Change(subject, path, is_file, old, new)


def nul_separated(stream):
    """Yields what lies between the NUL bytes of a stream."""
    rest = b""
    while block := stream.read1(1 << 16):
        *fields, rest = (rest + block).split(b"\0")
        yield from fields
        if len(rest) > LARGEST:
            raise Damaged(f"the subject of a commit is {TOO_LARGE}")
    if rest:
        yield rest


def read_commits(source, skipped, progress, largest=LARGEST):
    """The records of a repository's commits, the newest first (see `sources.readers`).

    largest: bytes of a file; a change of a larger one is counted.
    """
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with (
        tempfile.TemporaryDirectory() as bare,
        tempfile.TemporaryFile() as said,  # a pipe that is full would stop git
        contextlib.ExitStack() as processes,
    ):
        borrow(source, bare)
        log = processes.enter_context(git(bare, *LOG, stderr=said))
        sizes = processes.enter_context(git(bare, "cat-file", "--batch-check", **pipes))
        contents = processes.enter_context(git(bare, "cat-file", "--batch", **pipes))
        blobs = Blobs(sizes, contents, largest)

        for change in changes(log.stdout):
            document = document_of_change(change, blobs, skipped)
            if document:
                yield document

        if log.wait():
            said.seek(0)
            raise Damaged(said.read(1000).decode(errors="replace").strip().split("\n")[0])


def document_of_change(change, blobs, skipped):
    """The `Document` of a `Change`, or None; then the reason is counted in `skipped`."""
    if not change.is_file or not may_be_source(change.path):
        skipped["no known extension"] += 1
        return None
    old = blobs.read(change.old)
    new = blobs.read(change.new)
    if old is None or new is None:
        skipped[TOO_LARGE] += 1
        return None
    language = language_of(change.path, new)
    if language is None:
        skipped["no known extension"] += 1
        return None
    try:
        record = commit_record(old.decode(), new.decode(), change.subject, language, skipped)
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None
    return record and Document("git-commits", record)
