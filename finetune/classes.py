"""Tasks on whole texts, or pairs of texts: one class, several classes, or a number.

The model is `StarEncoderForSequenceClassification`: one linear layer on the pooled <cls>, trained
by cross-entropy, binary cross-entropy of each class, or the squared error.
"""

import copy

import numpy as np
import torch

from finetune.batches import batch_of, of_all_ranks, sequence_of, through_model, tokenized
from finetune.scores import class_scores, number_scores, prefixed
from finetune.task import Task
from starencoder import StarEncoderForSequenceClassification


class TextTask(Task):
    """What the three have in common: <cls> A <sep>, and a vector of C logits for it.

    Each says its `names_of` the C, and its `numbers`: records' targets as the model takes them.
    """

    model_class = StarEncoderForSequenceClassification

    def __init__(self, data, tokenizer, positions, config):
        self.names = self.names_of(data.training)
        self.overrides = {
            "id2label": dict(enumerate(self.names)),
            "problem_type": self.problem_type,
        }
        self.sequences = sequences_of(data.training, tokenizer, positions)
        self.held_out = sequences_of(data.validation, tokenizer, positions)
        self.labels = self.numbers(data.training)  # (n,) or (n, C)
        self.truth = self.numbers(data.validation)

    def __len__(self):
        return len(self.sequences)

    def batch(self, examples, device):
        """A `Batch` of these examples, by their numbers."""
        sequences = [self.sequences[i] for i in examples]
        return batch_of(sequences, self.labels[examples], len(examples), device)

    def logits(self, model, autocast, ranks):
        """(n, C) of the held-out examples, on every rank."""
        mine = self.held_out[ranks.rank :: ranks.world_size]
        logits = all_logits(model, mine, autocast)
        return of_all_ranks(ranks, logits, len(self.held_out))


class OneClass(TextTask):
    """One of C classes."""

    measure = "macro_f1"
    problem_type = "single_label_classification"

    def names_of(self, training):
        """The names of the classes. Raises ValueError if there is but one."""
        names = sorted({record.target for record in training})
        if len(names) == 1:
            raise ValueError(f"all lines for training have the class {names[0]!r}")
        return names

    def numbers(self, records):
        """(n,) int64."""
        number_of = {name: number for number, name in enumerate(self.names)}
        check_known(records, lambda record: [record.target], number_of)
        return np.array([number_of[record.target] for record in records], np.int64)

    def evaluate(self, model, autocast, ranks):
        """Accuracy and macro F1."""
        best = self.logits(model, autocast, ranks).argmax(1)
        return class_scores(one_hot(self.truth, self.names), one_hot(best, self.names))

    def baselines(self, *_):
        """The same of always answering the most frequent class."""
        majority = np.bincount(self.labels).argmax()
        answers = one_hot(np.full_like(self.truth, majority), self.names)
        return prefixed("majority", class_scores(one_hot(self.truth, self.names), answers))


class ManyClasses(TextTask):
    """Any of C classes."""

    measure = "macro_f1"
    problem_type = "multi_label_classification"

    def names_of(self, training):
        """The names of the classes. Raises ValueError if there are none."""
        names = sorted(set().union(*(record.target for record in training)))
        if not names:
            raise ValueError("no line for training has a class")
        return names

    def numbers(self, records):
        """(n, C) float32, 1 for the classes of each."""
        number_of = {name: number for number, name in enumerate(self.names)}
        check_known(records, lambda record: record.target, number_of)
        rows = np.zeros((len(records), len(self.names)), np.float32)
        for row, record in zip(rows, records):
            row[[number_of[name] for name in record.target]] = 1
        return rows

    def evaluate(self, model, autocast, ranks):
        """Accuracy (of all classes at once) and macro F1 of what is more probable than not."""
        return class_scores(self.truth > 0, self.logits(model, autocast, ranks) > 0)

    def baselines(self, *_):
        """The same of always answering the classes that most texts have."""
        answers = np.broadcast_to(self.labels.mean(0) > 0.5, self.truth.shape)
        return prefixed("majority", class_scores(self.truth > 0, answers))


class Number(TextTask):
    """A number: learned with mean 0 and variance 1, published as it stands in the data."""

    measure = "spearman"
    problem_type = "regression"

    def names_of(self, training):
        """The name of the one number. Notes mean and deviation of the scores.

        Raises ValueError if all are equal, or differ by too little for float32.
        """
        values = np.array([record.target for record in training])
        self.mean = values.mean()
        self.deviation = values.std()
        # The model is written in float32, with seven digits; and a mean is rounded, so that equal
        # scores may have a deviation.
        if self.deviation <= max(1e-30, 1e-6 * abs(self.mean)):
            raise ValueError("the scores for training are all equal, or nearly")
        return ["score"]

    def numbers(self, records):
        """(n,) float32; for training, of mean 0 and variance 1."""
        values = np.array([record.target for record in records])
        return ((values - self.mean) / self.deviation).astype(np.float32)

    def publish(self, model, directory):
        """Writes a copy whose classifier gives scores as they stand in the data."""
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.classifier.weight *= self.deviation
            model.classifier.bias *= self.deviation
            model.classifier.bias += self.mean
        model.save_pretrained(directory)

    def evaluate(self, model, autocast, ranks):
        """Spearman's rank correlation, and the mean squared error."""
        logits = self.logits(model, autocast, ranks)[:, 0]
        return number_scores(self.scores(self.truth), self.scores(logits))

    def baselines(self, *_):
        """The same of always answering the mean."""
        return prefixed("mean", number_scores(self.scores(self.truth), self.scores(self.truth * 0)))

    def scores(self, numbers):
        """Numbers of mean 0 and variance 1, as scores in the data."""
        return numbers * self.deviation + self.mean


def sequences_of(records, tokenizer, positions):
    """[(tokens,) int64, ...] of records, as the model reads them."""
    columns = [tokenized(texts, tokenizer) for texts in zip(*(record.texts for record in records))]
    return [sequence_of(pieces, tokenizer, positions) for pieces in zip(*columns)]


def all_logits(model, sequences, autocast):
    """(n, C) fp32."""
    logits = torch.zeros(len(sequences), model.config.num_labels)
    for numbers, values in through_model(model, sequences, autocast, "classifying"):
        logits[numbers] = values
    return logits


def check_known(records, names_of, known):
    """Raises ValueError for a record with a class that the training has not."""
    for record in records:
        for name in names_of(record):
            if name not in known:
                words = f"{record.texts[0][:30]!r}, has the class {name!r}"
                raise ValueError(f"a line for validation, {words}, which no line for training has")


def one_hot(numbers, names):
    """(n,) class numbers as (n, C) bool."""
    return np.arange(len(names)) == numbers[:, None]
