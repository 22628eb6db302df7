"""The speed of the kernels beside that of their peers, and the search for launch settings.

`python -m bench kernels` runs each operation forward and backward on a micro-batch of the published
run (64 sequences of 1,024 tokens, bf16), beside PyTorch and Liger. A speed is the work that must
be done, by the time: FLOPs for attention, bytes read and written for the others. Beside it stands
the share of what the device reaches at best, a large matrix product or a large copy, measured in
the same run. `--tune` tries launch settings and prints the best as entries of `kernels.TILES`.
"""

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench.machine_code import machine_code_usage
from bench.measure import REPETITIONS, medians, report
from bench.resources import Compiler, compile_launches

if kernels.HAS_TRITON:
    import triton

HIDDEN = 768  # of the published model
EPS = 1e-12  # of its LayerNorms
VOCABULARY = 49_216  # that of the published run, rounded up to a multiple of 64


class Passes(NamedTuple):
    """Something for each pass of an operation: functions without arguments, or amounts of work."""

    forward: Any
    backward: Any


class Ceiling(NamedTuple):
    """What the device does at best, in a unit that is read easily."""

    speed: float  # FLOP/s or bytes/s
    scale: float  # of the unit: 1e12 FLOP/s, 1e9 bytes/s
    unit: str  # TFLOP/s or GB/s


# ---- measuring -----------------------------------------------------------------------------------


def on_gpu(function, amount, launches=10):
    """For `medians`: a function that calls `function` so often, waits for the GPU, and returns how
    much was done, `amount` by each call."""

    def work():
        # Several launches, so that the wait at the end weighs little.
        for _ in range(launches):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return launches * amount

    return work


def measure_ceilings(device):
    """What the device can do at best: {"matmul": FLOP/s of a large bf16 product, "copy": bytes/s
    read and written by a large copy}."""
    size = 8192 if device == "cuda" else 2048
    numbers = 2**29 if device == "cuda" else 2**26
    # Random numbers: a product of ones draws less power, and ran 15 % faster on an H200.
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    contenders = {
        "matmul": on_gpu(functools.partial(torch.matmul, matrix, matrix), 2 * size**3),
        "copy": on_gpu(functools.partial(target.copy_, source), 2 * 2 * numbers),
    }
    ceilings = medians(contenders)
    matmul = f"{ceilings['matmul'] / 1e12:,.2f} TFLOP/s"
    print(f"ceilings: matmul {matmul}, copy {ceilings['copy'] / 1e9:,.0f} GB/s")
    return ceilings


def available(contenders):
    """The contenders that run here, each run once and so compiled. Prints why others do not."""
    running = {}
    for name, work in contenders.items():
        try:
            work()
            running[name] = work
        except Exception as error:  # no such library or backend, or a tile too large for the chip
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            reason = str(error).strip().split("\n")[0][:120]
            print(f"{name}: not available here ({reason})")
    return running


def autograd_passes(function, inputs, upstream):
    """function(*inputs), and its gradients with respect to the inputs, as `Passes`."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]

    @functools.cache
    def output():  # computed when the backward pass first asks: this contender may not be available
        return function(*inputs)

    def backward():
        return torch.autograd.grad(output(), inputs, upstream, retain_graph=True)

    return Passes(functools.partial(function, *inputs), backward)


def compare(operation, contenders, amounts, ceiling, repetitions):
    """The rows on one operation. contenders: {name: Passes}, ours first. amounts: Passes."""
    rows = []
    for direction in Passes._fields:  # forward, backward
        amount = getattr(amounts, direction)
        works = {name: on_gpu(getattr(p, direction), amount) for name, p in contenders.items()}
        speeds = medians(available(works), repetitions)
        ours = next(iter(speeds.values()))  # the first contender
        for name, speed in speeds.items():
            row = {
                "operation": operation,
                "pass": direction,
                "by": name,
                "ms": f"{amount / speed * 1e3:.3f}",
                "speed": f"{speed / ceiling.scale:,.0f} {ceiling.unit}",
                "of ceiling": f"{speed / ceiling.speed:.0%}",
                "here / it": f"{ours / speed:.2f}",
            }
            rows.append(row)
    return rows


# ---- the operations and their peers --------------------------------------------------------------


class AttentionCase(NamedTuple):
    """A shape to measure attention on."""

    D: int
    lengths: list[int]
    dropout_p: float
    shown: str  # the lengths, in words


def attention_cases(tokens):
    """Full sequences, short ones, a wider head, and a mixture: without padding, only varlen is a
    peer there."""
    full = [1024] * (tokens // 1024)
    short = [128] * (tokens // 128)
    generator = random.Random(0)
    mixed = [generator.randint(32, 1024) for _ in range(tokens // 528)]  # 528 on average
    return [
        AttentionCase(64, full, 0.0, "1,024"),
        AttentionCase(64, full, 0.1, "1,024"),
        AttentionCase(64, short, 0.0, "128"),
        AttentionCase(128, full, 0.0, "1,024"),
        AttentionCase(64, mixed, 0.0, "32 to 1,024"),
    ]


def sdpa(q, k, v, backend, dropout_p):
    """PyTorch's attention by one of its backends. q, k, v: (B, N, L, D)."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def varlen(q, k, v, cu_seqlens, max_seqlen):
    """PyTorch's attention on packed sequences, which has no dropout. q, k, v: (T, N, D)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def attention_contenders(case, device):
    """{name: Passes} of attention by us and by its peers."""
    N = HIDDEN // case.D
    T = sum(case.lengths)
    L = max(case.lengths)
    # qkv (T, 3, N, D); upstream (T, N, D), the gradient of the output.
    qkv = torch.randn(T, 3, N, case.D, device=device, dtype=torch.bfloat16)
    upstream = torch.randn(T, N, case.D, device=device, dtype=torch.bfloat16)
    bounds = [0, *itertools.accumulate(case.lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

    packed = dict(cu_seqlens=cu_seqlens, max_seqlen=L)
    ours = functools.partial(kernels.attention, **packed, dropout_p=case.dropout_p)
    contenders = {"kernels.attention": autograd_passes(ours, [qkv], upstream)}

    if len(set(case.lengths)) == 1:  # SDPA takes (B, N, L, D)
        heads = [x.unflatten(0, (-1, L)).transpose(1, 2) for x in qkv.unbind(1)]
        wanted = upstream.unflatten(0, (-1, L)).transpose(1, 2)
        backends = (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        )
        for backend in backends:
            theirs = functools.partial(sdpa, backend=backend, dropout_p=case.dropout_p)
            contenders[f"SDPA {backend.name}"] = autograd_passes(theirs, heads, wanted)

    if case.dropout_p == 0.0:  # varlen_attn has no dropout
        theirs = functools.partial(varlen, **packed)
        contenders["varlen_attn"] = autograd_passes(theirs, qkv.unbind(1), upstream)
    return contenders


def attention_rows(ceiling, device, tokens, repetitions):
    """The rows on attention."""
    rows = []
    for case in attention_cases(tokens):
        # Two products forward; five backward, since the scores are computed again.
        flops = 4 * sum(length**2 for length in case.lengths) * HIDDEN
        operation = f"attention, D {case.D}, length {case.shown}, dropout {case.dropout_p}"
        contenders = attention_contenders(case, device)
        rows += compare(operation, contenders, Passes(flops, 2.5 * flops), ceiling, repetitions)
    return rows


def eager_layer_norm(x, weight, bias, residual=None, dropout_p=0.0):
    """LN(dropout(x) + residual) in PyTorch, which takes several kernels."""
    if residual is not None:
        x = F.dropout(x, dropout_p) + residual
    return F.layer_norm(x, x.shape[1:], weight, bias, EPS)


def our_layer_norm(x, weight, bias, residual=None, dropout_p=0.0):
    """The same in one kernel."""
    return kernels.layer_norm(x, weight, bias, EPS, residual=residual, dropout_p=dropout_p)


def liger_layer_norm(x, weight, bias):
    """Liger's kernel, which takes no residual."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


def layer_norm_rows(ceiling, device, tokens, repetitions):
    """The rows on LayerNorm: alone, with a residual, and with a residual and dropout."""
    rows = []
    bf16 = dict(device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, HIDDEN, **bf16)
    residual = torch.randn(tokens, HIDDEN, **bf16)
    upstream = torch.randn(tokens, HIDDEN, **bf16)
    weight = torch.randn(HIDDEN, **bf16)
    for plus, dropout_p in ((False, 0.0), (True, 0.0), (True, 0.1)):
        functions = {
            "kernels.layer_norm": functools.partial(our_layer_norm, dropout_p=dropout_p),
            "PyTorch": functools.partial(eager_layer_norm, dropout_p=dropout_p),
        }
        functions["PyTorch, compiled"] = torch.compile(functions["PyTorch"])
        inputs = [x, weight, weight]
        operation = f"LayerNorm, H {HIDDEN}"
        if plus:
            inputs.append(residual)
            operation += f", residual, dropout {dropout_p}"
        else:
            functions["Liger"] = liger_layer_norm  # it takes no residual

        contenders = {
            name: autograd_passes(function, inputs, upstream)
            for name, function in functions.items()
        }
        # Forward: x (and residual) in, y out. Backward: dy, x (and residual) in, dx out, and, with
        # dropout, dresidual out. A matrix is 2 bytes times its size.
        matrix = 2 * tokens * HIDDEN
        moved = Passes((2 + plus) * matrix, (3 + plus + (dropout_p > 0)) * matrix)
        rows += compare(operation, contenders, moved, ceiling, repetitions)
    return rows


def cross_entropy_rows(ceiling, device, masked, repetitions):
    """The rows on the cross-entropy of the masked tokens."""
    # The masked tokens alone have logits, (M, V).
    logits = torch.randn(masked, VOCABULARY, device=device, dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (masked,), device=device)
    upstream = torch.ones((), device=device)

    # Ours overwrites the logits with their gradient, so its backward pass has a copy of its own.
    _, lse = kernels.cross_entropy_forward(logits, labels)
    backward = kernels.cross_entropy_backward
    ours = Passes(
        functools.partial(kernels.cross_entropy_forward, logits, labels),
        functools.partial(backward, logits.clone(), labels, lse, upstream),
    )
    eager = functools.partial(kernels.cross_entropy_reference, labels=labels)
    contenders = {
        "kernels.cross_entropy": ours,
        "PyTorch": autograd_passes(eager, [logits], upstream),
        "PyTorch, compiled": autograd_passes(torch.compile(eager), [logits], upstream),
    }
    # Forward: the logits in. Backward: the logits in, their gradient out.
    moved = Passes(2 * logits.numel(), 4 * logits.numel())
    operation = f"cross-entropy, {masked:,} x {VOCABULARY:,}"
    return compare(operation, contenders, moved, ceiling, repetitions)


def bench_kernels(path=None, device="cuda", tokens=2**16, repetitions=REPETITIONS):
    """Each operation, forward and backward, beside its peers, in bf16."""
    torch._functorch.config.donated_buffer = False  # a compiled backward pass is run many times
    ceilings = measure_ceilings(device)
    matmul = Ceiling(ceilings["matmul"], 1e12, "TFLOP/s")
    copy = Ceiling(ceilings["copy"], 1e9, "GB/s")
    rows = attention_rows(matmul, device, tokens, repetitions)
    # LayerNorm is fast: four micro-batches at once are measured better. 15 % of tokens are masked.
    rows += layer_norm_rows(copy, device, 4 * tokens, repetitions)
    rows += cross_entropy_rows(copy, device, round(0.15 * tokens), repetitions)
    facts = dict(ceilings=ceilings, repetitions=repetitions, triton=triton.__version__)
    report(path, "kernels", rows, **facts)


# ---- the search for launch settings --------------------------------------------------------------


class Search(NamedTuple):
    """The settings that are tried for one kernel."""

    width: int  # 64 or 128: with it `kernels.TILES` has the entry to improve
    kernel: str  # the field of `kernels.Tiles`
    settings: list  # Tiles or NormTiles
    works: list[Callable]  # functions without arguments that launch the kernel


class Trial(kernels.Launcher):
    """Launches with the tiles that are tried."""

    def __init__(self, tried):
        super().__init__()
        self.tried = tried

    def tiles(self, x):
        return self.tried


def attention_passes(D, dropout_p):
    """The launches of attention, forward and backward, on the published micro-batch."""
    qkv = torch.randn(2**16, 3, HIDDEN // D, D, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.arange(0, len(qkv) + 1, 1024, dtype=torch.int32, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    rest = (cu_seqlens, 1024, dropout_p, seed)
    out, shift, norm = kernels.attention_forward(qkv, *rest)
    return Passes(
        functools.partial(kernels.attention_forward, qkv, *rest),
        functools.partial(kernels.attention_backward, out, qkv, out, shift, norm, *rest),
    )


def layer_norm_passes(dropout_p):
    """The launches of LayerNorm with a residual, forward and backward."""
    x = torch.randn(2**18, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    _, mean, rstd = kernels.layer_norm_forward(x, x, weight, weight, EPS, dropout_p, seed)
    forward = (x, x, weight, weight, EPS, dropout_p, seed)
    backward = (x, x, x, weight, mean, rstd, dropout_p, seed)
    return Passes(
        functools.partial(kernels.layer_norm_forward, *forward),
        functools.partial(kernels.layer_norm_backward, *backward),
    )


def searches():
    """Every `Search`, one after the other, so that only one kernel's tensors are held at a time."""
    shapes = [(64, 64), (64, 128), (128, 64), (128, 32), (32, 128), (128, 128)]  # queries, keys
    tiles = [
        kernels.Tile(*shape, warps, stages)
        for shape, warps, stages in itertools.product(shapes, (4, 8), (2, 3))
    ]
    for D in (64, 128):
        # A setting has to serve training and evaluation: with dropout and without.
        passes = [attention_passes(D, dropout_p) for dropout_p in (0.0, 0.1)]
        yield Search(D, "forward", tiles, [p.forward for p in passes])
        # The backward pass runs both kernels, whichever is tried.
        yield Search(D, "dq", tiles, [p.backward for p in passes])
        yield Search(D, "dk_dv", tiles, [p.backward for p in passes])

    passes = [layer_norm_passes(dropout_p) for dropout_p in (0.0, 0.1)]
    norm = [kernels.NormTile(*tile) for tile in ((4, 4), (8, 4), (8, 8), (2, 2), (1, 1))]
    yield Search(128, "norm", norm, [p.forward for p in passes])
    # More programs keep more of the chip busy, but leave more partial sums.
    backward = [kernels.NormTile(4, 4, programs) for programs in (264, 396, 528, 1056)]
    backward += [kernels.NormTile(*tile) for tile in ((8, 8, 264), (2, 2, 1056), (1, 1, 2112))]
    yield Search(128, "norm_backward", backward, [p.backward for p in passes])


def run_all(works, launcher=None):
    """Calls all functions, with another launcher if one is given."""
    with kernels.Launcher.replaced(launcher or kernels.Launcher.current):
        for work in works:
            work()


def sound_settings(search, settings, tiles):
    """The settings whose kernels compile and do not spill. The other kernels keep their `tiles`."""
    work = functools.partial(run_all, search.works)
    jobs = []
    for setting in settings:
        tried = tiles._replace(**{search.kernel: setting})
        jobs.append((Compiler(given=tried), work))
    sound = []
    for setting, launches in zip(settings, compile_launches(jobs)):
        compiled = [launch.kernel for launch in launches]
        if None not in compiled and not any(machine_code_usage(kernel)[1] for kernel in compiled):
            sound.append(setting)
    return sound


def bench_tune(path=None):
    """Tries launch settings for every kernel on this GPU, without dropout and with 0.1, and prints
    entries for `kernels.TILES`."""
    capability = torch.cuda.get_device_capability()
    best = {}
    for width in (64, 128):
        best[width] = kernels.TILES.get((capability, width), kernels.TILES["default", width])

    rows = []
    for search in searches():
        # Each search starts from the best settings that the earlier ones found.
        tiles = best[search.width]
        was = getattr(tiles, search.kernel)
        settings = [was, *(setting for setting in search.settings if setting != was)]
        contenders = {}
        # Settings that do not compile, or spill, are not run.
        for setting in sound_settings(search, settings, tiles):
            trial = Trial(tiles._replace(**{search.kernel: setting}))
            work = functools.partial(run_all, search.works, trial)
            contenders[setting] = on_gpu(work, 1, launches=3)
        speeds = medians(available(contenders), 5)
        fastest = max(speeds, key=speeds.get)
        best[search.width] = tiles._replace(**{search.kernel: fastest})
        row = {
            "kernel": f"{search.kernel}, width {search.width}",
            "was": str(tuple(was)),
            "best": str(tuple(fastest)),
            "speed": f"{speeds[fastest] / speeds[was]:.2f}" if was in speeds else "nan",
        }
        rows.append(row)

    entries = {str((capability, width)): str(tiles) for width, tiles in best.items()}
    for key, tiles in entries.items():
        print(f"{key}: {tiles},")
    report(path, "tiles", rows, tiles=entries, triton=triton.__version__)
