"""How fast personal data and secrets are found in code, beside detect-secrets and CredSweeper.

One pass each, since a pass takes minutes. What they look for differs: the model finds names and
e-mail addresses, too, the two tools secrets only.
"""

import time
from collections import Counter

from bench.measure import python_files, report
from pii.detector import Detector
from pii.peers import scan_with_credsweeper, scan_with_detect_secrets
from pii.scan import scan

SIZE = 100_000_000  # bytes of text to look through


def bench_pii(path=None, model="runs/pii"):
    """Looks through the same files with each detector. model: what `python -m pii train` made."""
    files, total = python_files(SIZE)
    # Rules alone, and joined with the model, as `python -m pii detect` joins them.
    rules = Detector(rules=True)  # addresses and known formats of keys
    both = Detector.from_pretrained(model, rules=True)
    contenders = {
        "pii, rules": lambda: scan(rules, files, Counter()),
        "pii, model + rules": lambda: scan(both, files, Counter()),
        "detect-secrets": lambda: scan_with_detect_secrets(files),
        "credsweeper": lambda: scan_with_credsweeper(files),
    }

    # The time of a pass, from the first file to the last finding.
    rows = []
    for name, look in contenders.items():
        begin = time.perf_counter()
        found = sum(1 for _ in look())  # most yield as they go, so that all must be asked for
        speed = total / 1e6 / (time.perf_counter() - begin)
        rows.append({"by": name, "MB/s": f"{speed:.3f}", "found": f"{found:,}"})
    report(path, "pii-speed", rows, bytes=total, files=len(files))
