"""TODO."""

import contextlib
import json
import math
import os
import time

import torch

from common.command_line import warn
from common.files import write_whole


def json_line(figures):
    """A dict as a line of strict JSON, which knows no NaN and no infinity: null stands for them."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


MOST_SKIPPED = 10  # steps in a row


class Metrics:
    """metrics.jsonl: a line for each step and each evaluation, none missing and none twice, however often the run was stopped.

    Steps wait on the device, and are read, summed over the ranks and written at each `flush`, so that no step waits for a GPU.
    """

    def __init__(
        self, path, first_step, ranks, peak, tensorboard=None, terms=("mlm_loss", "nsp_loss")
    ):
        self.path, self.ranks, self.peak, self.terms, self.waiting, self.unwritten = (
            path,
            ranks,
            peak,
            terms,
            [],
            [],
        )
        self.skipped, self.in_a_row, self.tensorboard, kept = 0, 0, None, []
        with ranks.together():
            if ranks.rank == 0:
                if os.path.exists(path):
                    with open(path, "rb") as f:
                        for line in f:
                            with contextlib.suppress(
                                ValueError, TypeError, KeyError
                            ):  # one that was cut short is of a later step
                                line = json.loads(line)
                                kept += [line] if line["step"] <= first_step else []
                write_whole(path, "".join(json_line(line) for line in kept))
                if tensorboard is not None:
                    self.tensorboard = tensorboard(
                        os.path.join(os.path.dirname(path), "tensorboard"),
                        purge_step=first_step + 1,
                    )
        for line in kept:
            self.count_skipped(line)
        self.skipped, self.in_a_row = (
            int(n) for n in ranks.sum([self.skipped, self.in_a_row])
        )  # the first rank's, known to all
        self.start_clock()

    def count_skipped(self, line):
        """Keeps count of the steps whose gradient was not finite."""
        if "skipped" in line:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        elif "loss" in line:
            self.in_a_row = 0

    def start_clock(self):
        """Called after an evaluation or a checkpoint: their time is not the training's."""
        self.clock, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def add(self, step, *values):
        """A step: this rank's parts of the `terms` of the loss and the norm, as 0-d tensors on the device, and the learning rate."""
        *parts, grad_norm, learning_rate = values
        self.waiting.append(
            (step, learning_rate, torch.stack([*parts, grad_norm / self.ranks.world_size]))
        )

    def flush(self):
        """Writes the lines of all waiting steps and returns the last one, on every rank.

        Raises ValueError (the other ranks end in silence) after MOST_SKIPPED steps in a row whose gradient was not finite.
        """
        self.ranks.wait()
        values = self.ranks.sum(torch.stack([values for *_, values in self.waiting]).double().cpu())
        tokens, flops = self.ranks.sum([self.tokens, self.flops])
        elapsed = time.perf_counter() - self.clock
        speed = {"tokens_per_second": round(tokens / elapsed, 1)}
        if self.peak:
            speed["mfu"] = round(flops / elapsed / self.peak / self.ranks.world_size, 4)
        lines = []
        for (step, rate, _), (*parts, norm) in zip(self.waiting, values):
            figures = {"loss": sum(parts)} | dict(zip(self.terms, parts)) | {"grad_norm": norm}
            lines.append(
                {"step": step}
                | (figures if math.isfinite(norm) else {"skipped": True})
                | {"learning_rate": rate}
                | speed
            )
        self.write(*lines)
        self.waiting = []
        self.start_clock()
        for line in lines:
            self.count_skipped(line)
            if self.in_a_row >= MOST_SKIPPED:
                words = f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {line['step']}; a lower learning rate "
                words += "may be what it takes, or a look at the data (the same command tries again from the last checkpoint)"
                raise ValueError(words) if self.ranks.rank == 0 else SystemExit(2)
        return lines[-1]

    def write(self, *lines):
        """Appends lines (dicts) on the first rank. Where the disk is full they wait for the next time."""
        if self.ranks.rank != 0:
            return
        self.unwritten += [json_line(line) for line in lines]
        end = os.path.getsize(self.path)
        try:
            with open(self.path, "a") as f:
                f.writelines(self.unwritten)
                f.flush()
                os.fsync(f.fileno())  # before the checkpoint that needs them
            self.unwritten = []
        except OSError as error:
            os.truncate(self.path, end)
            warn(f"{self.path} cannot be written ({error}); its lines wait")
        if self.tensorboard is not None:
            for line in lines:
                for name in line.keys() - {"step", "skipped"}:
                    self.tensorboard.add_scalar(name, line[name], line["step"])
            self.tensorboard.flush()
