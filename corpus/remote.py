"""Files that lie elsewhere: `s3://...`, `hf://...`, `https://...`, whatever fsspec can read.

A path is remote if it says by which protocol. Each protocol needs a package of its own, which
fsspec names if it is missing: s3fs, huggingface_hub, aiohttp, ...
"""

import re

from common.command_line import first_line


def is_remote(path):
    """True for a path that begins with a protocol."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def open_source(path):
    """A binary file for reading, wherever it lies."""
    if not is_remote(path):
        return open(path, "rb")
    import fsspec  # takes a moment, and most sources do not need it

    return fsspec.open(path, "rb").open()


def remote_files(path):
    """[(path, bytes), ...] of a remote path: one file, or all that its wildcards match, sorted.

    Raises ValueError in one line if there are none, or if they may not be read.
    """
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(path)
        found = system.glob(place, detail=True).values() if "*" in place else [system.info(place)]
        # Some servers do not tell the size; then the progress bar and the tasks do not know it.
        files = [(system.unstrip_protocol(file["name"]), file["size"] or 0) for file in found]
    except FileNotFoundError:
        files = []
    except Exception as error:  # of the protocol's own client, which may be any
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from None
    if not files:
        raise ValueError(f"{path}: no such file")
    return sorted(files)
