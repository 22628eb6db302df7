"""How fast text becomes a corpus: one machine, tasks of datatrove, and datatrove's own tokenizer.

All read the same parquet of synthetic code, on all cores, with the same tokenizer. What they do is
not quite the same: one machine and the tasks leave out duplicates, near ones too, for which the
tasks read the source three times; datatrove's own step only tokenizes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow.parquet import ParquetWriter
from tqdm import tqdm

from bench.measure import CORPUS, prepared, python_files, report
from corpus.jobs import check_packages

TASKS = 8
FILE_BYTES = 250_000_000  # of text in a file
COMPARED_BYTES = 1_000_000_000  # of text that all contenders read
PIECE = 400  # characters that a synthetic document has from one place
ROWS = 2000  # documents of a row group

# Reads every n-th file, tokenizes it in batches, and writes tokens and an index.
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    folder, tokenizer, out, tasks, workers = sys.argv[1:]
    steps = [
        ParquetReader(folder, text_key="content", id_key="number", read_metadata=False),
        DocumentTokenizer(out, tokenizer, shuffle_documents=False),
    ]
    logs = f"{out}/logs"
    # Processes that are forked here, so that their time counts as that of this one.
    options = {"logging_dir": logs, "start_method": "fork"}
    LocalPipelineExecutor(steps, int(tasks), int(workers), **options).run()
"""


# Starts a command, and prints what it took. It is a process of its own, since the memory that Linux
# counts of a new process begins with that of the one that starts it.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(bool(status))
"""


class Cost(NamedTuple):
    """What a command took, with all processes that it started."""

    seconds: float
    cpu_seconds: float
    peak_memory: float  # bytes of its largest process


def bench_corpus(path=None, gigabytes=1.0):
    """MB/s of text, all in all and for a core, and the largest process.

    All contenders read the first gigabyte; with more, the tasks then read all of it.
    """
    check_packages("local")
    tokenizer = prepared(CORPUS)
    workers = os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="corpus-") as scratch:
        files = write_parquet(os.path.join(scratch, "parquet"), gigabytes * 1e9)
        compared = files[: round(COMPARED_BYTES / FILE_BYTES)]
        options = ["--tokenizer", tokenizer, "--near-dedup", "--workers", str(workers)]
        ours = [sys.executable, "-m", "corpus"]
        tasks = ["--executor", "local", "--tasks", str(TASKS)]

        out = os.path.join(scratch, "out")
        folder = os.path.join(scratch, "compared")
        os.mkdir(folder)
        for file in compared:
            os.link(file, os.path.join(folder, os.path.basename(file)))
        own = [sys.executable, "-c", DATATROVE, folder, f"{tokenizer}/tokenizer.json", out]
        commands = {
            "one machine": [*ours, *compared, *options, "--out", out],
            f"{TASKS} tasks": [*ours, *compared, *options, *tasks, "--out", out],
            "datatrove's own tokenizer": [*own, str(TASKS), str(workers)],
        }
        sizes = dict.fromkeys(commands, len(compared) * FILE_BYTES)
        if len(files) > len(compared):
            name = f"{TASKS} tasks, {gigabytes:g} GB"
            commands[name] = [*ours, *files, *options, *tasks, "--out", out]
            sizes[name] = len(files) * FILE_BYTES

        rows = []
        for name, command in commands.items():
            print(f"{name} ...", file=sys.stderr)
            cost = cost_of(command)
            shutil.rmtree(out)
            megabytes = sizes[name] / 1e6
            rows.append(
                {
                    "path": name,
                    "MB/s": f"{megabytes / cost.seconds:.1f}",
                    "MB/s a core": f"{megabytes / cost.cpu_seconds:.1f}",
                    "largest process, MB": f"{cost.peak_memory / 1e6:.0f}",
                }
            )
    report(path, "corpus-tasks", rows, cores=workers, gigabytes=gigabytes, tasks=TASKS)


def write_parquet(folder, size):
    """Writes parquet files with `size` bytes of text; returns their paths.

    A document is made of pieces of Python's library, drawn anew for each: no two are alike.
    """
    paths, _ = python_files(20_000_000)
    texts = [open(path, encoding="utf-8", errors="ignore").read() for path in paths]
    pool = "\n".join(texts).encode("ascii", "ignore").decode()
    os.mkdir(folder)
    files = []
    for number in tqdm(range(max(1, round(size / FILE_BYTES))), desc="writing", unit="file"):
        files.append(os.path.join(folder, f"{number:05d}.parquet"))
        generator = np.random.default_rng(number)
        written = 0
        schema = pyarrow.schema({"content": pyarrow.string(), "number": pyarrow.string()})
        with ParquetWriter(files[-1], schema, compression="none") as table:
            while written < FILE_BYTES:
                documents = synthetic(pool, generator)
                names = [f"{number}-{written}-{row}" for row in range(ROWS)]
                table.write(pyarrow.table({"content": documents, "number": names}, schema))
                written += sum(map(len, documents))
    return files


def synthetic(pool, generator):
    """ROWS documents of up to 40 pieces of the pool."""
    documents = []
    for count in generator.integers(1, 40, ROWS):
        starts = generator.integers(0, len(pool) - PIECE, count)
        documents.append("".join([pool[start : start + PIECE] for start in starts.tolist()]))
    return documents


def cost_of(command):
    """Runs a command to its end. Raises ValueError, with what it said last, if it fails."""
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", LAUNCHER, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if run.returncode:
        raise ValueError(f"{command[:3]} failed: {run.stderr[-1000:]}")
    cpu_seconds, kilobytes = run.stdout.split()[-2:]
    return Cost(seconds, float(cpu_seconds), 1024 * int(kilobytes))
