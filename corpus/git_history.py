"""Reads the history of a git repository: how each commit changed each file.

A stranger's repository can make git run any program: its configuration names some that fetch
missing objects, compare files or check signatures, and it has hooks. So git never runs there. It
runs in an empty repository of our own, which borrows the packs and loose objects of the stranger's,
the name of its newest commit, and where its history ends if it is shallow. Configuration, hooks,
attributes, references and alternates stay behind.

Left out: merges, new files, renames, and branches other than the current one. Refused: repositories
whose references are a reftable, whose objects lie in another (`git clone --shared`), or of which
some are missing (partial clones).
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

# ---- what is borrowed ----------------------------------------------------------------------------

COMMIT = "[0-9a-f]{64}|[0-9a-f]{40}"  # the name of one: a SHA-256, or a SHA-1
LONGEST_TEXT = 100_000_000  # characters; a million references take 60 MB


def is_plain_file(path):
    """True for a file that is no link, which may lead anywhere, and no pipe, which never ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte in the path
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def read_text(*path):
    """What is in a small file of git's; "" if it is not a plain file. path: its parts."""
    if not is_plain_file(os.path.join(*path)):
        return ""
    with open(os.path.join(*path), encoding="utf-8", errors="surrogateescape") as f:
        return f.read(LONGEST_TEXT).strip()


def git_directories(repository):
    """The directory of a repository's HEAD, and that of its objects and references."""
    # They differ in a linked work tree. There, as in a submodule, `.git` is a file with the path of
    # the first, and a file in that has the path of the second.
    own = os.path.join(repository, ".git")
    if not os.path.lexists(own):
        own = repository  # a bare one
    shared = own
    if os.path.isfile(own):
        own = os.path.join(repository, read_text(own).removeprefix("gitdir:").strip())
        shared = os.path.join(own, read_text(own, "commondir"))
    return own, os.path.realpath(shared)


def head_commit(own, shared):
    """The name of the commit that HEAD stands for. Raises Damaged if there is none."""
    head = read_text(own, "HEAD").removeprefix("ref:").strip()
    # A branch is a file, or after `git pack-refs` a line. ".." would lead out of the repository.
    if head.startswith("refs/") and ".." not in head:
        line = rf"^({COMMIT}) {re.escape(head)}$"
        packed = re.search(line, read_text(shared, "packed-refs"), re.MULTILINE)
        head = read_text(shared, head) or (packed[1] if packed else "")
    if re.fullmatch(COMMIT, head):
        return head
    if os.path.isdir(os.path.join(shared, "reftable")):
        raise Damaged("its references are a reftable, which is not read here")
    raise Damaged("its HEAD stands for no commit")


def borrow(repository, bare):
    """Makes the empty directory `bare` a git repository with the history of another.

    Raises Damaged if that has no commit, or files that lie elsewhere.
    """
    own, shared = git_directories(repository)
    objects = os.path.join(shared, "objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise Damaged("its objects lie in another repository, as after git clone --shared")

    # The few small files that git needs are written anew; no other line of the stranger's gets in.
    head = head_commit(own, shared)
    ends = [line for line in read_text(shared, "shallow").split("\n") if re.fullmatch(COMMIT, line)]
    sha256 = "repositoryformatversion = 1\n[extensions]\nobjectFormat = sha256\n"
    config = "[core]\nbare = true\n" + (sha256 if len(head) == 64 else "")
    for name, text in {"HEAD": head, "config": config, "shallow": "\n".join(ends)}.items():
        with open(os.path.join(bare, name), "w") as f:
            f.write(text)
    os.makedirs(os.path.join(bare, "refs"))
    os.makedirs(os.path.join(bare, "objects"))

    # Packs and loose objects are borrowed by a link to each file. The stranger's must not be links,
    # which could lead to a private repository, or pipes, on which git would wait for ever.
    if os.path.islink(objects):
        raise Damaged("its directory of objects is a link")
    for folder in os.listdir(objects):
        if not re.fullmatch("pack|[0-9a-f]{2}", folder):
            continue  # info, which names alternates
        path = os.path.join(objects, folder)
        if os.path.islink(path):
            raise Damaged(f"objects/{folder} is a link")
        os.makedirs(os.path.join(bare, "objects", folder))
        for name in os.listdir(path):
            if folder == "pack" and not name.endswith((".pack", ".idx")):
                continue  # .bitmap, .keep, .promisor: git can do without
            if not is_plain_file(os.path.join(path, name)):
                raise Damaged(f"objects/{folder}/{name} is not a plain file")
            os.symlink(os.path.join(path, name), os.path.join(bare, "objects", folder, name))


# ---- what git is asked ---------------------------------------------------------------------------

# M: changes of files that were there before. %s: the subject of the commit.
LOG = """log --no-merges --encoding=UTF-8 --raw --no-abbrev --no-renames --diff-filter=M -z
--format=%x01%s HEAD""".split()


@contextlib.contextmanager
def git(bare, *arguments, **pipes):
    """Runs git in a repository of our own, and ends it."""
    # The user's configuration stays out, too, which can change what git prints; and variables such
    # as GIT_DIR, which names another repository if a hook has started this program.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_DIR": bare, "HOME": bare, "XDG_CONFIG_HOME": bare}
    environment |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    # Nothing should make git fetch. If something does, it fails.
    environment |= {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1"}
    pipes["stdout"] = subprocess.PIPE  # stdin and stderr differ
    with subprocess.Popen(["git", *arguments], cwd=bare, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


class Change(NamedTuple):
    """How a commit changed a file."""

    subject: str  # the first line of the commit's message
    path: str  # the same before and after
    is_file: bool  # before and after; not a link or a submodule
    old: bytes  # the name of the object
    new: bytes


def changes(stream):
    r"""Yields each `Change` of what `git log` prints with the arguments LOG.

    A commit is \1 and its subject; a change is ":mode mode old new M", then the path. A NUL byte
    ends each of these.
    """
    subject = ""  # of the commit that the next changes belong to
    fields = nul_separated(stream)
    for field in fields:
        field = field.lstrip(b"\n")  # one stands between a commit and its changes
        if field.startswith(b"\1"):
            subject = field[1:].decode(errors="replace")
        elif field.startswith(b":"):
            old_mode, new_mode, old, new, _ = field.split()
            path = next(fields, b"").decode(errors="replace")
            is_file = old_mode.startswith(b":100") and new_mode.startswith(b"100")  # as 100644
            yield Change(subject, path, is_file, old, new)


def nul_separated(stream):
    """Yields what lies between the NUL bytes of a stream."""
    rest = b""  # the beginning of the next field
    while block := stream.read1(1 << 16):
        *fields, rest = (rest + block).split(b"\0")
        yield from fields
        if len(rest) > LARGEST:  # it could be any number of gigabytes
            raise Damaged(f"the subject of a commit is {TOO_LARGE}")


def ask(process, name):
    """The kind and the size of an object, from `git cat-file`."""
    # It answers "name kind size", or "name missing".
    process.stdin.write(name + b"\n")
    process.stdin.flush()
    words = process.stdout.readline().split()
    if len(words) != 3:
        raise Damaged(f"git has no object {name.decode()}; a partial clone lacks some")
    return words[1], int(words[2])


def read_commits(source, skipped, progress, largest=LARGEST):
    """The records of a repository's commits, the newest first; a reader (see `sources.Source`).

    largest: bytes of a file; changes of larger ones are left out.
    """
    # One ExitStack ends all that is begun here, whenever the caller stops reading.
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        bare = stack.enter_context(tempfile.TemporaryDirectory())
        borrow(source, bare)
        # Errors go to a file: a pipe that nobody reads would stop git when it is full.
        errors = stack.enter_context(tempfile.TemporaryFile())
        log = stack.enter_context(git(bare, *LOG, stderr=errors))
        # A kilobyte of a pack may unpack to gigabytes. So one process tells the size of an object,
        # and the other gives its content if that is not too large.
        sizes = stack.enter_context(git(bare, "cat-file", "--batch-check", **pipes))
        contents = stack.enter_context(git(bare, "cat-file", "--batch", **pipes))

        def blob(name):
            """The content of a file, or None if it is too large."""
            kind, size = ask(sizes, name)
            if kind != b"blob" or size > largest:
                return None
            ask(contents, name)
            return contents.stdout.read(size + 1)[:-1]  # a newline follows

        for change in changes(log.stdout):
            # Do not read what cannot be a source by its name.
            if not change.is_file or not may_be_source(change.path):
                skipped["no known extension"] += 1
                continue
            old = blob(change.old)
            new = blob(change.new)
            if old is None or new is None:
                skipped[TOO_LARGE] += 1
            elif document := document_of_change(change, old, new, skipped):
                yield document

        if log.wait():  # it failed; its first line says why
            errors.seek(0)
            raise Damaged(errors.read(1000).decode(errors="replace").strip().split("\n")[0])


def document_of_change(change, old, new, skipped):
    """The `Document` of a `Change` from one content to another; None if it is left out."""
    # A text that was not UTF-8 before its change has no place in a record, either.
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
