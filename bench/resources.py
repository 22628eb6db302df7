"""What each kernel takes of a chip: registers, spilled bytes, shared memory.

Triton compiles for a GPU that need not be here. `python -m bench kernels --resources` compiles
every kernel just as it would be launched on four chips, and reads the machine code with cuobjdump,
which comes with Triton. Speeds need a GPU: see kernel_speed.py.
"""

import glob
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import kernels
from bench.measure import report

if kernels.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget

CHIPS = (80, 89, 90, 100)  # A100; RTX 4090 and L40; H100 and H200; B200
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = 1000  # no multiple of a block: the masked rest is compiled as well


class Launch(NamedTuple):
    """A kernel that was compiled and not launched."""

    name: str
    constants: dict  # by name, with num_warps and num_stages
    kernel: Any  # Triton's compiled kernel, or None if it does not compile


class Compiler(kernels.Launcher):
    """Compiles every kernel just as it would be launched, and launches nothing.

    chip: the compute capability to compile for, such as (9, 0), or None for that of the tensors'
    device. given: the `kernels.Tiles` to use, or None for the chip's own.
    """

    def __init__(self, chip=None, given=None):
        super().__init__(dry=True)
        self.chip = chip
        self.given = given
        self.launches = []  # a Launch for each kernel, in the order of the calls

    def capability(self, x):
        return self.chip or super().capability(x)

    def tiles(self, x):
        return self.given or super().tiles(x)

    def launch(self, kernel, grid, arguments, constants):
        # Within AsyncCompileMode this returns at once, with a promise of the kernel.
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        self.launches.append(Launch(kernel.fn.__name__.lstrip("_"), constants, compiled))


def compile_launches(jobs):
    """Compiles, on all cores, every kernel that the jobs would launch.

    jobs: [(a Compiler, a function without arguments that calls operations), ...].
    Returns for each job the list of its `Launch`es.
    """
    compiled = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for compiler, work in jobs:
            with kernels.Launcher.replaced(compiler):
                work()
        # The pool compiles meanwhile; here each kernel is waited for.
        for compiler, _ in tqdm(jobs, desc="compiling", unit="job"):
            compiled.append([finished(launch) for launch in compiler.launches])
    return compiled


def finished(launch):
    """The launch, once its kernel is compiled."""
    if isinstance(launch.kernel, triton.FutureKernel):
        return launch._replace(kernel=launch.kernel.result(ignore_errors=True))
    return launch


def machine_code_usage(kernel):
    """Registers of a thread and bytes that it spills, of a compiled kernel."""
    package = os.path.dirname(triton.__file__)
    (cuobjdump,) = glob.glob(os.path.join(package, "**", "cuobjdump"), recursive=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        command = [cuobjdump, "--dump-resource-usage", f.name]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
    # A thread that runs out of registers spills to its stack.
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


class Chip:
    """Takes the place of Triton's driver: names the chip to compile for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


def every_operation(dtype, dropout_p):
    """Calls every operation forward and backward. Numbers do not matter, since nothing runs."""
    cu_seqlens = torch.tensor([0, TOKENS], dtype=torch.int32)
    for D in (64, 128):
        # (T, 3, N, D)
        qkv = torch.empty(TOKENS, 3, 12, D, dtype=dtype, requires_grad=True)
        out = kernels.attention(qkv, cu_seqlens, TOKENS, dropout_p=dropout_p)
        out.sum().backward()

    x = torch.empty(TOKENS, 768, dtype=dtype, requires_grad=True)  # (T, H)
    weight = torch.ones(768, requires_grad=True)
    y = kernels.layer_norm(x, weight, weight, 1e-12, residual=x, dropout_p=dropout_p)
    y.sum().backward()
    kernels.dropout(x, dropout_p, seed=0)  # its backward pass is the same kernel

    if dropout_p == 0.0:  # it has none
        logits = torch.empty(TOKENS, 49_216, dtype=dtype, requires_grad=True)  # (M, V)
        labels = torch.zeros(TOKENS, dtype=torch.int64)
        kernels.cross_entropy(logits, labels).backward()


def resource_row(chip, dtype, dropout_p, launch):
    """A row of the table."""
    registers, spilled = machine_code_usage(launch.kernel)
    constants = launch.constants
    # A kernel has BLOCK_Q and BLOCK_K, BLOCK_R and BLOCK_H, or BLOCK_V.
    blocks = [constants[key] for key in constants if key in ("BLOCK_Q", "BLOCK_K")]
    blocks += [constants[key] for key in constants if key in ("BLOCK_R", "BLOCK_H", "BLOCK_V")]
    return {
        "chip": f"sm_{chip}",
        "kernel": launch.name,
        "dtype": str(dtype).removeprefix("torch."),
        "width": constants.get("D") or constants.get("H") or constants["V"],
        "dropout": dropout_p,
        "tile": "x".join(map(str, blocks)),
        "warps": launch.kernel.metadata.num_warps,
        "registers": registers,
        "spills (bytes)": spilled,
        "shared (KB)": launch.kernel.metadata.shared // 1024,
        # On sm_90 a product by wgmma feeds the tensor cores from shared memory.
        "wgmma": "wgmma" in launch.kernel.asm["ptx"],
    }


def bench_resources(path=None):
    """Compiles every kernel for each chip, and writes what the machine code takes."""
    rows = []
    for chip in CHIPS:
        triton.runtime.driver.set_active(Chip(chip))  # there may be no driver at all
        settings = list(itertools.product(DTYPES, (0.0, 0.1)))
        jobs = []
        for dtype, dropout_p in settings:
            compiler = Compiler(chip=divmod(chip, 10))
            jobs.append((compiler, lambda d=dtype, p=dropout_p: every_operation(d, p)))
        for (dtype, dropout_p), launches in zip(settings, compile_launches(jobs)):
            rows += [resource_row(chip, dtype, dropout_p, launch) for launch in launches]
    report(path or "results/resources.json", "resources", rows, triton=triton.__version__)
