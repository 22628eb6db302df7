"""Candidates are judged, addresses overruled, and a block's findings are its own."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st

from common import weights as weight_files
from finetune.records import Record, Span
from pii import finetune
from pii.candidates import candidates
from pii.detector import Detector
from pii.labels import CATEGORIES, LABELS, Entity, LabelledDocument
from pii.look import blocks
from pii.rules import found_by_rules
from pii.synthesize import read_real
from pii.templates import SPLITS, split_of
from pii.thresholds import (
    FILE,
    LEAST_PRECISION,
    LEAST_THRESHOLD,
    precise_threshold,
    read_thresholds,
    with_few_alarms,
    write_thresholds,
)
from starencoder import StarEncoderForTokenClassification


@pytest.fixture(scope="module")
def run(encoder, tokenizer, tmp_path_factory):
    """The directory of a detector that knows nothing: its classifier is drawn at random."""
    out = str(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    model = StarEncoderForTokenClassification.from_pretrained(encoder, id2label=names)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_thresholds(out, dict.fromkeys(CATEGORIES, 0.5), {})
    return out


@pytest.fixture(scope="module")
def detector(run):
    found = Detector.from_pretrained(run, "cpu", rules=True)
    found.dtype = "float32"  # bfloat16 rounds by the shape of a batch
    return found


def found_in(detector, text, said):
    """[(value, category), ...] in a text of which the model says {value: (label, probability)}."""
    offsets = np.array(detector.tokenizer.offsets(text))
    probabilities = np.zeros((len(offsets), len(LABELS)), np.float32)
    probabilities[:, 0] = 1.0
    for value, (label, probability) in said.items():
        start = text.index(value)
        inside = (offsets[:, 0] < start + len(value)) & (offsets[:, 1] > start)
        probabilities[inside] = 0.0
        probabilities[inside, 0] = 1 - probability
        probabilities[inside, LABELS.index(label)] = probability
    ruled = sorted(found_by_rules(text))
    entities = detector.entities_in_block(text, probabilities, ruled, candidates(text))
    return [(text[entity.start : entity.end], entity.category) for entity in entities]


def test_the_model_judges_candidates(detector):
    text = 'db_password = "hunter2"\n'
    assert found_in(detector, text, {"hunter2": ("I-PASSWORD", 0.9)}) == [("hunter2", "PASSWORD")]
    assert found_in(detector, text, {"hunter2": ("I-PASSWORD", 0.2)}) == []
    # It says whether it is a secret; its name says of which kind.
    assert found_in(detector, text, {"hunter2": ("I-KEY", 0.9)}) == [("hunter2", "PASSWORD")]
    # Where its tokens disagree, the whole candidate is found.
    assert found_in(detector, text, {"unter2": ("I-PASSWORD", 1.0)}) == [("hunter2", "PASSWORD")]


def test_the_model_finds_no_secret_by_itself(detector):
    assert found_in(detector, "see Psalm, or 1\n", {"Psalm": ("B-PASSWORD", 1.0)}) == []
    assert found_in(detector, "see Psalm, or 1\n", {"Psalm": ("B-NAME", 1.0)}) == [
        ("Psalm", "NAME")
    ]


@pytest.mark.parametrize("value", ["model_name", "java.util.List", "v2", "lower"])
def test_what_is_no_name_by_its_shape(detector, value):
    assert found_in(detector, f"x = {value} ;\n", {value: ("B-NAME", 1.0)}) == []


@pytest.mark.parametrize("value", ["admin", "root", "string", "None"])
def test_what_is_no_account(detector, value):
    assert found_in(detector, f"user = {value} ;\n", {value: ("B-USERNAME", 1.0)}) == []


def test_the_model_may_overrule_a_mail_address(detector):
    text = "mail = ada@engine.org\n"
    said = {"ada@engine.org": ("B-EMAIL", 0.2)}
    assert found_in(detector, text, said) == [("ada@engine.org", "EMAIL")]
    assert found_in(detector, text, {}) == []
    # An IP address it may not: the rules know versions by what stands before them.
    assert found_in(detector, "host = 8.8.4.4\n", {}) == [("8.8.4.4", "IP_ADDRESS")]
    assert found_in(detector, "release 8.8.4.4\n", {}) == []


CODE = [
    "def f(x):\n    return x\n",
    "# Author: Ada Lovelace\n",
    'password = "hunter2"\n',
    "see https://github.com/ada/engine\n",
    "\n",
    "    @property\n",
]


@given(pieces=st.lists(st.sampled_from(CODE), min_size=1, max_size=40))
def test_a_block_has_its_findings_whatever_else_is_looked_at(detector, run, pieces):
    text = "".join(pieces)
    # At any score: one at a threshold could fall to either side, by the shape of its batch.
    parts = dict(model=detector.model, tokenizer=detector.tokenizer, rules=True, threshold=0.0)
    picky = Detector(**parts)
    everywhere = Detector(**parts, everywhere=True)
    picky.dtype = "float32"
    everywhere.dtype = "float32"
    (some,) = picky.find([text])
    (all_of_them,) = everywhere.find([text])
    looked_at = picky.known_of(text).blocks
    inside = [
        entity
        for entity in all_of_them
        if any(start <= entity.start < end for start, end in looked_at)
    ]
    assert [entity[:3] for entity in some] == [entity[:3] for entity in inside]


def test_a_private_key_of_many_blocks_is_one(detector):
    body = "\n".join(["MIIEpAIBAAKCAQEAqAFs" * 3] * 12)
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    text = f"x = 1\n{key}\ny = 2\n"
    (entities,) = detector.find([text])
    assert [text[e.start : e.end] for e in entities if e.category == "KEY"] == [key]


# ---- training and thresholds ---------------------------------------------------------------------


@given(text=st.text("ab\n", max_size=900), data=st.data())
def test_blocks_keep_the_labels(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    spans = [Span(a, b, "NAME") for a, b in zip(cuts[::2], cuts[1::2])]
    parts = finetune.in_blocks(Record((text,), spans))
    places = [(start, end) for start, end in blocks(text) if text[start:end].strip()]
    assert [part.texts[0] for part in parts] == [text[start:end] for start, end in places]
    for (start, end), part in zip(places, parts):
        labelled = {i for span in spans for i in range(span.start, span.end) if start <= i < end}
        found = {start + i for span in part.target for i in range(span.start, span.end)}
        assert found == labelled


SCORES = st.lists(st.floats(0, 1, width=16), max_size=30)


@given(scores=st.fixed_dictionaries({c: SCORES for c in CATEGORIES}), most=st.integers(0, 60))
def test_thresholds_leave_at_most_so_many_false_alarms(scores, most):
    before = dict.fromkeys(CATEGORIES, 0.25)
    thresholds = with_few_alarms(before, scores, most)
    assert all(threshold >= 0.25 for threshold in thresholds.values())
    assert sum(s >= thresholds[c] for c in CATEGORIES for s in scores[c]) <= most
    if sum(s >= 0.25 for c in CATEGORIES for s in scores[c]) <= most:
        assert thresholds == before


@given(right=SCORES, wrong=SCORES)
def test_a_threshold_is_precise(right, wrong):
    threshold = precise_threshold(right, wrong)
    kept = sum(score >= threshold for score in right)
    false = sum(score >= threshold for score in wrong)
    assert threshold == 1.0 or kept >= LEAST_PRECISION * (kept + false)
    if not wrong:
        assert threshold == LEAST_THRESHOLD


def test_false_alarms_and_true_ones():
    spans = [Span(0, 4, "NAME"), Span(10, 14, "PASSWORD"), Span(20, 24, "AMBIGUOUS")]
    found = [
        Entity(0, 3, "NAME", 0.9),
        Entity(0, 3, "USERNAME", 0.8),
        Entity(10, 14, "KEY", 0.7),  # both are secrets
        Entity(21, 22, "EMAIL", 0.6),  # nobody can tell
        Entity(30, 31, "NAME", 0.5),
    ]
    documents = [LabelledDocument("x" * 40, spans)]
    alarms = finetune.false_alarms(documents, [found])
    assert {c: s for c, s in alarms.items() if s} == {"USERNAME": [0.8], "NAME": [0.5]}
    scores = finetune.scores_of_true(documents, [found])
    assert {c: s for c, s in scores.items() if s} == {"NAME": [0.9], "PASSWORD": [0.7]}
    assert finetune.scores_of_true(documents, [[]])["NAME"] == [0.0]


def test_calibration_writes_thresholds(run, tmp_path):
    text = "# Author: Ada Lovelace\n"
    name = {"category": "NAME", "position": [10, 22], "value": "Ada Lovelace"}
    line = json.dumps({"text": text, "fragments": [name]}) + "\n"
    for split in ("train", "validation", "ordinary"):
        (tmp_path / f"{split}.jsonl").write_text(line)
    finetune.calibrate(finetune.config_of(str(tmp_path), encoder=run, out=run, device="cpu"))
    assert set(read_thresholds(run)) == set(CATEGORIES)
    with open(os.path.join(run, FILE)) as f:
        assert len(json.load(f)["NAME"]["scores"]) == 1

    # A share may be asked for instead; two ways to say what counts are one too many.
    source = tmp_path / "a.py"
    source.write_text(text)
    assert program("pii", "detect", str(source), "--model", run, "--recall", "0.9").returncode == 0
    twice = ("--recall", "0.9", "--threshold", "0.5")
    assert_refused(program("pii", "detect", str(source), "--model", run, *twice), "--recall")
    assert_refused(
        program("pii", "detect", str(source), "--model", run, "--recall", "2"), "must lie"
    )


def test_a_packed_detector_is_half_as_large(run, tmp_path):
    out = str(tmp_path / "packed")
    assert program("pii", "pack", run, "--out", out).returncode == 0
    packed = weight_files.read(out)
    for name, value in weight_files.read(run).items():
        assert packed[name].dtype == torch.bfloat16
        assert torch.equal(packed[name], value.bfloat16())
    Detector.from_pretrained(out, "cpu").find(["# Author: Ada Lovelace\n"])
    assert_refused(program("pii", "pack", run, "--out", out), "exists already")


# ---- labels of real files ------------------------------------------------------------------------


def test_labels_of_real_files_are_places():
    """They hold no values, overlap nowhere, and none is of a project whose files are the test's."""
    labels = read_real()
    for digest, of_file in labels.blocks.items():
        assert len(digest) == 16 and int(digest, 16) >= 0
        end_before = 0
        for start, end, *spans in of_file:
            assert end_before <= start < end
            end_before = end
            inside = 0
            for first, last, category in spans[0] if spans else []:
                assert inside <= first < last <= end - start
                assert category in CATEGORIES or category == "AMBIGUOUS"
                inside = last
    assert labels.whole <= labels.blocks.keys()
    with open(os.path.join(os.path.dirname(finetune.__file__), "real.jsonl")) as lines:
        projects = [json.loads(line)["project"] for line in lines]
    assert {split_of(project) for project in projects} == set(SPLITS) - {"test"}
