"""Takes the place of a GPU: compiles each kernel for a chip and runs its PTX on CPU tensors.

Triton compiles the kernel as for that chip, up to PTX. The machine then runs one program of the
grid after the other.
"""

import contextlib
import functools
import inspect
import itertools

from tqdm import tqdm

import kernels
from ptx.compiler import start_compiling
from ptx.counts import Counts
from ptx.machine import Code, Machine
from ptx.memory import SHARED_BASE, GlobalMemory, shared_memory
from ptx.opcodes import build
from ptx.parser import PtxError, parse
from ptx.watch import Watch

if kernels.HAS_TRITON:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

CHIPS = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90": (9, 0)}  # compute capability
# What a block may have, and a grid along its axes (CUDA C++ Programming Guide, compute
# capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}  # bytes
THREAD_LIMIT = 1024
GRID_LIMIT = (2**31 - 1, 65_535, 65_535)


@functools.lru_cache(maxsize=128)
def code_of(ptx):
    """The `Code` of a PTX text."""
    return Code(parse(ptx), build)


class Emulator(kernels.Launcher):
    """Runs kernels on the machine in NumPy.

    findings: what was wrong, a list of `Finding`. The same at the same place counts once.
    counts: {kernel: `Counts`} of the instructions that were executed.
    """

    def __init__(self, chip, watch=True):
        super().__init__(compiles_on_cpu=True)
        if chip not in CHIPS:
            known = ", ".join(CHIPS)
            raise PtxError(f"the chip {chip} is not supported: the machine knows {known}")
        self.chip = chip
        self.watch = Watch if watch else None
        self.findings = []
        self.counts = {}
        self.texts = {}  # {kernel: its PTX}, of the last launch
        self.edit = None  # a function of the PTX text that gives the text to run: to plant bugs
        self.trace = None  # a function (machine, step), called behind each instruction
        self.seen = set()

    def capability(self, x):
        return CHIPS[self.chip]

    def launch(self, kernel, grid, arguments, constants):
        major, minor = CHIPS[self.chip]
        future = start_compiling(kernel, 10 * major + minor, arguments, constants)
        compiled = future.result()
        given = dict(zip(kernel.arg_names, arguments))
        by_name = defaults_of(kernel) | constants | given
        values = [by_name[name] for name in compiled.parameters]
        ptx = self.edit(compiled.ptx) if self.edit else compiled.ptx
        # Behind the arguments Triton adds pointers to scratch memory, which is not used here.
        parameters = code_of(ptx).kernel.parameters
        values += [0] * (len(parameters) - len(values))
        names = (*compiled.parameters, *list(parameters)[len(compiled.parameters) :])
        self.run(ptx, grid, values, compiled.shared, names)

    def run(self, ptx, grid, values, shared=0, names=None):
        """Runs a PTX text on a grid of up to three axes. values: its arguments, in order.

        Tensors must be on the CPU, and are read and written in place. shared: bytes of shared
        memory that the launch decides. names: of the arguments, for messages.
        """
        code = code_of(ptx)
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        self.check(code, values, grid)
        self.texts[code.name] = ptx
        names = names or tuple(code.kernel.parameters)
        tensors = {n: v for n, v in zip(names, values) if hasattr(v, "data_ptr")}
        memory = GlobalMemory(tensors)
        parameters = [memory.pointer(v) if hasattr(v, "data_ptr") else v for v in values]
        symbols = dict(zip(code.kernel.parameters, parameters, strict=True))
        size = 0
        for name, (length, alignment) in code.kernel.shared.items():
            size = -(-size // alignment) * alignment
            symbols[name] = SHARED_BASE + size
            size += length or shared
        if size > SHARED_LIMIT[self.chip]:
            limit = f"{self.chip} has {SHARED_LIMIT[self.chip]:,}"
            raise PtxError(f"{code.name} needs {size:,} bytes of shared memory, {limit}")
        counts = self.counts.setdefault(code.name, Counts(code.name))
        watch = self.watch(memory) if self.watch else None
        grid = (*grid, 1, 1)[:3]
        places = list(itertools.product(*(range(n) for n in grid[::-1])))  # (z, y, x)
        for z, y, x in tqdm(places, code.name, unit="program", delay=2, leave=False):
            piece = shared_memory(size)
            place = (x, y, z)
            machine = Machine(code, place, grid, symbols, piece, memory, self.report, watch)
            if watch:
                watch.begin(machine)
            machine.run(self.trace)
            counts.add(code, machine.executed)

    def check(self, code, values, grid):
        """Raises PtxError if the text is for another chip, or arguments or grid do not fit it."""
        if code.threads > THREAD_LIMIT:
            raise PtxError(f"{code.name}: a block has at most {THREAD_LIMIT:,} threads")
        if len(grid) > 3 or any(n > most for n, most in zip(grid, GRID_LIMIT)):
            raise PtxError(f"{code.name}: a grid of {grid} is more than {GRID_LIMIT}")
        target = code.kernel.target
        if target.rstrip("af") != self.chip:
            raise PtxError(f"{code.name}: its PTX is for {target}, not for {self.chip}")
        wanted = len(code.kernel.parameters)
        if len(values) != wanted:
            raise PtxError(f"{code.name} takes {wanted} arguments, got {len(values)}")
        for name, value in zip(code.kernel.parameters, values):
            if hasattr(value, "data_ptr") and value.device.type != "cpu":
                raise PtxError(f"{code.name}: {name} must lie on the CPU, not {value.device}")

    def report(self, finding):
        """Keeps a finding, once for each place and kind."""
        key = (finding.kind, finding.kernel, finding.line)
        if key not in self.seen:
            self.seen.add(key)
            self.findings.append(finding)


def defaults_of(kernel):
    """{parameter: its default} of a Triton kernel."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


@contextlib.contextmanager
def every_launch(launcher):
    """Within this block, `launcher` also launches kernels that do not ask kernels.py for one."""
    classes = (JITFunction, InterpretedFunction)
    before = [one.run for one in classes]

    def replacement(run):
        def launch(kernel, *arguments, grid, warmup, **options):
            if warmup:  # it is only compiled
                return run(kernel, *arguments, grid=grid, warmup=True, **options)
            if callable(grid):
                grid = grid(options | dict(zip(kernel.arg_names, arguments)))
            launcher.launch(kernel, grid, arguments, options)

        return launch

    try:
        for one in classes:
            one.run = replacement(one.run)
        yield
    finally:
        for one, run in zip(classes, before):
            one.run = run


@contextlib.contextmanager
def emulated(chip, watch=True):
    """Within `with emulated("sm_80") as gpu:`, Triton kernels run as on that chip.

    Those of kernels.py do, which then serve tensors on the CPU, and any other that is launched.
    chip: "sm_80" (A100), "sm_89" (RTX 4090, L40) or "sm_90" (H100, H200). watch: look for races,
    unwritten memory and missing waits; addresses, barriers and divergence are checked in any case.
    One thread at a time, and backward passes within the block as well. Tensors lie on the CPU, of
    fp16, bf16 or fp32. Yields an `Emulator`, with `findings` and
    `counts`. Raises PtxError for another chip, without Triton, for a kernel that does not compile,
    and for an instruction that is not supported.
    """
    if not kernels.HAS_TRITON:
        raise PtxError("there is no Triton here to compile the kernels")
    emulator = Emulator(chip, watch)
    with kernels.Launcher.replaced(emulator), every_launch(emulator):
        yield emulator
