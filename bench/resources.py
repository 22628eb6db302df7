"""TODO."""

import glob
import itertools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._functorch.config
from tqdm import tqdm

import kernels
from bench.measure import report

if kernels.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget


def attention_work(B, L, N, D, dtype, dropout_p, device):
    """The two attention operators on B sequences of L random tokens: functions without arguments, forward and backward."""
    qkv = torch.randn(B * L, 3, N, D, device=device).to(dtype)
    cu_seqlens = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    out, shift, norm = kernels.attention_outputs(qkv)
    for empty in (out, shift, norm):
        empty.fill_(1)
    return (
        lambda: kernels.attention_op(qkv, cu_seqlens, L, dropout_p, seed),
        lambda: kernels.attention_backward_op(
            out, qkv, out, shift, norm, cu_seqlens, L, dropout_p, seed
        ),
    )


def norm_work(T, H, dtype, dropout_p, device):
    """The two LayerNorm operators, with a residual, and dropout alone, on T random rows: functions without arguments."""
    x, w = torch.randn(T, H, device=device).to(dtype), torch.ones(H, device=device)
    seed, statistics = (
        torch.zeros((), dtype=torch.int64, device=device),
        torch.ones(T, device=device),
    )
    return (
        lambda: kernels.layer_norm_op(x, x, w, w, 1e-12, dropout_p, seed),
        lambda: kernels.layer_norm_backward_op(x, x, x, w, statistics, statistics, dropout_p, seed),
        lambda: kernels.dropout_op(x, dropout_p, seed),
    )


class Compiler(kernels.Launcher):
    """Compiles every kernel just as it would be launched, and launches nothing."""

    def __init__(self, capability=None):
        self.chip, self.launches = capability, []

    def capability(self, x):
        return self.chip or super().capability(x)

    def launch(self, kernel, grid, arguments, constants):
        self.launches.append(
            (
                kernel.fn.__name__.lstrip("_"),
                constants,
                kernel.warmup(*arguments, grid=grid, **constants),
            )
        )


def compile_launches(works, capability=None):
    """Compiles, on all cores, every kernel that the functions in `works` would launch.

    capability: of the chip to choose tiles for, such as (9, 0), where it is not here.
    Returns [(kernel's name, its constants, compiled kernel), ...].
    """
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        with kernels.Launcher.replaced(Compiler(capability)) as compiler:
            for work in works:
                work()
        return [
            (
                name,
                constants,
                kernel.result(ignore_errors=True)
                if isinstance(kernel, triton.FutureKernel)
                else kernel,
            )
            for name, constants, kernel in tqdm(compiler.launches, desc="compiling", unit="kernel")
        ]


def machine_code_usage(kernel):
    """Registers of a thread and bytes that it spills, of a compiled kernel."""
    (cuobjdump,) = glob.glob(
        os.path.join(os.path.dirname(triton.__file__), "**", "cuobjdump"), recursive=True
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", f.name], capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


class Chip:
    """Stands in for Triton's driver where there is no GPU: names the chip to compile for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


def bench_resources(path=None):
    """Compiles every kernel just as it would be launched, for four chips that need not be here, and reads the machine code."""
    rows = []
    for capability in (80, 89, 90, 100):
        triton.runtime.driver.set_active(Chip(capability))
        for dtype, dropout_p in itertools.product(
            (torch.bfloat16, torch.float16, torch.float32), (0.0, 0.1)
        ):
            works = [
                work
                for D in (64, 128)
                for work in attention_work(1, 1000, 12, D, dtype, dropout_p, "cpu")
            ]
            works += norm_work(1000, 768, dtype, dropout_p, "cpu")[: 3 if dropout_p else 2]
            for name, constants, kernel in compile_launches(works, divmod(capability, 10)):
                registers, stack = machine_code_usage(kernel)
                blocks = [
                    str(constants[k])
                    for k in ("BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_H")
                    if k in constants
                ]
                row = {
                    "chip": f"sm_{capability}",
                    "kernel": name,
                    "dtype": str(dtype)[6:],
                    "D or H": constants.get("D", 768),
                }
                row |= {
                    "dropout": dropout_p,
                    "tile": "x".join(blocks),
                    "warps": kernel.metadata.num_warps,
                    "registers": registers,
                }
                row |= {
                    "spills (bytes)": stack,
                    "shared (KB)": kernel.metadata.shared // 1024,
                    "wgmma": "wgmma" in kernel.asm["ptx"],
                }
                rows.append(row)
    report(path or "results/resources.json", "resources", rows, triton=triton.__version__)
