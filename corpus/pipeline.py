"""A corpus made by many tasks: the same functions as on one machine, as steps of datatrove.

    hashes       N tasks   a hash of each document
    duplicates  32 tasks   sorts the hashes: which documents have been seen before
    signatures   N tasks   25 numbers of each document that is left   (these three
    groups      25 tasks   sorts the numbers: pairs that share one     with --near-dedup)
    alike        1 task    which documents are like an earlier one
    tokens       N tasks   reads, leaves out, tokenizes, writes parts

A task is handed a slice of the sources, in their order, and what is "earlier" is decided by (task,
document), so every path keeps the same documents as one machine that reads all of them in a row.
The jobs `hashes`, `signatures` and `tokens` each read the sources anew, at some 200 MB/s, since a
copy of them on disk would cost more. Parts end where a task ends, too; apart from that they are
what one machine writes.

Reference: datatrove (https://github.com/huggingface/datatrove), with which FineWeb was made. Its
classes find, pair and drop duplicates. Ours are the reader, the filter and the writer, which do
what one machine does, and `Alike`: datatrove's own third stage joins chains of similar documents
and keeps any one of them, which nobody can decide while reading.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from typing import NamedTuple

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupFilter,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters.base_filter import BaseFilter

from common.files import read_json, write_whole
from corpus.clean import BANDS, signature_of
from corpus.documents import Contents, items_of, text_of
from corpus.encode import TOO_SHORT, tokens_of
from corpus.store import PartWriter, check_read, part_file

# How datatrove is told to compare. A signature is one number for each band.
GROUPS = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=1)
KEY = np.dtype([("number", "<u8"), ("document", "<u4")])  # of its files of signatures
PAIR = np.dtype([(name, "<u4") for name in ("task", "document", "later_task", "later_document")])
FIRST_PRIORITY = 65535  # the highest that its exact deduplication knows: of task 0
FINDERS = 32  # tasks that sort the hashes: each reads a file of every other task
PAIRS_AT_ONCE = 10_000_000  # of similar documents in memory: half a GB while they are sorted
RECORDS_AT_ONCE = 1000  # of a file of hashes: datatrove reads 5 unless it is told


def slices_of(sources, tasks):
    """Cuts a list of `Source`s into one for each task, in order, of about as many bytes each."""
    # Nobody knows how large a history is, and some servers do not say it of a file.
    known = [source.size for source in sources if source.size] or [1]
    sizes = [source.size or sum(known) / len(known) for source in sources]
    slices = [[] for _ in range(tasks)]
    begin = 0
    for source, size in zip(sources, sizes):
        middle = begin + size / 2
        slices[min(int(middle * tasks / sum(sizes)), tasks - 1)].append(source)
        begin += size
    return slices


def pipelines(sources, out, folder, recipe, dtype):
    """{job: (its tasks, its steps)}, in their order.

    sources: of `Source`. out: the corpus directory, which holds the tokenizer. folder: for what one
    job leaves for the next. recipe: a `build.Recipe`. dtype: of tokens.
    """
    tasks = recipe.tasks
    slices = slices_of(sources, tasks)

    def place(name):
        return os.path.join(folder, name)

    def distinct(tally):
        """The steps that yield the documents of a task without exact duplicates, and clean."""
        seen = Seen(tally, "exact duplicate")
        return [
            Read(slices, recipe.languages, place("read"), tally),
            ExactDedupFilter(place("duplicates"), EXACT, exclusion_writer=seen),
            NumberParts(recipe.part_bytes, tally),
            Clean(recipe.clean, tally),
        ]

    jobs = {}
    finders = min(tasks, FINDERS)
    read = Read(slices, recipe.languages, place("read"), Tally())
    jobs["hashes"] = (tasks, [read, ExactDedupSignature(place("hashes"), EXACT, finders)])
    find = ExactFindDedups(
        place("hashes"), place("duplicates"), EXACT, lines_to_buffer=RECORDS_AT_ONCE
    )
    jobs["duplicates"] = (finders, [find])

    tally = Tally()
    left = distinct(tally)  # what is left to tokenize
    if recipe.near_dedup:
        jobs["signatures"] = (tasks, [*distinct(Tally()), Sign(place("signatures"))])
        groups = MinhashDedupBuckets(
            place("signatures"), place("pairs"), config=GROUPS, lines_to_buffer=RECORDS_AT_ONCE
        )
        jobs["groups"] = (BANDS, [groups])
        jobs["alike"] = (1, [Alike(place("pairs"), place("alike"), tasks)])
        seen = Seen(tally, "near duplicate")
        left.append(MinhashDedupFilter(place("alike"), exclusion_writer=seen))
    writer = WriteParts(place("parts"), out, dtype, recipe.validation, tally)
    jobs["tokens"] = (tasks, [*left, writer])
    return jobs


# ---- what is left out ----------------------------------------------------------------------------


class Part(NamedTuple):
    """A part of a task."""

    contents: Contents
    skipped: Counter  # of what was left out, by reason


class Tally:
    """What a task has read and left out. Its steps share one."""

    def __init__(self):
        self.skipped = Counter()  # before any part, by reason
        self.parts = []  # of `Part`

    def skip(self, document, reason):
        """Counts a document that is left out."""
        part = document.metadata.get("part")
        counter = self.skipped if part is None else self.parts[part].skipped
        counter[reason] += 1


class Seen:
    """Counts what a filter of datatrove drops, in the place of a writer of such documents."""

    def __init__(self, tally, reason):
        self.tally = tally
        self.reason = reason

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def write(self, document, rank=0):
        """Counts a document."""
        self.tally.skip(document, self.reason)


# ---- reading -------------------------------------------------------------------------------------


class OtherSources(ValueError):
    """A task has read something else than it did for an earlier job."""


class Read(PipelineStep):
    """Yields the documents of a task's sources.

    Raises ValueError if a source is damaged, and OtherSources if the sources have changed.
    """

    type = "reader"
    name = "sources"

    def __init__(self, slices, languages, folder, tally):
        super().__init__()
        self.slices = slices  # of the sources, one for each task
        self.languages = languages
        self.folder = folder  # keeps what each task has read
        self.tally = tally

    def run(self, data=None, rank=0, world_size=1):
        """Yields a datatrove `Document` for each `Item`, which is in its metadata."""
        contents = Contents()
        count = 0
        for source in self.slices[rank]:
            for item in items_of(source, self.tally.skipped, self.languages):
                contents.add(item)
                count += 1
                self.stat_update("documents")
                name = f"{item.source}/{item.number}"
                yield Document(text="", id=name, metadata={"item": item, "task": rank})
        self.check({"documents": count, "digest": contents.digest}, rank)

    def check(self, read, rank):
        """Raises ValueError if another job has read something else."""
        os.makedirs(self.folder, exist_ok=True)
        path = os.path.join(self.folder, f"{rank:05d}.json")
        if not os.path.exists(path):
            write_whole(path, json.dumps(read))
        elif read_json(path) != read:
            first = self.slices[rank][0].path
            words = "the sources have changed since this corpus was begun"
            advice = "bring them back as they were, or begin anew in another directory"
            raise OtherSources(f"{first} or one after it: {words}; {advice}")


class NumberParts(PipelineStep):
    """Says to which part of its task a document belongs, as `encode.chunks_of` does."""

    type = "reader"
    name = "parts"

    def __init__(self, part_bytes, tally):
        super().__init__()
        self.part_bytes = part_bytes
        self.tally = tally

    def run(self, data, rank=0, world_size=1):
        """Yields the documents, with the number of their part in their metadata."""
        size = self.part_bytes  # as if a part had just ended
        for document in data:
            if size >= self.part_bytes:
                self.tally.parts.append(Part(Contents(), Counter()))
                size = 0
            item = document.metadata["item"]
            self.tally.parts[-1].contents.add(item)
            size += item.size
            document.metadata["part"] = len(self.tally.parts) - 1
            yield document


class Clean(BaseFilter):
    """Leaves out what has no text, or, on request, is not clean (`documents.text_of`)."""

    name = "clean"

    def __init__(self, clean, tally):
        super().__init__()
        self.clean = clean
        self.tally = tally

    def filter(self, document):
        """True, or (False, the reason); keeps the pieces of text in the metadata."""
        pieces, reason = text_of(document.metadata["item"].document, self.clean)
        if reason:
            self.tally.skip(document, reason)
            return False, reason
        document.metadata["pieces"] = pieces
        return True


# ---- duplicates ----------------------------------------------------------------------------------


def content_hash(document) -> bytes:
    """What two documents of the same content share."""
    return document.metadata["item"].digest


def priority(document):
    """Which of several documents of the same content is kept: that of the first task."""
    return FIRST_PRIORITY - document.metadata["task"]


EXACT = ExactDedupConfig(content_hash, priority)


class Sign(PipelineStep):
    """Writes a signature of each document, as `MinhashDedupBuckets` reads it: a file for each band,
    sorted by (number, document).
    """

    type = "dedup"
    name = "signatures"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        """Reads all documents, and yields none."""
        signatures = []
        for document in data:
            pieces = document.metadata["pieces"]
            signatures.append(signature_of("\n".join(text for _, text in pieces)))
            self.stat_update("documents")
        numbers = np.array(signatures, np.uint64).reshape(-1, BANDS)
        for band in range(BANDS):
            keys = np.empty(len(numbers), KEY)
            keys["number"] = numbers[:, band]
            keys["document"] = np.arange(len(numbers))
            keys.sort(order=("number", "document"))
            folder = os.path.join(self.folder, f"bucket_{band:03d}")
            os.makedirs(folder, exist_ok=True)
            # Not by way of a temporary file: `MinhashDedupBuckets` would read one that was left.
            keys.tofile(os.path.join(folder, f"{rank:05d}.minhash.sig"))


class Alike(PipelineStep):
    """Pairs of similar documents to a list for each task: those that have an earlier one.

    Reads what `MinhashDedupBuckets` writes, and writes what `MinhashDedupFilter` reads.
    """

    type = "dedup"
    name = "alike"

    def __init__(self, pairs, folder, tasks):
        super().__init__()
        self.pairs = pairs  # the folder of the pairs
        self.folder = folder
        self.tasks = tasks

    def run(self, data=None, rank=0, world_size=1):
        """Yields nothing. Memory: PAIRS_AT_ONCE, then the documents of one task."""
        os.makedirs(self.folder, exist_ok=True)
        # First each band's documents to their tasks, unsorted; then each task's, once each.
        paths = [os.path.join(self.folder, f"{task:06d}.remove") for task in range(self.tasks)]
        for path in paths:
            open(path, "wb").close()  # of an earlier attempt
        for pairs in self.read_pairs():
            pairs = pairs[np.argsort(pairs["later_task"], kind="stable")]
            ends = np.searchsorted(pairs["later_task"], np.arange(self.tasks + 1))
            for task, path in enumerate(paths):
                with open(path, "ab") as f:
                    f.write(pairs["later_document"][ends[task] : ends[task + 1]].tobytes())
        for path in paths:
            documents = np.unique(np.fromfile(path, "<u4"))
            self.stat_update("alike", value=len(documents), unit="task")
            documents.tofile(path)

    def read_pairs(self):
        """Yields the pairs of all bands, PAIRS_AT_ONCE or fewer of them."""
        for name in sorted(os.listdir(self.pairs)):
            with open(os.path.join(self.pairs, name), "rb") as f:
                while len(pairs := np.fromfile(f, PAIR, PAIRS_AT_ONCE)):
                    yield pairs


# ---- writing -------------------------------------------------------------------------------------


class WriteParts(PipelineStep):
    """Tokenizes the documents of a task, and writes its parts; those that are there are only read.

    Raises ValueError if a part that is there was made of other documents.
    """

    type = "writer"
    name = "parts"

    def __init__(self, folder, tokenizer, dtype, validation, tally):
        super().__init__()
        self.folder = folder
        self.tokenizer = tokenizer  # the directory that holds it
        self.dtype = dtype
        self.validation = validation
        self.tally = tally

    def run(self, data, rank=0, world_size=1):
        """Reads all documents, and yields none."""
        folder = os.path.join(self.folder, f"{rank:05d}")
        os.makedirs(folder, exist_ok=True)
        try:
            self.write(data, folder)
        except OtherSources:  # which is known at their end only
            shutil.rmtree(folder)
            raise

    def write(self, data, folder):
        """Writes the parts of all documents."""
        written = 0
        for number, documents in itertools.groupby(data, part_of):
            # A part without a document that is kept is a part all the same.
            for empty in range(written, number):
                self.write_part(folder, empty, [])
            self.write_part(folder, number, documents)
            written = number + 1
        for empty in range(written, len(self.tally.parts)):
            self.write_part(folder, empty, [])
        facts = {"parts": len(self.tally.parts), "skipped": self.tally.skipped}
        write_whole(os.path.join(folder, "task.json"), json.dumps(facts))

    def write_part(self, folder, number, documents):
        """Writes a part, or checks the one that is there."""
        is_there = os.path.exists(part_file(folder, number, "json"))
        writer = PartWriter(folder, number, self.dtype)
        for document in documents:
            self.stat_update("documents")
            if not is_there:
                self.add(writer, document)

        # Known only now: a part has been read to its end when the next one begins.
        part = self.tally.parts[number]
        if is_there:
            check_read(folder, number, part.contents.digest)
        else:
            writer.skipped = part.skipped
            writer.close(part.contents)

    def add(self, writer, document):
        """Tokenizes a document, and adds it to its part."""
        item = document.metadata["item"]
        tokens = tokens_of(document.metadata["pieces"], self.tokenizer, self.dtype)
        if tokens is None:
            self.tally.skip(document, TOO_SHORT)
            return
        split = "validation" if item.share < self.validation else "train"
        writer.add(split, item.document.language, item.size, tokens)


def part_of(document):
    """The number of a document's part."""
    return document.metadata["part"]
