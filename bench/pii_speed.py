"""TODO."""

import os
import sysconfig
import time
from collections import Counter

from bench.measure import report
from pii.detector import Detector
from pii.peers import scan_with_credsweeper, scan_with_detect_secrets
from pii.text_files import files_of


def bench_pii(path=None, model="runs/pii", size=100_000_000):
    """Looks for secrets in Python files of this installation, and beside it in the same files with detect-secrets and credsweeper.

    One pass each: it is minutes. model: what `pii.py train` made.
    """

    paths, total, skipped = [], 0, Counter()
    for file, _ in files_of(
        [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")], skipped
    ):
        if file.endswith(".py") and total + os.path.getsize(file) <= size:
            paths, total = [*paths, file], total + os.path.getsize(file)
    detectors = {
        "rules": Detector(rules=True),
        "model + rules": Detector.from_pretrained(model, rules=True),
    }
    contenders = {
        f"pii.py, {name}": lambda d=d: scan(d, paths, skipped) for name, d in detectors.items()
    }
    contenders |= {"detect-secrets": lambda: scan_with_detect_secrets(paths)}
    contenders |= {"credsweeper": lambda: scan_with_credsweeper(paths)}
    rows = []
    for name, scan in contenders.items():
        begin = time.perf_counter()
        found = sum(1 for _ in scan())
        rows.append(
            {
                "by": name,
                "MB/s": f"{total / 1e6 / (time.perf_counter() - begin):.3f}",
                "found": f"{found:,}",
            }
        )
    report(path, "pii-speed", rows, bytes=total, files=len(paths))
