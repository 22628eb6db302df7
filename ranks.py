"""The processes of a run: which of them this is, what they agree on, and how they end together.

torchrun (or any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts them; without it there is one.
"""

import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from data import first_line

GRACE = 5  # seconds that the ranks which are left have to say so


@dataclass
class Ranks:
    """Which process this is among those that torchrun started; alone without it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None  # a gloo group: small sums on the CPU, for which no GPU has to be waited for

    @classmethod
    def start(cls, device, timeout=600):
        """Joins the process group where torchrun asks for one. device: auto, cpu or cuda. timeout: seconds."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if "RANK" not in os.environ:
            return cls(device=torch.device(device, 0 if device == "cuda" else None))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device(device, int(os.environ["LOCAL_RANK"]) if device == "cuda" else None)
        patience = timedelta(seconds=timeout)
        nccl = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(**nccl, timeout=patience)
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo", timeout=patience))

    def sum(self, values):
        """The sum over ranks of a list of numbers, or of a CPU tensor."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values.tolist()

    @contextlib.contextmanager
    def together(self):
        """A part of the set-up that fails on all ranks where it fails on one: the first of those raises, the others end in silence."""
        failure = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        failed = self.sum([float(rank == self.rank and failure is not None) for rank in range(self.world_size)])
        if any(failed):
            raise failure if failed.index(1.0) == self.rank else SystemExit(2)

    @contextlib.contextmanager
    def watched(self):
        """A rank that dies or hangs in here ends the others with status 1 and one sentence that names it, by the first that noticed."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not re.search("gloo|nccl|peer|socket|connection|timed out", str(error), re.IGNORECASE):
                raise
            missing, stored = [0], False  # where the store is gone with the rank that held it
            with contextlib.suppress(RuntimeError):
                store = dist.distributed_c10d._get_default_store()
                store.set(f"alive {self.rank}", "")
                if store.add("noticed", 1) > 1:
                    os._exit(1)  # so that its neighbours notice at once
                time.sleep(GRACE)
                missing = [rank for rank in range(self.world_size) if not store.check([f"alive {rank}"])]
                stored = True
            who = f"rank {', '.join(map(str, missing))} of {self.world_size} is gone" if missing else "the ranks lost each other"
            speaks = stored or os.environ.get("LOCAL_RANK", "0") in ("0", "1")  # without the store, one or two for each machine
            if not speaks:
                os._exit(1)
            print(f"train.py: error: {who} ({first_line(error)}); the same command goes on from the last checkpoint", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # at once: what NCCL waits for will never come
