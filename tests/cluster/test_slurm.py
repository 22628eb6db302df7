"""Slurm's virtual nodes: what other tests rely on."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_job_runs_on_both_nodes(slurm):
    job = slurm.submit("#!/bin/bash\nsrun printenv SLURMD_NODENAME\n", "--nodes=2")
    slurm.wait_for_state(job, "COMPLETED")
    assert sorted(slurm.output(job).split()) == ["n1", "n2"]


def test_an_exit_status_is_the_jobs(slurm):
    job = slurm.submit("#!/bin/bash\nexit 3\n")
    slurm.wait_for_state(job, "FAILED")
    assert slurm.exit_status(job) == 3
