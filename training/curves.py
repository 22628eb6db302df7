"""curves.png: how a run has gone so far, drawn from its metrics.jsonl."""

import contextlib
import itertools
import json
import math
import os

import numpy as np

from common.command_line import warn


def draw_curves(run, draw):
    """Draws RUN/curves.png from RUN/metrics.jsonl, whole or not at all; a full disk is a warning.

    draw(figure, steps, lines): fills a matplotlib Figure. steps: the lines (dicts) of optimizer
    steps, at least one. lines: all of them.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

    path = os.path.join(run, "curves.png")
    temporary = os.path.join(run, "curves.tmp.png")
    try:
        lines = read_metrics(run)
        steps = [line for line in lines if "loss" in line]  # skipped steps have none
        if not steps:
            return
        figure = Figure(layout="tight")
        draw(figure, steps, lines)
        figure.savefig(temporary, dpi=100)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # the metrics may need its room
        warn(f"{path} cannot be drawn ({error})")


def read_metrics(run):
    """The lines of RUN/metrics.jsonl as dicts; NaN for null."""
    with open(os.path.join(run, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    for line in lines:
        for name, value in line.items():
            if value is None:
                line[name] = math.nan
    return lines


def column(lines, name):
    """The values of one figure in all lines that have it."""
    return [line[name] for line in lines if name in line]


def draw_pretraining(figure, steps, lines):
    """Losses, held-out accuracies, learning rate and gradient norm, speed: for `draw_curves`."""
    figure.set_size_inches(11, 7)
    (losses, accuracies), (rates, speeds) = figure.subplots(2, 2, sharex=True)
    at = column(steps, "step")
    held_out = [line for line in lines if "mlm_accuracy" in line]
    held_out_at = column(held_out, "step")

    # Single steps are noise: show a running mean over 1 % of them.
    width = max(1, len(steps) // 100)
    mean_at = at[width - 1 :]

    def running_mean(name):
        return np.convolve(column(steps, name), np.ones(width) / width, "valid")

    losses.plot(mean_at, running_mean("mlm_loss"), label="MLM, training", color="0.2")
    losses.plot(mean_at, running_mean("nsp_loss"), label="NSP, training", color="0.6")
    held_out_loss = column(held_out, "mlm_loss")
    losses.plot(held_out_at, held_out_loss, "o--", label="MLM, held out", color="0.2")
    losses.set(ylabel="loss (nats)", ylim=(0, None))
    losses.legend()

    for name, style, label in (
        ("mlm_accuracy", "o-", "MLM"),
        ("majority_accuracy", ":", "most frequent token"),
        ("nsp_accuracy", "s-", "NSP"),
        ("coin_flip", "--", "coin flip"),
    ):
        accuracies.plot(held_out_at, column(held_out, name), style, label=label, color="0.3")
    accuracies.set(ylabel="held-out accuracy", ylim=(0, 1))
    accuracies.legend()

    rates.plot(at, column(steps, "learning_rate"), color="0.2")
    rates.set(xlabel="step", ylabel="learning rate")
    norms = rates.twinx()
    norms.plot(mean_at, running_mean("grad_norm"), color="0.6")
    norms.set(ylabel="gradient norm (grey)", ylim=(0, None))

    speeds.plot(at, column(steps, "tokens_per_second"), color="0.2")
    speeds.set(xlabel="step", ylabel="tokens / s", ylim=(0, None))


def draw_fine_tuning(figures, baselines, measure, figure, steps, lines):
    """The loss, and the held-out figures beside their baselines: for `draw_curves`.

    figures, baselines: dicts by the names in `lines`. measure: the name of the most important.
    """
    figure.set_size_inches(11, 4)
    losses, scores = figure.subplots(1, 2)
    losses.semilogy(column(steps, "step"), column(steps, "loss"), color="0.5", linewidth=0.8)
    losses.set(xlabel="step", ylabel="loss")

    for name, marker in zip(figures, itertools.cycle("osv^Dx+")):
        held_out = [line for line in lines if name in line]
        width = 2 if name == measure else 0.8
        color = "0" if name == measure else "0.5"
        at = column(held_out, "step")
        values = column(held_out, name)
        scores.plot(at, values, marker=marker, label=name, color=color, linewidth=width)
    for name, style in zip(baselines, itertools.cycle([":", "--", "-."])):
        if name.endswith(measure):
            scores.axhline(baselines[name], color="0", linestyle=style, linewidth=1, label=name)
    scores.set(xlabel="step", ylabel="held out")
    scores.legend(fontsize="small")
