"""Runs of several processes, disturbed as a cluster does. The long form: tests/drills.py."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait

import drills
import pytest
import torch.distributed as dist
from conftest import ROOT, assert_refused, command

from training import ranks

pytestmark = pytest.mark.slow
ELASTIC = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    return drills.undisturbed(small_corpus, str(tmp_path_factory.mktemp("drills") / "undisturbed"))


@pytest.mark.parametrize(
    "way", ["kill rank 0", "SIGTERM while evaluating", "disk full", "checkpoint cut"]
)  # drills.py has all
def test_a_drill(small_corpus, tmp_path, undisturbed, way):
    drills.drill(small_corpus, str(tmp_path / "run [1]"), way, *undisturbed, random.Random(way))


@pytest.mark.parametrize("victim", [1, 2])
def test_the_rank_that_died_is_named_once(small_corpus, tmp_path, victim):
    """And no other, though of three ranks one waits for another that waits."""
    processes = drills.start(
        small_corpus, str(tmp_path / "run"), world_size=3, flags="--steps 100000"
    )
    wait_for_step(1, str(tmp_path / "run"), processes)
    processes[victim].kill()
    results = [result for rank, result in enumerate(drills.finish(processes)) if rank != victim]
    words = "\n".join(words for *_, words in results)
    assert [status for status, *_ in results] == [1, 1]
    assert (
        words.count("error:") == 1
        and f"rank {victim} of 3 is gone" in words
        and "Traceback" not in words
    ), words


def metrics_of(out):
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def wait_for_step(step, out, processes, log=None):
    """Waits for a checkpoint of this step or a later one. AssertionError if none comes."""
    deadline = time.time() + 200
    while not any(saved >= step for saved in drills.saved_steps(out)):
        assert time.time() < deadline and all(process.poll() is None for process in processes), (
            log and log.read_text()
        )
        time.sleep(0.01)


def test_one_run_on_any_number_of_ranks(small_corpus, tmp_path):
    """The same losses to 1e-5 over 50 steps on 1, 2 and 4 ranks, and on 4 that become 2."""
    flags = (
        "--steps 50 --save-every 10 --hidden-dropout-prob 0 --attention-probs-dropout-prob 0 "
        "--eval-every 25 --batch-size 9"
    )
    runs = {}
    for name, world_sizes in {"1": [1], "2": [2], "4": [4], "4, then 2": [4, 2]}.items():
        out = runs[name] = str(tmp_path / name)
        for i, world_size in enumerate(world_sizes):
            processes = drills.start(small_corpus, out, world_size=world_size, flags=flags)
            if len(world_sizes) == 2 and i == 0:
                wait_for_step(1, out, processes)
                for process in processes:
                    process.kill()
            results = drills.finish(processes)
        assert results[0][0] == 0, results
    for name in ("2", "4", "4, then 2"):
        lines = list(zip(metrics_of(runs["1"]), metrics_of(runs[name]), strict=True))
        assert len([a for a, _ in lines if "loss" in a]) == 50
        for a, b in lines:
            assert a.keys() == b.keys() and all(
                abs(a[k] - b[k]) <= 1e-5 * max(1, abs(a[k]))
                for k in a.keys() - {"tokens_per_second"}
            ), name


def test_a_rank_that_hangs_is_given_up(small_corpus, tmp_path):
    """The other ends after `--timeout`, with status 1 and one sentence."""
    processes = drills.start(
        small_corpus, str(tmp_path / "run"), flags="--timeout 6 --steps 100000"
    )
    wait_for_step(1, str(tmp_path / "run"), processes)
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.time()
    _, words = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and 5 < time.time() - begin < 30
    assert (
        "rank 1 of 2 is gone" in words and "Traceback" not in words and words.count("error:") == 1
    ), words
    processes[1].kill()
    processes[1].communicate()


def test_ranks_that_do_not_find_each_other(small_corpus, tmp_path):
    """One sentence and a status: for a variable that is missing, and a rank that never comes."""
    flags = [
        *drills.FLAGS.split(),
        "--data",
        small_corpus,
        "--out",
        str(tmp_path / "run"),
        "--timeout",
        "3",
    ]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(drills.free_port()),
    }
    refused = command("train.py", *flags, env=os.environ | {"RANK": "0"})
    assert_refused(refused, "LOCAL_RANK, WORLD_SIZE, MASTER_PORT, MASTER_ADDR must all be")
    for rank, words in (
        ("0", "rank 1 of 2 did not come"),
        ("1", "the ranks did not find each other at localhost:"),
    ):
        result = command("train.py", *flags, env=os.environ | alone | {"RANK": rank})
        assert (
            result.returncode == 1 and result.stderr.count("error:") == 1 and words in result.stderr
        ), result.stderr
        assert "Traceback" not in result.stderr


def test_a_store_that_outlives_its_ranks(monkeypatch):
    """torchrun keeps one store over restarts: ranks meet those of their own start only."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with ThreadPoolExecutor(6) as pool:
        for start, present in enumerate(
            ([1, 2], [0, 1], [0, 1, 2], [0, 1, 2])
        ):  # some die before all have met
            waiting = [
                pool.submit(
                    ranks.meet, "localhost", store.port, rank, 3, 60 if len(present) == 3 else 1
                )
                for rank in present
            ]
            if len(present) < 3:
                assert isinstance(waiting[0].exception(), RuntimeError) and wait(waiting)
                continue
            stores = [meeting.result() for meeting in waiting]
            stores[0].set("key", str(start))
            assert all(s.get("key") == str(start).encode() for s in stores)


def ranks_under(agent):
    """Process ids of the ranks that a torchrun started, the first rank first."""
    found = []
    with open(f"/proc/{agent}/task/{agent}/children") as f:
        for child in f.read().split():
            with open(f"/proc/{child}/environ") as environment:
                found += [
                    (int(entry[5:]), int(child))
                    for entry in environment.read().split("\0")
                    if entry.startswith("RANK=")
                ]
    return [child for _, child in sorted(found)]


@pytest.mark.cluster
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc to find the ranks")
def test_torchrun_carries_a_run_over_two_deaths(small_corpus, tmp_path, undisturbed):
    """`--max-restarts 3`: a rank is killed twice, and nobody lends a hand."""
    out, log = str(tmp_path / "run"), tmp_path / "log"
    launch = [
        *ELASTIC,
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "3",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ]
    command = [*launch, "train.py", *drills.FLAGS.split(), "--data", small_corpus, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as f:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT
        )
    try:
        for victim, step in ((1, 40), (0, 120)):
            wait_for_step(step, out, [process], log)
            os.kill(ranks_under(process.pid)[victim], signal.SIGKILL)
        assert process.wait(timeout=200) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait()
    assert log.read_text().count("is gone") == 2 and drills.equal(
        drills.ends_of(out), undisturbed[0]
    )


def ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces, joined by virtual Ethernet as two hosts are by a cable."""
    if not shutil.which("ip") or ip("netns", "add", "starencoder-a", check=False).returncode:
        pytest.skip("needs the right to make network namespaces, and the ip program")
    try:
        ip("netns", "add", "starencoder-b")
        ip(
            "link",
            "add",
            "se-a",
            "netns",
            "starencoder-a",
            "type",
            "veth",
            "peer",
            "name",
            "se-b",
            "netns",
            "starencoder-b",
        )
        for host, number in (("a", 1), ("b", 2)):
            ip(
                "-n",
                f"starencoder-{host}",
                "addr",
                "add",
                f"10.77.0.{number}/24",
                "dev",
                f"se-{host}",
            )
            for device in ("lo", f"se-{host}"):
                ip("-n", f"starencoder-{host}", "link", "set", device, "up")
        yield
    finally:
        for host in "ab":
            pids = ip("netns", "pids", f"starencoder-{host}", check=False).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", f"starencoder-{host}", check=False)


@pytest.mark.cluster
def test_two_hosts_one_of_them_cut_off(small_corpus, tmp_path, undisturbed, two_hosts):
    """`torchrun --nnodes 2` on both; the cable is pulled and put back; the end is the same."""
    out, log = str(tmp_path / "run"), tmp_path / "log"
    flags = [*drills.FLAGS.split(), "--data", small_corpus, "--out", out, "--timeout", "5"]

    def launch(host):
        torchrun = [
            *ELASTIC,
            "--nnodes",
            "2",
            "--nproc_per_node",
            "1",
            "--max-restarts",
            "3",
            "--rdzv_backend",
            "c10d",
            "--rdzv_id",
            "run",
        ]
        torchrun += [
            "--rdzv_endpoint",
            "10.77.0.1:29500",
            "--local_addr",
            f"10.77.0.{'ab'.index(host) + 1}",
        ]
        torchrun += [
            "--rdzv_conf",
            f"is_host={int(host == 'a')}",
        ]  # the two have one host name here, by which torchrun would know
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"se-{host}"}
        command = ["ip", "netns", "exec", f"starencoder-{host}", *torchrun, "train.py", *flags]
        with open(log, "a") as f:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT
            )

    hosts = [launch("a"), launch("b")]
    wait_for_step(60, out, hosts, log)
    ip("-n", "starencoder-b", "link", "set", "se-b", "down")
    time.sleep(12)
    ip("-n", "starencoder-b", "link", "set", "se-b", "up")
    deadline = time.time() + 300
    while time.time() < deadline and drills.saved_steps(out)[-1:] != [drills.STEPS]:
        for i, host in enumerate("ab"):
            if (
                hosts[i].poll() is not None
            ):  # a host whose torchrun gave up is started again, as a cluster's scheduler would
                hosts[i] = launch(host)
        time.sleep(1)
    for host in hosts:
        host.wait(timeout=60)
    assert drills.equal(drills.ends_of(out), undisturbed[0]), log.read_text()
