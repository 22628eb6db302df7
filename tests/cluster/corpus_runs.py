"""Makes corpora by every executor, for tests: sources of all kinds, runs, and who runs what."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from corpus import store

EXECUTORS = ("local", "ray", "slurm")
INSTALL = "pip install -r requirements-cluster.txt"
NOT_COMPARED = {"prepare.json", "jobs.json"}  # of a corpus: they say how it was made

# `prepare` as a command: --part-bytes is no flag, as nobody but a test needs small parts.
PROGRAM = """
import json, sys
import corpus
from common.command_line import run_command

def main():
    corpus.prepare(**json.loads(sys.argv[1]))

run_command(main)
"""

# ---- sources -------------------------------------------------------------------------------------


class Texts:
    """Draws texts: new ones, copies of earlier ones, and near duplicates of earlier ones."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.earlier = []  # lists of words

    def draw(self):
        """The next text."""
        kind = self.random.random()
        if kind < 0.7 or not self.earlier:
            words = [f"w{self.random.randrange(3000)}" for _ in range(self.random.randint(5, 120))]
            self.earlier.append(words)
        else:
            words = list(self.random.choice(self.earlier))
            if kind < 0.85:  # near: one word is another
                words[self.random.randrange(len(words))] = "changed"
                self.earlier.append(words)
        return "\n".join(" ".join(words[i : i + 7]) for i in range(0, len(words), 7)) + "\n"

    def files(self, count):
        """{name: content}, some of which is left out when it is read."""
        odd = [b"", b" \n", b"a\0b", "é".encode("latin-1"), b"x" * 1200, b"=" * 40, b"x"]
        found = {}
        for number in range(count):
            ending = self.random.choice(["py", "c", "rs", "xyz"])
            is_odd = self.random.random() < 0.1
            content = self.random.choice(odd) if is_odd else self.draw().encode()
            found[f"{number // 20}/{number}.{ending}"] = content
        return found


def write_files(directory, files):
    """Writes {name: bytes} below a directory, and returns its path."""
    for name, content in files.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return str(directory)


def write_tar(path, files):
    """Writes {name: bytes} as an archive, and returns its path."""
    with tarfile.open(path, "w:gz" if str(path).endswith(".gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_jsonl(path, texts, language="Python"):
    """Writes texts as JSON lines, and returns the path."""
    with open(path, "w") as f:
        for text in texts:
            f.write(json.dumps({"content": text, "lang": language}) + "\n")
    return str(path)


def write_parquet(path, texts):
    """Writes texts as a table, and returns its path."""
    table = pyarrow.table({"content": texts, "ext": ["py"] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    return str(path)


def write_repository(directory, texts):
    """Makes a git repository with a commit for each text, and returns its path."""
    os.makedirs(directory)
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for name in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{name}_NAME": "a", f"GIT_{name}_EMAIL": "a@example.org"}

    def git(*arguments):
        command = ["git", "-C", directory, *arguments]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    git("init", "-q")
    for number, text in enumerate(texts):
        with open(os.path.join(directory, "a.py"), "w") as f:
            f.write(text)
        git("add", "a.py")
        git("commit", "-q", "-m", f"Mend the words of text {number}")
    return str(directory)


def write_sources(directory, seed=0):
    """Some hundred documents in sources of every kind. Returns their paths."""
    texts = Texts(seed)
    os.makedirs(directory, exist_ok=True)

    def path(name):
        return os.path.join(directory, name)

    return [
        write_files(path("files"), texts.files(90)),
        write_tar(path("files.tar.gz"), texts.files(60)),
        write_jsonl(path("lines.jsonl"), [texts.draw() for _ in range(70)]),
        write_repository(path("repository"), [texts.draw() for _ in range(12)]),
        write_parquet(path("table.parquet"), [texts.draw() for _ in range(90)]),
    ]


# ---- runs ----------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a run has ended."""

    status: int  # of the exit; below 0: the signal that ended it
    said: str  # its last line, which is its only error


def environment_of(request, executor):
    """The environment in which an executor is found. Skips the test if it cannot be."""
    pytest.importorskip("datatrove", reason=INSTALL)
    if executor == "ray":
        return os.environ | {"RAY_ADDRESS": request.getfixturevalue("ray_cluster").address}
    if executor == "slurm":
        return dict(request.getfixturevalue("slurm").environment)
    return dict(os.environ)


def start(options, environment):
    """Begins `prepare` with these options, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, timeout=180):
    """Waits for the end of a run. AssertionError if it says more than a line, or a traceback."""
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end: {process.communicate()[1][-300:]}") from None
    assert "Traceback" not in said, said
    lines = [line for line in said.replace("\r", "\n").split("\n") if line and "it/s" not in line]
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == (process.returncode == 2), said
    assert process.returncode in (0, 2, 130, -signal.SIGKILL), said
    last = lines[-1].replace(f"{os.path.basename(sys.executable)}: ", "") if lines else ""
    return Ended(process.returncode, (errors or [last])[0])


def run(options, environment):
    """`prepare` from its start to its end."""
    return ended(start(options, environment))


# ---- what a corpus holds -------------------------------------------------------------------------


def files_of(directory, but=NOT_COMPARED):
    """{name: content} of all files below a directory, but for some at its top."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as f:
                found[os.path.relpath(path, directory)] = f.read()
    return {name: content for name, content in found.items() if name not in but}


def content_of(directory):
    """What a corpus holds, however it is cut into parts: a dict to compare."""
    meta = store.read_meta(directory)
    found = {name: meta[name] for name in ("splits", "languages", "skipped", "tokenizer_sha256")}
    found["order"] = [list(meta["languages"]), list(meta["skipped"])]
    for split in store.SPLITS:
        parts = store.open_parts(directory, split, meta)
        found[split] = np.concatenate([part.tokens for part in parts]).tolist()
        found[f"lengths of {split}"] = [
            length for part in parts for length in np.diff(part.offsets).tolist()
        ]
        found[f"languages of {split}"] = [
            part.language(document) for part in parts for document in range(len(part.offsets) - 1)
        ]
    return found


def done(out):
    """How many tasks of a corpus are done, of all jobs."""
    folder = os.path.join(out, "jobs")
    count = 0
    for path, _, names in os.walk(folder):
        count += len(names) if path.endswith("completions") else 0
    return count


# ---- processes -----------------------------------------------------------------------------------


def descendants(pid):
    """The processes that a process has started, and those that they have: {pid: command line}."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as f:
                parent = int(f.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{name}/cmdline") as f:
                children.setdefault(parent, {})[int(name)] = f.read().replace("\0", " ")
        except OSError:  # it has ended
            continue
    found = {}
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), {})
        found |= below
        waiting += below
    return found


def wait_until(happened, process, seconds=120):
    """Waits until `happened()`, or until a process has ended. Returns if it happened."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if happened():
            return True
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return False


def wait_for_end(processes, seconds=20):
    """Waits until these processes ({pid: command line}) have ended. AssertionError if they do not.

    Those who lose their parent should notice.
    """
    deadline = time.monotonic() + seconds
    while left := {pid: words for pid, words in processes.items() if command_of(pid) == words}:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def command_of(pid):
    """The command line of a process; None if it has ended."""
    try:
        with open(f"/proc/{pid}/cmdline") as f:
            return f.read().replace("\0", " ")
    except OSError:
        return None
