"""A GPU in NumPy: runs the compiled code of the kernels on a CPU, and watches it.

    with ptx.emulated("sm_90") as gpu:
        out = kernels.attention(qkv, cu_seqlens, max_seqlen)  # bf16 on the CPU
    gpu.findings  # what was wrong: races, missing waits, wrong addresses
    gpu.counts  # what was executed: {kernel: {class of instructions: number}}

Triton compiles the kernels for the chip as usual, up to PTX, the lowest language that NVIDIA
documents.
The files, in the order in which to read them:

    parser.py        PTX text to instructions
    memory.py        bytes, addresses, and what happens at a wrong one
    machine.py       a block of threads: registers, control flow, access to memory
    operands.py      how an instruction reads and writes its operands
    opcodes.py       the table of instructions
    tensor_cores.py  mma, wgmma, and the loads and stores that feed them
    watch.py         races, missing waits, memory that nobody wrote
    counts.py        instructions by class and by loop
    compiler.py      Triton's compiler, for a chip that is not here
    launch.py        `emulated`: takes the place of the GPU
    listing.py       text for people: PTX beside its source, the steps of a thread

What it cannot show: time, and what ptxas makes of PTX (registers, the order of instructions).
`python -m bench kernels --resources` reads the machine code. Not supported, and refused by name:
mbarrier, TMA and tcgen05 (Blackwell), atomics, clusters, and functions that are not inlined.
"""

from ptx.launch import Emulator, emulated
from ptx.parser import PtxError

__all__ = ["Emulator", "PtxError", "emulated"]
