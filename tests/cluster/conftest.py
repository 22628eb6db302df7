"""The clusters, started once for all tests that ask for them."""

import pytest

from cluster import ray_cluster as ray_module
from cluster import slurm_cluster as slurm_module


@pytest.fixture(scope="session")
def slurm():
    """A `SlurmCluster` of the nodes n1 and n2, which SLURM_CONF names while it runs."""
    missing = slurm_module.what_is_missing()
    if missing:
        pytest.skip(missing)
    with slurm_module.SlurmCluster() as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.conf)
        yield cluster


@pytest.fixture(scope="session")
def ray_cluster():
    """A `RayCluster` of a head and one more node."""
    missing = ray_module.what_is_missing()
    if missing:
        pytest.skip(missing)
    with ray_module.RayCluster() as cluster:
        yield cluster
