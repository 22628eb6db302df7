"""Every speed that this project claims, measured beside its peers in one run.

    python bench.py data        the loader, one core, beside tokenizing on the fly with a transformers collator

Each figure is the median of several repetitions that take turns, so that a machine that slows down slows all of them; on a shared machine
only the ratios mean anything. A table goes to the screen, the same as JSON with machine, versions and commit to results/.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import time

import torch
from tqdm import tqdm

import corpus
from data import CommandLine, PairDataset, Tokenizer, batches, run

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


def report(name, rows, **facts):
    """Prints rows (dicts with the same keys) as a table and writes them, with the machine and the versions, to results/NAME.json."""
    import transformers

    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(f"{str(row[key]):{width}}" for key, width in widths.items()).rstrip())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    os.makedirs("results", exist_ok=True)
    with open(f"results/{name}.json", "w") as f:
        json.dump({"device": device, "commit": commit, "versions": versions, **facts, "rows": rows}, f, indent=1)
        f.write("\n")


# ---- data ------------------------------------------------------------------------------------------------------------------------


def bench_data(directory="data/bench", max_length=1024, batch_size=64):
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
    report("data-cpu", rows, max_length=max_length, batch_size=batch_size, vocab_size=tokenizer.vocab_size, repetitions=REPETITIONS)


def main(argv=None):
    """The command line."""
    parser = CommandLine(prog="bench.py", description="Measure the speeds that the README claims.")
    parser.add_argument("what", choices=["data"])
    parser.parse_args(argv)
    bench_data()


if __name__ == "__main__":
    run(main)
