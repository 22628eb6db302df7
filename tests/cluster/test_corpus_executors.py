"""A corpus by many tasks, here, on Ray and on Slurm: what one machine writes, whatever happens.

What happens to them is in test_corpus_kills.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter

import pytest
from conftest import ROOT, assert_refused, command
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
from cluster import corpus_runs, ray_cluster
from cluster.corpus_runs import (
    EXECUTORS,
    INSTALL,
    content_of,
    environment_of,
    files_of,
    run,
    write_jsonl,
)
from corpus import store
from corpus.documents import items_of
from corpus.sources import readers
from corpus.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


# ---- the same corpus -----------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("tasks", [1, 3, 7])  # there are six sources
def test_tasks_make_what_one_machine_makes(request, tmp_path, embedded, here, executor, tasks):
    """One task: byte for byte. More: all but where parts end. Every executor: the same files."""
    options, expected = embedded
    environment = environment_of(request, executor)
    out = str(tmp_path / "out")
    ended = run(options | {"out": out, "executor": executor, "tasks": tasks}, environment)
    assert ended.status == 0, ended
    if tasks == 1:
        assert files_of(out) == files_of(expected)
    assert content_of(out) == content_of(expected)
    assert files_of(out) == files_of(here(tasks))
    notes = json.loads((tmp_path / "out" / "jobs.json").read_text())
    jobs = {"hashes", "duplicates", "signatures", "groups", "alike", "tokens"}
    assert notes.keys() == jobs and len(notes["tokens"]) == tasks
    assert all(note["peak_memory"] > 1e6 for job in notes.values() for note in job)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    tasks=st.integers(1, 5),
    part_bytes=st.sampled_from([500, 3000, 10**9]),
    near_dedup=st.booleans(),
)
def test_any_sources_in_any_number_of_tasks(
    tmp_path_factory, small_corpus, seed, counts, tasks, part_bytes, near_dedup
):
    pytest.importorskip("datatrove", reason=INSTALL)
    directory = tmp_path_factory.mktemp("any")
    texts = corpus_runs.Texts(seed)
    sources = [write_jsonl(directory / "first.jsonl", ["always = 'kept'\n"])]
    for number, count in enumerate(counts):
        sources.append(
            write_jsonl(directory / f"{number}.jsonl", [texts.draw() for _ in range(count)])
        )
    options = {"tokenizer": small_corpus, "workers": 2, "clean": True, "validation": 0.3}
    options |= {"near_dedup": near_dedup, "part_bytes": part_bytes}
    corpus.prepare(sources, str(directory / "one"), **options)
    corpus.prepare(sources, str(directory / "many"), executor="local", tasks=tasks, **options)
    assert content_of(directory / "one") == content_of(directory / "many")


# ---- duplicates in different tasks ---------------------------------------------------------------


def made_of(out):
    """[(text, language), ...] of a corpus, in order, training documents only."""
    meta = store.read_meta(out)
    tokenizer = Tokenizer.from_pretrained(out)
    found = []
    for part in store.open_parts(out, "train", meta):
        for document, (start, end) in enumerate(zip(part.offsets, part.offsets[1:])):
            found.append((tokenizer.decode(part.tokens[start:end]), part.language(document)))
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_of_duplicates_in_different_tasks_that_of_the_earlier_is_kept(
    tmp_path, small_corpus, order
):
    pytest.importorskip("datatrove", reason=INSTALL)

    def text(name, last="end"):
        return " ".join([*(f"{name}{i}" for i in range(60)), last]) + "\n"

    # All sources have "same"; each has a near duplicate of "near", and a text of its own.
    contents = [[text(f"own{k}_"), text("same"), text("near", f"end{k}")] for k in range(3)]
    sources = [
        write_jsonl(tmp_path / f"{k}.jsonl", contents[k], language=f"language{k}") for k in order
    ]
    out = str(tmp_path / "out")
    options = {"tokenizer": small_corpus, "workers": 2, "validation": 1e-9, "near_dedup": True}
    meta = corpus.prepare(sources, out, executor="local", tasks=3, **options)
    assert len(meta["parts"]) == 3  # one of each task
    first = order[0]
    expected = [(content, f"language{first}") for content in contents[first]]
    expected += [(contents[k][0], f"language{k}") for k in order[1:]]
    assert made_of(out) == expected
    assert meta["skipped"] == {"exact duplicate": 2, "near duplicate": 2}
    # The parts say so: of the later sources, the first document was kept of those that were read.
    for part, source in zip(meta["parts"], sources):
        assert part["train"]["documents"] == (3 if source == sources[0] else 1)
        (path,) = part["sources"]
        (reader,) = readers(path)
        texts = [item.document.content.decode() for item in items_of(reader, Counter())]
        assert path == source and texts[0].startswith("own")


# ---- what is refused, and loses nothing ----------------------------------------------------------


def test_no_slurm_no_ray_and_other_arguments(request, tmp_path, embedded, here):
    """One line each; what was done stays, and the right command goes on from there."""
    options, _ = embedded
    environment = environment_of(request, "local")
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "local", "tasks": 3}
    begun = corpus_runs.start(right, environment)
    assert corpus_runs.wait_until(lambda: corpus_runs.done(out) >= 5, begun)
    os.kill(begun.pid, signal.SIGKILL)
    corpus_runs.ended(begun)

    nowhere = {"slurm": {"PATH": str(tmp_path)}, "ray": {"RAY_ADDRESS": "127.0.0.1:1"}}
    for wrong, words in [
        ({"executor": "slurm"}, "--executor slurm: no sbatch here"),
        ({"executor": "ray"}, "--executor ray: no Ray cluster"),
        ({"tasks": 4}, "was begun with tasks 3, not 4"),
        ({"executor": None, "tasks": None}, "was begun with tasks 3, not None"),
        ({"clean": False}, "was begun with clean True, not False"),
        ({"sources": options["sources"][1:]}, "was begun with sources "),
        ({"limit_per_language": 3}, "--limit-per-language: not with --executor"),
    ]:
        before = files_of(out, but={".lock"})
        ended = run(right | wrong, environment | nowhere.get(wrong.get("executor"), {}))
        assert ended.status == 2 and words in ended.said
        after = files_of(out, but={".lock"})
        log = os.path.join("jobs", "console.log")
        assert after | {log: b""} == before | {log: b""}

    assert run(right, environment).status == 0
    assert files_of(out) == files_of(here(3))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_damaged_source_of_one_task_is_named(request, tmp_path, small_corpus, executor):
    """Fetched again, of another size, it is read by the same task."""
    environment = environment_of(request, executor)
    texts = corpus_runs.Texts(1)
    sources = [
        corpus_runs.write_tar(tmp_path / f"{k}.tar.gz", texts.files(30 if k else 15))
        for k in range(4)
    ]
    whole = {path: open(path, "rb").read() for path in sources}
    os.truncate(sources[2], len(whole[sources[2]]) // 5)
    options = {"sources": sources, "tokenizer": small_corpus, "tasks": 3}
    options |= {"executor": executor, "out": str(tmp_path / "out")}
    ended = run(options, environment)
    assert ended.status == 2 and "hashes, task " in ended.said
    assert f"{sources[2]}: damaged (" in ended.said and "fetch it again" in ended.said
    with open(sources[2], "wb") as f:
        f.write(whole[sources[2]])
    ended = run(options, environment)
    assert ended.status == 0, ended
    alone = str(tmp_path / "alone")
    corpus.prepare(sources, alone, tokenizer=small_corpus, workers=2)
    assert content_of(options["out"]) == content_of(alone)


@pytest.mark.parametrize("change", ["longer", "one of the first task larger", "one more in front"])
def test_sources_that_changed_between_two_starts_are_noticed(
    request, tmp_path, small_corpus, change
):
    """Or else documents would be lost, or taken twice."""
    environment = environment_of(request, "local")
    texts = corpus_runs.Texts(2)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "bcd":
        write_jsonl(folder / f"{name}.jsonl", [texts.draw() for _ in range(20)])
    pattern = f"file://{folder}/*.jsonl"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out = str(tmp_path / "out")
    options = {"sources": [pattern], "tokenizer": small_corpus, "tasks": 3}
    options |= {"executor": "local", "out": out}
    begun = corpus_runs.start(options, environment)
    assert corpus_runs.wait_until(lambda: corpus_runs.done(out) >= 3, begun)
    os.kill(begun.pid, signal.SIGKILL)
    corpus_runs.ended(begun)

    if change == "longer":
        with open(folder / "d.jsonl", "a") as f:
            f.write('{"content": "one more line"}\n')
    elif change == "one of the first task larger":
        write_jsonl(folder / "b.jsonl", [texts.draw() for _ in range(200)])
    else:
        write_jsonl(folder / "a.jsonl", [texts.draw() for _ in range(2)])
    ended = run(options, environment)
    assert (
        ended.status == 2 and "the sources have changed since this corpus was begun" in ended.said
    )

    (folder / "a.jsonl").unlink(missing_ok=True)
    for path, content in before.items():
        path.write_bytes(content)
    assert run(options, environment).status == 0
    corpus.prepare([pattern], str(tmp_path / "alone"), tokenizer=small_corpus, workers=1)
    assert content_of(out) == content_of(tmp_path / "alone")


def test_s3_without_credentials(request, tmp_path, small_corpus):
    pytest.importorskip("s3fs", reason=INSTALL)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    out = str(tmp_path / "out")
    words = ["s3://bucket/*.parquet", "--tokenizer", small_corpus, "--out", out]
    result = command("-m", "corpus", *words, "--executor", "local", env=environment)
    assert_refused(result, "s3://bucket/*.parquet: cannot be read (", "redentials")
    assert not os.path.exists(out)


def test_a_full_disk(request, tmp_path, embedded, here):
    """In a task or in the driver; with more room, the same command goes on."""
    options, _ = embedded
    environment = environment_of(request, "local")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, with the right to mount")
    try:
        right = options | {"out": str(disk / "out"), "executor": "local", "tasks": 3}
        ballast = disk / "ballast"
        for room in (60_000, 150_000, 300_000, 450_000):
            ballast.write_bytes(b"")
            stat = os.statvfs(disk)
            ballast.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - room)))
            ended = run(right, environment)
            assert ended.status == 2 and "No space left on device" in ended.said, room
        ballast.unlink()
        assert run(right, environment).status == 0
        assert files_of(disk / "out") == files_of(here(3))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_second_run_in_one_directory(request, tmp_path, embedded, here):
    options, _ = embedded
    environment = environment_of(request, "local")
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "local", "tasks": 3}
    first = corpus_runs.start(right, environment)
    assert corpus_runs.wait_until(lambda: corpus_runs.done(out), first)
    ended = run(right, environment)
    assert ended.status == 2 and f"process {first.pid} on " in ended.said
    assert "is writing there" in ended.said
    assert corpus_runs.ended(first).status == 0
    assert files_of(out) == files_of(here(3))


# ---- Ray -----------------------------------------------------------------------------------------


def test_a_ray_head_that_goes_away(tmp_path, embedded, here):
    """Ray itself waits a minute for it. Then one line, and another executor goes on."""
    options, _ = embedded
    pytest.importorskip("datatrove", reason=INSTALL)
    missing = ray_cluster.what_is_missing()
    if missing:
        pytest.skip(missing)
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "ray", "tasks": 3}
    with ray_cluster.RayCluster(number_of_nodes=1) as cluster:
        driver = corpus_runs.start(right, os.environ | {"RAY_ADDRESS": cluster.address})
        assert corpus_runs.wait_until(lambda: corpus_runs.done(out) >= 2, driver)
        before = corpus_runs.done(out)
        children = corpus_runs.descendants(driver.pid)
        cluster.kill_head()
        ended = corpus_runs.ended(driver)
        assert ended.status == 2 and "the Ray cluster is gone" in ended.said
        corpus_runs.wait_for_end(children)
    assert corpus_runs.done(out) >= before
    assert run(right | {"executor": "local"}, dict(os.environ)).status == 0
    assert files_of(out) == files_of(here(3))


# ---- Slurm ---------------------------------------------------------------------------------------


def submitted(slurm):
    """How many arrays Slurm knows, those that have ended included."""
    listing = slurm.command("squeue", "--states=all", "--noheader", "--format", "%A %F")
    return len({line.split()[1] for line in listing.splitlines()})


def test_a_queue_that_refuses(request, tmp_path, embedded):
    options, _ = embedded
    environment = environment_of(request, "slurm")
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "slurm", "tasks": 3}
    before = submitted(request.getfixturevalue("slurm"))
    ended = run(right, environment | {"SBATCH_PARTITION": "nosuch"})
    assert ended.status == 2 and "--executor slurm: sbatch: error:" in ended.said
    assert "partition" in ended.said
    assert submitted(request.getfixturevalue("slurm")) == before


def test_a_driver_that_is_interrupted_finds_its_jobs_again(request, tmp_path, embedded, here):
    """Ctrl-C: the six jobs go on, and the same command waits for them and submits none twice."""
    options, _ = embedded
    environment = environment_of(request, "slurm")
    slurm = request.getfixturevalue("slurm")
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "slurm", "tasks": 3}
    before = submitted(slurm)
    for moment in (0, 4):

        def is_now(moment=moment):
            return submitted(slurm) - before == 6 and corpus_runs.done(out) >= moment

        process = corpus_runs.start(right, environment)
        assert corpus_runs.wait_until(is_now, process)
        os.killpg(process.pid, signal.SIGINT)
        ended = corpus_runs.ended(process)
        assert ended.status == 130 and "the same command waits for them again" in ended.said
    again = run(right, environment)
    assert again.status == 0
    assert submitted(slurm) - before == 6
    assert files_of(out) == files_of(here(3))


SLOW_SBATCH = """#!/bin/sh
{sbatch} "$@"
touch {submitted}
sleep 60
"""


def test_a_driver_that_dies_while_it_submits(request, tmp_path, embedded, here):
    """What it has submitted is neither submitted twice nor in the way."""
    options, _ = embedded
    environment = environment_of(request, "slurm")
    slurm = request.getfixturevalue("slurm")
    out = str(tmp_path / "out")
    right = options | {"out": out, "executor": "slurm", "tasks": 3}
    before = submitted(slurm)
    is_submitted = tmp_path / "submitted"
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(SLOW_SBATCH.format(sbatch=shutil.which("sbatch"), submitted=is_submitted))
    wrapper.chmod(0o755)
    path = f"{wrapper.parent}:{environment['PATH']}"
    driver = corpus_runs.start(right, environment | {"PATH": path})
    assert corpus_runs.wait_until(is_submitted.exists, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    for _ in range(3):  # once to notice, and once more
        ended = run(right, environment)
        if ended.status == 0:
            break
        assert ended.status == 2
    assert ended.status == 0, ended
    assert submitted(slurm) - before == 6  # one for each job
    assert files_of(out) == files_of(here(3))


def test_the_command_that_the_readme_prints(request, tmp_path, small_corpus):
    """Word for word, but for the words that a reader has to replace, too."""
    environment = environment_of(request, "slurm")
    texts = corpus_runs.Texts(3)
    for name in "ab":
        (tmp_path / name).mkdir()
        corpus_runs.write_parquet(tmp_path / name / "x.parquet", [texts.draw() for _ in range(40)])
    out = str(tmp_path / "out")
    replaced = {
        "pip install -r requirements-cluster.txt": "true",
        "PARTITION ": "main ",
        "s3://BUCKET/the-stack": f"file://{tmp_path}",
        "TOKENIZER": small_corpus,
        "corpora/stack": out,
        "--tasks 512": "--tasks 2",
    }
    with open(os.path.join(ROOT, "corpus", "README.md")) as f:
        blocks = re.findall(r"^```\n(.*?)^```", f.read(), re.MULTILINE | re.DOTALL)
    (script,) = (block for block in blocks if "--executor slurm" in block)
    for before, after in replaced.items():
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    words = ["bash", "-ec", script]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    alone = str(tmp_path / "alone")
    options = {"clean": True, "near_dedup": True, "workers": 1, "tokenizer": small_corpus}
    corpus.prepare([f"file://{tmp_path}/*/*.parquet"], alone, **options)
    assert content_of(out) == content_of(alone)
    assert command("-m", "corpus", "--report", out).stdout in result.stdout
