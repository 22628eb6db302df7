"""TODO."""

import contextlib
import json
import math
import os

import numpy as np

from common.command_line import warn
from pii.labels import CATEGORIES


def draw_curves(run, draw):
    """Draws RUN/curves.png from RUN/metrics.jsonl, whole or not at all; warns where it cannot be written.

    draw(figure, steps, lines): fills a matplotlib Figure; steps: the lines (dicts) of optimizer steps, at least one; lines: all of them.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

    path, temporary = os.path.join(run, "curves.png"), os.path.join(run, "curves.tmp.png")
    try:
        with open(os.path.join(run, "metrics.jsonl")) as f:
            lines = [json.loads(line) for line in f]
        lines = [
            {name: math.nan if value is None else value for name, value in line.items()}
            for line in lines
        ]
        steps = [m for m in lines if "loss" in m]  # skipped steps have no loss
        if not steps:
            return
        figure = Figure(layout="tight")
        draw(figure, steps, lines)
        figure.savefig(temporary, dpi=100)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # half of it may take the room that the metrics need
        warn(f"{path} cannot be drawn ({error})")


def draw_pretraining(figure, train, lines):
    """The curves of a pretraining, for `draw_curves`."""
    held_out = [m for m in lines if "mlm_accuracy" in m]
    figure.set_size_inches(11, 7)
    (losses, accuracies), (rate, speed) = figure.subplots(2, 2, sharex=True)
    steps = [m["step"] for m in train]
    width = max(
        1, len(train) // 100
    )  # the curve of single steps is noise: a running mean over 1 % of them
    smooth = lambda name: np.convolve([m[name] for m in train], np.ones(width) / width, "valid")  # noqa: E731
    losses.plot(steps[width - 1 :], smooth("mlm_loss"), label="MLM, training", color="0.2")
    losses.plot(steps[width - 1 :], smooth("nsp_loss"), label="NSP, training", color="0.6")
    losses.plot(
        [m["step"] for m in held_out],
        [m["mlm_loss"] for m in held_out],
        "o--",
        label="MLM, held out",
        color="0.2",
    )
    losses.set(ylabel="loss (nats)", ylim=(0, None))
    for name, style, label in [
        ("mlm_accuracy", "o-", "MLM"),
        ("majority_accuracy", ":", "most frequent token"),
        ("nsp_accuracy", "s-", "NSP"),
        ("coin_flip", "--", "coin flip"),
    ]:
        accuracies.plot(
            [m["step"] for m in held_out],
            [m[name] for m in held_out],
            style,
            label=label,
            color="0.3",
        )
    accuracies.set(ylabel="held-out accuracy", ylim=(0, 1))
    rate.plot(steps, [m["learning_rate"] for m in train], label="learning rate", color="0.2")
    rate.set(xlabel="step", ylabel="learning rate")
    norm = rate.twinx()
    norm.plot(steps[width - 1 :], smooth("grad_norm"), label="gradient norm", color="0.6")
    norm.set(ylabel="gradient norm (grey)", ylim=(0, None))
    speed.plot(steps, [m["tokens_per_second"] for m in train], color="0.2")
    speed.set(xlabel="step", ylabel="tokens / s", ylim=(0, None))
    losses.legend()
    accuracies.legend()


def draw_fine_tuning(figure, train_detector, lines):
    """The curves of a fine-tuning, for `draw_curves`: the loss of each step, and the F1 of each category in the validation documents."""
    held_out = [m for m in lines if "f1" in m]
    figure.set_size_inches(11, 4)
    losses, figures = figure.subplots(1, 2)
    losses.semilogy(
        [m["step"] for m in train_detector],
        [m["loss"] for m in train_detector],
        color="0.5",
        linewidth=0.8,
    )
    losses.set(xlabel="step", ylabel="loss (nats)")
    for name, marker in zip(("f1", *(f"f1/{category}" for category in CATEGORIES)), "osv^Dx+"):
        points = [(m["step"], m[name]) for m in held_out if name in m]
        style = dict(color="0", linewidth=2) if name == "f1" else dict(color="0.5", linewidth=0.8)
        figures.plot(*zip(*points), marker=marker, label=name[3:] or "macro", **style)
    figures.set(xlabel="step", ylabel="F1, validation", ylim=(0, 1))
    figures.legend()
