"""TODO."""

import contextlib
import itertools
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter

import pyarrow.parquet
import torch
import torch._functorch.config
from tqdm import tqdm

from bench.measure import REPETITIONS, medians, report
from corpus.build import documents, prepare, text_of
from corpus.tokenizer import Tokenizer
from data import PairDataset, batches


def bench_data(path=None, directory="corpora/bench", max_length=1024, batch_size=64):
    """Tokens per second of ready batches at length 1,024 with a 49,156-token vocabulary, on one core."""
    import transformers

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not os.path.exists(os.path.join(directory, "meta.json")):
        prepare(None, directory, vocab_size=49156)
    dataset, tokenizer = (
        PairDataset(directory, "train", max_length, seed=0),
        Tokenizer.from_pretrained(directory),
    )
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    collator = transformers.DataCollatorForLanguageModeling(auto, mlm_probability=0.15)
    texts = [tokenizer.decode(dataset.document(d))[:10_000] for d in range(512)]
    counter = iter(range(10**9))

    def here():
        step = next(counter)
        ready = batches(
            dataset, range(10 * step, 10 * step + 10), batch_size, batch_size, workers=0
        )
        return sum(len(batch.input_ids) for micro_batches in ready for batch in micro_batches)

    def on_the_fly():
        """As the original: halves of a file's first 10,000 characters, tokenized as they are needed, padded to the longest."""
        chosen, halves = random.Random(next(counter)).sample(texts, batch_size), []
        for first, other in zip(chosen, reversed(chosen)):
            a, follows = first[: len(first) // 2], random.random() < 0.5
            halves.append((a, first[len(a) :] if follows else other[: len(other) // 2]))
        pairs = [f"<cls>{a}<sep>{b}<sep>" for a, b in halves]
        batch = collator(
            [
                {"input_ids": ids}
                for ids in auto(pairs, truncation=True, max_length=max_length)["input_ids"]
            ]
        )
        return int((batch["input_ids"] != auto.pad_token_id).sum())

    here(), on_the_fly()  # caches warm
    speeds = medians(
        {"tokenizing on the fly, transformers collator": on_the_fly, "corpus.py + data.py": here}
    )
    slowest = min(speeds.values())
    rows = [
        {"loader, one core": n, "tokens/s": f"{speed:,.0f}", "ratio": f"{speed / slowest:.1f}"}
        for n, speed in speeds.items()
    ]
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
    library, schema = (
        sysconfig.get_paths()["stdlib"],
        pyarrow.schema([("content", pyarrow.string()), ("lang", pyarrow.string())]),
    )
    texts = [
        document.content.decode()
        for *_, document in documents([library], Counter())
        if not text_of(document)[1]
    ]
    rows, written = [], 0
    with (
        pyarrow.parquet.ParquetWriter(path, schema) as table,
        tqdm(total=size, unit="B", unit_scale=True, desc="writing") as bar,
    ):
        for i, text in enumerate(itertools.cycle(texts)):
            rows.append(f"# copy {i // len(texts)}\n{text}")
            written += len(rows[-1].encode())
            if len(rows) == 1000 or written >= size:
                table.write_table(
                    pyarrow.table({"content": rows, "lang": ["Python"] * len(rows)}, schema)
                )
                bar.update(written - bar.n)
                rows = []
            if written >= size:
                return


def peak_memory(command):
    """Runs a command and returns the peak of its memory in bytes, all its processes together, shared pages once (Linux)."""
    process, peak = (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        0,
    )
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


def bench_corpus(
    path=None, directory="corpora/bench", size=60_000_000, large=2_000_000_000, repetitions=5
):
    """From a table of sources to tokens on disk, on all cores, beside datasets.map with a fast tokenizer; and the memory that it takes."""
    import datasets
    import transformers

    if not os.path.exists(os.path.join(directory, "meta.json")):
        prepare(None, directory, vocab_size=49156)
    auto, cores = transformers.AutoTokenizer.from_pretrained(directory), os.cpu_count()
    counter = iter(range(10**9))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        table = os.path.join(temporary, "table.parquet")
        source_table(table, size)

        def here():
            prepare([table], os.path.join(temporary, str(next(counter))), tokenizer=directory)
            return size

        def mapped():
            rows = datasets.load_dataset(
                "parquet",
                data_files=table,
                split="train",
                cache_dir=os.path.join(temporary, str(next(counter))),
            )
            encode = lambda batch: auto(batch["content"], return_attention_mask=False)
            rows.map(encode, batched=True, num_proc=cores, remove_columns=rows.column_names)
            return size

        speeds = medians({"datasets.map, fast tokenizer": mapped, "corpus.py": here}, repetitions)
        rows = [
            {
                "from text to tokens, all cores": n,
                "MB/s": f"{s / 1e6:.1f}",
                "ratio": f"{s / min(speeds.values()):.1f}",
            }
            for n, s in speeds.items()
        ]
        table = os.path.join(temporary, "large.parquet")
        source_table(table, large)
        begin = time.perf_counter()
        peak = peak_memory(
            [
                sys.executable,
                "-m",
                "corpus",
                table,
                "--tokenizer",
                directory,
                "--out",
                os.path.join(temporary, "large"),
            ]
        )
        seconds = time.perf_counter() - begin
    rows.append(
        {
            "from text to tokens, all cores": f"corpus.py, {large / 1e9:g} GB",
            "MB/s": f"{large / 1e6 / seconds:.1f}",
            "ratio": "-",
        }
    )
    print(f"peak memory on {large / 1e9:g} GB: {peak / 1e6:,.0f} MB")
    report(
        path,
        "corpus",
        rows,
        vocab_size=len(auto),
        repetitions=repetitions,
        peak_memory=peak,
        text=large,
    )
