"""Token files: what is written is read, in any number of parts; what is damaged is one line."""

import io
import json
import os
import resource
import shutil
import time

import numpy as np
import pytest
from conftest import write_corpus
from test_data import rising_documents

from common.files import write_whole
from corpus import report, store
from data import PairDataset


def files_of(directory):
    """name -> content."""
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


# ---- writing ----


def test_what_is_written_is_read(tokenizer, tmp_path):
    documents = rising_documents([20, 2, 300])
    directory = write_corpus(tmp_path, tokenizer, documents[:2], documents[2:], [])
    meta = store.read_meta(directory)
    assert meta["splits"]["train"] == {"documents": 3, "tokens": 322}
    first, second, empty = store.open_parts(directory, "train", meta)
    assert first.offsets.tolist() == [0, 20, 22]
    assert first.tokens.tolist() == documents[0] + documents[1]
    assert second.tokens.tolist() == documents[2]
    assert second.language(0) == "python"
    assert empty.offsets.tolist() == [0] and empty.tokens.tolist() == []


def test_two_processes_may_write_the_same_part(tmp_path):
    writers = [store.PartWriter(str(tmp_path), 0, np.uint16) for _ in range(2)]
    for i in range(3):
        for writer in writers:
            writer.add("train", "python", 9, np.arange(i, 9, dtype=np.uint16))
    writers[0].close()
    whole = {name: c for name, c in files_of(tmp_path).items() if not store.is_temporary(name)}
    assert len(whole) == 5
    writers[1].close()
    assert files_of(tmp_path) == whole


# ---- many parts, many tokens ----


@pytest.fixture(scope="module")
def thousand_parts(tokenizer, tmp_path_factory):
    parts = [rising_documents([9, 30])] * 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # 5,000 of them take a minute
        return write_corpus(tmp_path_factory.mktemp("thousand"), tokenizer, *parts)


@pytest.mark.slow
def test_a_thousand_parts_open_in_two_seconds(thousand_parts):
    begin = time.process_time()  # of this process alone, whatever else the machine is doing
    dataset = PairDataset(thousand_parts, "train", 16, 0)
    assert time.process_time() - begin < 2
    assert len(dataset) == 4000


@pytest.mark.slow
def test_a_thousand_parts_need_more_open_files_than_is_usual(thousand_parts):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 100, hard))
    try:
        dataset = PairDataset(thousand_parts, "train", 16, 0)
        for i in range(0, len(dataset), 3):
            dataset[i]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "limits, count, expected",
    [
        ((1024, 5000), 3000, 3000),
        ((1024, 5000), 9000, 5000),
        ((4000, 5000), 3000, None),
        ((5000, 5000), 9000, None),
        ((256, resource.RLIM_INFINITY), 3000, 3000),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 3000, None),
    ],
)
def test_limit_of_open_files(monkeypatch, limits, count, expected):
    """It is raised as far as it may be, and never lowered."""
    chosen = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: chosen.append(limits))
    store.allow_open_files(count)
    assert chosen == ([(expected, limits[1])] if expected else [])


def test_offsets_beyond_four_billion_tokens(tokenizer, tmp_path):
    """Two documents that are holes of 5 GB in a file, and a real one behind them."""
    directory = write_corpus(tmp_path, tokenizer, rising_documents([20, 30, 30]))
    far = 5_000_000_000
    with open(os.path.join(directory, "00000.train.bin"), "r+b") as f:
        f.seek(2 * far)
        f.write(np.arange(20, 50, dtype=np.uint16).tobytes())
    index = np.array([(0, 0), (far // 2, 0), (far, 0), (far + 30, 0)], store.INDEX)
    np.save(os.path.join(directory, "00000.train.index.npy"), index)
    meta = store.read_meta(directory)
    meta["parts"][0]["train"] = {"documents": 3, "tokens": far + 30}
    write_whole(os.path.join(directory, "meta.json"), json.dumps(meta))

    dataset = PairDataset(directory, "train", 33, 0)
    assert len(dataset) == 2 * -(-far // 60) + 1
    assert dataset.document(2).tolist() == list(range(20, 50))
    assert dataset.window(len(dataset) - 1) == (2, 0, 30)
    assert len(dataset[3].input_ids) == 33


# ---- what is refused ----


def entries(node):
    """(table or list, key) of each entry at any depth."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from entries(node[key])


@pytest.mark.parametrize("value", [None, "x", True, [], {}, -1, 2.5, 2**70], ids=str)
def test_an_entry_of_any_kind_in_meta_json_is_used_or_refused_in_one_line(
    small_corpus, tmp_path, value
):
    """Each entry in turn, at any depth, replaced and removed."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    refused = 0
    for node, key in entries(meta):
        before = node[key]
        for remove in (False, True):
            node[key] = value
            if remove and isinstance(node, dict):
                del node[key]
            path.write_text(json.dumps(meta))
            try:
                report.summary(store.read_meta(str(tmp_path)))
                PairDataset(str(tmp_path), "train", 64, 0)[0]
            except ValueError as error:
                assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
                refused += 1
            node[key] = before
    assert refused > 40


def test_a_damaged_index_is_refused_in_one_line(small_corpus, tmp_path):
    """Cut at any place, with any byte of the header replaced, and with offsets that lead astray."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    meta = store.read_meta(str(tmp_path))
    path = tmp_path / "00000.train.index.npy"
    content = path.read_bytes()
    index = np.load(io.BytesIO(content))

    def refused(damaged):
        path.write_bytes(damaged)
        try:
            (part,) = store.open_parts(str(tmp_path), "train", meta)
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged") and "\n" not in str(error)
            return True
        assert np.array_equal(part.offsets, index["offset"])  # the damage did no harm
        return False

    half = len(content) // 2
    for size in (0, 5, 9, 60, 127, 128, 135, half, len(content) - 8, len(content) - 1):
        assert refused(content[:size])
    for place in range(128):
        for byte in (0, 0x20, content[place] ^ 1):
            refused(content[:place] + bytes([byte]) + content[place + 1 :])
    for place in range(len(index)):
        for offset in (-1, 1, 2**40):  # each out of order, or outside of the file
            damaged = index.copy()
            damaged["offset"][place] = offset
            assert refused(content[:128] + damaged.tobytes())


def test_damaged_languages_are_refused_in_one_line(small_corpus, tmp_path):
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    for content in ("[]", "{}", "["):
        (tmp_path / "00000.json").write_text(content)
        with pytest.raises(ValueError, match="00000.*: damaged"):
            PairDataset(str(tmp_path), "train", 64, 0)
    shutil.copy(os.path.join(small_corpus, "00000.json"), tmp_path)
    index = np.load(tmp_path / "00000.train.index.npy")
    index["language"][3] = 77
    np.save(tmp_path / "00000.train.index.npy", index)
    with pytest.raises(ValueError, match="index.npy: damaged .it has languages"):
        PairDataset(str(tmp_path), "train", 64, 0)


def test_refuses_a_corpus_that_is_not_whole(small_corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus here"):
        PairDataset(str(tmp_path), "train", 64, 0)

    for size in (-2, 2):
        torn = shutil.copytree(small_corpus, tmp_path / "torn", dirs_exist_ok=True)
        tokens = torn / "00000.train.bin"
        os.truncate(tokens, os.path.getsize(tokens) + size)
        with pytest.raises(ValueError, match="00000.train.bin.*bytes instead of"):
            PairDataset(str(torn), "train", 64, 0)

    other_index = io.BytesIO()
    np.save(other_index, np.array([(0, 0), (9, 0)], store.INDEX))
    for name, content, words in [
        ("meta.json", b"{}", "format"),
        ("meta.json", b'{"format": 2}', "prepare the corpus again"),
        ("meta.json", b'{"for', "meta.json: damaged"),
        ("00000.train.index.npy", other_index.getvalue(), "index.npy: damaged .not 14 entries"),
    ]:
        broken = shutil.copytree(small_corpus, tmp_path / "broken", dirs_exist_ok=True)
        (broken / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            PairDataset(str(broken), "train", 64, 0)
