"""Labels land on the right characters, redaction touches nothing else, the figures are seqeval's, and bad input costs nothing."""

import contextlib
import hashlib
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
from conftest import ROOT, assert_refused, program
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
from pii.labels import CATEGORIES, LABELS, Entity, labels_of, read_labelled, windows
from starencoder import (
    StarEncoderConfig,
    StarEncoderForPreTraining,
    StarEncoderForTokenClassification,
)
from training import step

# ---- labels ----------------------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 500), room=st.integers(4, 64))
def test_each_token_is_judged_once_and_far_from_an_edge(length, room):
    places = windows(length, room)
    assert [t for *_, first, last in places for t in range(first, last)] == list(range(length))
    for start, end, first, last in places:
        assert 0 <= start <= first <= last <= end <= length and end - start <= room
        assert start == 0 or first - start >= room // 8
        assert end == length or end - last >= room // 8


@given(seed=st.integers(0, 1000))
def test_synthetic_labels_are_true_and_come_back_from_tokens(small_corpus, seed):
    """What is said to be there is there; and what the true labels of the tokens spell are the entities, to the character."""
    generator = random.Random(seed)
    values, groups = VALUES["train"], templates.templates("train")
    values.random = generator
    document = synthesize.compose(
        "def f(x):\n    return x\n" * 5, generator.choice(["python", "c", "html"]), values, groups
    )
    text, spans = document["text"], []
    for fragment in document["fragments"]:
        a, b = fragment["position"]
        assert (
            text[a:b] == fragment["value"]
            and templates.split_of(text[a:b]) == "train"
            or fragment["value"].startswith("-----BEGIN")
        )
        spans.append((a, b, fragment["category"]))
    tokenizer = Tokenizer.from_pretrained(small_corpus)
    offsets = np.array(tokenizer.offsets(text))
    labels = labels_of(offsets, sorted(spans))
    found = entities_of(text, offsets, np.eye(len(LABELS))[labels])
    wrong = {tuple(e[:3]) for e in found} ^ set(spans)
    assert len(wrong) <= 0.15 * len(spans) + 2, [(text[a:b], c) for a, b, c in wrong]


@pytest.fixture(scope="module", autouse=True)
def _values():
    for split in templates.SPLITS:
        VALUES[split] = values.Values(split, random.Random(0))


VALUES = {}


def test_splits_share_no_template_and_no_value():
    sets = {}
    for split in templates.SPLITS:
        groups = templates.templates(split)
        sets[split] = {
            t for name, group in groups.items() if name != "assignments" for t in group
        } | {t for kind in groups["assignments"] for t in kind}
        for group in groups.values():
            assert group
        for category in CATEGORIES:
            assert any(f"{{{category}}}" in t for t in sets[split])
    assert not sets["train"] & sets["test"] and not sets["validation"] & (
        sets["train"] | sets["test"]
    )
    drawn = {
        split: {VALUES[split].draw(kind) for kind in CATEGORIES for _ in range(50)}
        for split in sets
    }
    assert not drawn["train"] & drawn["test"] and not drawn["validation"] & (
        drawn["train"] | drawn["test"]
    )
    for address in (VALUES["test"].draw("IP_ADDRESS") for _ in range(50)):
        assert rules.is_public(address)


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
    documents = read_labelled(
        path,
        skipped := {"fragments that overlap another": 0, "fragments that do not fit their text": 0},
    )
    assert documents == [("Alice & Bob", [(0, 5, "NAME"), (8, 11, "AMBIGUOUS")])]
    assert skipped == {
        "fragments that overlap another": 1,
        "fragments that do not fit their text": 2,
    }
    offsets = np.array([(0, 5), (5, 7), (7, 11)])
    assert labels_of(offsets, documents[0][1]).tolist() == [LABELS.index("B-NAME"), 0, -100]
    fragment = '{"text": "a", "fragments": [{"position": %s, "category": %s}]}'
    odd = [
        fragment % at
        for at in (
            ('["0", 1]', '"NAME"'),
            ("[0, 1, 2]", '"NAME"'),
            ("[0, 1]", "{}"),
            ("[0, 1]", "[]"),
        )
    ]
    for line in (
        "{",
        "[]",
        '{"text": 3, "fragments": []}',
        '{"text": "a"}',
        '{"text": "\\ud800", "fragments": []}',
        "[" * 100_000,
        "\xff",
        *odd,
    ):
        path.write_text(line, encoding="latin-1")
        with pytest.raises(ValueError, match="a.jsonl:1: not a line of"):
            read_labelled(path)
    path.write_text(
        json.dumps({"text": "Alice", "fragments": [{"category": "SHOE", "position": [0, 5]}]})
    )
    with pytest.raises(ValueError, match="unknown category 'SHOE'"):
        read_labelled(path)


# ---- rules and figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of seqeval's, where there is nothing
@given(
    tags=st.lists(st.lists(st.sampled_from(LABELS), max_size=20), min_size=1, max_size=4),
    data=st.data(),
)
def test_figures_are_those_of_seqeval(tags, data):
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2  # noqa: F401  (its default mode reads an I- without its B- as a beginning, as here)

    others = [
        data.draw(st.lists(st.sampled_from(LABELS), min_size=len(row), max_size=len(row)))
        for row in tags
    ]
    theirs = classification_report(tags, others, output_dict=True, zero_division=0)
    counts = {category: np.zeros(5) for category in CATEGORIES}
    for want, have in zip(tags, others):
        for category, n in scores.count_spans(chunks(want), chunks(have)).items():
            counts[category] += n
    ours = scores.scores(counts)
    for category in CATEGORIES:
        row = theirs.get(category, {"precision": 0, "recall": 0, "f1-score": 0})
        for name, their_name in (
            ("precision", "precision"),
            ("recall", "recall"),
            ("f1", "f1-score"),
        ):
            assert ours.get(category, {name: 0})[name] == pytest.approx(float(row[their_name]))


def chunks(tags):
    """[(start, end, category), ...] of tags, written from the definition: a B-, or a change of category, begins one; an O ends it."""
    found, before = [], "O"
    for i, tag in enumerate([*tags, "O"]):
        if before != "O" and (tag == "O" or tag[0] == "B" or tag[2:] != before[2:]):
            found.append((start, i, before[2:]))  # noqa: F821
        if tag != "O" and (tag[0] == "B" or before == "O" or tag[2:] != before[2:]):
            start = i  # noqa: F841
        before = tag
    return found


def test_overlapping_and_ignored_spans():
    expected = [(0, 5, "NAME"), (10, 20, "KEY"), (30, 35, "AMBIGUOUS")]
    counts = scores.count_spans(
        expected,
        [(0, 4, "NAME"), (12, 14, "KEY"), (15, 20, "KEY"), (31, 33, "KEY"), (40, 41, "NAME")],
    )
    assert counts["NAME"].tolist() == [0, 2, 1, 1, 1] and counts["KEY"].tolist() == [0, 2, 1, 1, 2]
    table = scores.scores(counts)
    assert (
        table["NAME"]["overlap_f1"] == pytest.approx(2 / 3)
        and table["macro"]["f1"] == 0
        and "EMAIL" not in table
    )


# ---- redaction -------------------------------------------------------------------------------------------------------------------


def read(path):
    with open(path, "rb") as f:
        return f.read()


# ---- programs --------------------------------------------------------------------------------------------------------------------


# ---- other encodings -------------------------------------------------------------------------------------------------------------

# ---- files that change -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["detect", "/nowhere", "--rules-only"], "no such file"),
        (["detect", "README.md", "--model", "/nowhere"], "python pii.py train"),
        (["detect", "README.md", "--rules-only", "--categories", "SHOE"], "unknown category SHOE"),
        (["detect", "README.md", "--rules-only", "--threshold", "2"], "--threshold"),
        (["redact", "README.md", "--rules-only"], "--out"),
        (["eval", "/nowhere", "--rules-only"], "No such file"),
        (["train", "--steps", "0"], "steps must be at least 1"),
        (["train", "--learning-rate", "nan"], "learning_rate"),
        (["train", "--encoder", "/nowhere"], "/nowhere"),
        (["synthesize", "/nowhere", "--out", "x"], "no such file"),
        (["synthesize", "--out", "x", "--count", "3"], "too few"),
        (
            ["eval", "README.md", "--rules-only", "--out", "nowhere/x.json"],
            "no file can be written",
        ),
        (["detect", ".", "--rules-only", "--categories", "NAME"], "the rules find only EMAIL"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert_refused(program("pii", *arguments), words)


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


# ---- peers -----------------------------------------------------------------------------------------------------------------------


def test_evaluation_by_command(trained, labelled, tmp_path):
    path, out = os.path.join(labelled, "validation.jsonl"), tmp_path / "scores.json"
    result = program("pii", "eval", path, "--model", trained[0], "--out", str(out))
    assert result.returncode == 0 and "| model + rules |" in result.stdout
    assert json.loads(out.read_text())["scores"]["model"]["NAME"]["f1"] > 0.8


def test_samples_of_the_peers(tmp_path):
    """Clones as they are laid out: tests/data/output.json with tests/samples, and parametrizations in tests/plugins."""
    (tmp_path / "c" / "tests" / "samples").mkdir(parents=True)
    (tmp_path / "c" / "tests" / "data").mkdir()
    (tmp_path / "c" / "tests" / "samples" / "a").write_text("first\npassword = 'dog' 1-2-3\n")
    entry = lambda rule, value, a, b: {"rule": rule, "line_data_list": [  # noqa: E731
        {"line_num": 2, "path": "./tests/samples/a", "value": value, "value_start": a, "value_end": b}]}  # fmt: skip
    entries = [
        entry("Password", "dog", 12, 15),
        entry("Secret", "dog", 12, 15),
        entry("UUID", "1-2-3", 17, 22),
    ]
    (tmp_path / "c" / "tests" / "data" / "output.json").write_text(json.dumps(entries))
    ((text, spans),) = peers.credsweeper_samples(str(tmp_path / "c"))
    assert [(text[a:b], category) for a, b, category in spans] == [
        ("dog", "PASSWORD"),
        ("1-2-3", "AMBIGUOUS"),
    ]
    (tmp_path / "d" / "tests" / "plugins").mkdir(parents=True)
    (tmp_path / "d" / "tests" / "plugins" / "keyword_test.py").write_text(
        "@pytest.mark.parametrize('payload, flag', [('password = \"x\"', True), ['y', False], (z, True)])\ndef test(payload, flag): pass\n"
    )
    assert peers.detect_secrets_payloads(str(tmp_path / "d")) == [
        ('password = "x"', True, "PASSWORD"),
        ("y", False, "PASSWORD"),
    ]
    assert program("pii", "eval", str(tmp_path / "c"), "--rules-only").returncode == 0
    assert "| rules |" in program("pii", "eval", str(tmp_path / "d"), "--rules-only").stdout
    assert_refused(
        program("pii", "eval", str(tmp_path), "--rules-only"),
        "a clone of CredSweeper or detect-secrets",
    )


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_find_what_they_are_for(name):
    pytest.importorskip(peers.PEERS[name][0])
    text = (
        "x = 1\naws_access_key_id = 'AKIA"
        + "QJ7ZP2XKM4RTVW3N'\nmail = 'bob.smith@mail.org'\nhost = '8.8.4.4'\n"
    )
    (found,) = peers.FIND[name]([text])
    values = {text[e.start : e.end]: e.category for e in found}
    assert ("AKIAQJ7ZP2XKM4RTVW3N", "KEY") in values.items() or values == {
        "bob.smith@mail.org": "EMAIL",
        "8.8.4.4": "IP_ADDRESS",
    }
