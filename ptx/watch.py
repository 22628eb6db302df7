"""Looks for what a lockstep run hides: races, missing waits, memory that nobody wrote.

Beside each byte of memory lie stamps: who wrote it last, who read it last, and when. Time is
counted in barriers: between two barriers the warps of a block run in any order, so a byte that one
warp writes and another touches in the same interval is a race. (The threads of one warp are taken
to run together, as Triton does.) Storing the value that is there already is no race. Nor is reading
a byte that one's own warp wrote too: then all wrote the same.

    a stamp     is the number of the interval in the upper 32 bits, from 1, and in the lower ones a
                bit for each warp; 0: never
    a program   has a number, from 1, that is left on each byte of global memory; 0: nobody, -1:
                several. Programs run in any order, with no barrier between them.

Two things happen later than their instruction. Until they are waited for, nobody else may touch
what they touch:

- `cp.async` copies from global to shared memory in the background. `commit_group` closes a group of
  copies; `wait_group n` waits until at most n groups are pending.
- `wgmma`, a product of a warp group (4 warps), reads shared memory, and holds its registers. It has
  groups and waits of its own.

A *proxy* is a path to memory. Loads and stores take the generic proxy, and wgmma reads shared
memory by the async proxy: even behind a barrier it may miss a store, until a `fence.proxy.async`.
For registers, `wgmma.fence` does the same.

References: PTX ISA 8.7, chapter 8 (memory consistency), sections 9.7.9.25 (cp.async) and 9.7.15
(wgmma, and the proxy fence that it needs).
"""

from typing import NamedTuple

import numpy as np

from ptx.memory import WARP, rows_of

INTERVAL_BITS = 32
EVERY_WARP = 2**32 - 1


class Stamps(NamedTuple):
    """What is known of each byte of a piece of memory."""

    written: np.ndarray  # stamps
    read: np.ndarray
    writer: np.ndarray  # numbers of programs, for global memory
    reader: np.ndarray


class Watch:
    """The stamps of one launch."""

    def __init__(self, memory):
        """memory: the `GlobalMemory` of the launch."""
        self.stamps = {id(region): stamps_for(region) for region in memory.regions}
        self.program = 0
        self.interval = 0

    def begin(self, machine):
        """A block of threads begins, with shared memory of its own."""
        self.program += 1
        self.interval += 1
        self.shared = stamps_for(machine.shared)
        self.written = self.shared.written  # of shared memory
        self.read = self.shared.read
        self.copied_to = np.zeros(len(self.written), bool)  # by a cp.async that has not landed
        self.products_reading = np.zeros(len(self.written), np.int16)  # wgmma in flight
        self.fences = 1  # fence.proxy.async so far
        self.written_before_fence = np.zeros(len(self.written), np.int32)
        self.fenced = False  # by a wgmma.fence, ever
        self.touched = set()  # registers that were used since the last wgmma.fence
        self.warp = machine.thread // WARP

    def stamps_of(self, machine, piece):
        """The `Stamps` of a piece of memory."""
        return self.shared if piece is machine.shared else self.stamps[id(piece)]

    def bits(self, lanes):
        """The bit of the warp of each of these threads: (threads, 1)."""
        return np.int64(1) << self.warp[lanes][:, None]

    def warps(self, stamps):
        """The warps that a stamp of this interval has, as bits; 0 for an older one."""
        return np.where(stamps >> INTERVAL_BITS == self.interval, stamps & EVERY_WARP, 0)

    def stamp(self, stamps, rows, own):
        """Adds the bits `own` (threads, 1) to rows of stamps, in this interval."""
        now = np.int64(self.interval) << INTERVAL_BITS
        stamps[rows] = now | self.warps(stamps[rows]) | own
        while True:  # where several threads stamp one row, the last wins: the others come again
            lost = (stamps[rows] & own == 0).any(1)
            if not lost.any():
                return
            stamps[rows[lost]] |= own[lost]

    # ---- loads and stores ------------------------------------------------------------------------

    def on_read(self, machine, piece, rows, size, lanes):
        """Threads `lanes` read rows of `size` bytes each."""
        own = self.bits(lanes)
        stamps = self.stamps_of(machine, piece)
        written = rows_of(stamps.written, size)[rows]  # (threads, size)
        if piece is machine.shared:
            self.check_written(machine, written, lanes)
            self.check_copies(machine, rows, size, lanes, "reads")
        else:
            self.check_other_programs(machine, piece, rows, size, lanes, "reads")
        writers = self.warps(written)
        foreign = (writers != 0) & (writers & own == 0)
        if foreign.any():
            message = f"reads {piece.name} that another warp wrote since the last barrier"
            machine.wrong("race", message, lanes[foreign.any(1)])
        self.stamp(rows_of(stamps.read, size), rows, own)

    def on_write(self, machine, piece, rows, size, lanes, data, before):
        """Threads stored `data` (threads, size), where `before` was."""
        own = self.bits(lanes)
        stamps = self.stamps_of(machine, piece)
        lost = (rows_of(piece.memory, size)[rows] != data).any(1)
        if lost.any():
            message = f"two threads store different values at one place in {piece.name}"
            machine.wrong("race", message, lanes[lost])
        for done, theirs in (("wrote", stamps.written), ("read", stamps.read)):
            others = self.warps(rows_of(theirs, size)[rows]) & ~own
            foreign = (others != 0) & (data != before)
            if foreign.any():
                message = f"writes {piece.name} that another warp {done} since the last barrier"
                machine.wrong("race", message, lanes[foreign.any(1)])
        if piece is machine.shared:
            self.check_copies(machine, rows, size, lanes, "writes")
            self.check_products(machine, rows, size, lanes)
            rows_of(self.written_before_fence, size)[rows] = self.fences
        else:
            self.check_other_programs(machine, piece, rows, size, lanes, "writes")
        self.stamp(rows_of(stamps.written, size), rows, own)

    def check_other_programs(self, machine, piece, rows, size, lanes, does):
        """Nothing that one program of the grid writes is touched by another."""
        stamps = self.stamps[id(piece)]
        writer = rows_of(stamps.writer, size)
        reader = rows_of(stamps.reader, size)
        foreign = (writer[rows] != 0) & (writer[rows] != self.program)
        if does == "writes":
            foreign |= (reader[rows] != 0) & (reader[rows] != self.program)
            writer[rows] = self.program
        else:
            alone = (reader[rows] == 0) | (reader[rows] == self.program)
            reader[rows] = np.where(alone, self.program, -1)
        if foreign.any():
            theirs = "reads or writes" if does == "writes" else "writes"
            message = f"{does} {piece.name} where another program {theirs}"
            machine.wrong("race between programs", message, lanes[foreign.any(1)])

    def check_written(self, machine, written, lanes):
        """Shared memory that is read was written before."""
        never = written == 0
        if never.any():
            message = "reads shared memory that nobody wrote"
            machine.wrong("uninitialized", message, lanes[never.any(1)])

    def check_copies(self, machine, rows, size, lanes, does):
        """Nothing touches what a cp.async still writes."""
        if not machine.copies:
            return
        pending = rows_of(self.copied_to, size)[rows].any(1)
        if pending.any():
            message = f"{does} shared memory before the wait for the cp.async that writes it"
            machine.wrong("race", message, lanes[pending])

    def check_products(self, machine, rows, size, lanes):
        """Nothing overwrites what a wgmma still reads."""
        if not machine.products:
            return
        reading = (rows_of(self.products_reading, size)[rows] > 0).any(1)
        if reading.any():
            message = "writes shared memory before the wait for the wgmma that reads it"
            machine.wrong("race", message, lanes[reading])

    # ---- barriers and copies ---------------------------------------------------------------------

    def on_barrier(self, machine):
        """All threads of the block were waited for."""
        self.interval += 1

    def on_copy_begin(self, machine, lanes, rows, size):
        """A cp.async may write from here on."""
        own = self.bits(lanes)
        for stamps, done in ((self.written, "wrote"), (self.read, "read")):
            foreign = self.warps(rows_of(stamps, size)[rows]) & ~own != 0
            if foreign.any():
                message = f"copies to shared memory that another warp {done} since the last barrier"
                machine.wrong("race", message, lanes[foreign.any(1)])
        self.check_copies(machine, rows, size, lanes, "copies to")
        self.check_products(machine, rows, size, lanes)
        rows_of(self.copied_to, size)[rows] = True

    def on_copy_end(self, machine, lanes, rows, size):
        """The threads waited: their bytes are there, for their own warp."""
        rows_of(self.copied_to, size)[rows] = False
        self.stamp(rows_of(self.written, size), rows, self.bits(lanes))
        rows_of(self.written_before_fence, size)[rows] = self.fences

    # ---- products of warp groups -----------------------------------------------------------------

    def on_proxy_fence(self, machine):
        """What was written before is visible to wgmma, which reads by a path of its own."""
        self.fences += 1

    def on_product_fence(self, machine):
        """wgmma.fence: wgmma may use registers that were used before."""
        self.touched.clear()
        self.fenced = True

    def before_instruction(self, machine, step):
        """Registers of a wgmma in flight are left alone; others are remembered up to the fence."""
        if step.instruction.opcode == "wgmma":
            return
        for product in machine.products:
            if not step.registers.isdisjoint(product.targets):
                message = "uses the accumulator of a wgmma before the wait for it"
                machine.wrong("wgmma", message, machine.active())
            if not step.results.isdisjoint(product.inputs):
                message = "overwrites an operand of a wgmma before the wait for it"
                machine.wrong("wgmma", message, machine.active())
        self.touched |= step.registers

    def on_product_begin(self, machine, product):
        """A wgmma reads from here on."""
        if not self.fenced:
            machine.wrong("wgmma", "no wgmma.fence before the first wgmma", machine.thread)
            self.fenced = True
        chained = any(other.targets == product.targets for other in machine.products)
        needs_fence = set(product.inputs) | (set() if chained else set(product.targets))
        if needs_fence & self.touched:
            message = "no wgmma.fence behind the instruction that used a register of this wgmma"
            machine.wrong("wgmma", message, machine.active())
        everyone = machine.thread
        for offsets in product.places:
            threads = everyone[:1].repeat(len(offsets))
            written = rows_of(self.written, 2)[offsets]
            self.check_written(machine, written, threads)
            if self.warps(written).any():
                message = "a wgmma reads shared memory that was written since the last barrier"
                machine.wrong("race", message, everyone)
            self.check_copies(machine, offsets, 2, threads, "a wgmma reads")
            late = rows_of(self.written_before_fence, 2)[offsets] == self.fences
            if (late & (written > 0)).any():
                message = "no fence.proxy.async between a write and the wgmma that reads it"
                machine.wrong("wgmma", message, everyone)
            rows_of(self.products_reading, 2)[offsets] += 1

    def on_product_end(self, machine, product):
        """It has read everything; but each warp knows this of its own part only."""
        for offsets in product.places:
            rows_of(self.products_reading, 2)[offsets] -= 1
            now = np.int64(self.interval) << INTERVAL_BITS
            rows_of(self.read, 2)[offsets] = now | EVERY_WARP

    def at_the_end(self, machine):
        """The block has ended."""
        if machine.products:
            machine.wrong("wgmma", "the kernel ends before its wgmma", machine.thread)


def stamps_for(piece):
    """The `Stamps` of a piece of memory that nobody touched."""
    size = len(piece.memory)
    return Stamps(
        written=np.zeros(size, np.int64),
        read=np.zeros(size, np.int64),
        writer=np.zeros(size, np.int32),
        reader=np.zeros(size, np.int32),
    )
