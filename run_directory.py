"""What a run leaves on disk, and how it is found again: train.json, metrics.jsonl, curves.png and checkpoints/.

A step's lines are in metrics.jsonl before its checkpoint is written, and a checkpoint is there whole or not at all; so a run that was
killed at any moment goes on from the newest sound checkpoint, with the lines up to it. Only one process at a
time writes there: it holds the lock .lock.
"""

import contextlib
import errno
import glob
import json
import math
import os
import sys
import time
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from data import first_line, lock_directory, read_json, write_whole


def save_checkpoint(config, model, optimizer, tokenizer, step, publish=True):
    """Writes the model and checkpoints/STEP.pt, each whole or not at all, and drops the oldest checkpoints.

    The checkpoint comes last: where it exists, all that belongs to its step does. publish: whether this is the model of the run directory.
    """
    path = os.path.join(config.out, "checkpoints", f"{step:08d}.pt")
    try:
        if publish:
            model.save_pretrained(config.out)
        tokenizer.save_pretrained(config.out)
        with open(path + ".tmp", "wb") as f:
            torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        for half in (path, os.path.join(config.out, "config.json"), os.path.join(config.out, "model.safetensors")):
            with contextlib.suppress(OSError):
                os.remove(half + ".tmp")  # it may take the room that the metrics need
        raise OSError(f"{path} cannot be written ({first_line(error)}); make room, and the same command goes on") from None
    for old in [path for path in checkpoints(config) if step_of(path) <= step][: -config.keep_checkpoints]:
        if step_of(old) % config.keep_every:
            os.remove(old)


def checkpoints(config):
    """The paths of a run's checkpoints, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(config.out), "checkpoints", "[0-9]" * 8 + ".pt")))


def step_of(path):
    """The step of a checkpoint, from its name."""
    return int(os.path.basename(path)[:-3])


def newest_sound_checkpoint(config):
    """Path of the newest checkpoint that is whole, or None. A damaged one is named and set aside.

    Raises ValueError where there are checkpoints and all are damaged: to begin anew is not what was asked for.
    """
    paths = checkpoints(config)
    for path in reversed(paths):
        try:
            check_checkpoint(path)
            return path
        except Exception as error:  # damage shows itself in many ways
            # It may be whole, and cannot be read now. (EINVAL: a damaged offset, from which nothing can be read.)
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            if str(error).startswith(("unable to mmap", "unable to open")):  # torch's words where memory or open files run out
                raise OSError(f"{path} cannot be read now ({first_line(error)})") from None
            print(f"{path}: damaged ({first_line(error)}); set aside as {path}.damaged", file=sys.stderr)
            os.replace(path, path + ".damaged")
    if paths or glob.glob(os.path.join(glob.escape(config.out), "checkpoints", "*.damaged")):
        raise ValueError(f"{config.out}: all of its checkpoints are damaged; choose another --out to begin anew")
    return None


def check_checkpoint(path):
    """Raises an exception of any kind where a checkpoint is damaged."""
    with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum,
        torn = archive.testzip()
    if torn is not None:
        raise ValueError(f"the checksum of {torn} is wrong")
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # and zipfile not at what is said twice
    if not isinstance(checkpoint, dict) or checkpoint.get("step") != step_of(path):
        raise ValueError("it is not of this step")
    for name in ("model", "optimizer"):
        if not isinstance(checkpoint.get(name), dict):
            raise ValueError(f"it holds no {name}")


def load_checkpoint(path, model, optimizer, device):
    """Puts a checkpoint into the model and the optimizer. Raises ValueError where it is of other ones."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: does not fit this model ({words}); choose another --out to begin anew") from None


def warn(text):
    """Says what went wrong and is tried again."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def arguments_of(out):
    """The resolved arguments of the run in `out`, a dict, {} where there is none. Raises ValueError where its train.json is damaged."""
    path = os.path.join(out, "train.json")
    return read_json(path) if os.path.exists(path) else {}


def open_run(config, resolved, free):
    """Makes the run directory, or checks that the run in it has the same arguments, but for the names in `free`.

    Returns the lock on it (see `lock_directory`), to be held while the run goes on. Raises ValueError where the arguments differ, and where
    another process holds the lock.
    """
    path = os.path.join(config.out, "train.json")
    if os.path.isdir(config.out) and not os.path.exists(path):
        if any(name != ".lock" and not name.startswith("train.json.") for name in os.listdir(config.out)):
            raise ValueError(f"{config.out} is not empty and holds no run; choose another --out")
    os.makedirs(config.out, exist_ok=True)
    with lock_directory(config.out) as lock:
        before = arguments_of(config.out)
        for name, value in resolved.items():
            if name not in free and before.get(name, value) != value:
                raise ValueError(f"{config.out} holds a run with {name} {before.get(name)}, not {value}; choose another --out")
        write_whole(path, json.dumps(resolved, indent=1))
        os.makedirs(os.path.join(config.out, "checkpoints"), exist_ok=True)
        return lock.pop_all()


def json_line(figures):
    """A dict as a line of strict JSON, which knows no NaN and no infinity: null stands for them."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


MOST_SKIPPED = 10  # steps in a row


class Metrics:
    """metrics.jsonl: a line for each step and each evaluation, none missing and none twice, however often the run was stopped.

    Steps wait on the device, and are read, summed over the ranks and written at each `flush`, so that no step waits for a GPU.
    """

    def __init__(self, path, first_step, ranks, peak, tensorboard=None, terms=("mlm_loss", "nsp_loss")):
        self.path, self.ranks, self.peak, self.terms, self.waiting, self.unwritten = path, ranks, peak, terms, [], []
        self.skipped, self.in_a_row, self.tensorboard, kept = 0, 0, None, []
        with ranks.together():
            if ranks.rank == 0:
                if os.path.exists(path):
                    with open(path, "rb") as f:
                        for line in f:
                            with contextlib.suppress(ValueError, TypeError, KeyError):  # one that was cut short is of a later step
                                line = json.loads(line)
                                kept += [line] if line["step"] <= first_step else []
                write_whole(path, "".join(json_line(line) for line in kept))
                if tensorboard is not None:
                    self.tensorboard = tensorboard(os.path.join(os.path.dirname(path), "tensorboard"), purge_step=first_step + 1)
        for line in kept:
            self.count_skipped(line)
        self.skipped, self.in_a_row = (int(n) for n in ranks.sum([self.skipped, self.in_a_row]))  # the first rank's, known to all
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
        self.waiting.append((step, learning_rate, torch.stack([*parts, grad_norm / self.ranks.world_size])))

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
            lines.append({"step": step} | (figures if math.isfinite(norm) else {"skipped": True}) | {"learning_rate": rate} | speed)
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


def draw_curves(run, draw):
    """Draws RUN/curves.png from RUN/metrics.jsonl, whole or not at all; warns where it cannot be written.

    draw(figure, steps, lines): fills a matplotlib Figure; steps: the lines (dicts) of optimizer steps, at least one; lines: all of them.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

    path, temporary = os.path.join(run, "curves.png"), os.path.join(run, "curves.tmp.png")
    try:
        with open(os.path.join(run, "metrics.jsonl")) as f:
            lines = [json.loads(line) for line in f]
        lines = [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]
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
    width = max(1, len(train) // 100)  # the curve of single steps is noise: a running mean over 1 % of them
    smooth = lambda name: np.convolve([m[name] for m in train], np.ones(width) / width, "valid")  # noqa: E731
    losses.plot(steps[width - 1 :], smooth("mlm_loss"), label="MLM, training", color="0.2")
    losses.plot(steps[width - 1 :], smooth("nsp_loss"), label="NSP, training", color="0.6")
    losses.plot([m["step"] for m in held_out], [m["mlm_loss"] for m in held_out], "o--", label="MLM, held out", color="0.2")
    losses.set(ylabel="loss (nats)", ylim=(0, None))
    for name, style, label in [
        ("mlm_accuracy", "o-", "MLM"),
        ("majority_accuracy", ":", "most frequent token"),
        ("nsp_accuracy", "s-", "NSP"),
        ("coin_flip", "--", "coin flip"),
    ]:
        accuracies.plot([m["step"] for m in held_out], [m[name] for m in held_out], style, label=label, color="0.3")
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
