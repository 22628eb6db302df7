"""A Ray cluster of virtual nodes on this host; see slurm_cluster.py for what such a node is."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile

from cluster.slurm_cluster import VirtualNode, free_ports, wait_for, why_no_namespaces

INSTALL = "pip install ray"
STORE = 80_000_000  # bytes of shared memory that a node holds objects in; Ray's least is 75 MiB
PROGRAM = os.path.join(os.path.dirname(sys.executable), "ray")

# Prints how many nodes are alive.
COUNT = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
"""


class RayCluster(contextlib.AbstractContextManager):
    """Ray on a head and further nodes, each with one CPU, until the end of the `with` block.

    address: HOST:PORT, for ray.init(address=...) and $RAY_ADDRESS. nodes: VirtualNodes, the head
    first. Raises AssertionError if it does not start.
    """

    def __init__(self, number_of_nodes=2):
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.nodes = []
        self.ends = contextlib.ExitStack()
        with self.ends:
            # Not below pytest's directory: a socket's path has at most 107 characters.
            made = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            self.directory = self.ends.enter_context(made)
            self.ends.callback(self._kill_nodes)
            port = self.address.split(":")[1]
            head = ["--head", "--port", port, "--temp-dir", self.directory]
            self._start_node(*head, "--include-dashboard", "false", "--disable-usage-stats")
            self.wait_for_nodes(1)
            for _ in range(number_of_nodes - 1):
                self.add_node()
            self.ends = self.ends.pop_all()  # it has started: the end comes later

    def __exit__(self, *_):
        self.ends.close()

    def add_node(self):
        """Starts another node, and waits until the cluster has it. Returns its number."""
        before = self.count()
        self._start_node("--address", self.address)
        self.wait_for_nodes(before + 1)
        return len(self.nodes) - 1

    def kill_node(self, number):
        """kill -9 of all processes of a node. The head is number 0."""
        self.nodes[number].kill()

    def kill_head(self):
        """kill -9 of the head, and with it of the cluster's memory of what is where."""
        self.kill_node(0)

    def count(self):
        """How many nodes are alive; 0 if the head does not answer."""
        words = [sys.executable, "-c", COUNT, self.address]
        try:
            result = subprocess.run(words, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return 0
        # Ray may print to the same place that a node has died.
        numbers = re.findall(r"^\d+$", result.stdout, re.MULTILINE)
        return int(numbers[0]) if numbers and result.returncode == 0 else 0

    def wait_for_nodes(self, number, seconds=120):
        """Waits until so many nodes are alive. A dead one counts until Ray has noticed."""
        wait_for(lambda: self.count() == number, f"{number} nodes of Ray", seconds, self.logs)

    def logs(self):
        """What the nodes have printed."""
        with open(os.path.join(self.directory, "nodes.out"), errors="replace") as f:
            return f.read()

    def _start_node(self, *options):
        limits = ["--num-cpus", "1", "--object-store-memory", str(STORE)]
        command = [PROGRAM, "start", "--block", *limits, *options]
        log = os.path.join(self.directory, "nodes.out")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.nodes.append(VirtualNode(command, "/etc/hosts", log, environment))

    def _kill_nodes(self):
        for node in self.nodes:
            node.kill()


def what_is_missing():
    """Why there can be no Ray cluster here, in one line; None if there can."""
    if not shutil.which(PROGRAM):
        return f"ray missing: {INSTALL}"
    return why_no_namespaces()
