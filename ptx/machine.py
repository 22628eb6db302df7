"""Runs one block of threads, instruction by instruction.

All threads of the block go through the code in lockstep: a register is a NumPy array with one
number for each thread, and an instruction is one NumPy operation on it. Where threads part at a
branch, those with the lowest place in the code go first, and the others wait until they meet. At
a barrier, threads wait until all others are at one. So a block computes what a GPU computes if the
kernel has no races; `watch.py` looks for those.

Registers hold raw bits, as unsigned integers of the register's width; an instruction gives them a
type. Registers and shared memory begin as poison (memory.py). A lane is the place of a thread in
these arrays. There are as many lanes as fill whole warps; those behind the last thread never run.

(The cost of a step is for counts.py. Ignore it at first.)

Reference: PTX ISA 8.7, sections 3.1 (threads, warps, blocks) and 9.7.13 (barriers).
"""

import re
from typing import NamedTuple

import numpy as np

from ptx.counts import Cost, cost_of
from ptx.memory import POISON, REGION_BITS, WARP, rows_of
from ptx.operands import UNSIGNED, label_of, registers_in, registers_of
from ptx.parser import Instruction, PtxError

SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
# Their first operand is no result.
NO_RESULT = ("st", "stmatrix", "cp", "bra", "bar", "fence")
SHOWN_THREADS = 4


class Finding(NamedTuple):
    """Something that a kernel does wrong."""

    kind: str  # such as "race", "bounds"
    message: str
    kernel: str
    line: int  # of the PTX text
    source: str  # the line of the kernel's source, such as "kernels.py:213"
    text: str  # the instruction
    program: tuple  # the program that did it first: x, y, z
    threads: tuple  # the first few of its threads

    def __str__(self):
        where = f"{self.kernel}, {self.source or 'no source line'}, PTX line {self.line}"
        who = f"program {self.program}, threads {', '.join(map(str, self.threads))}"
        return f"{self.kind}: {self.message} ({where}: {self.text}; {who})"


class Step(NamedTuple):
    """An instruction, ready to run."""

    instruction: Instruction
    run: object  # a function of the machine
    registers: frozenset  # all that it uses
    results: frozenset  # those that it writes
    cost: Cost


class Machine:
    """One block of threads, with its registers and its shared memory."""

    def __init__(self, code, place, grid, symbols, shared, memory, report, watch=None):
        """code: a `Code`. place, grid: (x, y, z) of the block, and of all blocks.

        symbols: {name: number} of parameters and of addresses in shared memory. shared: the bytes
        of shared memory, a `Bytes`. memory: the `GlobalMemory`. report(finding): called for
        whatever is wrong. watch: a `Watch` for races, or None.
        """
        self.code = code
        self.place = place
        self.symbols = symbols
        self.shared = shared
        self.memory = memory
        self.report = report
        self.watch = watch
        threads = code.threads
        self.lanes = -(-threads // WARP) * WARP
        self.thread = np.arange(self.lanes)
        self.segment = np.zeros(self.lanes, np.int64)  # where each thread is, in code.segments
        self.segment[threads:] = code.end  # they do not exist
        self.waiting = np.zeros(self.lanes, bool)  # at a barrier
        self.barrier = None  # the instruction at which threads wait
        self.mask = None  # the threads that run the instruction, or None for all
        self.instruction = None
        self.registers = {
            name: np.full(self.lanes, POISON_OF[bits], UNSIGNED[bits] if bits > 1 else bool)
            for name, bits in code.widths.items()
        }
        self.registers |= self.special_registers(threads, grid)
        self.copies = []  # of cp.async, on their way
        self.copy_groups = np.zeros(self.lanes, np.int64)  # committed by each thread
        self.products = []  # of wgmma, in flight
        self.product_groups = 0  # committed
        self.executed = np.zeros(code.end, np.int64)  # warps that ran each segment of the code

    def special_registers(self, threads, grid):
        """Those that say which thread this is."""
        numbers = {"%laneid": self.thread % WARP, "%warpid": self.thread // WARP}
        for axis, own, count in zip("xyz", self.place, grid):
            numbers[f"%tid.{axis}"] = self.thread * (axis == "x")
            numbers[f"%ntid.{axis}"] = threads if axis == "x" else 1
            numbers[f"%ctaid.{axis}"] = own
            numbers[f"%nctaid.{axis}"] = count
        return {
            name: np.broadcast_to(np.asarray(number, np.uint32), (self.lanes,)).copy()
            for name, number in numbers.items()
        }

    def run(self, trace=None):
        """Runs the block to its end. trace(machine, step): called behind each instruction."""
        with np.errstate(all="ignore"):
            while True:
                number = int(np.where(self.waiting, self.code.end, self.segment).min())
                if number < self.code.end:
                    self.run_segment(number, trace)
                elif self.waiting.any():
                    self.pass_barrier()
                else:
                    break
        if self.watch:
            self.watch.at_the_end(self)

    def run_segment(self, number, trace):
        """Runs the threads that are at this segment of the code through it."""
        here = (self.segment == number) & ~self.waiting
        self.executed[number] += np.count_nonzero(here.reshape(-1, WARP).any(1))
        self.mask = None if here.all() else here
        self.segment[here] = number + 1
        watching = self.watch and self.code.uses_wgmma
        for step in self.code.segments[number]:
            self.instruction = step.instruction
            if watching:
                self.watch.before_instruction(self, step)
            step.run(self)
            if trace:
                trace(self, step)

    def pass_barrier(self):
        """All threads that are left wait: they go on together."""
        ended = ~self.waiting & (self.thread < self.code.threads)
        if ended.any():
            self.instruction = self.barrier
            count = np.count_nonzero(ended)
            self.wrong("barrier", f"{count} threads end without reaching this barrier", ended)
        self.waiting[:] = False
        if self.watch:
            self.watch.on_barrier(self)

    # ---- for the instructions --------------------------------------------------------------------

    def active(self):
        """The threads that run this instruction: bool (lanes,)."""
        return np.ones(self.lanes, bool) if self.mask is None else self.mask

    def wrong(self, kind, message, threads):
        """Reports a finding. threads: bool (lanes,), or their numbers."""
        threads = np.asarray(threads)
        if threads.dtype == bool:
            threads = np.flatnonzero(threads)
        instruction = self.instruction
        self.report(
            Finding(
                kind=kind,
                message=message,
                kernel=self.code.name,
                line=instruction.line,
                source=instruction.source,
                text=" ".join(instruction.text.split())[:100],
                program=self.place,
                threads=tuple(int(thread) for thread in threads[:SHOWN_THREADS]),
            )
        )

    def whole_warps(self):
        """Reports threads that are missing in a warp, for an instruction that needs all 32."""
        if self.mask is None:
            return
        taking_part = np.repeat(self.mask.reshape(-1, WARP).any(1), WARP)
        missing = taking_part & ~self.mask & (self.thread < self.code.threads)
        if missing.any():
            self.wrong("divergence", "not all threads of a warp take part", missing)

    def load(self, space, addresses, size):
        """The bytes at the addresses: (n, size) uint8, poison where there is nothing to read.

        addresses: int64 (n,), where n is a multiple of the number of lanes: the first address of
        each thread, then the second of each, and so on. Only active threads read.
        """
        out = np.full((len(addresses), size), POISON, np.uint8)
        for piece, which, rows in self.places(space, addresses, size):
            out[which] = rows_of(piece.memory, size)[rows]
            if self.watch:
                self.watch.on_read(self, piece, rows, size, which % self.lanes)
        return out

    def store(self, space, addresses, data):
        """Writes (n, size) bytes at the addresses, which are as for `load`."""
        size = data.shape[1]
        for piece, which, rows in self.places(space, addresses, size):
            target = rows_of(piece.memory, size)
            before = target[rows]
            target[rows] = data[which]
            if self.watch:
                threads = which % self.lanes
                self.watch.on_write(self, piece, rows, size, threads, data[which], before)

    def places(self, space, addresses, size):
        """Where an access goes, in pieces: (piece of memory, which addresses, rows of its memory).

        A row has `size` bytes. Inactive threads are left out; so is what is wrong, and reported.
        """
        which = np.arange(len(addresses))
        if self.mask is not None:
            which = which[np.tile(self.mask, len(addresses) // self.lanes)]
        if space == "shared":
            yield from self.checked(self.shared, addresses, which, size)
            return
        numbers = addresses[which] >> REGION_BITS
        for number in set(numbers.tolist()):
            among = which[numbers == number]
            region = self.memory.region(number)
            if region is None:
                message = f"{size} bytes at {int(addresses[among[0]]):#x}, where there is no tensor"
                self.wrong("bounds", message, among % self.lanes)
            else:
                yield from self.checked(region, addresses, among, size)

    def checked(self, piece, addresses, which, size):
        """(piece, which, rows) of the accesses that are allowed, once. The rest is reported."""
        while len(which):
            wrong = piece.wrong(addresses[which], size)
            if wrong is None:
                yield piece, which, (addresses[which] - piece.base) // size
                return
            kind, message, failing = wrong
            self.wrong(kind, message, which[failing] % self.lanes)
            which = which[~failing]

    def spread(self, numbers):
        """A number for each thread: (lanes,)."""
        return numbers if np.ndim(numbers) else np.full(self.lanes, numbers)


# What a register holds before it is written. A predicate has no poison.
POISON_OF = {1: False} | {
    bits: np.frombuffer(bytes([POISON]) * (bits // 8), UNSIGNED[bits])[0] for bits in UNSIGNED
}


class Code:
    """A kernel, cut into segments that are run from their beginning to their end."""

    def __init__(self, kernel, build):
        """kernel: from the parser. build(instruction, code): the function that runs it."""
        self.name = kernel.name
        self.kernel = kernel
        self.threads = kernel.threads
        if not self.threads:
            raise PtxError("this PTX does not say how many threads a block has: no .reqntid")
        self.symbols = {*kernel.parameters, *kernel.shared}
        self.widths = self.register_widths(kernel)
        targets = {
            kernel.labels[label_of(instruction, kernel.labels)]
            for instruction in kernel.instructions
            if instruction.opcode == "bra"
        }
        # A segment begins at a target of a branch, and behind each branch and barrier.
        ends = ("bra", "ret", "bar")
        behind = {i for i, one in enumerate(kernel.instructions, 1) if one.opcode in ends}
        starts = sorted({0, *targets, *behind} - {len(kernel.instructions)})
        self.number_of = {start: number for number, start in enumerate(starts)}
        self.end = len(starts)
        self.uses_wgmma = any(one.opcode == "wgmma" for one in kernel.instructions)
        if self.uses_wgmma and kernel.target != "sm_90a":
            raise PtxError(f"wgmma is for sm_90a, and this PTX for {kernel.target}")
        self.segments = [
            [self.step(one, build) for one in kernel.instructions[start:stop]]
            for start, stop in zip(starts, [*starts[1:], len(kernel.instructions)])
        ]

    def step(self, instruction, build):
        """The `Step` of an instruction."""
        registers = frozenset(registers_of(instruction))
        results = frozenset()
        if instruction.operands and instruction.opcode not in NO_RESULT:
            results = frozenset(registers_in(instruction.operands[0]))
        return Step(instruction, build(instruction, self), registers, results, cost_of(instruction))

    def loops(self):
        """(first, last) segment of each loop: what a branch backwards encloses."""
        for last, segment in enumerate(self.segments):
            instruction = segment[-1].instruction
            if instruction.opcode == "bra":
                first = self.segment_at(label_of(instruction, self.kernel.labels))
                if first <= last:
                    yield first, last

    @staticmethod
    def register_widths(kernel):
        """{register: bits} of every register that occurs."""
        names = set()
        for instruction in kernel.instructions:
            names |= set(registers_of(instruction))
        widths = {}
        for name in names:
            prefix = name.rstrip("0123456789")
            if prefix in kernel.registers:
                widths[name] = kernel.registers[prefix]
            elif not SPECIAL.fullmatch(name):
                raise PtxError(f"the register {name} is not declared, or not known")
        return widths

    def segment_at(self, label):
        """The number of the segment that begins at a label."""
        return self.number_of[self.kernel.labels[label]]

    def width(self, register):
        """Bits of a register."""
        return self.widths.get(register, 32)
