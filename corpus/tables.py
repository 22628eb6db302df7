"""TODO."""

import gzip
import io
import json
import os

from corpus.records import LARGEST, TOO_LARGE, Damaged, documents_of

COLUMNS = """content lang language ext path max_stars_repo_path new_file old_contents new_contents subject message
events title comments body user state""".split()


def read_parquet(source, skipped, progress):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(
        source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
    ) as table:
        names = [name for name in COLUMNS if name in table.schema_arrow.names]
        if not {"content", "old_contents", "events", "title"} & {*names}:
            raise Damaged("it has neither a content, nor commits, nor issues")
        size, seen = os.path.getsize(source), 0
        for batch in table.iter_batches(batch_size=64, columns=names):
            for i in range(len(batch)):
                yield from checked(
                    lambda i=i, batch=batch: {name: batch[name][i].as_py() for name in names},
                    skipped,
                )
            seen += len(batch)
            progress(size * seen // max(table.metadata.num_rows, 1), absolute=True)


def checked(record, skipped):
    """The documents of a record, which a function returns; one of unknown shape is counted."""
    try:
        found = documents_of(record(), skipped)
    except UnicodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        skipped["not UTF-8"] += 1
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        skipped["no content field"] += 1
    else:
        for document in found:
            content = document.content
            if (
                len(content)
                if isinstance(content, bytes)
                else sum(len(text) for _, text in content)
            ) > LARGEST:
                skipped[TOO_LARGE] += 1
            else:
                yield document


def read_jsonl(source, skipped, progress):
    import pyarrow

    with open(source, "rb") as raw:
        plain = raw
        if source.endswith(".gz"):
            plain = gzip.open(raw)
        elif source.endswith(".zst"):
            plain = io.BufferedReader(
                pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20
            )
        issue, joined = None, 0  # the API answers comments apart; they join the issue before them
        while line := plain.readline(2 * LARGEST):
            progress(raw.tell(), absolute=True)
            if len(line) == 2 * LARGEST and not line.endswith(b"\n"):
                skipped[TOO_LARGE] += 1
                while (line := plain.readline(LARGEST)) and not line.endswith(b"\n"):
                    pass
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeError:
                skipped["not UTF-8"] += 1
                continue
            except (ValueError, RecursionError):
                skipped["not JSON"] += 1
                continue
            if isinstance(record, dict) and "issue_url" in record and "title" not in record:
                joined += len(line)
                if not (issue and record["issue_url"] == issue.get("url")):
                    skipped["a comment without its issue"] += 1
                elif joined > LARGEST:
                    skipped[f"a comment of an issue {TOO_LARGE}"] += 1
                else:
                    issue["comments"].append(record)
                continue
            if issue:
                yield from checked(lambda issue=issue: issue, skipped)
            issue, joined = None, 0
            if (
                isinstance(record, dict)
                and isinstance(record.get("comments"), int)
                and "title" in record
                and "url" in record
            ):
                issue = record | {"comments": []}
            else:
                yield from checked(lambda record=record: record, skipped)
        if issue:
            yield from checked(lambda: issue, skipped)
