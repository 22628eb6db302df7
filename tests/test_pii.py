"""Labels land on the right characters, the scores are seqeval's, and bad input costs nothing."""

import functools
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from conftest import assert_refused, command, program
from hypothesis import given
from hypothesis import strategies as st

from corpus.tokenizer import Tokenizer
from finetune.tokens import token_windows
from pii import (
    finetune,
    hosts,
    peers,
    rules,
    scores,
    synthesize,
    templates,
    values,
)
from pii.detector import SECRETS, entities_of
from pii.labels import (
    CATEGORIES,
    LABELS,
    LabelledDocument,
    labels_of,
    read_labelled,
)

# ---- labels and synthetic data -------------------------------------------------------------------


@given(length=st.integers(0, 500), room=st.integers(4, 64))
def test_each_token_is_judged_once_and_far_from_an_edge(length, room):
    places = token_windows(length, room)
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
    language = generator.choice(["python", "c", "html", "json"])
    host = hosts.Host("def f(x):\n    return x\n" * 5, language)
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
    # The ends of secrets are those of candidates.
    wanted = {span for span in spans if span[2] not in SECRETS}
    wrong = {entity[:3] for entity in found} ^ wanted
    assert len(wrong) <= 0.15 * len(wanted) + 2, [(text[a:b], c) for a, b, c in wrong]


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
    with pytest.raises(ValueError, match="a.jsonl:1: "):
        read_labelled(path)


def test_an_unknown_category_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    fragment = {"category": "SHOE", "position": [0, 5]}
    path.write_text(json.dumps({"text": "Alice", "fragments": [fragment]}))
    with pytest.raises(ValueError, match="a.jsonl:1: unknown category 'SHOE'"):
        read_labelled(path)


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


# ---- commands ------------------------------------------------------------------------------------


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


def test_a_missing_encoder_is_one_line(monkeypatch, tmp_path):
    """The default data, which are missing too, are made before. Here they are few."""
    monkeypatch.chdir(tmp_path)
    few = functools.partial(synthesize.synthesize, count=200)
    monkeypatch.setattr(finetune, "synthesize", few)
    assert_refused(program("pii", "train", "--encoder", "/nowhere"), "/nowhere")
    assert (tmp_path / "corpora" / "pii" / "train.jsonl").exists()


def test_help_does_not_wait_for_pytorch():
    result = command("-X", "importtime", "-m", "pii", "detect", "--help")
    assert result.returncode == 0
    assert "--rules-only" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "pii" in imported and "torch" not in imported


# ---- peers ---------------------------------------------------------------------------------------


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
