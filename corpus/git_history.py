"""TODO."""

import contextlib
import os
import re
import stat
import subprocess
import tempfile

from corpus.languages import language_of, may_be_source
from corpus.records import LARGEST, TOO_LARGE, Damaged, Document, commit_record


def _is_file(path):
    """Whether a path is a plain file: a link may lead elsewhere, and reading a pipe never ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def _line(path):
    """What a small file of git's holds; "" without it."""
    if not _is_file(path):
        return ""
    with open(path, "rb") as f:
        return os.fsdecode(f.read(5000).strip())


COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1, or SHA-256


def _head(own, shared):
    """The name of the commit that a repository's HEAD stands for. Raises Damaged without one.

    own, shared: its directories; two where it is a linked work tree.
    """
    text = _line(os.path.join(own, "HEAD"))
    for _ in range(5):  # a reference may stand for another
        reference = text.removeprefix("ref:").strip()
        if COMMIT.fullmatch(reference):
            return reference
        if not reference.startswith("refs/") or ".." in reference:
            break
        text = _line(os.path.join(shared, reference))
        packed = os.path.join(shared, "packed-refs")
        if not text and _is_file(packed):
            with open(packed, "rb") as f:
                names = (os.fsdecode(line.strip()).partition(" ") for line in f)
                text = next((commit for commit, _, name in names if name == reference), "")
    if os.path.isdir(os.path.join(shared, "reftable")):
        raise Damaged("its references are a reftable, which is not read here")
    raise Damaged("its HEAD stands for no commit")


def _borrow(repository, bare):
    """Makes the directory `bare` a git repository with the history of another, and no more of it.

    A stranger's repository may have git run any command: its configuration names programs that
    fetch missing objects, compare files or check signatures, and it has hooks. So git is only
    pointed at a repository of our own, which takes over the name of a commit, where a shallow
    history ends, and the packs and loose objects: no configuration, hooks, attributes, references
    or alternates.
    Raises Damaged for one without a commit, or that names files elsewhere.
    """
    own = os.path.join(repository, ".git")
    own = own if os.path.lexists(own) else repository
    shared = own
    if os.path.isfile(own):  # a linked work tree or a submodule: a file that names the directory
        own = os.path.join(repository, _line(own).removeprefix("gitdir:").strip())
        shared = os.path.join(own, _line(os.path.join(own, "commondir")))
    shared = os.path.realpath(shared)
    objects = os.path.join(shared, "objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise Damaged("its objects lie in another repository, as after git clone --shared")

    head = _head(own, shared)
    config = "[core]\nbare = true\nrepositoryformatversion = 0\n"
    if len(head) == 64:
        config = config.replace("= 0", "= 1") + "[extensions]\nobjectFormat = sha256\n"
    files = {"HEAD": head + "\n", "config": config}
    shallow = os.path.join(shared, "shallow")
    if _is_file(shallow):
        with open(shallow, errors="replace") as f:
            files["shallow"] = "".join(line for line in f if COMMIT.fullmatch(line.strip()))
    for name, text in files.items():
        with open(os.path.join(bare, name), "w") as f:
            f.write(text)
    os.makedirs(os.path.join(bare, "refs"))
    os.makedirs(os.path.join(bare, "objects", "pack"))

    for folder in os.listdir(objects):
        if not re.fullmatch("pack|[0-9a-f]{2}", folder):
            continue
        path = os.path.join(objects, folder)
        if os.path.islink(objects) or os.path.islink(path):
            raise Damaged(f"objects/{folder} is a link")
        names = os.listdir(path)
        if folder == "pack":
            names = [name for name in names if name.endswith((".pack", ".idx"))]
        for name in names:
            if not _is_file(os.path.join(path, name)):
                raise Damaged(f"objects/{folder}/{name} is not a plain file")
        if folder == "pack":
            for name in names:
                os.symlink(os.path.join(path, name), os.path.join(bare, "objects", "pack", name))
        else:
            os.symlink(path, os.path.join(bare, "objects", folder))


def _git(bare, *arguments, **pipes):
    """Starts git in a repository of our own, with no configuration or variables of the user's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_DIR": bare,
        "HOME": bare,
        "XDG_CONFIG_HOME": bare,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        # Should it want to fetch something for all that:
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_TERMINAL_PROMPT": "0",
    }
    command = ["git", *arguments]
    return subprocess.Popen(command, cwd=bare, stdout=subprocess.PIPE, env=environment, **pipes)


def read_commits(source, skipped, progress):
    """The changes of files by the commits of a git repository's current branch, the newest first.

    Merges and new files are none. No command runs that the repository names (see `_borrow`).
    """
    with tempfile.TemporaryDirectory() as bare:
        _borrow(source, bare)
        yield from _read_commits(bare, skipped)


def _read_commits(bare, skipped):
    how = "--no-merges --no-show-signature --encoding=UTF-8 --raw --no-abbrev --no-renames --diff-filter=M -z --format=%x01%s".split()
    said = tempfile.TemporaryFile()  # a pipe that nobody reads would stop git when it is full
    log = _git(bare, "log", *how, "HEAD", stderr=said)
    # One process is asked for an object's size, another for its content where that is not too much.
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    sizes = _git(bare, "cat-file", "--batch-check", **pipes)
    objects = _git(bare, "cat-file", "--batch", **pipes)

    def ask(process, name):
        process.stdin.write(name + b"\n")
        process.stdin.flush()
        words = process.stdout.readline().split()
        if len(words) != 3:
            raise Damaged(f"git has no object {name.decode()}; a partial clone lacks some")
        return words[1], int(words[2])

    def blob(name):
        """The content of a file, or None where it is too large."""
        kind, size = ask(sizes, name)
        if kind != b"blob" or size > LARGEST:
            return None
        ask(objects, name)
        return objects.stdout.read(size + 1)[:-1]

    try:
        subject, change = "", None
        for field in _fields(log.stdout):
            if not change:
                field = field.lstrip(b"\n")
                if field.startswith(b"\1"):
                    subject = field[1:].decode(errors="replace")
                elif field.startswith(b":"):
                    change = field.split()
            else:
                path, (old_mode, new_mode, old, new, _) = field.decode(errors="replace"), change
                change = None
                if not (
                    old_mode.startswith(b":100") and new_mode.startswith(b"100")
                ) or not may_be_source(path):
                    skipped["no known extension"] += 1
                    continue
                old, new = blob(old), blob(new)
                if old is None or new is None:
                    skipped[TOO_LARGE] += 1
                    continue
                if (language := language_of(path, new)) is None:
                    skipped["no known extension"] += 1
                    continue
                try:
                    record = commit_record(old.decode(), new.decode(), subject, language, skipped)
                except UnicodeDecodeError:
                    skipped["not UTF-8"] += 1
                    continue
                if record:
                    yield Document("git-commits", record)
        if log.wait():
            said.seek(0)
            raise Damaged(said.read(1000).decode(errors="replace").strip().split("\n")[0])
    finally:
        for process in (log, sizes, objects):
            process.kill()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):  # a pipe whose other end is gone
                    pipe.close()
            process.wait()
        said.close()


def _fields(stream):
    """What lies between the NUL bytes of a stream."""
    rest = b""
    while block := stream.read1(1 << 16):
        *fields, rest = (rest + block).split(b"\0")
        yield from fields
        if len(rest) > LARGEST:
            raise Damaged(f"the subject of a commit is {TOO_LARGE}")
    if rest:
        yield rest
