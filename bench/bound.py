"""A model of a kernel's speed, from the instructions that it executes.

An SM has several pipes, each with a rate of its own, and 4 schedulers that each issue one
instruction of a warp a clock. The model is serial: first the tensor cores and shared memory work,
which feed each other and overlap, then everything else, where only the busiest pipe counts:

    clocks = max(tensor, shared) + max(float, integer, transcendental, issue)

Good code overlaps the two halves and comes close to the greater of them. Waits for memory and for
barriers, and too few warps, are not in the model. So the figure is for comparing kernels, and no
promise. results/README.md has its figures beside measured ones.

Where the rates are from: NVIDIA's CUDA C++ Programming Guide has the lanes of each pipe (throughput
of native arithmetic instructions, compute capability 8.0 and 9.0) and the 32 banks of 4 bytes of
shared memory. Tensor FLOPs follow from the dense bf16 peaks of the data sheets:

    A100   312 TFLOP/s / (108 SMs * 1.41 GHz) = 2,048 FLOP a clock
    H100   989 TFLOP/s / (132 SMs * 1.83 GHz) = 4,096 FLOP a clock
"""

from typing import NamedTuple

from ptx.counts import CLASSES
from ptx.memory import WARP

SCHEDULERS = 4  # of an SM


class Counts(NamedTuple):
    """What one SM executes: of one block of threads, say, or of one iteration of its loop."""

    instructions: dict  # {class: instructions, each of one warp}
    tensor_flops: int  # 2 for each multiplication and addition in a product
    shared_bytes: int  # read and written in shared memory, by tensor cores as well


class Rates(NamedTuple):
    """What one SM does in a clock, and how many clocks there are."""

    clocks: float  # of all SMs, in a second
    tensor: int  # dense bf16 FLOPs
    shared: int  # bytes
    float: int  # lanes: results of single threads
    integer: int  # lanes
    transcendental: int  # lanes


RATES = {  # A100; H100 and H200
    80: Rates(108 * 1.41e9, tensor=2048, shared=128, float=64, integer=64, transcendental=16),
    90: Rates(132 * 1.83e9, tensor=4096, shared=128, float=128, integer=64, transcendental=16),
}


def predicted(counts, chip):
    """The serial bound, in clocks of one SM. chip: 80 or 90, a compute capability.

    The loop of the tutorial's attention, compiled for sm_90: two products of 128 x 64 scores with
    head size 64, 4 warps with 490 instructions each. Most of the 272 transcendental ones are 2^x.
    They take 544 clocks, after the products' 512.

    >>> instructions = {"tensor": 64, "transcendental": 272, "integer": 480, "float": 832}
    >>> instructions |= {"shared": 60, "synchronization": 40, "other": 212}
    >>> predicted(Counts(instructions, 2 * 2 * 128 * 64 * 64, 64 * 1024), chip=90)
    1056.0
    """
    unknown = counts.instructions.keys() - set(CLASSES)
    if unknown:
        raise ValueError(f"no such class of instructions: {', '.join(sorted(unknown))}")
    rates = RATES[chip]

    def lanes(name):
        """Clocks of a pipe that takes one warp's instruction in several parts."""
        return counts.instructions.get(name, 0) * WARP / getattr(rates, name)

    # Every instruction is issued, whichever pipe executes it.
    issue = sum(counts.instructions.values()) / SCHEDULERS
    products = max(counts.tensor_flops / rates.tensor, counts.shared_bytes / rates.shared)
    others = max(lanes("float"), lanes("integer"), lanes("transcendental"), issue)
    return products + others
