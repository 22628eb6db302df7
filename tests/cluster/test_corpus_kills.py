"""Kills while many tasks make a corpus: a process of a task, a node, the driver.

After each, the same command goes on, and in the end the files are those of a run that nobody
disturbed. `pytest -s` prints what was killed when, and what was said.
"""

import os
import random
import signal
import time
from typing import NamedTuple

import pytest

from cluster import corpus_runs
from cluster.corpus_runs import EXECUTORS, descendants, done, environment_of, files_of

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

KILLS = 10  # for each executor
TASKS = 3
ALL_TASKS = 4 * TASKS + 25 + 1  # of all jobs


class Kill(NamedTuple):
    """What was killed, and when."""

    victim: str
    moment: int  # tasks that were done


class Local:
    """Tasks in processes of the driver."""

    victims = ("driver", "process")

    def __init__(self, request):
        self.environment = environment_of(request, "local")

    def task_processes(self, driver):
        """The processes that run tasks, by their number."""
        return [pid for pid, words in descendants(driver.pid).items() if "spawn_main" in words]

    def restore(self):
        """Makes everything as it was before a kill."""


class Ray:
    """Tasks in processes of Ray's, on a head and another node."""

    victims = ("driver", "process", "node")

    def __init__(self, request):
        self.environment = environment_of(request, "ray")
        self.cluster = request.getfixturevalue("ray_cluster")
        self.node = 1  # the one that may be killed
        self.is_killed = False

    def task_processes(self, driver):
        found = {}
        for node in self.cluster.nodes:
            if node.alive():
                found |= descendants(node.process.pid)
        return [pid for pid, words in found.items() if words.startswith("ray::run_task")]

    def kill_node(self):
        self.cluster.kill_node(self.node)
        self.is_killed = True

    def restore(self):
        if self.is_killed:
            self.cluster.wait_for_nodes(1)
            self.node = self.cluster.add_node()
            self.is_killed = False


class Slurm:
    """Tasks in jobs of Slurm, on two nodes."""

    victims = ("driver", "process", "node")

    def __init__(self, request):
        self.environment = environment_of(request, "slurm")
        self.cluster = request.getfixturevalue("slurm")
        self.killed = None

    def tasks_on(self, name):
        node = self.cluster.nodes[name]
        found = descendants(node.process.pid) if node.alive() else {}
        return [
            pid
            for pid, words in found.items()
            if "launch_pickled_pipeline" in words and "srun" not in words
        ]

    def task_processes(self, driver):
        return [pid for name in self.cluster.names for pid in self.tasks_on(name)]

    def kill_node(self):
        self.killed = max(self.cluster.names, key=lambda name: len(self.tasks_on(name)))
        self.cluster.kill_node(self.killed)

    def restore(self):
        if self.killed:
            self.cluster.bring_back(self.killed)
            self.killed = None


def strike(place, victim, driver, generator):
    """Kills a victim. False if there is none of its kind at this moment."""
    if victim == "driver":
        driver.kill()
        return True
    processes = place.task_processes(driver)
    if not processes:
        return False
    if victim == "node":
        place.kill_node()
    else:
        os.kill(generator.choice(sorted(processes)), signal.SIGKILL)
    return True


def disturbed(place, victim, command, moment, delay, generator):
    """Kills a victim once so many tasks are done, or later. Returns (`Ended`, Kill or None)."""
    out = command["out"]
    driver = corpus_runs.start(command, place.environment)
    kill = None
    if victim and corpus_runs.wait_until(lambda: done(out) >= moment, driver):
        time.sleep(delay)
        while driver.poll() is None and kill is None:
            moment = done(out)
            children = descendants(driver.pid)
            if strike(place, victim, driver, generator):
                kill = Kill(victim, moment)
    ended = corpus_runs.ended(driver)
    if kill and victim == "driver":
        assert ended.status == -signal.SIGKILL
        corpus_runs.wait_for_end(children)
    return ended, kill


@pytest.mark.parametrize("executor", EXECUTORS)
def test_kills_at_ten_random_moments(request, tmp_path, embedded, here, executor):
    options, _ = embedded
    place = {"local": Local, "ray": Ray, "slurm": Slurm}[executor](request)
    expected = files_of(here(TASKS))
    victims = [place.victims[k % len(place.victims)] for k in range(KILLS)]
    generator = random.Random(0)
    print(f"\n{executor}: start, exit status, last words, victim, tasks done of {ALL_TASKS}")
    corpora = 0  # that are complete
    starts = 0  # of the command, for the corpus that is being made
    while victims or starts:
        out = str(tmp_path / str(corpora))
        command = options | {"out": out, "executor": executor, "tasks": TASKS}
        moment = min(done(out) + generator.randrange(8), ALL_TASKS - 1)
        delay = generator.uniform(0, 0.3)  # seconds
        victim = victims[0] if victims else None
        ended, kill = disturbed(place, victim, command, moment, delay, generator)
        starts += 1
        print(executor, starts, *ended, *(kill or ()), sep=", ", flush=True)
        if kill:
            victims.pop(0)
        place.restore()
        if os.path.exists(os.path.join(out, "meta.json")):
            assert files_of(out) == expected
            corpora += 1
            starts = 0
        assert starts < 3 * KILLS
