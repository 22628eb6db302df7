"""What every measurement shares: contenders that take turns, and the table that is kept."""

import glob
import json
import os
import platform
import statistics
import subprocess
import sysconfig
import time
from importlib.metadata import version

import torch
from tqdm import tqdm

from common.files import write_whole
from corpus.build import prepare

REPETITIONS = 7  # rounds, of which the median counts
CORPUS = "corpora/bench"  # the standard library, with a vocabulary of the published size


def medians(contenders, repetitions=REPETITIONS):
    """{name: units of work a second} of {name: function that works and returns its units}.

    The contenders take turns, so that a machine that slows down slows down all of them.
    """
    speeds = {name: [] for name in contenders}
    for _ in tqdm(range(repetitions), desc="benchmark", unit="round"):
        for name, work in contenders.items():
            begin = time.perf_counter()
            units = work()  # tokens, FLOPs, bytes: whatever the contender counts
            speeds[name].append(units / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in speeds.items()}


def prepared(directory=CORPUS, vocab_size=49156):
    """The directory, in which the standard library is prepared at the first call."""
    if not os.path.exists(os.path.join(directory, "meta.json")):  # the file that is written last
        prepare(None, directory, vocab_size=vocab_size)
    return directory


def python_files(size):
    """Python files of this installation that have at most `size` bytes together, and their sum."""
    chosen = []
    total = 0
    library = sysconfig.get_paths()["stdlib"]  # most installations keep their packages in it
    for path in sorted(glob.glob(os.path.join(library, "**", "*.py"), recursive=True)):
        # Smaller files may still fit where a larger one does not.
        if total + os.path.getsize(path) <= size:
            chosen.append(path)
            total += os.path.getsize(path)
    return chosen, total


def report(path, name, rows, **facts):
    """Prints rows (dicts with the same keys) as a table, and writes them as JSON with the machine.

    path: the file, or None for results/NAME-DEVICE.json. facts: what else the file should say.
    """
    # The table: columns as wide as their widest cell.
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    header = {key: key for key in widths}
    for row in [header, *rows]:
        print("  ".join(f"{str(row[key]):{width}}" for key, width in widths.items()).rstrip())

    # What the figures depend on: the machine, the code and the libraries.
    device = f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    git = ["git", "describe", "--always", "--dirty"]  # -dirty: with changes that no commit has
    head = {
        "device": device,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        **facts,
    }

    # One line for each row, so that a change of one figure is a change of one line.
    short = device.split(",")[0].replace(" ", "-").lower()  # such as nvidia-h200, or cpu
    path = path or f"results/{name}-{short}.json"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    head_lines = json.dumps(head, indent=1).removesuffix("\n}")
    row_lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_whole(path, f'{head_lines},\n "rows": [\n  {row_lines}\n ]\n}}\n')
