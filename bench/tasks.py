"""What pretraining is worth: five tasks, from the pretrained weights and from random ones.

Each run is one command, `python -m finetune` (or `python -m pii train`), with the same steps; the
data are made offline. Nothing is chosen by the held-out examples: a run is measured once, at its
end.
"""

import json
import os
import statistics
from typing import NamedTuple

from bench import search_data, task_data
from bench.measure import report
from bench.search import shown
from finetune.loop import FinetuneConfig, train
from pii import finetune as pii_training
from pii.synthesize import synthesize

DATA = "corpora/tasks"
RUNS = "runs/tasks"
SETTINGS = dict(steps=300, eval_every=300, warmup_steps=30)


class Task(NamedTuple):
    """A task, and how its data are made."""

    name: str
    directory: str  # of train.jsonl and validation.jsonl
    make: object  # a function of the directory
    measure: str
    baseline: str  # a figure's name; "" if there is none


def make_pii(out):
    """Writes PII's data, unless they are there."""
    if not os.path.exists(os.path.join(out, "train.jsonl")):
        synthesize([], out)


TASKS = [
    Task(
        "language of a snippet, of 20",
        f"{DATA}/languages",
        task_data.make_languages,
        "accuracy",
        "majority_accuracy",
    ),
    Task(
        "is this comment code?",
        f"{DATA}/commented-code",
        task_data.make_commented_code,
        "accuracy",
        "majority_accuracy",
    ),
    Task("personal data", pii_training.DEFAULT_DATA, make_pii, "f1", ""),
    Task(
        "quality of a docstring",
        f"{DATA}/docstrings",
        task_data.make_docstring_scores,
        "spearman",
        "mean_spearman",
    ),
    Task("search", f"{DATA}/search", search_data.make_pairs, "mrr", "bm25_mrr"),
]


def bench_tasks(path=None, encoder="runs/tiny", seeds=3):
    """The held-out figures of all tasks, from both starts, by seed."""
    if seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for a spread, got {seeds}")
    rows = []
    by_seed = {}
    for task in TASKS:
        task.make(task.directory)
        figures = {start: [] for start in ("pretrained", "random")}
        for seed in range(seeds):
            for start, values in figures.items():
                values.append(run(task, encoder, start, seed))
        by_seed[task.name] = figures
        rows.append(row_of(task, figures))
    report(path, "tasks", rows, encoder=encoder, settings=SETTINGS, seeds=seeds, by_seed=by_seed)


def run(task, encoder, start, seed):
    """Fine-tunes once. Returns the last line of figures."""
    out = os.path.join(RUNS, os.path.basename(task.directory), f"{start}-{seed}")
    settings = dict(
        encoder=encoder, out=out, seed=seed, random_weights=start == "random", **SETTINGS
    )
    if task.measure == "f1":
        best = pii_training.train(pii_training.config_of(task.directory, **settings))
    else:
        paths = {
            split: os.path.join(task.directory, f"{split}.jsonl")
            for split in ("train", "validation")
        }
        best = train(FinetuneConfig(**paths, **settings))
    if best is None:  # a signal stopped it, and means all runs
        raise KeyboardInterrupt
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return json.loads(f.readlines()[-1])


def row_of(task, figures):
    """A row of the table."""
    values = {start: [line[task.measure] for line in lines] for start, lines in figures.items()}
    gain = statistics.mean(values["pretrained"]) - statistics.mean(values["random"])
    spread = max(statistics.stdev(of_start) for of_start in values.values())
    baseline = figures["pretrained"][0].get(task.baseline, 0.0)
    return {
        "task": task.name,
        "figure": task.measure,
        "baseline": f"{baseline:.3f}",
        "random": shown(values["random"]),
        "pretrained": shown(values["pretrained"]),
        "gain": f"{gain:.3f}",
        "gain / spread": f"{gain / spread:.1f}" if spread else "",
    }
