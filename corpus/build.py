"""From sources to a corpus directory: tokens on disk, which `corpus.store` reads.

    sources -> distinct documents -> chunks -> tokens, on all cores -> parts -> meta.json

A part ends where `part_bytes` of distinct documents have been read, so it depends on the sources
and the arguments alone. That makes a corpus

* restartable: stopped at any moment, the same command goes on. It reads the documents of finished
  parts, but does not tokenize them again. Each part keeps a digest of its documents, which shows if
  the sources have changed since;
* divisible: shard i of n writes the parts p with p % n == i. The machines need not know of each
  other, and write the same files as one machine would.

A corpus is complete once meta.json exists; the shard that finishes last writes it.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import sysconfig
from collections import Counter
from typing import NamedTuple

import numpy as np

from common.files import lock_directory, read_json, write_whole
from corpus.clean import NearDuplicates
from corpus.documents import documents, text_of
from corpus.encode import Encoder, chunks_of, encode_in_order
from corpus.git_history import read_commits
from corpus.languages import LANGUAGE_OF
from corpus.records import RECORDS
from corpus.sources import TABLES, readers
from corpus.store import PartWriter, check_read, is_temporary, reasons, remove_ours, write_meta
from corpus.tokenizer import Tokenizer, train_tokenizer

PART_BYTES = 128_000_000  # of text: about 35 M tokens
TOKENIZER_BYTES = 1_000_000_000  # of text for a tokenizer: more takes memory and changes little


class Recipe(NamedTuple):
    """Everything that decides what the files of a corpus hold. It is kept in prepare.json."""

    sources: list  # of paths
    tokenizer: str | int  # the hash of one that is given, or the vocabulary of one to train
    validation: float  # this and the others are as for `prepare`
    commits: bool
    languages: list | None  # sorted
    limit_per_language: int | None
    clean: bool
    near_dedup: bool
    part_bytes: int

    def documents(self, skipped, description):
        """The stream of `Item`s. skipped: a Counter of what is left out, by reason."""
        choice = (self.commits, self.languages, self.limit_per_language)
        return documents(self.sources, skipped, *choice, description)


def prepare(
    sources=None,  # paths, see sources.py; None: this Python's standard library
    out="corpora/python",  # the directory to make, or to go on with
    *,
    vocab_size=49156,  # of a tokenizer trained on the documents that are not held out,
    tokenizer=None,  # unless one is given: a path or a `Tokenizer`
    validation=0.05,  # the share of the documents that is held out
    workers=None,  # processes; None: one for each core
    commits=False,  # read the histories of git repositories too
    languages=None,  # names of those to take; None: all
    limit_per_language=None,  # the most documents of each; the first ones, before cleaning
    clean=False,  # leave out what StarCoder's basic filters do
    near_dedup=False,  # leave out near duplicates
    shard=(0, 1),  # (i, n): write every n-th part from the i-th
    part_bytes=PART_BYTES,  # of text in a part
):
    """Makes a corpus directory. Returns its meta.json, or None if other shards have yet to finish.

    Tokens are uint16, or uint32 if the vocabulary needs it. Raises ValueError for bad sources or
    arguments, for sources without documents, and for an `out` that holds something else.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    sources = [os.fspath(source) for source in sources or [sysconfig.get_paths()["stdlib"]]]
    languages = sorted(languages) if languages is not None else None
    out = os.path.realpath(out)
    check_arguments(sources, tokenizer, validation, languages, shard)
    check_sources(sources, out, commits)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    near = NearDuplicates() if near_dedup else None
    learned = tokenizer.sha256 if tokenizer else vocab_size
    recipe = Recipe(
        sources, learned, validation, commits, languages, limit_per_language, clean, near_dedup,
        part_bytes,
    )  # fmt: skip

    with corpus_directory(out, recipe, shard):
        if os.path.exists(os.path.join(out, "tokenizer.json")):
            tokenizer = Tokenizer.from_pretrained(out)
        elif tokenizer is None:
            tokenizer = train_tokenizer(training_texts(recipe), vocab_size)
        tokenizer.save_pretrained(out)

        # Documents are read here, encoded by the workers, and written here in their order.
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        skipped = Counter()
        chunks = chunks_of(recipe.documents(skipped, "tokenizing"), part_bytes)
        wanted = functools.partial(is_wanted, shard=shard, done=parts_in(out))
        encoder = Encoder(out, clean, near_dedup, dtype)
        encoded = encode_in_order(chunks, encoder, wanted, workers or os.cpu_count())
        with contextlib.closing(encoded):  # ends the workers, also if writing fails
            digests = write_parts(out, encoded, wanted, validation, near, dtype)

        # Other shards may have written parts since, and an earlier run more parts than there are.
        for part in sorted(parts_in(out)):
            check_read(out, part, digests[part] if part < len(digests) else "no documents")
        return write_meta(out, len(digests), skipped, tokenizer, dtype, sources)


def check_arguments(sources, tokenizer, validation, languages, shard):
    """Raises ValueError for arguments of `prepare` that are wrong whatever the sources hold."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard must be i/n with 0 <= i < n, got {i}/{n}")
    if n > 1 and tokenizer is None:
        words = "train it beforehand, on a part of the sources, and give it with --tokenizer"
        raise ValueError(f"shards need one tokenizer: {words}")
    known = {*LANGUAGE_OF.values(), *RECORDS}
    unknown = {*(languages or [])} - known
    # The records of a table may name languages that are not known here.
    if unknown and not any(source.endswith(TABLES) for source in sources):
        raise ValueError(f"no language named {min(unknown)}; known: {', '.join(sorted(known))}")


def check_sources(sources, out, commits):
    """Raises ValueError for a source that is missing, of no known kind, or that `out` lies in."""
    found = [reader for source in sources for reader in readers(source, commits)]
    if commits and not any(reader is read_commits for _, reader, _ in found):
        raise ValueError("--commits: none of the sources is a git repository or holds one")
    for source in sources:
        # It would be read while it is written.
        if os.path.isdir(source) and out.startswith(os.path.join(os.path.realpath(source), "")):
            words = "choose a directory outside of it"
            raise ValueError(f"{out} lies inside the source {source}; {words}")


# ---- the directory ------------------------------------------------------------------------------


@contextlib.contextmanager
def corpus_directory(out, recipe, shard):
    """Makes and locks a corpus directory; removes it at the end if nothing worth keeping is in it.

    Raises ValueError if something else is there, or if another process writes there.
    """
    existed = os.path.lexists(out)  # if so, the directory itself stays
    check_directory(out, recipe)
    os.makedirs(out, exist_ok=True)
    # Before the lock is taken: shards that start together may all write it, and write the same.
    write_whole(os.path.join(out, "prepare.json"), json.dumps(recipe._asdict(), indent=1))
    with lock_corpus(out, shard):
        try:
            yield
        finally:
            trained = isinstance(recipe.tokenizer, int)  # here, which may have taken minutes
            kept = trained and os.path.exists(os.path.join(out, "tokenizer.json"))
            # One of several shards cannot know what the others are about to write.
            if not kept and not parts_in(out) and shard[1] == 1:
                remove_ours(out)
                if not existed:
                    with contextlib.suppress(OSError):  # somebody may have put a file there
                        os.rmdir(out)


def check_directory(out, recipe):
    """Raises ValueError unless `out` is free, or holds a corpus begun by the same recipe."""
    words = "choose another directory or remove it"
    begun = os.path.join(out, "prepare.json")
    if os.path.exists(os.path.join(out, "meta.json")):
        raise ValueError(f"{out}: exists already, and is whole; {words}")
    if os.path.exists(begun):
        before = read_json(begun)
        for name, value in recipe._asdict().items():
            if before.get(name) != value:
                difference = f"{name} {before.get(name)}, not {value}"
                raise ValueError(f"{out}: was begun with {difference}; {words}")
    elif os.path.exists(out):
        # What a killed process had only begun to write is no reason to refuse.
        if not os.path.isdir(out) or not all(map(is_temporary, os.listdir(out))):
            raise ValueError(f"{out}: exists already; {words}")


def lock_corpus(out, shard):
    """Locks `out` for shard i of n; returns what unlocks it, as `lock_directory` does.

    Raises ValueError if another process has locked it for the same shard, or for another n.
    """
    i, n = shard
    with lock_directory(out, f".{i}-of-{n}.lock") as lock:
        # With this lock held: of two processes that start together, one at least sees the other.
        for name in os.listdir(out):
            other = re.fullmatch(r"\.\d+-of-(\d+)\.lock", name)
            if other and int(other[1]) != n:
                lock_directory(out, name).close()  # raises, unless its process has died
        return lock.pop_all()


def parts_in(out):
    """The numbers of the parts that a corpus directory holds."""
    # A part is there once its JSON is: its other files are written before.
    names = (re.fullmatch(r"(\d{5,})\.json", name) for name in os.listdir(out))
    return {int(name[1]) for name in names if name}


def is_wanted(part, shard, done):
    """True for a part that this shard has to write. done: the parts that were there before."""
    i, n = shard
    return part % n == i and part not in done


# ---- documents to parts -------------------------------------------------------------------------


def training_texts(recipe):
    """Yields the texts that a tokenizer is trained on. Raises ValueError if there are none."""
    size = 0
    skipped = Counter()
    for item in recipe.documents(skipped, "reading for the tokenizer"):
        pieces, reason = text_of(item.document, recipe.clean)
        if reason:
            skipped[reason] += 1
        elif item.share >= recipe.validation:  # never one that is held out
            yield "".join(text for _, text in pieces)
            size += item.size
            if size > TOKENIZER_BYTES:
                return
    if not size:  # the sources are empty, or all is held out
        words = f"no documents for training in {', '.join(recipe.sources)}"
        raise ValueError(f"{words} (skipped: {reasons(skipped)})")


def write_parts(
    out,
    encoded,  # (part, item, `Encoded`), in order
    wanted,  # a function of a part's number: True if the part is to be written
    validation,
    near,  # a `NearDuplicates`, or None
    dtype,  # of tokens
):
    """Writes the parts that are wanted, checks the others, and returns a digest of each.

    The digest stands for the documents that a part is made of, those left out included.
    Raises ValueError if a part that is there was made of other documents.
    """
    digests = []
    for part, group in itertools.groupby(encoded, key=operator.itemgetter(0)):
        writer = PartWriter(out, part, dtype) if wanted(part) else None
        digest = hashlib.sha256()
        for _, item, (tokens, reason, signature) in group:
            language = item.document.language
            digest.update(f"{item.share!r} {item.size} {language}\n".encode())  # 53 bits of hash
            # Every shard asks this about every document, so all get the same answers.
            if signature is not None and near.seen(signature):
                reason = "near duplicate"
            if writer and reason:
                writer.skipped[reason] += 1
            elif writer:
                split = "validation" if item.share < validation else "train"
                writer.add(split, language, item.size, tokens)

        digests.append(digest.hexdigest())
        if writer:
            writer.close(digests[part])
        else:  # fails early: the check at the end of `prepare` may be hours away
            check_read(out, part, digests[part])
    return digests
