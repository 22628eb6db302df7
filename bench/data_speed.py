"""How fast tokens on disk become batches, beside tokenizing them as they are needed.

The original takes the first 10,000 characters of a file, halves them, tokenizes the halves when
their turn comes, and pads. Here a corpus is tokenized once, and batches are cut from it, packed.
"""

import itertools
import os
import random

import torch
import transformers

from bench.measure import CORPUS, REPETITIONS, medians, prepared, report
from corpus.tokenizer import Tokenizer
from data import PairDataset, batches

MAX_LENGTH = 1024  # tokens of a pair
BATCH_SIZE = 64  # pairs


def bench_data(path=None, directory=CORPUS, repetitions=REPETITIONS):
    """Tokens per second of ready batches on one core; padding does not count."""
    # One core for both: neither PyTorch's threads nor those of the tokenizers library.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepared(directory)
    dataset = PairDataset(directory, "train", MAX_LENGTH, seed=0)
    numbers = itertools.count()  # so that no round draws what another has drawn

    # Here: ten steps of one batch each, without a background process.
    def from_disk():
        first = 10 * next(numbers)
        steps = range(first, first + 10)
        ready = batches(dataset, steps, BATCH_SIZE, BATCH_SIZE, workers=0)
        return sum(len(batch.input_ids) for micro_batches in ready for batch in micro_batches)

    # As the original does it, with the tokenizer and the masking of transformers.
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
            # The second half, or the first half of another file: a coin decides.
            second = generator.choice([text[half:], other[: len(other) // 2]])
            pairs.append(f"<cls>{text[:half]}<sep>{second}<sep>")
        # Padded to the longest pair of the batch, as the original's batches are.
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

    slowest = min(speeds.values())
    rows = [
        {"loader": name, "tokens/s": f"{speed:,.0f}", "ratio": f"{speed / slowest:.1f}"}
        for name, speed in speeds.items()
    ]
    facts = dict(max_length=MAX_LENGTH, batch_size=BATCH_SIZE, vocab_size=tokenizer.vocab_size)
    report(path, "data", rows, cores=1, repetitions=repetitions, **facts)
