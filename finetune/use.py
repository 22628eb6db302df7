"""What was trained, at work: predictions for texts, and search in a repository."""

import json
import os
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.command_line import speed_of
from common.dtypes import multiplies_bfloat16
from common.files import read_json
from common.weights import local_directory
from corpus.tokenizer import Tokenizer
from finetune.batches import sequence_of
from finetune.classes import all_logits
from finetune.functions import functions_under
from finetune.records import check_text, parse_line
from finetune.tokens import find_spans
from starencoder import (
    StarEncoder,
    StarEncoderForSequenceClassification,
    StarEncoderForTokenClassification,
    embed,
)
from training.step import autocast_to

PREDICTING = {
    model_class.architecture: model_class
    for model_class in (StarEncoderForSequenceClassification, StarEncoderForTokenClassification)
}


class Text(NamedTuple):
    """A text to say something of."""

    place: dict  # {"file": its path}, and the "line" of a .jsonl file
    pieces: tuple  # of str: the text, or the two of a pair


def predict(directory, paths):
    """Prints a line of JSON for each text of some files.

    Raises ValueError for a model that was not fine-tuned to classify texts or tokens.
    """
    model, tokenizer = opened(directory, PREDICTING)
    texts = [text for path in paths for text in texts_of(path)]
    begin = time.perf_counter()
    autocast = autocast_to(dtype_for(model), device_of(model))
    if isinstance(model, StarEncoderForTokenClassification):
        answers = found_fragments(model, tokenizer, texts, autocast)
    else:
        answers = classified(model, tokenizer, texts, autocast)
    seconds = time.perf_counter() - begin
    for text, answer in zip(texts, answers):
        print(json.dumps(text.place | answer))
    pieces = [piece for text in texts for piece in text.pieces]
    print(f"{len(texts):,} texts, {speed_of(pieces, seconds)}", file=sys.stderr)


def opened(directory, classes):
    """(model, tokenizer) of a directory, on a GPU if there is one.

    classes: {architecture: class}. Raises ValueError for a model of none of these.
    """
    directory = local_directory(directory)
    architectures = read_json(os.path.join(directory, "config.json")).get("architectures")
    if not isinstance(architectures, list):  # a file from elsewhere may hold anything
        architectures = []
    architectures = list(map(str, architectures))
    known = [name for name in architectures if name in classes]
    if not known:
        names = " or ".join(classes)
        found = ", ".join(architectures) or "nothing"
        raise ValueError(f"{directory}: holds {found}, not {names}")
    tokenizer = Tokenizer.from_pretrained(directory)
    model = classes[known[0]].from_pretrained(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{directory}: its tokenizer has more tokens than its model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def device_of(model):
    """Where a model computes."""
    return next(model.parameters()).device


def dtype_for(model):
    """bfloat16 if the device is fast at it, and 8 bits are enough for the answer."""
    fast = device_of(model).type == "cuda" or multiplies_bfloat16()
    return "bfloat16" if fast and model.config.problem_type != "regression" else "float32"


def texts_of(path):
    """[Text, ...] of a file. Raises ValueError for a line without a text."""
    with open(path, "rb") as file:
        if not path.endswith(".jsonl"):
            return [Text({"file": path}, (file.read().decode(errors="replace"),))]
        texts = []
        for number, line in enumerate(file, 1):
            try:
                fields = parse_line(line)
                names = ("text",) if "text" in fields else ("text_a", "text_b")
                pieces = tuple(fields.get(name) for name in names)
                for name, piece in zip(names, pieces):
                    check_text(name, piece)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            texts.append(Text({"file": path, "line": number}, pieces))
    return texts


def classified(model, tokenizer, texts, autocast):
    """[dict, ...]: the class, the classes or the score of each text."""
    positions = model.config.max_position_embeddings
    sequences = [
        sequence_of([tokenizer.encode(piece) for piece in text.pieces], tokenizer, positions)
        for text in tqdm(texts, "tokenizing", unit=" texts", delay=2, leave=False)
    ]
    logits = all_logits(model, sequences, autocast)  # (n, C)
    names = model.config.label_names
    if model.config.problem_type == "regression":  # of any scale, so digits and not decimals
        return [dict(zip(names, [float(f"{v:.6g}") for v in row])) for row in logits.tolist()]
    # What is chosen is chosen by the logits, as in the evaluation: rounded, two may be equal.
    if model.config.problem_type == "multi_label_classification":
        return [
            {"labels": [names[i] for i in row.nonzero().flatten()], "scores": scores}
            for row, scores in zip(logits > 0, named(names, logits.sigmoid()))
        ]
    return [
        {"label": names[best], "scores": scores}
        for best, scores in zip(logits.argmax(1), named(names, logits.softmax(-1)))
    ]


def named(names, probabilities):
    """(n, C) as dicts of numbers with four decimals."""
    return [
        {name: round(value, 4) for name, value in zip(names, row)} for row in probabilities.tolist()
    ]


def found_fragments(model, tokenizer, texts, autocast):
    """[{"fragments": [...]}, ...] of each text, in the layout of the training data."""
    for text in texts:
        if len(text.pieces) != 1:
            raise ValueError(f"{text.place['file']}: a pair, but the model finds pieces of a text")
    found = find_spans(model, tokenizer, [text.pieces[0] for text in texts], autocast)
    return [
        {"fragments": [{"category": s.category, "position": [s.start, s.end]} for s in spans]}
        for spans in found
    ]


def search(directory, query, paths, top):
    """Prints the functions of files and directories that are closest to a query, best first."""
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    check_text("query", query)
    encoders = dict.fromkeys(("BertModel", "BertForPreTraining"), StarEncoder)
    model, tokenizer = opened(directory, encoders)
    skipped = Counter()
    reading = functions_under(paths, skipped)
    functions = list(tqdm(reading, "reading", unit=" functions", delay=2, leave=False))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
    left_out = f"; files left out: {reasons}" if reasons else ""
    if not functions:
        raise ValueError(f"{' '.join(paths)}: no source files{left_out}")
    begin = time.perf_counter()
    vectors = embed(model, tokenizer, [query, *(function.text for function in functions)])
    similarities = vectors[1:] @ vectors[0]  # (functions,) cosines
    seconds = time.perf_counter() - begin
    best = similarities.topk(min(top, len(functions)))
    for similarity, number in zip(best.values.tolist(), best.indices.tolist()):
        function = functions[number]
        row = f"{similarity:5.2f}  {function.path}:{function.line}  {function.name}"
        print(row.encode(errors="replace").decode())  # half a surrogate pair cannot be printed
    speed = speed_of([function.text for function in functions], seconds)
    print(f"{len(functions):,} functions, {speed}{left_out}", file=sys.stderr)
