"""Sources in, tokens out: nothing lost, nothing moved between the splits, everything that is left out counted."""

import glob
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from unittest import mock

import numpy as np
import pytest
from conftest import MODULES, ROOT, assert_refused, command, program
from hypothesis import given
from hypothesis import strategies as st

import corpus
import data
from common import files
from corpus import build, languages, report, store, tokenizer
from corpus.tokenizer import Tokenizer, train_tokenizer

GOOD = {
    "a.py": b"x = 1\n" * 5,
    "sub/b.c": b"int main() { return 0; }\r\n",
    "sub/Makefile": b"all:\n\techo hi\n",
}
GOOD["c.rs"] = "fn é() {}".encode()
ODD = {
    "copy.py": GOOD["a.py"],  # an exact duplicate
    "latin.py": "é".encode("latin-1"),
    "binary.c": b"a\0b",
    "empty.py": b" \n",
    "notes.xyz": b"no known extension",
    "site-packages/other.py": b"somebody else's",
}
REASONS = {
    "exact duplicate": 1,
    "not UTF-8": 1,
    "binary (a NUL byte)": 1,
    "empty": 1,
    "no known extension": 1,
}


def write_files(directory, files):
    for name, content in files.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
    return str(directory)


def contents(directory, split=None):
    """The documents of a corpus, decoded: {text: split}."""
    tokenizer, meta, found = Tokenizer.from_pretrained(directory), store.read_meta(directory), {}
    for name in [split] if split else ["train", "validation"]:
        counts = {"documents": 0, "tokens": 0}
        for number in range(len(meta["parts"])):
            tokens = np.fromfile(store.part_file(directory, number, f"{name}.bin"), meta["dtype"])
            offsets = np.load(store.part_file(directory, number, f"{name}.index.npy"))["offset"]
            assert offsets[0] == 0 and (np.diff(offsets) > 0).all() and offsets[-1] == len(tokens)
            counts = {
                "documents": counts["documents"] + len(offsets) - 1,
                "tokens": counts["tokens"] + len(tokens),
            }
            for a, b in zip(offsets, offsets[1:]):
                found[tokenizer.decode(tokens[a:b])] = name
        assert counts == meta["splits"][name]
    return found


def test_directory(tmp_path, tokenizer, small_corpus):
    source = write_files(tmp_path / "in", GOOD | ODD)
    meta = corpus.prepare([source], str(tmp_path / "out"), tokenizer=small_corpus, workers=2)
    assert set(contents(tmp_path / "out")) == {content.decode() for content in GOOD.values()}
    assert meta["skipped"] == REASONS
    assert {name: c["documents"] for name, c in meta["languages"].items()} == {
        "python": 1,
        "c": 1,
        "makefile": 1,
        "rust": 1,
    }
    assert sum(c["bytes"] for c in meta["languages"].values()) == sum(map(len, GOOD.values()))
    assert meta["tokenizer_sha256"] == tokenizer.sha256 and meta["dtype"] == "uint16"
    assert "1 exact duplicate" in report.summary(meta) and "python" in report.summary(meta)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_archives(tmp_path, small_corpus, ending):
    path = str(tmp_path / f"source{ending}")
    with tarfile.open(path, "w:" + {".tar": "", ".tar.xz": "xz"}.get(ending, "gz")) as archive:
        for name, content in (GOOD | ODD).items():
            member = tarfile.TarInfo(f"pkg-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    meta = corpus.prepare([path], str(tmp_path / "out"), tokenizer=small_corpus, workers=1)
    assert set(contents(tmp_path / "out")) == {content.decode() for content in GOOD.values()}
    assert meta["skipped"] == REASONS


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_json_lines(tmp_path, small_corpus, ending):
    lines = [json.dumps({"content": content.decode(), "lang": "X"}) for content in GOOD.values()]
    lines += [
        json.dumps({"content": "print(1)", "max_stars_repo_path": "src/x.py"}),
        json.dumps({"content": "y", "ext": "py"}),
        lines[0],
    ]
    lines += [
        "{",
        "[]",
        '"text"',
        '{"text": "no content"}',
        '{"content": 3}',
        '{"content": "\\ud800"}',
        "",
        "[" * 100_000,
    ]
    lines += ['{"content": "odd language", "lang": "\\ud800"}']
    path = str(tmp_path / f"source{ending}")
    with gzip.open(path, "wb") if ending.endswith("gz") else open(path, "wb") as f:
        f.write("\n".join(lines).encode() + b'\n{"content": "\xff"}')
    meta = corpus.prepare([path], str(tmp_path / "out"), tokenizer=small_corpus, workers=1)
    assert set(contents(tmp_path / "out")) == {content.decode() for content in GOOD.values()} | {
        "print(1)",
        "odd language",
    }
    assert meta["skipped"] == {
        "no content field": 4,
        "not JSON": 2,
        "exact duplicate": 1,
        "not UTF-8": 2,
        "under 2 tokens": 1,
    }
    assert {name: c["documents"] for name, c in meta["languages"].items()} == {
        "x": 4,
        "python": 1,
        "?": 1,
    }
    assert "odd" not in report.summary(meta)


def test_a_damaged_archive_is_never_read_in_silence(tmp_path, sources):
    """Cut anywhere or with flipped bytes: an error, or every document as it was."""
    whole, skipped = str(tmp_path / "whole.tar.gz"), corpus.Counter()
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(sources, "pkg")
    expected = {document.content for *_, document in build.documents([whole], skipped)}
    assert len(expected) == len(MODULES) and not skipped
    content, generator = open(whole, "rb").read(), np.random.default_rng(0)
    plain = gzip.decompress(content)
    header = bytearray(plain)
    header[plain.index(b"pkg/dis.py") + 1] ^= (
        1  # a member's name, which the header's own checksum covers
    )
    damaged = [content[: generator.integers(1, len(content))] for _ in range(10)]
    damaged += [
        gzip.compress(part) for part in (plain[: plain.index(b"pkg/dis.py")], bytes(header))
    ]
    for _ in range(20):
        flipped = bytearray(content)
        flipped[generator.integers(10, len(content))] ^= 1 << generator.integers(8)
        damaged.append(bytes(flipped))
    for k, broken in enumerate(damaged):
        path = str(tmp_path / f"{k}.tar.gz")
        with open(path, "wb") as f:
            f.write(broken)
        with pytest.raises(ValueError, match="damaged"):
            list(build.documents([path], corpus.Counter()))


def test_the_tokenizer_never_sees_what_is_held_out(sources, tmp_path, monkeypatch):
    seen, real = [], train_tokenizer
    monkeypatch.setattr(
        tokenizer,
        "train_tokenizer",
        lambda texts, size: real([seen.append(t) or t for t in texts], size),
    )
    corpus.prepare([sources], str(tmp_path / "out"), vocab_size=600, validation=0.34, workers=1)
    assert set(seen) == set(contents(tmp_path / "out", "train"))


def test_documents_never_change_sides(sources, tmp_path, small_corpus):
    """Another order, more files, another number of processes: each document is where it was."""
    before = contents(small_corpus)
    assert len(before) == len(MODULES) and set(before.values()) == {"train", "validation"}
    more = shutil.copytree(sources, tmp_path / "more")
    for name in MODULES[::2]:
        os.rename(more / f"{name}.py", more / f"z_{name}.py")
    write_files(more, GOOD)
    corpus.prepare(
        [str(more)], str(tmp_path / "out"), tokenizer=small_corpus, validation=0.34, workers=2
    )
    after = contents(tmp_path / "out")
    assert before.items() <= after.items() and len(after) == len(before) + len(GOOD)


def test_same_bytes_whatever_the_number_of_processes(sources, tmp_path, small_corpus, monkeypatch):
    monkeypatch.setattr(build, "CHUNK_BYTES", 20_000)  # many chunks in flight
    for workers in (1, 3):
        corpus.prepare(
            [sources],
            str(tmp_path / str(workers)),
            vocab_size=600,
            validation=0.34,
            workers=workers,
        )
    for name in os.listdir(small_corpus):
        a, b, c = (
            open(os.path.join(d, name), "rb").read()
            for d in (small_corpus, tmp_path / "1", tmp_path / "3")
        )
        assert a == b == c, name


def files_of(directory):
    """{name: content} of what is in a directory."""
    return {
        name: open(os.path.join(directory, name), "rb").read() for name in os.listdir(directory)
    }


def test_shards_write_the_same_files_together(sources, tmp_path, small_corpus):
    whole, shared = str(tmp_path / "whole"), str(tmp_path / "shared")
    options = dict(
        tokenizer=small_corpus,
        workers=2,
        part_bytes=50_000,
        near_dedup=True,
        limit_per_language=20,
        validation=0.3,
    )
    meta = corpus.prepare([sources], whole, **options)
    assert len(meta["parts"]) >= 7
    for i in (2, 0, 1):
        result = corpus.prepare([sources], shared, shard=(i, 3), **options)
        assert result == (meta if i == 1 else None)
    assert files_of(whole) == files_of(shared)
    one = corpus.prepare([sources], str(tmp_path / "one"), **(options | {"part_bytes": 10**9}))
    assert len(one["parts"]) == 1 and one["languages"] == meta["languages"]
    assert contents(tmp_path / "one") == contents(whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, small_corpus):
    """And started again each time: the files of a run that nobody touched, and no process left behind."""
    library = os.path.dirname(os.__file__)
    folders = [
        os.path.join(library, name)
        for name in ("asyncio", "email", "json", "unittest", "encodings", "idlelib")
    ]
    program = f"import corpus, sys; corpus.prepare({folders!r}, sys.argv[1], vocab_size=2000, workers=2, part_bytes=300_000)"

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", program, out],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    begin = time.time()
    assert start(str(tmp_path / "whole")).wait() == 0
    seconds, expected, generator = (
        time.time() - begin,
        files_of(tmp_path / "whole"),
        random.Random(0),
    )
    assert len(expected) > 30
    kills, attempt, cut_short = 0, 0, 0
    while kills < 20:
        out = str(tmp_path / str(attempt))
        process = start(out)
        time.sleep(generator.uniform(0.4, 1.0) * seconds)
        if process.poll() is None:
            process.kill()  # the parent alone: its workers must notice by themselves
            kills += 1
            cut_short += bool(glob.glob(os.path.join(out, "0*.json")))
        process.wait()
        if kills == 20 and not os.path.exists(os.path.join(out, "meta.json")):
            assert start(out).wait() == 0
        if os.path.exists(os.path.join(out, "meta.json")):
            assert files_of(out) == expected
            attempt += 1
    assert cut_short >= 3
    time.sleep(1)
    alive = (
        subprocess.run(
            ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True
        ).stdout.split()
        if shutil.which("pgrep")
        else []
    )
    assert not alive


def test_another_command_does_not_go_on(sources, tmp_path, small_corpus):
    out = str(tmp_path / "out")
    assert (
        corpus.prepare(
            [sources], out, tokenizer=small_corpus, workers=1, part_bytes=100_000, shard=(0, 2)
        )
        is None
    )
    before = files_of(out)
    with pytest.raises(ValueError, match="was begun with clean False, not True"):
        corpus.prepare(
            [sources], out, tokenizer=small_corpus, workers=1, part_bytes=100_000, clean=True
        )
    assert files_of(out) == before
    assert (
        corpus.prepare([sources], out, tokenizer=small_corpus, workers=1, part_bytes=100_000)[
            "format"
        ]
        == 2
    )


def test_sources_that_changed_between_two_starts_are_noticed(tmp_path, small_corpus):
    """Going on with other sources would lose documents and take some twice."""
    numbered = {f"m{i:03d}.py": f"number = {i}\n".encode() * 9 for i in range(60)}
    source = write_files(tmp_path / "in", numbered)
    out, options = tmp_path / "out", dict(tokenizer=small_corpus, workers=1, part_bytes=1000)
    meta = corpus.prepare([source], str(out), **options)
    whole = files_of(out)
    assert len(meta["parts"]) >= 6

    def stop_after(parts):
        """As if the first start had been killed then."""
        for name in os.listdir(out):
            os.remove(out / name)
        for name, content in whole.items():
            if not (name == "meta.json" or name[:5].isdigit() and int(name[:5]) >= parts):
                (out / name).write_bytes(content)

    def refused():
        before = files_of(out)
        with pytest.raises(
            ValueError, match=r"0000\d.json: the sources have changed since .* another directory"
        ):
            corpus.prepare([source], str(out), **options)
        assert files_of(out).items() >= before.items()

    stop_after(3)
    write_files(source, {f"a{i}.py": f"more = {i}\n".encode() * 9 for i in range(5)})  # in front
    refused()
    for i in range(5):
        os.remove(os.path.join(source, f"a{i}.py"))
    write_files(source, {"m004.py": b"number = 4\n" * 8 + b"number = 5\n"})  # as long as before
    refused()
    os.remove(os.path.join(source, "m004.py"))
    refused()
    write_files(source, {"m004.py": b"number = 4\n" * 9})
    corpus.prepare([source], str(out), **options)
    assert files_of(out) == whole

    stop_after(len(meta["parts"]))  # all but meta.json
    kept = sorted(os.listdir(source))[:20]
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in {*os.listdir(source)} - {*kept}:
        os.rename(os.path.join(source, name), moved / name)
    refused()
    for name in os.listdir(moved):
        os.rename(moved / name, os.path.join(source, name))
    stop_after(3)
    write_files(source, {"z.py": b"last = 1\n" * 9})  # behind all that was read: nothing is lost
    corpus.prepare([source], str(out), **options)
    assert len(contents(out)) == 61


def test_shards_of_different_sources_are_noticed(tmp_path, small_corpus):
    numbered = {f"m{i:03d}.py": f"number = {i}\n".encode() * 9 for i in range(60)}
    source = write_files(tmp_path / "in", numbered)
    options = dict(tokenizer=small_corpus, workers=1, part_bytes=1000)
    assert corpus.prepare([source], str(tmp_path / "out"), shard=(1, 2), **options) is None
    write_files(source, {"a.py": b"first = 1\n" * 9})
    with pytest.raises(ValueError, match="00001.json: the sources have changed"):
        corpus.prepare([source], str(tmp_path / "out"), shard=(0, 2), **options)
    assert not os.path.exists(tmp_path / "out" / "meta.json")


def test_parts_of_an_earlier_version_are_said_to_be_so(tmp_path, sources, small_corpus):
    """They do not say what they were made of."""
    out = tmp_path / "out"
    options = dict(tokenizer=small_corpus, workers=1)
    corpus.prepare([sources], str(out), **options)
    os.remove(out / "meta.json")
    part = json.loads((out / "00000.json").read_text())
    del part["read"]
    (out / "00000.json").write_text(json.dumps(part))
    with pytest.raises(ValueError, match="00000.json: was made by an earlier version"):
        corpus.prepare([sources], str(out), **options)


@pytest.mark.parametrize(
    "held, starts, refused",
    [
        ((0, 1), (0, 2), True),
        ((0, 2), (0, 1), True),
        ((1, 2), (1, 3), True),
        ((0, 2), (1, 2), False),
    ],
)
def test_another_number_of_shards_does_not_write_beside(
    held, starts, refused, tmp_path, sources, small_corpus
):
    """It would clear away what the first has open."""
    out = str(tmp_path / "out")
    options = dict(tokenizer=small_corpus, workers=1, part_bytes=100_000)
    assert corpus.prepare([sources], out, shard=(2, 4), **options) is None
    program = (
        f"import corpus; lock = build.lock_corpus({out!r}, {held}); print(flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    before = files_of(out)
    if refused:
        with pytest.raises(ValueError, match="is writing there"):
            corpus.prepare([sources], out, shard=starts, **options)
        assert files_of(out) == before
    else:
        corpus.prepare([sources], out, shard=starts, **options)
    process.communicate(b"\n")
    corpus.prepare([sources], out, **options)
    assert not glob.glob(os.path.join(out, ".*lock"))


def test_shards_that_end_together(tmp_path, sources, small_corpus, monkeypatch):
    """One clears away temporary files while the other writes meta.json."""
    out = tmp_path / "out"
    write_whole, others = files.write_whole, []

    def write_and_lose(path, content):
        if path.endswith("meta.json") and not others:
            others.append(path)
            fsync = lambda _: store.remove_ours(out, store.is_temporary)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fsync)
                write_whole(path, content)
        else:
            write_whole(path, content)

    monkeypatch.setattr(files, "write_whole", write_and_lose)
    meta = corpus.prepare([sources], str(out), tokenizer=small_corpus, workers=1)
    assert others and json.loads((out / "meta.json").read_text()) == meta


def test_nothing_of_the_users_is_removed(tmp_path, sources, small_corpus):
    """Neither files that look like temporary ones, nor an empty directory that was there."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for name in ("precious.tmp", "prepare.json.tmp", "00000.train.bin.backup.tmp", ".hidden"):
        out.mkdir()
        (out / name).write_text("precious")
        for source in (sources, str(empty)):
            with pytest.raises(ValueError, match="exists already; choose another directory"):
                corpus.prepare([source], str(out), tokenizer=small_corpus, workers=1)
        assert files_of(out) == {name: b"precious"}
        shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(ValueError, match="no documents"):
        corpus.prepare([str(empty)], str(out), tokenizer=small_corpus, workers=1)
    assert os.listdir(out) == []
    (out / "prepare.json.01234567.tmp").write_text("{")  # ours, of one that was killed
    real = build.open_corpus

    def open_while_the_user_writes(*arguments):
        begun = real(*arguments)
        (out / "precious.tmp").write_text("precious")
        return begun

    with mock.patch.object(build, "open_corpus", open_while_the_user_writes):
        with pytest.raises(ValueError, match="no documents"):
            corpus.prepare([str(empty)], str(out), tokenizer=small_corpus, workers=1)
        assert os.listdir(out) == ["precious.tmp"]
        os.remove(out / "precious.tmp")
        corpus.prepare([sources], str(out), tokenizer=small_corpus, workers=1)
    assert [name for name in os.listdir(out) if name.endswith(".tmp")] == ["precious.tmp"]


def test_clean_and_near_duplicates(tmp_path, small_corpus):
    words = [f"word{i}" for i in range(400)]
    lines = lambda words: (
        "\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8)) + "\n"
    )
    files = {
        "a.py": lines(words),
        "b.py": lines(["changed"] + words[1:]),  # all but one
        "c.py": lines(words[:120] + [f"other{i}" for i in range(280)]),  # under a third
        "generated.py": "# Automatically generated by a tool.\nx = 1\n",
        "long.py": "x = '" + "a" * 1000 + "'\n" * 20,
        "wide.py": ("y = " + "1234567890 " * 12 + "\n") * 3,
        "symbols.py": "=" * 30 + "\n" + "()[]{}" * 5 + "ab\n",
    }
    source = write_files(tmp_path / "in", {name: text.encode() for name, text in files.items()})
    meta = corpus.prepare(
        [source],
        str(tmp_path / "out"),
        tokenizer=small_corpus,
        workers=2,
        clean=True,
        near_dedup=True,
    )
    assert set(contents(tmp_path / "out")) == {files["a.py"], files["c.py"]}
    assert meta["skipped"] == {
        "a line over 1,000 characters": 1, "generated by a program": 1, "lines over 100 characters on average": 1, "near duplicate": 1,
        "under 25 % letters and digits": 1,
    }  # fmt: skip
    assert (
        len(
            contents_of_all := corpus.prepare(
                [source], str(tmp_path / "all"), tokenizer=small_corpus
            )["languages"]
        )
        == 1
    )
    assert contents_of_all["python"]["documents"] == len(files)


def test_languages_and_limits(tmp_path, small_corpus):
    files = {
        f"{i}.{ending}": f"text number {i}\n".encode()
        for i in range(5)
        for ending in ("py", "c", "rs")
    }
    source = write_files(tmp_path / "in", files)
    options = dict(
        tokenizer=small_corpus, workers=1, limit_per_language=3, languages=["python", "rust"]
    )
    meta = corpus.prepare([source], str(tmp_path / "out"), **options)
    # 15 files, 5 texts: the first of each text counts, whatever its language
    assert (
        sum(counts["documents"] for counts in meta["languages"].values()) <= 6
        and "c" not in meta["languages"]
    )
    assert sum(meta["skipped"].values()) + sum(
        counts["documents"] for counts in meta["languages"].values()
    ) == len(files)
    with pytest.raises(ValueError, match="no language named klingon; known: ada"):
        corpus.prepare([source], str(tmp_path / "no"), languages=["klingon"])


def test_report(small_corpus, tmp_path):
    directory = shutil.copytree(small_corpus, tmp_path / "corpus")
    result = command("-m", "corpus", "--report", str(directory))
    assert result.returncode == 0 and "python" in result.stdout, result.stderr
    assert (directory / "report.png").read_bytes().startswith(b"\x89PNG") and os.path.getsize(
        directory / "report.png"
    ) > 10_000
    assert_refused(program("corpus", "--report", str(tmp_path)), "no corpus here")


any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


@given(texts=st.lists(any_text, min_size=1, max_size=20))
def test_any_text_comes_back(tmp_path_factory, small_corpus, texts):
    directory = tmp_path_factory.mktemp("any")
    write_files(
        directory,
        {f"in/{i}.py": text.encode() for i, text in enumerate(texts)}
        | {"in/more.py": b"always = 'kept'"},
    )
    meta = corpus.prepare(
        [str(directory / "in")], str(directory / "out"), tokenizer=small_corpus, workers=1
    )
    kept = set(contents(directory / "out"))
    assert kept <= {*texts, "always = 'kept'"}
    assert len(kept) + sum(meta["skipped"].values()) == len(texts) + 1


def test_wide_tokens_where_the_vocabulary_needs_them(sources, tmp_path, tokenizer):
    library = data.tokenizers.Tokenizer.from_str(tokenizer.json)
    library.add_special_tokens([f"<unused_{i}>" for i in range(66_000)])
    wide = Tokenizer(library.to_str())
    meta = corpus.prepare(
        [sources], str(tmp_path / "wide"), tokenizer=wide, validation=0.34, workers=1
    )
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == 66_600
    assert len(contents(tmp_path / "wide")) == len(MODULES)
    assert data.PairDataset(str(tmp_path / "wide"), "train", 64, 0)[0].input_ids.max() < 66_600


def test_languages():
    assert len(set(languages.LANGUAGE_OF.values())) == 88
    names = {
        "x/setup.py": "python",
        "Dockerfile": "dockerfile",
        "a.C": "cpp",
        "a.c": "c",
        "A.PY": "python",
    }
    assert {name: languages.language_of(name) for name in names} == names
    assert languages.language_of("index.rst.txt") == "restructuredtext"
    assert languages.language_of("README") is None and languages.language_of("py") is None


def test_refusals(tmp_path, sources, small_corpus):
    out = str(tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "empty.jsonl").write_text("{}")
    torn = tmp_path / "torn.tar.gz"
    with tarfile.open(torn, "w:gz") as archive:
        archive.add(sources)
    os.truncate(torn, os.path.getsize(torn) // 2)
    for given_sources, options, words in [
        ([str(tmp_path / "none")], {}, "no such file"),
        ([str(empty)], {}, "no documents for training in"),
        ([str(empty)], {"tokenizer": small_corpus}, "no documents in"),
        ([corpus.__file__], {}, "not a source"),
        ([str(torn)], {"tokenizer": small_corpus}, "damaged"),
        ([sources], {"validation": 0.0}, "validation"),
        ([sources], {"vocab_size": 100}, "vocab_size must be at least 279"),
        (
            [str(tmp_path / "empty.jsonl")],
            {"tokenizer": small_corpus},
            "skipped: 1 no content field",
        ),
        ([str(tmp_path)], {}, "lies inside the source"),
        ([sources], {"workers": 0}, "workers must be at least 1"),
        ([sources], {"shard": (3, 3), "tokenizer": small_corpus}, "shard must be i/n"),
        ([sources], {"shard": (0, 3)}, "shards need one tokenizer"),
        ([sources], {"limit_per_language": 0}, "limit_per_language must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            corpus.prepare(given_sources, out, **({"workers": 1} | options))
        assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]
    modified = lambda: {
        name: os.path.getmtime(os.path.join(small_corpus, name))
        for name in os.listdir(small_corpus)
    }
    before = modified()
    with pytest.raises(ValueError, match="exists already"):
        corpus.prepare([sources], small_corpus)
    assert before == modified()


def test_command_line(tmp_path, sources):
    result = command(
        "-m",
        "corpus",
        sources,
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "400",
        "--validation",
        "0.3",
        "--workers",
        "1",
    )
    assert result.returncode == 0, result.stderr
    assert "python" in result.stdout and "vocabulary 400" in result.stdout
    assert_refused(program("corpus", sources, "--out", str(tmp_path / "out")), "exists already")
    assert_refused(
        program("corpus", str(tmp_path / "none"), "--out", str(tmp_path / "new")), "no such file"
    )
    assert_refused(program("corpus", sources, "--out", "/proc/none/x"), "No such file")
    assert_refused(program("corpus", sources, "--out", str(tmp_path / "n"), "--colour"), "--colour")
    assert_refused(
        program("corpus", sources, "--out", str(tmp_path / "n"), "--shard", "1"), "give i/n"
    )
    assert_refused(program("corpus", sources), "--out")


def test_shards_that_start_together(tmp_path, small_corpus):
    """One may find what another is just beginning to write."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.json.01234567.tmp").write_text("{")
    source = write_files(tmp_path / "in", {f"{i}.py": f"x = {i}\n".encode() * 9 for i in range(9)})
    assert (
        corpus.prepare(
            [source], str(out), tokenizer=small_corpus, workers=1, shard=(0, 2), part_bytes=200
        )
        is None
    )
    assert corpus.prepare(
        [source], str(out), tokenizer=small_corpus, workers=1, shard=(1, 2), part_bytes=200
    )


def test_two_processes_may_write_the_same_part(tmp_path):
    parts = [store.PartWriter(str(tmp_path), 0, np.uint16) for _ in range(2)]
    for i in range(3):
        for part in parts:
            part.add("train", "python", 9, np.arange(i, 9, dtype=np.uint16))
    parts[0].close()
    first = {
        name: (tmp_path / name).read_bytes()
        for name in os.listdir(tmp_path)
        if not name.endswith(".tmp")
    }
    parts[1].close()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == first and len(
        first
    ) == 7


def test_a_worker_that_is_killed_is_one_sentence(tmp_path, small_corpus, monkeypatch):
    monkeypatch.setattr(build, "_encode", _kill)
    source = write_files(tmp_path / "in", GOOD)
    with pytest.raises(ValueError, match="a worker process was killed"):
        corpus.prepare([source], str(tmp_path / "out"), tokenizer=small_corpus, workers=1)
    assert not os.path.exists(tmp_path / "out")


def _kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_languages_that_only_records_name(tmp_path, small_corpus):
    path = tmp_path / "s.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"content": f"x = {i}\n" * 9, "lang": "Vue" if i % 2 else "C"})
            for i in range(40)
        )
    )
    meta = corpus.prepare(
        [str(path)], str(tmp_path / "out"), tokenizer=small_corpus, workers=1, languages=["vue"]
    )
    assert meta["languages"]["vue"]["documents"] == 20 and meta["skipped"] == {
        "another language": 20
    }
