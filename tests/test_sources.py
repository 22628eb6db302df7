"""Every kind of source gives its documents in the documented format.

No input crashes the reader, makes it hang or fill the memory, or vanishes without being counted.
"""

import contextlib
import doctest
import errno
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

import corpus
import data
from corpus import (
    build,
    git_history,
    languages,
    records,
    sources,
    store,
)
from corpus.tokenizer import Tokenizer

FILES = {
    "a.py": b"x = 1\n" * 5,
    "sub/b.c": b"int main() { return 0; }\r\n",
    "c.rs": "fn é() {}".encode(),
    "d.txt": b"no source",
}


def read(path, **options):
    """(documents, what was left out) of a source."""
    skipped = Counter()
    items = build.documents([str(path)], skipped, **options)
    return [item.document for item in items], dict(skipped)


def text_of(record):
    return "".join(token + text for token, text in record)


# ---- languages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, language",
    [
        ("a.h", "int f(void);", "c"),
        ("a.h", "#include <stdio.h>\nstruct s { int x; };", "c"),
        ("a.h", "#include <vector>\n", "cpp"),
        ("a.h", "class A {\npublic:\n  int x;\n};", "cpp"),
        ("a.h", "@interface A : NSObject\n@end", None),
        ("a.m", "function y = f(x)\n  y = x;\nend\n", "matlab"),
        ("a.m", "% a comment\nx = 1\n", "matlab"),
        ("a.m", "f[x_] := x^2\n(* a comment *)", "mathematica"),
        ("a.m", "#import <Foundation/Foundation.h>\n", None),
        ("a.v", "module adder(input a, output b);\nendmodule\n", "verilog"),
        ("a.v", "Theorem t : 1 = 1.\nProof. reflexivity. Qed.\n", None),
        ("a.h", "/* one\n   class of functions\n */\nint f(void);", "c"),
        ("a.h", "class EXPORT A\n{\n};", "cpp"),
        ("a.H", "", "cpp"),
        ("A.M", "function y = f(x)\n", "matlab"),
        ("a.v", "module main\n\nimport os\n\nfn main() {}\n", None),  # V
        ("a.pl", "use strict;\nmy $x = 1;\n", "perl"),
        ("a.pl", "print 1;\n", "perl"),
        ("a.pl", ":- module(a, []).\nf(X) :- g(X).\n", "prolog"),
        ("a.pl", "likes(mary, wine).\n", "prolog"),
    ],
)
def test_shared_extensions(name, content, language):
    assert languages.language_of(name, content.encode()) == language


def test_examples_in_docstrings():
    assert doctest.testmod(languages).failed == 0


# ---- files, archives, tables ---------------------------------------------------------------------


def expected_files():
    return {"python": FILES["a.py"], "c": FILES["sub/b.c"], "rust": FILES["c.rs"]}


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        # Nothing is written to disk, so this is a file like any other.
        archive.writestr("../../outside.py", b"never = 'unpacked'\n")
    documents, skipped = read(tmp_path / "s.zip")
    assert [d.content for d in documents] == [*expected_files().values(), b"never = 'unpacked'\n"]
    assert skipped == {"no known extension": 1} and os.listdir(tmp_path) == ["s.zip"]


@pytest.mark.parametrize("binary", [False, True])
def test_parquet_as_the_stack_has_it(tmp_path, binary):
    rows = {
        "content": [c if binary else c.decode() for c in expected_files().values()] + [None, "x"],
        "lang": ["Python", "C++", "C#", "C", None],
        "ext": ["py", "c", "rs", "c", "weird"],
        "max_stars_repo_name": ["a/b"] * 5,
        "size": [1] * 5,
    }
    table = pyarrow.table(
        {
            k: pyarrow.array(v, pyarrow.binary()) if binary and k == "content" else v
            for k, v in rows.items()
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "s.parquet", row_group_size=2)
    documents, skipped = read(tmp_path / "s.parquet")
    assert [d.content for d in documents] == [*expected_files().values(), b"x"]
    assert [d.language for d in documents] == ["python", "cpp", "c-sharp", "other"]
    assert skipped == {"no content field": 1}


def test_one_bad_row_of_a_table_costs_that_row(tmp_path):
    content = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [
            None,
            pyarrow.py_buffer(np.array([0, 5, 11, 16], np.int32)),
            pyarrow.py_buffer(b"x = 1y = \xff\xffz = 3"),
        ],
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"content": content, "ext": ["py"] * 3}), tmp_path / "s.parquet"
    )
    documents, skipped = read(tmp_path / "s.parquet")
    assert [d.content for d in documents] == [b"x = 1", b"z = 3"] and skipped == {"not UTF-8": 1}
    when = pyarrow.array([2**60, 0], pyarrow.timestamp("us"))  # in the year 38,505
    events = pyarrow.StructArray.from_arrays(
        [["opened"] * 2, ["alice"] * 2, [LONG, LONG], when], ["action", "author", "text", "when"]
    )
    table = pyarrow.table(
        {
            "title": ["a", "b"],
            "events": pyarrow.ListArray.from_arrays(
                pyarrow.array([0, 1, 2], pyarrow.int32()), events
            ),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "s.parquet")
    documents, skipped = read(tmp_path / "s.parquet")
    assert len(documents) == 1 and sum(skipped.values()) == 1


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, ending):
    lines = b"".join(
        json.dumps({"content": f"line {i}\n" * 9, "path": f"{i}.py"}).encode() + b"\n"
        for i in range(3000)
    )
    path = tmp_path / f"s.jsonl{ending}"
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda x: pyarrow.compress(x, "zstd", asbytes=True),
    }[ending]
    # Of several frames, as `cat` makes them.
    path.write_bytes(pack(lines[:10_000]) + pack(lines[10_000:]))
    documents, skipped = read(path)
    assert [d.content for d in documents] == [b"line %d\n" % i * 9 for i in range(3000)]
    assert not skipped
    if ending:
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match="damaged"):
            read(path)


# ---- records -------------------------------------------------------------------------------------

NOTEBOOK = {
    "nbformat": 4,
    "cells": [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {
            "cell_type": "code",
            "source": "print(1)\n1 / 0",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                {
                    "output_type": "error",
                    "ename": "ZeroDivisionError",
                    "evalue": "division by zero",
                    "traceback": ["long"],
                },
            ],
        },
        {"cell_type": "code", "source": ["x = 2"], "outputs": []},
        {"cell_type": "raw", "source": "left out"},
        {
            "cell_type": "code",
            "source": "y",
            "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["o" * 2000]}}],
        },
    ],
}
NOTEBOOK_TEXT = (
    "<jupyter_start><jupyter_text># Title\ntext<jupyter_code>print(1)\n1 / 0"
    "<jupyter_output>1\nZeroDivisionError: division by zero\n"
    "<jupyter_code>x = 2<empty_output><jupyter_code>y<jupyter_output>" + "o" * 1000
)


def test_notebooks(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ipynb").write_text(json.dumps(NOTEBOOK))
    (tmp_path / "in" / "b.ipynb").write_text('{"cells": 3}')
    (tmp_path / "in" / "c.ipynb").write_text("{")
    documents, skipped = read(tmp_path / "in")
    assert [(d.language, text_of(d.content)) for d in documents] == [("jupyter", NOTEBOOK_TEXT)]
    assert skipped == {"not a notebook": 2}
    cells = [{"cell_type": "code", "source": []}, {"cell_type": "raw", "source": "raw"}]
    assert records.notebook_record({"cells": cells}) == []
    # Format 3, whose lines have no ends.
    output = {"output_type": "pyout", "text": ["1"]}
    cell = {"cell_type": "code", "input": ["x", "y"], "outputs": [output]}
    record = records.notebook_record({"worksheets": [{"cells": [cell]}]})
    assert text_of(record) == "<jupyter_start><jupyter_code>x\ny<jupyter_output>1"


LONG = 3 * "It fails on every input that I tried, with the message below, since last week. "
ISSUE = {
    "url": "https://api.github.com/repos/o/r/issues/1",
    "title": "It fails for alice",
    "user": {"login": "alice", "type": "User"},
    "body": LONG + "\r\n@bob-b, can you look? Or @carol.",
    "state": "closed",
    "comments": [
        {"user": {"login": "dependabot[bot]", "type": "Bot"}, "body": "I am a bot"},
        {
            "user": {"login": "bob-b", "type": "User"},
            "body": "alice: yes.\n\nOn Mon, Bob <bob@x.org> wrote:\n> quoted",
        },
        {"user": {"login": "alice", "type": "User"}, "body": "\n".join(map(str, range(100)))},
    ],
}
ISSUE_TEXT = (
    f"<issue_start>Title: It fails for username_0\nusername_0: {LONG}"
    "\n@username_1, can you look? Or @username."
    "<issue_comment>username_1: username_0: yes.<issue_comment>username_0: "
    + "\n".join(map(str, range(80)))
    + "<issue_closed>"
)


def test_issues_in_the_shapes_of_the_api_and_of_the_stack(tmp_path):
    events = [
        {"action": "opened", "author": "alice", "title": ISSUE["title"], "text": ISSUE["body"]}
    ]
    events += [
        {"action": "created", "author": c["user"]["login"], "text": c["body"]}
        for c in ISSUE["comments"]
    ]
    events += [{"action": action, "author": "bob-b"} for action in ("closed", "reopened", "closed")]
    of_the_stack = {"repo": "o/r", "issue_id": 1, "events": events, "content": "not this"}
    path = tmp_path / "issues.jsonl"
    for shape in (ISSUE, of_the_stack):
        path.write_text(json.dumps(shape))
        documents, skipped = read(path)
        found = [(d.language, text_of(d.content)) for d in documents]
        assert found == [("github-issues", ISSUE_TEXT)] and not skipped

    short = ISSUE | {"body": "short", "comments": []}
    of_a_bot = ISSUE | {"user": {"login": "renovate-bot"}}
    comment = {"issue_url": ISSUE["url"]} | ISSUE["comments"][1]
    path.write_text("\n".join(map(json.dumps, [short, of_a_bot, comment])))
    reasons = ["issue: under 200 characters", "issue: opened by a bot", "no content field"]
    assert read(path) == ([], dict.fromkeys(reasons, 1))
    # The API says how many comments there are, if it does not give them.
    path.write_text(json.dumps(ISSUE | {"comments": 3, "state": "open"}))
    assert text_of(read(path)[0][0].content) == (
        f"<issue_start>Title: It fails for username_0\nusername_0: {LONG}"
        "\n@username, can you look? Or @username."
    )


def issue(comments, **fields):
    """The text of an issue of these (login, body)."""
    said = [{"user": {"login": login}, "body": body} for login, body in comments]
    record = {"title": "t", "comments": said[1:]} | said[0] | fields
    return text_of(records.document_of(record, Counter()).content)


def test_no_name_of_a_user_remains():
    """In any case, beside any character, of those who only closed, were quoted, or said nothing."""
    text = "@Alice, ALICE's _alice_ alice. alice@x.org alicea @bob @CAROL; @dave @babel/core "
    text = LONG + text + "a@b.c username_7"
    found = issue(
        [("alice", text), ("Bob", ""), ("erin", "bob: hi"), ("ALICE", "again")],
        closed_by={"login": "Carol"},
    )
    assert found == (
        f"<issue_start>Title: t\nusername_0: {LONG}@username_0, username_0's _username_0_ "
        "username_0. username_0@x.org alicea @username_2 @username_3; @username @babel/core a@b.c "
        "username_7<issue_comment>username_1: username_2: hi<issue_comment>username_0: again"
    )
    events = [
        {
            "action": "opened",
            "author": "Alice",
            "masked_author": "username_4",
            "title": "t",
            "text": LONG,
        },
        {
            "action": "created",
            "author": "stale[bot]",
            "masked_author": "username_1",
            "text": "I am a bot",
        },
        {
            "action": "created",
            "author": "bob",
            "masked_author": "username_2",
            "text": "as alice (username_4) and @bob said",
        },
    ]
    found = records.document_of({"events": events}, Counter())
    expected = "<issue_comment>username_1: as username_0 (username_0) and @username_1 said"
    assert text_of(found.content) == (
        f"<issue_start>Title: t\nusername_0: {LONG.strip()}{expected}"
    )


@pytest.mark.parametrize(
    "end",
    [
        "\n\nOn Mon, Jan 1, 2020 Bob <bob@x.org> wrote:\n> quoted\n\n> more",
        "\nOn Mon, Jan 1, 2020 at 10:00 AM Bob <\nbob@x.org> wrote:\n>quoted",
        "\nSent from my phone\n\nOn 1.1.2020 Bob wrote:\n> quoted",
        "\n\nSent from my phone",
        "\n-----Original Message-----\nFrom: Bob\nall of it",
        "\nFrom: Bob <bob@x.org>\nSent: Monday\nTo: all\n\nall of it",
        "\nReply to this email directly, view it on GitHub, or unsubscribe.",
    ],
)
def test_mail_around_an_answer_goes(end):
    answer = "Yes.\r\n> an earlier quotation\n\nIt is."
    assert records.without_mail(answer + end) == answer.replace("\r", "")


@pytest.mark.parametrize(
    "text",
    [
        "From: line 3 on it fails\nand here",
        "On Linux it writes:\n> error",
        "On 2020 he wrote:\n> that\nbut no",
        "a\n> b",
    ],
)
def test_what_is_not_mail_stays(text):
    assert records.without_mail(text) == text


def change(lines, changed, mark="changed"):
    old = [f"line {i}\n" for i in range(lines)]
    return "".join(old), "".join(
        f"{mark} {i}\n" if i in changed else line for i, line in enumerate(old)
    )


def test_commit_records():
    """Five changed lines among 200: a fifth of the records hold the file, others 0 to 32 lines."""
    whole = 0
    spans = set()
    skipped = Counter()
    for i in range(400):
        old, new = change(200, range(90, 95), mark=f"change {i}")
        record = records.commit_record(old, new, "Mend the lines", "python", skipped)
        (before, a), message, (after, b) = record
        assert (before, after) == ("<commit_before>", "<commit_after>")
        assert message == ("<commit_msg>", "Mend the lines")
        if a == old:
            assert b == new
            whole += 1
        else:
            around = 90 - int(a.split("\n")[0][5:])
            lines = [f"line {j}\n" for j in range(90 - around, 95 + around)]
            assert 0 <= around <= 32 and a == "".join(lines)
            lines[around : around + 5] = [f"change {i} {j}\n" for j in range(90, 95)]
            assert b == "".join(lines)
            spans.add(around)
    assert not skipped and 0.14 < whole / 400 < 0.27 and {0, 32} <= spans


@pytest.mark.parametrize("lines, changed, least, most", [(50, 1, 150, 250), (300, 290, 340, 380)])
def test_most_small_and_large_changes_are_left_out(lines, changed, least, most):
    left_out = 0
    for i in range(400):
        old, new = change(lines, range(7, 7 + changed), f"m{i}")
        left_out += records.commit_record(old, new, "Mend it", "python", Counter()) is None
    assert least < left_out < most


@pytest.mark.parametrize(
    "subject, reason",
    [
        (" ", "no subject"),
        ("Merge branch x", "automatic"),
        ("f" * 30, "a subject without words"),
    ],
)
def test_subjects_that_leave_a_commit_out(subject, reason):
    skipped = Counter()
    assert records.commit_record(*change(50, range(5)), subject, "python", skipped) is None
    assert skipped == {f"commit: {reason}": 1}


@given(old=st.text(max_size=80), new=st.text(max_size=80), subject=st.text(min_size=1, max_size=9))
def test_a_commit_keeps_every_changed_line(old, new, subject):
    record = records.commit_record(old, new, subject, "python", Counter())
    if record:
        (_, a), _, (_, b) = record
        begin = old.index(a) if a else 0
        assert any(
            old[:k] + b + old[k + len(a) :] == new for k in range(begin, len(old) - len(a) + 1)
        ) or (a, b) == (old, new)


def git(repository, *arguments):
    names = {
        f"GIT_{role}_{what}": "a@b"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        ["git", *arguments], cwd=repository, check=True, capture_output=True, env=os.environ | names
    )


def test_commits_of_a_repository(tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-q")
    expected = []
    old, name = "".join(f"line {i}\n" for i in range(40)), 'odd "name"\té.py'
    for i in range(12):
        new = old.replace(f"line {2 * i}\n", f"new {i}\nanother {i}\nthird {i}\n")
        (repository / name).write_text(new if i else old)
        (repository / "image.png").write_bytes(os.urandom(9))
        git(repository, "add", "-A")
        git(repository, "commit", "-qm", f"Change number {i}\n\nbody")
        if i:
            record = records.commit_record(old, new, f"Change number {i}", "python", Counter())
            expected += [text_of(record)] if record else []
            old = new
    documents, skipped = read(repository, commits=True)
    assert [d.language for d in documents] == ["python"] + ["git-commits"] * len(expected)
    assert [text_of(d.content) for d in documents[1:]] == expected[::-1] and len(expected) >= 8
    assert skipped["no known extension"] == 12  # the image, and its changes
    git(repository, "update-ref", "-d", "HEAD")
    with pytest.raises(ValueError, match="damaged"):
        read(repository, commits=True)


def test_a_folder_of_clones(tmp_path, small_corpus):
    """Bare ones too; odd names, messages in another encoding."""
    clone = tmp_path / "clones" / "a"
    clone.mkdir(parents=True)
    git(clone, "init", "-q")
    git(clone, "config", "i18n.commitEncoding", "latin-1")
    git(clone, "config", "color.ui", "always")
    old, expected = "".join(f"line {i}\n" for i in range(40)), []
    for i in range(12):
        new = old.replace(f"line {2 * i}\n", f"new {i}\nanother {i}\nthird {i}\n")
        (clone / ":100644 a.py").write_text(new if i else old)
        git(clone, "add", "-A")
        (tmp_path / "message").write_bytes(f"Größe {i}".encode("latin-1"))
        git(clone, "commit", "-q", "-F", tmp_path / "message")
        if i:
            record = records.commit_record(old, new, f"Größe {i}", "python", Counter())
            expected += [text_of(record)] if record else []
            old = new
    git(tmp_path, "clone", "-q", "--bare", str(clone), str(tmp_path / "clones" / "b.git"))
    documents, skipped = read(tmp_path / "clones", commits=True)
    commits = [text_of(d.content) for d in documents if d.language == "git-commits"]
    assert (
        commits == expected[::-1]
        and len(expected) >= 8
        and skipped["exact duplicate"] == len(expected)
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none of the sources is a git repository"):
        corpus.prepare(
            [str(tmp_path / "empty")], str(tmp_path / "out"), tokenizer=small_corpus, commits=True
        )


def test_the_history_of_this_project_comes_back_from_the_corpus(tmp_path, small_corpus):
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD~5"], capture_output=True).returncode:
        pytest.skip("not a clone with a history")
    records, skipped = read(ROOT, commits=True)
    expected = {text_of(d.content) for d in records if d.language == "git-commits"}
    assert len(expected) > 20 and all(
        text.startswith("<commit_before>") and "<commit_msg>" in text for text in expected
    )
    corpus.prepare(
        [ROOT],
        str(tmp_path / "out"),
        tokenizer=small_corpus,
        workers=2,
        commits=True,
        languages=["git-commits"],
    )
    tokenizer, found = Tokenizer.from_pretrained(tmp_path / "out"), set()
    for split in ("train", "validation"):
        dataset = data.PairDataset(str(tmp_path / "out"), split, 64, 0)
        for d in range(dataset.documents()):
            ids = dataset.document(d)
            assert (
                ids[0] == tokenizer.special_tokens["<commit_before>"]
                and dataset.language(d) == "git-commits"
            )
            found.add(tokenizer.decode(ids))
    assert found == expected


# ---- git repositories of strangers ---------------------------------------------------------------

# What a repository may hold to have a command run: its configuration, and what git must be asked to
# see that the trap is live. TRAP is a program that leaves a marker; BLOB an object that is missing,
# which git would fetch; OTHER another repository.
FETCHED = (
    "[core]\nrepositoryformatversion = 1\n[extensions]\npartialClone = o\n"
    '[remote "o"]\npromisor = true\n'
)
ATTACKS = {
    "ssh": (FETCHED + "url = ssh://host/x\n[core]\nsshCommand = TRAP", "cat-file -p BLOB"),
    "ext": (FETCHED + "url = ext::TRAP\n[protocol]\nallow = always", "cat-file -p BLOB"),
    "proxy": (FETCHED + "url = git://host/x\n[core]\ngitProxy = TRAP", "cat-file -p BLOB"),
    "uploadpack": (FETCHED + "url = OTHER\nuploadpack = TRAP", "cat-file -p BLOB"),
    "include": ("[include]\npath = ../ssh.config", "cat-file -p BLOB"),
    "includeIf": ('[includeIf "gitdir:**"]\npath = ../ssh.config', "cat-file -p BLOB"),
    "worktree": (
        "[core]\nrepositoryformatversion = 1\n[extensions]\nworktreeConfig = true",
        "cat-file -p BLOB",
    ),
    "fsmonitor": ("[core]\nfsmonitor = TRAP", "status"),
    "hooks": ("", "checkout -q -f"),
    "hooksPath": ("[core]\nhooksPath = hooks", "checkout -q -f"),
    "signature": ("[log]\nshowSignature = true\n[gpg]\nprogram = TRAP", "log"),
    "external diff": ("[diff]\nexternal = TRAP", "diff HEAD~1"),
    "textconv": ('[diff "x"]\ntextconv = TRAP', "log -p"),
    "diff command": ('[diff "x"]\ncommand = TRAP', "diff HEAD~1"),
    "filter": ('[filter "x"]\nclean = TRAP', "diff"),
}


@pytest.fixture
def trap(tmp_path):
    """A program that leaves a marker, which a test may look for."""
    program, marker = tmp_path / "trap", tmp_path / "marker"
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    return program, marker


def change_often(repository, times=12):
    """A git repository with a file that each commit changes."""
    lines, stream = [f"line {i}\n" for i in range(40)], []
    for i in range(times):
        lines[2 * i] = f"new {i}\nanother {i}\nthird {i}\n"
        message, content = f"Change number {i}", "".join(lines)
        stream += [
            "commit refs/heads/main",
            f"committer a <a@b> {10**9 + i} +0000",
            f"data {len(message)}",
            message,
        ]
        stream += ["M 100644 inline a.py", f"data {len(content)}", content]
    repository.mkdir(parents=True)
    git(repository, "init", "-q")
    git(repository, "symbolic-ref", "HEAD", "refs/heads/main")
    subprocess.run(
        ["git", "-C", repository, "fast-import", "--quiet"],
        input="\n".join(stream).encode(),
        check=True,
    )
    git(repository, "reset", "-q", "--hard")
    return repository


def plant(repository, program, attack):
    """Makes a repository hostile; returns the arguments of git that show it."""
    config, arguments = ATTACKS[attack]
    own = repository / ".git" if (repository / ".git").exists() else repository
    ssh = ATTACKS["ssh"][0].replace("TRAP", str(program))
    (repository / "ssh.config").write_text(ssh)
    (own / "config.worktree").write_text(ssh)
    for hooks in [own / "hooks"] * (attack == "hooks") + [repository / "hooks"]:
        hooks.mkdir(exist_ok=True)
        (hooks / "post-checkout").symlink_to(program)
    (own / "info").mkdir(exist_ok=True)
    (own / "info" / "attributes").write_text("*.py diff=x filter=x\n")
    blob = git(repository, "rev-parse", "HEAD~3:a.py").stdout.decode().strip()
    if attack == "signature":
        commit = git(repository, "cat-file", "commit", "HEAD").stdout
        signed = commit.replace(
            b"\n\n",
            b"\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----\n\n",
            1,
        )
        (repository / "commit").write_bytes(signed)
        name = (
            git(repository, "hash-object", "-t", "commit", "-w", "commit").stdout.decode().strip()
        )
        git(repository, "update-ref", "HEAD", name)
    if "BLOB" in arguments:
        os.remove(own / "objects" / blob[:2] / blob[2:])
    config = config.replace("TRAP", str(program)).replace("OTHER", str(repository))
    with open(own / "config", "a") as f:
        f.write(config)
    if attack == "filter":
        (repository / "a.py").write_text("changed")
    return arguments.replace("BLOB", blob).split()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_of_a_repository_runs(tmp_path, trap, attack):
    """git itself runs each of them; reading the commits does not, and reads what is there."""
    program, marker = trap
    repository = change_often(tmp_path / "in")
    arguments = plant(repository, program, attack)
    subprocess.run(["git", *arguments], cwd=repository, capture_output=True)
    assert marker.exists(), "the trap is not live"
    marker.unlink()
    if "cat-file" in arguments:
        with pytest.raises(ValueError, match="git has no object [0-9a-f]{40}"):
            read(repository, commits=True)
    else:
        documents, _ = read(repository, commits=True)
        assert sum(d.language == "git-commits" for d in documents) >= 6
    assert not marker.exists()


def test_repositories_inside_a_repository_are_files(tmp_path, trap):
    """A clone may hold a bare repository as ordinary files, or a `.git` that names another."""
    program, marker = trap
    inner = change_often(tmp_path / "inner")
    git(tmp_path, "clone", "-q", "--bare", str(inner), str(tmp_path / "bare"))
    outer = change_often(tmp_path / "clones" / "outer", 3)
    (tmp_path / "bare" / "config").write_text(ATTACKS["fsmonitor"][0].replace("TRAP", str(program)))
    os.rename(tmp_path / "bare", outer / "docs")
    (outer / "sub").mkdir()
    (outer / "sub" / ".git").write_text(f"gitdir: {inner / '.git'}\n")
    link = tmp_path / "clones" / "link"
    link.mkdir()
    (link / ".git").symlink_to(inner / ".git")
    for source in (outer, tmp_path / "clones"):
        found = [
            path
            for path, reader, _ in sources.readers(str(source), True)
            if reader is git_history.read_commits
        ]
        assert found == [str(outer)]
    assert not marker.exists()


def test_the_environment_does_not_change_what_git_reads(tmp_path, trap, monkeypatch):
    """As in a hook of git's own, where GIT_DIR names another repository."""
    program, marker = trap
    repository, other = change_often(tmp_path / "in"), change_often(tmp_path / "other", 2)
    (tmp_path / "global").write_text(ATTACKS["signature"][0].replace("TRAP", str(program)))
    expected = read(repository, commits=True)
    variables = {
        "GIT_DIR": other / ".git",
        "GIT_WORK_TREE": other,
        "GIT_OBJECT_DIRECTORY": other / ".git" / "objects",
        "GIT_CONFIG_GLOBAL": tmp_path / "global",
        "GIT_CONFIG_COUNT": 1,
        "GIT_CONFIG_KEY_0": "diff.external",
        "GIT_CONFIG_VALUE_0": program,
        "GIT_EXTERNAL_DIFF": program,
        "GIT_SSH_COMMAND": program,
        "GIT_PAGER": program,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert read(repository, commits=True) == expected and len(expected[0]) > 6
    assert not marker.exists()


def test_objects_of_another_repository_are_not_read(tmp_path):
    """Neither by git's alternates nor by links; a pipe would never end."""
    change_often(tmp_path / "private")
    objects = tmp_path / "private" / ".git" / "objects"
    git(tmp_path, "clone", "-q", "--shared", str(tmp_path / "private"), str(tmp_path / "shared"))
    with pytest.raises(ValueError, match="objects lie in another repository"):
        read(tmp_path / "shared", commits=True)
    for number, name in enumerate(["objects", "objects/pack", "objects/ab"]):
        repository = change_often(tmp_path / str(number), 2)
        path = repository / ".git" / name
        if path.exists():
            os.rename(path, repository / "moved")
        path.symlink_to(objects)
        with pytest.raises(ValueError, match="is a link"):
            read(repository, commits=True)
    for name in [
        "HEAD",
        "refs/heads/main",
        "objects/pack/a.idx",
        "objects/ab/cd",
        "packed-refs",
        "shallow",
        "config",
    ]:
        repository = change_often(tmp_path / name.replace("/", "_"))
        path = repository / ".git" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        if name in ("packed-refs", "shallow", "config"):
            assert len(read(repository, commits=True)[0]) > 6
        else:
            with pytest.raises(ValueError, match="stands for no commit|is not a plain file"):
                read(repository, commits=True)


def test_what_is_too_large_in_a_history_is_counted(tmp_path):
    """Not taken for an empty file; a subject without end is not read on."""
    repository = change_often(tmp_path / "in")
    skipped = Counter()
    # The file grows to 513 bytes.
    documents = list(git_history.read_commits(repository, skipped, None, largest=450))
    assert skipped[records.TOO_LARGE] >= 3 and len(documents) >= 4
    assert all(before and after for (_, before), _, (_, after) in (d.content for d in documents))
    (repository / "a.py").write_text("small")
    (repository / "message").write_bytes(b"a" * (records.LARGEST + 100_000))
    git(repository, "commit", "-qaF", "message")
    with pytest.raises(ValueError, match="the subject of a commit is over"):
        read(repository, commits=True)


def test_a_reftable_is_refused_in_one_line(tmp_path):
    repository = change_often(tmp_path / "in", 2)
    (repository / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n")
    with pytest.raises(ValueError, match="stands for no commit"):
        read(repository, commits=True)
    (repository / ".git" / "reftable").mkdir()
    with pytest.raises(ValueError, match="a reftable, which is not read here"):
        read(repository, commits=True)


@pytest.mark.parametrize("kind", ["worktree", "shallow", "packed", "bare", "sha256", "detached"])
def test_every_kind_of_clone(tmp_path, kind):
    """The same records as git's own clone has, or as many as a shallow one holds."""
    origin, clone = change_often(tmp_path / "origin"), tmp_path / "clone"
    expected = [d for d in read(origin, commits=True)[0] if d.language == "git-commits"]
    if kind == "worktree":
        git(origin, "worktree", "add", "-q", str(clone))
    elif kind == "packed":
        git(tmp_path, "clone", "-q", str(origin), str(clone))
        git(clone, "pack-refs", "--all")
        git(clone, "gc", "-q")
    elif kind == "sha256":
        git(tmp_path, "init", "-q", "--object-format=sha256", str(clone))
        stream = subprocess.run(
            ["git", "-C", origin, "fast-export", "HEAD"], capture_output=True, check=True
        ).stdout
        subprocess.run(["git", "-C", clone, "fast-import", "--quiet"], input=stream, check=True)
        git(clone, "symbolic-ref", "HEAD", "refs/heads/main")
    elif kind == "detached":
        git(tmp_path, "clone", "-q", str(origin), str(clone))
        git(clone, "checkout", "-q", "--detach")
    else:
        options = {"shallow": ["--depth", "8", f"file://{origin}"], "bare": ["--bare", str(origin)]}
        git(tmp_path, "clone", "-q", *options[kind], str(clone))
    found = [d for d in read(clone, commits=True)[0] if d.language == "git-commits"]
    assert found == (expected[: len(found)] if kind == "shallow" else expected)
    assert len(found) >= 4 and (kind != "shallow" or len(found) < len(expected))


def test_text_that_looks_like_a_special_token_stays_text(tmp_path, small_corpus):
    notebook = {"cells": [{"cell_type": "markdown", "source": "<jupyter_code> and <mask>"}]}
    (tmp_path / "s.jsonl").write_text("\n".join(json.dumps(notebook | {"k": i}) for i in range(1)))
    corpus.prepare(
        [str(tmp_path / "s.jsonl")], str(tmp_path / "out"), tokenizer=small_corpus, workers=1
    )
    tokenizer, meta = (
        Tokenizer.from_pretrained(tmp_path / "out"),
        store.read_meta(str(tmp_path / "out")),
    )
    split = max(meta["splits"], key=lambda split: meta["splits"][split]["documents"])
    ids = np.fromfile(tmp_path / "out" / f"00000.{split}.bin", np.uint16).tolist()
    special = [i for i in ids if i in tokenizer.special_tokens.values()]
    assert special == [
        tokenizer.special_tokens["<jupyter_start>"],
        tokenizer.special_tokens["<jupyter_text>"],
    ]
    assert tokenizer.decode(ids) == "<jupyter_start><jupyter_text><jupyter_code> and <mask>"


# ---- what is malformed ---------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = """content title body user comments events cells worksheets old_contents new_contents
subject lang ext path url issue_url""".split()


@given(
    records=st.lists(
        st.dictionaries(st.sampled_from(fields), json_values, max_size=6) | json_values, max_size=4
    )
)
@example([{"cells": [{"cell_type": "code", "source": 3}]}])
@example([{"title": "t", "comments": [3], "user": [], "url": 3}])
@example([{"events": [{"author": 3, "text": 4}]}, {"old_contents": "a", "new_contents": 3}])
def test_records_of_any_shape(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("j") / "s.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    documents, skipped = read(path)
    for document in documents:
        pieces, reason = build.text_of(document)
        assert reason or all(isinstance(text, str) for _, text in pieces)
    assert len(documents) + sum(skipped.values()) >= len(records)


@pytest.fixture(scope="module")
def whole_sources(tmp_path_factory):
    """{ending: bytes} of a sound source of each kind."""
    directory = tmp_path_factory.mktemp("whole")
    lines = "\n".join(
        json.dumps({"content": f"x = {i}\n" * 20, "path": "a.py"}) for i in range(200)
    ).encode()
    with zipfile.ZipFile(directory / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(f"{i}.py", f"x = {i}\n" * 50)
    for ending, kind in (
        (".tar", "w"),
        (".tar.gz", "w:gz"),
        (".tar.xz", "w:xz"),
        (".tar.bz2", "w:bz2"),
    ):
        with tarfile.open(directory / f"s{ending}", kind) as archive:
            for i in range(20):
                content = f"x = {i}\n".encode() * 50
                member = tarfile.TarInfo(f"{i}.py")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    table = pyarrow.table({"content": [f"x = {i}\n" * 20 for i in range(200)], "ext": ["py"] * 200})
    pyarrow.parquet.write_table(
        table, directory / "s.parquet", row_group_size=50, write_page_checksum=True
    )
    found = {name[1:]: (directory / name).read_bytes() for name in os.listdir(directory)}
    return found | {
        ".jsonl": lines,
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
    }


KINDS = [
    ".zip",
    ".tar",
    ".tar.gz",
    ".tar.xz",
    ".tar.bz2",
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
]


@pytest.mark.parametrize("ending", KINDS)
def test_damage_is_an_error_or_counted(whole_sources, tmp_path, ending):
    """Cut, flipped or overwritten: one clear error, or every document as it was, or counted."""
    content, generator = whole_sources[ending], random.Random(ending)
    path = tmp_path / f"s{ending}"
    path.write_bytes(content)
    expected = [d.content for d in read(path)[0]]
    rounds = 20 * (50 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1)
    for _ in range(rounds):
        broken = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(broken))
            way = generator.randrange(3)
            if way == 0:
                broken = broken[: max(1, at)]
            elif way == 1:
                broken[at] ^= 1 << generator.randrange(8)
            else:
                broken[at : at + 9] = generator.randbytes(9)
        path.write_bytes(broken)
        with contextlib.suppress(ValueError):
            documents, skipped = read(path)
            if ending in (
                ".tar",
                ".jsonl",
                ".jsonl.zst",
            ):  # no checksums over the content; but a document is never lost from an archive
                assert ending != ".tar" or len(documents) + sum(skipped.values()) == len(expected)
            else:
                assert [d.content for d in documents] == expected or skipped


def test_what_vanishes_or_changes_while_it_is_read_is_counted(tmp_path, monkeypatch):
    """Between the listing, the look at a file and its opening."""
    files = "a b c d e f".split()
    for name in [*files, "sub/g", "z"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
    real = os.path.isfile

    def vanishes(path):
        found = real(path)
        if path.endswith("b.py"):
            os.remove(path)
        return found

    def change(*_, **__):
        """Called when the first file has been read."""
        if (tmp_path / "c.py").exists():
            os.remove(tmp_path / "c.py")
            (tmp_path / "d.py").unlink()
            (tmp_path / "d.py").mkdir()
            (tmp_path / "e.py").write_text("")
            (tmp_path / "f.py").unlink()
            (tmp_path / "f.py").symlink_to("f.py")
            shutil.rmtree(tmp_path / "sub")

    assert sources.size_of(str(tmp_path / "gone.py")) == 0
    monkeypatch.setattr(os.path, "isfile", vanishes)
    skipped = Counter()
    documents = list(sources.read(str(tmp_path), sources.read_directory, skipped, change))
    assert [d.content for d in documents] == [
        b"a = 1\n",
        b"",
        b"z = 1\n",
    ]  # an empty one is counted later
    assert skipped == {"unreadable": 2, "not a file": 3}
    (tmp_path / "b.py").write_text("b = 1\n")
    assert sources.readers(str(tmp_path))[0].size == len("a = 1\nz = 1\n")


def test_what_cannot_be_read_is_counted(tmp_path):
    """A file that fails when it is read, as on a bad disk; a folder that only root may list."""
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs Linux")
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "bad.py").symlink_to("/proc/self/mem")
    documents, skipped = read(tmp_path)
    assert len(documents) == 1 and skipped == {"unreadable": 1}
    (tmp_path / "sub").mkdir(mode=0)
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "b.py").chmod(0)
    found = read(tmp_path)[1]
    (tmp_path / "sub").chmod(0o700)
    assert found == {"unreadable": 1 if os.getuid() == 0 else 3}


def test_a_source_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with tarfile.open(tmp_path / "s.tar", "w"):
        pass
    monkeypatch.setattr(tarfile, "open", lambda **_: refuse("s.tar"))
    with pytest.raises(ValueError, match=r"s.tar: cannot be read \(Permission denied\)$"):
        read(tmp_path / "s.tar")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        read(tmp_path)


def test_a_thousand_folders_deep():
    """A path may be twice as deep; os.walk of Python 3.11 would call itself too often."""
    top = (
        tempfile.mkdtemp()
    )  # not pytest's directory: shutil.rmtree, which cleans it, calls itself too
    try:
        folder = os.open(top, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("a", dir_fd=folder)
            inner = os.open("a", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        file = os.open("deep.py", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
        os.write(file, b"x = 1\n")
        os.close(file)
        os.close(folder)
        assert [d.content for d in read(top)[0]] == [b"x = 1\n"]
    finally:
        subprocess.run(["rm", "-rf", top], check=True)


def test_a_directory_of_traps(tmp_path):
    """Links in a circle or to nothing, a pipe, large files, a name that is not UTF-8."""
    trap = tmp_path / "in"
    (trap / "sub").mkdir(parents=True)
    (trap / "good.py").write_bytes(b"good = 1\n")
    (trap / "again.py").symlink_to(trap / "good.py")
    (trap / "loop.py").symlink_to("loop.py")
    (trap / "gone.py").symlink_to("nothing")
    (trap / "sub" / "up").symlink_to(trap, target_is_directory=True)
    os.mkfifo(trap / "pipe.py")
    with open(trap / "huge.py", "wb") as f:
        f.truncate(records.LARGEST + 1)
    (trap / "line.py").write_bytes(b"a" * (records.LARGEST - 1))
    with open(os.path.join(os.fsencode(trap), b"odd\xff.py"), "wb") as f:
        f.write(b"odd = 1\n")
    documents, skipped = read(trap)
    assert {len(d.content) for d in documents} == {9, 8, records.LARGEST - 1}
    assert skipped == {"exact duplicate": 1, "not a file": 4, records.TOO_LARGE: 1}


@pytest.mark.parametrize(
    "text",
    [
        "\n",
        " ",
        "a",
        "(*",
        "(*_",
        "a[_",
        "a[",
        "#",
        "# ",
        ";",
        "; ",
        ")",
        "f(",
        "f()",
        "class ",
        "-",
    ],
)
def test_no_text_takes_long_to_recognize(text):
    """A regular expression that backtracks at every place would take hours, not milliseconds."""
    for name in ("a.h", "a.m", "a.v", "a.pl"):
        languages.language_of(name, (text * 20_000).encode())
    issue(
        [
            ("a" * 39, LONG + text * 300_000),
            *[(f"user-{i}", "-".join(f"user-{i}" for i in range(99))) for i in range(200)],
        ]
    )


def test_bombs(tmp_path):
    """100 MB that were packed into a fraction: read in pieces or not at all, and counted."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.py", "w") as f:
            for _ in range(100):
                f.write(bytes(1 << 20))
        archive.writestr("good.py", "good = 1\n")
    documents, skipped = read(tmp_path / "bomb.zip")
    assert [d.content for d in documents] == [b"good = 1\n"] and skipped == {records.TOO_LARGE: 1}
    with gzip.open(tmp_path / "line.jsonl.gz", "wb", compresslevel=1) as f:
        f.write(b'{"content": "')
        for _ in range(100):
            f.write(b"a" * (1 << 20))
        f.write(b'"}\n' + json.dumps({"content": "good = 1\n", "ext": "py"}).encode())
    documents, skipped = read(tmp_path / "line.jsonl.gz")
    assert [d.content for d in documents] == [b"good = 1\n"] and skipped == {records.TOO_LARGE: 1}


MB = 1 << 20


def tar_header(kind, size, name="a.py"):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax(**values):
    """An extended header."""
    content = b""
    for name, value in values.items():
        rest = f" {name.replace('_', '.')}={value}\n".encode()
        content += str(len(rest) + len(str(len(rest) + 9))).encode() + rest
    return tar_header(b"x", len(content)) + padded(content)


def sparse_header():
    """Of an old sparse file; blocks of more numbers follow, as long as each says so."""
    header = bytearray(tar_header(b"S", 0))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


GOOD = tar_header(b"0", 9, "good.py") + padded(b"good = 1\n")
SPARSE = pax(GNU_sparse_major=1, GNU_sparse_minor=0, GNU_sparse_name="a.py", GNU_sparse_realsize=9)
TAR_BOMBS = {  # (what is before, what is repeated 40 times, the error)
    "a GNU name": (
        tar_header(b"L", 40 * MB),
        b"a" * MB,
        "describes a member takes over 1,000,000 bytes",
    ),
    "a GNU link": (tar_header(b"K", 40 * MB), b"a" * MB, "describes a member takes over"),
    "an extended header": (
        tar_header(b"x", 40 * MB) + b"%d path=" % (40 * MB),
        b"a" * MB,
        "describes a member takes over",
    ),
    "a global header": (tar_header(b"g", 40 * MB), b"a" * MB, "describes a member takes over"),
    "names in a row": (b"", tar_header(b"L", MB) + b"a" * MB, "describes a member takes over"),
    "many names": (b"", (tar_header(b"L", 5) + padded(b"a.py\0")) * 20, "recursion depth"),
    "sparse numbers": (
        sparse_header(),
        (b"00000000001\0" * 42 + b"\1".ljust(8, b"\0")) * 512,
        "describes a member takes over",
    ),
    "a sparse map": (
        SPARSE + tar_header(b"0", 40 * MB) + b"9999999\n",
        b"1\n".rjust(256, b"0") * 4096,
        "describes a member takes over",
    ),
    "no number": (SPARSE + tar_header(b"0", 40 * MB), b"9" * MB, "not enough values"),
    "a negative size": (GOOD + tar_header(b"0", -512), GOOD, "negative size"),
    "a negative extended size": (
        GOOD + pax(size=-4096) + tar_header(b"0", 0),
        GOOD,
        "negative size",
    ),
    "a negative name": (
        tar_header(b"L", -513),
        b"a" * MB,
        "describes a member takes over|invalid header",
    ),
    "a size over 64 bits": (tar_header(b"0", 1 << 80), GOOD, "unexpected end of data"),
    "a name over 64 bits": (tar_header(b"L", 1 << 80), GOOD, "describes a member takes over"),
    "a lying size": (tar_header(b"0", 9_000_000), GOOD, "unexpected end of data"),
    "a number of many digits": (
        tar_header(b"x", 6000) + b"9" * 5992 + b" path=a\n" + bytes(144),
        GOOD,
        "digits|invalid header",
    ),
}


@contextlib.contextmanager
def memory_below(most):
    """That what runs inside takes no more than so many bytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak:,} bytes"


@pytest.mark.parametrize("bomb", TAR_BOMBS)
def test_a_tar_bomb_is_one_line_in_little_memory(tmp_path, bomb):
    """Small files that would take gigabytes, end Python's stack, or be read for ever."""
    before, repeated, words = TAR_BOMBS[bomb]
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as f:
        f.write(before)
        for _ in range(40):
            f.write(repeated)
    with (
        memory_below(12 * MB),
        pytest.raises(
            ValueError, match=rf"bomb.tar.gz: damaged \(.*({words}).*\); fetch it again$"
        ),
    ):
        read(tmp_path / "bomb.tar.gz")


def test_global_headers_are_not_kept(tmp_path):
    """All that they say is remembered by tarfile, for ever."""
    with gzip.open(tmp_path / "s.tar.gz", "wb", compresslevel=1) as f:
        for i in range(40):
            content = b"900000 k%02d=" % i
            f.write(tar_header(b"g", 900_000) + padded(content.ljust(899_999, b"v") + b"\n") + GOOD)
        f.write(bytes(10_240))
    with memory_below(12 * MB):
        documents, skipped = read(tmp_path / "s.tar.gz")
    assert [d.content for d in documents] == [b"good = 1\n"] and skipped == {"exact duplicate": 39}


def test_an_xz_archive_may_not_ask_for_gigabytes(tmp_path):
    packed = bytearray(lzma.compress(bytes(MB)))
    packed[16] = 37  # the size of its dictionary: 1.5 GB
    length = 4 * packed[12] + 4
    packed[12 + length - 4 : 12 + length] = zlib.crc32(packed[12 : 12 + length - 4]).to_bytes(
        4, "little"
    )
    (tmp_path / "bomb.tar.xz").write_bytes(packed)
    with (
        memory_below(12 * MB),
        pytest.raises(ValueError, match="bomb.tar.xz: damaged \\(Memory usage limit exceeded"),
    ):
        read(tmp_path / "bomb.tar.xz")


def test_an_xz_archive_in_pieces(tmp_path):
    """As xz writes with several cores, or cat does; zeros may lie between them."""
    whole = GOOD + tar_header(b"0", MB, "large.py") + b"x = 1\n\n\n" * (MB // 8) + bytes(10_240)
    pieces = [lzma.compress(whole[i : i + 99_999]) for i in range(0, len(whole), 99_999)]
    (tmp_path / "s.tar.xz").write_bytes((bytes(1 << 17)).join(pieces) + bytes(8))
    documents, skipped = read(tmp_path / "s.tar.xz")
    assert [len(d.content) for d in documents] == [9, MB] and not skipped
    (tmp_path / "s.tar.xz").write_bytes(b"".join(pieces[:-1]))
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "s.tar.xz")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_a_zip_member_that_lies_about_its_size(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", method) as archive:
        archive.writestr("a.py", bytes(40 * MB))
        archive.writestr("b.py", b"good = 1\n", zipfile.ZIP_DEFLATED)
    content = bytearray((tmp_path / "s.zip").read_bytes())
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "s.zip").write_bytes(content)
    with memory_below(30 * MB), contextlib.suppress(ValueError):
        documents, skipped = read(tmp_path / "s.zip")
        assert [d.content for d in documents] == [b"good = 1\n"] and skipped == {
            "neither stored nor deflated": 1
        }


def test_a_name_of_many_dots():
    with memory_below(MB):
        assert languages.language_of(".a" * 30_000 + ".py") == "python"
