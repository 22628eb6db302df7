"""From sources to a corpus directory: tokens on disk, which `corpus.store` reads.

    sources -> distinct documents -> chunks -> tokens, on all cores -> parts -> meta.json

A part ends where `part_bytes` of distinct documents have been read, so it depends on the sources
and the arguments alone. That makes a corpus restartable: stopped at any moment, the same command
goes on. It reads the documents of finished parts, but does not tokenize them again. Each part keeps
a digest of its documents, which shows if the sources have changed since. A corpus is complete once
meta.json exists.

With an executor, many tasks do the same (jobs.py, pipeline.py, executors.py).
"""

import contextlib
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
from corpus.clean import NEAR_DUPLICATES, NearDuplicates, check_rensa
from corpus.documents import Contents, documents, text_of
from corpus.encode import Encoder, chunks_of, encode_in_order
from corpus.git_history import read_commits
from corpus.jobs import MOST_TASKS, TASKS, check_packages, has_jobs, remove_jobs, run_jobs
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
    near_dedup: str | None  # how near duplicates are found
    part_bytes: int
    tasks: int | None  # that share the sources; None: one machine reads all of them

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
    executor=None,  # "local", "ray" or "slurm": who runs the tasks of pipeline.py; None: no tasks
    tasks=None,  # that share the sources; None: TASKS
    part_bytes=PART_BYTES,  # of text in a part
):
    """Makes a corpus directory, and returns its meta.json.

    Tokens are uint16, or uint32 if the vocabulary needs it. Raises ValueError for bad sources or
    arguments, for sources without documents, and for an `out` that holds something else.
    With an executor, a script must call this under `if __name__ == "__main__":`, since the
    processes of its tasks import the script.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    sources = [os.fspath(source) for source in sources or [sysconfig.get_paths()["stdlib"]]]
    languages = sorted(languages) if languages is not None else None
    out = os.path.realpath(out)
    check_arguments(sources, validation, languages)
    check_executor(executor, tasks, workers, limit_per_language, out)
    check_sources(sources, out, commits)
    if near_dedup:
        check_rensa()
    if executor:
        tasks = tasks or TASKS
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    learned = tokenizer.sha256 if tokenizer else vocab_size
    recipe = Recipe(
        sources, learned, validation, commits, languages, limit_per_language, clean,
        NEAR_DUPLICATES if near_dedup else None, part_bytes, tasks,
    )  # fmt: skip

    with corpus_directory(out, recipe):
        if os.path.exists(os.path.join(out, "tokenizer.json")):
            tokenizer = Tokenizer.from_pretrained(out)
        elif tokenizer is None:
            tokenizer = train_tokenizer(training_texts(recipe), vocab_size)
        tokenizer.save_pretrained(out)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        workers = workers or os.cpu_count()
        if executor:
            count, skipped = run_jobs(out, recipe, dtype, executor, workers)
        else:
            count, skipped = write_corpus(out, recipe, dtype, workers)
        meta = write_meta(out, count, skipped, tokenizer, dtype, sources)
        remove_jobs(out)
        return meta


def check_arguments(sources, validation, languages):
    """Raises ValueError for arguments of `prepare` that are wrong whatever the sources hold."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    known = {*LANGUAGE_OF.values(), *RECORDS}
    unknown = {*(languages or [])} - known
    # The records of a table may name languages that are not known here.
    if unknown and not any(source.endswith(TABLES) for source in sources):
        raise ValueError(f"no language named {min(unknown)}; known: {', '.join(sorted(known))}")


def check_executor(executor, tasks, workers, limit_per_language, out):
    """Raises ValueError for arguments that do not go together, or if a package is missing."""
    if executor is None:
        if tasks is not None:
            raise ValueError("--tasks: needs --executor")
        return
    if limit_per_language is not None:
        words = "no task knows how many documents the others have"
        raise ValueError(f"--limit-per-language: not with --executor, as {words}")
    if workers is not None and executor != "local":
        raise ValueError("--workers: the cluster decides how many tasks run at once")
    if tasks is not None and not 1 <= tasks <= MOST_TASKS:
        raise ValueError(f"--tasks must lie between 1 and {MOST_TASKS:,}, got {tasks:,}")
    check_packages(executor)
    if executor == "slurm" and re.search(r"[\s%\\]", out):
        raise ValueError(f"{out}: Slurm cannot write there; choose a path without blanks and %")


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
def corpus_directory(out, recipe):
    """Makes and locks a corpus directory; removes it at the end if nothing worth keeping is in it.

    Raises ValueError if something else is there, or if another process writes there.
    """
    existed = os.path.lexists(out)  # if so, the directory itself stays
    check_directory(out, recipe)
    os.makedirs(out, exist_ok=True)
    with lock_directory(out):
        check_directory(out, recipe)  # again: what held the lock until now may have finished
        write_whole(os.path.join(out, "prepare.json"), json.dumps(recipe._asdict(), indent=1))
        try:
            yield
        finally:
            trained = isinstance(recipe.tokenizer, int)  # here, which may have taken minutes
            kept = trained and os.path.exists(os.path.join(out, "tokenizer.json"))
            if not kept and not parts_in(out) and not has_jobs(out):
                remove_ours(out)
                if not existed:
                    with contextlib.suppress(OSError):  # somebody may have put a file there
                        os.rmdir(out)


def check_directory(out, recipe):
    """Raises ValueError unless `out` is free, or holds a corpus begun by the same recipe."""
    words = "choose another directory or remove it"
    begun = os.path.join(out, "prepare.json")
    if os.path.exists(os.path.join(out, "meta.json")):
        remove_jobs(out)  # if it was killed after meta.json
        raise ValueError(f"{out}: exists already, and is whole; {words}")
    if os.path.exists(begun):
        before = read_json(begun)
        for name, value in recipe._asdict().items():
            if before.get(name) != value:
                difference = f"{name} {before.get(name)}, not {value}"
                raise ValueError(f"{out}: was begun with {difference}; {words}")
    elif os.path.exists(out):
        # What a killed process had only begun to write is no reason to refuse.
        if not os.path.isdir(out) or not all(map(is_scratch, os.listdir(out))):
            raise ValueError(f"{out}: exists already; {words}")


def is_scratch(name):
    """True for the name of a lock, or of a file that is not whole."""
    return name == ".lock" or is_temporary(name)


def parts_in(out):
    """The numbers of the parts that a corpus directory holds."""
    # A part is there once its JSON is: its other files are written before.
    names = (re.fullmatch(r"(\d{5,})\.json", name) for name in os.listdir(out))
    return {int(name[1]) for name in names if name}


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


def write_corpus(out, recipe, dtype, workers):
    """Writes all parts. Returns their number, and a Counter of what was left out before any part.

    workers: processes. Documents are read here, encoded by them, and written here in their order.
    Raises ValueError if a part that is there was made of other documents.
    """
    skipped = Counter()
    chunks = chunks_of(recipe.documents(skipped, "tokenizing"), recipe.part_bytes)
    done = parts_in(out)

    def wanted(part):
        return part not in done

    encoder = Encoder(out, recipe.clean, recipe.near_dedup is not None, dtype)
    near = NearDuplicates() if recipe.near_dedup else None
    encoded = encode_in_order(chunks, encoder, wanted, workers)
    with contextlib.closing(encoded):  # ends the workers, also if writing fails
        count = write_parts(out, encoded, wanted, recipe.validation, near, dtype)
    if done and max(done) >= count:  # an earlier run wrote more parts than there are
        check_read(out, max(done), "no documents")
    return count, skipped


def write_parts(
    out,
    encoded,  # (part, item, `Encoded`), in order
    wanted,  # a function of a part's number: True if the part is to be written
    validation,
    near,  # a `NearDuplicates`, or None
    dtype,  # of tokens
):
    """Writes the parts that are wanted, checks the others, and returns how many there are."""
    count = 0
    for part, group in itertools.groupby(encoded, key=operator.itemgetter(0)):
        writer = PartWriter(out, part, dtype) if wanted(part) else None
        contents = Contents()
        for _, item, (tokens, reason, signature) in group:
            contents.add(item)
            if signature is not None and near.seen(signature):
                reason = "near duplicate"
            if writer and reason:
                writer.skipped[reason] += 1
            elif writer:
                split = "validation" if item.share < validation else "train"
                writer.add(split, item.document.language, item.size, tokens)

        if writer:
            writer.close(contents)
        else:  # fails early: the end may be hours away
            check_read(out, part, contents.digest)
        count += 1
    return count
