"""Runs the tests as on other CPUs: `python tests/any_cpu.py -m "not slow"`.

PyTorch, oneDNN and OpenMP each read a variable that narrows what they use of a CPU, and so changes
the order in which they add. A test that passes without one of them and fails with it depends on how
this CPU rounds. Prints a table, and under each line the tests that failed. Flags that it does not
know go to pytest.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time

SETTINGS = [
    "ATEN_CPU_CAPABILITY=default",  # PyTorch's own loops without vector instructions
    "ATEN_CPU_CAPABILITY=avx2",
    "ATEN_CPU_CAPABILITY=avx512",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE",  # no instructions for bf16
    "OMP_NUM_THREADS=1",
    "OMP_NUM_THREADS=2",
    "OMP_NUM_THREADS=4",
]


def main():
    parser = argparse.ArgumentParser(
        description="Run the tests as on other CPUs. All other arguments are pytest's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--setting",
        action="append",
        help="NAME=VALUE, or several joined by commas; may be repeated (default: all)",
    )
    parser.add_argument(
        "--seed", type=int, action="append", help="of hypothesis; may be repeated (default: 1)"
    )
    ours, for_pytest = parser.parse_known_args()

    row, sound = "{:80} {:>4} {:>7} {:>7} {:>8}", True
    print(row.format("setting", "seed", "passed", "failed", "seconds"))
    for seed, setting in itertools.product(ours.seed or [1], ours.setting or SETTINGS):
        environment = os.environ | dict(part.split("=") for part in setting.split(","))
        command = [sys.executable, "-m", "pytest", "-q", f"--hypothesis-seed={seed}", *for_pytest]
        begin = time.monotonic()
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - begin

        counts = result.stdout.strip().rsplit("\n", 1)[
            -1
        ]  # such as "1 failed, 350 passed in 173.17s"
        passed, failed = (
            sum(map(int, re.findall(rf"(\d+) {words}", counts)))
            for words in ("passed", "(?:failed|error)")
        )
        print(row.format(setting, seed, passed, failed, f"{seconds:.0f}"), flush=True)
        for line in re.findall(r"^(?:FAILED|ERROR) .*", result.stdout, re.MULTILINE):
            print(line, flush=True)
        sound = sound and result.returncode == 0
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
