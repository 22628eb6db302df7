"""Rules and models find what is there, in any file; redaction replaces it and touches nothing else.

Files come from strangers: any bytes, any encoding, lines without end, and other programs that
write meanwhile. A detector may be as wrong as it likes.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, program
from hypothesis import example, given
from hypothesis import strategies as st

from pii import redact, rules, scan, text_files
from pii.detector import Detector
from pii.labels import CATEGORIES, LABELS, Entity
from starencoder import StarEncoderConfig, StarEncoderForTokenClassification

CODE = st.text(st.sampled_from("ab1 .@:-_\"'<>\r\n\té中🙂\ufeff"), max_size=60)
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


class Random:
    """A detector that sees anything, anywhere, by the hash of the text: the worst of all models."""

    def __init__(self, seed=0):
        self.seed = seed

    def find(self, texts):
        return [self.find_in(text) for text in texts]

    def find_in(self, text):
        key = hashlib.sha256(f"{self.seed} {text}".encode(errors="replace")).digest()
        generator = random.Random(key)
        entities = []
        for _ in range(3 if len(text) > 2 else 0):
            start, end = sorted(generator.sample(range(len(text) + 1), 2))
            category = generator.choice([c for c in CATEGORIES if c != "IP_ADDRESS"])
            entities.append(Entity(start, end, category, 1.0))
        return rules.join(rules.by_rules(text), entities)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def run(command, *arguments):
    """`python -m pii COMMAND ... --rules-only`."""
    return program("pii", command, *map(str, arguments), "--rules-only")


def found_by_rules(paths, skipped=None, **options):
    """[Finding, ...]"""
    skipped = Counter() if skipped is None else skipped
    return list(scan.scan(Detector(rules=True), [str(path) for path in paths], skipped, **options))


# ---- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mail bob.smith+x@mail.org, now", ["EMAIL bob.smith+x@mail.org"]),
        ("x@example.com git@github.com:a/b.git a@b logo@2x.png user@localhost", []),
        ("at 8.8.8.8:53.", ["IP_ADDRESS 8.8.8.8"]),
        ("at 2001:4860:4860::8888.", ["IP_ADDRESS 2001:4860:4860::8888"]),
        ("127.0.0.1 10.0.0.1 192.168.1.1 0.0.0.0 ::1 1.2.3 300.1.1.1", []),
        ("std::vector 12:30:45 1.2.3.4.5 a8.8.8.8", []),
        ('version = "8.8.8.8"', []),
        ("AKIA" + "A1B2" * 4, ["KEY AKIA" + "A1B2" * 4]),
        ("xAKIA" + "A1B2" * 4, []),
        (
            "-----BEGIN RSA PRIVATE KEY-----\n" + "Ab1/" * 30 + "\n-----END RSA PRIVATE KEY-----",
            ["KEY -----BEGIN"],
        ),
        ("-----BEGIN PUBLIC KEY-----\n" + "Ab1/" * 30 + "\n-----END PUBLIC KEY-----", []),
    ],
)
def test_rules(text, expected):
    found = [f"{e.category} {text[e.start : e.end]}" for e in rules.by_rules(text)]
    assert len(found) == len(expected)
    assert all(a.startswith(b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "text",
    ["a", "a.", "@", "a@", "1", "1.", ":", "-----BEGIN PRIVATE KEY-----"]
    + ["eyJ", "-eyJ", "sk-", "a-", "xox", '"', "<NAME>"],
)
def test_no_text_takes_the_rules_long(text):
    """A regular expression that tries again at every place would take hours here."""
    rules.by_rules(text * 100_000)


@given(text=st.text(st.sampled_from("a1.@: -"), max_size=40))
def test_addresses_are_public_and_whole(text):
    for a, b in rules.addresses(text):
        assert rules.is_public(text[a:b])
        assert not text[a - 1 : a].isalnum()
        assert not text[b : b + 1].isalnum()


ENTITIES = st.lists(
    st.builds(
        lambda start, length, category: Entity(start, start + length, category, 1.0),
        st.integers(0, 60),
        st.integers(1, 9),
        st.sampled_from(CATEGORIES),
    ),
    max_size=12,
)


@given(first=ENTITIES, second=ENTITIES)
def test_joined_entities_do_not_overlap_and_the_first_list_has_precedence(first, second):
    first = rules.join(first)
    joined = rules.join(first, second)
    assert all(a.end <= b.start for a, b in zip(joined, joined[1:]))
    assert set(first) <= set(joined) <= set(first) | set(second)
    for entity in second:  # each that is left out overlaps one that is there
        assert any(e.start < entity.end and e.end > entity.start for e in joined)


# ---- work in proportion to the text ------------------------------------------------------------


class Watched(str):
    """A text that counts the characters that its methods look at: the same on every machine."""

    looked_at = 0

    def _scanned(method, backwards=False):  # noqa: N805
        def look(self, sought, begin=0, end=None):
            begin, end, _ = slice(begin, end).indices(len(self))
            place = getattr(str, method)(self, sought, begin, end)
            if method == "count" or place < 0:
                Watched.looked_at += end - begin
            else:
                Watched.looked_at += end - place if backwards else place - begin
            return place

        return look

    find = _scanned("find")
    rfind = _scanned("rfind", backwards=True)
    count = _scanned("count")

    def __contains__(self, sought):
        return self.find(sought) >= 0

    def __getitem__(self, place):
        piece = Watched(str.__getitem__(self, place))
        Watched.looked_at += len(piece)
        return piece


def growth(work, unit):
    """By what factor the characters looked at grow if `work` gets four times as many units."""
    looked_at = []
    for times in (250, 1000):
        Watched.looked_at = 0
        work(Watched(unit * times))
        looked_at.append(Watched.looked_at)
    return looked_at[1] / max(looked_at[0], 1)


@pytest.mark.parametrize(
    "unit",
    ["bob@mail.org, ", "8.8.8.8 ", "bob@mail.org\n", "bob@mail.org\r", "x@y.org  # pii: allow\n"],
)
@pytest.mark.parametrize("behind", ["", "# pii: allow"])
def test_a_long_line_takes_time_in_proportion(unit, behind):
    """Four times as many findings, on one line or on many, are four times the work, not sixteen."""

    def work(text):
        piece = scan.Piece("a.txt", 0, 0, Watched(text + behind))
        list(scan.find_in(Detector(rules=True), [piece]))

    assert growth(work, unit) < 6


# ---- texts in pieces ---------------------------------------------------------------------------


def pieces_of(content, encoding="utf-8", size=1000):
    return list(text_files.pieces(io.BytesIO(content), encoding, size))


@given(content=st.binary(max_size=300), size=st.sampled_from([7, 30, 1000]))
def test_pieces_are_the_file(content, size):
    pieces = pieces_of(content, size=size)
    assert b"".join(text.encode(encoding) for text, encoding in pieces) == content


@pytest.mark.parametrize("character", "a漢🙂")
def test_a_line_without_end_is_cut_where_characters_end(character):
    pieces = pieces_of(f"8.8.4.4;{character * 20_000}".encode())
    assert {encoding for _, encoding in pieces} == {"utf-8"}
    assert pieces[0][0].startswith("8.8.4.4;")
    assert min(len(text) for text, _ in pieces[:-1]) > 3000
    assert max(len(text) for text, _ in pieces) < 6000


def test_a_line_of_words_is_cut_between_them():
    pieces = pieces_of(b"bob@mail.org," * 2000)
    assert len(pieces) > 5
    assert all(text.endswith(",") for text, _ in pieces)


def test_lines_of_another_encoding_stay_with_it():
    """One line of Latin-1 does not make a long file of UTF-8 unreadable, nor does a half line."""
    utf8 = "Größe\n" * 300
    pieces = pieces_of(utf8.encode() + "Größe\n".encode("latin-1") + utf8.encode() + b"caf\xe9")
    assert {encoding for _, encoding in pieces} == {"utf-8", "latin-1"}
    assert "Größe\n" in pieces[0][0]
    assert pieces[-1][0].endswith("café")


def test_a_private_key_is_not_cut():
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "Ab1/\n" * 300 + "-----END RSA PRIVATE KEY-----"
    for before in range(0, 1500, 100):
        for behind in ("\n" + "y\n" * 900, "", "'"):  # a last line may have no end
            pieces = pieces_of(("x\n" * before + key + behind).encode())
            assert sum(len(rules.by_rules(text)) for text, _ in pieces) == 1, (before, behind)


# ---- detect ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A directory of everything that a repository may hold."""
    root = tmp_path / "repository"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("bob@mail.org")
    (root / "a.py").write_text("# bob@mail.org\nx = 1\n")
    (root / "allowed.py").write_text("# bob@mail.org  pii: allow\nhost = '8.8.8.8'\n")
    (root / "sub" / "latin.txt").write_bytes("Größe bob@mail.org\r\n".encode("latin-1"))
    (root / "binary.bin").write_bytes(b"a\0bob@mail.org")
    (root / "empty.py").write_bytes(b"")
    (root / "link.py").symlink_to("a.py")
    (root / "line.json").write_text("[" + "1, " * 700_000 + '"bob@mail.org"]')
    os.chmod(root / "a.py", 0o755)
    return root


def test_detect(files):
    result = run("detect", files)
    assert result.returncode == 0
    assert "mail.org" not in result.stdout  # only its first two characters
    assert len(result.stdout.splitlines()) == 4
    assert f"{files / 'a.py'}:1:3  bo…" in result.stdout
    assert "found: 3 EMAIL, 1 IP_ADDRESS; left out:" in result.stderr
    for left_out in ("1 binary", "1 empty", "1 directories as .git"):
        assert left_out in result.stderr

    result = run("detect", files, "--json", "--fail", "--categories", "EMAIL")
    assert result.returncode == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["text"] for record in records} == {"bo…"}
    places = {(os.path.basename(r["file"]), r["line"], r["column"]) for r in records}
    assert places == {("a.py", 1, 3), ("latin.txt", 1, 7), ("line.json", 1, 2_100_003)}

    assert run("detect", files / "empty.py", "--fail").returncode == 0
    assert run("detect", files / "a.py").stderr.endswith("found: 1 EMAIL\n")  # nothing left out


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_exemption_is_of_one_line(tmp_path, end):
    path = tmp_path / "a.py"
    lines = ["# bob@mail.org  pii: allow", "# eve@mail.org", "", "host = '8.8.8.8'"]
    path.write_bytes(end.join(lines).encode())
    result = run("detect", path, "--fail")
    assert result.returncode == 1
    assert f"{path}:2:3  ev" in result.stdout
    assert f"{path}:4:9  8." in result.stdout
    assert len(result.stdout.splitlines()) == 2

    run("redact", path, "--in-place")
    lines = ["# bob@mail.org  pii: allow", "# <EMAIL>", "", "host = '172.16.31.10'"]
    assert read(path) == end.join(lines).encode()


@given(
    before=st.text(st.sampled_from("a \n\r\v\f\x1c\x85\u2028"), max_size=150),
    behind=st.text(st.sampled_from("a \n\r\v\f\x1c\x85\u2028"), max_size=150),
    allowed=st.booleans(),
    size=st.sampled_from([170, 200, 1000]),  # a line of more than two of these is cut
)
@example("\r" * 169 + "\r\n", "", False, 170)
@example("a" + "\r" * 169, "\n" * 100, False, 170)
def test_lines_are_those_of_open(tmp_path_factory, before, behind, allowed, size):
    """Numbers, columns and exemptions, whatever the line ends and wherever a long file is cut."""
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(f"{before} bob@mail.org {behind}{'pii: allow' if allowed else ''}".encode())
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    ((number, line),) = [(n, line) for n, line in enumerate(lines, 1) if "bob@mail.org" in line]
    expected = [] if "pii: allow" in line else [(number, line.index("bob@mail.org") + 1)]
    found = found_by_rules([path], piece_size=size)
    assert [(finding.line, finding.column) for finding in found] == expected


@pytest.mark.slow
def test_who_reads_the_output_may_have_enough(files):
    (files / "many.py").write_text("# bob@mail.org\n" * 100_000)
    detect = f"{sys.executable} -m pii detect --rules-only {files / 'many.py'}"
    shell = ["bash", "-c", f"{detect} | head -n 1; exit ${{PIPESTATUS[0]}}"]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 141
    assert len(result.stdout.splitlines()) == 1
    assert "rror" not in result.stderr


@pytest.mark.slow
def test_a_stopped_detection_prints_what_it_found(tmp_path):
    """SIGTERM: whole lines, and a status that says so."""
    (tmp_path / "long.py").write_text("# bob@mail.org 8.8.8.8\n" * 300_000)
    command = [sys.executable, "-m", "pii", "detect", str(tmp_path / "long.py")]
    with open(tmp_path / "found.json", "wb") as out:
        process = subprocess.Popen(
            [*command, "--rules-only", "--json"], cwd=ROOT, stdout=out, stderr=subprocess.DEVNULL
        )
    while not os.path.getsize(tmp_path / "found.json"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert all(json.loads(line)["line"] for line in read(tmp_path / "found.json").splitlines())


# ---- other encodings ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_wide_text_is_read(tmp_path, encoding, mark):
    """UTF-16 and UTF-32, of both orders, with a byte order mark and without."""
    path = tmp_path / "a.txt"
    text = f"{mark}Grüße 🙂 an\r\n  bob@mail.org\neve@mail.org  pii: allow\n" + "x = 1\n" * 3000
    path.write_bytes(text.encode(encoding))
    result = run("detect", path, "--fail")
    assert result.returncode == 1
    assert f"{path}:2:3  bo" in result.stdout
    assert "found: 1 EMAIL\n" in result.stderr
    assert run("redact", path, "--in-place").returncode == 0
    assert read(path) == text.replace("bob@mail.org", "<EMAIL>").encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
def test_a_byte_order_mark_has_no_column(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffbob@mail.org".encode(encoding))
    assert [(found.line, found.column) for found in found_by_rules([path])] == [(1, 1)]


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF\2\1\1\0\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xfea\0\0\0",  # a mark and a NUL
        b"\xff\xfe\0\0\xff\xff\xff\xff",  # the mark of UTF-32, which the rest is not
        "Κόσμε".encode("utf-16-le") + b"\1\0",
        np.arange(500, dtype=np.int16).tobytes(),
        b"one\0two\0three",
    ],
)
def test_binaries_stay_binary(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    skipped = Counter()
    assert not found_by_rules([tmp_path], skipped)
    assert skipped == {"binary": 1}


@given(
    text=st.text(max_size=60),
    encoding=st.sampled_from(WIDE),
    tail=st.sampled_from([b"", b"\0", b"\x41\xd8"]),
    half=st.sampled_from(["", "\ud83d", "\ude42"]),
    size=st.sampled_from([16, 30, 1000]),
    seed=st.integers(0, 5),
)
def test_redaction_of_wide_text(tmp_path_factory, text, encoding, tail, half, size, seed):
    """Half pairs, half characters at the end and those that a block cuts come back as they were."""
    directory = tmp_path_factory.mktemp("wide")
    text = f"\ufeff{text}{half} 8.8.8.8\n{half}{text}".replace("\0", "")
    content = text.encode(encoding, "surrogatepass") + tail
    source, once, twice = (str(directory / name) for name in ("a.py", "once.py", "twice.py"))
    (directory / "a.py").write_bytes(content)
    assert text_files.encoding_of(io.BytesIO(content)) == encoding
    pieces = pieces_of(content, encoding, size)
    assert b"".join(t.encode(e, "surrogatepass") for t, e in pieces) == content

    for detector in (Detector(rules=True), Random(seed)):
        redact.redact_file(detector, source, once, encoding, size)
        redact.redact_file(detector, once, twice, encoding, size)
        assert read(once) == read(twice)
        assert read(once).startswith("\ufeff".encode(encoding))
        assert text_files.encoding_of(io.BytesIO(read(once))) == encoding


# ---- redaction ---------------------------------------------------------------------------------

PLANTED = ["a@b.org", "8.8.8.8", "9.9.9.9", "2001:4860:4860::8888", "<NAME>", "AKIA" + "A1" * 8]


@given(
    text=CODE,
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-8-sig"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    planted=st.lists(st.sampled_from(PLANTED), max_size=5),
    seed=st.integers(0, 5),
)
@example("é\r\n", "latin-1", "\r\n", ["8.8.8.8", "9.9.9.9", "8.8.8.8"], 0)
def test_redaction(tmp_path_factory, text, encoding, newline, planted, seed):
    """Redacted twice is redacted once; other bytes stay; one address gets one replacement."""
    directory = tmp_path_factory.mktemp("r")
    content = (newline.join([text, *planted]) + newline).encode(encoding, errors="ignore")
    source, once, twice = (str(directory / name) for name in ("a.py", "once.py", "twice.py"))
    (directory / "a.py").write_bytes(content)
    by_rules = Detector(rules=True)
    redact.redact_file(by_rules, source, once)
    result = read(once)
    for line in content.splitlines(keepends=True):
        if not by_rules.find([line.decode("latin-1")])[0]:
            assert line in result
    assert not by_rules.find([result.decode("latin-1")])[0]

    lines = result.decode("latin-1").split(newline)[-len(planted) - 1 : -1]
    replaced = dict(zip(planted, lines))
    for before, after in zip(planted, lines):
        assert replaced[before] == after
        assert (after == before) == (before == "<NAME>")

    for detector in (by_rules, Random(seed)):
        redact.redact_file(detector, source, once)
        redact.redact_file(detector, once, twice)
        assert read(once) == read(twice)
    assert sorted(os.listdir(directory)) == ["a.py", "once.py", "twice.py"]


@given(text=CODE, seed=st.integers(0, 100))
def test_only_entities_change(text, seed):
    (entities,) = Random(seed).find([text])
    entities = redact.outside_placeholders(text, entities)
    pattern = ""
    at = 0
    for entity in entities:
        pattern += re.escape(text[at : entity.start]) + ".+?"
        at = entity.end
    pattern += re.escape(text[at:])
    assert re.fullmatch(pattern, redact.redacted(text, entities, {}), re.DOTALL)


class Acting(Detector):
    """The rules, and something that is done each time before they look."""

    def __init__(self, act):
        super().__init__(rules=True)
        self.act = act

    def find(self, texts):
        self.act()
        return super().find(texts)


def test_what_redaction_reveals_is_found_at_once(tmp_path):
    """The second of two addresses begins where the first ends.

    If each pass revealed only the next, a long row would take hours.
    """
    passes = []
    (tmp_path / "a").write_text("a@b.org" + f".c@{'d' * 62}.org" * 40)
    detector = Acting(lambda: passes.append(1))
    counts = redact.redact_file(detector, str(tmp_path / "a"), str(tmp_path / "b"))
    assert counts == {"EMAIL": 41}
    assert read(tmp_path / "b") == b"<EMAIL>" * 41
    assert len(passes) == 2


def test_redact_copies(files, tmp_path):
    os.chmod(files / "binary.bin", 0o750)
    names = ("a.py", "allowed.py", "binary.bin", "sub/latin.txt")
    before = {name: read(files / name) for name in names}
    out = tmp_path / "out"
    result = run("redact", files, "--out", out)
    assert result.returncode == 0
    assert "3 EMAIL" in result.stdout
    assert read(out / "a.py") == b"# <EMAIL>\nx = 1\n"
    assert read(out / "sub" / "latin.txt") == "Größe <EMAIL>\r\n".encode("latin-1")
    assert read(out / "allowed.py") == b"# bob@mail.org  pii: allow\nhost = '172.16.31.10'\n"
    assert read(out / "binary.bin") == before["binary.bin"]
    assert read(out / "empty.py") == b""
    assert os.access(out / "a.py", os.X_OK)
    assert os.access(out / "binary.bin", os.X_OK)
    assert not (out / ".git").exists()
    assert {name: read(files / name) for name in names} == before
    assert not list(tmp_path.rglob(".redacting*"))

    assert_refused(run("redact", files, "--out", out), "exists already")
    assert_refused(run("redact", files, "--out", ""), "not a directory")
    assert_refused(run("redact", files, "--out", files / "out"), "lies in")
    assert_refused(run("redact", files, "--out", out / "a.py"), "not a directory")


def test_redact_in_place(files):
    assert run("redact", files, "--in-place").returncode == 0
    assert read(files / "a.py") == b"# <EMAIL>\nx = 1\n"
    assert os.path.islink(files / "link.py")
    assert not list(files.rglob(".redacting*"))

    # A link, named twice: the file that it names is redacted, and stays one.
    (files / "a.py").write_text("# bob@mail.org\nx = 1\n")
    assert run("redact", *[files / "link.py"] * 2, "--in-place").returncode == 0
    assert read(files / "a.py") == b"# <EMAIL>\nx = 1\n"
    assert os.path.islink(files / "link.py")


def test_redaction_in_place_keeps_the_file(tmp_path):
    """A file in which nothing is found is not touched; of any other, content and time change.

    Not its mode, owner or attributes.
    """
    clean = tmp_path / "clean.py"
    dirty = tmp_path / "dirty.py"
    clean.write_text("x = 1\n")
    dirty.write_text("# bob@mail.org\n")
    for path in (clean, dirty):
        os.chmod(path, 0o640)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    with contextlib.suppress(OSError):  # if the disk has none
        os.setxattr(dirty, "user.origin", b"here")
    attributes = os.listxattr(dirty)
    if os.getuid() == 0:
        os.chown(dirty, 1234, 4321)
    before = {path: os.stat(path) for path in (clean, dirty)}
    start = time.time()
    assert run("redact", tmp_path, "--in-place").returncode == 0

    after = os.stat(clean)
    assert after.st_ino == before[clean].st_ino
    assert after.st_ctime_ns == before[clean].st_ctime_ns
    assert read(dirty) == b"# <EMAIL>\n"
    after = os.stat(dirty)
    assert after.st_mtime >= start - 1  # make and backups see the change
    assert after.st_mode == before[dirty].st_mode
    assert after.st_uid == before[dirty].st_uid
    assert after.st_gid == before[dirty].st_gid
    assert os.listxattr(dirty) == attributes


@pytest.mark.parametrize("why", ["another name", "another's"])
def test_what_a_rename_would_lose_is_written_over(tmp_path, monkeypatch, why):
    """All hard links get the redacted content, and a file of another owner stays theirs."""

    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "a.py"
    other = tmp_path / "other name"
    path.write_text("# bob@mail.org at a.very.long.host\n")
    if why == "another name":
        os.link(path, other)
    else:
        monkeypatch.setattr(os, "chown", forbidden)
    inode = os.stat(path).st_ino
    assert run("redact", path, "--in-place").returncode == 0
    assert read(path) == b"# <EMAIL> at a.very.long.host\n"
    assert os.stat(path).st_ino == inode
    assert why != "another name" or read(other) == read(path)
    assert not list(tmp_path.glob(".redacting*"))


@pytest.mark.parametrize(
    "stop", [OSError(28, "No space left on device"), SystemExit(143), KeyboardInterrupt()]
)
def test_what_is_written_over_is_written_back(tmp_path, monkeypatch, stop):
    copy = shutil.copyfileobj
    path = tmp_path / "a.py"
    path.write_text("# bob@mail.org\n" * 100)
    os.link(path, tmp_path / "b.py")

    def half(source, file, **kwargs):  # the next time all is well
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        file.write(source.read()[:50])
        raise stop

    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(type(stop)):
        redact.redact(Detector(rules=True), [str(path)])
    assert read(path) == read(tmp_path / "b.py") == b"# bob@mail.org\n" * 100
    assert sorted(os.listdir(tmp_path)) == ["a.py", "b.py"]


def test_a_file_and_a_directory_of_one_name(tmp_path):
    """Nothing is written if two copies would need one name, or if a file stands in the way."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two" / "name" / "below").mkdir(parents=True)
    (tmp_path / "one" / "name").write_text("x = 1\n")
    (tmp_path / "two" / "a.py").write_text("x = 1\n")
    (tmp_path / "two" / "name" / "below" / "a.py").write_text("x = 1\n")
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    for paths in ([one, two], [two, one], [one / "name", two]):
        result = run("redact", *paths, "--out", out)
        assert_refused(result, str(out / "name"), "both a file and a directory")
        assert not out.exists()
    assert_refused(run("redact", one / "name", one, "--out", out), "two files")

    out.mkdir()
    (out / "name").write_text("mine")
    assert_refused(run("redact", two, "--out", out), "both a file and a directory")
    (out / "name").unlink()
    (out / "a.py").symlink_to("nowhere")
    assert_refused(run("redact", two, "--out", out), "exists already")
    assert os.listdir(out) == ["a.py"]


# ---- files that change, and disks that fail ----------------------------------------------------


def test_files_that_vanish_or_change(tmp_path):
    """Other files are read all the same; what another program wrote stays; all is said."""
    names = [f"{i}.py" for i in range(4)]

    def fresh():
        for name in names:
            (tmp_path / name).write_text(f"# bob{name[0]}@mail.org\n")
        return [str(tmp_path)]

    def vanish(name):
        (tmp_path / name).unlink(missing_ok=True)

    skipped = Counter()
    found = scan.scan(Acting(lambda: vanish("1.py")), fresh(), skipped, gather=1)
    assert [f.value for f in found] == ["bob0@mail.org", "bob2@mail.org", "bob3@mail.org"]
    assert skipped == {"unreadable": 1}

    counts, skipped = redact.redact(Acting(lambda: vanish("1.py")), fresh())
    assert counts == {"EMAIL": 3}
    assert sum(skipped.values()) == 1
    assert sorted(os.listdir(tmp_path)) == ["0.py", "2.py", "3.py"]

    change = Acting(lambda: (tmp_path / "0.py").write_text("# new\n"))
    counts, skipped = redact.redact(change, fresh())
    assert counts == {"EMAIL": 3}
    assert skipped == {"changed by another program meanwhile": 1}
    assert (tmp_path / "0.py").read_text() == "# new\n"
    assert sorted(os.listdir(tmp_path)) == names

    counts, skipped = redact.redact(Acting(lambda: vanish("0.py")), fresh())
    assert counts == {"EMAIL": 3}
    assert skipped == {"removed by another program meanwhile": 1}


def test_a_file_that_cannot_be_read_on(tmp_path):
    """UTF-32 that ends to be any: what was found is shown, and the next file is read."""
    wide = ("\ufeff" + "x = 1  # bob@mail.org\n" * 1000).encode("utf-32-le") + b"\xff" * 4
    (tmp_path / "a.py").write_bytes(wide)
    (tmp_path / "b.py").write_text("# eve@mail.org\n")
    skipped = Counter()
    found = found_by_rules([tmp_path], skipped, piece_size=1000)
    assert {finding.value for finding in found} == {"bob@mail.org", "eve@mail.org"}
    assert skipped == {"unreadable": 1}

    counts, skipped = redact.redact(Detector(rules=True), [str(tmp_path)], piece_size=1000)
    assert counts == {"EMAIL": 1}
    assert skipped == {"unreadable": 1}
    assert read(tmp_path / "a.py") == wide


@pytest.mark.slow
def test_nothing_half_written_is_left(tmp_path):
    (tmp_path / "long.py").write_text("# bob@mail.org 8.8.8.8\n" * 500_000)
    command = [sys.executable, "-m", "pii", "redact", str(tmp_path / "long.py")]
    process = subprocess.Popen([*command, "--rules-only", "--in-place"], cwd=ROOT)
    while not list(tmp_path.glob(".redacting*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == ["long.py"]


def test_a_file_that_cannot_be_written_stays(files, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run("redact", files / "a.py", "--in-place"), "No space left")
    assert read(files / "a.py") == b"# bob@mail.org\nx = 1\n"
    assert not list(files.rglob(".redacting*"))


# ---- any model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tokenizer):
    """A model that has learned nothing, and sees all kinds of entities everywhere."""
    torch.manual_seed(1)
    config = StarEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        id2label=dict(enumerate(LABELS)),
    )
    model = StarEncoderForTokenClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5)
    return model.eval(), tokenizer


PIECES = ["a@b.org", "8.8.8.8", "<NAME>", "AKIA" + "A1" * 8, "\r", "\r\n", "\ufeff"]
PIECES += ["pii: allow", "x" * 70, "...", " = '"]
ANY_TEXT = st.lists(st.text(max_size=20) | st.sampled_from(PIECES), max_size=30).map("".join)
ANY_CODE_POINTS = st.text(st.characters(codec=None, categories=None), max_size=60)  # halves too


@given(
    text=ANY_TEXT | ANY_CODE_POINTS,
    repeats=st.sampled_from([1, 1, 1, 7]),
    rules=st.booleans(),
    threshold=st.sampled_from([0.0, 0.3, 0.9]),
)
@example("", 1, True, 0.0)
@example("\ud83d\ude42 \ude42\ud83d", 7, True, 0.0)
def test_any_model_finds_entities_in_any_text(untrained, text, repeats, rules, threshold):
    """Sorted, apart, within the text, each a category's; replacing them changes nothing else."""
    text *= repeats
    (found,) = Detector(*untrained, rules=rules, threshold=threshold).find([text])
    assert all(a.end <= b.start for a, b in zip(found, found[1:]))
    for entity in found:
        assert 0 <= entity.start < entity.end <= len(text)
        assert entity.category in CATEGORIES
        assert threshold <= entity.score < 1.001
        assert type(entity.start) is type(entity.end) is int
        assert any(c.isalnum() for c in text[entity.start : entity.end])

    entities = redact.outside_placeholders(text, scan.not_allowed(text, found))
    rest = redact.redacted(text, entities, {})
    at = 0
    for start, end, category, _ in entities:
        assert rest.startswith(text[at:start])
        rest = rest[start - at :]
        at = end
        choices = [f"<{category}>"]
        if category == "IP_ADDRESS":
            choices = redact.PRIVATE[4] + redact.PRIVATE[6]
        (replacement,) = [choice for choice in choices if rest.startswith(choice)]
        rest = rest.removeprefix(replacement)
    assert rest == text[at:]


@given(
    text=ANY_TEXT,
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-be", "utf-32"]),
    size=st.sampled_from([40, 1000]),
    rules=st.booleans(),
)
def test_what_any_model_redacts_it_leaves_alone(
    untrained, tmp_path_factory, text, encoding, size, rules
):
    """A file redacted again is the same, in any encoding; exempted lines and line ends stay."""
    directory = tmp_path_factory.mktemp("untrained")
    exempted = "eve@mail.org 9.9.9.9 pii: allow\r\n"
    text = f"Kate {text}\r\nKate {exempted}{text}"
    (directory / "a.py").write_bytes(text.encode(encoding, errors="ignore"))
    detector = Detector(*untrained, rules=rules)
    for source, out in (("a.py", "once"), ("once", "twice")):
        redact.redact(detector, [str(directory / source)], str(directory / out), size)
    once = read(directory / "once" / "a.py")
    assert once == read(directory / "twice" / "a.py")
    marks = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "utf-8-sig": "utf-8"}
    assert exempted.encode(marks.get(encoding, encoding)) in once
