"""Compiles a Triton kernel to PTX, for a chip that need not be here.

Triton decides when it is imported whether functions are compiled or interpreted
(TRITON_INTERPRET=1). Where they are interpreted, other processes compile: each of them reads
requests from its standard input and answers on its standard output (`serve`).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import pickle
import queue
import subprocess
import sys
import threading
from typing import NamedTuple

import kernels
from ptx.parser import PtxError

if kernels.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget


class Chip:
    """Takes the place of Triton's driver: names the chip to compile for."""

    def __init__(self, capability):
        """capability: such as 90."""
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


@dataclasses.dataclass(frozen=True)  # Triton would take a NamedTuple for a tuple of arguments
class Pointer:
    """What the compiler must know of a tensor."""

    dtype: object
    remainder: int  # of its address, by 16

    def data_ptr(self):
        return self.remainder


class Request(NamedTuple):
    """What to compile."""

    module: str
    path: str  # of the file that defines the kernel
    name: str
    line: int  # at which it begins
    capability: int
    arguments: tuple
    constants: tuple  # (name, value), ...


class Compiled(NamedTuple):
    """A compiled kernel."""

    ptx: str
    shared: int  # bytes of shared memory of a block
    parameters: tuple  # the names of the arguments that the PTX has as parameters, in order


def start_compiling(kernel, capability, arguments, constants):
    """A future of the `Compiled` kernel. arguments, constants: as `Launcher.launch` has them.

    Raises PtxError, from its result(), if the kernel does not compile.
    """
    function = kernel.fn
    request = Request(
        module=function.__module__,
        path=os.path.abspath(function.__code__.co_filename),
        name=function.__name__,
        line=function.__code__.co_firstlineno,
        capability=capability,
        arguments=tuple(described(argument) for argument in arguments),
        constants=tuple(constants.items()),
    )
    if kernels.INTERPRETED:
        return ask(request)
    future = concurrent.futures.Future()
    answer = answer_to(request, kernel)
    if isinstance(answer, PtxError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
    return future


def described(argument):
    """A tensor as a `Pointer`; a number as it is."""
    if hasattr(argument, "data_ptr"):
        return Pointer(argument.dtype, argument.data_ptr() % 16)
    return argument


def compile_here(kernel, request):
    """Compiles in this process, in which Triton does not interpret."""
    driver = triton.runtime.driver
    before = getattr(driver, "_active", None)  # None: Triton looks for a GPU when it needs one
    driver.set_active(Chip(request.capability))
    try:
        compiled = kernel.warmup(*request.arguments, grid=(1,), **dict(request.constants))
    finally:
        driver.set_active(before)
    # Arguments that a variant is specialized on, such as a stride of 1, are no parameters.
    signature = compiled.src.signature.items()
    parameters = tuple(name for name, type in signature if type != "constexpr")
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, parameters)


# ---- other processes -----------------------------------------------------------------------------

waiting = queue.Queue()  # (a pickled Request, its Future): what the processes take next
asked = {}  # {a pickled Request: its Future}


def ask(request):
    """A future of what another process compiles."""
    try:
        pickled = pickle.dumps(request)  # as a key, it also tells 1 from 1.0 and True
    except Exception as error:
        raise PtxError(f"{request.name}: an argument cannot be pickled: {error}") from None
    if pickled not in asked:
        asked[pickled] = concurrent.futures.Future()
        waiting.put((pickled, asked[pickled]))
        start_workers()
    return asked[pickled]


@functools.cache
def start_workers():
    """Starts a thread for each core, which talks to a process of its own."""
    for _ in range(os.cpu_count()):
        threading.Thread(target=talk, daemon=True).start()


def talk():
    """Hands a process one request after the other, and passes on its answers."""
    process = None
    while True:
        pickled, future = waiting.get()
        process = process or start_process()
        try:
            process.stdin.write(pickled)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except Exception as error:  # it has ended, or what it says cannot be read
            answer = PtxError(f"the process that compiles has ended: {error!r}")
            process.kill()
            process = None
            asked.pop(pickled, None)  # so that another try is made
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def start_process():
    """A process that runs `serve`, in which Triton compiles."""
    root = os.path.dirname(os.path.abspath(kernels.__file__))
    interpreting = ("TRITON_INTERPRET", "STARENCODER_KERNELS")
    environment = {k: v for k, v in os.environ.items() if k not in interpreting}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-c", "from ptx.compiler import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def load_kernel(request):
    """The kernel that a request names. Raises PtxError if it is not at the top of its file."""
    module = sys.modules.get(request.module)
    if request.module != "__main__" and module is None:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(request.module)
    if os.path.abspath(getattr(module, "__file__", None) or "") != request.path:
        # A script, or a file that cannot be imported by its name.
        name = f"kernels_of_{request.module}"
        loader = importlib.machinery.SourceFileLoader(name, request.path)
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        sys.modules[name] = module
        loader.exec_module(module)
    for kernel in vars(module).values():
        if isinstance(kernel, triton.JITFunction):
            place = (kernel.fn.__name__, kernel.fn.__code__.co_firstlineno)
            if place == (request.name, request.line):
                return kernel
    raise PtxError(f"{request.name} is not defined at the top of {request.path}")


def serve():
    """Answers requests until the standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints does not disturb the answers
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer_to(request), answers)
        answers.flush()


def answer_to(request, kernel=None):
    """The `Compiled` kernel, or a PtxError that says why it does not compile.

    kernel: Triton's, or None to import it.
    """
    try:
        return compile_here(kernel or load_kernel(request), request)
    except PtxError as error:
        return error
    except (Exception, SystemExit) as error:  # a file may end the process as it is imported
        last_line = str(error).strip().split("\n")[-1]
        return PtxError(f"{request.name} does not compile: {last_line or type(error).__name__}")
