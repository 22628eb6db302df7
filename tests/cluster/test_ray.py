"""Ray's virtual nodes: what other tests rely on."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

# Prints on how many nodes two tasks ran that were there at the same time.
TWO_TASKS = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def node():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

print(len(set(ray.get([node.remote(), node.remote()]))))
"""


def test_tasks_run_on_both_nodes_and_a_node_comes_and_goes(ray_cluster):
    command = [sys.executable, "-c", TWO_TASKS, ray_cluster.address]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "2\n"
    ray_cluster.kill_node(1)
    ray_cluster.wait_for_nodes(1)
    ray_cluster.add_node()
    assert subprocess.run(command, capture_output=True, text=True).stdout == "2\n"
