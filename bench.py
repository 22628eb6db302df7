"""Every speed that this project claims, measured beside its peers in one run.

    python bench.py data                    the loader, one core, beside tokenizing on the fly with a transformers collator; and from a
                                            table of sources to tokens, all cores, beside datasets.map, with the peak of memory
    python bench.py model                   a training step of the full model beside those of transformers
    python bench.py model --ablate          the same step with one of its savings undone
    python bench.py model --profile         where its time goes, part by part, beside the least that each part could take here
    python bench.py kernels                 each kernel beside its peers, and beside what the GPU can do at best (needs one)
    python bench.py kernels --tune          other launch settings, and a table of the best (needs a GPU)
    python bench.py kernels --resources     what each kernel takes of a chip that need not be here: registers, spills, shared memory
    python bench.py pii                     the detector and its rules beside other detectors, over Python files of this installation

Each figure is the median of several repetitions that take turns, so that a machine that slows down slows all of them; on a shared machine
only the ratios mean anything. A table goes to the screen, the same as JSON with machine, versions and commit to results/.
"""

import contextlib
import functools
import gc
import glob
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pyarrow.parquet
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import corpus
import kernels
import plan
import starencoder
from data import CommandLine, PairDataset, Tokenizer, batches, run, write_whole
from starencoder import StarEncoder, StarEncoderConfig, StarEncoderForPreTraining

if kernels.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget

REPETITIONS = 7


def medians(contenders, repetitions=REPETITIONS):
    """{name: tokens per second} of {name: function that does some work and returns its count of tokens}, taking turns."""
    speeds = {name: [] for name in contenders}
    for _ in tqdm(range(repetitions), desc="benchmark", unit="round"):
        for name, work in contenders.items():
            begin = time.perf_counter()
            tokens = work()
            speeds[name].append(tokens / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in speeds.items()}


def report(path, name, rows, **facts):
    """Prints rows (dicts with the same keys) as a table and writes them, with the machine and the versions, as JSON.

    path: the file, or None for results/NAME-DEVICE.json.
    """
    import transformers

    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{str(row[key]):{width}}" for key, width in widths.items()).rstrip())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    path = path or f"results/{name}-{device.split(',')[0].replace(' ', '-').lower()}.json"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    heads = json.dumps({"device": device, "commit": commit, "versions": versions, **facts}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_whole(path, f'{heads[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


# ---- data ------------------------------------------------------------------------------------------------------------------------


def bench_data(path=None, directory="data/bench", max_length=1024, batch_size=64):
    """Tokens per second of ready batches at length 1,024 with a 49,156-token vocabulary, on one core."""
    import transformers

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not os.path.exists(os.path.join(directory, "meta.json")):
        corpus.prepare(None, directory, vocab_size=49156)
    dataset, tokenizer = PairDataset(directory, "train", max_length, seed=0), Tokenizer.from_pretrained(directory)
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    collator = transformers.DataCollatorForLanguageModeling(auto, mlm_probability=0.15)
    texts = [tokenizer.decode(dataset.document(d))[:10_000] for d in range(512)]
    counter = iter(range(10**9))

    def here():
        step = next(counter)
        ready = batches(dataset, range(10 * step, 10 * step + 10), batch_size, batch_size, workers=0)
        return sum(len(batch.input_ids) for micro_batches in ready for batch in micro_batches)

    def on_the_fly():
        """As the original: halves of a file's first 10,000 characters, tokenized as they are needed, padded to the longest."""
        chosen, halves = random.Random(next(counter)).sample(texts, batch_size), []
        for first, other in zip(chosen, reversed(chosen)):
            a, follows = first[: len(first) // 2], random.random() < 0.5
            halves.append((a, first[len(a) :] if follows else other[: len(other) // 2]))
        pairs = [f"<cls>{a}<sep>{b}<sep>" for a, b in halves]
        batch = collator([{"input_ids": ids} for ids in auto(pairs, truncation=True, max_length=max_length)["input_ids"]])
        return int((batch["input_ids"] != auto.pad_token_id).sum())

    here(), on_the_fly()  # caches warm
    speeds = medians({"tokenizing on the fly, transformers collator": on_the_fly, "corpus.py + data.py": here})
    slowest = min(speeds.values())
    rows = [{"loader, one core": n, "tokens/s": f"{speed:,.0f}", "ratio": f"{speed / slowest:.1f}"} for n, speed in speeds.items()]
    report(
        path,
        "data",
        rows,
        max_length=max_length,
        batch_size=batch_size,
        vocab_size=tokenizer.vocab_size,
        repetitions=REPETITIONS,
    )


def source_table(path, size):
    """Writes a parquet table as The Stack's with `size` bytes of text: the standard library over and over, each time a little different."""
    library, schema = sysconfig.get_paths()["stdlib"], pyarrow.schema([("content", pyarrow.string()), ("lang", pyarrow.string())])
    texts = [document.content.decode() for *_, document in corpus.documents([library], Counter()) if not corpus.text_of(document)[1]]
    rows, written = [], 0
    with pyarrow.parquet.ParquetWriter(path, schema) as table, tqdm(total=size, unit="B", unit_scale=True, desc="writing") as bar:
        for i, text in enumerate(itertools.cycle(texts)):
            rows.append(f"# copy {i // len(texts)}\n{text}")
            written += len(rows[-1].encode())
            if len(rows) == 1000 or written >= size:
                table.write_table(pyarrow.table({"content": rows, "lang": ["Python"] * len(rows)}, schema))
                bar.update(written - bar.n)
                rows = []
            if written >= size:
                return


def peak_memory(command):
    """Runs a command and returns the peak of its memory in bytes, all its processes together, shared pages once (Linux)."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        family, total = [process.pid], 0
        for pid in family:
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/task/{pid}/children") as f:
                    family += map(int, f.read().split())
                with open(f"/proc/{pid}/smaps_rollup") as f:
                    total += 1024 * int(re.search(r"^Pss:\s+(\d+)", f.read(), re.MULTILINE)[1])
        peak = max(peak, total)
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return peak


def bench_corpus(path=None, directory="data/bench", size=60_000_000, large=2_000_000_000, repetitions=5):
    """From a table of sources to tokens on disk, on all cores, beside datasets.map with a fast tokenizer; and the memory that it takes."""
    import datasets
    import transformers

    if not os.path.exists(os.path.join(directory, "meta.json")):
        corpus.prepare(None, directory, vocab_size=49156)
    auto, cores = transformers.AutoTokenizer.from_pretrained(directory), os.cpu_count()
    counter = iter(range(10**9))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        table = os.path.join(temporary, "table.parquet")
        source_table(table, size)

        def here():
            corpus.prepare([table], os.path.join(temporary, str(next(counter))), tokenizer=directory)
            return size

        def mapped():
            rows = datasets.load_dataset("parquet", data_files=table, split="train", cache_dir=os.path.join(temporary, str(next(counter))))
            encode = lambda batch: auto(batch["content"], return_attention_mask=False)
            rows.map(encode, batched=True, num_proc=cores, remove_columns=rows.column_names)
            return size

        speeds = medians({"datasets.map, fast tokenizer": mapped, "corpus.py": here}, repetitions)
        rows = [
            {"from text to tokens, all cores": n, "MB/s": f"{s / 1e6:.1f}", "ratio": f"{s / min(speeds.values()):.1f}"}
            for n, s in speeds.items()
        ]
        table = os.path.join(temporary, "large.parquet")
        source_table(table, large)
        begin = time.perf_counter()
        peak = peak_memory([sys.executable, corpus.__file__, table, "--tokenizer", directory, "--out", os.path.join(temporary, "large")])
        seconds = time.perf_counter() - begin
    rows.append({"from text to tokens, all cores": f"corpus.py, {large / 1e9:g} GB", "MB/s": f"{large / 1e6 / seconds:.1f}", "ratio": "-"})
    print(f"peak memory on {large / 1e9:g} GB: {peak / 1e6:,.0f} MB")
    report(path, "corpus", rows, vocab_size=len(auto), repetitions=repetitions, peak_memory=peak, text=large)


# ---- kernels ---------------------------------------------------------------------------------------------------------------------


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
        lambda: kernels.attention_backward_op(out, qkv, out, shift, norm, cu_seqlens, L, dropout_p, seed),
    )


def norm_work(T, H, dtype, dropout_p, device):
    """The two LayerNorm operators, with a residual, and dropout alone, on T random rows: functions without arguments."""
    x, w = torch.randn(T, H, device=device).to(dtype), torch.ones(H, device=device)
    seed, statistics = torch.zeros((), dtype=torch.int64, device=device), torch.ones(T, device=device)
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
        self.launches.append((kernel.fn.__name__.lstrip("_"), constants, kernel.warmup(*arguments, grid=grid, **constants)))


def compile_launches(works, capability=None):
    """Compiles, on all cores, every kernel that the functions in `works` would launch.

    capability: of the chip to choose tiles for, such as (9, 0), where it is not here.
    Returns [(kernel's name, its constants, compiled kernel), ...].
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        with kernels.Launcher.replaced(Compiler(capability)) as compiler:
            for work in works:
                work()
        return [
            (name, constants, kernel.result(ignore_errors=True) if isinstance(kernel, triton.FutureKernel) else kernel)
            for name, constants, kernel in tqdm(compiler.launches, desc="compiling", unit="kernel")
        ]


def machine_code_usage(kernel):
    """Registers of a thread and bytes that it spills, of a compiled kernel."""
    (cuobjdump,) = glob.glob(os.path.join(os.path.dirname(triton.__file__), "**", "cuobjdump"), recursive=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
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
        for dtype, dropout_p in itertools.product((torch.bfloat16, torch.float16, torch.float32), (0.0, 0.1)):
            works = [work for D in (64, 128) for work in attention_work(1, 1000, 12, D, dtype, dropout_p, "cpu")]
            works += norm_work(1000, 768, dtype, dropout_p, "cpu")[: 3 if dropout_p else 2]
            for name, constants, kernel in compile_launches(works, divmod(capability, 10)):
                registers, stack = machine_code_usage(kernel)
                blocks = [str(constants[k]) for k in ("BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_H") if k in constants]
                row = {"chip": f"sm_{capability}", "kernel": name, "dtype": str(dtype)[6:], "D or H": constants.get("D", 768)}
                row |= {"dropout": dropout_p, "tile": "x".join(blocks), "warps": kernel.metadata.num_warps, "registers": registers}
                row |= {"spills (bytes)": stack, "shared (KB)": kernel.metadata.shared // 1024, "wgmma": "wgmma" in kernel.asm["ptx"]}
                rows.append(row)
    report(path or "results/resources.json", "resources", rows, triton=triton.__version__)


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
    a, source, copied = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((size, size), numbers, numbers))
    contenders = {"matmul": on_gpu(lambda: a @ a, 2 * size**3), "copy": on_gpu(lambda: copied.copy_(source), 4 * numbers)}
    ceilings = medians(contenders)
    print(f"ceilings: matmul {ceilings['matmul'] / 1e12:,.2f} TFLOP/s, copy {ceilings['copy'] / 1e9:,.0f} GB/s")
    return ceilings


def available(contenders):
    """Those contenders that run here, each run once (and so compiled); why not, in a line, of the others."""
    running = {}
    for name, work in contenders.items():
        try:
            work()
            running[name] = work
        except Exception as error:  # no such backend, no such library, or a tile that takes too much of the chip
            torch.cuda.synchronize()
            print(f"{name}: not available here ({str(error).strip().splitlines()[0][:120]})")
    return running


def forward_and_backward(function, inputs, upstream):
    """function(*inputs), and its gradients with respect to the inputs, as two functions without arguments."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = functools.cache(lambda: function(*inputs))  # not before it is asked for: a contender may not be available
    return lambda: function(*inputs), lambda: torch.autograd.grad(out(), inputs, upstream, retain_graph=True)


def bench_kernels(path=None):
    """Each kernel, forward and backward, beside its peers in PyTorch and Liger: bf16, a micro-batch of the published run."""
    torch._functorch.config.donated_buffer = False  # a compiled backward pass is run many times
    bf16, ceilings = dict(device="cuda", dtype=torch.bfloat16), measure_ceilings("cuda")
    rows = []

    def compare(operation, ceiling, amounts, contenders):
        unit, scale = ("TFLOP/s", 1e12) if ceiling == "matmul" else ("GB/s", 1e9)
        for direction, amount in enumerate(amounts):
            speeds = medians(available({name: on_gpu(pair[direction], amount) for name, pair in contenders.items()}))
            for name, speed in speeds.items():
                row = {"operation": operation, "pass": ("forward", "backward")[direction], "by": name, "ms": f"{amount / speed * 1e3:.3f}"}
                row |= {"speed": f"{speed / scale:,.0f} {unit}", "of ceiling": f"{speed / ceilings[ceiling]:.0%}"}
                rows.append(row | {"here / it": f"{speeds[next(iter(speeds))] / speed:.2f}"})

    generator = random.Random(0)
    mixed = [generator.randint(32, 1024) for _ in range(124)]  # lengths that differ: without padding, only varlen is a peer
    for D, lengths, p in (
        (64, [1024] * 64, 0.0),
        (64, [1024] * 64, 0.1),
        (64, [128] * 512, 0.0),
        (128, [1024] * 64, 0.0),
        (64, mixed, 0.0),
    ):
        N, T, L = 768 // D, sum(lengths), max(lengths)
        qkv, upstream = torch.randn(T, 3, N, D, **bf16), torch.randn(T, N, D, **bf16)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")

        def varlen(q, k, v, cu_seqlens=cu_seqlens, L=L):
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, L, L)

        def sdpa(q, k, v, backend, p=p):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

        here = functools.partial(kernels.attention, cu_seqlens=cu_seqlens, max_seqlen=L, dropout_p=p)
        contenders = {"kernels.attention": forward_and_backward(here, [qkv], upstream)}
        if lengths is not mixed:
            *heads, wanted = (x.unflatten(0, (-1, L)).transpose(1, 2) for x in (*qkv.unbind(1), upstream))  # (B, N, L, D)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                contenders[f"SDPA {backend.name}"] = forward_and_backward(functools.partial(sdpa, backend=backend), heads, wanted)
        if p == 0.0:
            contenders["varlen_attn"] = forward_and_backward(varlen, qkv.unbind(1), upstream)
        flops = 4 * sum(length**2 for length in lengths) * N * D  # two products; five in the backward pass, which makes one again
        shown = "32 to 1,024" if lengths is mixed else f"{L:,}"
        compare(f"attention, D {D}, length {shown}, dropout {p}", "matmul", (flops, 2.5 * flops), contenders)

    T, H, eps = 2**18, 768, 1e-12
    x, residual, upstream, weight = (torch.randn(*shape, **bf16) for shape in ((T, H), (T, H), (T, H), (H,)))
    for p, plus in ((0.0, False), (0.0, True), (0.1, True)):

        def eager(x, w, b, r=None, p=p):
            return F.layer_norm(x if r is None else F.dropout(x, p) + r, (H,), w, b, eps)

        def liger(x, w, b):
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return LigerLayerNormFunction.apply(x, w, b, eps)

        here = lambda x, w, b, r=None, p=p: kernels.layer_norm(x, w, b, eps, residual=r, dropout_p=p)
        functions = {"kernels.layer_norm": here, "PyTorch": eager, "PyTorch, compiled": torch.compile(eager)}
        functions |= {} if plus else {"Liger": liger}
        leaves = [x, weight, weight] + [residual] * plus
        contenders = {name: forward_and_backward(function, leaves, upstream) for name, function in functions.items()}
        # What has to be moved, in rows: x (and residual) in, y out; dy, x (and residual) in, dx (and, with dropout, dresidual) out.
        moved = (2 + plus, 3 + plus + (p > 0))
        compare(f"LayerNorm, H {H}{f', residual, dropout {p}' * plus}", "copy", [2 * T * H * n for n in moved], contenders)
    report(path, "kernels", rows, ceilings=ceilings, repetitions=REPETITIONS, triton=triton.__version__)


def bench_tune(path=None):
    """Tries launch settings for every kernel on this GPU, without dropout and with 0.1, and prints an entry for `kernels.TILES`.

    Settings whose kernels spill, or do not compile, are left out before any is run.
    """
    capability = torch.cuda.get_device_capability()
    best = kernels.NORM | kernels.TILES.get(capability, kernels.TILES["default"])
    shapes = [(64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]  # queries, keys
    shapes += [(keys, queries) for queries, keys in shapes if keys != queries]
    attention = [kernels.AttentionTile(*shape, w, s) for shape, w, s in itertools.product(shapes, (4, 8), (2, 3))]
    norm = [kernels.NormTile(*setting) for setting in ((4, 4), (8, 4), (8, 8), (2, 2), (1, 1))]
    norm_backward = [kernels.NormTile(*setting) for setting in itertools.product((4,), (4,), (264, 396, 528, 1056))]
    norm_backward += [kernels.NormTile(8, 8, 264), kernels.NormTile(2, 2, 1056), kernels.NormTile(1, 1, 2112)]
    searches = [(kernel, D, attention) for D in (64, 128) for kernel in ("forward", "dq", "dk_dv")]
    rows = []
    for kernel, D, settings in [*searches, ("norm", 0, norm), ("norm_backward", 0, norm_backward)]:
        key = f"{kernel}, D > 64" if D > 64 else kernel
        which = int(kernel not in ("forward", "norm"))
        if D:
            works = [attention_work(64, 1024, 768 // D, D, torch.bfloat16, p, "cuda")[which] for p in (0.0, 0.1)]
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
        each = len(launches) // len(settings)  # launches of one setting; of the backward pass two kernels
        for i, setting in enumerate(settings):
            compiled = [result for *_, result in launches[i * each : (i + 1) * each]]
            if all(result is not None and machine_code_usage(result)[1] == 0 for result in compiled):
                sound.append(setting)
        contenders = {setting: on_gpu(functools.partial(with_tile, setting), 1, launches=3) for setting in sound}
        speeds = medians(available(contenders), 5)
        best[key] = max(speeds, key=speeds.get)
        gain = speeds[best[key]] / speeds[now] if now in speeds else float("nan")
        rows.append({"kernel": key, "was": now, "best": best[key], "speed": f"{gain:.2f}"})
    kernels.TILES[capability] = best
    rows = [row | {"was": str(tuple(row["was"])), "best": str(tuple(row["best"]))} for row in rows]
    report(path, "tiles", rows, tiles={str(capability): {k: tuple(tile) for k, tile in best.items()}}, triton=triton.__version__)


# ---- model -----------------------------------------------------------------------------------------------------------------------


def original_lengths(directory, max_length, count):
    """`count` sequence lengths as the original's data gives them: the tokens of each file's first 10,000 characters, cut at max_length.

    They are evenly spaced quantiles over (up to 512 of) the files of a corpus, so that even a small batch is a fair sample of them.
    """
    tokenizer, split = Tokenizer.from_pretrained(directory), PairDataset(directory, "train", max_length, seed=0)
    chosen = random.Random(0).sample(range(split.documents()), min(512, split.documents()))
    texts = [tokenizer.decode(split.document(d)[:10_000])[:10_000] for d in chosen]
    lengths = sorted(min(max_length, len(tokenizer.encode(text))) for text in texts)
    return [lengths[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]


def training_steps(config, lengths, device, ablate):
    """{name: function that makes a model and returns its training step} on one batch of sequences of these lengths.

    A step is forward, backward, clipping and AdamW in bf16 autocast. Ours takes the batch packed, the others padded to its longest
    sequence with labels everywhere, as the original trained. Compiled ones on a GPU only. ablate: ours with single savings undone instead.
    """
    import transformers

    generator = torch.Generator().manual_seed(0)
    V, T = config.vocab_size, sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ids, masked = torch.randint(V - 20, (T,), generator=generator), torch.randperm(T, generator=generator)[: round(0.15 * T)].sort().values
    neighbours = torch.randint(2, (len(lengths),), generator=generator)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    labels = torch.full((T,), -100).index_copy(0, masked, ids[masked])
    padded = {"input_ids": pad(ids.split(lengths)), "attention_mask": pad([torch.ones(n, dtype=torch.int64) for n in lengths])}
    padded |= {"labels": pad(labels.split(lengths), padding_value=-100)}
    packed = (ids, cu_seqlens, ids[masked], neighbours, masked)
    packed, padded = tuple(t.to(device) for t in packed), {name: t.to(device) for name, t in padded.items()}
    pairs, seed = padded | {"next_sentence_label": neighbours.to(device)}, torch.tensor(5, device=device)

    def step_of(make, call, compiled=False):
        model = make().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        run_model = torch.compile(model) if compiled else model

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = call(run_model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            return T

        return step

    shape = dict(vocab_size=V, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers)
    shape |= dict(num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size)
    bert = transformers.BertConfig(**shape, max_position_embeddings=config.max_position_embeddings, attn_implementation="sdpa")
    specials = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    modern = transformers.ModernBertConfig(vocab_size=V, attn_implementation="sdpa", **specials)
    if config.hidden_size != StarEncoderConfig.hidden_size:
        modern = transformers.ModernBertConfig(**shape, attn_implementation="sdpa", **specials)
    here = (
        lambda: StarEncoderForPreTraining(config),
        lambda model: model(*packed, max_seqlen=config.max_position_embeddings, seed=seed).loss,
    )
    there = (lambda: transformers.BertForPreTraining(bert), lambda model: model(**pairs).loss)
    makers = {
        "transformers BertForPreTraining, sdpa": lambda: step_of(*there),
        "StarEncoder": lambda: step_of(*here),
        "ModernBERT-base, sdpa": lambda: step_of(lambda: transformers.ModernBertForMaskedLM(modern), lambda model: model(**padded).loss),
    }
    if ablate:  # the step with one of its savings undone
        encode = StarEncoder.forward

        def every_row(self, *inputs, rows=None, **options):
            h = encode(self, *inputs, **options)
            return h if rows is None else h[rows]

        def without(target, name, stand_in):
            def call(model):
                with mock.patch.object(target, name, stand_in):
                    return here[1](model)

            return lambda: step_of(here[0], call)

        everywhere = labels.to(device)

        def head_everywhere(model):
            out = model(*packed[:2], max_seqlen=config.max_position_embeddings, seed=seed)
            return F.cross_entropy(out.mlm_logits.float(), everywhere) + F.cross_entropy(out.nsp_logits.float(), packed[3])

        in_fp32 = lambda logits, labels: F.cross_entropy(logits.float(), labels)
        return {
            "StarEncoder": makers["StarEncoder"],
            "last layer for every token": without(StarEncoder, "forward", every_row),
            "cross-entropy by PyTorch, in fp32": without(starencoder, "_cross_entropy", in_fp32),
            "both, and the head for every token": lambda: step_of(here[0], head_everywhere),
        }
    if device == "cuda":
        makers["transformers BertForPreTraining, sdpa, compiled"] = lambda: step_of(*there, compiled=True)
        makers["StarEncoder, --compile"] = lambda: step_of(*here, compiled=True)
    return makers


def bench_model(path=None, config=None, sizes=None, directory="data/bench", repetitions=5, ablate=False):
    """A training step of the full model beside the models of transformers, on full sequences and on lengths as the original's."""
    device, config = "cuda" if torch.cuda.is_available() else "cpu", config or StarEncoderConfig()
    full, real = sizes or ((64, 64) if device == "cuda" else (2, 4))  # sequences of the two batches
    if not os.path.exists(os.path.join(directory, "meta.json")):
        corpus.prepare(None, directory, vocab_size=config.vocab_size)
    L, peak, rows = config.max_position_embeddings, plan.peak_flops(torch.device(device)), []
    for what, lengths in (("full", [L] * full), ("as the original's", original_lengths(directory, L, real))):
        steps, memory, step = {}, {}, None
        for name, make in training_steps(config, lengths, device, ablate).items():
            if "compile" in name and what != "full":  # each shape compiles anew
                continue
            step = None  # one that ran out of memory must not lie in the way of the next
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
            try:
                step = make()
                step(), step()
            except torch.OutOfMemoryError as error:
                print(f"{name}: not available here ({str(error).splitlines()[0][:100]})")
                continue
            steps[name] = step
            if device == "cuda":
                memory[name] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.1f}"
        speeds, reference = medians(steps, repetitions), next(iter(steps))
        flops = plan.model_flops(config, lengths, round(0.15 * sum(lengths))) / sum(lengths)
        for name, speed in speeds.items():
            row = {"lengths": f"{what}: {len(lengths)} x {np.mean(lengths):,.0f}", "by": name, "tokens/s": f"{speed:,.1f}"}
            row |= {"ratio": f"{speed / speeds[reference]:.2f}", "peak memory (GB)": memory.get(name, "-")}
            rows.append(row | {"MFU": f"{speed * flops / peak:.1%}" if peak and "ModernBERT" not in name else "-"})
    report(path, "ablation" if ablate else "model", rows, parameters=plan.count_parameters(config), max_length=L, repetitions=repetitions)


# Parts of a step, by the names of PyTorch's operators; the first that fits. What has an axis of the size of the vocabulary is "head".
PARTS = {
    "optimizer": "_fused_adamw|_foreach_|vector_norm",
    "head and embeddings": "CrossEntropy",
    "attention": "starencoder(::|_)attention|bmm|softmax|scaled_dot_product",
    "LayerNorm and dropout": "starencoder(::|_)(layer_norm|dropout)|native_(layer_norm|dropout)",
    "matmul": r"::(mm|addmm|matmul|linear)$",
    "GELU, casts and the rest": "",
}


def bench_profile(path=None, config=None, sequences=None, repetitions=5):
    """Where the time of a training step goes, on full sequences: each part's share, beside the least time that it could take here.

    The least: FLOPs by the matmul rate, or bytes that must move by the copy rate, both measured in this run. Gaps: the step's time less
    that of all operators, which on a GPU is time in which it waits. Without Triton the rest has the making of dropout masks in it.
    """
    device, config = "cuda" if torch.cuda.is_available() else "cpu", config or StarEncoderConfig()
    B, L, V, H, layers = (
        sequences or (64 if device == "cuda" else 2),
        *(getattr(config, name) for name in ("max_position_embeddings", "vocab_size", "hidden_size", "num_hidden_layers")),
    )
    I, T, masked, ceilings = config.intermediate_size, B * L, round(0.15 * B * L), measure_ceilings(device)  # noqa: E741
    step = training_steps(config, [L] * B, device, False)["StarEncoder"]()
    step(), step()
    seconds = T / medians({"step": step}, repetitions)["step"]
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(repetitions):
            step()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        sizes = {size for shape in event.input_shapes or [] if isinstance(shape, list) for size in shape if isinstance(size, int)}
        of_vocabulary = not sizes.isdisjoint((V, V + -V % 64))  # on a GPU the vocabulary is padded
        if event.device_type == torch.autograd.DeviceType.CPU:  # an operator, and with it the kernels that it launched
            part = next(p for p, words in PARTS.items() if re.search(words, event.key) or (of_vocabulary and p.startswith("head")))
            spent[part] += (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6 / repetitions
    everything = plan.model_flops(config, [L] * B, masked)
    attention, head = 12 * layers * H * B * L * L, 6 * (H * V + H * H) * masked
    least = {
        "matmul": (everything - attention - head) / ceilings["matmul"],
        "attention": attention / ceilings["matmul"],
        "head and embeddings": head / ceilings["matmul"],
        "LayerNorm and dropout": 2 * layers * 8 * 2 * T * H / ceilings["copy"],  # three in and out, five in and out, in bf16
        "optimizer": 28 * plan.count_parameters(config) / ceilings["copy"],  # weight and moments in and out, gradient in, fp32
        "GELU, casts and the rest": layers * 5 * 2 * T * I / ceilings["copy"],  # GELU alone: in and out; two in and one out
    }
    rows = [{"part": p, "ms": t, "least (ms)": least[p]} for p, t in sorted(spent.items(), key=lambda item: -item[1])]
    rows.append({"part": "gaps", "ms": max(0.0, seconds - sum(spent.values())), "least (ms)": 0.0})
    total = sum(row["ms"] for row in rows)  # where the profiler slows the step down, more than it takes by itself
    rows.append({"part": "step, by itself", "ms": seconds, "least (ms)": sum(least.values())})
    for row in rows:
        row |= {"ms": f"{row['ms'] * 1e3:,.1f}", "least (ms)": f"{row['least (ms)'] * 1e3:,.1f}", "share": f"{row['ms'] / total:.1%}"}
    report(path, "profile", rows, sequences=B, max_length=L, ceilings=ceilings, tokens_per_second=round(T / seconds, 1))


def bench_pii(path=None, model="runs/pii", size=100_000_000):
    """Looks for secrets in Python files of this installation, and beside it in the same files with detect-secrets and credsweeper.

    One pass each: it is minutes. model: what `pii.py train` made.
    """
    import pii_detector
    import pii_eval

    paths, total, skipped = [], 0, Counter()
    for file, _ in pii_detector.files_of([sysconfig.get_paths()[name] for name in ("stdlib", "purelib")], skipped):
        if file.endswith(".py") and total + os.path.getsize(file) <= size:
            paths, total = [*paths, file], total + os.path.getsize(file)
    detectors = {"rules": pii_detector.Detector(rules=True), "model + rules": pii_detector.Detector.from_pretrained(model, rules=True)}
    contenders = {f"pii.py, {name}": lambda d=d: pii_detector.scan(d, paths, skipped) for name, d in detectors.items()}
    contenders |= {"detect-secrets": lambda: pii_eval.scan_with_detect_secrets(paths)}
    contenders |= {"credsweeper": lambda: pii_eval.scan_with_credsweeper(paths)}
    rows = []
    for name, scan in contenders.items():
        begin = time.perf_counter()
        found = sum(1 for _ in scan())
        rows.append({"by": name, "MB/s": f"{total / 1e6 / (time.perf_counter() - begin):.3f}", "found": f"{found:,}"})
    report(path, "pii-speed", rows, bytes=total, files=len(paths))


def main(argv=None):
    """The command line."""
    parser = CommandLine(prog="bench.py", description="Measure the speeds that the README claims.")
    parser.add_argument("what", choices=["data", "kernels", "model", "pii"])
    parser.add_argument("--resources", action="store_true", help="kernels: compile for sm_80, sm_89, sm_90, sm_100 and show what they take")
    parser.add_argument("--tune", action="store_true", help="kernels: try other launch settings on this GPU and print a table of the best")
    parser.add_argument("--ablate", action="store_true", help="model: what each saving of the step is worth")
    parser.add_argument("--profile", action="store_true", help="model: where the time of a step goes, beside the least that it could take")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="pii: how much to look through (default: 100)")
    parser.add_argument("--out", metavar="FILE", help="the JSON file to write (default: one in results/)")
    arguments = parser.parse_args(argv)
    flags = {"data": [], "kernels": ["resources", "tune"], "model": ["ablate", "profile"], "pii": []}
    given = [flag for flag in sum(flags.values(), []) if getattr(arguments, flag)]
    if len(given) > 1 or not {*given} <= {*flags[arguments.what]}:
        takes = " or ".join(f"--{flag}" for flag in flags[arguments.what]) or "no flag"
        raise ValueError(f"{arguments.what}: takes {takes}, one at a time")
    if arguments.what == "data":
        bench_data(arguments.out)
        return bench_corpus(arguments.out and f"{arguments.out}.corpus")
    if arguments.what == "pii":
        return bench_pii(arguments.out, size=arguments.megabytes * 1_000_000)
    if arguments.what == "model":
        return bench_profile(arguments.out) if arguments.profile else bench_model(arguments.out, ablate=arguments.ablate)
    if arguments.tune and not torch.cuda.is_available():
        raise ValueError("--tune: needs a CUDA device")
    if not kernels.HAS_TRITON or kernels.INTERPRETED:
        raise ValueError("kernels: needs Triton, and TRITON_INTERPRET and STARENCODER_KERNELS unset")
    if arguments.tune:
        bench_tune(arguments.out)
    elif torch.cuda.is_available() and not arguments.resources:
        bench_kernels(arguments.out)
    else:
        if not arguments.resources:
            print("There is no CUDA device here, and on a CPU the speed of these kernels means nothing. What they take of a chip:")
        bench_resources(arguments.out)


if __name__ == "__main__":
    run(main)
