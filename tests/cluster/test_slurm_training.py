"""The Slurm script of training/README.md, run by Slurm: signals, dead nodes, bad arguments.

The script is read from the page. `script_for` lists all that is changed in it: what its reader must
fill in, and the size of the job.
"""

import os
import re
import sys

import drills
import pytest
from conftest import ROOT

from cluster.slurm_cluster import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SCRIPT = re.compile(r"^```\n(#!/bin/bash\n.*?)^```$", re.MULTILINE | re.DOTALL)
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED")


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    """What a run of four ranks leaves that neither Slurm nor anybody else touches."""
    out = str(tmp_path_factory.mktemp("slurm") / "undisturbed")
    return drills.undisturbed(small_corpus, out, world_size=4)[0]


def script_for(corpus, out, flags="", minutes=10, restarts=20):
    """The script for two virtual nodes without GPUs. flags: over drills.FLAGS."""
    with open(os.path.join(ROOT, "training", "README.md"), encoding="utf-8") as f:
        (script,) = SCRIPT.findall(f.read())
    replaced = {
        "--nodes=8": "--nodes=2",
        "--ntasks-per-node=8": "--ntasks-per-node=2",
        " --gpus-per-node=8": "",
        "--cpus-per-task=4": "--cpus-per-task=2",
        "--time=8:00:00": f"--time={minutes}",
        "USR1@120": "USR1@60",
        "29500": str(free_ports(1)[0]),
        "--wait=300": "--wait=20",
        "--preset starencoder": f"{drills.FLAGS} {flags}",
        "--data DIR": f"--data {corpus}",
        "--out RUN": f"--out {out}",
        "RUN/checkpoints/00100000.pt": f"{out}/checkpoints/{drills.STEPS:08d}.pt",
        "-ge 20": f"-ge {restarts}",
    }
    for words, others in replaced.items():
        assert script.count(words) == 1, f"{words} must stand in the script, and once"
        script = script.replace(words, others)
    return script


def submit(slurm, script, python=sys.executable):
    path = f"{os.path.dirname(python)}:{os.environ['PATH']}"
    return slurm.submit(script, directory=ROOT, environment={"PATH": path, "OMP_NUM_THREADS": "1"})


def wait_for_step(slurm, job, out, step):
    """Waits for a checkpoint of this step or a later one."""

    def is_saved():
        slurm.state(job)  # notes what has changed
        return any(saved >= step for saved in drills.saved_steps(out))

    slurm.wait_for(is_saved, f"step {step}", 200, job)
    slurm.note(f"step {drills.saved_steps(out)[-1]} is saved")


def wait_for_restart(slurm, job, number):
    """Waits until a job has been queued again for the `number`th time."""

    def is_queued_again():
        slurm.state(job)  # notes what has changed
        return slurm.restarts(job) >= number

    slurm.wait_for(is_queued_again, f"restart {number}", 120, job)


def assert_ends_like(undisturbed, slurm, job, out):
    """Waits for the end of a job, and compares what it leaves, bit for bit."""
    slurm.wait_for_state(job, *ENDS, seconds=240)
    assert slurm.state(job) == "COMPLETED", slurm.output(job)
    assert slurm.exit_status(job) == 0, slurm.output(job)
    assert drills.equal(drills.ends_of(out), undisturbed), slurm.output(job)
    slurm.note("the same bits as the undisturbed run")


def assert_goes_on_from_each_stop(slurm, job):
    """Each step after which a job stopped is one from which it went on."""
    words = slurm.output(job)
    stopped = re.findall(r"Stopped after step (\d+) of", words)
    went_on = re.findall(r"Continuing .* after step (\d+)\.", words)
    assert stopped and set(stopped) <= set(went_on), words


def test_nothing_happens(slurm, small_corpus, tmp_path, undisturbed):
    out = str(tmp_path / "run")
    job = submit(slurm, script_for(small_corpus, out))
    assert_ends_like(undisturbed, slurm, job, out)
    assert slurm.restarts(job) == 0, slurm.output(job)


def test_signals_make_it_save_and_queue_it_again(slurm, small_corpus, tmp_path, undisturbed):
    """The first is Slurm's own, to a job of two minutes, half a minute to a minute after its start.

    Signals reach all ranks, and the processes that make their batches.
    """
    out = str(tmp_path / "run")
    job = submit(slurm, script_for(small_corpus, out, "--timeout 300", minutes=2))
    # The run must last until then, on any CPU: it is stopped. Slurm wakes it to warn it.
    wait_for_step(slurm, job, out, drills.SAVE_EVERY)
    before = slurm.restarts(job)
    slurm.signal(job, "STOP")
    wait_for_restart(slurm, job, before + 1)
    slurm.command("scontrol", "update", f"jobid={job}", "timelimit=10")  # one warning is enough
    wait_for_step(slurm, job, out, 160)
    slurm.signal(job, "USR1")
    assert_ends_like(undisturbed, slurm, job, out)
    assert slurm.restarts(job) == before + 2, slurm.output(job)
    assert_goes_on_from_each_stop(slurm, job)


def test_nodes_die(slurm, small_corpus, tmp_path, undisturbed):
    """First the one that runs the script, then the other, which is back before Slurm notices."""
    out = str(tmp_path / "run")
    job = submit(slurm, script_for(small_corpus, out))
    wait_for_step(slurm, job, out, 60)
    slurm.kill_node("n1")
    slurm.wait_for_state(job, "PENDING")
    slurm.bring_back("n1")
    wait_for_step(slurm, job, out, 160)
    slurm.kill_node("n2")
    slurm.bring_back("n2")
    assert_ends_like(undisturbed, slurm, job, out)
    assert slurm.restarts(job) == 2, slurm.output(job)


def test_bad_arguments_are_not_queued_again(slurm, small_corpus, tmp_path):
    job = submit(slurm, script_for(small_corpus, str(tmp_path / "run"), "--steps none"))
    slurm.wait_for_state(job, *ENDS)
    assert slurm.state(job) == "FAILED" and slurm.exit_status(job) == 2, slurm.output(job)
    assert slurm.restarts(job) == 0 and "error: " in slurm.output(job)


def test_a_job_that_always_fails_is_given_up(slurm, small_corpus, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    job = submit(slurm, script_for(small_corpus, "never", restarts=1), str(python))
    slurm.wait_for_state(job, *ENDS)
    assert slurm.state(job) == "FAILED" and slurm.exit_status(job) == 1, slurm.output(job)
    assert slurm.restarts(job) == 1, slurm.output(job)
