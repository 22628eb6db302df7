"""Sources that lie elsewhere: read as those on disk, and one line for whatever goes wrong."""

import gzip
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections import Counter

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from corpus import build
from corpus.sources import readers

TEXTS = ["x = 1\n" * 5, "y = 2\n" * 5, "fn é() {}\n"]
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".tar", ".tar.gz", ".zip")


def read(path):
    """The texts of a source."""
    items = build.documents([path], Counter())
    return [item.document.content.decode() for item in items]


def packed(ending):
    """The bytes of an archive or a table of TEXTS."""
    file = io.BytesIO()
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS}), file)
    elif ending.startswith(".jsonl"):
        lines = "\n".join(json.dumps({"content": text}) for text in TEXTS).encode()
        file.write(gzip.compress(lines) if ending.endswith(".gz") else lines)
    elif ending == ".zip":
        with zipfile.ZipFile(file, "w") as archive:
            for number, text in enumerate(TEXTS):
                archive.writestr(f"{number}.py", text)
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if ending.endswith(".gz") else "w") as archive:
            for number, text in enumerate(TEXTS):
                member = tarfile.TarInfo(f"{number}.py")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    return file.getvalue()


@pytest.fixture
def memory():
    """A file system of fsspec's that is a dict, at memory://bucket."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_remote_source_is_read_as_one_on_disk(memory, tmp_path, ending):
    content = packed(ending)
    memory.pipe(f"/bucket/s{ending}", content)
    (tmp_path / f"s{ending}").write_bytes(content)
    assert read(f"memory://bucket/s{ending}") == read(str(tmp_path / f"s{ending}")) == TEXTS


def test_a_wildcard_names_all_files_that_match_in_order(memory):
    for name in ("b/2.jsonl", "b/1.jsonl", "a/1.jsonl", "b/1.txt"):
        memory.pipe(f"/bucket/{name}", json.dumps({"content": f"{name} has text\n"}).encode())
    found = readers("memory://bucket/*/*.jsonl")
    paths = [source.path for source in found]
    assert [path.split("bucket/")[1] for path in paths] == ["a/1.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert all(source.size == memory.size(source.path) for source in found)
    assert read("memory://bucket/b/*.jsonl") == read(paths[1]) + read(paths[2])


@pytest.mark.parametrize(
    "path, words",
    [
        ("memory://bucket/none.tar", "no such file"),
        ("memory://bucket/*.tar", "no such file"),
        ("memory://bucket/sub", "not a source; give "),
        ("memory://bucket/s.txt", "not a source; give "),
        ("nosuch://bucket/s.tar", "cannot be read (Protocol not known: nosuch)"),
    ],
)
def test_what_is_not_there_is_one_line(memory, path, words):
    memory.pipe({"/bucket/sub/s.tar": b"", "/bucket/s.txt": b"text"})
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert words in message and path.split("/")[-1] in message and "\n" not in message


class Failing(MemoryFileSystem):
    """A file system that fails as the test says: when it is asked for files, or in one of them."""

    protocol = "failing"
    cachable = False
    asked = None  # an exception, or None
    opened = None
    read = None

    def info(self, path, **options):
        if self.asked:
            raise self.asked
        return {"name": path, "size": 100_000, "type": "file"}

    def _open(self, path, *arguments, **options):
        if self.opened:
            raise self.opened
        return FailingFile(self.read)


class FailingFile(io.RawIOBase):
    """A .jsonl that fails after its first line."""

    def __init__(self, error):
        self.error = error
        self.position = 0

    def readable(self):
        return True

    def tell(self):
        return self.position

    def readinto(self, buffer):
        if self.position:
            raise self.error
        line = b'{"content": "x = 1"}\n'
        buffer[: len(line)] = line
        self.position = len(line)
        return len(line)

    def readline(self, size=-1):
        return self.readinto(bytearray(100)) and b'{"content": "x = 1"}\n'


class ServiceError(Exception):
    """What a client of a storage service raises: an error of a class of its own."""


@pytest.mark.parametrize("moment", ["asked", "opened", "read"])
@pytest.mark.parametrize(
    "error",
    [
        ServiceError("SlowDown\nsecond line"),
        PermissionError("Access Denied"),  # without a number, as s3fs raises it
        PermissionError(13, "Permission denied"),
        TimeoutError(),
        ConnectionResetError("reset by peer"),
    ],
    ids=repr,
)
def test_a_service_that_fails_is_one_line_and_never_damage(monkeypatch, moment, error):
    """Nobody should fetch a file again because a key has expired."""
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(Failing, moment, error)
    with pytest.raises(ValueError) as caught:
        read("failing://bucket/s.jsonl")
    message = str(caught.value)
    assert message.startswith("failing://") and "s.jsonl: cannot be read (" in message
    assert "\n" not in message and "second" not in message


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="gs://b/s.tar: cannot be read .*gcsfs"):
        read("gs://b/s.tar")


# ---- https ---------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one archive; below /unsized/ without saying its size first."""

    content = packed(".tar.gz")

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(self.content)

    def answer(self, content):
        self.send_response(200)
        if not self.path.startswith("/unsized/"):
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow  # it imports aiohttp
@pytest.mark.parametrize("folder", ["sized", "unsized"])
def test_https_also_of_a_server_that_does_not_tell_sizes(folder):
    pytest.importorskip("aiohttp", reason="pip install aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert read(f"{address}/{folder}/s.tar.gz") == TEXTS
        server.shutdown()


@pytest.mark.slow
def test_s3_without_credentials_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("s3fs", reason="pip install s3fs")
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # where they would be looked for
    for path in ("s3://bucket/s.parquet", "s3://bucket/*.parquet"):
        with pytest.raises(ValueError, match="cannot be read .*[Cc]redentials") as caught:
            read(path)
        assert "\n" not in str(caught.value)
