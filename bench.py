"""Every speed that this project claims, measured beside its peers in one run.

    python bench.py data                    the loader, one core, beside tokenizing on the fly with a transformers collator
    python bench.py kernels --resources     what each kernel takes of a chip that need not be here: registers, spills, shared memory

Each figure is the median of several repetitions that take turns, so that a machine that slows down slows all of them; on a shared machine
only the ratios mean anything. A table goes to the screen, the same as JSON with machine, versions and commit to results/.
"""

import glob
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time

import torch
from tqdm import tqdm

import corpus
import kernels
from data import CommandLine, PairDataset, Tokenizer, batches, run, write_whole

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


def report(path, rows, **facts):
    """Prints rows (dicts with the same keys) as a table and writes them, with the machine and the versions, to the file `path`."""
    import transformers

    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{str(row[key]):{width}}" for key, width in widths.items()).rstrip())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
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
    offsets = dataset.offsets
    texts = [tokenizer.decode(dataset.tokens[a:b])[:10_000] for a, b in zip(offsets[:512], offsets[1:513])]
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
        path or "results/data-cpu.json",
        rows,
        max_length=max_length,
        batch_size=batch_size,
        vocab_size=tokenizer.vocab_size,
        repetitions=REPETITIONS,
    )


# ---- kernels ---------------------------------------------------------------------------------------------------------------------


def bench_resources(path=None):
    """Compiles every kernel ahead of time, with the launch settings that it would have, for three chips, and reads the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernels.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 is set, and interpreted kernels have no machine code; unset it")
    (cuobjdump,) = glob.glob(os.path.join(os.path.dirname(triton.__file__), "**", "cuobjdump"), recursive=True)
    fp32 = {"lse_ptr", "delta_ptr", "mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr"}
    scalars = {"scale": "fp32", "keep_scale": "fp32", "eps": "fp32", "threshold": "i64"}  # the others are i32
    aligned = {"stride_t", "stride_3", "stride_n", "H"}  # multiples of 16 in all presets, as are the addresses

    def row(chip, name, kernel, dtype, size, dropout, num_warps, num_stages=3, **constants):
        constants |= {"DROPOUT": dropout} if "DROPOUT" in kernel.arg_names else {}
        types, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            pointed = "i32" if argument == "cu_seqlens_ptr" else "i64" if argument == "seed_ptr" else "fp32" if argument in fp32 else dtype
            types[argument] = (
                "constexpr" if argument in constants else f"*{pointed}" if argument.endswith("_ptr") else scalars.get(argument, "i32")
            )
            if argument.endswith("_ptr") or argument in aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(compiled.asm["cubin"])
            f.flush()
            usage = subprocess.run([cuobjdump, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        return {
            "chip": f"sm_{chip}", "kernel": name, "dtype": dtype, "D or H": size, "dropout": dropout,
            "tile": "x".join(str(v) for k, v in constants.items() if k in ("BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_H")), "warps": num_warps,
            "registers": registers, "spills (bytes)": stack, "shared (KB)": compiled.metadata.shared // 1024,
            "wgmma": "wgmma" in compiled.asm["ptx"],
        }  # fmt: skip

    wanted = []
    attention = {"forward": kernels._attention_forward, "dk_dv": kernels._attention_backward_dk_dv, "dq": kernels._attention_backward_dq}
    for chip, dtype, dropout in itertools.product((80, 90, 100), ("bf16", "fp16"), (False, True)):
        for (name, kernel), D in itertools.product(attention.items(), (64, 128)):
            m, n, warps, stages = kernels.tile(name, divmod(chip, 10), D)
            wanted.append(((chip, name, kernel, dtype, D, dropout, warps, stages), dict(D=D, BLOCK_D=D, BLOCK_M=m, BLOCK_N=n)))
        for name, kernel, elements in (
            ("ln forward", kernels._layer_norm_forward, 4096),
            ("ln backward", kernels._layer_norm_backward, 2048),
        ):
            tile = kernels.rows(768, elements)
            wanted.append(((chip, name, kernel, dtype, 768, dropout, tile.pop("num_warps")), tile | {"RESIDUAL": True}))
        if dropout:
            tile = kernels.rows(768, 4096)
            wanted.append(((chip, "dropout", kernels._dropout_kernel, dtype, 768, True, tile.pop("num_warps")), tile))
        else:
            delta = dict(D=64, BLOCK_D=64, BLOCK_M=64)
            wanted.append(((chip, "delta", kernels._attention_backward_delta, dtype, 64, False, 4), delta))
    rows = [row(*positional, **constants) for positional, constants in tqdm(wanted, desc="compiling", unit="kernel")]
    report(path or "results/resources.json", rows, triton=triton.__version__)


def main(argv=None):
    """The command line."""
    parser = CommandLine(prog="bench.py", description="Measure the speeds that the README claims.")
    parser.add_argument("what", choices=["data", "kernels"])
    parser.add_argument("--resources", action="store_true", help="kernels: compile for sm_80, sm_90 and sm_100 and show what they take")
    parser.add_argument("--out", metavar="FILE", help="the JSON file to write (default: one in results/)")
    arguments = parser.parse_args(argv)
    if arguments.what == "data":
        bench_data(arguments.out)
    elif arguments.resources:
        bench_resources(arguments.out)
    else:
        raise ValueError("kernels: the speed of the kernels is not measured yet; --resources shows what they take of a chip")


if __name__ == "__main__":
    run(main)
