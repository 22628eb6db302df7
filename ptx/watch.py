"""Looks for what a lockstep run hides: races, missing waits, memory that nobody wrote.

Beside each byte of memory lie stamps: who wrote it last, who read it last, and when. Time is
counted in barriers: between two barriers the warps of a block run in any order, so a byte that one
warp writes and another touches in the same interval is a race. (The threads of one warp are taken
to run together, as Triton does.) Storing the value that is there already is no race. Nor is reading
a byte that one's own warp wrote too: then all wrote the same.

    shared memory   a stamp is the number of the interval in the upper 32 bits, from 1, and in the
                    lower ones a bit for each warp; 0: never
    global memory   a stamp is the number of the program, from 1; 0: nobody, -1: several. Programs
                    run in any order, with no barrier between them, so whatever one of them writes
                    no other may touch. Warps of one program are not told apart: where a tile has
                    fewer elements than threads, Triton lets several threads load one of them, and
                    only one store it.

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

import numpy as np

from ptx.memory import WARP, rows_of

INTERVAL_BITS = 32
EVERY_WARP = 2**32 - 1


class Watch:
    """The stamps of one launch."""

    def __init__(self, memory):
        """memory: the `GlobalMemory` of the launch."""
        self.writers = {id(one): np.zeros(len(one.memory), np.int32) for one in memory.regions}
        self.readers = {id(one): np.zeros(len(one.memory), np.int32) for one in memory.regions}
        self.program = 0
        self.interval = 0

    def begin(self, machine):
        """A block of threads begins, with shared memory of its own."""
        self.program += 1
        self.interval += 1
        size = len(machine.shared.memory)
        self.written = np.zeros(size, np.int64)  # stamps
        self.read = np.zeros(size, np.int64)
        self.copied_to = np.zeros(size, bool)  # by a cp.async that has not landed
        self.products_reading = np.zeros(size, np.int16)  # wgmma in flight
        self.fences = 1  # fence.proxy.async so far
        self.written_before_fence = np.zeros(size, np.int32)
        self.fenced = False  # by a wgmma.fence, ever
        self.touched = set()  # registers that were used since the last wgmma.fence
        self.warp = machine.thread // WARP

    def bits(self, lanes):
        """The bit of the warp of each of these threads: (threads, 1)."""
        return np.int64(1) << self.warp[lanes][:, None]

    def warps(self, stamps):
        """The warps that a stamp of this interval has, as bits; 0 for an older one."""
        return np.where(stamps >> INTERVAL_BITS == self.interval, stamps & EVERY_WARP, 0)

    def stamp(self, stamps, rows, lanes):
        """Adds the warps of these threads to their rows of stamps, in this interval."""
        now = np.int64(self.interval) << INTERVAL_BITS
        warps = self.warp[lanes]
        for warp in np.unique(warps):  # one after the other, since they may touch the same rows
            own = rows[warps == warp]
            stamps[own] = now | self.warps(stamps[own]) | np.int64(1) << warp

    # ---- loads and stores ------------------------------------------------------------------------

    def on_read(self, machine, piece, rows, size, lanes):
        """Threads `lanes` read rows of `size` bytes each."""
        if piece is not machine.shared:
            self.check_other_programs(machine, piece, rows, size, lanes, "reads")
            return
        own = self.bits(lanes)
        written = rows_of(self.written, size)[rows]  # (threads, size)
        self.check_written(machine, written, lanes)
        self.check_copies(machine, rows, size, lanes, "reads")
        writers = self.warps(written)
        foreign = (writers != 0) & (writers & own == 0)
        if foreign.any():
            message = "reads shared memory that another warp wrote since the last barrier"
            machine.wrong("race", message, lanes[foreign.any(1)])
        self.stamp(rows_of(self.read, size), rows, lanes)

    def on_write(self, machine, piece, rows, size, lanes, data, before):
        """Threads stored `data` (threads, size), where `before` was."""
        lost = (rows_of(piece.memory, size)[rows] != data).any(1)
        if lost.any():
            message = f"two threads store different values at one place in {piece.name}"
            machine.wrong("race", message, lanes[lost])
        if piece is not machine.shared:
            self.check_other_programs(machine, piece, rows, size, lanes, "writes")
            return
        own = self.bits(lanes)
        for done, stamps in (("wrote", self.written), ("read", self.read)):
            others = self.warps(rows_of(stamps, size)[rows]) & ~own
            foreign = (others != 0) & (data != before)
            if foreign.any():
                message = f"writes shared memory that another warp {done} since the last barrier"
                machine.wrong("race", message, lanes[foreign.any(1)])
        self.check_copies(machine, rows, size, lanes, "writes")
        self.check_products(machine, rows, size, lanes)
        rows_of(self.written_before_fence, size)[rows] = self.fences
        self.stamp(rows_of(self.written, size), rows, lanes)

    def check_other_programs(self, machine, piece, rows, size, lanes, does):
        """Nothing that one program of the grid writes is touched by another."""
        writer = rows_of(self.writers[id(piece)], size)
        reader = rows_of(self.readers[id(piece)], size)
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
        self.stamp(rows_of(self.written, size), rows, lanes)
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
        others = [one for one in machine.products if one is not product]
        chained = any(one.targets == product.targets for one in others)
        for one in others:
            mixed = one.targets != product.targets and set(one.targets) & set(product.targets)
            if mixed or set(one.targets) & set(product.inputs):
                message = "uses the accumulator of a wgmma before the wait for it"
                machine.wrong("wgmma", message, machine.active())
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
