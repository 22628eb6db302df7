"""How fast text becomes tokens on disk, and tokens become batches, beside the usual ways.

Batches: the original tokenizes halves of a file as they are needed, and pads. Here they come from
tokens on disk, packed. Tokens: `datasets.map` with a fast tokenizer, which keeps duplicates and
vendored code, beside `python -m corpus`, which looks for both.
"""

import itertools
import json
import os
import random
import tempfile

import datasets
import torch
import transformers

from bench.measure import CORPUS, REPETITIONS, medians, prepared, python_files, report
from corpus.build import prepare
from corpus.tokenizer import Tokenizer
from data import PairDataset, batches

MAX_LENGTH = 1024
BATCH_SIZE = 64


def report_speeds(path, name, column, unit, speeds, **facts):
    """Reports each speed, and its ratio to the slowest."""
    slowest = min(speeds.values())
    rows = [
        {column: contender, unit: f"{speed:,.1f}", "ratio": f"{speed / slowest:.1f}"}
        for contender, speed in speeds.items()
    ]
    report(path, name, rows, **facts)


def bench_data(path=None, directory=CORPUS, repetitions=REPETITIONS):
    """Tokens per second of ready batches on one core; padding does not count."""
    # One core for both: neither PyTorch's threads nor those of the tokenizers library.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepared(directory)
    dataset = PairDataset(directory, "train", MAX_LENGTH, seed=0)
    numbers = itertools.count()

    def from_disk():
        first = 10 * next(numbers)
        steps = range(first, first + 10)
        ready = batches(dataset, steps, BATCH_SIZE, BATCH_SIZE, workers=0)
        return sum(len(batch.input_ids) for micro_batches in ready for batch in micro_batches)

    # As the original does it: halves of the first 10,000 characters of a file.
    tokenizer = Tokenizer.from_pretrained(directory)
    documents = range(min(512, dataset.documents()))
    texts = [tokenizer.decode(dataset.document(d))[:10_000] for d in documents]
    fast = transformers.AutoTokenizer.from_pretrained(directory)
    collate = transformers.DataCollatorForLanguageModeling(fast, mlm_probability=0.15)

    def on_the_fly():
        generator = random.Random(next(numbers))
        pairs = []
        for _ in range(BATCH_SIZE):
            text, other = generator.choices(texts, k=2)
            half = len(text) // 2
            second = generator.choice([text[half:], other[: len(other) // 2]])
            pairs.append(f"<cls>{text[:half]}<sep>{second}<sep>")
        encoded = fast(pairs, truncation=True, max_length=MAX_LENGTH)
        batch = collate([{"input_ids": ids} for ids in encoded["input_ids"]])
        return int((batch["input_ids"] != fast.pad_token_id).sum())

    contenders = {
        "tokenizing on the fly, transformers collator": on_the_fly,
        "corpus, data.py": from_disk,
    }
    for work in contenders.values():
        work()  # fills the caches
    speeds = medians(contenders, repetitions)
    facts = dict(max_length=MAX_LENGTH, batch_size=BATCH_SIZE, vocab_size=tokenizer.vocab_size)
    facts["repetitions"] = repetitions
    report_speeds(path, "data", "loader, one core", "tokens/s", speeds, **facts)


def bench_corpus(path=None, directory=CORPUS, size=60_000_000, repetitions=5):
    """MB per second from one .jsonl file of source code to tokens on disk, on all cores."""
    prepared(directory)
    fast = transformers.AutoTokenizer.from_pretrained(directory)
    datasets.disable_progress_bars()
    files, size = python_files(size)

    with tempfile.TemporaryDirectory() as temporary:
        table = os.path.join(temporary, "table.jsonl")
        with open(table, "w", encoding="utf-8") as f:
            for file in files:
                with open(file, encoding="utf-8", errors="replace") as source:
                    f.write(json.dumps({"content": source.read(), "path": file}) + "\n")

        # Each round writes to a directory of its own, so that none finds what an earlier one left.
        directories = (os.path.join(temporary, str(i)) for i in itertools.count())

        def prepared_here():
            prepare([table], next(directories), tokenizer=directory)
            return size / 1e6

        def mapped():
            cache = next(directories)
            rows = datasets.load_dataset("json", data_files=table, split="train", cache_dir=cache)
            rows.map(
                lambda batch: fast(batch["content"], return_attention_mask=False),
                batched=True,
                num_proc=os.cpu_count(),
                remove_columns=rows.column_names,
            )
            return size / 1e6

        contenders = {"datasets.map, fast tokenizer": mapped, "corpus": prepared_here}
        speeds = medians(contenders, repetitions)
    facts = dict(vocab_size=len(fast), repetitions=repetitions, text=size)
    report_speeds(path, "corpus", "text to tokens, all cores", "MB/s", speeds, **facts)
