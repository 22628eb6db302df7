"""The two pictures of the front page, drawn from a run: `python -m bench pictures runs/tiny`.

results/tiny-curves.png     losses and held-out accuracies of the run, from its metrics.jsonl
results/filled-masks.png    the model's five best answers at a mask in a line of code
"""

import json
import os
import re
import textwrap

import numpy as np
from matplotlib.figure import Figure  # not pyplot, whose state belongs to the caller

from corpus.tokenizer import Tokenizer
from starencoder import StarEncoderForPreTraining, fill_mask

DARK = "#1b4965"
LIGHT = "#9db4c0"
ACCENT = "#e07a1f"  # for what the eye should find first
WIDTH = 9  # inches; at 120 dots an inch the text is as large as that of a README

# Chosen for what they show, a name and a keyword that the rest of the line gives away. A token of
# this tokenizer begins with the space before it, so that <mask> stands in its place as well.
LINES = [
    "    def test_add(self):\n        self.<mask>(add(1, 2), 3)",
    "if x is<mask> None:\n    return x",
]


def draw_pictures(run, directory="results"):
    """Draws both pictures from a run directory."""
    os.makedirs(directory, exist_ok=True)
    for name, draw in (("tiny-curves.png", draw_curves), ("filled-masks.png", draw_masks)):
        figure = Figure(figsize=(WIDTH, 3), layout="constrained")
        draw(figure, run)

        # A figure has no frame, and says nothing twice.
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        path = os.path.join(directory, name)
        figure.savefig(path, dpi=120)
        print(f"{path}, {os.path.getsize(path) / 1000:.0f} kB")


def draw_curves(figure, run):
    """Losses on the left; on the right accuracies on held-out pairs, beside their baselines."""
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    train = [line for line in lines if "loss" in line]  # a step that was skipped has none
    held_out = [line for line in lines if "mlm_accuracy" in line]
    losses, accuracies = figure.subplots(1, 2, width_ratios=[1, 1.3])

    # A single step is noise. The curve is a running mean over 2 % of the steps.
    width = max(1, len(train) // 50)
    steps = [line["step"] for line in train]
    for name, label, color in (("mlm_loss", "masked tokens", DARK), ("nsp_loss", "pairs", ACCENT)):
        values = [line[name] for line in train]
        mean = np.convolve(values, np.ones(width) / width, "valid")
        losses.plot(steps[width - 1 :], mean, color=color, label=f"{label}, training")

    # Held-out figures exist for a few steps only.
    points = [line["step"] for line in held_out]
    values = [line["mlm_loss"] for line in held_out]
    losses.plot(points, values, "o", color=DARK, label="masked tokens, held out")
    losses.set(title="Loss (nats)", xlabel="step", xlim=(0, None), ylim=(0, None))
    losses.legend(frameon=False, loc="upper right")

    # Each curve has its name and its last value at its end.
    endings = []  # (last value, its text, color)
    for name, style, color, label in (
        ("nsp_accuracy", "o-", ACCENT, "does B follow A?"),
        ("coin_flip", "--", ACCENT, "a coin"),
        ("mlm_accuracy", "o-", DARK, "masked tokens"),
        ("majority_accuracy", "--", DARK, "always the most frequent token"),
    ):
        values = [100 * line[name] for line in held_out]
        accuracies.plot(points, values, style, color=color)
        endings.append((values[-1], f"{values[-1]:.0f} %: {label}", color))
    height = -8
    for value, text, color in sorted(endings):
        height = max(value, height + 8)  # one text does not lie upon another
        accuracies.annotate(
            text,
            xy=(points[-1], height),
            xytext=(8, 0),  # in points, to the right of the last one
            textcoords="offset points",
            va="center",
            color=color,
        )
    accuracies.set(title="Right answers on held-out code (%)", xlabel="step", ylim=(0, 100))
    accuracies.set(xlim=(0, 2.05 * points[-1]), xticks=[0, *points])  # room for the names


def draw_masks(figure, run):
    """One panel a line of code: the line, and below it the five most probable answers."""
    model = StarEncoderForPreTraining.from_pretrained(run).eval()
    tokenizer = Tokenizer.from_pretrained(run)
    # One scale for all panels, so that bars can be compared.
    panels = figure.subplots(1, len(LINES), sharex=True)
    for axes, line in zip(panels, LINES):
        (answers,) = fill_mask(model, tokenizer, line, top_k=5)
        names = [readable(answer["token_str"]) for answer in answers]
        percent = [100 * answer["score"] for answer in answers]

        # The most probable answer on top, in the colour of the mask.
        bars = axes.barh(range(5), percent, color=[ACCENT] + 4 * [LIGHT])
        axes.bar_label(bars, [f"{value:.0f} %" for value in percent], padding=4)
        axes.invert_yaxis()
        axes.spines["bottom"].set_visible(False)
        axes.set(xticks=[], yticks=range(5), yticklabels=names)
        axes.margins(x=0.15)  # room for the numbers
        axes.tick_params(axis="y", length=0, labelfontfamily="monospace", labelsize=11)

        # Text has one colour. So the code stands there twice: without its mask, and only its mask.
        shown = textwrap.dedent(line).replace("is<mask>", "is <mask>")
        before, after = shown.split("<mask>")
        blank = re.sub(r"\S", " ", before)
        draw_code(axes, f"{before}      {after}", "black")
        draw_code(axes, f"{blank}<mask>" + "\n" * after.count("\n"), ACCENT)


def readable(token):
    """A token without the space that it begins with; white space as Python writes it."""
    name = token.strip()
    return name if name and name.isprintable() else repr(token)[1:-1]


def draw_code(axes, text, color):
    """Writes two lines of code above the panel."""
    font = dict(family="monospace", size=12, color=color)
    axes.text(0, 1.08, text, transform=axes.transAxes, **font)
