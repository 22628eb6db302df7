"""Reads tables: .parquet, as The Stack comes, and JSON lines (.jsonl, plain, .gz or .zst).

A row is a file (`content`), a commit (`old_contents`, `new_contents`) or a GitHub issue (`events`,
as in The Stack, or `title` and `body`, as GitHub's API answers); in JSON also a notebook (`cells`).
A row of another shape is counted, and the next one read.

Left out: comments that GitHub's API answers apart; put them into the `comments` of their issue.
"""

import functools
import gzip
import io
import json
import os

from corpus.records import LARGEST, TOO_LARGE, Damaged, document_of
from corpus.remote import open_source

# What is read of a .parquet: the columns that `document_of` looks at. The Stack has dozens more,
# and some hold more text than the content.
COLUMNS = """content lang language ext path max_stars_repo_path new_file old_contents new_contents
subject message events title comments body user state""".split()


def read_parquet(source, skipped, progress):
    """The documents of a .parquet file; a reader (see `sources.Source`)."""
    import pyarrow.parquet  # takes a moment, and most sources do not need it

    try:
        yield from rows_of(pyarrow.parquet.ParquetFile, source, skipped, progress)
    except pyarrow.ArrowException as error:  # of a dozen kinds, some of which are no ValueError
        raise Damaged(str(error)) from None


def rows_of(parquet_file, source, skipped, progress):
    """`read_parquet`, by a class that opens such files."""
    # 64 rows at once, and small buffers: a row group of The Stack may take gigabytes.
    options = dict(buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    with open_source(source) as file, parquet_file(file, **options) as table:
        # A table of something else is an error, not a million rows that are left out.
        names = [name for name in COLUMNS if name in table.schema_arrow.names]
        if not {"content", "old_contents", "events", "title"}.intersection(names):
            raise Damaged("it has neither a content, nor commits, nor issues")
        size = file.seek(0, os.SEEK_END)
        seen = 0  # rows
        for batch in table.iter_batches(batch_size=64, columns=names):
            for row in range(len(batch)):
                if document := counted(functools.partial(record_of, batch, row), skipped):
                    yield document
            # pyarrow does not tell its position in the file.
            seen += len(batch)
            progress(size * seen // max(table.metadata.num_rows, 1), absolute=True)


def record_of(batch, row):
    """{column: value} of a row."""
    # Raises UnicodeError for bad text, and OverflowError for a date after the year 9999.
    return {name: batch[name][row].as_py() for name in batch.schema.names}


def read_jsonl(source, skipped, progress):
    """The documents of a file of JSON lines; a reader (see `sources.Source`)."""
    with open_source(source) as packed:
        stream = unpacked(source, packed)
        # A line may be longer than its document, as JSON spells some characters with six.
        while line := stream.readline(2 * LARGEST):
            progress(packed.tell(), absolute=True)
            if len(line) == 2 * LARGEST and not line.endswith(b"\n"):
                # The line may be a gigabyte that was packed into a megabyte: skip it in pieces.
                skipped[TOO_LARGE] += 1
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LARGEST)
            elif line.strip():  # an empty line is nothing that is left out
                if document := counted(functools.partial(json.loads, line), skipped):
                    yield document


def unpacked(source, packed):
    """The lines of a file, given as a stream, packed or not."""
    if source.endswith(".gz"):
        return gzip.open(packed)
    if source.endswith(".zst"):
        import pyarrow

        # Python has no Zstandard before 3.14, and pyarrow's stream no lines.
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)
    return packed


def counted(read_record, skipped):
    """The `Document` of the record that a function returns; None if it is left out."""
    # One bad row must not cost the others, so reading the row is tried here, too.
    try:
        return document_of(read_record(), skipped)
    except (json.JSONDecodeError, RecursionError):  # 100,000 brackets are JSON to nobody
        skipped["not JSON"] += 1
    except UnicodeError:  # or half a surrogate pair, which JSON can spell and UTF-8 cannot
        skipped["not UTF-8"] += 1
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        # None of the shapes above, or a number of too many digits.
        skipped["no content field"] += 1
    return None
