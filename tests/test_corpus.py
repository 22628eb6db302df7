"""Sources in, tokens out: nothing is lost or changes sides, and what is left out is counted."""

import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import tokenizers
from conftest import MODULES, ROOT, assert_refused, command, program
from hypothesis import given
from hypothesis import strategies as st

import corpus
import data
from corpus import build, encode, languages, report, store
from corpus.documents import documents
from corpus.tokenizer import Tokenizer

GOOD = {
    "a.py": b"x = 1\n" * 5,
    "sub/b.c": b"int main() { return 0; }\r\n",
    "sub/Makefile": b"all:\n\techo hi\n",
    "c.rs": "fn é() {}".encode(),
}
GOOD_TEXTS = {content.decode() for content in GOOD.values()}
ODD = {
    "copy.py": GOOD["a.py"],  # an exact duplicate
    "latin.py": "é".encode("latin-1"),
    "binary.c": b"a\0b",
    "empty.py": b" \n",
    "notes.xyz": b"no known extension",
    "site-packages/other.py": b"somebody else's",  # not entered, so not counted
}
REASONS = {
    "exact duplicate": 1,
    "not UTF-8": 1,
    "binary (a NUL byte)": 1,
    "empty": 1,
    "no known extension": 1,
}


def prepare(source, out, **options):
    """`corpus.prepare` of one source, by one worker process."""
    return corpus.prepare([str(source)], str(out), **{"workers": 1, **options})


def write_files(directory, contents):
    """Writes {name: bytes} under a directory, and returns it."""
    for name, content in contents.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return directory


def numbered(count):
    """Small files, no two of which are alike."""
    return {f"m{i:03d}.py": f"number = {i}\n".encode() * 9 for i in range(count)}


def files_of(directory):
    """{name: content} of what is in a directory."""
    found = {}
    for name in os.listdir(directory):
        with open(os.path.join(directory, name), "rb") as f:
            found[name] = f.read()
    return found


def texts_of(directory):
    """The documents of a corpus, decoded: {text: split}. Its index and its counts must fit them."""
    tokenizer = Tokenizer.from_pretrained(directory)
    meta = store.read_meta(directory)
    found = {}
    for split, counts in meta["splits"].items():
        documents, size = 0, 0
        for part in range(len(meta["parts"])):
            tokens = np.fromfile(store.part_file(directory, part, f"{split}.bin"), meta["dtype"])
            index = np.load(store.part_file(directory, part, f"{split}.index.npy"))
            offsets = index["offset"]
            assert offsets[0] == 0 and offsets[-1] == len(tokens)
            assert (np.diff(offsets) > 0).all()
            for start, end in zip(offsets, offsets[1:]):
                found[tokenizer.decode(tokens[start:end])] = split
            documents += len(offsets) - 1
            size += len(tokens)
        assert {"documents": documents, "tokens": size} == counts
    return found


# ---- what is taken ------------------------------------------------------------------------------


def test_directory(tmp_path, tokenizer, small_corpus):
    source = write_files(tmp_path / "in", GOOD | ODD)
    meta = prepare(source, tmp_path / "out", tokenizer=small_corpus, workers=2)
    assert set(texts_of(tmp_path / "out")) == GOOD_TEXTS
    assert meta["skipped"] == REASONS
    counts = {name: counts["documents"] for name, counts in meta["languages"].items()}
    assert counts == {"python": 1, "c": 1, "makefile": 1, "rust": 1}
    size = sum(counts["bytes"] for counts in meta["languages"].values())
    assert size == sum(map(len, GOOD.values()))
    assert meta["tokenizer_sha256"] == tokenizer.sha256 and meta["dtype"] == "uint16"
    assert "1 exact duplicate" in report.summary(meta) and "python" in report.summary(meta)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_archives(tmp_path, small_corpus, ending):
    path = tmp_path / f"source{ending}"
    mode = {".tar": "w:", ".tar.xz": "w:xz"}.get(ending, "w:gz")
    with tarfile.open(path, mode) as archive:
        for name, content in (GOOD | ODD).items():
            member = tarfile.TarInfo(f"pkg-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    meta = prepare(path, tmp_path / "out", tokenizer=small_corpus)
    assert set(texts_of(tmp_path / "out")) == GOOD_TEXTS
    assert meta["skipped"] == REASONS


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path, small_corpus, ending):
    lines = [json.dumps({"content": text, "lang": "X"}) for text in GOOD_TEXTS]
    lines += [
        json.dumps({"content": "print(1)", "max_stars_repo_path": "src/x.py"}),
        json.dumps({"content": "y", "ext": "py"}),  # one token
        lines[0],
        "{",
        "[]",
        '"text"',
        '{"text": "no content"}',
        '{"content": 3}',
        '{"content": "\\ud800"}',
        "",
        "[" * 100_000,
        '{"content": "odd language", "lang": "\\ud800"}',
    ]
    path = tmp_path / f"source{ending}"
    with gzip.open(path, "wb") if ending.endswith("gz") else open(path, "wb") as f:
        f.write("\n".join(lines).encode() + b'\n{"content": "\xff"}')
    meta = prepare(path, tmp_path / "out", tokenizer=small_corpus)
    assert set(texts_of(tmp_path / "out")) == GOOD_TEXTS | {"print(1)", "odd language"}
    assert meta["skipped"] == {
        "no content field": 4,
        "not JSON": 2,
        "exact duplicate": 1,
        "not UTF-8": 2,
        "under 2 tokens": 1,
    }
    counts = {name: counts["documents"] for name, counts in meta["languages"].items()}
    assert counts == {"x": 4, "python": 1, "?": 1}


def test_a_damaged_archive_is_never_read_in_silence(tmp_path, sources):
    """Cut anywhere or with flipped bytes: an error, or every document as it was."""
    whole = tmp_path / "whole.tar.gz"
    skipped = Counter()
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(sources, "pkg")
    assert len(list(documents([str(whole)], skipped))) == len(MODULES) and not skipped

    content = whole.read_bytes()
    plain = gzip.decompress(content)
    member = plain.index(b"pkg/dis.py")
    header = bytearray(plain)
    header[member + 1] ^= 1  # a member's name, which the header's own checksum covers
    damaged = [gzip.compress(plain[:member]), gzip.compress(bytes(header))]
    generator = random.Random(0)
    damaged += [content[: generator.randrange(1, len(content))] for _ in range(10)]
    for _ in range(20):
        flipped = bytearray(content)
        flipped[generator.randrange(10, len(content))] ^= 1 << generator.randrange(8)
        damaged.append(bytes(flipped))
    for k, broken in enumerate(damaged):
        path = tmp_path / f"{k}.tar.gz"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            list(documents([str(path)], Counter()))


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


@given(texts=st.lists(any_text, min_size=1, max_size=20))
def test_any_text_comes_back(tmp_path_factory, small_corpus, texts):
    directory = tmp_path_factory.mktemp("any")
    contents = {f"in/{i}.py": text.encode() for i, text in enumerate(texts)}
    write_files(directory, contents | {"in/more.py": b"always = 'kept'"})
    meta = prepare(directory / "in", directory / "out", tokenizer=small_corpus)
    kept = set(texts_of(directory / "out"))
    assert kept <= {*texts, "always = 'kept'"}
    assert len(kept) + sum(meta["skipped"].values()) == len(texts) + 1


def test_clean_and_near_duplicates(tmp_path, small_corpus):
    def text_of(words):
        lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        return "\n".join(lines) + "\n"

    words = [f"word{i}" for i in range(400)]
    contents = {
        "a.py": text_of(words),
        "b.py": text_of(["changed"] + words[1:]),  # all but one
        "c.py": text_of(words[:120] + [f"other{i}" for i in range(280)]),  # under a third
        "generated.py": "# Automatically generated by a tool.\nx = 1\n",
        "long.py": "x = '" + "a" * 1000 + "'\n" * 20,
        "wide.py": ("y = " + "1234567890 " * 12 + "\n") * 3,
        "symbols.py": "=" * 30 + "\n" + "()[]{}" * 5 + "ab\n",
    }
    source = write_files(tmp_path / "in", {name: t.encode() for name, t in contents.items()})
    options = {"tokenizer": small_corpus, "workers": 2}
    meta = prepare(source, tmp_path / "out", clean=True, near_dedup=True, **options)
    assert set(texts_of(tmp_path / "out")) == {contents["a.py"], contents["c.py"]}
    assert meta["skipped"] == {
        "a line over 1,000 characters": 1,
        "generated by a program": 1,
        "lines over 100 characters on average": 1,
        "near duplicate": 1,
        "under 25 % letters and digits": 1,
    }
    everything = prepare(source, tmp_path / "all", **options)
    assert everything["languages"]["python"]["documents"] == len(contents)


def test_languages_and_limits(tmp_path, small_corpus):
    contents = {}
    for ending in ("py", "c", "rs"):
        contents |= {f"{i}.{ending}": f"text {i} of {ending}\n".encode() for i in range(5)}
    contents["same.py"] = contents["0.c"]  # is read later, and is the first that is taken
    source = write_files(tmp_path / "in", contents)
    options = {"limit_per_language": 3, "languages": ["python", "rust"]}
    meta = prepare(source, tmp_path / "out", tokenizer=small_corpus, **options)
    counts = {name: counts["documents"] for name, counts in meta["languages"].items()}
    assert counts == {"python": 3, "rust": 3}
    assert meta["skipped"] == {"another language": 5, "over the limit of its language": 5}
    taken = {f"text {i} of {ending}\n" for i in range(3) for ending in ("py", "rs")}
    assert set(texts_of(tmp_path / "out")) == taken


def test_languages_that_only_records_name(tmp_path, small_corpus):
    lines = []
    for i in range(40):
        lines.append(json.dumps({"content": f"x = {i}\n" * 9, "lang": "Vue" if i % 2 else "C"}))
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(lines))
    meta = prepare(path, tmp_path / "out", tokenizer=small_corpus, languages=["vue"])
    assert meta["languages"]["vue"]["documents"] == 20
    assert meta["skipped"] == {"another language": 20}


def test_languages():
    assert len(set(languages.LANGUAGE_OF.values())) == 88
    names = {
        "x/setup.py": "python",
        "Dockerfile": "dockerfile",
        "a.C": "cpp",
        "a.c": "c",
        "A.PY": "python",
        "index.rst.txt": "restructuredtext",
        "README": None,
        "py": None,
    }
    assert {name: languages.language_of(name) for name in names} == names


# ---- what becomes of it -------------------------------------------------------------------------


def test_the_tokenizer_never_sees_what_is_held_out(sources, tmp_path, small_corpus):
    prepare(sources, tmp_path / "out", tokenizer=small_corpus, validation=0.34)
    taken = {text for text, split in texts_of(tmp_path / "out").items() if split == "train"}
    fields = dict.fromkeys(build.Recipe._fields)
    recipe = build.Recipe(**fields | {"sources": [sources], "validation": 0.34})
    assert set(build.training_texts(recipe)) == taken


def test_documents_never_change_sides(sources, tmp_path, small_corpus):
    """Another order, more files, another number of processes: each document is where it was."""
    before = texts_of(small_corpus)
    assert len(before) == len(MODULES) and set(before.values()) == {"train", "validation"}
    more = shutil.copytree(sources, tmp_path / "more")
    for name in MODULES[::2]:
        os.rename(more / f"{name}.py", more / f"z_{name}.py")
    write_files(more, GOOD)
    prepare(more, tmp_path / "out", tokenizer=small_corpus, validation=0.34, workers=2)
    after = texts_of(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == len(before) + len(GOOD)


def test_same_bytes_whatever_the_number_of_processes(sources, tmp_path, small_corpus, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_BYTES", 20_000)  # many chunks in flight
    for workers in (1, 3):
        out = tmp_path / str(workers)
        prepare(sources, out, vocab_size=600, validation=0.34, workers=workers)
        assert files_of(out) == files_of(small_corpus)


@pytest.mark.slow  # 66,000 tokens are added one by one
def test_wide_tokens_where_the_vocabulary_needs_them(sources, tmp_path, tokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    library.add_special_tokens([f"<unused_{i}>" for i in range(66_000)])
    wide = Tokenizer(library.to_str())
    meta = prepare(sources, tmp_path / "wide", tokenizer=wide, validation=0.34)
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 66_600
    assert len(texts_of(tmp_path / "wide")) == len(MODULES)
    assert data.PairDataset(str(tmp_path / "wide"), "train", 64, 0)[0].input_ids.max() < 66_600


# ---- stopped, shared, disturbed -----------------------------------------------------------------


def test_parts_of_any_size_hold_the_same_documents(sources, tmp_path, small_corpus):
    """Parts that are lost, here one and there one, are written again as they were."""
    parts, one = (tmp_path / name for name in ("parts", "one"))
    options = {"tokenizer": small_corpus, "workers": 2, "validation": 0.3}
    options |= {"near_dedup": True, "limit_per_language": 20}
    meta = prepare(sources, parts, part_bytes=50_000, **options)
    assert len(meta["parts"]) >= 7
    whole = files_of(parts)
    for lost in ((2, 5), (0, 1, 3, 4, 6)):
        (parts / "meta.json").unlink()
        for number in lost:
            (parts / f"{number:05d}.json").unlink()
            (parts / f"{number:05d}.train.bin").write_bytes(b"half")
        assert prepare(sources, parts, part_bytes=50_000, **options) == meta
        assert files_of(parts) == whole

    undivided = prepare(sources, one, part_bytes=10**9, **options)
    assert len(undivided["parts"]) == 1 and undivided["languages"] == meta["languages"]
    assert texts_of(one) == texts_of(parts)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    """And started again each time: the files of an undisturbed run, and no process left behind."""
    library = os.path.dirname(os.__file__)
    packages = ("asyncio", "email", "json", "unittest", "encodings", "idlelib")
    folders = [os.path.join(library, name) for name in packages]
    options = "vocab_size=2000, workers=2, part_bytes=300_000"
    program = f"import corpus, sys; corpus.prepare({folders!r}, sys.argv[1], {options})"

    def start(out):
        arguments = [sys.executable, "-c", program, out]
        quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.Popen(arguments, cwd=ROOT, **quiet)

    begin = time.time()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.time() - begin
    expected = files_of(tmp_path / "whole")
    assert len(expected) > 30
    generator = random.Random(0)
    kills, attempt, cut_short = 0, 0, 0
    while kills < 20:
        out = tmp_path / str(attempt)
        process = start(out)
        time.sleep(generator.uniform(0.4, 1.0) * seconds)
        if process.poll() is None:
            process.kill()  # the parent alone: its workers must notice by themselves
            kills += 1
            cut_short += out.exists() and any(out.glob("0*.json"))
        process.wait()
        if kills == 20 and not (out / "meta.json").exists():
            assert start(out).wait() == 0
        if (out / "meta.json").exists():
            assert files_of(out) == expected
            attempt += 1
    assert cut_short >= 3

    time.sleep(1)
    if shutil.which("pgrep"):
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
        assert not left.stdout


def test_a_worker_that_is_killed_is_one_sentence(sources, tmp_path, small_corpus):
    def kill_the_worker():
        while not multiprocessing.active_children():
            time.sleep(0.001)
        multiprocessing.active_children()[0].kill()

    thread = threading.Thread(target=kill_the_worker, daemon=True)
    thread.start()
    with pytest.raises(ValueError, match="a worker process was killed"):
        prepare(sources, tmp_path / "out", tokenizer=small_corpus)
    thread.join()
    assert not (tmp_path / "out").exists()


def test_another_command_does_not_go_on(sources, tmp_path, small_corpus):
    out = tmp_path / "out"
    options = {"tokenizer": small_corpus, "part_bytes": 100_000}
    meta = prepare(sources, out, **options)
    whole = files_of(out)
    (out / "meta.json").unlink()  # as if it had been stopped
    (out / "00001.json").unlink()
    before = files_of(out)
    for other, words in [
        ({"clean": True}, "clean False, not True"),
        ({"part_bytes": 10**6}, "part_bytes 100000, not 1000000"),
        ({"near_dedup": True}, "near_dedup None, not five words"),
    ]:
        with pytest.raises(ValueError, match=f"was begun with {words}"):
            prepare(sources, out, **options | other)
        assert files_of(out) == before
    assert prepare(sources, out, **options) == meta
    assert files_of(out) == whole


def test_sources_that_changed_between_two_starts_are_noticed(tmp_path, small_corpus):
    """Going on with other sources would lose documents and take some twice."""
    source = write_files(tmp_path / "in", numbered(60))
    out = tmp_path / "out"
    options = {"tokenizer": small_corpus, "part_bytes": 1000}
    meta = prepare(source, out, **options)
    whole = files_of(out)
    assert len(meta["parts"]) >= 6

    def stop_after(parts):
        """As if the first start had been killed then."""
        for name, content in whole.items():
            is_later = name[:5].isdigit() and int(name[:5]) >= parts
            (out / name).unlink(missing_ok=True)
            if name != "meta.json" and not is_later:
                (out / name).write_bytes(content)

    def refuses():
        before = files_of(out)
        words = r"0000\d.json: the sources have changed since .* another directory"
        with pytest.raises(ValueError, match=words):
            prepare(source, out, **options)
        assert files_of(out).items() >= before.items()

    # More documents in front; another one of the same length; one less.
    stop_after(3)
    first = write_files(source, {"a.py": b"more = 1\n" * 9}) / "a.py"
    refuses()
    first.unlink()
    write_files(source, {"m004.py": b"number = 4\n" * 8 + b"number = 5\n"})
    refuses()
    (source / "m004.py").unlink()
    refuses()
    write_files(source, numbered(60))
    prepare(source, out, **options)
    assert files_of(out) == whole

    # More in front, and the part that would have shown it is lost.
    stop_after(3)
    first = write_files(source, {"a.py": b"more = 1\n" * 9}) / "a.py"
    for lost in out.glob("00000.*"):
        lost.unlink()
    refuses()
    first.unlink()

    # Fewer than there are parts for.
    stop_after(len(meta["parts"]))
    for name in list(numbered(60))[20:]:
        (source / name).unlink()
    refuses()

    # The same, where most are lost.
    last = len(meta["parts"]) - 1
    for number in range(1, last):
        (out / f"{number:05d}.json").unlink()
    with pytest.raises(ValueError, match=f"{last:05d}.json: the sources have changed"):
        prepare(source, out, **options)

    # More behind all that was read: nothing is lost.
    write_files(source, numbered(60) | {"z.py": b"last = 1\n" * 9})
    stop_after(3)
    prepare(source, out, **options)
    assert len(texts_of(out)) == 61


def test_two_processes_do_not_write_one_corpus(tmp_path, sources, small_corpus):
    """Each would clear away what the other has open."""
    out = tmp_path / "out"
    options = {"tokenizer": small_corpus, "part_bytes": 100_000}
    prepare(sources, out, **options)
    (out / "meta.json").unlink()
    before = files_of(out)
    lock = f"from common.files import lock_directory; lock = lock_directory({str(out)!r})"
    arguments = [sys.executable, "-c", f"{lock}; print(flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        words = f"process {process.pid} on .* is writing there"
        with pytest.raises(ValueError, match=words):
            prepare(sources, out, **options)
        held = files_of(out)
        assert held.pop(".lock") and held == before
        process.communicate(b"\n")
    prepare(sources, out, **options)
    assert not list(out.glob(".*lock"))


def test_what_was_only_begun_is_no_reason_to_refuse(tmp_path, small_corpus):
    out = write_files(tmp_path / "out", {"prepare.json.01234567.tmp": b"{"})
    source = write_files(tmp_path / "in", numbered(9))
    assert prepare(source, out, tokenizer=small_corpus, part_bytes=200)
    assert not list(out.glob("*.tmp"))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["precious.tmp", "prepare.json.tmp", "00000.train.bin.tmp", ".a"])
def test_a_directory_of_the_users_is_left_alone(tmp_path, sources, small_corpus, name):
    out = write_files(tmp_path / "out", {name: b"precious"})
    with pytest.raises(ValueError, match="exists already; choose another directory"):
        prepare(sources, out, tokenizer=small_corpus)
    assert files_of(out) == {name: b"precious"}


def test_nothing_but_its_own_files_is_removed(tmp_path):
    """An empty directory that was there stays, and so does a file that appears meanwhile."""
    out = write_files(tmp_path / "out", {"prepare.json.01234567.tmp": b"{"})  # killed before
    recipe = build.Recipe(*[None] * len(build.Recipe._fields))
    for names in ([], ["precious.tmp"]):
        with pytest.raises(ValueError, match="too bad"):
            with build.corpus_directory(str(out), recipe):
                write_files(out, dict.fromkeys(names, b"precious"))
                raise ValueError("too bad")
        assert os.listdir(out) == names


def test_refusals(tmp_path, sources, small_corpus):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = write_files(tmp_path, {"nothing.jsonl": b"{}"}) / "nothing.jsonl"
    torn = tmp_path / "torn.tar.gz"
    with tarfile.open(torn, "w:gz") as archive:
        archive.add(sources)
    os.truncate(torn, os.path.getsize(torn) // 2)
    given = {"tokenizer": small_corpus}
    for source, options, words in [
        (tmp_path / "none", {}, "no such file"),
        (empty, {}, "no documents for training in"),
        (empty, given, "no documents in"),
        (corpus.__file__, {}, "not a source"),
        (torn, given, "damaged"),
        (nothing, given, "skipped: 1 no content field"),
        (tmp_path, {}, "lies inside the source"),
        (sources, {"validation": 0.0}, "validation must lie between 0 and 1"),
        (sources, {"vocab_size": 100}, "vocab_size must be at least 279"),
        (sources, {"tasks": 3}, "--tasks: needs --executor"),
        (sources, {"languages": ["klingon"]}, "no language named klingon; known: ada"),
    ]:
        with pytest.raises(ValueError, match=words):
            prepare(source, out, **options)
        assert not out.exists()

    before = {path: os.path.getmtime(path) for path in os.scandir(small_corpus)}
    with pytest.raises(ValueError, match="exists already, and is whole"):
        prepare(sources, small_corpus)
    assert before == {path: os.path.getmtime(path) for path in before}


def test_command_line(tmp_path, sources):
    out = str(tmp_path / "out")
    new = str(tmp_path / "new")
    options = ["--vocab-size", "400", "--validation", "0.3", "--workers", "1"]
    result = command("-m", "corpus", sources, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    assert "python" in result.stdout and "vocabulary 400" in result.stdout
    again = program("corpus", "--report", out)
    assert again.stdout in result.stdout and again.returncode == 0

    assert_refused(program("corpus", sources, "--out", out), "exists already")
    assert_refused(program("corpus", str(tmp_path / "none"), "--out", new), "no such file")
    assert_refused(program("corpus", sources, "--out", "/proc/none/x"), "No such file")
    assert_refused(program("corpus", sources, "--out", new, "--colour"), "--colour")
    assert_refused(program("corpus", sources, "--out", new, "--tasks", "2"), "needs --executor")
    assert_refused(program("corpus", sources, "--out", new, "--executor", "x"), "choose from")
    assert_refused(program("corpus", sources), "--out")
    assert_refused(program("corpus", "--report", str(tmp_path)), "no corpus here")
