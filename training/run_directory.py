"""What a run leaves on disk, and how it is found again.

    config.json, model.safetensors, tokenizer.json   the model, a Hugging Face directory
    train.json         the resolved arguments
    metrics.jsonl      a line for each step and each evaluation (see metrics.py)
    checkpoints/       00001000.pt, ...: the step, the weights, the optimizer
    .lock              held by the process that writes here

The lines of a step are in metrics.jsonl before its checkpoint is written, and a checkpoint is
there whole or not at all. So a run that was killed at any moment goes on from its newest sound
checkpoint, with the lines up to it.
"""

import contextlib
import errno
import glob
import json
import os
import re
import zipfile
from dataclasses import asdict

import torch

from common.command_line import first_line, warn
from common.files import (
    lock_directory,
    read_json,
    remove_quietly,
    write_whole,
    written_whole,
)


class RunDirectory:
    """The directory of a run, locked for its ranks until `close`; also a context manager.

    config: the arguments, with `out`, `keep_checkpoints` and `keep_every`. resolved: a dict of all
    arguments, written to train.json. machine_fields: names of those that may differ between two
    starts of one run, since they change where and how fast it is computed, and not what.

    Raises ValueError if the directory holds something else, a run with other arguments, or if
    another process writes there; on one rank, and SystemExit on the others.
    """

    def __init__(self, config, ranks, resolved, machine_fields):
        self.config = config
        self.ranks = ranks
        self.lock = contextlib.ExitStack()
        with ranks.together():
            if ranks.lead:
                defaults = asdict(type(config)())
                self.lock = open_directory(config.out, resolved, machine_fields, defaults)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lock.close()

    def resume(self, model, optimizer):
        """Loads the newest sound checkpoint, if there is one; returns its step, or 0."""
        path = None
        with self.ranks.together():
            if self.ranks.lead:
                path = newest_sound_checkpoint(self.config.out)
        # What the first rank found holds for all.
        step = int(self.ranks.sum([step_of(path) if path else 0])[0])
        with self.ranks.together():
            if step:
                path = checkpoint_path(self.config.out, step)
                if not os.path.exists(path):
                    out = self.config.out
                    raise ValueError(
                        f"rank {self.ranks.rank} does not see {path}: all ranks must share {out}"
                    )
                load_checkpoint(path, model, optimizer, self.ranks.device)
                self.ranks.say(f"Continuing {self.config.out} after step {step}.")
        return step

    def save(self, step, model, optimizer, tokenizer, metrics, *, must_succeed, publish=True):
        """Writes a checkpoint, on the first rank. A full disk is a warning, or OSError if it must.

        publish: also write the weights as the directory's model.
        """
        if not self.ranks.lead:
            return
        path = checkpoint_path(self.config.out, step)
        try:
            if metrics.unwritten:
                raise OSError(f"the lines of {metrics.path} come first")
            tokenizer.save_pretrained(self.config.out)
            if publish:
                model.save_pretrained(self.config.out)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with written_whole(path) as f:
                torch.save({"step": step} | state, f)
        except (OSError, RuntimeError) as error:  # torch.save makes a full disk a RuntimeError
            words = f"{path} cannot be written ({first_line(error)}); make room"
            if must_succeed:
                raise OSError(f"{words}, and the same command goes on") from None
            warn(words)
            return
        self.drop_old_checkpoints(step)

    def drop_old_checkpoints(self, step):
        """Removes all but the newest checkpoints up to `step`, and those that are kept for good."""
        sound = [path for path in checkpoints(self.config.out) if step_of(path) <= step]
        for old in sound[: -self.config.keep_checkpoints]:
            if step_of(old) % self.config.keep_every:
                os.remove(old)


def open_directory(out, resolved, machine_fields, defaults):
    """Makes the directory, or checks that it holds the same run; returns its lock.

    defaults: of the arguments, for those that the run's train.json is too old to know.
    """
    path = os.path.join(out, "train.json")
    if os.path.isdir(out) and not os.path.exists(path):
        # A start that was killed at once may have left a lock, or half of train.json.
        for name in os.listdir(out):
            if name != ".lock" and not name.startswith("train.json."):
                raise ValueError(f"{out} is not empty and holds no run; choose another --out")
    os.makedirs(out, exist_ok=True)
    with lock_directory(out) as lock:
        before = arguments_of(out)
        for name, value in resolved.items():
            known = before.get(name, defaults.get(name, value) if before else value)
            if name not in machine_fields and known != value:
                raise ValueError(
                    f"{out} holds a run with {name} {known}, not {value}; choose another --out"
                )
        for half in leftovers(out):
            remove_quietly(half)
        write_whole(path, json.dumps(resolved, indent=1))
        os.makedirs(os.path.join(out, "checkpoints"), exist_ok=True)
        return lock.pop_all()  # still held


def leftovers(out):
    """What a start that was killed left half written: large, and of no use."""
    run = glob.escape(out)
    paths = glob.glob(f"{run}/*.tmp") + glob.glob(f"{run}/checkpoints/*.tmp")
    return [path for path in paths if re.search(r"\.[0-9a-f]{8}\.tmp$", path)]


def arguments_of(out):
    """The resolved arguments of the run in `out`; {} if there is none. ValueError if damaged."""
    path = os.path.join(out, "train.json")
    return read_json(path) if os.path.exists(path) else {}


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoint_path(out, step):
    """Where the checkpoint of a step lies."""
    return os.path.join(out, "checkpoints", f"{step:08d}.pt")


def checkpoints(out):
    """The paths of a run's checkpoints, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(out), "checkpoints", "[0-9]" * 8 + ".pt")))


def step_of(path):
    """The step of a checkpoint, from its name."""
    return int(os.path.basename(path).removesuffix(".pt"))


def newest_sound_checkpoint(out):
    """The path of the newest checkpoint that is whole, or None. Damaged ones are set aside.

    Raises ValueError if there are checkpoints and all are damaged: nobody asked to begin anew.
    """
    paths = checkpoints(out)
    for path in reversed(paths):
        try:
            check_checkpoint(path)
            return path
        except Exception as error:  # damage shows itself in many ways
            if may_be_sound(error):
                raise OSError(f"{path} cannot be read now ({first_line(error)})") from None
            warn(f"{path}: damaged ({first_line(error)}); set aside as {path}.damaged")
            os.replace(path, path + ".damaged")
    damaged = os.path.join(glob.escape(out), "checkpoints", "*.damaged")
    if paths or glob.glob(damaged):
        raise ValueError(
            f"{out}: all of its checkpoints are damaged; choose another --out to begin anew"
        )
    return None


def may_be_sound(error):
    """True if a checkpoint could not be read for want of memory, open files or permission."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)  # EINVAL: its offsets are damaged
    return str(error).startswith(("unable to mmap", "unable to open"))  # torch's words for it


def check_checkpoint(path):
    """Raises an exception of some kind if a checkpoint is damaged."""
    # zipfile checks the sums, torch.load does not; torch.load checks what the file says of itself.
    with zipfile.ZipFile(path) as archive:
        torn = archive.testzip()
    if torn is not None:
        raise ValueError(f"the checksum of {torn} is wrong")
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(checkpoint, dict) or checkpoint.get("step") != step_of(path):
        raise ValueError("it is not of this step")
    for name in ("model", "optimizer"):
        if not isinstance(checkpoint.get(name), dict):
            raise ValueError(f"it holds no {name}")


def load_checkpoint(path, model, optimizer, device):
    """Puts a checkpoint into the model and the optimizer. Raises ValueError if it does not fit."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: does not fit this model ({words}); choose another --out to begin anew"
        ) from None
