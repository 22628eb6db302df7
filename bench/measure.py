"""TODO."""

import json
import os
import platform
import statistics
import subprocess
import time

import torch
import torch._functorch.config
from tqdm import tqdm

from common.files import write_whole

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
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    )
    path = path or f"results/{name}-{device.split(',')[0].replace(' ', '-').lower()}.json"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    heads = json.dumps(
        {"device": device, "commit": commit, "versions": versions, **facts}, indent=1
    )
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_whole(path, f'{heads[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
