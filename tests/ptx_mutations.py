"""Removes barriers, waits and fences from the kernels' PTX, one at a time, and runs what is left.

A missing barrier changes no result of a run in lockstep, and on a GPU only some. The watch of ptx/
must find it. What it does not find must be redundant: `why_redundant` says why.
"""

import functools
import itertools
import multiprocessing
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import kernels  # noqa: E402
import ptx  # noqa: E402
from ptx.memory import WARP  # noqa: E402
from ptx.watch import Watch  # noqa: E402

CHIPS = ("sm_80", "sm_90")
# 150 tokens end in a partial block; 128 are whole blocks. Both keep several copies in flight.
LENGTHS = (150, 128)
# How many lines of each kernel the watch may not miss, because they are redundant: see
# `why_redundant`. With Triton 3.7.1.
REDUNDANT = Counter(
    {
        ("sm_80", "_attention_forward"): 4,
        ("sm_80", "_attention_backward_dq"): 4,
        ("sm_80", "_attention_backward_dk_dv"): 8,
        ("sm_80", "_layer_norm_forward"): 3,
        ("sm_80", "_layer_norm_backward"): 12,
        ("sm_90", "_attention_forward"): 7,
        ("sm_90", "_attention_backward_dq"): 14,
        ("sm_90", "_attention_backward_dk_dv"): 20,
        ("sm_90", "_layer_norm_backward"): 12,
    }
)
KERNELS = {
    "attention": ("_attention_forward", "_attention_backward_dq", "_attention_backward_dk_dv"),
    "layer_norm": ("_layer_norm_forward", "_layer_norm_backward"),
    "cross_entropy": ("_cross_entropy_forward",),  # the backward pass has no barrier
}
SYNCHRONIZES = re.compile(
    r"\s*(bar\.sync|cp\.async\.(wait|commit)|wgmma\.(fence|commit|wait)|fence\.proxy)"
)
TOUCHES_SHARED = re.compile(r"\.shared|ldmatrix|stmatrix|wgmma\.mma|wgmma\.wait|cp\.async\.wait")


class Removal(NamedTuple):
    """A line of PTX to remove."""

    chip: str
    operation: str
    kernel: str
    line: int  # counted from 0

    def name(self, text):
        """The bug's name, which says what is missing."""
        instruction = " ".join(text.split("\n")[self.line].split()).rstrip(";")
        kernel = self.kernel.lstrip("_")
        return f"{self.operation}: {self.chip} {kernel} without {instruction}, {self.line + 1}"


class LaneWatch(Watch):
    """Takes threads of one warp for threads that run in any order, and all warps for one."""

    def begin(self, machine):
        super().begin(machine)
        self.warp = machine.thread % WARP


class OneKernel(ptx.Emulator):
    """Watches one kernel, and edits its PTX.

    The kernels before it run as they are, for its inputs: in memory that nobody wrote, equal
    numbers may hide a race. Those behind it do not run.
    """

    def __init__(self, chip, kernel, edit):
        super().__init__(chip)
        self.kernel = kernel
        self.kernel_edit = edit
        self.has_run = False

    def launch(self, kernel, grid, arguments, constants):
        if self.has_run:
            return
        self.has_run = kernel.fn.__name__ == self.kernel
        watch = self.watch
        if self.has_run:
            self.edit = self.kernel_edit
        else:
            self.watch = None
        super().launch(kernel, grid, arguments, constants)
        self.watch = watch


def run_operation(operation, length):
    """An operation forward and backward, in bf16 with dropout.

    All inputs are random: to write the number that is there already is no race.
    """
    torch.manual_seed(0)
    if operation == "attention":
        qkv = torch.randn(length, 3, 1, 64).bfloat16().requires_grad_()
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        out = kernels.attention(qkv, cu_seqlens, length, dropout_p=0.1)
    elif operation == "layer_norm":
        x = torch.randn(9, 768).bfloat16().requires_grad_()
        weight = torch.randn(768, requires_grad=True)
        out = kernels.layer_norm(x, weight, weight, 1e-12, residual=x, dropout_p=0.1)
    else:
        logits = torch.randn(2, 9000).bfloat16().requires_grad_()
        out = kernels.cross_entropy(logits * 1, torch.zeros(2, dtype=torch.int64))
    out.backward(torch.randn_like(out))


def run(chip, operation, kernel, edit, length, watch=Watch):
    """Runs one kernel, its PTX edited. Returns the emulator."""
    with kernels.Launcher.replaced(OneKernel(chip, kernel, edit)) as gpu:
        gpu.watch = watch
        run_operation(operation, length)
    return gpu


@functools.cache
def text_of(chip, operation, kernel):
    """The PTX of a kernel, in which nothing is found."""
    texts = set()
    for length in LENGTHS:
        gpu = run(chip, operation, kernel, None, length)
        texts.add(gpu.texts[kernel])
        if gpu.findings:
            raise SystemExit(f"{kernel} for {chip}, unchanged: {gpu.findings[0]}")
    (text,) = texts
    return text


def removals():
    """{name: Removal} of every line that synchronizes."""
    found = {}
    for chip, operation in itertools.product(CHIPS, KERNELS):
        for kernel in KERNELS[operation]:
            text = text_of(chip, operation, kernel)
            for line, code in enumerate(text.split("\n")):
                if SYNCHRONIZES.match(code):
                    removal = Removal(chip, operation, kernel, line)
                    found[removal.name(text)] = removal
    return found


def finding_without(removal, watch=Watch):
    """The first finding in a run without this line, or None. Run in a process of its own."""

    def edit(text):
        lines = text.split("\n")
        lines[removal.line] = ""
        return "\n".join(lines)

    for length in LENGTHS:
        gpu = run(removal.chip, removal.operation, removal.kernel, edit, length, watch)
        if gpu.findings:
            return f"{gpu.findings[0].kind}: {gpu.findings[0].message}"
    return None


@functools.cache
def processes():
    """The processes that run the removals: Python's threads would wait for each other."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=torch.set_num_threads,
                               initargs=(1,))  # fmt: skip


def caught_by(removal):
    """What the watch says without this line, or None."""
    return processes().submit(finding_without, removal).result()


def why_redundant(removal):
    """Why nothing goes wrong without a line that the watch does not miss."""
    lines = text_of(removal.chip, removal.operation, removal.kernel).split("\n")
    code = lines[removal.line].strip()
    if code.startswith("bar.sync"):
        if not touched(lines[removal.line + 1 :]):
            return "nothing touches shared memory up to the next barrier"
        if not touched(lines[removal.line - 1 :: -1]):
            return "nothing touched shared memory since the barrier before"
        if processes().submit(finding_without, removal, LaneWatch).result():
            return "only threads of one warp exchange data across it, and a warp runs together"
        return "what is touched on its two sides lies in different bytes"
    if code.startswith(("cp.async.commit", "wgmma.commit")):
        return "it joins the next group, which is waited for before the first use"
    if code.startswith(("wgmma.wait", "cp.async.wait")):
        return "another wait comes before the first use"
    following = lines[removal.line + 1 :]
    kind = code.split(".sync")[0].split(".async")[0]  # wgmma.fence or fence.proxy
    for line in following:
        if line.strip().startswith(kind):
            return "another such fence comes before the next product"
        if "wgmma.mma" in line:
            return "what the next product uses was not touched since the fence before"
    return "no product follows"


def touched(lines):
    """True if shared memory is touched before the next barrier or branch."""
    for line in lines:
        if re.match(r"\s*(bar\.sync|(@\S+\s+)?bra|ret|\$L__BB)", line):
            return "bar.sync" not in line  # beyond a branch, anything may come
        if TOUCHES_SHARED.search(line):
            return True
    return True


def too_many(survivors):
    """What is wrong with these removals, that nothing was found without: a list of lines."""
    counts = Counter((removal.chip, removal.kernel) for removal in survivors)
    return [
        f"{count} removals survived in {kernel} for {chip}, more than the {REDUNDANT[chip, kernel]}"
        " that are redundant"
        for (chip, kernel), count in counts.items()
        if count > REDUNDANT[chip, kernel]
    ]
