"""What the notebooks share: the checker of their exercises, silence, and some code to look at."""

import contextlib
import glob
import io
import json
import os
import shutil
import sys
import sysconfig


@contextlib.contextmanager
def exercise(number):
    """Says whether the assertions of its block hold: `with exercise(1): assert ...`. An unsolved exercise does not stop the notebook."""
    try:
        yield
    except Exception as error:
        print(
            f"Exercise {number}: not solved yet ({type(error).__name__}{f': {error}' if str(error) else ''})"
        )
    else:
        print(f"Exercise {number}: solved")


@contextlib.contextmanager
def quiet():
    """Without what a run prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def modules(directory, count):
    """Copies the first `count` modules of Python's standard library into a new directory, and returns it."""
    os.makedirs(directory)
    for path in sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "[a-z]*.py")))[
        :count
    ]:
        shutil.copy(path, directory)
    return directory


def thinned(run, every=20):
    """RUN/metrics.jsonl, its training lines `every` at a time as their mean (at the last of their steps), its evaluations as they are."""
    lines, some = [], []
    with open(os.path.join(run, "metrics.jsonl")) as f:
        for line in map(json.loads, f):
            if "loss" not in line:  # an evaluation, or a step that was left out
                lines.append(line)
                continue
            some.append(line)
            if len(some) == every:
                means = {
                    name: float(f"{sum(m[name] for m in some) / every:.5g}")
                    for name in line
                    if name not in ("step", "learning_rate")
                }
                lines.append(
                    {
                        "step": line["step"],
                        "learning_rate": float(f"{line['learning_rate']:.8g}"),
                        **means,
                    }
                )
                some = []
    return lines


if __name__ == "__main__":  # python notebooks/exercises.py RUN > results/tiny-run.jsonl
    print("\n".join(map(json.dumps, thinned(sys.argv[1]))))
