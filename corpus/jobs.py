"""Makes the parts of a corpus by many tasks: pipeline.py says what they do, executors.py who runs
them. This file needs neither datatrove nor Ray until then.

    OUT/jobs/tokens/completions/00003    task 3 of the job `tokens` is done
    OUT/jobs/tokens/notes/00003.json     its seconds, its peak memory, and its error if it failed
    OUT/jobs/tokens/logs/                what datatrove says of each task
    OUT/jobs/files/                      what one job leaves for the next
    OUT/jobs.json                        all notes, for people

A task is done or it is not: one that died is run again as a whole, but for the parts that it has
written. So the same command goes on, and may name another executor. At the end the parts get their
numbers, and OUT/jobs is removed. All machines must see OUT and the sources at the same place.
"""

import importlib.util
import json
import os
import shutil
from collections import Counter

from tqdm import tqdm

from common.files import read_json, write_whole
from corpus.sources import readers
from corpus.store import SPLITS, part_file

EXECUTORS = ("local", "ray", "slurm")
TASKS = 16
MOST_TASKS = 1000  # Slurm allows no more in an array, unless it is told


def check_packages(executor):
    """Raises ValueError if what an executor needs is missing."""
    needed = {"local": ["datatrove"], "ray": ["datatrove", "ray"], "slurm": ["datatrove"]}
    for package in needed[executor]:
        if importlib.util.find_spec(package) is None:
            words = f"needs the {package} package (pip install -r requirements-cluster.txt)"
            raise ValueError(f"--executor {executor}: {words}")
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--executor slurm: no sbatch here; start it where Slurm's commands are")


def has_jobs(out):
    """True if jobs have been begun in a corpus directory that is not whole yet."""
    return os.path.isdir(os.path.join(out, "jobs"))


def remove_jobs(out):
    """Removes what the jobs have left, but for OUT/jobs.json."""
    shutil.rmtree(os.path.join(out, "jobs"), ignore_errors=True)


def run_jobs(out, recipe, dtype, executor, workers):
    """Runs all tasks that are not done, and gives the parts their numbers.

    Returns the number of parts, and a Counter of what was left out before any part. The arguments
    are those of `build.prepare`; workers: processes of the executor "local".
    Raises ValueError, with its error, for a task that failed.
    """
    from loguru import logger

    from corpus.executors import Job, NoCluster, run_all
    from corpus.pipeline import pipelines

    logger.remove()  # what datatrove says of a task is in the log of the task
    folder = os.path.join(out, "jobs")
    files = os.path.join(folder, "files")
    os.makedirs(files, exist_ok=True)
    sources = [source for path in recipe.sources for source in readers(path, recipe.commits)]
    sources = as_begun(sources, os.path.join(folder, "sources.json"))
    jobs = [
        Job(name, tasks, steps, os.path.join(folder, name))
        for name, (tasks, steps) in pipelines(sources, out, files, recipe, dtype).items()
    ]
    try:
        run_all(executor, jobs, workers, folder)
    except NoCluster:
        if all(len(job.missing()) == job.tasks for job in jobs):  # nothing was ever done
            remove_jobs(out)
        raise

    notes = {job.name: [job.note(task) for task in range(job.tasks)] for job in jobs}
    write_whole(os.path.join(out, "jobs.json"), json.dumps(notes, indent=1))
    return number_parts(out, os.path.join(files, "parts"), recipe.tasks)


def as_begun(sources, path):
    """The sources (`Source`), with the sizes that they had when their jobs were begun.

    The sizes decide which task reads what, and may have changed: a damaged file was fetched again.
    path: a file that keeps them. Raises ValueError if the sources are others.
    """
    if not os.path.exists(path):
        write_whole(path, json.dumps([(source.name, source.size) for source in sources]))
    begun = read_json(path, list)
    names = [source.name for source in sources]
    before = [name for name, _ in begun]
    if names != before:
        other = min({*names} ^ {*before}, default=names[0])  # or else it is their order
        words = f"{other}: the sources have changed since this corpus was begun"
        advice = "bring them back as they were, or begin anew in another directory"
        raise ValueError(f"{words}; {advice}")
    return [source._replace(size=size) for source, (_, size) in zip(sources, begun)]


def number_parts(out, folder, tasks):
    """Moves the parts of all tasks into the corpus directory.

    Returns their number, and a Counter of what the tasks left out before any part. It may be
    interrupted, and done again.
    """
    count = 0
    skipped = Counter()
    names = [f"{split}.{ending}" for split in SPLITS for ending in ("bin", "index.npy")]
    for task in tqdm(range(tasks), desc="numbering", unit="task"):
        place = os.path.join(folder, f"{task:05d}")
        facts = read_json(os.path.join(place, "task.json"))
        skipped.update(facts["skipped"])
        for number in range(facts["parts"]):
            for name in [*names, "json"]:  # in this order: with its JSON, a part is complete
                target = part_file(out, count, name)
                try:
                    os.replace(part_file(place, number, name), target)
                except FileNotFoundError:
                    if not os.path.exists(target):  # it has not been moved already
                        raise
            count += 1
    return count, skipped
