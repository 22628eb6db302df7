"""Simulated runs beside real ones: the steps and the lost work of 2 and 4 ranks on 2 CPU cores.

    python -m bench simulation

`training/simulate.py` predicts; `train.py` runs, is killed at random moments, and is started again
by the same command. Nothing that a prediction uses comes from the runs that it is compared with:

    one rank's step    from runs of one rank, two at once, one to a core. The slowest of two cores
                       is what a step waits for. Of four ranks two share a core, which computes the
                       sum of two such steps.
    all-reduce         from runs of as many ranks with one pair each instead of 16: what a step of
                       theirs takes beyond the slowest of one-rank steps with one pair
    a save             from the runs of one rank
    kills              from the same distribution, but other draws

A step's time is the time between two lines of metrics.jsonl. The runs that are measured take turns
of about a second and are stopped (SIGSTOP) meanwhile, since a machine that others use changes its
speed. It must be quiet nevertheless: beside others' work four ranks get more of it than two do.
"""

import contextlib
import itertools
import os
import signal
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
from corpus.build import prepare
from training.run_directory import checkpoints, step_of
from training.simulate import run_through, slowest

CORES = 2
WORLD_SIZES = (2, 4)
SHARE = 16  # pairs of a rank in a step
SAVE_EVERY = 20  # steps
TURNS = 6  # of each run in a round
STEPS = 8  # of a turn
WARM_UP = 2  # steps at the beginning of a turn that do not count
DRAWS = 20_000  # simulated steps
FLAGS = (
    "--device cpu --dtype float32 --hidden-size 128 --num-hidden-layers 2 --num-attention-heads 4 "
    "--intermediate-size 512 --max-length 128 --hidden-dropout-prob 0 "
    "--attention-probs-dropout-prob 0 --warmup-steps 20 --eval-examples 2 --log-every 1 "
    f"--timeout 600 --workers 0 --eval-every 100000 --steps 100000 --save-every {SAVE_EVERY}"
)


# ---- real runs -----------------------------------------------------------------------------------


class RealRun:
    """The processes of a run, and the lines of its metrics.jsonl as they appear, one a step.

    Starts them in a new directory `out`, or again in that of a run that was killed. share: pairs of
    a rank. To be closed, which kills them.
    """

    def __init__(self, data, out, world_size=1, share=SHARE):
        self.path = os.path.join(out, "metrics.jsonl")
        self.log = f"{out}.log"
        self.before = self._inode()  # a start replaces the file, without the steps that are lost
        self.file = None
        self.done = 0  # steps
        self.moments = []  # when the newest of them were done
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        words = f"{FLAGS} --batch-size {world_size * share} --micro-batch-size {share}".split()
        command = [sys.executable, "train.py", *words, "--data", data, "--out", out]
        common = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        common |= {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        self.processes = []
        with open(self.log, "w") as log:
            for rank in map(str, range(world_size)):
                env = common | {"RANK": rank, "LOCAL_RANK": rank}
                process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
                self.processes.append(process)

    def _inode(self):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.path).st_ino

    def look(self):
        """Notes the lines that are new. Raises OSError if one of the processes has ended."""
        if any(process.poll() is not None for process in self.processes):
            with open(self.log) as f:
                raise OSError(f"a rank ended: {f.read().strip()[-200:]}")
        if self.file is None:
            if self._inode() in (None, self.before):
                return
            self.file = open(self.path, "rb")
            self.done = self.file.read().count(b"\n")
        self.note_lines()

    def note_lines(self):
        """Notes the lines that are new, in a file that is open."""
        count = self.file.read().count(b"\n")
        self.moments += [time.perf_counter()] * count
        self.done += count

    def send(self, number):
        """Sends a signal to all of its processes."""
        for process in self.processes:
            process.send_signal(number)

    def close(self):
        """Kills the processes."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def step_times(self):
        """Seconds of the steps since `moments` was cleared: those without and with a save."""
        times = np.diff(self.moments)[WARM_UP:]
        steps = self.done - len(times) + 1 + np.arange(len(times))
        saved = steps % SAVE_EVERY == 1  # the step before was saved
        return times[~saved], times[saved]


def watch(runs, enough, patience=120):
    """Notes the lines of runs until enough() is true. Raises OSError if that takes too long."""
    deadline = time.monotonic() + patience
    while not enough():
        for run in runs:
            run.look()
        if time.monotonic() > deadline:
            raise OSError(f"{runs[0].path}: not enough steps in {patience} s")
        time.sleep(0.002)


def take_turn(runs):
    """Lets stopped runs go on for some steps. Returns step times without, and with a save."""
    for run in runs:
        run.look()
        run.moments.clear()
        run.send(signal.SIGCONT)
    watch(runs, lambda: all(len(run.moments) > WARM_UP + STEPS for run in runs))
    for run in runs:
        run.send(signal.SIGSTOP)
    return [np.concatenate(times) for times in zip(*(run.step_times() for run in runs))]


def started(data, directory, closing):
    """The runs that are measured, stopped after their first steps: {(ranks, share): its runs}.

    One rank: as many runs at once as there are cores. closing: an ExitStack that closes them.
    """
    groups = {}
    kinds = list(itertools.product((1, *WORLD_SIZES), (1, SHARE)))
    for world_size, share in tqdm(kinds, desc="starting", unit="run"):
        runs = groups[world_size, share] = []
        for _ in range(CORES if world_size == 1 else 1):
            out = os.path.join(tempfile.mkdtemp(dir=directory), "run")
            run = RealRun(data, out, world_size, share)
            closing.callback(run.close)
            runs.append(run)
        take_turn(runs)
    return groups


def lost_to_a_kill(data, out, world_size, gap):
    """Starts, or continues, the run in `out`, and kills it `gap` seconds after its first step.

    Returns the number of steps that will be done twice, and the seconds of each step that was done.
    """
    with contextlib.closing(RealRun(data, out, world_size)) as run:
        watch([run], lambda: run.moments)
        end = run.moments[0] + gap
        watch([run], lambda: time.perf_counter() >= end)
    run.note_lines()  # that it still wrote
    lost = run.done - max(map(step_of, checkpoints(out)), default=0)
    return lost, np.diff(run.moments)


# ---- predictions ---------------------------------------------------------------------------------


def slowest_core(alone, world_size, generator):
    """Simulated seconds (DRAWS,) until the slower of the cores has computed its ranks' steps."""
    on_a_core = generator.choice(alone, (DRAWS, world_size // CORES)).sum(axis=1)
    return slowest(on_a_core, CORES, DRAWS, generator)


class Prediction(NamedTuple):
    """What the simulation says of a run, in seconds."""

    alone: float  # a core's work in a step
    waiting: float  # what the slower core adds
    all_reduce: float
    step: float  # the sum of the three
    mtbf: float  # mean time between the kills
    lost: float  # seconds of work lost by a kill


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
    save = 0.0
    if len(with_save):  # by chance, no turn may have met one
        save = max(float(np.median(with_save) - np.median(alone)), 0.0)

    # Kills every ten steps on average. A kill in the first step after a start loses no whole step;
    # real kills come after it, so the simulated ones before it do not count.
    mtbf = step * SAVE_EVERY / 2
    run = run_through(steps, SAVE_EVERY, save, mtbf, 0.0, generator)
    lost = step * run.lost_steps / (run.failures * np.exp(-step / mtbf))
    return Prediction(core, step - all_reduce - core, all_reduce, step, mtbf, float(lost))


def kill_moments(rounds, kills, generator):
    """Random gaps (rounds, kills) of a Poisson process of mean 1, each from a stratum of its own.

    Strata cover the exponential distribution evenly, so that few kills show its mean.
    """
    strata = np.arange(rounds * kills).reshape(kills, rounds).T
    level = (strata + generator.random(strata.shape)) / strata.size
    return -np.log1p(-level)


# ---- the comparison ------------------------------------------------------------------------------


class Round(NamedTuple):
    """What came of a round for one number of ranks."""

    prediction: Prediction
    step: float  # median seconds
    lost: list  # seconds of work, kill by kill


def one_round(data, directory, groups, gaps, generator):
    """Yields (number of ranks, its `Round`). gaps: {number of ranks: (kills,)}, of mean 1."""
    turns = [{key: take_turn(runs) for key, runs in groups.items()} for _ in range(TURNS)]
    times = {}
    for key in groups:
        times[key] = [np.concatenate(parts) for parts in zip(*(turn[key] for turn in turns))]
    alone, with_save = times[1, SHARE]
    alone_small = times[1, 1][0]
    for world_size in WORLD_SIZES:
        small = times[world_size, 1][0]
        prediction = predict(alone, with_save, alone_small, small, world_size, generator)
        step = float(np.median(times[world_size, SHARE][0]))
        out = os.path.join(directory, f"killed-{world_size}")
        moments = gaps[world_size] * prediction.mtbf
        kills = [lost_to_a_kill(data, out, world_size, moment) for moment in moments]
        # Alone on the machine, these runs may be faster than those that took turns.
        seconds = np.concatenate([seconds for _, seconds in kills])
        a_step = float(np.median(seconds)) if len(seconds) else step
        yield world_size, Round(prediction, step, [steps * a_step for steps, _ in kills])


def step_row(world_size, rounds):
    """Steps, predicted and measured: medians over the `Round`s."""
    ratios = [one.prediction.step / one.step for one in rounds]
    predicted = [statistics.median(column) for column in zip(*(one.prediction for one in rounds))]
    alone, waiting, all_reduce, step = (1000 * seconds for seconds in predicted[:4])
    return {
        "ranks": world_size,
        "figure": "step (ms)",
        "predicted": round(step, 1),
        "measured": round(1000 * statistics.median(one.step for one in rounds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "from": f"work {alone:.1f}, slower core {waiting:.1f}, all-reduce {all_reduce:.1f}",
        "rounds": " ".join(f"{ratio:.2f}" for ratio in ratios),
    }


def lost_row(world_size, rounds):
    """The work that a kill costs, predicted and measured: means over all kills."""
    predicted = statistics.mean(one.prediction.lost for one in rounds)
    measured = statistics.mean(seconds for one in rounds for seconds in one.lost)
    return {
        "ranks": world_size,
        "figure": "work lost by a kill (ms)",
        "predicted": round(1000 * predicted, 1),
        "measured": round(1000 * measured, 1),
        "ratio": round(predicted / measured, 3) if measured else None,
        "from": f"{sum(len(one.lost) for one in rounds)} kills",
        "rounds": " ".join(f"{sum(one.lost):.1f} s" for one in rounds),
    }


def bench_simulation(path=None, rounds=5, kills=5):
    """Runs both, prints a table and writes it. kills: of each number of ranks, in each round.

    Raises ValueError with fewer than two cores, and OSError if a run fails.
    """
    every_core = os.sched_getaffinity(0)
    cores = sorted(every_core)[:CORES]
    if len(cores) < CORES:
        raise ValueError(f"needs {CORES} CPU cores, and there is {len(cores)}")
    generator = np.random.default_rng(0)
    gaps = {n: kill_moments(rounds, kills, np.random.default_rng(n)) for n in WORLD_SIZES}
    library = sysconfig.get_paths()["stdlib"]
    sources = [os.path.join(library, name) for name in ("asyncio", "email", "json", "unittest")]
    load = os.getloadavg()[0]  # of the minute before: says if the machine was quiet
    results = {n: [] for n in WORLD_SIZES}  # a `Round` for each round
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as closing:
        os.sched_setaffinity(0, cores)  # the ranks inherit it
        closing.callback(os.sched_setaffinity, 0, every_core)
        # SIGTERM ends this as Ctrl-C does, so that no stopped rank outlives this process.
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        closing.callback(signal.signal, signal.SIGTERM, handler)
        data = os.path.join(directory, "corpus")
        prepare(sources, data, vocab_size=600)
        groups = started(data, directory, closing)
        for i in tqdm(range(rounds), desc="real runs", unit="round"):
            of_round = {n: gaps[n][i] for n in WORLD_SIZES}
            for n, result in one_round(data, directory, groups, of_round, generator):
                results[n].append(result)

    rows = []
    for n in WORLD_SIZES:
        rows += [step_row(n, results[n]), lost_row(n, results[n])]
    facts = dict(repetitions=rounds, load=round(load, 1), pairs_of_a_rank=SHARE, flags=FLAGS)
    report(path, "simulation", rows, **facts)
    return rows
