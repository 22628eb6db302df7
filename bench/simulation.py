"""Simulated runs beside real ones: the steps and the lost work of 2 and 4 ranks on 2 CPU cores.

    python -m bench.simulation

`training/simulate.py` predicts; `train.py` runs, is killed at random moments, and is started again
by the same command. Nothing that a prediction uses comes from the runs that it is compared with:

    one rank's step    from runs of one rank, two at once, one to a core. The slowest of two cores
                       is what a step waits for. Of four ranks two share a core, which computes the
                       sum of two such steps.
    all-reduce         from runs of as many ranks with one pair each instead of 16: what a step of
                       theirs takes beyond the slowest of one-rank steps with one pair
    a save             from the runs of one rank
    kills              from the same distribution, but other draws

A step's time is the time between two lines of metrics.jsonl. In each round all of this is measured
once, since only figures of the same minute can be compared on a machine that others use, too.
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bench.measure import report
from common.command_line import run_command
from corpus.build import prepare
from training.run_directory import checkpoints, step_of
from training.simulate import run_through, slowest

CORES = 2
WORLD_SIZES = (2, 4)
SHARE = 16  # pairs of a rank in a step
SAVE_EVERY = 20  # steps
STEPS = 2 * SAVE_EVERY + 5  # of a run that is measured
WARM_UP = 3  # steps after a start that do not count
DRAWS = 20_000  # simulated steps
FLAGS = (
    "--device cpu --dtype float32 --hidden-size 128 --num-hidden-layers 2 --num-attention-heads 4 "
    "--intermediate-size 512 --max-length 128 --hidden-dropout-prob 0 "
    "--attention-probs-dropout-prob 0 --warmup-steps 20 --eval-examples 2 --log-every 1 "
    f"--timeout 60 --workers 0 --eval-every 100000 --steps 100000 --save-every {SAVE_EVERY}"
)


# ---- real runs -----------------------------------------------------------------------------------


class Lines:
    """The lines of a run's metrics.jsonl, one for each step, as they appear after a start.

    To be made before the start, which replaces the file by one without the steps that are lost.
    """

    def __init__(self, out):
        self.path = os.path.join(out, "metrics.jsonl")
        self.before = self._inode()
        self.file = None
        self.first = 0  # steps done before the start
        self.moments = []  # when each later step was done

    def _inode(self):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.path).st_ino

    def look(self):
        """Notes the lines that are new."""
        if self.file is None:
            if self._inode() in (None, self.before):
                return
            self.file = open(self.path, "rb")
            self.first = self.file.read().count(b"\n")
        count = self.file.read().count(b"\n")
        self.moments += [time.perf_counter()] * count

    def step_times(self):
        """Seconds of the steps after the warm-up: two arrays, without and with a save before."""
        times = np.diff(self.moments)[WARM_UP:]
        steps = self.first + 2 + WARM_UP + np.arange(len(times))
        saved = steps % SAVE_EVERY == 1
        return times[~saved], times[saved]


@contextlib.contextmanager
def ranks_running(data, out, world_size=1, share=SHARE):
    """The processes of a run, killed at the end. share: pairs of a rank. Yields its `Lines`."""
    lines = Lines(out)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    words = f"{FLAGS} --batch-size {world_size * share} --micro-batch-size {share}".split()
    command = [sys.executable, "train.py", *words, "--data", data, "--out", out]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    common |= os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    with open(f"{out}.log", "w") as log:
        pipes = dict(stdout=log, stderr=log)
        processes = [subprocess.Popen(command, env=common | rank, **pipes) for rank in ranks]
    try:
        yield lines
        if any(process.poll() is not None for process in processes):
            raise OSError(f"a rank of {world_size} ended early: {last_line(f'{out}.log')}")
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def last_line(path):
    """The last line of a text file."""
    with open(path) as f:
        return f.read().strip().split("\n")[-1]


def watch(runs, enough, patience=120):
    """Notes the lines of runs until enough() is true. Raises OSError if nothing comes for long."""
    deadline = time.monotonic() + patience
    while not enough():
        for lines in runs:
            lines.look()
        if time.monotonic() > deadline:
            raise OSError(f"{runs[0].path}: not enough steps in {patience} s")
        time.sleep(0.002)


def measured_alone(data, directory, share):
    """Step times of one rank, and those with a save, while as many run as there are cores."""
    outs = [tempfile.mkdtemp(dir=directory) for _ in range(CORES)]
    with contextlib.ExitStack() as running:
        runs = [
            running.enter_context(ranks_running(data, os.path.join(out, "run"), share=share))
            for out in outs
        ]
        watch(runs, lambda: all(len(lines.moments) >= STEPS for lines in runs))
    times = [lines.step_times() for lines in runs]
    return [np.concatenate(arrays) for arrays in zip(*times)]


def measured_together(data, directory, world_size, share):
    """Step times of several ranks."""
    out = os.path.join(tempfile.mkdtemp(dir=directory), "run")
    with ranks_running(data, out, world_size, share) as lines:
        watch([lines], lambda: len(lines.moments) >= STEPS)
    return lines.step_times()[0]


class Life(NamedTuple):
    """A run from a start to a kill."""

    times: np.ndarray  # seconds of its steps
    lost: int  # steps that will be done twice


def killed_after(data, out, world_size, gap):
    """Starts, or continues, the run in `out`, and kills it `gap` seconds after its first step."""
    with ranks_running(data, out, world_size) as lines:
        watch([lines], lambda: lines.moments)
        end = lines.moments[0] + gap
        watch([lines], lambda: time.perf_counter() >= end)
    lines.look()
    saved = max(map(step_of, checkpoints(out)), default=0)
    return Life(lines.step_times()[0], lines.first + len(lines.moments) - saved)


# ---- predictions ---------------------------------------------------------------------------------


def slowest_core(alone, world_size, generator):
    """Simulated seconds (DRAWS,) until the slower of the cores has computed its ranks' steps."""
    on_a_core = generator.choice(alone, (DRAWS, world_size // CORES)).sum(axis=1)
    return slowest(on_a_core, CORES, DRAWS, generator)


class Prediction(NamedTuple):
    """What the simulation says of a run. Seconds, but for the lost steps."""

    alone: float  # a core's work in a step
    waiting: float  # what the slower core adds
    all_reduce: float
    step: float  # the sum of the three
    mtbf: float  # mean time between the kills
    lost: float  # steps lost by a kill


def predict(alone, with_save, alone_small, together_small, world_size, generator):
    """The `Prediction` for world_size ranks, from step times of other runs (arrays, seconds).

    alone, with_save: of one rank. alone_small, together_small: of one rank and of world_size ranks,
    with one pair each.
    """
    small = slowest_core(alone_small, world_size, generator)
    all_reduce = float(max(np.median(together_small) - np.median(small), 0.0))
    core = float(np.median(alone)) * world_size / CORES
    steps = slowest_core(alone, world_size, generator) + all_reduce
    step = float(np.median(steps))
    save = max(float(np.median(with_save) - np.median(alone)), 0.0)

    # Kills every ten steps on average. A kill in the first step after a start loses no whole step;
    # real kills come after it, so the simulated ones before it do not count.
    mtbf = step * SAVE_EVERY / 2
    run = run_through(steps, SAVE_EVERY, save, mtbf, 0.0, generator)
    lost = run.lost_steps / (run.failures * np.exp(-step / mtbf))
    return Prediction(core, step - all_reduce - core, all_reduce, step, mtbf, float(lost))


def kill_moments(rounds, kills, generator):
    """Random gaps (rounds, kills) of a Poisson process of mean 1, each from a stratum of its own.

    Strata cover the exponential distribution evenly, so that few kills show its mean.
    """
    strata = np.arange(rounds * kills).reshape(kills, rounds).T
    level = (strata + generator.random(strata.shape)) / strata.size
    return -np.log1p(-level)


# ---- the comparison ------------------------------------------------------------------------------


def one_round(data, directory, gaps, generator, bar):
    """{world size: (its `Prediction`, its `Life`s)}. gaps: {world size: (kills,)}, of mean 1."""
    alone, with_save = measured_alone(data, directory, SHARE)
    alone_small, _ = measured_alone(data, directory, share=1)
    bar.update()
    results = {}
    for world_size in WORLD_SIZES:
        small = measured_together(data, directory, world_size, share=1)
        prediction = predict(alone, with_save, alone_small, small, world_size, generator)
        out = os.path.join(directory, f"killed-{world_size}")
        lives = []
        for gap in gaps[world_size]:
            lives.append(killed_after(data, out, world_size, gap * prediction.mtbf))
            bar.update()
        results[world_size] = prediction, lives
    return results


def step_row(world_size, results):
    """Steps, predicted and measured. results: (prediction, lives) of each round."""
    measured = [np.median(np.concatenate([life.times for life in lives])) for _, lives in results]
    ratios = [p.step / seconds for (p, _), seconds in zip(results, measured)]
    predicted = [statistics.median(column) for column in zip(*(p[:4] for p, _ in results))]
    alone, waiting, all_reduce, step = (1000 * seconds for seconds in predicted)
    return {
        "ranks": world_size,
        "figure": "step (ms)",
        "predicted": round(step, 1),
        "measured": round(1000 * float(statistics.median(measured)), 1),
        "ratio": round(float(statistics.median(ratios)), 3),
        "from": f"work {alone:.1f}, slower core {waiting:.1f}, all-reduce {all_reduce:.1f}",
        "rounds": " ".join(f"{ratio:.2f}" for ratio in ratios),
    }


def lost_row(world_size, results):
    """Steps lost by a kill, predicted and measured."""
    predicted = statistics.mean(p.lost for p, _ in results)
    lost = [life.lost for _, lives in results for life in lives]
    return {
        "ranks": world_size,
        "figure": "steps lost by a kill",
        "predicted": round(predicted, 2),
        "measured": round(statistics.mean(lost), 2),
        "ratio": round(predicted / statistics.mean(lost), 3) if any(lost) else None,
        "from": f"{len(lost)} kills",
        "rounds": " ".join(str(sum(life.lost for life in lives)) for _, lives in results),
    }


def bench_simulation(path="results/simulation-cpu.json", rounds=5, kills=3):
    """Runs both, prints a table and writes it. kills: of each number of ranks, in each round.

    Raises ValueError with fewer than two cores, and OSError if a run fails.
    """
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    if len(cores) < CORES:
        raise ValueError(f"needs {CORES} CPU cores, and there is {len(cores)}")
    os.sched_setaffinity(0, cores)  # the ranks inherit it
    generator = np.random.default_rng(0)
    gaps = {n: kill_moments(rounds, kills, np.random.default_rng(n)) for n in WORLD_SIZES}
    library = sysconfig.get_paths()["stdlib"]
    sources = [os.path.join(library, name) for name in ("asyncio", "email", "json", "unittest")]
    results = []
    total = rounds * (1 + kills * len(WORLD_SIZES))
    with tempfile.TemporaryDirectory() as directory:
        data = os.path.join(directory, "corpus")
        prepare(sources, data, vocab_size=600)
        with tqdm(total=total, desc="real runs", unit="part") as bar:
            for i in range(rounds):
                of_round = {n: gaps[n][i] for n in WORLD_SIZES}
                results.append(one_round(data, directory, of_round, generator, bar))

    rows = []
    for world_size in WORLD_SIZES:
        of_size = [by_size[world_size] for by_size in results]
        rows += [step_row(world_size, of_size), lost_row(world_size, of_size)]
    report(path, "simulation", rows, repetitions=rounds, flags=FLAGS, pairs_of_a_rank=SHARE)
    return rows


def main():
    """The command line."""
    argparse.ArgumentParser(
        prog="python -m bench.simulation", description="Compare simulated runs with real ones."
    ).parse_args()
    bench_simulation()


if __name__ == "__main__":
    run_command(main)
