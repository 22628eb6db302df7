"""TODO."""

import contextlib
import functools
import json
import os
import re
import uuid
from collections import Counter

import numpy as np
import torch

from common.command_line import first_line
from common.files import read_json, write_whole


def read_meta(directory):
    """The meta.json of a corpus directory. Raises FileNotFoundError or ValueError for a directory that holds no whole corpus."""
    path = os.path.join(directory, "meta.json")
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{directory}: no corpus here (no meta.json); make one with `python corpus.py SOURCE... --out {directory}`"
        )
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != 2:
        raise ValueError(f"{path}: not of this version's format; prepare the corpus again")
    if not _is_whole(meta):
        words = "damaged (an entry is missing, or is none of its kind)"
        raise ValueError(f"{path}: {words}; prepare the corpus again")
    return meta


def reasons(skipped):
    return ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "none"


SPLITS = ("train", "validation")


def _is_whole(meta):
    """True if a meta.json has all entries, of their types, and the counts of its parts add up."""

    def is_table(entry, *columns):
        """Columns: the counts that each row has."""
        rows = entry.values() if isinstance(entry, dict) else [None]
        for row in rows:
            if not isinstance(row, dict) or not all(
                is_count(row.get(column)) for column in columns
            ):
                return False
        return True

    def is_count(entry):
        return type(entry) is int and 0 <= entry < 2**63

    splits, parts, languages = meta.get("splits"), meta.get("parts"), meta.get("languages")
    if not isinstance(parts, list):
        return False
    if not all(is_table(part, "documents", "tokens", "longest") for part in parts):
        return False
    if not is_table(splits, "documents", "tokens"):
        return False
    if not is_table(languages, "documents", "bytes", "tokens"):
        return False
    if not languages or any(language["tokens"] == 0 for language in languages.values()):
        return False
    if not all(table.keys() == set(SPLITS) for table in [splits, *parts]):
        return False
    for split in SPLITS:
        for name in ("documents", "tokens"):
            if splits[split][name] != sum(part[split][name] for part in parts):
                return False
    if not isinstance(meta.get("tokenizer_sha256"), str) or meta.get("dtype") not in (
        "uint16",
        "uint32",
    ):
        return False
    skipped = meta.get("skipped")
    return (
        is_count(meta.get("vocab_size"))
        and isinstance(skipped, dict)
        and all(map(is_count, skipped.values()))
    )


INDEX = np.dtype([("offset", np.int64), ("language", np.uint32)])


WINDOWS_TABLE = 4096


def part_file(directory, number, name):
    """The path of a file of a part: DIRECTORY/00007.train.bin."""
    return os.path.join(directory, f"{number:05d}.{name}")


def windows_table(lengths):
    """[C] -> windows of C tokens in documents of these lengths, C < WINDOWS_TABLE: with it, opening a part need not read its index."""
    lengths, counts = np.unique(lengths, return_counts=True)
    table, size = np.zeros(WINDOWS_TABLE, np.int64), np.arange(1, WINDOWS_TABLE)
    for i in range(0, len(lengths), 100):  # few at a time stay in cache
        table[1:] += counts[i : i + 100] @ -(-lengths[i : i + 100, None] // size)
    return table


class PartReader:
    """One part of a split. What is in its files is read when it is first asked for."""

    def __init__(self, directory, number, split, counts, dtype, room):
        self.directory, self.number, self.stem, self.counts, self.dtype, self.room = (
            directory,
            number,
            f"{split}.",
            counts,
            dtype,
            room,
        )
        path, count = self.path("bin"), counts["tokens"]
        if os.path.getsize(path) != count * dtype.itemsize:
            raise ValueError(
                f"{path}: {os.path.getsize(path):,} bytes instead of {count * dtype.itemsize:,}; prepare the corpus again"
            )
        self.index = self.load("index.npy", counts["documents"] + 1, INDEX)
        if (self.index["offset"][0], self.index["offset"][-1]) != (0, count):
            raise ValueError(
                f"{self.path('index.npy')} does not fit {path}; prepare the corpus again"
            )
        if room < WINDOWS_TABLE:
            self.windows = int(self.load("windows.npy", WINDOWS_TABLE, np.dtype(np.int64))[room])
        else:
            self.windows = int(self.first_window[-1])
        # The exact sum is looked at when the index is read.
        if not counts["documents"] <= self.windows <= count:
            raise ValueError(f"{self.path('windows.npy')}: damaged; prepare the corpus again")

    def path(self, name):
        return part_file(self.directory, self.number, self.stem + name)

    def load(self, name, length, dtype):
        """The array (length,) of a .npy file, mapped."""
        path = self.path(name)
        try:
            with open(path, "rb") as f:
                np.lib.format.read_magic(f)
                header = np.lib.format.read_array_header_1_0(f)
                start = f.tell()
            if header != ((length,), False, dtype):
                raise ValueError(f"not {length:,} entries of {dtype}")
            if os.path.getsize(path) != start + length * dtype.itemsize:
                raise ValueError("cut short, or longer than it says")
        except OSError:
            raise
        except Exception as error:  # NumPy reads the header as Python, and raises as that does
            words = first_line(error)
            raise ValueError(f"{path}: damaged ({words}); prepare the corpus again") from None
        return self.mapped(path, start).view(dtype)

    @staticmethod
    def mapped(path, offset=0):
        """The bytes of a file, mapped. NumPy would keep a file descriptor for each, of which a process may have 1,024."""
        size = os.path.getsize(path)
        return (
            torch.from_file(path, size=size, dtype=torch.uint8).numpy()[offset:]
            if size
            else np.zeros(0, np.uint8)
        )

    @functools.cached_property
    def tokens(self):
        return self.mapped(self.path("bin")).view(self.dtype)

    @property
    def offsets(self):
        return self.index["offset"]

    @functools.cached_property
    def first_window(self):
        lengths = np.diff(self.offsets)
        first = np.concatenate([[0], np.cumsum(-(-lengths // self.room))])
        if lengths.min(initial=2) < 2 or first[-1] != getattr(self, "windows", first[-1]):
            raise ValueError(f"{self.path('index.npy')}: damaged; prepare the corpus again")
        return first

    def language(self, document):
        """The name of the language of a document of this part."""
        number = int(self.index["language"][document])
        if number >= len(self.languages):
            path = self.path("index.npy")
            raise ValueError(f"{path}: damaged (language {number}); prepare the corpus again")
        return self.languages[number]

    @functools.cached_property
    def languages(self):
        path = part_file(self.directory, self.number, "json")
        facts = read_json(path)
        if not isinstance(facts, dict) or not isinstance(facts.get("languages"), dict):
            raise ValueError(f"{path}: damaged (it names no languages); prepare the corpus again")
        return list(facts["languages"])


class PartWriter:
    """A part that is being written. It is there when its JSON is, which comes last.

    Its files have names of their own until they are whole, so that two processes that write the same part do not disturb each other.
    """

    def __init__(self, directory, number, dtype):
        self.directory, self.number, self.dtype, self.unique = (
            directory,
            number,
            np.dtype(dtype),
            uuid.uuid4().hex[:8],
        )
        self.files = {
            split: open(self.temporary(f"{split}.bin"), "wb") for split in ("train", "validation")
        }
        self.index = {split: [(0, 0)] for split in self.files}
        self.languages, self.numbers, self.skipped = {}, {}, Counter()

    def temporary(self, name):
        return part_file(self.directory, self.number, f"{name}.{self.unique}.tmp")

    def add(self, split, language, size, tokens):
        self.files[split].write(tokens)
        counts = self.languages.setdefault(language, {"documents": 0, "bytes": 0, "tokens": 0})
        for key, n in {"documents": 1, "bytes": size, "tokens": len(tokens)}.items():
            counts[key] += n
        index = self.index[split]
        number = self.numbers.setdefault(language, len(self.numbers))
        index[-1] = (index[-1][0], number)  # an entry: where a document begins, and its language
        index.append((index[-1][0] + len(tokens), 0))

    def close(self, read=""):
        """read: a digest of the documents that the part was made of."""
        splits, files = {}, {}
        for split, file in self.files.items():
            index = np.array(self.index[split], INDEX)
            lengths = np.diff(index["offset"])
            splits[split] = {
                "documents": len(lengths),
                "tokens": int(index["offset"][-1]),
                "longest": int(lengths.max(initial=0)),
            }
            files[f"{split}.bin"] = file
            for name, array in (
                (f"{split}.index.npy", index),
                (f"{split}.windows.npy", windows_table(lengths)),
            ):
                files[name] = open(self.temporary(name), "wb")
                np.save(files[name], array)
        for name, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self.temporary(name), part_file(self.directory, self.number, name))
        skipped = dict(sorted(self.skipped.items()))
        facts = {"splits": splits, "languages": self.languages, "skipped": skipped, "read": read}
        write_whole(part_file(self.directory, self.number, "json"), json.dumps(facts))


CHANGED = (
    "the sources have changed since it was made; bring them back as they were, "
    "or begin anew in another directory"
)


def check_read(out, number, digest):
    """Raises ValueError where a part is there that was made of documents with another digest."""
    path = part_file(out, number, "json")
    if not os.path.exists(path):
        return
    before = read_json(path).get("read")
    if before is None:
        raise ValueError(f"{path}: was made by an earlier version; begin anew in another directory")
    if before != digest:
        raise ValueError(f"{path}: {CHANGED}")


def write_meta(out, count, skipped, tokenizer, dtype, sources):
    """Writes meta.json where all parts are there, and returns it; else None."""
    paths = [part_file(out, number, "json") for number in range(count)]
    if missing := [path for path in paths if not os.path.exists(path)]:
        print(
            f"{count - len(missing)} of {count} parts are there; the corpus is whole when the other shards have written theirs"
        )
        return None
    facts, skipped = [read_json(path) for path in paths], Counter(skipped)
    languages, splits = (
        {},
        {split: Counter(documents=0, tokens=0) for split in ("train", "validation")},
    )
    for part in facts:
        skipped.update(part["skipped"])
        for language, counts in part["languages"].items():
            languages.setdefault(language, Counter()).update(counts)
        for split, counts in part["splits"].items():
            splits[split].update(documents=counts["documents"], tokens=counts["tokens"])
    if not languages:
        raise ValueError(f"no documents in {', '.join(sources)} (skipped: {reasons(skipped)})")
    meta = {
        "format": 2,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
        "languages": dict(
            sorted(languages.items(), key=lambda item: (-item[1]["tokens"], item[0]))
        ),
        "skipped": dict(sorted(skipped.items(), key=lambda item: (-item[1], item[0]))),
        "parts": [part["splits"] for part in facts],
    }
    while True:
        remove_ours(out, is_temporary)  # of what was killed
        # Another shard that ends at the same time takes the half-written file for such a one.
        with contextlib.suppress(FileNotFoundError):
            write_whole(os.path.join(out, "meta.json"), json.dumps(meta, indent=1))
            break
    return json.loads(json.dumps(meta))


# The names of the files that this program writes, and how they end while they are written.
TEMPORARY = r"\.[0-9a-f]{8}\.tmp"


OURS = re.compile(
    r"((prepare|tokenizer|tokenizer_config|meta)\.json"
    r"|\d{5,}\.(json|(train|validation)\.(bin|(index|windows)\.npy)))"
    rf"({TEMPORARY})?"
    r"|\.(\d+-of-\d+\.)?lock"
)


def is_temporary(name):
    """Whether a file is one that this program began to write."""
    return OURS.fullmatch(name) and re.search(TEMPORARY + "$", name)


def remove_ours(out, which=OURS.fullmatch):
    """Removes the files of this program, or those for which `which` holds; nobody else's."""
    for name in filter(which, os.listdir(out)):
        with contextlib.suppress(OSError):  # another shard may be doing the same
            os.remove(os.path.join(out, name))
