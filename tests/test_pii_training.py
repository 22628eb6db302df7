"""Fine-tuning: it learns, it goes on with the same bits, and ranks make no difference."""

import json
import os
import random
import shutil

import pytest
import torch
import transformers
from conftest import assert_refused, program

from pii import finetune
from pii.detector import Detector
from pii.labels import LABELS, read_labelled
from pii.scores import evaluate_detector


def read(path):
    with open(path, "rb") as f:
        return f.read()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Data in which names have letters of their own."""
    directory, generator = tmp_path_factory.mktemp("labelled"), random.Random(0)
    for split, count in (("train", 60), ("validation", 20)):
        lines = []
        for _ in range(count):
            words = ["".join(generator.choices("abcdefgh", k=5)) for _ in range(6)]
            name = " ".join("U" + "".join(generator.choices("uvwxyz", k=5)) for _ in range(2))
            text = "".join(f"x = {word}\n" for word in words) + f"author = {name}\n"
            fragment = {
                "category": "NAME",
                "position": [len(text) - 14, len(text) - 1],
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
    return finetune.config_of(labelled, encoder=encoder, out=str(out), device="cpu", **fields)


@pytest.fixture(scope="module")
def trained(encoder, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pii"
    return str(out), finetune.train(config_of(encoder, labelled, out))


def test_training_learns_and_opens_in_transformers(trained, labelled):
    out, f1 = trained
    assert f1 > 0.8 and os.path.exists(os.path.join(out, "curves.png"))
    # As it was evaluated in training.
    detector = Detector.from_pretrained(out, "cpu", rules=True, threshold=0.5)
    detector.dtype = "float32"
    documents = read_labelled(os.path.join(labelled, "validation.jsonl"))
    assert evaluate_detector(detector.find, documents)["macro"]["f1"] >= f1 - 1e-6
    theirs = transformers.BertForTokenClassification.from_pretrained(out).eval()
    assert list(theirs.config.id2label.values()) == LABELS and theirs.config.label2id[
        "B-KEY"
    ] == LABELS.index("B-KEY")
    ids = torch.randint(300, (40,))
    with torch.no_grad():
        ours = detector.model(ids, torch.tensor([0, 40], dtype=torch.int32)).logits
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("a b")["input_ids"]


def test_random_weights_and_other_data_are_other_runs(encoder, labelled, tmp_path):
    settings = dict(learning_rate=1e-30, steps=2, eval_every=2)
    config = config_of(encoder, labelled, tmp_path / "pii", random_weights=True, **settings)
    assert finetune.train(config) < 0.1
    with pytest.raises(ValueError, match="holds a run with random_weights True"):
        finetune.train(config_of(encoder, labelled, tmp_path / "pii", **settings))
    other = shutil.copytree(labelled, tmp_path / "other")
    with open(other / "train.jsonl", "a") as f:
        f.write('\n{"text": "x = 1", "fragments": []}')
    with pytest.raises(ValueError, match="holds a run with train_sha256"):
        again = config_of(encoder, str(other), tmp_path / "pii", random_weights=True, **settings)
        finetune.train(again)


def test_an_unknown_category_is_refused(encoder, tmp_path):
    line = '{"text": "a shoe", "fragments": [{"category": "SHOE", "position": [2, 6]}]}'
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(line)
    with pytest.raises(ValueError, match="train.jsonl: line 1 for training: unknown category"):
        finetune.train(config_of(encoder, str(tmp_path), tmp_path / "pii"))


def test_data_of_another_task_are_refused(encoder, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a", "label": "b"}')
    with pytest.raises(ValueError, match='train.jsonl: lines of {"text", "label"}'):
        finetune.train(finetune.config_of(str(tmp_path), encoder=encoder, out=str(tmp_path / "o")))


def test_the_model_alone_is_no_slower_to_be_right_in_company(trained):
    """What is found in a text does not depend on the texts beside it."""
    detector = Detector.from_pretrained(trained[0], "cpu", threshold=0.0)
    # bfloat16 has few values: two are often equal, and the shape of a batch decides the rounding.
    detector.dtype = "float32"
    texts = [
        f"x = {w}\nname = {w}\n" * n
        for n, w in ((1, "uvwxy"), (9, "fghab"), (0, ""), (40, "zuvxy"))
    ]
    together = detector.find(texts)
    for text, found in zip(texts, together):
        (alone,) = detector.find([text])
        assert [e[:3] for e in alone] == [e[:3] for e in found]


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
