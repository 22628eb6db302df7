"""The tests under settings that make this CPU compute like another one: `python tests/any_cpu.py [--seeds N] [PYTEST ARGUMENT ...]`.

PyTorch, oneDNN and OpenMP each read a variable that narrows what they use of the CPU, and so the order in which they add. A test that
passes here and fails under one of them depends on how this CPU rounds. Prints a table; the exit status is 1 if a test failed.
Example: `python tests/any_cpu.py -m "not slow"`. What pytest says of each setting is in any_cpu.log, in the working directory.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time

SETTINGS = [
    "ATEN_CPU_CAPABILITY=default",  # no vector instructions in PyTorch's own loops
    "ATEN_CPU_CAPABILITY=avx2",
    "ATEN_CPU_CAPABILITY=avx512",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "ONEDNN_MAX_CPU_ISA=AVX512_CORE",  # no instructions for bf16
    "OMP_NUM_THREADS=1",
    "OMP_NUM_THREADS=2",
    "OMP_NUM_THREADS=4",
]


def main():
    parser = argparse.ArgumentParser(description="Run the tests as on other CPUs; all other arguments are pytest's.")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="instead of all: NAME=VALUE, or several joined by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="hypothesis seeds to try under each setting (default: 1)")
    arguments, for_pytest = parser.parse_known_args()
    row, failures = "{:60} {:>4} {:>7} {:>7} {:>8}", 0
    print(row.format("setting", "seed", "passed", "failed", "seconds"))
    for seed, setting in itertools.product(arguments.seeds, arguments.settings):
        environment = os.environ | dict(part.split("=") for part in setting.split(","))
        command = [sys.executable, "-m", "pytest", "-q", f"--hypothesis-seed={seed}", *for_pytest]
        begin = time.monotonic()
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        seconds = time.monotonic() - begin
        with open("any_cpu.log", "a") as log:
            log.write(f"\n==== {setting}, seed {seed}\n{said}")
        last = said.strip().rsplit("\n", 1)[-1]
        passed, failed = (sum(map(int, re.findall(rf"(\d+) {words}", last))) for words in ("passed", "(?:failed|error)"))
        failures += failed or not passed
        print(row.format(setting, seed, passed, failed, f"{seconds:.0f}"), flush=True)
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
