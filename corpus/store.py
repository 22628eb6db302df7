"""Tokens on disk: the format of a corpus directory, its reader, and its writer.

    tokenizer.json           the tokenizer that made the tokens
    prepare.json             how the corpus is made; an interrupted run continues by it
    00007.train.bin          tokens of part 7's training documents, end to end, uint16 or uint32
    00007.train.index.npy    (documents + 1,) of INDEX: where each document begins, its language
    00007.validation.*       the same for the documents held out
    00007.json               counts of part 7, and its languages in the order of their numbers
    meta.json                what META says; the corpus is complete once it exists

A part is complete once its JSON exists. Parts let many machines write one corpus, and let an
interrupted run keep what it has written. Every file has a temporary name until it is whole.

Files are mapped rather than read: the processes of a machine share one copy, and a corpus may be
larger than memory. This file leaves out how text becomes tokens (tokenizer.py) and how tokens
become examples (../data.py).
"""

import contextlib
import io
import json
import os
import re
from collections import Counter

import numpy as np

from common.command_line import first_line
from common.files import read_json, write_whole

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None

FORMAT = 3  # one more whenever older readers or older corpora no longer work
SPLITS = ("train", "validation")
INDEX = np.dtype([("offset", np.int64), ("language", np.uint32)])  # its last entry is the end

COUNTS = {"documents": int, "tokens": int}
META = {  # the entries of meta.json and their shapes; `fits` reads them
    "tokenizer_sha256": str,  # of tokenizer.json
    "vocab_size": int,  # of the same
    "dtype": {"uint16", "uint32"},  # of the tokens
    "splits": {split: COUNTS for split in SPLITS},  # the sums over the parts
    "languages": {str: COUNTS | {"bytes": int}},  # the one with most tokens first
    "skipped": {str: int},  # why documents were left out, and how many
    # Part 0 first. Each entry also says which documents of which sources the part is made of:
    # "sources": {path: [first, last]}, counted from 0.
    "parts": [{split: COUNTS for split in SPLITS}],
}

# Every file that prepare writes, and the end of its name until it is whole. Only these are removed.
TEMPORARY = r"\.[0-9a-f]{8}\.tmp"
OURS = re.compile(
    r"((prepare|tokenizer|tokenizer_config|meta)\.json"
    r"|\d{5,}\.(json|(train|validation)\.(bin|index\.npy)))"
    rf"({TEMPORARY})?"
    r"|\.lock"
)

# ---- meta.json -----------------------------------------------------------------------------------


def read_meta(directory):
    """The meta.json of a corpus directory, which fits META.

    Raises FileNotFoundError or ValueError if the directory holds no complete corpus.
    """
    path = os.path.join(directory, "meta.json")
    if not os.path.exists(path):
        advice = f"make one with `python -m corpus SOURCE... --out {directory}`"
        raise FileNotFoundError(f"{directory}: no corpus here (no meta.json); {advice}")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: not of this version's format; prepare the corpus again")

    wrong = [name for name, shape in META.items() if not fits(meta.get(name), shape)]
    wrong += [name for name in ("languages", "parts") if not meta.get(name)]  # empty
    if wrong:
        raise _damaged(path, f"{wrong[0]!r} is missing, or not what it should be")
    return meta


def fits(value, shape):
    """True if a value read from JSON has this shape. META shows how shapes are written."""
    if shape is int:  # a count
        return type(value) is int and 0 <= value < 2**63  # to isinstance, True is an int as well
    if shape is str:
        return isinstance(value, str)
    if isinstance(shape, set):  # one of these strings
        return isinstance(value, str) and value in shape
    if isinstance(shape, list):  # any number of items of the one shape in it
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(value, dict):
        return False
    if str in shape:  # any names, whose values have the one shape in it
        return all(fits(item, shape[str]) for item in value.values())
    return all(fits(value.get(name), inner) for name, inner in shape.items())  # these names


def write_meta(out, count, skipped, tokenizer, dtype, sources):
    """Writes meta.json of a corpus whose `count` parts are there, and returns it.

    skipped: documents left out before they came to any part, by reason.
    Raises ValueError, which names the sources, if the parts hold no documents.
    """
    # Add up the parts: `update` of a Counter adds.
    parts = [read_json(part_file(out, number, "json")) for number in range(count)]
    skipped = Counter(skipped)
    splits = {split: Counter(documents=0, tokens=0) for split in SPLITS}
    languages = {}  # name -> Counter of documents, bytes and tokens
    for part in parts:
        skipped.update(part["skipped"])
        for split in SPLITS:
            splits[split].update(part["splits"][split])
        for language, counts in part["languages"].items():
            languages.setdefault(language, Counter()).update(counts)
    if not languages:
        raise ValueError(f"no documents in {', '.join(sources)} (skipped: {reasons(skipped)})")

    # People read this file: largest first. Equal ones by name, whatever the order of the parts.
    languages = sorted(languages.items(), key=lambda item: (-item[1]["tokens"], item[0]))
    skipped = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    meta = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": splits,
        "languages": dict(languages),
        "skipped": dict(skipped),
        "parts": [part["splits"] | {"sources": part["sources"]} for part in parts],
    }
    content = json.dumps(meta, indent=1)
    remove_ours(out, is_temporary)  # what runs that were killed have left
    write_whole(os.path.join(out, "meta.json"), content)
    return json.loads(content)


def reasons(skipped):
    """Documents left out, for people: "3 empty, 1 not UTF-8"."""
    return ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "none"


def _damaged(path, words):
    """The error to raise for a damaged file."""
    return ValueError(f"{path}: damaged ({words}); prepare the corpus again")


# ---- the reader ----------------------------------------------------------------------------------


def part_file(directory, number, name):
    """The path of a file of a part: DIRECTORY/00007.train.bin."""
    return os.path.join(directory, f"{number:05d}.{name}")


def open_parts(directory, split, meta):
    """A PartReader for each part of a split. meta: from read_meta.

    Raises ValueError, which names the file, if one of them is damaged.
    """
    # NumPy keeps a descriptor open for each mapped file: two files of each part in each split, and
    # 1,024, the usual limit, for everything else.
    dtype = np.dtype(meta["dtype"])
    allow_open_files(4 * len(meta["parts"]) + 1024)
    return [
        PartReader(directory, number, split, part[split], dtype)
        for number, part in enumerate(meta["parts"])
    ]


def allow_open_files(count):
    """Raises the soft limit of open files to `count`, or as far as the hard limit allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY  # which is -1 on Linux, and must not be compared by size
    wanted = count if hard == unlimited else min(count, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class PartReader:
    """The documents of one split of one part, mapped.

    Document d is tokens[offsets[d] : offsets[d + 1]]. The system reads tokens from disk when they
    are first used. Raises ValueError, which names the file, if one of its files is damaged.
    """

    def __init__(self, directory, number, split, counts, dtype):
        index_path = part_file(directory, number, f"{split}.index.npy")
        index = map_index(index_path, counts["documents"] + 1)
        tokens_path = part_file(directory, number, f"{split}.bin")
        facts = read_json(part_file(directory, number, "json"))
        self.tokens = map_tokens(tokens_path, counts["tokens"], dtype)  # (tokens,)
        self.offsets = index["offset"]  # (documents+1,)
        self.language_numbers = index["language"][:-1]  # (documents,)
        self.languages = list(facts.get("languages", ()))  # names, in the order of their numbers

        # Documents lie end to end in the file. After this check no offset leads outside.
        ends = (self.offsets[0], self.offsets[-1])
        shortest = np.diff(self.offsets).min(initial=2)
        if ends != (0, counts["tokens"]) or shortest < 2:
            raise _damaged(index_path, f"it does not fit {tokens_path}")
        if np.any(self.language_numbers >= len(self.languages)):
            raise _damaged(index_path, "it has languages that the part's JSON does not name")

    def language(self, document):
        """The name of the language of a document of this part."""
        return self.languages[self.language_numbers[document]]


def map_tokens(path, count, dtype):
    """The tokens (count,) of a .bin file. Raises ValueError if its size is another."""
    size = os.path.getsize(path)
    expected = count * dtype.itemsize
    # Reading a mapped file beyond its end would end the process (SIGBUS).
    if size != expected:
        words = f"{size:,} bytes instead of {expected:,}"
        raise ValueError(f"{path}: {words}; prepare the corpus again")
    if count == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # plain arrays are sliced faster


def map_index(path, length):
    """The entries (length,) of an index. Raises ValueError if the file holds anything else."""
    try:
        index = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python, so this may be any error
        raise _damaged(path, first_line(error)) from None
    if index.dtype != INDEX or index.shape != (length,):
        raise _damaged(path, f"not {length:,} entries of {INDEX}")
    return index.view(np.ndarray)


# ---- the writer ----------------------------------------------------------------------------------


class PartWriter:
    """A part that is being made, in memory until it is closed: about 70 MB of tokens.

    Two processes may write the same part, because they write the same bytes.
    """

    def __init__(self, directory, number, dtype):
        self.directory = directory
        self.number = number
        self.dtype = np.dtype(dtype)
        self.tokens = {split: [] for split in SPLITS}  # an array for each document
        self.numbers = {split: [] for split in SPLITS}  # of each document's language
        self.languages = {}  # name -> counts; its number is its place
        self.skipped = Counter()  # reason -> documents that the caller left out

    def add(self, split, language, size, tokens):
        """Adds a document: its split, its language, its size in bytes, and tokens (2 or more)."""
        counts = self.languages.setdefault(language, {"documents": 0, "bytes": 0, "tokens": 0})
        counts["documents"] += 1
        counts["bytes"] += size
        counts["tokens"] += len(tokens)
        self.tokens[split].append(np.asarray(tokens, self.dtype))
        self.numbers[split].append(list(self.languages).index(language))

    def close(self, contents=None):
        """Writes the part. contents: what the documents are that it is made of, if that is known
        (`documents.Contents`).
        """
        splits = {}
        for split in SPLITS:
            lengths = [len(tokens) for tokens in self.tokens[split]]
            splits[split] = {"documents": len(lengths), "tokens": sum(lengths)}
            index = np.zeros(len(lengths) + 1, INDEX)  # (documents+1,)
            index["offset"][1:] = np.cumsum(lengths)
            index["language"][:-1] = self.numbers[split]
            npy = io.BytesIO()
            np.save(npy, index)
            self.write(f"{split}.index.npy", npy.getvalue())
            self.write(f"{split}.bin", b"".join(self.tokens[split]))

        # Last: with its JSON, the part is complete.
        facts = {
            "splits": splits,
            "languages": self.languages,
            "skipped": dict(sorted(self.skipped.items())),
            "sources": contents.sources if contents else {},
            "read": contents.digest if contents else "",
        }
        self.write("json", json.dumps(facts))

    def write(self, name, content):
        """Writes a file of this part."""
        write_whole(part_file(self.directory, self.number, name), content)


def check_read(out, number, digest):
    """Raises ValueError if a part exists that was made of documents with another digest."""
    path = part_file(out, number, "json")
    if os.path.exists(path) and read_json(path).get("read") != digest:
        advice = "bring them back as they were, or begin anew in another directory"
        raise ValueError(f"{path}: the sources have changed since it was made; {advice}")


def is_temporary(name):
    """True for the name of a file that this program began to write."""
    return OURS.fullmatch(name) and re.search(TEMPORARY + "$", name)


def remove_ours(out, which=OURS.fullmatch):
    """Removes those of this program's files for whose names `which` is true; nobody else's."""
    for name in filter(which, os.listdir(out)):
        with contextlib.suppress(OSError):  # it may be gone
            os.remove(os.path.join(out, name))
