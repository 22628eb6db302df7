"""The processes of a run: which of them this is, what they agree on, and how they end together.

torchrun starts them (or any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT). Without a launcher there is one.
"""

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.command_line import first_line, program_name

GRACE = 5  # seconds that the surviving ranks have to answer after one has died

LOST = re.compile("gloo|nccl|peer|socket|connection|timed out", re.IGNORECASE)


@dataclass
class Ranks:
    """Which process this is among those of the run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None  # a gloo group: sums of a few numbers on the CPU, no GPU involved
    timeout: float = 600  # seconds

    @property
    def lead(self):
        """True for the one rank that prints and writes."""
        return self.rank == 0

    def say(self, text):
        """Prints on the first rank only."""
        if self.lead:
            print(text, flush=True)

    @classmethod
    def start(cls, device, timeout=600):
        """Joins the other ranks, if a launcher started any.

        device: auto, cpu or cuda. timeout: seconds. Raises ValueError for a device that is not
        there, and if only some of the launcher's variables are set.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        use_gpu = device != "cpu" and torch.cuda.is_available()
        if "RANK" not in os.environ:
            return cls(device=torch.device("cuda", 0) if use_gpu else torch.device("cpu"))

        rank, local_rank, world_size, address, port = launcher_variables()
        if use_gpu and local_rank >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise ValueError(
                f"rank {rank} has no GPU: it is number {local_rank + 1} on a machine with {gpus}"
            )
        device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
        patience = timedelta(seconds=timeout)
        backend = {"backend": "gloo", "timeout": patience}
        if use_gpu:
            torch.cuda.set_device(device)
            # NCCL's own patience is longer: `wait` ends with a sentence, NCCL with a page.
            longer = 2 * patience + timedelta(minutes=1)
            backend = {"backend": "nccl", "device_id": device, "timeout": longer}
        try:
            store = meet(address, port, rank, world_size, timeout)
            dist.init_process_group(store=store, rank=rank, world_size=world_size, **backend)
            control = dist.new_group(backend="gloo", timeout=patience)
        except RuntimeError as error:
            words = f"the ranks did not find each other at {address}:{port} ({first_line(error)})"
            print(f"{program_name()}: error: {words}", file=sys.stderr)
            raise SystemExit(1) from None
        return cls(rank, world_size, device, control, timeout)

    def wait(self):
        """Waits until the GPU has done all that it was given.

        Raises RuntimeError if a rank that died or hangs keeps it from that.
        """
        if self.device.type != "cuda" or self.world_size == 1:
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self.timeout
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError("NCCL timed out")
            time.sleep(1e-4)

    def sum(self, values):
        """The sum over the ranks of a list of numbers, or of a CPU tensor, as a list."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values.tolist()

    @contextlib.contextmanager
    def together(self):
        """A part of the set-up that fails on all ranks if it fails on one.

        The first of those that failed raises its error; the others end in silence.
        """
        failure = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        failed_here = [0.0] * self.world_size
        failed_here[self.rank] = float(failure is not None)
        failed = self.sum(failed_here)
        if any(failed):
            raise failure if failed.index(1.0) == self.rank else SystemExit(2)

    @contextlib.contextmanager
    def watched(self):
        """A rank that dies or hangs in here ends all others, with status 1.

        The first that notices says which rank it was.
        """
        if self.world_size == 1:
            yield
            return
        asked = threading.Event()
        over = threading.Event()
        answering = threading.Thread(target=self._answer, args=(asked, over), daemon=True)
        answering.start()
        try:
            yield
        except RuntimeError as error:
            if not LOST.search(str(error)):
                raise
            missing = self._missing(asked)
            if missing is not None:
                names = ", ".join(map(str, missing))
                who = f"rank {names} of {self.world_size} is gone"
                if not missing:
                    who = "the ranks lost each other"
                again = "the same command goes on from the last checkpoint"
                words = f"{who} ({first_line(error)}); {again}"
                print(f"{program_name()}: error: {words}", file=sys.stderr, flush=True)
            os._exit(1)  # at once: NCCL waits for what will never come
        finally:
            over.set()
            answering.join(GRACE)  # Python aborts if it exits while a thread is inside the store

    def _answer(self, asked, over):
        """Says that this process is alive once another rank has noticed a death; sets `asked`.

        A thread of its own, since the main one may be waiting for a rank that is waiting too.
        """
        with contextlib.suppress(RuntimeError):  # the store died with the rank that held it
            store = dist.distributed_c10d._get_default_store()
            while not over.wait(GRACE / 10):
                if store.check(["noticed"]):
                    store.set(f"alive {self.rank}", "")
                    asked.set()
                    return

    def _missing(self, asked):
        """The ranks that do not answer; None if it is for another rank to say so.

        Then this one waits for that one: it may hold the store, and a launcher may kill all ranks
        as soon as the first has ended.
        """
        try:
            another_speaks = asked.is_set()
            if not another_speaks:
                store = dist.distributed_c10d._get_default_store()
                store.set(f"alive {self.rank}", "")
                another_speaks = store.add("noticed", 1) > 1
            if another_speaks:
                time.sleep(GRACE + 1)
                return None
            time.sleep(GRACE)
            return [rank for rank in range(self.world_size) if not store.check([f"alive {rank}"])]
        except RuntimeError:
            # The store died with rank 0, which held it. One or two ranks speak for each machine.
            return [0] if os.environ.get("LOCAL_RANK", "0") in ("0", "1") else None


def launcher_variables():
    """(rank, local rank, world size, address, port) as torchrun sets them.

    Raises ValueError if one of the variables is missing.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    values = [os.environ.get(name, "") for name in names]
    numbers = values[:4]
    address = values[4]
    if not address or not all(number.isdecimal() for number in numbers):
        given = ", ".join(map(repr, values))
        raise ValueError(
            f"RANK is set: then {', '.join(names)} must all be, as torchrun does, not {given}"
        )
    rank, local_rank, world_size, port = map(int, numbers)
    return rank, local_rank, world_size, address, port


def meet(address, port, rank, world_size, timeout):
    """A store in which the ranks of this start, and none of an earlier one, find each other.

    torchrun's store survives restarts and still lists dead ranks; connecting to them hangs. Nor do
    torchrun's agents agree on the number of restarts. So each rank calls under a fresh name, and
    rank 0 answers all of them with one prefix, which is its own name.

    Raises RuntimeError if some ranks do not come within `timeout` seconds.
    """
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0 and not by_torchrun,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=not by_torchrun,
    )
    name = uuid.uuid4().hex
    store.set(f"call {rank}", name)
    if rank != 0:
        prefix = store.get(f"answer {name}").decode()
        store.set(f"{prefix} {rank}", "came")
        return dist.PrefixStore(prefix, store)

    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout
    while missing:
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"rank {ranks} of {world_size} did not come in {timeout} s")
        for other in sorted(missing):
            if store.check([f"call {other}"]):
                store.set("answer " + store.get(f"call {other}").decode(), name)
            if store.check([f"{name} {other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)
