"""metrics.jsonl: a line for each step and each evaluation, however often the run was stopped."""

import contextlib
import json
import math
import os
import time

import torch

from common.command_line import warn
from common.files import write_whole

MOST_SKIPPED = 10  # steps in a row whose gradient is not finite end the run


class Metrics:
    """Writes metrics.jsonl. No line is missing and none is there twice.

    The figures of a step stay on the device. At each `flush` they are read, summed over the ranks
    and written, so that no step waits for a GPU.

    path: the file, whose lines after `first_step` are dropped. peak: FLOP/s of a device, or None.
    terms: names of the terms of the loss, in the order in which `add` gets them.
    """

    def __init__(self, path, first_step, ranks, peak, terms=("mlm_loss", "nsp_loss")):
        self.path = path
        self.ranks = ranks
        self.peak = peak
        self.terms = terms
        self.waiting = []  # steps whose figures are still on the device
        self.unwritten = []  # lines that a full disk did not take
        self.skipped = 0  # steps whose gradient was not finite, of the whole run
        self.skipped_in_a_row = 0
        with ranks.together():
            if ranks.lead:
                kept = lines_up_to(path, first_step)
                write_whole(path, "".join(map(json_line, kept)))
                for line in kept:
                    self.count_skipped(line)
        skipped = ranks.sum([self.skipped, self.skipped_in_a_row])  # the first rank knows
        self.skipped, self.skipped_in_a_row = map(int, skipped)
        self.start_clock()

    def count_skipped(self, line):
        """Counts the steps whose gradient was not finite."""
        if "skipped" in line:
            self.skipped += 1
            self.skipped_in_a_row += 1
        elif "loss" in line:
            self.skipped_in_a_row = 0

    def start_clock(self):
        """To be called after an evaluation or a checkpoint, whose time is not the training's."""
        self.clock = time.perf_counter()
        self.tokens = 0
        self.flops = 0.0

    def count(self, tokens, flops):
        """Adds this rank's work, for tokens/s and MFU."""
        self.tokens += tokens
        self.flops += flops

    def add(self, step, losses, grad_norm, learning_rate):
        """Notes a step. losses: (terms,), this rank's parts. grad_norm: (). Both on the device."""
        share = grad_norm / self.ranks.world_size  # the sum over the ranks is the norm again
        figures = torch.cat([losses, share.reshape(1)])
        self.waiting.append((step, learning_rate, figures))

    def flush(self):
        """Writes the lines of all waiting steps; returns the last one, on every rank.

        Raises ValueError on the first rank, and SystemExit on the others, after MOST_SKIPPED steps
        in a row whose gradient was not finite.
        """
        self.ranks.wait()
        figures = torch.stack([figures for _, _, figures in self.waiting])
        figures = self.ranks.sum(figures.double().cpu())
        tokens, flops = self.ranks.sum([self.tokens, self.flops])
        elapsed = time.perf_counter() - self.clock
        speed = {"tokens_per_second": round(tokens / elapsed, 1)}
        if self.peak:
            speed["mfu"] = round(flops / elapsed / self.peak / self.ranks.world_size, 4)

        lines = []
        for (step, learning_rate, _), (*losses, grad_norm) in zip(self.waiting, figures):
            line = {"step": step}
            if math.isfinite(grad_norm):
                line["loss"] = sum(losses)
                line |= dict(zip(self.terms, losses))
                line["grad_norm"] = grad_norm
            else:
                line["skipped"] = True
            lines.append(line | {"learning_rate": learning_rate} | speed)
        self.waiting = []
        self.write(*lines)
        self.start_clock()
        for line in lines:
            self.count_skipped(line)
            if self.skipped_in_a_row >= MOST_SKIPPED:
                self.give_up(line["step"])
        return lines[-1]

    def give_up(self, step):
        """Ends a run that no longer learns."""
        if not self.ranks.lead:
            raise SystemExit(2)
        raise ValueError(
            f"the gradient was not finite in {MOST_SKIPPED} steps in a row, up to step {step}; "
            "try a lower learning rate, or look at the data (the same command tries again from "
            "the last checkpoint)"
        )

    def write(self, *lines):
        """Appends lines (dicts), on the first rank. On a full disk they wait for next time."""
        if not self.ranks.lead:
            return
        self.unwritten += map(json_line, lines)
        end = os.path.getsize(self.path)
        try:
            with open(self.path, "a") as f:
                f.writelines(self.unwritten)
                f.flush()
                os.fsync(f.fileno())  # before the checkpoint of these steps
            self.unwritten = []
        except OSError as error:
            os.truncate(self.path, end)
            warn(f"{self.path} cannot be written ({error}); its lines wait")


def lines_up_to(path, last_step):
    """The lines of a metrics.jsonl up to a step, as dicts; none if the file is missing."""
    lines = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            for text in f:
                # A line that was cut short belongs to a later step.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    line = json.loads(text)
                    if line["step"] <= last_step:
                        lines.append(line)
    return lines


def json_line(figures):
    """A dict as a line of strict JSON, which has no NaN and no infinity: they become null."""
    finite = {}
    for name, value in figures.items():
        not_finite = isinstance(value, float) and not math.isfinite(value)
        finite[name] = None if not_finite else value
    return json.dumps(finite, allow_nan=False) + "\n"
