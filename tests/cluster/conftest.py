"""The clusters, started once for all tests that ask for them."""

import os

import pytest

import corpus
from cluster import corpus_runs
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


@pytest.fixture(scope="session")
def embedded(tmp_path_factory, small_corpus):
    """(options of `prepare`, a corpus that one machine has made with them)."""
    sources = corpus_runs.write_sources(tmp_path_factory.mktemp("sources") / "all")
    options = {"sources": sources, "tokenizer": small_corpus, "commits": True}
    options |= {"clean": True, "near_dedup": True, "part_bytes": 20_000}
    out = str(tmp_path_factory.mktemp("embedded") / "out")
    meta = corpus.prepare(out=out, **options)
    # There is something of everything to disagree about.
    assert len(meta["parts"]) >= 3 and meta["splits"]["validation"]["documents"] >= 5
    assert {"python", "c", "rust", "git-commits"} <= meta["languages"].keys()
    assert {"exact duplicate", "near duplicate", "empty", "not UTF-8"} <= meta["skipped"].keys()
    return options, out


@pytest.fixture(scope="session")
def here(embedded):
    """A function that makes this corpus with so many tasks on this machine, once each."""
    options, expected = embedded
    made = {}

    def make(tasks):
        if tasks not in made:
            made[tasks] = f"{expected}-{tasks}"
            named = {"out": made[tasks], "executor": "local", "tasks": tasks}
            assert corpus_runs.run(options | named, dict(os.environ)).status == 0
        return made[tasks]

    return make
