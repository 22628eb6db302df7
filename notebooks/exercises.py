"""What the notebooks share. Import it first: it sets up Python and matplotlib, before torch starts.

Then it offers the checker of the exercises, silence, and some code to look at. As a program it
makes the log of a run short enough to keep:

    python notebooks/exercises.py RUN > results/tiny-run.jsonl
"""

import contextlib
import glob
import io
import json
import os
import shutil
import sys
import sysconfig
import warnings

import matplotlib.pyplot as plt

# ---- set-up, done by the import ------------------------------------------------------------------

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the project

# Torch and its libraries read these when they are imported. One thread: the matrices here are so
# small that threads would wait for each other longer than they compute.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm asks for a widget

plt.rcParams["figure.dpi"] = 80
plt.rcParams["figure.figsize"] = (6, 3)

# ---- in the cells --------------------------------------------------------------------------------


@contextlib.contextmanager
def exercise(number):
    """Says whether the assertions in its block hold: `with exercise(1): assert ...`.

    An unsolved exercise does not stop the notebook.
    """
    try:
        yield
    except Exception as error:
        reason = type(error).__name__
        if str(error):
            reason += f": {error}"
        print(f"Exercise {number}: not solved yet ({reason})")
    else:
        print(f"Exercise {number}: solved")


@contextlib.contextmanager
def quiet():
    """Hides what its block prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def modules(directory, count):
    """Copies the first `count` modules of Python's standard library into a new directory.

    Returns the directory.
    """
    os.makedirs(directory)
    pattern = os.path.join(sysconfig.get_paths()["stdlib"], "[a-z]*.py")
    for path in sorted(glob.glob(pattern))[:count]:
        shutil.copy(path, directory)
    return directory


# ---- as a program --------------------------------------------------------------------------------


def thinned(run, every=20):
    """The lines of RUN/metrics.jsonl, with `every` training lines averaged into one.

    An average stands at the last of its steps. Evaluations stay as they are.
    """
    lines = []
    group = []  # training lines that wait to be averaged
    with open(os.path.join(run, "metrics.jsonl")) as f:
        for line in map(json.loads, f):
            if "loss" not in line:  # an evaluation, or a step that was skipped
                lines.append(line)
                continue
            group.append(line)
            if len(group) == every:
                lines.append(average(group))
                group = []
    return lines


def average(lines):
    """One training line for several: the last step and its learning rate, the mean of the rest."""
    last = lines[-1]
    result = {
        "step": last["step"],
        "learning_rate": float(f"{last['learning_rate']:.8g}"),
    }
    for name in last:
        if name not in result:
            mean = sum(line[name] for line in lines) / len(lines)
            result[name] = float(f"{mean:.5g}")
    return result


if __name__ == "__main__":
    for line in thinned(sys.argv[1]):
        print(json.dumps(line))
