"""What the machine code of a compiled kernel says, without a GPU.

The tools come with Triton: cuobjdump lists the registers that a kernel takes, nvdisasm writes its
machine code (SASS) as text, and ptxas, run once more on the kernel's PTX, says what it warns of.

What matters is the hottest loop. On Hopper a product is a chain of HGMMA instructions, which run
beside all others until a WARPGROUP.DEPBAR waits for them: good code has one wait for a chain. If
ptxas cannot keep their registers apart, it waits after every HGMMA and prints C7515,
"wgmma.mma_async instructions are serialized". STS, LDS and BAR in the loop are data that crosses
threads through shared memory, and the barriers that this takes.
"""

import re
import subprocess
import tempfile
from typing import NamedTuple

import kernels

if kernels.HAS_TRITON:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

# A line of nvdisasm: an address, perhaps a predicate such as @!P0, an instruction and operands.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@\S+)?\s*([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")  # of a branch
TENSOR = ("HGMMA", "HMMA")  # products, on Hopper and before it
COUNTED = (*TENSOR, "STS", "LDS", "BAR")
# What an instruction keeps busy, as bench/bound.py has it. All others are "integer", among them
# comparisons, selections, conversions and fp32 maxima: they run at the same rate.
CLASSES = {
    "tensor": TENSOR,
    "transcendental": ("MUFU",),
    "float": ("FFMA", "FADD", "FMUL"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL"),
    "global": ("LDG", "STG", "LDGSTS"),
    "synchronization": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "FENCE", "MEMBAR"),
    "other": ("MOV", "BRA", "EXIT", "S2R", "CS2R", "R2UR", "BSYNC", "BSSY"),
}
CODE_COLUMNS = ("counted in", "instructions", "waits", *COUNTED)  # see code_figures


class Instruction(NamedTuple):
    """One instruction of the machine code."""

    predicate: str  # "" if it is always executed
    opcode: str  # with what modifies it: BAR.SYNC.DEFER_BLOCKING
    operands: str

    @property
    def family(self):
        """The opcode alone: BAR."""
        return self.opcode.split(".")[0]


# ---- the tools -----------------------------------------------------------------------------------


def machine_code_usage(kernel):
    """Registers of a thread and bytes that it spills, of a compiled kernel."""
    usage = run_on_cubin(kernel, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    # A thread that runs out of registers spills to its stack.
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def disassembled(kernel):
    """The machine code of a compiled kernel as text."""
    # Its analysis of the data flow takes time and only adds comments.
    return run_on_cubin(kernel, knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")


def run_on_cubin(kernel, tool, *flags):
    """What a tool prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        command = [tool, *flags, f.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def ptxas_warnings(kernel):
    """The codes of the warnings about performance, such as C7515, that ptxas prints on a kernel.

    Triton runs ptxas as well, but not for a kernel that it finds in its cache.
    """
    chip = kernel.metadata.target.arch
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.asm["ptx"])
        f.flush()
        target = f"--gpu-name={sm_arch_from_capability(chip)}"
        command = [get_ptxas(chip).path, "-v", target, f.name, "-o", "/dev/null"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return warning_codes(printed)


def warning_codes(printed):
    """The codes C75xx in what ptxas printed, each once.

    >>> warning_codes("ptxas info : (C7515) Potential Performance Loss: ... are serialized")
    ['C7515']
    """
    return sorted(set(re.findall(r"\bC75\d\d\b", printed)))


# ---- loops in the machine code -------------------------------------------------------------------


def parse(sass):
    """The instructions in the text of nvdisasm, and labels, {name: place of its instruction}."""
    instructions = []
    labels = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            instructions.append(Instruction(predicate or "", opcode, operands.strip()))
    return instructions, labels


def innermost_loops(instructions, labels):
    """The loops that contain no other, each a list of instructions."""
    # A branch back ends a loop. Of several to one place, the last one counts.
    ends = {}
    for place, instruction in enumerate(instructions):
        target = TARGET.search(instruction.operands)
        if instruction.family == "BRA" and target and labels[target[1]] < place:
            ends[labels[target[1]]] = place

    # Rare cases are moved behind the end of the kernel and jump back from there: no loop.
    loops = {}
    for begin, end in ends.items():
        body = instructions[begin : end + 1]
        if not any(i.family == "EXIT" and not i.predicate for i in body):
            loops[begin, end] = body

    def contains_another(begin, end):
        return any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end))

    return [body for place, body in loops.items() if not contains_another(*place)]


def count(instructions, *families):
    """How many of the instructions belong to these families."""
    return sum(instruction.family in families for instruction in instructions)


def hottest_loop(loops):
    """The loop in which a kernel spends its time.

    It computes most. Of two that compute as much, one is for whole blocks and the other, with masks
    and so longer, for a partial block at the end, which is run once.
    """

    def work(loop):
        return count(loop, *TENSOR), count(loop, "FFMA"), -len(loop)

    return max(loops, key=work)


def hottest_code(sass):
    """The hottest loop of a kernel, or all of its code if it has none; and which of the two."""
    instructions, labels = parse(sass)
    loops = innermost_loops(instructions, labels)
    return (hottest_loop(loops), "loop") if loops else (instructions, "kernel")


def class_counts(code):
    """{class: how many instructions}."""
    class_of = {family: name for name, families in CLASSES.items() for family in families}
    counts = dict.fromkeys((*CLASSES, "integer"), 0)
    for instruction in code:
        if instruction.family.startswith("U"):  # a pipe of its own, once for the whole warp
            counts["other"] += 1
        elif instruction.family != "NOP":
            counts[class_of.get(instruction.family, "integer")] += 1
    return counts


def code_figures(code, counted_in):
    """The columns of `hottest_code`."""
    figures = {
        "counted in": counted_in,
        "instructions": len(code) - count(code, "NOP"),  # of one warp
        "waits": sum(instruction.opcode.startswith("WARPGROUP.DEPBAR") for instruction in code),
    }
    return figures | {family: count(code, family) for family in COUNTED}
