"""Text for people: PTX beside its source, the steps of a thread, what a run was like."""

import linecache
import os

import numpy as np

import kernels
from ptx.parser import file_table


def source_line(text, instruction):
    """The line of the kernel's source that an instruction of a PTX text comes from, or ""."""
    file, _, line = instruction.source.partition(":")
    if not file:
        return ""
    # Triton may have compiled the same kernels.py at another place, and kept the PTX.
    paths = {os.path.basename(path): path for path in file_table(text).values()}
    paths["kernels.py"] = os.path.abspath(kernels.__file__)
    return linecache.getline(paths[file], int(line)).rstrip()


def print_beside_source(text, kernel):
    """Each line of the kernel's source, above the instructions that it became.

    kernel: the PTX text, parsed.
    """
    targets = {one.operands[0].name for one in kernel.instructions if one.opcode == "bra"}
    labels = {index: label for label, index in kernel.labels.items() if label in targets}
    source = None
    for index, instruction in enumerate(kernel.instructions):
        if index in labels:
            print(f"{labels[index]}:")
        if instruction.source != source:
            source = instruction.source
            print(f"{source:18} {source_line(text, instruction)}".rstrip())
        print(f"    {instruction.line:5}    {' '.join(instruction.text.split())}")


def print_step(machine, step, thread):
    """An instruction and what it wrote, if the thread took part in it."""
    if not machine.active()[thread]:
        return
    text = " ".join(step.instruction.text.split())
    predicate = step.instruction.predicate
    if predicate and machine.registers[predicate][thread] == step.instruction.negated:
        text += "    (not taken)"
    values = [
        f"{name} = {shown(machine.registers[name][thread], step.instruction)}"
        for name in sorted(step.results)
        if name in machine.code.widths
    ]
    print(f"{step.instruction.line:5}  {text[:70]:70}  {'; '.join(values)[:120]}".rstrip())


def shown(bits, instruction):
    """A register's content as the instruction's type has it."""
    type = instruction.modifiers[-1] if instruction.modifiers else ""
    if instruction.opcode == "cvt":  # the type that it converts to
        type = instruction.modifiers[-2]
    if instruction.opcode == "setp" or bits.dtype == bool:
        return str(bool(bits))
    if instruction.opcode in ("mma", "wgmma") or type == "f32":
        if bits.dtype == np.uint32:
            return f"{bits.view(np.float32):.6g}"
    if type.startswith("s"):
        return str(int(bits.view(f"i{bits.dtype.itemsize}")))
    return f"{int(bits):#x}"


def print_summary(gpu, name):
    """What was executed of a kernel, and what was wrong."""
    counts = gpu.counts[name]
    per_warp = ", ".join(f"{number:,.0f} {kind}" for kind, number in counts.per_warp().items())
    print(f"\n{name}: {counts.warps} warps. Instructions a warp: {per_warp}")
    for loop in counts.loops[:1]:
        numbers = ", ".join(f"{n:,.0f} {kind}" for kind, n in loop.instructions.items())
        print(f"The hottest loop ({loop.source}), an iteration: {numbers}")
    findings = "finding" if len(gpu.findings) == 1 else "findings"
    print(f"{len(gpu.findings)} {findings}:" if gpu.findings else "No findings.")
    for finding in gpu.findings:
        print(f"  {finding}")
