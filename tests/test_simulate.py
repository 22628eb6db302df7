"""Simulated runs: against formulas, against the same run drawn number by number, and real ones."""

import json
import math
import os

import numpy as np
import pytest
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st

from bench.simulation import bench_simulation, kill_moments
from training import simulate
from training.simulate import SimulationConfig, run_through, slowest

SECONDS = st.floats(0.01, 10)


def generator(seed=0):
    return np.random.default_rng(seed)


@given(steps=st.integers(1, 100), save_every=st.integers(1, 50), save=st.floats(0, 10))
def test_an_undisturbed_run_takes_its_steps_and_its_saves(steps, save_every, save):
    run = run_through(np.full(steps, 0.25), save_every, save, math.inf, 60.0, generator())
    saves = math.ceil(steps / save_every)  # the last step is saved, too
    assert math.isclose(run.seconds, steps * 0.25 + saves * save)
    assert run[1:] == (0.25, saves, 0, 0.0, 0)


@given(
    times=st.lists(SECONDS, min_size=1, max_size=30),
    ranks=st.integers(1, 1000),
    seed=st.integers(0, 99),
)
def test_the_slowest_rank_is_one_that_was_measured(times, ranks, seed):
    assert set(slowest(times, ranks, 50, generator(seed))) <= set(times)
    assert set(slowest(times, ranks, 50, generator(seed), 1.0, 2.0)) <= {2 * t for t in times}


@pytest.mark.parametrize("stragglers, slow_down", [(0.0, 1.0), (0.03, 1.5), (1.0, 3.0)])
def test_the_slowest_rank_is_that_of_ranks_drawn_one_by_one(stragglers, slow_down):
    """Two samples of n, compared by Kolmogorov's distance: it exceeds 1.95 sqrt(2/n) in 1 of 1,000.

    The distance of distributions with steps, as here, is smaller still. The seeds are fixed.
    """
    n = 4000
    times = generator(1).lognormal(0.0, 0.2, 200)
    drawn = generator(2).choice(times, (n, 8))
    drawn *= np.where(generator(3).random((n, 8)) < stragglers, slow_down, 1.0)
    naive = np.sort(drawn.max(axis=1))
    ours = np.sort(slowest(times, 8, n, generator(4), stragglers, slow_down))
    places = np.union1d(naive, ours)
    below = [np.searchsorted(sample, places, side="right") / n for sample in (naive, ours)]
    assert np.abs(below[0] - below[1]).max() < 1.95 * math.sqrt(2 / n)


def test_more_ranks_and_slower_stragglers_take_longer():
    """Steps of one seed: more ranks raise the same random number to a smaller power."""
    times = generator(1).lognormal(0.0, 0.2, 200)
    by_ranks = [slowest(times, ranks, 500, generator()) for ranks in (1, 2, 8, 64, 512)]
    assert all(np.all(few <= many) for few, many in zip(by_ranks, by_ranks[1:]))
    by_factor = [slowest(times, 8, 500, generator(), 0.1, factor) for factor in (1, 2, 4)]
    assert all(np.all(quick <= slow) for quick, slow in zip(by_factor, by_factor[1:]))


def test_a_run_with_failures_takes_the_expected_time():
    """With M between failures, (M + R) (exp(L / M) - 1) for each L seconds up to a checkpoint.

    (A try succeeds with probability exp(-L / M), and M seconds of running bring one failure.) The
    time of one segment deviates by less than its mean plus R, so that the mean of 2,000 is within
    5 % of it: 2 standard deviations and more.
    """
    step, save_every, save, mtbf, restart = 1.0, 10, 2.0, 15.0, 4.0
    run = run_through(np.full(20_000, step), save_every, save, mtbf, restart, generator())
    segment = save_every * step + save
    expected = 2000 * (mtbf + restart) * math.expm1(segment / mtbf)
    assert abs(run.seconds / expected - 1) < 0.05
    assert math.isclose(run.seconds, 2000 * segment + run.lost_seconds + run.failures * restart)
    assert run.lost_steps * step <= run.lost_seconds <= run.failures * segment


def test_lost_steps_are_counted_whole():
    """One failure, 3.5 steps behind the checkpoint of step 4, whose save ends at 4 + 1 s."""

    class Moments:
        def __init__(self):
            self.gaps = iter([8.5, math.inf])

        def exponential(self, _):
            return next(self.gaps)

    run = run_through(np.ones(12), 4, 1.0, 1e9, 5.0, Moments())
    assert run == (15 + 3.5 + 5, 1.0, 3, 1, 3.5, 3)


@pytest.mark.parametrize("save, mtbf", [(2.0, 20_000.0), (30.0, 30_000.0)])
def test_youngs_interval_is_the_best_of_many(save, mtbf):
    """The best of 21 intervals from a quarter of Young's to four times as long.

    C / T + T / 2 M is 2.5 % above its least at 1.25 T. The terms that Young leaves out are of the
    order of sqrt(2 C / M), here 1.4 and 4.5 %. The cost of 20,000 failures has an error of 0.7 %
    (1 / sqrt(20,000)), but the failures are the same for all intervals.
    """
    best = simulate.youngs_interval(save, mtbf)
    intervals = best * np.geomspace(1 / 4, 4, 21)
    costs = [simulate.simulated_cost(T, save, mtbf, 60.0, generator(), 20_000) for T in intervals]
    found = intervals[np.argmin(costs)]
    at_young = costs[10]
    assert 1 / 1.4 < found / best < 1.4
    assert at_young <= 1.025 * min(costs)
    assert abs(at_young / simulate.youngs_cost(best, save, mtbf, 60.0) - 1) < 0.07


@given(save=SECONDS, mtbf=st.floats(100, 1e6), factor=st.floats(1.01, 10))
def test_youngs_formula_is_least_at_youngs_interval(save, mtbf, factor):
    best = simulate.youngs_interval(save, mtbf)
    least = simulate.youngs_cost(best, save, mtbf, 5.0)
    assert least < simulate.youngs_cost(best * factor, save, mtbf, 5.0)
    assert least < simulate.youngs_cost(best / factor, save, mtbf, 5.0)


def test_intervals_that_never_end_cost_everything():
    assert simulate.simulated_cost(1e9, 1.0, 1.0, 1.0, generator(), failures=10) == math.inf


def test_the_command_prints_a_run(tmp_path):
    result = program("training.simulate", "--ranks", "16", "--steps", "5000", "--mtbf", "1")
    assert result.returncode == 0, result.stderr
    assert "16 ranks, 5,000 steps, a failure every 0.5 hours" in result.stdout
    assert "Young's interval" in result.stdout
    again = program("training.simulate", "--ranks", "16", "--steps", "5000", "--mtbf", "1")
    assert again.stdout == result.stdout

    # Steps as a run measured them. The first ones compile, and do not count.
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "tokens_per_second": speed} for step, speed in ((1, 1), (11, 2), (12, 3))
    ]
    lines.append({"step": 12, "mlm_loss": 5.0})  # an evaluation
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert np.allclose(simulate.relative_times(path), [1.2, 0.8])
    result = program("training.simulate", "--steps", "100", "--metrics", str(path))
    assert "ranks wait for the slowest 16.7%" in result.stdout  # 1 - 1 / 1.2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--ranks", "0"], "ranks must be at least 1"),
        (["--stragglers", "1.5"], "between 0 and 1"),
        (["--slow-down", "0.5"], "slow_down"),
        (["--mtbf", "0"], "mtbf"),
        (["--mtbf", "0.01"], "the run would not end"),
        (["--metrics", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--metrics", "README.md"], "README.md: damaged"),
        (["--metrics", os.devnull], "holds no tokens_per_second"),
    ],
)
def test_bad_arguments_are_refused(flags, words):
    assert_refused(program("training.simulate", *flags), words)


def test_many_ranks_and_steps_are_simulated_at_once():
    config = SimulationConfig(ranks=512, steps=100_000, stragglers=1e-4, mtbf=50.0)
    outcome, waiting = simulate.simulate(config)
    assert outcome.failures > 0 and 0 < waiting < 0.5


def test_kill_moments_cover_the_exponential_distribution():
    gaps = kill_moments(5, 3, generator())
    ordered = np.sort(gaps.ravel())
    edges = -np.log1p(-np.arange(15) / 15)
    assert np.all(ordered >= edges) and np.all(ordered[:-1] <= edges[1:])


@pytest.mark.slow
def test_real_runs_are_measured_beside_simulated_ones(tmp_path):
    """One round: that it ends and counts right. How well they agree is for a quiet machine."""
    path = str(tmp_path / "simulation.json")
    rows = bench_simulation(path, rounds=1, kills=2)
    assert [row["ranks"] for row in rows] == [2, 2, 4, 4]
    with open(path) as f:
        assert json.load(f)["rows"] == rows
    for row in rows:
        assert row["predicted"] > 0 and row["measured"] >= 0
