"""A data-parallel run in a second: what slow ranks, failures and checkpoints cost it.

Every step lasts as long as its slowest rank, and then the gradients are summed:

    step = max over the ranks of the time of one rank's step + all-reduce

All ranks wait while a checkpoint is written. Machines fail at random moments (a Poisson process).
A failure costs the work since the last checkpoint, and the time to restart.

Let C be the seconds of a save, R those of a restart, and M the mean seconds between failures. To
save after every T seconds of work costs, for each second of work, about

    C / T + (T / 2 + R) / M

which is least for T = sqrt(2 C M): Young, A First Order Approximation to the Optimum Checkpoint
Interval, 1974. Daly, A Higher Order Estimate of the Optimum Checkpoint Interval, 2006, has more
terms, which matter once T is no longer small beside M.

`python -m training.simulate` prints a run, and what other intervals would cost. Left out: machines
that are slow for good, failures during a restart, and a step that takes another time when it is
done again. `python -m bench simulation` compares all of this with real runs.
"""

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.arguments import add_flags, check_fields, option
from common.command_line import CommandLine, run_command

GPUS_PER_MACHINE = 8
# Llama Team, The Llama 3 Herd of Models, 2024, section 3.3.4: 419 unexpected interruptions in 54
# days on 16,384 GPUs. That is one in 6,335 hours for each machine of 8.
MACHINE_MTBF = 54 * 24 * (16_384 / GPUS_PER_MACHINE) / 419  # hours
MOST_TRIES = 150  # failures between two checkpoints, on average: more is no run
WARM_UP = 10  # steps of a measured run that compile kernels, and do not count


@dataclass
class SimulationConfig:
    """A run to simulate. The defaults are the published run's, as `--plan 64xA100` has them."""

    ranks: int = option(64, "GPUs, 8 to a machine")
    steps: int = option(100_000, "steps of the run")
    step_seconds: float = option(0.33, "mean seconds of a step on one rank alone", least=1e-6)
    metrics: str = option(
        "", "metrics.jsonl of a run on one rank with --log-every 1: steps vary as they do there"
    )
    stragglers: float = option(0.0, "probability that a rank is slow in a step")
    slow_down: float = option(2.0, "how many times as long a slow rank takes", least=1)
    all_reduce_seconds: float = option(0.0, "what summing the gradients adds to a step")
    save_every: int = option(1000, "steps between checkpoints")
    save_seconds: float = option(2.0, "seconds for which a save stops all ranks")
    restart_seconds: float = option(600.0, "seconds from a failure to the next step")
    mtbf: float = option(
        round(MACHINE_MTBF), "mean hours between failures of one machine", least=1e-6
    )
    seed: int = option(0, "of all random draws", least=0)

    def __post_init__(self):
        check_fields(self)
        if self.stragglers > 1:
            raise ValueError(f"stragglers must lie between 0 and 1, got {self.stragglers}")

    @property
    def seconds_between_failures(self):
        """The mean over the whole run, in which any of its machines may fail."""
        return self.mtbf * 3600 / math.ceil(self.ranks / GPUS_PER_MACHINE)


class Outcome(NamedTuple):
    """What became of a run."""

    seconds: float  # from its start to its end
    mean_step: float  # seconds
    saves: int  # of an undisturbed run
    failures: int
    lost_seconds: float  # of work and saves that had to be done again
    lost_steps: int  # that were done twice


# ---- the formula ---------------------------------------------------------------------------------


def youngs_interval(save, mtbf):
    """The best seconds of work between two saves. save, mtbf: seconds, of the whole run."""
    return math.sqrt(2 * save * mtbf)


def youngs_cost(interval, save, mtbf, restart):
    """Seconds lost for each second of work, by the formula above. All arguments in seconds."""
    return save / interval + (interval / 2 + restart) / mtbf


def simulated_cost(interval, save, mtbf, restart, generator, failures=100_000):
    """The same, from so many simulated failures. Infinite if no checkpoint is ever reached."""
    # After a restart the run stands at a checkpoint. The next failure comes `gaps` seconds later,
    # and only whole intervals with their saves count.
    gaps = generator.exponential(mtbf, failures)  # (failures,)
    work = interval * (gaps // (interval + save)).sum()
    return (gaps + restart).sum() / work - 1 if work else math.inf


# ---- the run -------------------------------------------------------------------------------------


def slowest(times, ranks, steps, generator, stragglers=0.0, slow_down=1.0):
    """The seconds (steps,) that the slowest rank takes in each step.

    times: measured seconds of one rank's steps, from which each rank draws. stragglers: the
    probability that a rank takes slow_down times as long.
    """
    times = np.sort(np.asarray(times, np.float64))
    slow_ranks = generator.binomial(ranks, stragglers, steps)  # (steps,)
    ordinary = _largest(times, ranks - slow_ranks, generator)
    slow = slow_down * _largest(times, slow_ranks, generator)
    return np.maximum(ordinary, slow)


def _largest(times, counts, generator):
    """The largest of counts[i] draws from sorted times, for each i; 0 where counts[i] is 0.

    One random number does for all of them: the largest of n uniform ones is below x with
    probability x^n, as U^(1/n) is.
    """
    level = generator.random(len(counts)) ** (1 / np.maximum(counts, 1))  # in [0, 1)
    # A power so close to 1 that it is rounded up would lie one behind the end.
    places = np.minimum((level * len(times)).astype(np.int64), len(times) - 1)
    return np.where(counts > 0, times[places], 0.0)


def run_through(steps, save_every, save, mtbf, restart, generator):
    """The `Outcome` of a run. steps: (steps,) seconds of each. The others are seconds as well.

    Raises ValueError for a run that would hardly ever reach its next checkpoint.
    """
    # The clock of an undisturbed run. The last step is saved, too.
    saved = np.arange(1, len(steps) + 1) % save_every == 0  # (steps,) bool
    saved[-1] = True
    clock = np.cumsum(steps + save * saved)  # when each step is over, with its save
    computed = clock - save * saved  # when each step is computed
    checkpoints = np.concatenate([[0.0], clock[saved]])
    check_progress(np.diff(checkpoints).mean(), mtbf)

    # Each failure puts the clock back to the last checkpoint.
    failures = 0
    lost_seconds = 0.0
    lost_steps = 0
    position = 0.0
    with tqdm(total=len(steps), desc="simulating", unit="step", delay=2) as bar:
        while True:
            moment = position + generator.exponential(mtbf)
            if moment >= clock[-1]:
                break
            position = checkpoints[np.searchsorted(checkpoints, moment, side="right") - 1]
            first = int(np.searchsorted(clock, position, side="right"))  # step to be done again
            failures += 1
            lost_seconds += moment - position
            lost_steps += int(np.searchsorted(computed, moment, side="right")) - first
            bar.update(first - bar.n)
    seconds = clock[-1] + lost_seconds + failures * restart
    return Outcome(seconds, steps.mean(), len(checkpoints) - 1, failures, lost_seconds, lost_steps)


def check_progress(interval, mtbf):
    """Raises ValueError if failures come too often. interval: seconds between two checkpoints."""
    # A failure-free stretch of L seconds has probability exp(-L / M), so it takes exp(L / M) tries.
    if interval / mtbf > math.log(MOST_TRIES):
        words = f"a failure every {mtbf:,.0f} s, but a checkpoint only after {interval:,.0f} s"
        raise ValueError(f"{words}: the run would not end; save more often")


def simulate(config):
    """The `Outcome` of a run, and the share of the ranks' time that is spent waiting for others.

    Raises ValueError or OSError if the metrics cannot be read, or if the run would not end.
    """
    generator = np.random.default_rng(config.seed)
    times = config.step_seconds * relative_times(config.metrics)
    slowest_rank = slowest(
        times, config.ranks, config.steps, generator, config.stragglers, config.slow_down
    )
    one_rank = times.mean() * (1 + config.stragglers * (config.slow_down - 1))
    waiting = 1 - one_rank / slowest_rank.mean()
    outcome = run_through(
        slowest_rank + config.all_reduce_seconds,
        config.save_every,
        config.save_seconds,
        config.seconds_between_failures,
        config.restart_seconds,
        generator,
    )
    return outcome, waiting


def relative_times(path):
    """How long the steps of a metrics.jsonl took for each token, with mean 1; [1] without a path.

    Raises ValueError that names the file if it holds no speeds.
    """
    if not path:
        return np.ones(1)
    try:
        with open(path, encoding="utf-8") as f:
            lines = [json.loads(line) for line in f]
        steps = [line for line in lines if "tokens_per_second" in line and line["step"] > WARM_UP]
        times = 1 / np.array([line["tokens_per_second"] for line in steps], np.float64)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: damaged (not lines of a metrics.jsonl)") from None
    if not len(times) or not np.all((0 < times) & np.isfinite(times)):
        raise ValueError(f"{path}: holds no tokens_per_second of steps after the first {WARM_UP}")
    return times / times.mean()


# ---- the command line ----------------------------------------------------------------------------


def describe(config):
    """The simulated run, and other intervals between checkpoints beside Young's, as text."""
    outcome, waiting = simulate(config)
    mtbf = config.seconds_between_failures
    hours = outcome.seconds / 3600
    saves = outcome.saves * config.save_seconds
    restarts = outcome.failures * config.restart_seconds
    share = (saves + outcome.lost_seconds + restarts) / outcome.seconds
    lines = [
        f"{config.ranks} ranks, {config.steps:,} steps, a failure every {mtbf / 3600:,.1f} hours",
        f"  the whole run   {hours:,.2f} hours, {share:.2%} of it saves and failures",
        f"  step            {outcome.mean_step:.4f} s; ranks wait for the slowest {waiting:.1%} "
        "of their time",
        f"  saves           {outcome.saves:,}, {saves:,.0f} s in all",
        f"  failures        {outcome.failures}: {outcome.lost_seconds:,.0f} s of work lost "
        f"({outcome.lost_steps:,} steps), {restarts:,.0f} s of restarts",
    ]
    if not config.save_seconds:
        return "\n".join(lines)  # saves that cost nothing have no best interval

    # The same failures for every interval, so that their chance does not decide.
    best = youngs_interval(config.save_seconds, mtbf)
    lines.append("  lost, if a checkpoint is written every")
    for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        facts = (best * factor, config.save_seconds, mtbf, config.restart_seconds)
        simulated = simulated_cost(*facts, np.random.default_rng(config.seed))
        name = "  Young's interval" if factor == 1 else ""
        lines.append(
            f"    {best * factor / outcome.mean_step:9,.0f} steps   simulated {simulated:7.3%}, "
            f"by the formula {youngs_cost(*facts):7.3%}{name}"
        )
    return "\n".join(lines)


def main(argv=None):
    """The command line."""
    parser = CommandLine(
        prog="python -m training.simulate",
        description="Simulate a data-parallel run: slow ranks, failures, checkpoints.",
    )
    add_flags(parser, SimulationConfig, "default")
    print(describe(SimulationConfig(**vars(parser.parse_args(argv)))))


if __name__ == "__main__":
    run_command(main)
