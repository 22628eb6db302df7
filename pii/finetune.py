"""Fine-tuning an encoder as a detector of personal data: `python -m finetune` on PII's data.

The labels are those of StarPII, and what is measured on the validation is the whole detector: F1 of
the entities that it makes of the tokens' labels.

References: Li et al., StarCoder, 2023, section 4. Hyperparameters: the model card of StarPII.
"""

import os
from pathlib import Path

from tqdm import tqdm

import train as pretraining
from common import weights as weight_files
from finetune import loop
from finetune.records import Span
from finetune.tokens import Fragments
from pii.detector import SECRETS, Detector
from pii.labels import CATEGORIES, IGNORED, LabelledDocument, check_categories, read_labelled
from pii.look import blocks
from pii.scores import evaluate_detector, touches
from pii.synthesize import synthesize
from pii.thresholds import (
    DEFAULT,
    FILE,
    MOST_FALSE,
    precise_threshold,
    with_few_alarms,
    write_thresholds,
)
from training.ranks import Ranks

DEFAULT_ENCODER = "runs/tiny"  # pretrained if it is missing
DEFAULT_DATA = "corpora/pii"  # synthesized if it is missing

PII_PRESETS = {
    # The tiny encoder, minutes on a CPU: narrower, so with a higher rate.
    "tiny": dict(
        encoder=DEFAULT_ENCODER, out="runs/pii", steps=900, learning_rate=2e-3, eval_every=450
    ),
    # The published StarPII.
    "starpii": dict(
        encoder="bigcode/starencoder", out="runs/starpii", steps=10_000, learning_rate=2e-5
    ),
}


class PII(Fragments):
    """Personal data, as labels.py names it."""

    ignored = IGNORED

    def __init__(self, data, tokenizer, positions, config):
        # The detector shows the model a block at a time: so it learns from blocks.
        training = [part for record in data.training for part in in_blocks(record)]
        super().__init__(data._replace(training=training), tokenizer, positions, config)

    def categories_of(self, training, validation):
        """CATEGORIES. Raises ValueError for a category neither known nor ignored."""
        for name, records in (("training", training), ("validation", validation)):
            for number, record in enumerate(records, 1):
                check_categories(record.target, f"line {number} for {name}")
        return CATEGORIES

    def evaluate(self, model, autocast, ranks):
        """F1 of exact entities: of each category and, "f1", their mean."""
        documents = [LabelledDocument(*record.texts, record.target) for record in self.validation]
        detector = Detector(model, self.tokenizer, rules=True, threshold=0.5)
        scores = evaluate_detector(detector.find, documents, ranks)
        f1 = {"f1": scores.get("macro", {}).get("f1", 0.0)}
        for category, row in scores.items():
            if category != "macro":
                f1[f"f1/{category}"] = row["f1"]
        return f1


def in_blocks(record):
    """The blocks of a labelled text, as records. A span in two of them is cut."""
    (text,) = record.texts
    parts = []
    for start, end in blocks(text):
        spans = [
            Span(max(span.start, start) - start, min(span.end, end) - start, span.category)
            for span in record.target
            if span.start < end and span.end > start
        ]
        if text[start:end].strip():
            parts.append(record._replace(texts=(text[start:end],), target=spans))
    return parts


def config_of(data, **fields):
    """The `FinetuneConfig` for a directory with train.jsonl and validation.jsonl."""
    train, validation = (os.path.join(data, f"{split}.jsonl") for split in ("train", "validation"))
    return loop.FinetuneConfig(train=train, validation=validation, **fields)


def train(config):
    """As `finetune.loop.train`. Makes the default encoder and data if they are missing."""
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched():
        if not make_defaults(config, ranks):
            return None
        best = loop.fine_tune(config, ranks, {"fragments": PII})
        with ranks.together():
            if ranks.lead and best is not None:
                calibrate(config)
        return best


def make_defaults(config, ranks):
    """Makes the default encoder and data if they are missing. False if a signal stopped it."""
    default = os.path.join(DEFAULT_DATA, "train.jsonl")
    if config.train != default and not os.path.exists(config.train):  # before minutes of work
        raise FileNotFoundError(f"{config.train}: no such file")
    has_encoder = os.path.exists(os.path.join(DEFAULT_ENCODER, "model.safetensors"))
    if config.encoder == DEFAULT_ENCODER and not has_encoder:
        ranks.say(f"No encoder at {DEFAULT_ENCODER} yet: pretraining it first.")
        tiny = pretraining.TrainConfig(**pretraining.PRESETS["tiny"])
        if pretraining.pretrain(tiny, ranks) is None:
            return False
    with ranks.together():
        if ranks.lead and config.train == default and not os.path.exists(default):
            words = "making it from fetched packages, or else Python's standard library"
            print(f"No data at {DEFAULT_DATA} yet: {words}.")
            synthesize([], DEFAULT_DATA)
    return True


# ---- thresholds ----------------------------------------------------------------------------------

# What has one threshold. A password that was found as a key is found, so they share theirs; e-mail
# and IP addresses are found by the rules, whatever the model says.
GROUPS = {"NAME": ("NAME",), "USERNAME": ("USERNAME",), "secrets": SECRETS}


def calibrate(config):
    """Writes thresholds.json into the run directory, from the validation data.

    The thresholds are the lowest at which nine of ten findings in the validation are right. Beside
    it may lie ordinary.jsonl, code as it is, labelled: there few are wrong (see thresholds.py).
    """
    detector = Detector.from_pretrained(config.out, config.device, rules=True, threshold=0.0)
    documents = read_labelled(config.validation)
    found = find_in_batches(detector, documents, "calibrating")
    right = scores_of_true(documents, found)
    wrong = in_groups(false_alarms(documents, found))
    thresholds = {
        group: precise_threshold(scores, wrong[group]) for group, scores in in_groups(right).items()
    }

    ordinary = os.path.join(os.path.dirname(config.validation), "ordinary.jsonl")
    if os.path.exists(ordinary):
        documents = read_labelled(ordinary)
        lines = sum(document.text.count("\n") for document in documents)
        found = find_in_batches(detector, documents, "looking for false alarms")
        alarms = false_alarms(documents, found)
        # Those of the rules are there anyway.
        by_rules = sum(len(alarms[category]) for category in ("EMAIL", "IP_ADDRESS"))
        most = int(MOST_FALSE * lines / 1000) - by_rules
        thresholds = with_few_alarms(thresholds, in_groups(alarms), most)

    of_category = dict.fromkeys(CATEGORIES, DEFAULT)
    for group, categories in GROUPS.items():
        pooled = [score for category in categories for score in right[category]]
        for category in categories:
            of_category[category] = thresholds[group]
            right[category] = pooled
    write_thresholds(config.out, of_category, right)


def in_groups(scores):
    """{group of GROUPS: [score, ...]} of {category: [score, ...]}."""
    return {
        group: [score for category in categories for score in scores[category]]
        for group, categories in GROUPS.items()
    }


def find_in_batches(detector, documents, description):
    """What `detector.find` gives for many documents, with a progress bar."""
    texts = [document.text for document in documents]
    found = []
    for begin in tqdm(range(0, len(texts), 64), description, leave=False):
        found += detector.find(texts[begin : begin + 64])
    return found


def scores_of_true(documents, found):
    """{category: [score, ...]} of the entities of labelled documents; 0 for one not found."""
    scores = {category: [] for category in CATEGORIES}
    for document, entities in zip(documents, found):
        for span in document.spans:
            if span.category in CATEGORIES:
                over = [entity.score for entity in entities if confirms(entity, span)]
                scores[span.category].append(round(max(over, default=0.0), 4))
    return scores


def false_alarms(documents, found):
    """{category: [score, ...]} of what was found where nothing of its kind is labelled."""
    scores = {category: [] for category in CATEGORIES}
    for document, entities in zip(documents, found):
        for entity in entities:
            ignored = [span for span in document.spans if span.category in IGNORED]
            right = any(confirms(entity, span) for span in document.spans)
            if not right and not touches(entity, ignored):
                scores[entity.category].append(entity.score)
    return scores


def confirms(entity, span):
    """True if an entity touches a span of its category; a key and a password are both secrets."""
    same = entity.category == span.category or {entity.category, span.category} <= set(SECRETS)
    return same and touches(entity, [span])


# ---- a detector to be shipped --------------------------------------------------------------------


def pack(run, out):
    """Writes what detection needs of a run into the directory `out`, with weights in bfloat16.

    transformers reads it, too. Raises ValueError if `out` exists, FileNotFoundError for a run
    without thresholds.
    """
    if os.path.exists(out):
        raise ValueError(f"{out}: exists already; choose another directory or remove it")
    Detector.from_pretrained(run, "cpu")  # refuses what is none
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", FILE]
    files = {name: Path(run, name).read_bytes() for name in names}  # before anything is written
    weights = {name: value.bfloat16() for name, value in weight_files.read(run).items()}
    os.makedirs(out)
    weight_files.write(out, weights)
    for name, content in files.items():
        Path(out, name).write_bytes(content)
