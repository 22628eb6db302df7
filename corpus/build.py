"""TODO."""

import contextlib
import glob
import hashlib
import json
import multiprocessing
import os
import re
import sysconfig
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from common.files import lock_directory, read_json, write_whole
from corpus.clean import NearDuplicates, unclean
from corpus.git_history import read_commits
from corpus.languages import LANGUAGE_OF
from corpus.records import RECORDS
from corpus.sources import TABLES, read, readers
from corpus.store import (
    CHANGED,
    PartWriter,
    _check_read,
    is_temporary,
    part_file,
    reasons,
    remove_ours,
    write_meta,
)
from corpus.tokenizer import Tokenizer, train_tokenizer

PART_BYTES = 128_000_000  # of text: about 35 M tokens


CHUNK_BYTES = 1_000_000  # that a process is handed at once, so that handing them over costs little


TOKENIZER_BYTES = 1_000_000_000  # of training documents are enough for a tokenizer: more changes little and takes memory


def documents(
    sources, skipped, *, commits=False, languages=None, limit=None, description="reading"
):
    """The distinct documents of the sources, in order: yields (share, size, `Document`).

    share: a number in [0, 1) from the SHA-256 of the content, which decides on training or validation. size: bytes. skipped: a Counter, to
    which what is left out is added by reason. languages: those to take; None: all. limit: documents of each language at most.
    Raises ValueError for a missing or damaged source.
    """
    parts = [found for source in sources for found in readers(source, commits)]
    seen, taken = set(), Counter()  # of each document 8 bytes of its hash: some 70 bytes of memory
    with tqdm(
        total=sum(size for *_, size in parts), unit="B", unit_scale=True, desc=description
    ) as bar:
        for source, reader, size in parts:
            begun = bar.n

            def progress(n, absolute=False, begun=begun, size=size):
                bar.update(min(begun + n if absolute else bar.n + n, begun + size) - bar.n)

            for document in read(source, reader, skipped, progress):
                language, content = document
                if is_record := not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                digest = hashlib.sha256(content).digest()
                if not (content.strip() and document.content):
                    skipped["empty"] += 1
                elif (key := int.from_bytes(digest[8:16])) in seen:
                    skipped["exact duplicate"] += 1
                elif languages is not None and language not in languages:
                    skipped["another language"] += 1
                elif limit is not None and taken[language] >= limit:
                    skipped["over the limit of its language"] += 1
                else:
                    seen.add(key)
                    taken[language] += 1
                    if len(seen) % 1000 == 0:
                        bar.set_postfix_str(f"{len(seen):,} documents", refresh=False)
                    size_of_text = (
                        sum(len(text.encode(errors="replace")) for _, text in document.content)
                        if is_record
                        else len(content)
                    )
                    yield int.from_bytes(digest[:8]) / 2**64, size_of_text, document


def text_of(document, clean=False):
    """(pieces, None) of a document, or (None, why it is left out). pieces: [(special token or "", text), ...].

    clean: files must pass the filters of `unclean`, records have their own.
    """
    if not isinstance(document.content, bytes):
        if any("\0" in text for _, text in document.content):
            return None, "binary (a NUL byte)"
        return [
            (token, text.encode(errors="replace").decode()) for token, text in document.content
        ], None
    if b"\0" in document.content:
        return None, "binary (a NUL byte)"
    try:
        text = document.content.decode()
    except UnicodeDecodeError:
        return None, "not UTF-8"
    reason = unclean(text) if clean else None
    return (None, reason) if reason else ([("", text)], None)


def _load_worker(path, clean, near_dedup):
    global _tokenizer, _clean, _near_dedup  # one of each for a worker process
    parent = multiprocessing.parent_process()
    threading.Thread(
        target=lambda: (parent.join(), os._exit(1)), daemon=True
    ).start()  # it would outlive one that is killed
    _tokenizer, _clean, _near_dedup = Tokenizer.from_pretrained(path), clean, near_dedup


def _encode(chunk, tokenize, dtype):
    """[(tokens or a reason, signature), ...] of documents: the work of a process. tokenize: False where the tokens are there already."""
    results = []
    for document in chunk:
        pieces, reason = text_of(document, _clean)
        signature = (
            NearDuplicates.signature("\n".join(text for _, text in pieces))
            if _near_dedup and not reason
            else None
        )
        if reason or not tokenize:
            results.append((reason, signature))
            continue
        ids = []
        for token, text in pieces:
            ids += ([_tokenizer.special_tokens[token]] if token else []) + _tokenizer.encode(text)
        results.append((np.array(ids, dtype) if len(ids) > 1 else "under 2 tokens", signature))
    return results


def prepare(
    sources=None, out="corpora/python", *, vocab_size=49156, tokenizer=None, validation=0.05, workers=None, commits=False, languages=None,
    limit_per_language=None, clean=False, near_dedup=False, shard=(0, 1), part_bytes=PART_BYTES,
):  # fmt: skip
    """Makes the corpus directory `out` from `sources` and returns its meta.json, or None where other shards are still missing.

    sources: a list of paths (see sources.py); None: the standard library of the running Python. vocab_size: of a tokenizer that is trained
    on the training documents, unless `tokenizer`, a path or a `data.Tokenizer`, is given. validation: share of the documents held out.
    workers: processes; None: one for each core. commits: the histories of git repositories among them, too. languages: names of those
    to take; None: all. limit_per_language: distinct documents of a language that are taken at most, the first ones, before cleaning.
    clean: leave out files as StarCoder's basic filters do. near_dedup: leave out near duplicates. shard: (i, n), to write every n-th part
    from the i-th. part_bytes: of text in a part. The files are those that data.py describes; tokens are uint16, or uint32 where the
    vocabulary needs it.

    Stopped at any moment and called again with the same arguments, it goes on. Raises ValueError for bad sources or arguments, for sources
    without documents, and for an `out` that holds something else.
    """
    sources = (
        [sysconfig.get_paths()["stdlib"]]
        if not sources
        else [sources]
        if isinstance(sources, str | os.PathLike)
        else sources
    )
    sources, out = [os.fspath(source) for source in sources], os.path.realpath(out)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    if limit_per_language is not None and limit_per_language < 1:
        raise ValueError(f"limit_per_language must be at least 1, got {limit_per_language}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be i/n with 0 <= i < n, got {shard[0]}/{shard[1]}")
    if shard[1] > 1 and tokenizer is None:
        raise ValueError(
            "shards need one tokenizer: train it beforehand, on a part of the sources, and give it with --tokenizer"
        )
    named = any(
        source.endswith(TABLES) for source in sources
    )  # their records name languages that are not in the table here
    if languages and not named and (unknown := {*languages} - {*LANGUAGE_OF.values(), *RECORDS}):
        raise ValueError(
            f"no language named {min(unknown)}; known: {', '.join(sorted({*LANGUAGE_OF.values(), *RECORDS}))}"
        )
    found = [reader for source in sources for reader in readers(source, commits)]
    if commits and not any(reader is read_commits for _, reader, _ in found):
        raise ValueError("--commits: none of the sources is a git repository or holds one")
    for source in sources:
        if os.path.isdir(source) and out.startswith(os.path.join(os.path.realpath(source), "")):
            raise ValueError(
                f"{out} lies inside the source {source}; choose a directory outside of it"
            )
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    languages, given = sorted(languages) if languages is not None else None, tokenizer is not None
    near = NearDuplicates() if near_dedup else None
    arguments = {
        "sources": sources, "tokenizer": tokenizer.sha256 if tokenizer else vocab_size, "validation": validation,
        "commits": commits, "languages": languages, "limit_per_language": limit_per_language, "clean": clean,
        "near_dedup": near_dedup, "part_bytes": part_bytes,
    }  # fmt: skip
    there = os.path.lexists(out)
    begun = open_corpus(out, arguments)
    lock = lock_corpus(out, shard)
    try:
        which = dict(commits=commits, languages=languages, limit=limit_per_language)
        if os.path.exists(os.path.join(out, "tokenizer.json")):
            tokenizer = Tokenizer.from_pretrained(out)
        elif tokenizer is None:
            tokenizer = train_tokenizer(
                _training_texts(sources, validation, clean, which), vocab_size
            )
        tokenizer.save_pretrained(out)
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "true"
        )  # it warns of its threads when a process that used them forks
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        with ProcessPoolExecutor(
            workers or os.cpu_count(), initializer=_load_worker, initargs=(out, clean, near_dedup)
        ) as pool:
            skipped = Counter()
            stream = documents(sources, skipped, description="tokenizing", **which)
            parts = _write(
                out,
                stream,
                validation,
                pool,
                3 * (workers or os.cpu_count()),
                shard,
                part_bytes,
                near,
                dtype,
            )
        return write_meta(out, parts, skipped, tokenizer, dtype, sources)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (for the memory it took?); the same command goes on from here"
        ) from None
    finally:
        trained = not given and os.path.exists(os.path.join(out, "tokenizer.json"))
        made = trained or glob.glob(os.path.join(glob.escape(out), "[0-9]*.json"))
        if begun and shard[1] == 1 and not made:
            remove_ours(out)  # nothing worth keeping was made
            if not there:
                with contextlib.suppress(OSError):  # somebody has put something there since
                    os.rmdir(out)
        lock.close()


def open_corpus(out, arguments):
    """Makes the directory with prepare.json, which says how the corpus is made; or checks that one made so was begun there.

    Returns whether it is begun here. Shards that are started together may all begin it: with the same content.
    """
    path = os.path.join(out, "prepare.json")
    empty = os.path.isdir(out) and all(map(is_temporary, os.listdir(out)))
    other = os.path.exists(out) and not empty
    begun = not os.path.exists(path)
    if other and begun:
        raise ValueError(f"{out}: exists already; choose another directory or remove it")
    if os.path.exists(os.path.join(out, "meta.json")):
        raise ValueError(
            f"{out}: exists already, and is whole; choose another directory or remove it"
        )
    if os.path.exists(path):
        before = read_json(path)
        for name, value in arguments.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{out}: was begun with {name} {before.get(name)}, not {value}; choose another directory or remove it"
                )
    os.makedirs(out, exist_ok=True)
    write_whole(path, json.dumps(arguments, indent=1))
    return begun


def lock_corpus(out, shard):
    """Locks `out` for a shard (see `lock_directory`). Beside it only others of the same number of shards may write.

    Raises ValueError where another process holds that lock, or one of another number.
    """
    alone = shard[1] == 1
    beside = r"\.lock" if alone else rf"\.\d+-of-{shard[1]}\.lock"
    with lock_directory(out, ".lock" if alone else f".{shard[0]}-of-{shard[1]}.lock") as lock:
        for name in os.listdir(
            out
        ):  # after it is held: of two that start together none overlooks the other
            if re.fullmatch(r"\.(\d+-of-\d+\.)?lock", name) and not re.fullmatch(beside, name):
                lock_directory(out, name).close()
        return lock.pop_all()


def _training_texts(sources, validation, clean, which):
    size, skipped = 0, Counter()
    for share, bytes_of_text, document in documents(
        sources, skipped, description="reading for the tokenizer", **which
    ):
        pieces, reason = text_of(document, clean)
        if reason:
            skipped[reason] += 1
        elif share >= validation:
            yield "".join(text for _, text in pieces)
            size += bytes_of_text
            if size > TOKENIZER_BYTES:
                return
    if not size:
        raise ValueError(
            f"no documents for training in {', '.join(sources)} (skipped: {reasons(skipped)})"
        )


def _chunks(stream, part_bytes):
    """(number of the part, [(share, size, document), ...]) of about CHUNK_BYTES each; a chunk lies in one part."""
    chunk, size, number, in_part = [], 0, 0, 0
    for item in stream:
        if in_part >= part_bytes or size >= CHUNK_BYTES:
            yield number, chunk
            chunk, size = [], 0
        if in_part >= part_bytes:
            number, in_part = number + 1, 0
        chunk.append(item)
        size, in_part = size + item[1], in_part + item[1]
    if chunk:
        yield number, chunk


def _write(out, stream, validation, pool, most_in_flight, shard, part_bytes, near, dtype):
    """Writes the parts of this shard that are not there; returns the number of all parts.

    Raises ValueError where one that is there was made of other documents than the sources have.
    """
    part, number, flight = None, -1, deque()
    digests = []  # of each part, what it was made of

    def wanted(number):
        return number % shard[1] == shard[0] and not os.path.exists(part_file(out, number, "json"))

    def end_part():
        if part:
            part.close(digests[-1].hexdigest())
        elif digests:
            _check_read(out, number, digests[-1].hexdigest())

    def land():
        nonlocal part, number
        landing, chunk, results = flight.popleft()
        if landing != number:
            end_part()
            number, part = landing, PartWriter(out, landing, dtype) if wanted(landing) else None
            digests.append(hashlib.sha256())
        for share, size, document in chunk:
            # The share is 53 bits of the content's hash.
            digests[-1].update(f"{share!r} {size} {document.language}\n".encode())
        for (share, size, document), (tokens, signature) in zip(
            chunk, results.result() if results else [(None, None)] * len(chunk)
        ):
            if signature is not None and near.seen(signature):
                tokens = "near duplicate"
            if part and isinstance(tokens, str):
                part.skipped[tokens] += 1
            elif part:
                part.add(
                    "validation" if share < validation else "train", document.language, size, tokens
                )

    for chunk_number, chunk in _chunks(stream, part_bytes):
        tokenize = wanted(chunk_number)
        task = (_encode, [document for *_, document in chunk], tokenize, dtype)
        flight.append((chunk_number, chunk, pool.submit(*task) if tokenize or near else None))
        while len(flight) > most_in_flight:
            land()
    while flight:
        land()
    end_part()
    for i, digest in enumerate(digests):  # those that other shards wrote since, too
        _check_read(out, i, digest.hexdigest())
    for name in os.listdir(out):
        if re.fullmatch(r"\d{5,}\.json", name) and int(name[:-5]) > number:
            raise ValueError(f"{os.path.join(out, name)}: {CHANGED}")
    return number + 1
