"""What each kernel takes of a chip: registers, shared memory, and the instructions of its loop.

Triton compiles for a GPU that need not be here. `python -m bench kernels --resources` compiles
every kernel just as it would be launched on four chips, and kernels of others for two of them, and
reads the machine code: see machine_code.py. Speeds need a GPU: see kernel_speed.py.
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import kernels
from bench import peers
from bench.machine_code import (
    CODE_COLUMNS,
    class_counts,
    code_figures,
    disassembled,
    hottest_code,
    machine_code_usage,
    ptxas_warnings,
)
from bench.measure import report
from bench.prediction import emulated_counts, predictions
from ptx.compiler import Chip

if kernels.HAS_TRITON:
    import triton

CHIPS = (80, 89, 90, 100)  # A100; RTX 4090 and L40; H100 and H200; B200
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PEERS_CHIPS = (80, 90)  # for which the peers are compiled as well, in bf16
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


# ---- the table -----------------------------------------------------------------------------------

# The constants of a kernel that make its tile: ours, Liger's and fla's.
BLOCKS = ("BLOCK_Q", "BLOCK_K", "BLOCK_R", "BLOCK_H", "BLOCK_V", "BLOCK_SIZE", "BT", "BS")


class Variant(NamedTuple):
    """A kernel, compiled for a chip: what a row of the table is about."""

    by: str  # "kernels", or a peer
    chip: int
    dtype: torch.dtype
    width: int  # D, H or V
    dropout_p: float
    launch: Launch
    executed: Any = None  # ptx's counts of a run of it, if there was one


def resource_row(variant):
    """A row of the table."""
    kernel = variant.launch.kernel
    constants = variant.launch.constants
    registers, spilled = machine_code_usage(kernel)
    return {
        "chip": f"sm_{variant.chip}",
        "by": variant.by,
        "kernel": variant.launch.name,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "width": variant.width,
        "dropout": variant.dropout_p,
        "tile": "x".join(str(constants[key]) for key in BLOCKS if key in constants),
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spills (bytes)": spilled,
        "shared (KB)": kernel.metadata.shared // 1024,
        # On sm_90 a product by wgmma feeds the tensor cores from shared memory.
        "wgmma": "wgmma" in kernel.asm["ptx"],
        **machine_code_columns(variant),
    }


def machine_code_columns(variant):
    """The columns that take a third of a second, empty (None) where they would say little new.

    ptxas warns of wgmma, which only half precision on sm_90 uses. Instructions are counted in bf16
    on the peers' chips: attention in fp16 has the same ones, and fp32 uses no tensor cores.
    """
    columns = dict.fromkeys(("warnings", *CODE_COLUMNS, "work", "predicted", "unit"))
    kernel = variant.launch.kernel
    if variant.chip == 90 and variant.dtype != torch.float32:
        columns["warnings"] = " ".join(ptxas_warnings(kernel))
    if variant.chip in PEERS_CHIPS and variant.dtype == torch.bfloat16:
        code, counted_in = hottest_code(disassembled(kernel))
        columns |= code_figures(code, counted_in)
        if variant.executed:
            columns |= predictions(variant.executed, class_counts(code), counted_in, variant.chip)
    return columns


def our_variants(chip):
    """Every kernel of kernels.py, compiled for a chip."""
    settings = list(itertools.product(DTYPES, (0.0, 0.1)))
    jobs = []
    for dtype, dropout_p in settings:
        compiler = Compiler(chip=divmod(chip, 10))
        jobs.append((compiler, lambda d=dtype, p=dropout_p: every_operation(d, p)))

    variants = []
    for (dtype, dropout_p), launches in zip(settings, compile_launches(jobs)):
        for launch in launches:
            constants = launch.constants
            width = constants.get("D") or constants.get("H") or constants["V"]
            variants.append(Variant("kernels", chip, dtype, width, dropout_p, launch))
    if chip in PEERS_CHIPS:
        variants = [with_executed(variant) for variant in tqdm(variants, "running", unit="kernel")]
    return variants


def with_executed(variant):
    """The variant, with what it executes in the machine of ptx/, if its figures are shown."""
    if variant.dtype != torch.bfloat16:
        return variant
    counts = emulated_counts(variant.chip, variant.width, variant.dropout_p)
    return variant._replace(executed=counts.get(variant.launch.name))


def peers_variants(chip, installed, dtype=torch.bfloat16):
    """The kernels of the installed peers, compiled for a chip. Prints which do not compile."""
    jobs = []
    for peer, module in installed:
        compiler = Compiler()
        arguments = (peer, module, chip, dtype, compiler)
        jobs.append((compiler, lambda arguments=arguments: peers.compile_peer(*arguments)))

    variants = []
    for (peer, _), launches in zip(installed, compile_launches(jobs)):
        for launch in launches:
            if launch.kernel is None:
                print(f"{peer.name}: {launch.name} does not compile for sm_{chip}")
            else:
                variants.append(Variant(peer.name, chip, dtype, peer.width, 0.0, launch))
    return variants


def bench_resources(path=None, chips=CHIPS):
    """Compiles every kernel for each chip, and writes what the machine code takes."""
    installed = peers.installed_peers()
    variants = []
    for chip in chips:
        triton.runtime.driver.set_active(Chip(chip))  # there may be no driver at all
        variants += our_variants(chip)
        if chip in PEERS_CHIPS:
            variants += peers_variants(chip, installed)

    # Every row waits for the tools that read the machine code.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(resource_row, variants)
        rows = list(tqdm(rows, total=len(variants), desc="reading", unit="kernel"))
    facts = dict(triton=triton.__version__, peers=peers.versions(installed))
    report(path or "results/resources.json", "resources", rows, **facts)
