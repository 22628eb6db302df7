"""Reads tables: .parquet, as The Stack comes, and JSON lines (.jsonl, packed with gzip or Zstandard).

A row is a file (`content`), a commit (`old_contents`, `new_contents`) or a GitHub issue (`events`,
as in The Stack, or `title` and `body`, as GitHub's API answers); in JSON also a notebook (`cells`).
A row of another shape is counted, and the next one read.
"""

import contextlib
import gzip
import io
import json
import os

from corpus.records import LARGEST, TOO_LARGE, Damaged, document_of

# What is read of a .parquet: the columns that `document_of` looks at.
COLUMNS = """content lang language ext path max_stars_repo_path new_file old_contents new_contents
subject message events title comments body user state""".split()


@contextlib.contextmanager
def malformed_counted(skipped):
    """Counts a row of unknown shape and goes on after it."""
    try:
        yield
    except UnicodeError:  # as of half a surrogate pair, which JSON can spell and UTF-8 cannot
        skipped["not UTF-8"] += 1
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        skipped["no content field"] += 1


def read_parquet(source, skipped, progress):
    """The documents of a .parquet file (see `sources.readers`)."""
    import pyarrow.parquet

    # Small buffers, and 64 rows at once: a row group of The Stack may take gigabytes.
    options = dict(buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    with pyarrow.parquet.ParquetFile(source, **options) as table:
        names = [name for name in COLUMNS if name in table.schema_arrow.names]
        if not {"content", "old_contents", "events", "title"}.intersection(names):
            raise Damaged("it has neither a content, nor commits, nor issues")
        size = os.path.getsize(source)
        seen = 0
        for batch in table.iter_batches(batch_size=64, columns=names):
            for row in range(len(batch)):
                document = None
                with malformed_counted(skipped):
                    record = {name: batch[name][row].as_py() for name in names}
                    document = document_of(record, skipped)
                if document:
                    yield document
            seen += len(batch)
            progress(size * seen // max(table.metadata.num_rows, 1), absolute=True)


def read_jsonl(source, skipped, progress):
    """The documents of a file of JSON lines (see `sources.readers`)."""
    with open(source, "rb") as packed:
        records = json_records(unpacked(source, packed), packed, skipped, progress)
        for record in with_comments(records, skipped):
            document = None
            with malformed_counted(skipped):
                document = document_of(record, skipped)
            if document:
                yield document


def unpacked(source, packed):
    """A stream of the lines of a file, packed or not."""
    if source.endswith(".gz"):
        return gzip.open(packed)
    if source.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return packed


def json_records(stream, packed, skipped, progress):
    """Yields (value, length) of each line."""
    while line := stream.readline(2 * LARGEST):
        progress(packed.tell(), absolute=True)
        if len(line) == 2 * LARGEST and not line.endswith(b"\n"):
            # A line without end, such as a gigabyte of zeros in a megabyte, is skipped in pieces.
            skipped[TOO_LARGE] += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(LARGEST)
        elif line.strip():
            try:
                yield json.loads(line), len(line)
            except UnicodeError:
                skipped["not UTF-8"] += 1
            except (ValueError, RecursionError):
                skipped["not JSON"] += 1


def with_comments(records, skipped):
    """Yields the records, with those that are comments joined to their issue.

    GitHub's API answers an issue with the number of its comments, and the comments apart, each with
    the URL of its issue; they have to follow it.
    """
    issue = None
    size = 0  # of its comments
    for record, length in records:
        fields = record if isinstance(record, dict) else {}
        if "issue_url" in fields and "title" not in fields:
            size += length
            if not issue or record["issue_url"] != issue.get("url"):
                skipped["a comment without its issue"] += 1
            elif size > LARGEST:
                skipped[f"a comment of an issue {TOO_LARGE}"] += 1
            else:
                issue["comments"].append(record)
            continue

        if issue:
            yield issue
        issue = None
        size = 0
        if isinstance(fields.get("comments"), int) and {"title", "url"} <= fields.keys():
            issue = record | {"comments": []}
        else:
            yield record
    if issue:
        yield issue
