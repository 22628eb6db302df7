"""TODO."""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile

from corpus.languages import SKIPPED_DIRECTORIES, may_be_source
from corpus.records import LARGEST, TOO_LARGE, Damaged, file_document

HEADERS = 1_000_000  # bytes at most that describe a member of an archive: its name, its attributes


XZ_MEMORY = 200_000_000  # bytes that unpacking may take; `xz -9` asks for 65 MB


class _Rationed:
    """A stream that gives `left` bytes and no more: tarfile would take a name of any length."""

    def __init__(self, stream):
        self.stream, self.left, self.last = stream, HEADERS, b""
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size):
        self.left -= size
        if size < 0 or self.left < 0:
            raise Damaged(f"what describes a member takes over {HEADERS:,} bytes")
        self.last = self.stream.read(size)
        return self.last


class _Xz:
    """What is in an .xz file, read forward. lzma.open takes the gigabytes that a file asks for."""

    def __init__(self, packed):
        self.packed, self.position, self.rest = packed, 0, b""
        self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def read(self, size):
        pieces = []
        while size:
            if self.stream.eof:  # another stream may follow, after zeros
                self.rest = self.stream.unused_data.lstrip(b"\0")
                while not self.rest:
                    block = self.packed.read(1 << 16)
                    if not block:
                        break
                    self.rest = block.lstrip(b"\0")
                if not self.rest:
                    break
                self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self.stream.needs_input:
                self.rest = self.packed.read(1 << 16)
                if not self.rest:
                    raise EOFError("it ends in the middle")
            pieces.append(self.stream.decompress(self.rest, size))
            size -= len(pieces[-1])
            self.rest = b""
        content = b"".join(pieces)
        self.position += len(content)
        return content

    def tell(self):
        return self.position

    def seek(self, position):
        if position < self.position:
            raise Damaged("a member of negative size")
        while position > self.position and self.read(min(1 << 20, position - self.position)):
            pass


def read_tar(source, skipped, progress):
    unpack = {".gz": gzip.open, ".tgz": gzip.open, ".xz": _Xz, ".bz2": bz2.open}
    with open(source, "rb") as raw:
        plain = raw if source.endswith(".tar") else unpack[os.path.splitext(source)[1]](raw)
        rationed = _Rationed(plain)
        archive = tarfile.open(fileobj=rationed, mode="r:")
        offset = -1
        while member := archive.next():
            archive.members.clear()  # tarfile would keep them all,
            archive.pax_headers.clear()  # and all that is said of all members
            if archive.offset <= offset:
                raise Damaged("a member of negative size")
            offset = archive.offset
            rationed.left = HEADERS
            progress(raw.tell(), absolute=True)
            folders = member.name.split("/")[:-1]
            if member.isdir() or SKIPPED_DIRECTORIES.intersection(folders):
                continue
            if not member.isfile():
                skipped["not a file"] += 1
            elif not may_be_source(member.name):
                skipped["no known extension"] += 1
            elif member.size > LARGEST:
                skipped[TOO_LARGE] += 1
            else:
                rationed.left = LARGEST
                content = archive.extractfile(member).read()
                rationed.left = HEADERS
                if document := file_document(member.name, content, skipped):
                    yield document
        # To tarfile a damaged header is the end like any other. The real end is blocks of zeros, of
        # which it read the first; reading the others also checks the checksum.
        end = rationed.last + plain.read(1 << 20)
        if not end or any(end):
            raise tarfile.ReadError("it ends in the middle")
        while plain.read(1 << 20):
            pass


def read_zip(source, skipped, progress):
    with open(source, "rb") as raw, zipfile.ZipFile(raw) as archive:
        raw.seek(
            max(0, os.path.getsize(source) - 66_000)
        )  # the end record says how many members there are; zipfile does not look
        end = raw.read()
        count = int.from_bytes(end[end.rindex(b"PK\5\6") + 10 :][:2], "little")
        if count not in (0xFFFF, len(archive.infolist())):
            raise zipfile.BadZipFile(
                f"{count} members are said to be there, {len(archive.infolist())} are"
            )
        for member in archive.infolist():
            progress(member.compress_size)
            if member.is_dir() or SKIPPED_DIRECTORIES.intersection(member.filename.split("/")[:-1]):
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                skipped["not a file"] += 1
            elif not may_be_source(member.filename):
                skipped["no known extension"] += 1
            elif member.file_size > LARGEST:
                skipped[TOO_LARGE] += 1
            elif member.flag_bits & 1:
                skipped["encrypted"] += 1
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks bzip2 and LZMA to any size, whatever a member claims.
                skipped["neither stored nor deflated"] += 1
            else:
                with archive.open(member) as f:  # reads no more than the size that was checked
                    content = f.read(LARGEST)
                if document := file_document(member.filename, content, skipped):
                    yield document
