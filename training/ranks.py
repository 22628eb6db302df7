"""TODO."""

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

GRACE = 5  # seconds that the ranks which are left have to answer


@dataclass
class Ranks:
    """Which process this is among those that torchrun started; alone without it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = (
        None  # a gloo group: small sums on the CPU, for which no GPU has to be waited for
    )

    timeout: float = 600  # seconds

    @classmethod
    def start(cls, device, timeout=600):
        """Joins the process group where torchrun asks for one. device: auto, cpu or cuda. timeout: seconds.

        Raises ValueError for a device that is not there, and for half of torchrun's variables.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if "RANK" not in os.environ:
            return cls(device=torch.device(device, 0 if device == "cuda" else None))
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
        values = [os.environ.get(name, "") for name in names]
        if not all(value.isdecimal() for value in values[:4]) or not values[4]:
            raise ValueError(
                f"RANK is set: then {', '.join(names)} must all be, as torchrun does, not {', '.join(map(repr, values))}"
            )
        rank, local_rank, world_size, port = map(int, values[:4])
        if device == "cuda" and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {rank} has no GPU: it is number {local_rank + 1} on a machine with {torch.cuda.device_count()}"
            )
        device = torch.device(device, local_rank if device == "cuda" else None)
        patience = timedelta(seconds=timeout)
        try:
            store = meet(values[4], port, rank, world_size, timeout)
            if device.type == "cuda":
                torch.cuda.set_device(
                    device
                )  # NCCL's own patience is longer: `wait` ends with a sentence, NCCL with a page
                backend = dict(
                    backend="nccl", device_id=device, timeout=2 * patience + timedelta(minutes=1)
                )
            else:
                backend = dict(backend="gloo", timeout=patience)
            dist.init_process_group(store=store, rank=rank, world_size=world_size, **backend)
            return cls(
                rank, world_size, device, dist.new_group(backend="gloo", timeout=patience), timeout
            )
        except RuntimeError as error:
            print(
                f"{program_name()}: error: the ranks did not find each other at {values[4]}:{port} ({first_line(error)})",
                file=sys.stderr,
            )
            raise SystemExit(1) from None

    def wait(self):
        """Until the device has done all that it was given. Raises RuntimeError where a rank that died or hangs keeps it from that."""
        if self.device.type != "cuda" or self.world_size == 1:
            return
        (done := torch.cuda.Event()).record()
        deadline = time.monotonic() + self.timeout
        while not done.query():
            if time.monotonic() > deadline:
                raise RuntimeError("NCCL timed out")
            time.sleep(1e-4)

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
        failed = self.sum(
            [float(rank == self.rank and failure is not None) for rank in range(self.world_size)]
        )
        if any(failed):
            raise failure if failed.index(1.0) == self.rank else SystemExit(2)

    @contextlib.contextmanager
    def watched(self):
        """A rank that dies or hangs in here ends the others with status 1 and one sentence that names it, by the first that noticed."""
        told = threading.Event()
        over = threading.Event()
        answering = threading.Thread(target=self._answer, args=(told, over), daemon=True)
        if self.world_size > 1:
            answering.start()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not re.search(
                "gloo|nccl|peer|socket|connection|timed out", str(error), re.IGNORECASE
            ):
                raise
            missing = self._missing(told)
            if missing is not None:
                names = ", ".join(map(str, missing))
                who = (
                    f"rank {names} of {self.world_size} is gone"
                    if missing
                    else "the ranks lost each other"
                )
                words = f"{who} ({first_line(error)}); the same command goes on from the last checkpoint"
                print(f"{program_name()}: error: {words}", file=sys.stderr, flush=True)
            os._exit(1)  # at once: what NCCL waits for will never come
        finally:
            over.set()
            if self.world_size > 1:
                answering.join(
                    GRACE
                )  # Python aborts where its end finds a thread inside of the store

    def _answer(self, told, over):
        """Marks this process as alive when another rank has noticed a death, and sets `told`: a thread of its own, as the main one may
        wait for a rank that waits, too."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
            store = dist.distributed_c10d._get_default_store()
            while not over.wait(GRACE / 10):
                if store.check(["noticed"]):
                    store.set(f"alive {self.rank}", "")
                    told.set()
                    return

    def _missing(self, told):
        """The ranks that do not answer, or None where another rank says so.

        Such another rank is waited for: this one may hold the store, and a launcher may end all ranks when the first ends.
        """
        second = told.is_set()
        try:
            if not second:
                store = dist.distributed_c10d._get_default_store()
                store.set(f"alive {self.rank}", "")
                second = store.add("noticed", 1) > 1
            if second:
                time.sleep(GRACE + 1)
                return None
            time.sleep(GRACE)
            return [rank for rank in range(self.world_size) if not store.check([f"alive {rank}"])]
        except (
            RuntimeError
        ):  # the store is gone with the rank that held it; then one or two speak for each machine
            return [0] if os.environ.get("LOCAL_RANK", "0") in ("0", "1") else None


def meet(address, port, rank, world_size, timeout):
    """A store in which the ranks of this start, and none of an earlier one, find each other. Raises RuntimeError where some do not come.

    torchrun's agent keeps one store over all restarts, and in it the addresses of ranks that are dead: who believes those hangs. Agents do
    not agree on the number of restarts, either. So each rank calls under a name of its own, and the first answers all with one prefix.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeper = dict(
        is_master=rank == 0 and not agents, wait_for_workers=False, multi_tenant=not agents
    )
    store = dist.TCPStore(address, port, world_size, timeout=timedelta(seconds=timeout), **keeper)
    me = uuid.uuid4().hex
    store.set(f"call {rank}", me)
    if rank:
        prefix = store.get(f"answer {me}").decode()
        store.set(f"{prefix} {rank}", "came")
        return dist.PrefixStore(prefix, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {', '.join(map(str, sorted(missing)))} of {world_size} did not come in {timeout} s"
            )
        for other in [other for other in missing if store.check([f"call {other}"])]:
            store.set("answer " + store.get(f"call {other}").decode(), me)
            if store.check([f"{me} {other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return dist.PrefixStore(me, store)
