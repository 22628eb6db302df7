"""Files: checked JSON, writing whole or not at all, and directories that one process locks."""

import contextlib
import errno
import json
import os
import socket
import uuid

from common.command_line import first_line, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def read_json(path, kind=dict):
    """The dict in a JSON file, or list if `kind` is list. Raises ValueError that names the file."""
    with open(path, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: damaged (not a JSON {'object' if kind is dict else 'array'})")
    return content


@contextlib.contextmanager
def written_whole(path):
    """A binary file that appears at `path` when the block ends, whole; not at all if it raises.

    A reader finds the old content or the new one, never half. The temporary file is removed, since
    on a full disk somebody else may need its room.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # other machines may write the same file
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_whole(path, content):
    """Writes text or bytes to `path`, whole or not at all."""
    with written_whole(path) as f:
        f.write(content if isinstance(content, bytes) else content.encode())


def lock_directory(path, name=".lock"):
    """Takes the lock `path`/`name`. Returns an ExitStack; closing it gives the lock back.

    The lock dies with its process, and works on NFS. It is fcntl's and not flock's, which the
    workers of a killed trainer would inherit. Raises ValueError if another process holds it.
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
            warn(f"{path}: cannot be locked ({error}); start nothing else there")
            return held
        # The previous holder may have removed the file after it was opened here: then try again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(file)):
                break
        f.close()

    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}")
    f.flush()
    held.enter_context(f)
    held.callback(remove_quietly, file)  # runs before the file is closed
    return held


def remove_quietly(path):
    """Removes a file if that can be done."""
    with contextlib.suppress(OSError):
        os.remove(path)
