"""TODO."""

import contextlib
import errno
import glob
import json
import os
import sys
import zipfile

import torch

from common.command_line import first_line
from common.files import lock_directory, read_json, write_whole


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
            torch.save(
                {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, f
            )
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        for half in (
            path,
            os.path.join(config.out, "config.json"),
            os.path.join(config.out, "model.safetensors"),
        ):
            with contextlib.suppress(OSError):
                os.remove(half + ".tmp")  # it may take the room that the metrics need
        raise OSError(
            f"{path} cannot be written ({first_line(error)}); make room, and the same command goes on"
        ) from None
    for old in [path for path in checkpoints(config) if step_of(path) <= step][
        : -config.keep_checkpoints
    ]:
        if step_of(old) % config.keep_every:
            os.remove(old)


def checkpoints(config):
    """The paths of a run's checkpoints, oldest first."""
    return sorted(
        glob.glob(os.path.join(glob.escape(config.out), "checkpoints", "[0-9]" * 8 + ".pt"))
    )


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
            if str(error).startswith(
                ("unable to mmap", "unable to open")
            ):  # torch's words where memory or open files run out
                raise OSError(f"{path} cannot be read now ({first_line(error)})") from None
            print(
                f"{path}: damaged ({first_line(error)}); set aside as {path}.damaged",
                file=sys.stderr,
            )
            os.replace(path, path + ".damaged")
    if paths or glob.glob(os.path.join(glob.escape(config.out), "checkpoints", "*.damaged")):
        raise ValueError(
            f"{config.out}: all of its checkpoints are damaged; choose another --out to begin anew"
        )
    return None


def check_checkpoint(path):
    """Raises an exception of any kind where a checkpoint is damaged."""
    with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum,
        torn = archive.testzip()
    if torn is not None:
        raise ValueError(f"the checksum of {torn} is wrong")
    checkpoint = torch.load(
        path, map_location="cpu", mmap=True, weights_only=True
    )  # and zipfile not at what is said twice
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
        raise ValueError(
            f"{path}: does not fit this model ({words}); choose another --out to begin anew"
        ) from None


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
        if any(
            name != ".lock" and not name.startswith("train.json.")
            for name in os.listdir(config.out)
        ):
            raise ValueError(f"{config.out} is not empty and holds no run; choose another --out")
    os.makedirs(config.out, exist_ok=True)
    with lock_directory(config.out) as lock:
        before = arguments_of(config.out)
        for name, value in resolved.items():
            if name not in free and before.get(name, value) != value:
                raise ValueError(
                    f"{config.out} holds a run with {name} {before.get(name)}, not {value}; choose another --out"
                )
        write_whole(path, json.dumps(resolved, indent=1))
        os.makedirs(os.path.join(config.out, "checkpoints"), exist_ok=True)
        return lock.pop_all()
