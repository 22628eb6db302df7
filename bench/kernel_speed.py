"""TODO."""

import functools
import itertools
import random

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from bench.measure import REPETITIONS, medians, report
from bench.resources import attention_work, compile_launches, machine_code_usage, norm_work

if kernels.HAS_TRITON:
    import triton


def on_gpu(function, amount, launches=10):
    """For `medians`: calls the function `launches` times, waits for the GPU, and says how much was done, `amount` by each call."""

    def work():
        for _ in range(launches):
            function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return launches * amount

    return work


def measure_ceilings(device):
    """{"matmul": FLOP/s of a large bf16 product, "copy": bytes/s read and written by a large copy}: what this device can do at best."""
    size, numbers = (8192, 2**29) if device == "cuda" else (2048, 2**26)
    # Random numbers: a product of ones draws less power, and ran 15 % faster on an H200.
    a, source, copied = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((size, size), numbers, numbers)
    )
    contenders = {
        "matmul": on_gpu(lambda: a @ a, 2 * size**3),
        "copy": on_gpu(lambda: copied.copy_(source), 4 * numbers),
    }
    ceilings = medians(contenders)
    print(
        f"ceilings: matmul {ceilings['matmul'] / 1e12:,.2f} TFLOP/s, copy {ceilings['copy'] / 1e9:,.0f} GB/s"
    )
    return ceilings


def available(contenders):
    """Those contenders that run here, each run once (and so compiled); why not, in a line, of the others."""
    running = {}
    for name, work in contenders.items():
        try:
            work()
            running[name] = work
        except (
            Exception
        ) as error:  # no such backend, no such library, or a tile that takes too much of the chip
            torch.cuda.synchronize()
            print(f"{name}: not available here ({str(error).strip().splitlines()[0][:120]})")
    return running


def forward_and_backward(function, inputs, upstream):
    """function(*inputs), and its gradients with respect to the inputs, as two functions without arguments."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = functools.cache(
        lambda: function(*inputs)
    )  # not before it is asked for: a contender may not be available
    return lambda: function(*inputs), lambda: torch.autograd.grad(
        out(), inputs, upstream, retain_graph=True
    )


def bench_kernels(path=None):
    """Each kernel, forward and backward, beside its peers in PyTorch and Liger: bf16, a micro-batch of the published run."""
    torch._functorch.config.donated_buffer = False  # a compiled backward pass is run many times
    bf16, ceilings = dict(device="cuda", dtype=torch.bfloat16), measure_ceilings("cuda")
    rows = []

    def compare(operation, ceiling, amounts, contenders):
        unit, scale = ("TFLOP/s", 1e12) if ceiling == "matmul" else ("GB/s", 1e9)
        for direction, amount in enumerate(amounts):
            speeds = medians(
                available(
                    {name: on_gpu(pair[direction], amount) for name, pair in contenders.items()}
                )
            )
            for name, speed in speeds.items():
                row = {
                    "operation": operation,
                    "pass": ("forward", "backward")[direction],
                    "by": name,
                    "ms": f"{amount / speed * 1e3:.3f}",
                }
                row |= {
                    "speed": f"{speed / scale:,.0f} {unit}",
                    "of ceiling": f"{speed / ceilings[ceiling]:.0%}",
                }
                rows.append(row | {"here / it": f"{speeds[next(iter(speeds))] / speed:.2f}"})

    generator = random.Random(0)
    mixed = [
        generator.randint(32, 1024) for _ in range(124)
    ]  # lengths that differ: without padding, only varlen is a peer
    for D, lengths, p in (
        (64, [1024] * 64, 0.0),
        (64, [1024] * 64, 0.1),
        (64, [128] * 512, 0.0),
        (128, [1024] * 64, 0.0),
        (64, mixed, 0.0),
    ):
        N, T, L = 768 // D, sum(lengths), max(lengths)
        qkv, upstream = torch.randn(T, 3, N, D, **bf16), torch.randn(T, N, D, **bf16)
        cu_seqlens = torch.tensor(
            [0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda"
        )

        def varlen(q, k, v, cu_seqlens=cu_seqlens, L=L):
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, L, L)

        def sdpa(q, k, v, backend, p=p):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

        here = functools.partial(
            kernels.attention, cu_seqlens=cu_seqlens, max_seqlen=L, dropout_p=p
        )
        contenders = {"kernels.attention": forward_and_backward(here, [qkv], upstream)}
        if lengths is not mixed:
            *heads, wanted = (
                x.unflatten(0, (-1, L)).transpose(1, 2) for x in (*qkv.unbind(1), upstream)
            )  # (B, N, L, D)
            for backend in (
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.CUDNN_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
            ):
                contenders[f"SDPA {backend.name}"] = forward_and_backward(
                    functools.partial(sdpa, backend=backend), heads, wanted
                )
        if p == 0.0:
            contenders["varlen_attn"] = forward_and_backward(varlen, qkv.unbind(1), upstream)
        flops = (
            4 * sum(length**2 for length in lengths) * N * D
        )  # two products; five in the backward pass, which makes one again
        shown = "32 to 1,024" if lengths is mixed else f"{L:,}"
        compare(
            f"attention, D {D}, length {shown}, dropout {p}",
            "matmul",
            (flops, 2.5 * flops),
            contenders,
        )

    T, H, eps = 2**18, 768, 1e-12
    x, residual, upstream, weight = (
        torch.randn(*shape, **bf16) for shape in ((T, H), (T, H), (T, H), (H,))
    )
    for p, plus in ((0.0, False), (0.0, True), (0.1, True)):

        def eager(x, w, b, r=None, p=p):
            return F.layer_norm(x if r is None else F.dropout(x, p) + r, (H,), w, b, eps)

        def liger(x, w, b):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return LigerLayerNormFunction.apply(x, w, b, eps)

        here = lambda x, w, b, r=None, p=p: kernels.layer_norm(
            x, w, b, eps, residual=r, dropout_p=p
        )
        functions = {
            "kernels.layer_norm": here,
            "PyTorch": eager,
            "PyTorch, compiled": torch.compile(eager),
        }
        functions |= {} if plus else {"Liger": liger}
        leaves = [x, weight, weight] + [residual] * plus
        contenders = {
            name: forward_and_backward(function, leaves, upstream)
            for name, function in functions.items()
        }
        # What has to be moved, in rows: x (and residual) in, y out; dy, x (and residual) in, dx (and, with dropout, dresidual) out.
        moved = (2 + plus, 3 + plus + (p > 0))
        compare(
            f"LayerNorm, H {H}{f', residual, dropout {p}' * plus}",
            "copy",
            [2 * T * H * n for n in moved],
            contenders,
        )
    report(
        path, "kernels", rows, ceilings=ceilings, repetitions=REPETITIONS, triton=triton.__version__
    )


def bench_tune(path=None):
    """Tries launch settings for every kernel on this GPU, without dropout and with 0.1, and prints an entry for `kernels.TILES`.

    Settings whose kernels spill, or do not compile, are left out before any is run.
    """
    capability = torch.cuda.get_device_capability()
    best = kernels.NORM | kernels.TILES.get(capability, kernels.TILES["default"])
    shapes = [(64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]  # queries, keys
    shapes += [(keys, queries) for queries, keys in shapes if keys != queries]
    attention = [
        kernels.AttentionTile(*shape, w, s)
        for shape, w, s in itertools.product(shapes, (4, 8), (2, 3))
    ]
    norm = [kernels.NormTile(*setting) for setting in ((4, 4), (8, 4), (8, 8), (2, 2), (1, 1))]
    norm_backward = [
        kernels.NormTile(*setting)
        for setting in itertools.product((4,), (4,), (264, 396, 528, 1056))
    ]
    norm_backward += [
        kernels.NormTile(8, 8, 264),
        kernels.NormTile(2, 2, 1056),
        kernels.NormTile(1, 1, 2112),
    ]
    searches = [(kernel, D, attention) for D in (64, 128) for kernel in ("forward", "dq", "dk_dv")]
    rows = []
    for kernel, D, settings in [*searches, ("norm", 0, norm), ("norm_backward", 0, norm_backward)]:
        key = f"{kernel}, D > 64" if D > 64 else kernel
        which = int(kernel not in ("forward", "norm"))
        if D:
            works = [
                attention_work(64, 1024, 768 // D, D, torch.bfloat16, p, "cuda")[which]
                for p in (0.0, 0.1)
            ]
        else:
            works = [norm_work(2**18, 768, torch.bfloat16, p, "cuda")[which] for p in (0.0, 0.1)]

        def with_tile(setting, works=works, key=key):
            kernels.TILES[capability] = best | {key: setting}
            for work in works:
                work()

        now = best.get(key, best[kernel])
        settings = [now, *(s for s in settings if s != now)]
        sound = []
        launches = compile_launches([functools.partial(with_tile, setting) for setting in settings])
        each = len(launches) // len(
            settings
        )  # launches of one setting; of the backward pass two kernels
        for i, setting in enumerate(settings):
            compiled = [result for *_, result in launches[i * each : (i + 1) * each]]
            if all(
                result is not None and machine_code_usage(result)[1] == 0 for result in compiled
            ):
                sound.append(setting)
        contenders = {
            setting: on_gpu(functools.partial(with_tile, setting), 1, launches=3)
            for setting in sound
        }
        speeds = medians(available(contenders), 5)
        best[key] = max(speeds, key=speeds.get)
        gain = speeds[best[key]] / speeds[now] if now in speeds else float("nan")
        rows.append({"kernel": key, "was": now, "best": best[key], "speed": f"{gain:.2f}"})
    kernels.TILES[capability] = best
    rows = [row | {"was": str(tuple(row["was"])), "best": str(tuple(row["best"]))} for row in rows]
    report(
        path,
        "tiles",
        rows,
        tiles={str(capability): {k: tuple(tile) for k, tile in best.items()}},
        triton=triton.__version__,
    )
