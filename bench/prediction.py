"""How fast a kernel's instructions let it be, if neither memory nor waiting slows it down.

The machine of ptx/ runs a kernel on a small input and says what its tensor cores compute and what
it moves. The machine code says how many instructions that takes, since ptxas merges many of PTX's.
Both together go through the model of bound.py.
"""

import functools
from typing import NamedTuple

import torch

import kernels
import ptx
from bench.bound import RATES, Counts, predicted

LENGTH = 256  # a multiple of every block: no masked rest
HEADS = 2
PRODUCTS = {"attention_forward": 2, "attention_backward_dq": 3, "attention_backward_dk_dv": 4}


class Executed(NamedTuple):
    """What a kernel executed."""

    counts: ptx.counts.Counts
    needed: int  # FLOPs that its matrix products need; 0 if it has none


@functools.cache
def emulated_counts(chip, width, dropout_p):
    """{kernel: `Executed`} of the operation that has this width, in bf16. chip: 80 or 90.

    Up to 128 it is the head size of attention, up to 1,024 the hidden size of LayerNorm, and beyond
    that the vocabulary of cross-entropy.
    """
    torch.manual_seed(0)
    with ptx.emulated(f"sm_{chip}", watch=False) as gpu:
        if width <= 128:
            qkv = torch.randn(LENGTH, 3, HEADS, width).bfloat16().requires_grad_()
            cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32)
            kernels.attention(qkv, cu_seqlens, LENGTH, dropout_p=dropout_p).sum().backward()
        elif width <= 1024:
            x = torch.randn(64, width).bfloat16().requires_grad_()
            weight = torch.ones(width, requires_grad=True)
            y = kernels.layer_norm(x, weight, weight, 1e-12, residual=x, dropout_p=dropout_p)
            y.sum().backward()
            kernels.dropout(x, dropout_p, seed=0)
        else:
            logits = torch.randn(2, width).bfloat16().requires_grad_()
            labels = torch.zeros(2, dtype=torch.int64)
            kernels.cross_entropy(logits * 1, labels).backward()

    product = 2 * LENGTH * LENGTH * width * HEADS
    return {
        name.lstrip("_"): Executed(counts, product * PRODUCTS.get(name.lstrip("_"), 0))
        for name, counts in gpu.counts.items()
    }


def predictions(executed, instructions, counted_in, chip):
    """The columns on work and speed.

    instructions: {class: number} of the hottest loop in the machine code, or of all of it.
    "work" is what the tensor cores compute, by what they need to. "predicted" is in TFLOP/s of
    needed work; or in GB/s, which may be more than the memory moves. Nothing is returned if the
    two loops are not the same.
    """
    counts = executed.counts
    if counted_in == "loop":
        loop = counts.loops[0]
        flops, shared, moved = loop.flops, loop.shared_bytes, loop.global_bytes
        for kind in ("tensor", "global"):
            if round(loop.instructions[kind]) != instructions[kind]:
                return {}  # ptxas unrolled it
    else:
        flops, shared, moved = (
            amount / counts.warps
            for amount in (counts.flops, counts.shared_bytes, counts.global_bytes)
        )
    clocks = predicted(Counts(instructions, flops, shared), chip)  # of one warp
    rate = RATES[chip].clocks / clocks
    if not executed.needed:
        return {"predicted": round(moved * rate / 1e9), "unit": "GB/s"}
    work = counts.flops / executed.needed
    return {
        "work": round(work, 3),
        "predicted": round(flops / work * rate / 1e12),
        "unit": "TFLOP/s",
    }
