"""A Slurm of a few virtual nodes on this host: `python tests/cluster/slurm_cluster.py [NODES]`.

The command starts one and a shell in which `sbatch` and the like use it; the end of the shell is
its end. Everything lies in one temporary directory: configuration, state, logs, munge's key. It
needs Linux, root, and Debian's packages slurm-wlm and munge, whose services need not run.

A virtual node is a slurmd in a PID namespace: killing its first process kills all that it started,
at once and without a word, as a power cut would. A mount namespace gives it an /etc/hosts in which
the nodes' names resolve. What a node cannot show here: a network of its own, a clock of its own.
"""

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time

INSTALL = "apt-get install slurm-wlm munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "setpriv")
TRANSCRIPT = "CLUSTER_TRANSCRIPT"  # environment variable: a file for what happens, and when

# cred_expire is also how long a requeued job waits before it starts again: two minutes by default.
# A dead node is noticed after SlurmdTimeout and about one MessageTimeout: here within 20 seconds.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=86400
SchedulerParameters=sched_interval=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldLogFile={directory}/logs/slurmctld.log
SlurmdLogFile={directory}/logs/%n.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class VirtualNode:
    """A command in PID and mount namespaces of its own, with this /etc/hosts.

    hosts: the path of that file. log: the path of a file to which the command's output is added.
    environment: a dict, as for subprocess.Popen.
    """

    def __init__(self, command, hosts, log, environment):
        # The shell is the node's process 1, and adopts what loses its parent.
        script = 'mount --bind "$0" /etc/hosts && { "$@" & wait $!; }'
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # The node dies with the process that started it.
        words = ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", script, hosts, *command]
        with open(log, "a") as f:
            self.process = subprocess.Popen(
                words, env=environment, stdout=f, stderr=subprocess.STDOUT
            )

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        """kill -9 of all its processes. Returns once none is left."""
        if self.alive():
            # A namespace dies with its process 1, for whose end `unshare` waits.
            subprocess.run(["pkill", "-KILL", "-P", str(self.process.pid)])
        self.process.wait()


class SlurmCluster(contextlib.AbstractContextManager):
    """Slurm on virtual nodes n1, n2, ..., until the end of the `with` block.

    conf: the path of slurm.conf. environment: a dict, in which Slurm's commands find the cluster.
    Raises RuntimeError if it does not start.
    """

    def __init__(self, number_of_nodes=2):
        self.begin = time.monotonic()
        self.seen = {}  # {job: its state when it was last asked for}
        self.ends = contextlib.ExitStack()
        with self.ends:
            # Not below pytest's directory: a socket's path has at most 107 characters.
            made = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
            self.directory = self.ends.enter_context(made)
            self.conf = os.path.join(self.directory, "slurm.conf")
            self.hosts = os.path.join(self.directory, "hosts")
            self.environment = os.environ | {"SLURM_CONF": self.conf}
            self.names = [f"n{number + 1}" for number in range(number_of_nodes)]
            self.nodes = {}  # {name: VirtualNode}
            self._write_files()
            self._start()
            self.ends = self.ends.pop_all()  # it has started: the end comes later

    def __exit__(self, *_):
        self.ends.close()

    def _write_files(self):
        for name in ("munge", "state", "spool", "logs", "jobs"):
            os.mkdir(os.path.join(self.directory, name))
        for name in self.names:
            os.mkdir(os.path.join(self.directory, "spool", name))
        for name in ("", "munge"):
            os.chmod(os.path.join(self.directory, name), 0o755)  # munge insists
        key = os.path.join(self.directory, "munge", "key")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o400), "wb") as f:
            f.write(os.urandom(128))
        shutil.copy("/etc/hosts", self.hosts)
        with open(self.hosts, "a") as f:
            f.write(f"\n127.0.0.1 {' '.join(self.names)}\n")

        host = socket.gethostname().split(".")[0]
        ports = free_ports(1 + len(self.names))
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=4 RealMemory=16000"  # more or less than there are: nobody checks
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        values = {"host": host, "ports": ports, "directory": self.directory}
        with open(self.conf, "w") as f:
            f.write(CONFIGURATION.format(nodes="\n".join(lines), **values))

    def _start(self):
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{name}={self.directory}/munge/{file}" for name, file in files.items()]
        self._start_daemon("munged", "--foreground", *options)
        self.wait_for(
            lambda: os.path.exists(os.path.join(self.directory, "munge", "socket")),
            "munge's socket",
            seconds=20,
        )
        self._start_daemon("slurmctld", "-D")
        self.ends.callback(self._kill_nodes)
        for name in self.names:
            self._start_node(name)
        self.wait_for(self.all_idle, "all nodes idle", seconds=30)
        self.note(f"Slurm runs on {' '.join(self.names)}")

    def _start_daemon(self, program, *options):
        with open(os.path.join(self.directory, "logs", f"{program}.out"), "w") as f:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", program, *options],
                env=self.environment,
                stdout=f,
                stderr=subprocess.STDOUT,
            )
        self.ends.callback(stop, process)

    def _start_node(self, name):
        log = os.path.join(self.directory, "logs", f"{name}.out")
        command = ["slurmd", "-D", "-N", name]
        self.nodes[name] = VirtualNode(command, self.hosts, log, self.environment)

    def _kill_nodes(self):
        for node in self.nodes.values():
            node.kill()

    # ---- nodes -----------------------------------------------------------------------------------

    def kill_node(self, name):
        """kill -9 of a node's slurmd and of all that it started."""
        self.nodes[name].kill()
        self.note(f"{name} killed")

    def bring_back(self, name):
        """Starts a node that was killed, and waits until it takes jobs."""
        before = self._describe_node(name, "SlurmdStartTime")
        self._start_node(name)

        def is_back():
            known = self._describe_node(name, "SlurmdStartTime") != before
            return known and self.node_state(name) in ("IDLE", "MIXED", "ALLOCATED")

        self.wait_for(is_back, f"{name} is back")
        self.note(f"{name} is back")

    def node_state(self, name):
        """IDLE, ALLOCATED, DOWN, IDLE*, ALLOCATED+COMPLETING, ..., as Slurm sees the node."""
        return self._describe_node(name, "State")

    def _describe_node(self, name, what):
        return field(self.command("scontrol", "--oneliner", "show", "node", name), what)

    def all_idle(self):
        try:
            return all(self.node_state(name) == "IDLE" for name in self.names)
        except RuntimeError:  # slurmctld does not answer yet
            return False

    # ---- jobs ------------------------------------------------------------------------------------

    def submit(self, script, *options, directory=None, environment=None):
        """Submits the text of a batch script. Returns the job's number, a string.

        options: of sbatch. directory: where the script runs. environment: added to the script's.
        """
        jobs = os.path.join(self.directory, "jobs")
        path = os.path.join(jobs, f"{len(os.listdir(jobs))}.sh")
        with open(path, "w") as f:
            f.write(script)
        output = os.path.join(self.directory, "jobs", "%j.out")
        words = ["sbatch", "--parsable", f"--chdir={directory or jobs}", f"--output={output}"]
        job = self.command(*words, *options, path, environment=environment).strip()
        self.note(f"job {job} submitted")
        return job

    def output(self, job):
        """What a job has printed so far, as a terminal would show it."""
        path = os.path.join(self.directory, "jobs", f"{job}.out")
        if not os.path.exists(path):
            return ""
        with open(path, errors="replace", newline="") as f:
            return re.sub(r"[^\n]*\r", "", f.read())  # a progress bar writes over itself

    def state(self, job):
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, NODE_FAIL, ... Notes what has changed.

        job: a number, or the task of an array, as in 7_2.
        """
        text = self._describe_job(job)
        state = field(text, "JobState")
        seen = f"{state}, {field(text, 'Reason')}, restarts {field(text, 'Restarts')}"
        if self.seen.get(job) != seen:
            self.seen[job] = seen
            self.note(f"job {job}: {seen.replace(', None', '')}")
        return state

    def restarts(self, job):
        """How often a job was queued again."""
        return int(field(self._describe_job(job), "Restarts"))

    def exit_status(self, job):
        """The exit status of a job's script."""
        return int(field(self._describe_job(job), "ExitCode").split(":")[0])

    def signal(self, job, name):
        """Sends a signal to all steps of a job, as `#SBATCH --signal=NAME@SECONDS` does."""
        self.command("scancel", f"--signal={name}", job)
        self.note(f"job {job}: {name} sent")

    def wait_for_state(self, job, *states, seconds=180):
        """Waits until a job is in one of these states. AssertionError, with its output, if not."""
        wanted = " or ".join(states)
        self.wait_for(lambda: self.state(job) in states, f"job {job} {wanted}", seconds, job)

    def _describe_job(self, job):
        return self.command("scontrol", "--oneliner", "show", "job", job)

    # ---- what happened ---------------------------------------------------------------------------

    def wait_for(self, happened, words, seconds=60, job=None):
        """Waits until `happened()` is true. AssertionError, with the logs, if it does not come.

        words: what is waited for. job: one whose output may tell why it does not come.
        """

        def why():
            if job is None:
                return self.logs()
            return self.logs("slurmctld.log") + f"---- job {job}\n{self.output(job)}"

        wait_for(happened, words, seconds, why)

    def note(self, text):
        """Prints what happened, and adds it to the file that $CLUSTER_TRANSCRIPT names."""
        line = f"{time.monotonic() - self.begin:7.1f} s  {text}"
        print(line)
        if os.environ.get(TRANSCRIPT):
            with open(os.environ[TRANSCRIPT], "a") as f:
                f.write(line + "\n")

    def logs(self, *names, lines=30):
        """The last lines of these files of Slurm's and munge's, or of all: slurmctld.log, n1.log...

        ...and what the daemons printed before they had a log: n1.out, ...
        """
        directory = os.path.join(self.directory, "logs")
        parts = []
        for name in names or sorted(os.listdir(directory)):
            with open(os.path.join(directory, name), errors="replace") as f:
                parts.append(f"---- {name}\n" + "".join(f.readlines()[-lines:]))
        return "".join(parts)

    def command(self, *words, environment=None):
        """What a command of Slurm's prints. RuntimeError, with its last line, if it fails."""
        variables = self.environment | (environment or {})
        result = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
        if result.returncode:
            raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}")
        return result.stdout


def field(text, name):
    """The value of NAME=VALUE in what scontrol prints."""
    return re.search(rf"\b{name}=(\S*)", text).group(1)


def wait_for(happened, words, seconds, why):
    """Waits until `happened()` is true. AssertionError if it is not within these seconds.

    words: what is waited for. why: a function that returns what may tell why it did not come.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"{words}: not within {seconds} s\n{why()}")
        time.sleep(0.2)


def free_ports(number):
    """That many different ports which nothing listens on."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for s in sockets:
            s.bind(("localhost", 0))
        return [s.getsockname()[1] for s in sockets]


def stop(process):
    """Asks a process to end, and kills it if it has not in ten seconds."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def what_is_missing():
    """Why there can be no virtual nodes with Slurm here, in one line; None if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return f"needs root, and {INSTALL}"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} missing: {INSTALL}"
    return why_no_namespaces()


def why_no_namespaces():
    """Why no virtual node can be started here, in one line; None if it can."""
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        return "needs unshare and setpriv: apt-get install util-linux"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return "needs root, with the right to make namespaces" if tried.returncode else None


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="A Slurm on this host, and a shell that uses it.")
    parser.add_argument("nodes", nargs="?", type=int, default=2, help="default: 2")
    nodes = parser.parse_args().nodes
    missing = what_is_missing()
    if missing:
        parser.error(missing)
    with SlurmCluster(nodes) as slurm:
        print(f"export SLURM_CONF={slurm.conf}\nLogs: {slurm.directory}/logs; `exit` ends it.")
        subprocess.run([os.environ.get("SHELL", "bash")], env=slurm.environment)


if __name__ == "__main__":
    main()
