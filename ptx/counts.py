"""How many instructions a kernel executed, by what they keep busy.

A class is a part of a multiprocessor, with a rate of its own (bench/bound.py has the rates):

    tensor            mma, wgmma
    transcendental    ex2, lg2, rcp, rsqrt, sqrt, div
    float             add, sub, mul, fma, neg, abs of floats
    integer           integers, addresses, logic, comparisons, selections, conversions, max
    shared            loads and stores of shared memory, ldmatrix, stmatrix, shuffles
    global            loads and stores of global memory, cp.async
    synchronization   barriers, fences, waits
    other             moves and branches, most of which ptxas removes

PTX is not what the chip runs: ptxas merges some instructions and drops others. The counts are close
for tensor, transcendental, float and shared, and up to twice too high for integer.
"""

from collections import Counter
from typing import NamedTuple

from ptx.memory import WARP
from ptx.parser import Register

CLASSES = (
    "tensor", "transcendental", "float", "integer", "shared", "global", "synchronization", "other",
)  # fmt: skip
TRANSCENDENTAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "div")
SYNCHRONIZATION = ("fence", "commit_group", "wait_group", "wait_all")
FLOAT = ("add", "sub", "mul", "fma", "neg", "abs")
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Cost(NamedTuple):
    """What one warp spends on an instruction."""

    kind: str  # one of CLASSES
    flops: int = 0  # of the tensor cores
    shared_bytes: int = 0  # moved between shared memory and registers or tensor cores
    global_bytes: int = 0  # asked of global memory, if every thread takes part


class Loop(NamedTuple):
    """A loop of a kernel, and what one warp executes in one iteration, on average."""

    source: str  # the line of the kernel that it ends at
    iterations: int  # of all warps together
    instructions: dict  # {class: number}
    opcodes: dict  # {opcode with its modifiers: number}
    flops: float
    shared_bytes: float
    global_bytes: float


class Counts(Counter):
    """{class: instructions that all warps executed}, of one kernel."""

    def __init__(self, name):
        super().__init__({kind: 0 for kind in CLASSES})
        self.name = name
        self.warps = 0
        self.flops = 0  # of the tensor cores
        self.shared_bytes = 0
        self.global_bytes = 0
        self.codes = {}  # {Code: executions of each of its segments, by warps}

    def add(self, code, executed):
        """Adds a block of threads. executed: how many warps ran each segment of the code."""
        self.warps += -(-code.threads // WARP)
        if code in self.codes:
            self.codes[code] = self.codes[code] + executed
        else:
            self.codes[code] = executed
        for times, segment in zip(executed.tolist(), code.segments):
            for cost in (step.cost for step in segment if times):
                self[cost.kind] += times
                self.flops += times * cost.flops
                self.shared_bytes += times * cost.shared_bytes
                self.global_bytes += times * cost.global_bytes

    def per_warp(self):
        """{class: instructions that a warp executed, on average}."""
        return {kind: self[kind] / max(1, self.warps) for kind in CLASSES}

    @property
    def loops(self):
        """The loops that ran, the one with the most executed instructions first."""
        found = []
        for code, executed in self.codes.items():
            for first, last in code.loops():
                if executed[first]:
                    found.append(loop_of(code, executed, first, last))
        return sorted(found, key=lambda loop: -loop.iterations * sum(loop.instructions.values()))


def loop_of(code, executed, first, last):
    """The `Loop` of the segments from `first` to `last`."""
    iterations = int(executed[first])
    instructions = dict.fromkeys(CLASSES, 0)
    opcodes = Counter()
    flops = 0
    shared_bytes = 0
    global_bytes = 0
    for number in range(first, last + 1):
        share = executed[number] / iterations
        for step in code.segments[number]:
            instructions[step.cost.kind] += share
            opcodes[".".join((step.instruction.opcode, *step.instruction.modifiers))] += share
            flops += share * step.cost.flops
            shared_bytes += share * step.cost.shared_bytes
            global_bytes += share * step.cost.global_bytes
    source = code.segments[last][-1].instruction.source
    return Loop(source, iterations, instructions, opcodes, flops, shared_bytes, global_bytes)


def cost_of(instruction):
    """The `Cost` of an instruction."""
    opcode = instruction.opcode
    modifiers = instruction.modifiers
    if opcode == "mma":
        return Cost("tensor", 2 * 16 * 8 * 16)
    if opcode == "wgmma" and modifiers[0] == "mma_async":
        return product_cost(instruction)
    if opcode in ("bar", "fence") or (
        opcode in ("wgmma", "cp") and {*modifiers} & {*SYNCHRONIZATION}
    ):
        return Cost("synchronization")
    if opcode in ("ldmatrix", "stmatrix"):
        matrices = int(next(one for one in modifiers if one in ("x1", "x2", "x4"))[1:])
        return Cost("shared", shared_bytes=128 * matrices)
    if opcode == "shfl":
        return Cost("shared", shared_bytes=128)
    if opcode == "cp":
        size = WARP * instruction.operands[2].value
        return Cost("global", shared_bytes=size, global_bytes=size)
    if opcode in ("ld", "st"):
        return access_cost(instruction)
    if opcode in TRANSCENDENTAL:
        return Cost("transcendental")
    if opcode in FLOAT and instruction.type.startswith("f"):
        return Cost("float")
    return Cost("other" if opcode in ("mov", "bra", "ret") else "integer")


def access_cost(instruction):
    """The `Cost` of a load or store."""
    count = next((int(m[1:]) for m in instruction.modifiers if m in ("v2", "v4")), 1)
    size = WARP * count * BYTES[instruction.type[1:]]
    if "shared" in instruction.modifiers:
        return Cost("shared", shared_bytes=size)
    if "global" in instruction.modifiers:
        return Cost("global", global_bytes=size)
    return Cost("other")  # a parameter


def product_cost(instruction):
    """The `Cost` of a wgmma, a quarter for each of the four warps."""
    columns = int(instruction.modifiers[-4][4:-3])
    a_in_shared = isinstance(instruction.operands[1], Register)  # its descriptor
    rows_read = columns + 64 * a_in_shared  # of 16 halves
    return Cost("tensor", 2 * 64 * columns * 16 // 4, rows_read * 16 * 2 // 4)
