"""A corpus by many tasks, as far as that needs no cluster: arguments, slices, numbers of parts.

What the tasks make is in cluster/test_corpus_executors.py.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st

import corpus
from corpus import jobs, store
from corpus.documents import items_of
from corpus.sources import Source, read_tar, readers
from corpus.tokenizer import Tokenizer

# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"tasks": 3}, "--tasks: needs --executor"),
        ({"executor": "local", "tasks": 0}, "--tasks must lie between 1 and 1,000, got 0"),
        ({"executor": "local", "tasks": 1001}, "--tasks must lie between 1 and 1,000, got 1,001"),
        (
            {"executor": "ray", "limit_per_language": 5},
            "--limit-per-language: not with --executor, as no task knows",
        ),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, sources, small_corpus, options, words):
    with pytest.raises(ValueError, match=words):
        corpus.prepare([sources], str(tmp_path / "out"), tokenizer=small_corpus, **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "executor, package", [("local", "datatrove"), ("ray", "ray"), ("slurm", "datatrove")]
)
def test_a_missing_package_is_one_line(tmp_path, sources, monkeypatch, executor, package):
    for name in ("datatrove", "ray"):
        there = None if name == package else pytest  # any module that is there
        monkeypatch.setitem(sys.modules, name, there)
    result = program("corpus", sources, "--out", str(tmp_path / "out"), "--executor", executor)
    words = f"needs the {package} package (pip install -r requirements-cluster.txt)"
    assert_refused(result, f"--executor {executor}: {words}")
    assert not os.listdir(tmp_path)


def test_no_slurm_is_one_line(tmp_path, sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", pytest)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = program("corpus", sources, "--out", str(tmp_path / "out"), "--executor", "slurm")
    assert_refused(result, "--executor slurm: no sbatch here")
    assert not os.listdir(tmp_path)


# ---- slices --------------------------------------------------------------------------------------


@pytest.mark.slow  # datatrove takes seconds to import
@given(sizes=st.lists(st.integers(0, 1000), max_size=12), tasks=st.integers(1, 9))
def test_slices_are_in_order_and_about_equal(sizes, tasks):
    pytest.importorskip("datatrove", reason="pip install -r requirements-cluster.txt")
    from corpus.pipeline import slices_of

    found = [Source(f"{number}.tar", read_tar, size) for number, size in enumerate(sizes)]
    slices = slices_of(found, tasks)
    assert len(slices) == tasks
    assert [source for some in slices for source in some] == found
    # A slice has at most its share and, at each of its ends, half of a source.
    for some in slices:
        ends = (some[0].size + some[-1].size) / 2 if some else 0
        assert sum(source.size for source in some) <= sum(sizes) / tasks + ends + 1


def test_sources_keep_the_sizes_that_they_were_begun_with(tmp_path):
    """A file that is fetched again is read by the same task; another file is refused."""
    path = str(tmp_path / "sources.json")
    begun = [Source(name, read_tar, size) for name, size in (("a.tar", 9), ("b.tar", 0))]
    assert jobs.as_begun(begun, path) == begun
    assert jobs.as_begun([begun[0], begun[1]._replace(size=7)], path) == begun
    more = [*begun, Source("c.tar", read_tar, 3)]
    for others, name in [(more, "c.tar"), (begun[:1], "b.tar"), (begun[::-1], "b.tar")]:
        with pytest.raises(ValueError, match=f"^{name}: the sources have changed since"):
            jobs.as_begun(others, path)


# ---- tasks --------------------------------------------------------------------------------------

INSTALL = "pip install -r requirements-cluster.txt"


@pytest.mark.slow  # datatrove takes seconds to import
def test_a_task_may_open_three_files_for_each_of_a_thousand(tmp_path):
    """The usual limit is 1,024, and duplicates of 512 tasks are looked for in more files."""
    pytest.importorskip("datatrove", reason=INSTALL)
    from corpus.executors import run_task

    def open_many(data, rank, world_size):
        """A step of a pipeline."""
        files = [open(os.devnull) for _ in range(3 * jobs.MOST_TASKS)]
        for file in files:
            file.close()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("no process here may open so many")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        run_task([open_many], 1, str(tmp_path), 0, os.getcwd())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir(tmp_path / "completions") == ["00000"]


@pytest.mark.slow
def test_signatures_of_a_task_that_was_killed_are_written_again(tmp_path):
    """Half a file that it has left would be read as one of another task."""
    pytest.importorskip("datatrove", reason=INSTALL)
    pytest.importorskip("rensa", reason="pip install rensa")
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    from corpus.pipeline import GROUPS, Sign

    def sign():
        pieces = {"pieces": [("", "the same text, twice")]}
        step = Sign(str(tmp_path / "signatures"))
        step.run([Document(text="", id=name, metadata=pieces) for name in "ab"], rank=0)

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # so that a larger file kills the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
        sign()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ

    sign()
    folders = (str(tmp_path / "signatures"), str(tmp_path / "pairs"))
    MinhashDedupBuckets(*folders, config=GROUPS).run(rank=0, world_size=25)
    (pairs,) = (tmp_path / "pairs").iterdir()
    assert np.fromfile(pairs, "<u4").tolist() == [0, 0, 0, 1]


@pytest.mark.slow
def test_a_failure_after_the_last_task_is_one_line(tmp_path):
    """As when there is no more room for its note."""
    pytest.importorskip("datatrove", reason=INSTALL)
    from corpus.executors import Job

    job = Job("tokens", 2, [], str(tmp_path))
    assert str(job.failure("killed")).startswith("tokens, task 0: killed; ")
    (tmp_path / "completions").mkdir()
    for task in range(2):
        (tmp_path / "completions" / f"{task:05d}").touch()
    assert str(job.failure("no space")).startswith("tokens: no space; ")


# ---- the numbers of the parts --------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """What three tasks have left: two parts, none, and one."""
    folder = tmp_path / "parts"
    for task, count in enumerate((2, 0, 1)):
        place = folder / f"{task:05d}"
        place.mkdir(parents=True)
        for number in range(count):
            writer = store.PartWriter(str(place), number, np.uint16)
            writer.add("train", f"task {task}", 9, [task, number])
            writer.close()
        facts = {"parts": count, "skipped": {"empty": task, f"of {task}": 1}}
        (place / "task.json").write_text(json.dumps(facts))
    return folder


def files_of(directory):
    """{path: content} of all files below a directory."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_parts_are_numbered_by_task(parts, tmp_path):
    made = files_of(parts)
    out = tmp_path / "out"
    out.mkdir()
    counted = jobs.number_parts(str(out), str(parts), 3)
    assert counted == (3, Counter({"empty": 3, "of 0": 1, "of 1": 1, "of 2": 1}))
    place_of = {"00000": "00000/00000", "00001": "00000/00001", "00002": "00002/00000"}
    numbered = files_of(out)
    assert len(numbered) == 15
    for name, content in numbered.items():
        assert content == made[place_of[name[:5]] + name[5:]]


def test_numbering_that_is_interrupted_anywhere_is_done_again(parts, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    jobs.number_parts(str(whole), shutil.copytree(parts, tmp_path / "copy"), 3)
    expected = files_of(whole)
    move = os.replace
    for moves in range(len(expected)):
        left = iter(range(moves))

        def stop_after_some(source, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            move(source, target)

        out = tmp_path / f"out{moves}"
        out.mkdir()
        folder = shutil.copytree(parts, tmp_path / f"parts{moves}")
        monkeypatch.setattr(os, "replace", stop_after_some)
        with pytest.raises(KeyboardInterrupt):
            jobs.number_parts(str(out), str(folder), 3)
        monkeypatch.setattr(os, "replace", move)
        # Whatever has a JSON is whole.
        for path in out.glob("*.json"):
            assert len(list(out.glob(f"{path.stem}.*"))) == 5
        assert jobs.number_parts(str(out), str(folder), 3)[0] == 3
        assert files_of(out) == expected


# ---- where a document comes from -----------------------------------------------------------------


def documents_of(out, part):
    """The texts of a part of a corpus, of all its splits."""
    tokenizer = Tokenizer.from_pretrained(out)
    texts = []
    for split in store.SPLITS:
        reader = store.open_parts(out, split, store.read_meta(out))[part]
        for start, end in zip(reader.offsets, reader.offsets[1:]):
            texts.append(tokenizer.decode(reader.tokens[start:end]))
    return texts


def test_meta_json_says_where_each_document_comes_from(tmp_path, small_corpus):
    """Reading its part's sources again finds it there, at one of the numbers that are named."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.py").write_text(f"number = {number}\n" * (9 if number % 4 else 0))
    table = tmp_path / "table.jsonl"
    lines = [json.dumps({"content": f"line = {number % 11}\n" * 9}) for number in range(20)]
    table.write_text("\n".join(lines))
    out = str(tmp_path / "out")
    options = {"tokenizer": small_corpus, "workers": 1, "part_bytes": 300}
    meta = corpus.prepare([str(folder), str(table)], out, **options)
    assert len(meta["parts"]) >= 5

    read_again = {}  # {path: {number: text}}
    for path in (folder, table):
        (source,) = readers(str(path))
        texts = {
            item.number: item.document.content.decode() for item in items_of(source, Counter())
        }
        read_again[source.name] = texts
    last_of = dict.fromkeys(read_again, -1)
    documents = 0
    for part, facts in enumerate(meta["parts"]):
        assert facts["sources"] == store.read_json(store.part_file(out, part, "json"))["sources"]
        there = set()
        for path, (first, last) in facts["sources"].items():
            assert last_of[path] < first <= last  # no document is in two parts
            last_of[path] = last
            there |= {read_again[path].get(number) for number in range(first, last + 1)}
        texts = documents_of(out, part)
        documents += len(texts)
        assert there.issuperset(texts)
    assert documents == 6 + 11
