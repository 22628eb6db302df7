"""Runs jobs one after the other: here, on a Ray cluster, or on Slurm.

Here and on Ray a task is one call of datatrove's executor in a process of its own, since the pools
of datatrove's own executors wait for ever for a process that was killed. On Slurm it is datatrove's
executor that submits an array for each job; we wait for its end, and say what failed.

References: datatrove's LocalPipelineExecutor and SlurmPipelineExecutor; sbatch(1), squeue(1).
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from tqdm import tqdm

from common.command_line import first_line
from common.files import read_json, remove_quietly, write_whole
from corpus.encode import end_with_parent
from corpus.store import allow_open_files

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5  # how often the folder of a job is looked at,
LOOK_SECONDS = 10.0  # and how often whether it still runs
LATE_SECONDS = 5.0  # how late a shared folder may be, or the end of a process
RAY_SECONDS = 60.0  # how long Ray is waited for: it tries a wrong address for minutes
RAY_RETRIES = 3  # of a task whose process or node died
OPEN_FILES = 4096  # of a task: up to 3 for each of 1,000 tasks, while duplicates are looked for
LONGEST_ERROR = 1000  # characters of a task's error, which may begin with long paths
GOES_ON = "the same command goes on from here"


class NoCluster(ValueError):
    """No task was started."""


class Job:
    """A pipeline of datatrove, the number of its tasks, and the folder of what is known of them."""

    def __init__(self, name, tasks, steps, folder):
        self.name = name
        self.tasks = tasks
        self.steps = steps
        self.folder = folder

    def missing(self):
        """The tasks that are not done."""
        done = set()
        with contextlib.suppress(FileNotFoundError):
            done = set(os.listdir(os.path.join(self.folder, "completions")))
        return [task for task in range(self.tasks) if f"{task:05d}" not in done]

    def note(self, task):
        """What a task has noted: "seconds", "cpu_seconds", "peak_memory" in bytes, "error"."""
        try:
            return read_json(note_path(self.folder, task))
        except FileNotFoundError:
            return {}

    def failure(self, words):
        """The error to raise if a task failed. words: what is known if none has left a note."""
        missing = self.missing()
        if not missing:  # what failed came after the last task: its note, on a full disk
            return ValueError(f"{self.name}: {words}; {GOES_ON}")
        errors = [(task, self.note(task).get("error")) for task in missing]
        task, error = ([pair for pair in errors if pair[1]] or [(missing[0], words)])[0]
        return ValueError(f"{self.name}, task {task}: {error}; {GOES_ON}")


def note_path(folder, task):
    """The file with what a task has noted."""
    return os.path.join(folder, "notes", f"{task:05d}.json")


class Noting:
    """For an executor of datatrove: its tasks note what they took, or why they failed."""

    def _run_for_rank(self, rank, *arguments, **options):
        self.begin = time.perf_counter()
        self.busy = time.process_time()
        allow_open_files(OPEN_FILES)
        try:
            return super()._run_for_rank(rank, *arguments, **options)
        except Exception as error:
            with contextlib.suppress(OSError):  # the disk may be full, which is the error then
                self.write_note(rank, error=first_line(error, LONGEST_ERROR))
            raise

    def mark_rank_as_completed(self, rank):
        """Called by datatrove at the end of a task that was done."""
        self.write_note(rank)  # first, as whoever waits for the mark reads the note
        super().mark_rank_as_completed(rank)

    def write_note(self, rank, **note):
        """Writes what a task has taken so far."""
        note["seconds"] = round(time.perf_counter() - self.begin, 2)
        note["cpu_seconds"] = round(time.process_time() - self.busy, 2)
        note["peak_memory"] = peak_memory()
        write_whole(note_path(self.logging_dir.path, rank), json.dumps(note))


def peak_memory():
    """The most bytes that this process has held so far."""
    # Not getrusage's, which begins with what the parent of a new process holds.
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class OneTask(Noting, LocalPipelineExecutor):
    """Runs one task in this process."""

    def run_task(self, task):
        """Runs a task, unless it is done."""
        self._run_for_rank(task, local_rank=1)  # not 0, which would also log to the terminal


def run_task(steps, tasks, folder, task, directory):
    """Runs one task of a job in this process. directory: where relative paths begin."""
    os.chdir(directory)
    OneTask(steps, tasks=tasks, logging_dir=folder).run_task(task)


def run_all(executor, jobs, workers, folder):
    """Runs all tasks of all jobs that are not done.

    executor: "local", "ray" or "slurm". workers: processes of "local". folder: for its own files.
    Raises ValueError for a task that failed, and NoCluster if no task could be started.
    """
    for job in jobs:
        os.makedirs(os.path.join(job.folder, "notes"), exist_ok=True)
    if executor == "slurm":
        run_on_slurm(jobs)
        return
    check_no_other(jobs)
    forget_failures(jobs)
    if executor == "ray":
        run_on_ray(jobs, folder)
    else:
        run_here(jobs, workers, folder)


def forget_failures(jobs):
    """Removes what tasks have noted that failed before."""
    for job in jobs:
        for task in job.missing():
            remove_quietly(note_path(job.folder, task))


def check_no_other(jobs):
    """Raises ValueError if jobs of this corpus are still on Slurm: both would write the same files.

    Slurm's jobs go on when the command that waits for them is stopped.
    """
    submitted = [os.path.exists(os.path.join(job.folder, "launch_script.slurm")) for job in jobs]
    if any(submitted) and shutil.which("squeue"):
        numbers = in_queue([slurm_name(job) for job in jobs])
        if numbers:
            words = "jobs of this corpus are on Slurm; wait for them with --executor slurm, or"
            raise ValueError(f"{words} end them: scancel {' '.join(numbers)}")


# ---- here ----------------------------------------------------------------------------------------


def run_here(jobs, workers, folder):
    """Runs the tasks in processes of this machine."""
    # New processes, so that the memory which a task notes has nothing of this one's.
    others = active_children()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (folder,))
    try:
        for job in jobs:
            run_job(job, pool)
    finally:
        pool.shutdown(wait=False)
        # A pool waits for ever for its processes to end if somebody kills one of them meanwhile.
        for process in active_children():
            if process not in others:
                process.join(LATE_SECONDS)
                process.kill()


def run_job(job, pool):
    """Runs the tasks of a job that are not done. If one fails, those that run come to their end."""
    missing = job.missing()
    futures = []
    for task in missing:
        arguments = (job.steps, job.tasks, job.folder, task, os.getcwd())
        futures.append(pool.submit(run_task, *arguments))
    try:
        with progress_of(job, missing) as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
    except BrokenProcessPool:
        words = "a process was killed (for the memory it took?)"
        raise ValueError(f"{job.name}: {words}; {GOES_ON}") from None
    except Exception as error:
        raise job.failure(first_line(error)) from None
    finally:
        wait([future for future in futures if not future.cancel()])


def start_worker(folder):
    """In a new process of `run_here`: what is said there goes to a file."""
    end_with_parent()
    with open(os.path.join(folder, "console.log"), "ab") as f:
        os.dup2(f.fileno(), sys.stderr.fileno())


def progress_of(job, missing):
    """A bar over the tasks of a job."""
    return tqdm(total=job.tasks, initial=job.tasks - len(missing), desc=job.name, unit="task")


# ---- a cluster -----------------------------------------------------------------------------------


def wait_for(job, is_running, words):
    """Waits until all tasks of a job are done.

    is_running: a function; false once nothing runs that could still do a task.
    words: what to say of a task that left no note.
    Raises ValueError if nothing runs and a task is not done.
    """
    missing = job.missing()
    next_look = time.monotonic() + LOOK_SECONDS
    with progress_of(job, missing) as bar:
        while missing:
            time.sleep(POLL_SECONDS)
            if time.monotonic() > next_look:
                if not is_running():
                    time.sleep(LATE_SECONDS)
                    if job.missing():
                        raise job.failure(words)
                next_look = time.monotonic() + LOOK_SECONDS
            missing = job.missing()
            bar.update(job.tasks - len(missing) - bar.n)


# ---- on Ray --------------------------------------------------------------------------------------


def run_on_ray(jobs, folder):
    """Runs the tasks on the Ray cluster that RAY_ADDRESS names, or that this machine is part of."""
    # A process that uses Ray ends without warning if the cluster's head does: so that is another.
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=drive_ray, args=(jobs, folder, os.getcwd(), sender))
    process.start()
    sender.close()  # here, so that the pipe ends when the process does
    try:
        error = receive(receiver)
        if error:
            words = "no Ray cluster (begin one with `ray start --head`, or set RAY_ADDRESS)"
            raise NoCluster(f"--executor ray: {words}: {error}")
        words = "the Ray cluster is gone, or the task's process died again and again"
        for job in jobs:
            wait_for(job, process.is_alive, f"{words} (log: {folder}/console.log)")
    finally:
        process.terminate()
        process.join(LATE_SECONDS)
        process.kill()  # while Ray waits for an answer, it hears nothing else
        process.join()


def receive(receiver):
    """What another process says; "it died" if it does, "no answer" after RAY_SECONDS."""
    if not receiver.poll(RAY_SECONDS):
        return f"no answer in {RAY_SECONDS:.0f} s"
    try:
        return receiver.recv()
    except EOFError:
        return "it died"


def drive_ray(jobs, folder, directory, sender):
    """Submits the tasks of each job, and waits for them. Says by `sender` if that can begin."""
    start_worker(folder)
    import ray

    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init("auto", runtime_env=environment, log_to_driver=False)
    except Exception as error:  # of many kinds
        sender.send(first_line(error))
        return
    sender.send("")
    # A task whose process or node died is tried again elsewhere; one that failed is not.
    remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(run_task)
    for job in jobs:
        steps = ray.put(job.steps)
        tasks = [
            remote.remote(steps, job.tasks, job.folder, task, directory) for task in job.missing()
        ]
        for task in tasks:  # all of them, also if one fails
            ray.wait([task])
        ray.get(tasks)  # raises if one has failed


# ---- on Slurm ------------------------------------------------------------------------------------


class SlurmArray(Noting, SlurmPipelineExecutor):
    """Submits a job as an array of Slurm."""

    def get_sbatch_args(self, max_array=1):
        """The #SBATCH lines. Slurm's own SBATCH_PARTITION, SBATCH_TIMELIMIT, ... say the rest."""
        arguments = super().get_sbatch_args(max_array)
        for name in ("partition", "qos", "time"):
            arguments.pop(name, None)
        # Or else what comes after a failed job waits for ever.
        return arguments | {"kill-on-invalid-dep": "yes"}

    def launch_merge_stats(self):
        """Submits nothing: the notes of the tasks are enough."""


def run_on_slurm(jobs):
    """Submits all jobs, each after the one before, and waits for their end.

    Stopped while it waits, the jobs go on, and the same command waits for them again.
    """
    # Slurm itself knows them by these names, whatever becomes of this process.
    names = {job.name: slurm_name(job) for job in jobs}
    if not in_queue(names.values()):
        forget_failures(jobs)
        submit([job for job in jobs if job.missing()], names)
    words = "it ended without a word: killed, or out of time"
    try:
        for job in jobs:
            wait_for(job, functools.partial(in_queue, [names[job.name]]), words)
    except ValueError:
        cancel(names.values())  # the jobs after one that failed would wait for ever
        raise
    except KeyboardInterrupt:
        words = "the jobs go on; the same command waits for them again, and this ends them:"
        print(f"\n{words} scancel {' '.join(in_queue(names.values()))}", file=sys.stderr)
        raise


def slurm_name(job):
    """The name of a job in Slurm, which no job of another corpus has."""
    return f"corpus-{job.name}-{hashlib.sha256(job.folder.encode()).hexdigest()[:8]}"


def submit(jobs, names):
    """Submits jobs. names: {name of a job: its name in Slurm}. Raises NoCluster if it fails."""
    array = None
    binaries = os.path.dirname(sys.executable)
    for job in jobs:
        array = SlurmArray(
            job.steps,
            job.tasks,
            time=None,
            partition=None,
            job_name=names[job.name],
            env_command=f'export PATH="{binaries}:$PATH" PYTHONPATH="{ROOT}"',
            logging_dir=job.folder,
            depends=array,
        )
    if array is None:  # all is done
        return
    with tempfile.TemporaryFile("w+") as said:
        try:
            with stderr_to(said):
                array.launch_job()  # and before it those that it depends on
        except (subprocess.CalledProcessError, OSError):
            cancel(names.values())
            said.seek(0)
            lines = said.read().strip().splitlines() or ["sbatch failed"]
            raise NoCluster(f"--executor slurm: {lines[-1]}") from None


@contextlib.contextmanager
def stderr_to(file):
    """What this process and its children say as an error goes to a file."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def in_queue(names):
    """The numbers of the jobs of Slurm with one of these names that wait or run.

    If Slurm does not answer, "?": they may.
    """
    command = ["squeue", "--noheader", "--me", "--name", ",".join(names), "--format", "%F"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return ["?"] if answer.returncode else sorted({*answer.stdout.split()}, key=int)


def cancel(names):
    """Ends the jobs of Slurm with one of these names."""
    for name in names:  # unlike squeue, scancel takes no list of them
        subprocess.run(["scancel", "--me", "--name", name], capture_output=True)
