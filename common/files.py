"""TODO."""

import contextlib
import errno
import json
import os
import socket
import sys
import uuid

from common.command_line import first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def read_json(path, kind=dict):
    """The dict (or list, by `kind`) in a JSON file. Raises ValueError that names the file where it holds none."""
    with open(path, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: damaged (not a JSON {'object' if kind is dict else 'array'})")
    return content


def write_whole(path, content):
    """Writes text or bytes to `path` such that a reader finds the old content or the new, never half."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # several machines may write the same file
    try:
        with open(temporary, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def lock_directory(path, name=".lock"):
    """Takes the lock `path`/`name`, which one process at a time can hold; returns an ExitStack whose `close` gives it back.

    The lock dies with its process, and also holds on NFS. It is fcntl's and not flock's, as the worker processes of a trainer that is
    killed would inherit the latter. Raises ValueError where another process holds it.
    """
    held = contextlib.ExitStack()
    if fcntl is None:
        return held
    file = os.path.join(path, name)
    while True:
        f = open(file, "a+")
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            f.seek(0)
            holder = f.read() or "another process"
            f.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                words = f"{holder} is writing there; wait for its end, or choose another directory"
                raise ValueError(f"{path}: {words}") from None
            print(
                f"warning: {path}: cannot be locked ({error}); start nothing else there",
                file=sys.stderr,
            )
            return held
        # Who held the lock before may have removed its file since it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(file)):
                break
        f.close()
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}")
    f.flush()
    held.enter_context(f)
    held.callback(_remove, file)  # before it is closed
    return held


def _remove(path):
    with contextlib.suppress(OSError):
        os.remove(path)
