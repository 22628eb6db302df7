"""Labels land on the right characters, the scores are seqeval's, and bad input costs nothing."""

import contextlib
import functools
import hashlib
import itertools
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
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import transformers
from conftest import ROOT, assert_refused, command, program
from hypothesis import example, given
from hypothesis import strategies as st

from corpus.tokenizer import Tokenizer
from pii import (
    finetune,
    peers,
    redact,
    rules,
    scan,
    scores,
    synthesize,
    templates,
    text_files,
    values,
)
from pii.detector import Detector, entities_of
from pii.labels import (
    CATEGORIES,
    LABELS,
    Entity,
    LabelledDocument,
    labels_of,
    read_labelled,
    windows,
)
from starencoder import (
    StarEncoderConfig,
    StarEncoderForPreTraining,
    StarEncoderForTokenClassification,
)
from training import step

CODE = st.text(st.sampled_from("ab1 .@:-_\"'<>\r\n\té中🙂\ufeff"), max_size=60)


class Random:
    """A detector that sees things: anything, anywhere, by the hash of the text; the worst case of a model."""

    def __init__(self, seed=0):
        self.seed = seed

    def find(self, texts):
        found = []
        for text in texts:
            generator = random.Random(
                hashlib.sha256(f"{self.seed} {text}".encode(errors="replace")).digest()
            )
            spans = (
                [sorted(generator.sample(range(len(text) + 1), 2)) for _ in range(3)]
                if len(text) > 2
                else []
            )
            entities = [
                Entity(a, b, generator.choice([c for c in CATEGORIES if c != "IP_ADDRESS"]), 1.0)
                for a, b in spans
            ]
            found.append(rules.join(rules.by_rules(text), entities))
        return found


# ---- labels and synthetic data -------------------------------------------------------------------


@given(length=st.integers(0, 500), room=st.integers(4, 64))
def test_each_token_is_judged_once_and_far_from_an_edge(length, room):
    places = windows(length, room)
    judged = [token for place in places for token in range(place.first, place.last)]
    assert judged == list(range(length))
    for start, end, first, last in places:
        assert 0 <= start <= first <= last <= end <= length
        assert end - start <= room
        assert start == 0 or first - start >= room // 8
        assert end == length or end - last >= room // 8


@functools.cache
def values_of(split):
    return values.Values(split, random.Random(0))


templates_of = functools.cache(templates.templates_of)


@given(seed=st.integers(0, 1000))
def test_synthetic_labels_are_true_and_come_back_from_tokens(small_corpus, seed):
    """What is labelled is there, and the true labels of the tokens spell it, to the character."""
    generator = random.Random(seed)
    language = generator.choice(["python", "c", "html"])
    host = synthesize.Host("def f(x):\n    return x\n" * 5, language)
    drawn = values_of("train")
    drawn.random = generator
    document = synthesize.compose(host, drawn, templates_of("train"))

    text = document["text"]
    spans = []
    for fragment in document["fragments"]:
        start, end = fragment["position"]
        value = text[start:end]
        assert value == fragment["value"]
        assert templates.split_of(value) == "train" or value.startswith("-----BEGIN")
        spans.append((start, end, fragment["category"]))

    offsets = np.array(Tokenizer.from_pretrained(small_corpus).offsets(text))
    labels = labels_of(offsets, sorted(spans))
    found = entities_of(text, offsets, np.eye(len(LABELS))[labels])
    wrong = {entity[:3] for entity in found} ^ set(spans)
    assert len(wrong) <= 0.15 * len(spans) + 2, [(text[a:b], c) for a, b, c in wrong]


def test_splits_share_no_template_and_no_value():
    lines = {}
    drawn = {}
    for split in templates.SPLITS:
        groups = templates_of(split)
        lists = [groups[name] for name in templates.WRITTEN] + groups["assignments"]
        assert all(groups.values())
        lines[split] = {template for group in lists for template in group}
        for category in CATEGORIES:
            assert any(f"{{{category}}}" in template for template in lines[split])
        drawn[split] = {values_of(split).draw(kind) for kind in CATEGORIES for _ in range(50)}
    for sets in (lines, drawn):
        for first, second in itertools.combinations(templates.SPLITS, 2):
            assert sets[first].isdisjoint(sets[second])
    assert all(rules.is_public(values_of("test").draw("IP_ADDRESS")) for _ in range(50))


@pytest.mark.parametrize("group", templates.WRITTEN)
def test_every_template_renders(group):
    """Every place has a value; only the harmless templates hold nothing that is to be found."""
    for split in templates.SPLITS:
        for template in templates_of(split)[group]:
            text, spans = templates.render(template, values_of(split), sign="//")
            assert bool(spans) == (group != "harmless")
            assert all(text[start:end].strip() for start, end, _ in spans)


def test_data_is_not_overwritten(sources, tmp_path):
    sizes = synthesize.synthesize([sources], str(tmp_path), count=20)
    assert sizes == {"train": 15, "validation": 1, "test": 4}
    for split, size in sizes.items():
        assert len(read_labelled(tmp_path / f"{split}.jsonl")) == size
    with pytest.raises(ValueError, match="exists already"):
        synthesize.synthesize([sources], str(tmp_path), count=20)


def test_labelled_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    fragments = [
        {"category": "NAME", "position": [0, 5], "value": "Alice"},
        {"category": "NAME", "position": [3, 7]},  # overlaps
        {"category": "EMAIL", "position": [8, 99]},  # out of range
        {"category": "KEY", "position": [6, 7], "value": "not this"},
        {"category": "AMBIGUOUS", "position": [8, 11]},
    ]
    path.write_text(json.dumps({"text": "Alice & Bob", "fragments": fragments}) + "\n")
    skipped = Counter()
    documents = read_labelled(path, skipped)
    assert documents == [("Alice & Bob", [(0, 5, "NAME"), (8, 11, "AMBIGUOUS")])]
    assert skipped == {
        "fragments that overlap another": 1,
        "fragments that do not fit their text": 2,
    }
    offsets = np.array([(0, 5), (5, 7), (7, 11)])
    labels = labels_of(offsets, documents[0].spans)
    assert labels.tolist() == [LABELS.index("B-NAME"), 0, -100]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"text": 3, "fragments": []}',
        '{"text": "a"}',
        '{"text": "\\ud800", "fragments": []}',
        "[" * 100_000,
        "\xff",
        '{"text": "a", "fragments": [{"position": ["0", 1], "category": "NAME"}]}',
        '{"text": "a", "fragments": [{"position": [0, 1, 2], "category": "NAME"}]}',
        '{"text": "a", "fragments": [{"position": [0, 1], "category": {}}]}',
        '{"text": "a", "fragments": [{"position": [0, 1], "category": []}]}',
    ],
    ids=range(11),
)
def test_what_is_no_labelled_document_is_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="latin-1")
    with pytest.raises(ValueError, match="a.jsonl:1: not a line of"):
        read_labelled(path)


def test_an_unknown_category_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    fragment = {"category": "SHOE", "position": [0, 5]}
    path.write_text(json.dumps({"text": "Alice", "fragments": [fragment]}))
    with pytest.raises(ValueError, match="a.jsonl:1: unknown category 'SHOE'"):
        read_labelled(path)


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("mail bob.smith+x@mail.org, now", ["EMAIL bob.smith+x@mail.org"]),
        ("x@example.com git@github.com:a/b.git a@b logo@2x.png user@localhost", []),
        (
            "at 8.8.8.8:53 and 2001:4860:4860::8888.",
            ["IP_ADDRESS 8.8.8.8", "IP_ADDRESS 2001:4860:4860::8888"],
        ),
        (
            "127.0.0.1 10.0.0.1 192.168.1.1 0.0.0.0 ::1 1.2.3 300.1.1.1 std::vector 12:30:45 1.2.3.4.5 a8.8.8.8",
            [],
        ),
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
    assert len(found) == len(expected) and all(a.startswith(b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a.",
        "@",
        "a@",
        "1",
        "1.",
        ":",
        "-----BEGIN PRIVATE KEY-----",
        "eyJ",
        "-eyJ",
        "sk-",
        "a-",
        "xox",
        '"',
        "<NAME>",
    ],
)
def test_no_text_takes_the_rules_long(text):
    """A regular expression that tries again at every place would take hours here."""
    rules.by_rules(text * 100_000)


class Watched(str):
    """A text that counts the characters which its methods look at: work that is the same on every machine."""

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

    find, rfind, count = _scanned("find"), _scanned("rfind", backwards=True), _scanned("count")

    def __contains__(self, sought):
        return self.find(sought) >= 0

    def __getitem__(self, place):
        piece = Watched(str.__getitem__(self, place))
        Watched.looked_at += len(piece)
        return piece


def growth(work, unit):
    """By what factor the characters looked at grow where `work` is given four times as many units."""
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
def test_a_long_line_takes_time_in_proportion(tmp_path, monkeypatch, unit, behind):
    """Four times as many findings, on one line or on many, are four times the work, not sixteen times."""

    def work(text):
        text = Watched(text + behind)
        monkeypatch.setattr(text_files, "segments", lambda *_: [(text, "utf-8")])
        list(scan.scan(Detector(rules=True), [str(tmp_path / "a.txt")], Counter()))

    (tmp_path / "a.txt").write_text("x")
    assert growth(work, unit) < 6


def test_a_password_without_end_takes_time_in_proportion():
    """Each of many pieces of one long password is widened to all of it."""

    def work(text):
        offsets = np.array([(i, i + 1) for i in range(len(text))])
        labels = np.where(offsets[:, 0] % 4 == 0, LABELS.index("B-PASSWORD"), 0)
        assert len(entities_of(text, offsets, np.eye(len(LABELS))[labels])) == 1

    assert growth(work, "1...") < 6


@given(text=st.text(st.sampled_from("a1.@: -"), max_size=40))
def test_addresses_are_public_and_whole(text):
    for a, b in rules.addresses(text):
        assert (
            rules.is_public(text[a:b])
            and not text[a - 1 : a].isalnum()
            and not text[b : b + 1].isalnum()
        )


spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9), st.sampled_from(CATEGORIES)), max_size=12
)


@given(first=spans, second=spans)
def test_joined_entities_do_not_overlap_and_the_first_list_has_precedence(first, second):
    make = lambda spans: [Entity(a, a + n, c, 1.0) for a, n, c in spans]  # noqa: E731
    first = rules.join(make(first), [])
    joined = rules.join(first, make(second))
    assert all(a.end <= b.start for a, b in zip(joined, joined[1:])) and set(first) <= set(
        joined
    ) <= set(first) | set(make(second))
    for entity in make(second):  # none is left out but for one that is there
        assert any(e.start < entity.end and e.end > entity.start for e in joined)


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # seqeval's, if there is nothing
@given(
    tags=st.lists(st.lists(st.sampled_from(LABELS), max_size=20), min_size=1, max_size=4),
    data=st.data(),
)
def test_scores_are_those_of_seqeval(tags, data):
    from seqeval.metrics import classification_report

    # In its default mode an I- without its B- begins an entity, as here.
    others = [
        data.draw(st.lists(st.sampled_from(LABELS), min_size=len(row), max_size=len(row)))
        for row in tags
    ]
    theirs = classification_report(tags, others, output_dict=True, zero_division=0)

    texts = [str(number) for number in range(len(tags))]
    documents = [LabelledDocument(text, chunks(row)) for text, row in zip(texts, tags)]
    ours = scores.evaluate_detector(
        lambda asked: [chunks(others[int(text)]) for text in asked], documents, at_once=2
    )
    for category in CATEGORIES:
        for name, their_name in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")):
            expected = float(theirs.get(category, {their_name: 0})[their_name])
            assert ours.get(category, {name: 0})[name] == pytest.approx(expected)


def chunks(tags):
    """[(start, end, category), ...] of tags, by the definition.

    A B-, or a change of category, begins one; an O ends it.
    """
    found = []
    start = 0
    before = "O"
    for i, tag in enumerate([*tags, "O"]):
        begins = tag[0] == "B" or tag[2:] != before[2:]
        if before != "O" and (tag == "O" or begins):
            found.append((start, i, before[2:]))
        if tag != "O" and begins:
            start = i
        before = tag
    return found


def test_overlapping_and_ignored_spans():
    expected = [(0, 5, "NAME"), (10, 20, "KEY"), (30, 35, "AMBIGUOUS")]
    found = [
        (0, 4, "NAME"),
        (12, 14, "KEY"),
        (15, 20, "KEY"),
        (31, 33, "KEY"),  # in the ambiguous one
        (40, 41, "NAME"),
    ]
    counts = scores.count_spans(expected, found)
    assert counts["NAME"] == (0, 2, 1, 1, 1)
    assert counts["KEY"] == (0, 2, 1, 1, 2)
    assert counts["KEY"].overlapping == 2
    table = scores.scores(counts)
    assert table["NAME"]["overlap_f1"] == pytest.approx(2 / 3)
    assert table["macro"]["f1"] == 0
    assert table["macro"]["support"] == 2
    assert "EMAIL" not in table


# ---- redaction -------------------------------------------------------------------------------------------------------------------


@given(
    text=CODE,
    encoding=st.sampled_from(["utf-8", "latin-1", "utf-8-sig"]),
    newline=st.sampled_from(["\n", "\r\n"]),
    planted=st.lists(
        st.sampled_from(
            ["a@b.org", "8.8.8.8", "9.9.9.9", "2001:4860:4860::8888", "<NAME>", "AKIA" + "A1" * 8]
        ),
        max_size=5,
    ),
    seed=st.integers(0, 5),
)
@example("é\r\n", "latin-1", "\r\n", ["8.8.8.8", "9.9.9.9", "8.8.8.8"], 0)
def test_redaction(tmp_path_factory, text, encoding, newline, planted, seed):
    """Redacted twice is redacted once; bytes outside of entities stay, in any encoding; the same address gets the same replacement."""
    directory = tmp_path_factory.mktemp("r")
    content = (newline.join([text, *planted]) + newline).encode(encoding, errors="ignore")
    source, once, twice = (str(directory / name) for name in ("a.py", "once.py", "twice.py"))
    with open(source, "wb") as f:
        f.write(content)
    rules = Detector(rules=True)
    redact.redact_file(rules, source, once)
    result = read(once)
    for piece in content.splitlines(
        keepends=True
    ):  # by the rules alone: lines without anything are untouched
        if not rules.find([piece.decode("latin-1")])[0]:
            assert piece in result
    assert not rules.find([result.decode("latin-1")])[0]
    lines = result.decode("latin-1").split(newline)
    replaced = dict(zip(planted, lines[-len(planted) - 1 : -1]))
    for before, after in zip(planted, lines[-len(planted) - 1 : -1]):
        assert replaced[before] == after and (after == before) == (before == "<NAME>")
    for detector in (rules, Random(seed)):
        redact.redact_file(detector, source, once)
        redact.redact_file(detector, once, twice)
        assert read(once) == read(twice)
    assert sorted(os.listdir(directory)) == ["a.py", "once.py", "twice.py"]


def test_what_redaction_reveals_is_found_at_once(tmp_path, monkeypatch):
    """The second of two addresses begins where the first ends; each pass would reveal the next, and a long row take hours."""
    find, passes = Detector.find, []
    monkeypatch.setattr(Detector, "find", lambda *arguments: passes.append(1) or find(*arguments))
    row = f".c@{'d' * 62}.org"
    (tmp_path / "a").write_text("a@b.org" + row * 40)
    counts = redact.redact_file(Detector(rules=True), str(tmp_path / "a"), str(tmp_path / "b"))
    assert counts == {"EMAIL": 41} and read(tmp_path / "b") == b"<EMAIL>" * 41 and len(passes) == 2


def read(path):
    with open(path, "rb") as f:
        return f.read()


@given(text=CODE, seed=st.integers(0, 100))
def test_only_entities_change(text, seed):
    (entities,) = Random(seed).find([text])
    entities = redact.outside_placeholders(text, entities)
    pattern, at = "", 0
    for entity in entities:
        pattern += re.escape(text[at : entity.start]) + ".+?"
        at = entity.end
    assert re.fullmatch(
        pattern + re.escape(text[at:]), redact.redacted(text, entities, {}), re.DOTALL
    )


@given(content=st.binary(max_size=300), size=st.sampled_from([7, 30, 1000]))
def test_segments_are_the_file(content, size):
    import io

    with mock.patch.object(text_files, "SEGMENT", size):
        assert (
            b"".join(
                text.encode(encoding) for text, encoding in text_files.segments(io.BytesIO(content))
            )
            == content
        )


@pytest.mark.parametrize("character", "a漢🙂")
def test_a_line_without_end_is_cut_where_characters_end(monkeypatch, character):
    import io

    monkeypatch.setattr(text_files, "SEGMENT", 1000)
    pieces = list(text_files.segments(io.BytesIO(f"8.8.4.4;{character * 20_000}".encode())))
    assert {encoding for _, encoding in pieces} == {"utf-8"} and pieces[0][0].startswith("8.8.4.4;")
    assert (
        min(len(text.encode()) for text, _ in pieces[:-1]) > 3000
        and max(len(text.encode()) for text, _ in pieces) < 6000
    )


def test_a_private_key_is_not_cut(monkeypatch):
    import io

    monkeypatch.setattr(text_files, "SEGMENT", 1000)
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + "Ab1/\n" * 300 + "-----END RSA PRIVATE KEY-----\n"
    for before in range(0, 1500, 100):
        texts = [
            text
            for text, _ in text_files.segments(
                io.BytesIO(("x\n" * before + key + "y\n" * 900).encode())
            )
        ]
        assert sum(len(rules.by_rules(text)) for text in texts) == 1, before


# ---- programs --------------------------------------------------------------------------------------------------------------------


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
    result = program("pii", "detect", str(files), "--rules-only")
    assert (
        result.returncode == 0 and "mail.org" not in result.stdout
    )  # only its first two characters
    assert len(result.stdout.splitlines()) == 4 and f"{files / 'a.py'}:1:3  bo…" in result.stdout
    assert (
        "found: 3 EMAIL, 1 IP_ADDRESS; left out:" in result.stderr
        and "1 binary" in result.stderr
        and "1 empty" in result.stderr
    )
    assert "1 directories as .git" in result.stderr
    result = program(
        "pii",
        "detect",
        str(files),
        "--rules-only",
        "--json",
        "--show",
        "--fail",
        "--categories",
        "EMAIL",
    )
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 1 and {record["text"] for record in records} == {"bob@mail.org"}
    assert {(os.path.basename(r["file"]), r["line"], r["column"]) for r in records} == {
        ("a.py", 1, 3), ("latin.txt", 1, 7), ("line.json", 1, 2_100_003)
    }  # fmt: skip
    (files / "marked.txt").write_bytes(
        "\ufeffbob@mail.org".encode()
    )  # the byte order mark has no column
    assert (
        f"{files / 'marked.txt'}:1:1  bo…"
        in program("pii", "detect", str(files / "marked.txt"), "--rules-only").stdout
    )
    assert (
        program("pii", "detect", str(files / "empty.py"), "--rules-only", "--fail").returncode == 0
    )
    assert program("pii", "detect", str(files / "a.py"), "--rules-only").stderr.endswith(
        "found: 1 EMAIL\n"
    )  # and nothing left out


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_exemption_is_of_one_line(tmp_path, end):
    path = tmp_path / "a.py"
    path.write_bytes(
        end.join(["# bob@mail.org  pii: allow", "# eve@mail.org", "", "host = '8.8.8.8'"]).encode()
    )
    result = program("pii", "detect", str(path), "--rules-only", "--fail")
    assert (
        result.returncode == 1
        and f"{path}:2:3  ev" in result.stdout
        and f"{path}:4:9  8." in result.stdout
    )
    assert len(result.stdout.splitlines()) == 2
    program(redact, "redact", str(path), "--rules-only", "--in-place")
    assert (
        path.read_bytes()
        == end.join(
            ["# bob@mail.org  pii: allow", "# <EMAIL>", "", "host = '172.16.31.10'"]
        ).encode()
    )


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
        lines = [
            (n, line) for n, line in enumerate(f.read().split("\n"), 1) if "bob@mail.org" in line
        ]
    with mock.patch.object(text_files, "SEGMENT", size):
        found = [
            (n, column)
            for _, n, column, *_ in scan.scan(Detector(rules=True), [str(path)], Counter())
        ]
    ((n, line),) = lines
    assert found == ([] if "pii: allow" in line else [(n, line.index("bob@mail.org") + 1)])


def test_who_reads_the_output_may_have_enough(files):
    (files / "many.py").write_text("# bob@mail.org\n" * 100_000)
    detect = f"{sys.executable} pii.py detect --rules-only {files / 'many.py'}"
    result = subprocess.run(
        ["bash", "-c", f"{detect} | head -n 1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        result.returncode == 141
        and len(result.stdout.splitlines()) == 1
        and "rror" not in result.stderr
    )


def test_redact(files, tmp_path):
    os.chmod(files / "binary.bin", 0o750)
    before = {
        name: read(files / name) for name in ("a.py", "allowed.py", "binary.bin", "sub/latin.txt")
    }
    result = program(redact, "redact", str(files), "--rules-only", "--out", str(tmp_path / "out"))
    assert result.returncode == 0 and "3 EMAIL" in result.stdout
    out = tmp_path / "out"
    assert read(out / "a.py") == b"# <EMAIL>\nx = 1\n" and os.access(out / "a.py", os.X_OK)
    assert read(out / "sub" / "latin.txt") == "Größe <EMAIL>\r\n".encode("latin-1")
    assert read(out / "allowed.py") == b"# bob@mail.org  pii: allow\nhost = '172.16.31.10'\n"
    assert (
        read(out / "binary.bin") == before["binary.bin"]
        and read(out / "empty.py") == b""
        and not (out / ".git").exists()
    )
    assert {name: read(files / name) for name in before} == before
    assert os.access(out / "binary.bin", os.X_OK) and not list(tmp_path.rglob(".redacting*"))
    assert_refused(
        program(redact, "redact", str(files), "--rules-only", "--out", str(out)), "exists already"
    )
    assert_refused(
        program(redact, "redact", str(files), "--rules-only", "--out", ""), "not a directory"
    )
    assert_refused(
        program(redact, "redact", str(files), "--rules-only", "--out", str(files / "out")),
        "lies in",
    )
    assert program(redact, "redact", str(files), "--rules-only", "--in-place").returncode == 0
    assert (
        read(files / "a.py") == read(out / "a.py")
        and os.path.islink(files / "link.py")
        and not list(files.rglob(".redacting*"))
    )
    assert_refused(
        program(redact, "redact", str(files), "--rules-only", "--out", str(out / "a.py")),
        "not a directory",
    )
    (files / "a.py").write_bytes(before["a.py"])
    assert (
        program(
            redact, "redact", *[str(files / "link.py")] * 2, "--rules-only", "--in-place"
        ).returncode
        == 0
    )
    assert read(files / "a.py") == read(out / "a.py") and os.path.islink(files / "link.py")


def test_redaction_in_place_keeps_the_file(tmp_path, monkeypatch):
    """One in which nothing is found is not touched; else only content and time change: not mode, owner, attributes, names."""
    clean, found = tmp_path / "clean.py", tmp_path / "found.py"
    clean.write_text("x = 1\n")
    found.write_text("# bob@mail.org\n")
    for path in (clean, found):
        os.chmod(path, 0o640)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    with contextlib.suppress(OSError):  # where the disk has none
        os.setxattr(found, "user.origin", b"here")
    attributes = os.listxattr(found)
    if os.getuid() == 0:
        os.chown(found, 1234, 4321)
    before = {path: os.stat(path) for path in (clean, found)}
    start = time.time()
    assert program(redact, "redact", str(tmp_path), "--rules-only", "--in-place").returncode == 0
    untouched = os.stat(clean)
    assert (untouched.st_ino, untouched.st_ctime_ns) == (
        before[clean].st_ino,
        before[clean].st_ctime_ns,
    )
    after = os.stat(found)
    assert (
        read(found) == b"# <EMAIL>\n" and after.st_mtime >= start - 1
    )  # make and backups see the change
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before[found].st_mode,
        before[found].st_uid,
        before[found].st_gid,
    )
    assert os.listxattr(found) == attributes


def forbidden(*_):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("why", ["another name", "another's"])
def test_what_a_rename_would_lose_is_written_over(tmp_path, monkeypatch, why):
    """Hard links all get the redacted content; and a file that cannot be given back to its owner stays his."""
    path, other = tmp_path / "a.py", tmp_path / "other name"
    path.write_text("# bob@mail.org at a.very.long.host\n")
    if why == "another name":
        os.link(path, other)
    else:
        monkeypatch.setattr(os, "chown", forbidden)
    inode = os.stat(path).st_ino
    assert program(redact, "redact", str(path), "--rules-only", "--in-place").returncode == 0
    assert read(path) == b"# <EMAIL> at a.very.long.host\n" and os.stat(path).st_ino == inode
    assert why != "another name" or read(other) == read(path)
    assert not list(tmp_path.glob(".redacting*"))


@pytest.mark.parametrize(
    "stop", [OSError(28, "No space left on device"), SystemExit(143), KeyboardInterrupt()]
)
def test_what_is_written_over_is_written_back(tmp_path, monkeypatch, stop):
    path, copy = tmp_path / "a.py", shutil.copyfileobj
    path.write_text("# bob@mail.org\n" * 100)
    os.link(path, tmp_path / "b.py")

    def half(source, file, **kwargs):  # then all is well
        monkeypatch.setattr(shutil, "copyfileobj", copy)
        file.write(source.read()[:50])
        raise stop

    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(type(stop)):
        redact.redact(Detector(rules=True), [str(path)])
    assert read(path) == read(tmp_path / "b.py") == b"# bob@mail.org\n" * 100
    assert sorted(os.listdir(tmp_path)) == ["a.py", "b.py"]


def test_a_file_and_a_directory_of_one_name(tmp_path):
    """Nothing is written where two copies would need one name, whichever comes first, and where a file stands in the way."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two" / "name" / "below").mkdir(parents=True)
    (tmp_path / "one" / "name").write_text("x = 1\n")
    (tmp_path / "two" / "a.py").write_text("x = 1\n")
    (tmp_path / "two" / "name" / "below" / "a.py").write_text("x = 1\n")
    one, two, out = (str(tmp_path / name) for name in ("one", "two", "out"))
    for paths in ([one, two], [two, one], [os.path.join(one, "name"), two]):
        result = program(redact, "redact", *paths, "--rules-only", "--out", out)
        assert_refused(result, os.path.join(out, "name"), "both a file and a directory")
        assert not os.path.exists(out)
    os.mkdir(out)
    (tmp_path / "out" / "name").write_text("mine")
    assert_refused(
        program(redact, "redact", two, "--rules-only", "--out", out), "both a file and a directory"
    )
    os.remove(tmp_path / "out" / "name")
    (tmp_path / "out" / "a.py").symlink_to("nowhere")
    assert_refused(program(redact, "redact", two, "--rules-only", "--out", out), "exists already")
    assert os.listdir(out) == ["a.py"]


# ---- other encodings -------------------------------------------------------------------------------------------------------------

WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_wide_text_is_read(tmp_path, encoding, mark):
    """UTF-16 and UTF-32, of both orders, with a byte order mark and without."""
    path, text = (
        tmp_path / "a.txt",
        f"{mark}Grüße 🙂 an\r\n  bob@mail.org\n" + "eve@mail.org  pii: allow\n" + "x = 1\n" * 3000,
    )
    path.write_bytes(text.encode(encoding))
    result = program("pii", "detect", str(path), "--rules-only", "--fail")
    assert (
        result.returncode == 1
        and f"{path}:2:3  bo" in result.stdout
        and "found: 1 EMAIL\n" in result.stderr
    )
    assert program(redact, "redact", str(path), "--rules-only", "--in-place").returncode == 0
    assert read(path) == text.replace("bob@mail.org", "<EMAIL>").encode(encoding)
    path.write_bytes(f"{mark}bob@mail.org".encode(encoding))
    assert f"{path}:1:1  bo" in program("pii", "detect", str(path), "--rules-only").stdout


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF\2\1\1\0\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xfea\0\0\0",  # a mark and a NUL
        b"\xff\xfe\0\0\xff\xff\xff\xff",  # of UTF-32, which this is none
        "Κόσμε".encode("utf-16-le") + b"\1\0",
        np.arange(500, dtype=np.int16).tobytes(),
        b"one\0two\0three",
    ],
)
def test_binaries_stay_binary(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert "left out: 1 binary" in program("pii", "detect", str(tmp_path), "--rules-only").stderr


@given(
    text=st.text(max_size=60),
    encoding=st.sampled_from(WIDE),
    tail=st.sampled_from([b"", b"\0", b"\x41\xd8"]),
    half=st.sampled_from(["", "\ud83d", "\ude42"]),
    size=st.sampled_from([16, 30, 1000]),
    seed=st.integers(0, 5),
)
def test_redaction_of_wide_text(tmp_path_factory, text, encoding, tail, half, size, seed):
    """Half pairs, half characters at the end, and characters cut by the end of a block come back as they were."""
    directory = tmp_path_factory.mktemp("wide")
    content = (
        f"\ufeff{text}{half} 8.8.8.8\n{half}{text}".replace("\0", "").encode(
            encoding, "surrogatepass"
        )
        + tail
    )
    source, once, twice = (str(directory / name) for name in ("a.py", "once.py", "twice.py"))
    (directory / "a.py").write_bytes(content)
    with mock.patch.object(text_files, "SEGMENT", size):
        with open(source, "rb") as f:
            assert text_files.encoding_of(f) == encoding
            assert (
                b"".join(t.encode(e, "surrogatepass") for t, e in text_files.segments(f, encoding))
                == content
            )
        for detector in (Detector(rules=True), Random(seed)):
            redact.redact_file(detector, source, once, encoding)
            redact.redact_file(detector, once, twice, encoding)
            assert read(once) == read(twice) and read(once).startswith("\ufeff".encode(encoding))
            with open(once, "rb") as f:
                assert text_files.encoding_of(f) == encoding


# ---- files that change -----------------------------------------------------------------------------------------------------------


class Meanwhile(Detector):
    """The rules, and what another program does while they look."""

    def __init__(self, act):
        super().__init__(rules=True)
        self.act = act

    def find(self, texts):
        self.act()
        return super().find(texts)


def test_files_that_vanish_or_change(tmp_path, monkeypatch):
    """Other files are read all the same; what another program wrote is neither lost nor half redacted; all is said."""
    monkeypatch.setattr(text_files, "GATHER", 1)
    names = [f"{i}.py" for i in range(4)]

    def fresh():
        for name in names:
            (tmp_path / name).write_text(f"# bob{name[0]}@mail.org\n")

    def vanish():
        (tmp_path / "1.py").unlink(missing_ok=True)

    fresh()
    skipped = Counter()
    found = [e[-1] for e in scan.scan(Meanwhile(vanish), [str(tmp_path)], skipped)]
    assert found == ["bob0@mail.org", "bob2@mail.org", "bob3@mail.org"] and skipped == {
        "unreadable": 1
    }

    fresh()
    counts, skipped = redact.redact(Meanwhile(vanish), [str(tmp_path)])
    assert (
        counts == {"EMAIL": 3}
        and sum(skipped.values()) == 1
        and sorted(os.listdir(tmp_path)) == ["0.py", "2.py", "3.py"]
    )

    fresh()
    counts, skipped = redact.redact(
        Meanwhile(lambda: (tmp_path / "0.py").write_text("# new\n")), [str(tmp_path)]
    )
    assert counts == {"EMAIL": 3} and skipped == {"changed by another program meanwhile": 1}
    assert (tmp_path / "0.py").read_text() == "# new\n"
    assert sorted(os.listdir(tmp_path)) == names

    def unlink():
        (tmp_path / "0.py").unlink(missing_ok=True)

    fresh()
    counts, skipped = redact.redact(Meanwhile(unlink), [str(tmp_path)])
    assert counts == {"EMAIL": 3} and skipped == {"removed by another program meanwhile": 1}


def test_a_file_that_cannot_be_read_on(tmp_path, monkeypatch):
    """A disk that fails, UTF-32 that ends to be any: what was found is shown, the next file is read, and it is said."""
    wide = "\ufeff".encode("utf-32-le") + ("x = 1  # bob@mail.org\n" * 1000).encode("utf-32-le")
    (tmp_path / "a.py").write_bytes(wide + b"\xff" * 4)
    (tmp_path / "b.py").write_text("# eve@mail.org\n")
    monkeypatch.setattr(text_files, "SEGMENT", 1000)
    skipped = Counter()
    found = [e[-1] for e in scan.scan(Detector(rules=True), [str(tmp_path)], skipped)]
    assert "bob@mail.org" in found and "eve@mail.org" in found and skipped == {"unreadable": 1}
    counts, skipped = redact.redact(Detector(rules=True), [str(tmp_path)])
    assert (
        counts == {"EMAIL": 1}
        and skipped == {"unreadable": 1}
        and read(tmp_path / "a.py") == wide + b"\xff" * 4
    )


@pytest.mark.slow
def test_a_stopped_detection_prints_what_it_found(tmp_path):
    """SIGTERM: whole lines, and a status that says so."""
    (tmp_path / "long.py").write_text("# bob@mail.org 8.8.8.8\n" * 300_000)
    arguments = ["detect", str(tmp_path / "long.py"), "--rules-only", "--json"]
    with open(tmp_path / "found.json", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pii", *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
    while not os.path.getsize(tmp_path / "found.json"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert all(json.loads(line)["line"] for line in read(tmp_path / "found.json").splitlines())


def test_nothing_half_written_is_left(tmp_path):
    (tmp_path / "long.py").write_text("# bob@mail.org 8.8.8.8\n" * 500_000)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pii",
            "redact",
            str(tmp_path / "long.py"),
            "--rules-only",
            "--in-place",
        ],
        cwd=ROOT,
    )
    while not list(tmp_path.glob(".redacting*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM and os.listdir(tmp_path) == ["long.py"]


def test_a_file_that_cannot_be_written_stays(files, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(
        program(redact, "redact", str(files / "a.py"), "--rules-only", "--in-place"),
        "No space left",
    )
    assert read(files / "a.py") == b"# bob@mail.org\nx = 1\n" and not list(
        files.rglob(".redacting*")
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["detect", "/nowhere", "--rules-only"], "no such file"),
        (["detect", "README.md", "--model", "/nowhere"], "python -m pii train"),
        (["detect", "README.md", "--rules-only", "--categories", "SHOE"], "unknown category SHOE"),
        (["detect", "README.md", "--rules-only", "--threshold", "2"], "--threshold"),
        (["redact", "README.md", "--rules-only"], "--out"),
        (["eval", "/nowhere", "--rules-only"], "No such file"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--learning-rate", "nan"], "learning_rate"),
        (["train", "--encoder", "/nowhere"], "/nowhere"),
        (["synthesize", "/nowhere", "--out", "x"], "no such file"),
        (["synthesize", "--out", "x", "--count", "3"], "too few"),
        (["eval", "README.md", "--rules-only"], "README.md:1: not a line of"),
        (["detect", ".", "--rules-only", "--categories", "NAME"], "the rules find only EMAIL"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert_refused(program("pii", *arguments), words)


def test_help_does_not_wait_for_pytorch():
    result = command("-X", "importtime", "-m", "pii", "detect", "--help")
    assert result.returncode == 0
    assert "--rules-only" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "pii" in imported and "torch" not in imported


# ---- training --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(small_corpus, tmp_path_factory):
    """A pretrained encoder, as it were."""
    out = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = Tokenizer.from_pretrained(small_corpus)
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    config = StarEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.1,
        **shape,
    )
    StarEncoderForPreTraining(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def untrained(encoder):
    """A model that has learned nothing, and is sure of it: it sees all kinds of entities everywhere."""
    torch.manual_seed(1)
    model = StarEncoderForTokenClassification.from_pretrained(
        encoder, id2label=dict(enumerate(LABELS))
    )
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5)
    return model.eval(), Tokenizer.from_pretrained(encoder)


PIECES = [
    "a@b.org",
    "8.8.8.8",
    "<NAME>",
    "AKIA" + "A1" * 8,
    "\r",
    "\r\n",
    "pii: allow",
    "x" * 70,
    "...",
    " = '",
    "\ufeff",
]
ANY_TEXT = st.lists(st.text(max_size=20) | st.sampled_from(PIECES), max_size=30).map("".join)
ANY_CODE_POINTS = st.text(
    st.characters(codec=None, categories=None), max_size=60
)  # halves of pairs too


@given(
    text=ANY_TEXT | ANY_CODE_POINTS,
    repeats=st.sampled_from([1, 1, 1, 7]),
    rules=st.booleans(),
    threshold=st.sampled_from([0.0, 0.3, 0.9]),
)
@example("", 1, True, 0.0)
@example("\ud83d\ude42 \ude42\ud83d", 7, True, 0.0)
def test_any_model_finds_entities_in_any_text(untrained, text, repeats, rules, threshold):
    """Sorted, apart, within the text, and each a category's; to replace them changes nothing else."""
    text *= repeats
    (found,) = Detector(*untrained, rules=rules, threshold=threshold).find([text])
    assert all(a.end <= b.start for a, b in zip(found, found[1:]))
    for entity in found:
        assert 0 <= entity.start < entity.end <= len(text) and entity.category in CATEGORIES
        assert threshold <= entity.score < 1.001 and type(entity.start) is type(entity.end) is int
        assert any(c.isalnum() for c in text[entity.start : entity.end])

    entities = redact.outside_placeholders(text, scan.not_allowed(text, found))
    rest, at = redact.redacted(text, entities, {}), 0
    private = redact.PRIVATE[4] + redact.PRIVATE[6]
    for start, end, category, _ in entities:
        assert rest.startswith(text[at:start])
        rest, at = rest[start - at :], end
        (replacement,) = [
            r
            for r in (private if category == "IP_ADDRESS" else [f"<{category}>"])
            if rest.startswith(r)
        ]
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
    """A file redacted again is the same, in any encoding; exempted lines and line ends are."""
    directory = tmp_path_factory.mktemp("untrained")
    content = f"Kate {text}\r\nKate eve@mail.org 9.9.9.9 pii: allow\r\n{text}".encode(
        encoding, errors="ignore"
    )
    (directory / "a.py").write_bytes(content)
    detector = Detector(*untrained, rules=rules)
    with mock.patch.object(text_files, "SEGMENT", size):
        redact.redact(detector, [str(directory / "a.py")], str(directory / "once"))
        redact.redact(detector, [str(directory / "once")], str(directory / "twice"))
    once = read(directory / "once" / "a.py")
    assert once == read(directory / "twice" / "a.py")
    exempted = "eve@mail.org 9.9.9.9 pii: allow\r\n".encode(encoding.replace("-sig", ""))
    assert exempted.removeprefix(b"\xff\xfe\0\0").removeprefix(b"\xff\xfe") in once


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Data in which names have letters of their own."""
    directory, generator = tmp_path_factory.mktemp("labelled"), random.Random(0)
    for split, count in (("train", 60), ("validation", 20)):
        lines = []
        for _ in range(count):
            words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(6)]
            name = "".join(generator.choices("uvwxyz", k=5))
            text = "".join(f"x = {word}\n" for word in words) + f"name = {name}\n"
            fragment = {
                "category": "NAME",
                "position": [len(text) - 6, len(text) - 1],
                "value": name,
            }
            lines.append(json.dumps({"text": text, "fragments": [fragment]}))
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    return str(directory)


def config_of(encoder, labelled, out, **fields):
    fields = (
        dict(
            steps=60,
            batch_size=16,
            micro_batch_size=8,
            eval_every=20,
            learning_rate=3e-3,
            warmup_steps=5,
            dtype="float32",
        )
        | fields
    )
    return finetune.PIIConfig(encoder=encoder, data=labelled, out=str(out), device="cpu", **fields)


@pytest.fixture(scope="module")
def trained(encoder, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pii"
    return str(out), finetune.train_detector(config_of(encoder, labelled, out))


def test_training_learns_and_opens_in_transformers(trained, labelled):
    out, f1 = trained
    assert f1 > 0.8 and os.path.exists(os.path.join(out, "curves.png"))
    detector = Detector.from_pretrained(out, "cpu")
    detector.dtype = "float32"  # as it was evaluated in training
    assert (
        scores.evaluate_detector(
            detector.find, read_labelled(os.path.join(labelled, "validation.jsonl"))
        )["macro"]["f1"]
        >= f1 - 1e-6
    )
    theirs = transformers.BertForTokenClassification.from_pretrained(out).eval()
    assert list(theirs.config.id2label.values()) == LABELS and theirs.config.label2id[
        "B-KEY"
    ] == LABELS.index("B-KEY")
    ids = torch.randint(300, (40,))
    with torch.no_grad():
        ours = detector.model(ids, torch.tensor([0, 40], dtype=torch.int32)).logits
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("a b")["input_ids"]


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bits(trained, encoder, labelled, tmp_path, monkeypatch):
    """Ended by a crash in an evaluation, and by a signal between two: weights and metrics are those of the undisturbed run."""
    out, f1 = trained
    config = config_of(encoder, labelled, tmp_path / "pii")
    evaluate, calls = scores.evaluate_detector, []

    def crash(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return evaluate(*arguments, **kwargs)

    monkeypatch.setattr(scores, "evaluate_detector", crash)
    with pytest.raises(MemoryError):
        finetune.train_detector(config)
    rate = finetune.learning_rate
    monkeypatch.setattr(
        finetune,
        "learning_rate",
        lambda c, step: os.kill(os.getpid(), 15) or rate(c, step) if step == 30 else rate(c, step),
    )
    assert finetune.train_detector(config) is None
    monkeypatch.setattr(finetune, "learning_rate", rate)
    assert finetune.train_detector(config) == f1 == finetune.train_detector(config)
    assert read(os.path.join(config.out, "model.safetensors")) == read(
        os.path.join(out, "model.safetensors")
    )
    lines = [
        [json.loads(line) for line in read(os.path.join(run, "metrics.jsonl")).splitlines()]
        for run in (config.out, out)
    ]
    timeless = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in run]
        for run in lines
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 63


def test_early_stopping_and_random_weights(encoder, labelled, tmp_path):
    config = config_of(
        encoder, labelled, tmp_path / "pii", learning_rate=0.0, patience=2, random_weights=True
    )
    assert finetune.train_detector(config) < 0.1
    assert (
        sum(
            b'"f1"' in line for line in read(os.path.join(config.out, "metrics.jsonl")).splitlines()
        )
        == 3
    )
    with pytest.raises(ValueError, match="holds a run with random_weights True"):
        finetune.train_detector(
            config_of(encoder, labelled, tmp_path / "pii", learning_rate=0.0, patience=2)
        )
    other = shutil.copytree(labelled, tmp_path / "other")
    with pytest.raises(ValueError, match="holds a run with data"):
        finetune.train_detector(
            config_of(
                encoder,
                str(other),
                tmp_path / "pii",
                learning_rate=0.0,
                patience=2,
                random_weights=True,
            )
        )


@pytest.mark.parametrize("begun, chosen", [(True, "bfloat16"), (False, "float32")])
def test_a_fine_tuning_keeps_its_dtype_on_another_cpu(
    encoder, labelled, tmp_path, monkeypatch, begun, chosen
):
    config = config_of(encoder, labelled, tmp_path / "pii", dtype="auto", steps=2, eval_every=2)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: begun)
    finetune.train_detector(config)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: not begun)
    finetune.train_detector(config)
    assert json.loads(read(os.path.join(config.out, "train.json")))["dtype"] == chosen


@pytest.mark.slow
def test_two_ranks_are_one(trained, encoder, labelled, tmp_path):
    """The same losses on two processes, whose micro-batches have unequal counts of labelled tokens."""
    plain = shutil.copytree(
        encoder, tmp_path / "encoder"
    )  # without dropout, which differs from rank to rank
    facts = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(
        json.dumps(facts | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    config = config_of(str(plain), labelled, tmp_path / "pii", steps=6, eval_every=6, batch_size=6)
    alone = config_of(str(plain), labelled, tmp_path / "alone", steps=6, eval_every=6, batch_size=6)
    mp.spawn(_rank, (config, str(tmp_path)), nprocs=2)
    finetune.train_detector(alone)
    losses = [
        [
            json.loads(line)
            for line in read(os.path.join(run.out, "metrics.jsonl")).splitlines()
            if b'"loss"' in line
        ]
        for run in (config, alone)
    ]
    np.testing.assert_allclose(*[[line["loss"] for line in run] for run in losses], rtol=1e-5)
    np.testing.assert_allclose(*[[line["grad_norm"] for line in run] for run in losses], rtol=1e-4)


def _rank(rank, config, directory):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29653",
    }
    torch.set_num_threads(1)
    finetune.train_detector(config)


def test_the_model_alone_is_no_slower_to_be_right_in_company(trained):
    """What is found in a text does not depend on the texts beside it."""
    detector = Detector.from_pretrained(trained[0], "cpu", threshold=0.0)
    detector.dtype = "float32"  # of bfloat16's few values two are often equal, and the shape of a batch decides how they are rounded
    texts = [
        f"x = {w}\nname = {w}\n" * n
        for n, w in ((1, "uvwxy"), (9, "fghab"), (0, ""), (40, "zuvxy"))
    ]
    together = detector.find(texts)
    for text, found in zip(texts, together):
        (alone,) = detector.find([text])
        assert [e[:3] for e in alone] == [e[:3] for e in found]


# ---- peers ---------------------------------------------------------------------------------------


def test_evaluation_by_command(trained, labelled, tmp_path):
    path = os.path.join(labelled, "validation.jsonl")
    out = tmp_path / "scores.json"
    result = program("pii", "eval", path, "--model", trained[0], "--out", str(out))
    assert result.returncode == 0
    assert "| model + rules |" in result.stdout
    assert json.loads(out.read_text())["scores"]["model"]["NAME"]["f1"] > 0.8
    assert_refused(
        program("pii", "eval", path, "--rules-only", "--out", "/nowhere/x.json"), "/nowhere/x.json"
    )


def entry(rule, value, start, end):
    """What CredSweeper is expected to report in line 2 of its sample "a"."""
    place = {
        "line_num": 2,
        "path": "./tests/samples/a",
        "value": value,
        "value_start": start,
        "value_end": end,
    }
    return {"rule": rule, "line_data_list": [place]}


def test_samples_of_credsweeper(tmp_path):
    """A clone as it is laid out: tests/data/output.json and tests/samples."""
    (tmp_path / "tests" / "samples").mkdir(parents=True)
    (tmp_path / "tests" / "data").mkdir()
    (tmp_path / "tests" / "samples" / "a").write_text("first\npassword = 'dog' 1-2-3\n")
    (tmp_path / "tests" / "samples" / "archive").write_bytes(b"\xff\xfe\xfd")
    output = tmp_path / "tests" / "data" / "output.json"
    entries = [
        entry("Password", "dog", 12, 15),
        entry("Secret", "dog", 12, 15),
        entry("UUID", "1-2-3", 17, 22),
    ]
    output.write_text(json.dumps(entries))
    ((text, spans),) = peers.credsweeper_samples(str(tmp_path))
    found = [(text[start:end], category) for start, end, category in spans]
    assert found == [("dog", "PASSWORD"), ("1-2-3", "AMBIGUOUS")]
    assert program("pii", "eval", str(tmp_path), "--rules-only").returncode == 0

    output.write_text('[{"name": "of another version"}]')
    refused = program("pii", "eval", str(tmp_path), "--rules-only")
    assert_refused(refused, "not the tests of CredSweeper")
    output.unlink()
    assert_refused(program("pii", "eval", str(tmp_path), "--rules-only"), "a clone of CredSweeper")


PEER_SAMPLE = """x = 1
aws_access_key_id = 'AKIA§QJ7ZP2XKM4RTVW3N'
mail = 'bob.smith@mail.org'
host = '8.8.4.4'
""".replace("§", "")


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_find_what_they_are_for(name):
    peer = peers.PEERS[name]
    pytest.importorskip(peer.package)
    ((), found) = peer.find(["", PEER_SAMPLE])
    categories = {PEER_SAMPLE[e.start : e.end]: e.category for e in found}
    if "KEY" in peer.categories:
        assert categories["AKIAQJ7ZP2XKM4RTVW3N"] == "KEY"
    else:
        assert categories == {"bob.smith@mail.org": "EMAIL", "8.8.4.4": "IP_ADDRESS"}
