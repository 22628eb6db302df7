"""Reads .tar (plain, .gz, .xz, .bz2) and .zip archives; nothing is unpacked to disk.

An archive may be anybody's, and made to do harm: a few kilobytes can claim names, members or
dictionaries of gigabytes. Memory stays below one document and HEADERS, whatever an archive claims.

Left out: .zip members in other methods than the two that nearly all have, and encrypted ones.
"""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile

from corpus.languages import SKIPPED_DIRECTORIES
from corpus.records import LARGEST, Damaged, file_document, may_be_document

HEADERS = 1_000_000  # bytes that may describe a member of a .tar: its name, its attributes
XZ_MEMORY = 200_000_000  # bytes that unpacking may take; `xz -9` needs 65 MB
BLOCK = 1 << 20  # bytes that are read at once


def is_skipped(name):
    """True if a member lies in one of SKIPPED_DIRECTORIES."""
    return not SKIPPED_DIRECTORIES.isdisjoint(name.split("/")[:-1])


def read_tar(source, skipped, progress):
    """The documents of a .tar archive (see `sources.readers`)."""
    unpack = {".gz": gzip.open, ".tgz": gzip.open, ".xz": XzStream, ".bz2": bz2.open}
    ending = os.path.splitext(source)[1]
    with open(source, "rb") as packed:
        stream = GuardedStream(unpack[ending](packed) if ending in unpack else packed)
        archive = tarfile.open(fileobj=stream, mode="r:")
        while member := archive.next():
            # tarfile would remember each member, and all that global headers say.
            archive.members.clear()
            archive.pax_headers.clear()
            progress(packed.tell(), absolute=True)

            is_file = member.isfile()
            unseen = member.isdir() or is_skipped(member.name)
            if not unseen and may_be_document(member.name, is_file, member.size, skipped):
                stream.left = LARGEST
                content = archive.extractfile(member).read()
                document = file_document(member.name, content, skipped)
                if document:
                    yield document
            stream.left = HEADERS
        stream.check_end()


class GuardedStream:
    """The unpacked bytes of a .tar, as tarfile may read them."""

    def __init__(self, stream):
        self.stream = stream
        self.position = 0
        self.left = HEADERS  # bytes that may be read before the next member
        self.last = b""  # what was read last

    def read(self, size):
        """The next bytes, if that many are left: tarfile would take a name of any length."""
        self.left -= size
        if size < 0 or self.left < 0:
            raise Damaged(f"what describes a member takes over {HEADERS:,} bytes")
        self.last = self.stream.read(size)
        self.position += len(self.last)
        return self.last

    def tell(self):
        """The position."""
        return self.position

    def seek(self, position):
        """Skips bytes. Going back would read the same members for ever."""
        if position < self.position:
            raise Damaged("a member of negative size")
        while position > self.position:
            size = len(self.stream.read(min(BLOCK, position - self.position)))
            if not size:
                break
            self.position += size

    def check_end(self):
        """Raises tarfile.ReadError if zeros do not follow to the end, as they do in a whole .tar.

        To tarfile, a damaged header is an end like any other. Reading on also checks the checksum
        of a packed file.
        """
        end = self.last + self.stream.read(BLOCK)
        if not end or any(end):
            raise tarfile.ReadError("it ends in the middle")
        while self.stream.read(BLOCK):
            pass


class XzStream:
    """Unpacks an .xz file. lzma.open knows no limit: it takes the gigabytes that a file asks for."""

    def __init__(self, packed):
        self.packed = packed
        self.decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def read(self, size):
        """The next `size` bytes, or fewer at the end. Raises EOFError if it ends in the middle."""
        pieces = []
        while size > 0:
            block = b""
            if self.decoder.eof:
                # `cat` puts several streams into one file; zeros may lie between them.
                block = self.decoder.unused_data.lstrip(b"\0")
                while not block and (more := self.packed.read(BLOCK)):
                    block = more.lstrip(b"\0")
                if not block:
                    break
                self.decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self.decoder.needs_input:
                block = self.packed.read(BLOCK)
                if not block:
                    raise EOFError("it ends in the middle")
            pieces.append(self.decoder.decompress(block, size))
            size -= len(pieces[-1])
        return b"".join(pieces)


def read_zip(source, skipped, progress):
    """The documents of a .zip archive (see `sources.readers`)."""
    with open(source, "rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        check_count(file, len(members))
        for member in members:
            progress(member.compress_size)
            is_file = not stat.S_ISLNK(member.external_attr >> 16)
            if member.is_dir() or is_skipped(member.filename):
                continue
            if not may_be_document(member.filename, is_file, member.file_size, skipped):
                continue
            if member.flag_bits & 1:
                skipped["encrypted"] += 1
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks bzip2 and LZMA to any size, whatever size a member claims.
                skipped["neither stored nor deflated"] += 1
            else:
                with archive.open(member) as f:  # gives no more than the size that was checked
                    content = f.read(LARGEST)
                document = file_document(member.filename, content, skipped)
                if document:
                    yield document


def check_count(file, count):
    """Raises zipfile.BadZipFile if a .zip has fewer members than its end record says.

    zipfile does not look: members that follow a damaged one would be lost in silence. An archive of
    more than 65,534 members has the number elsewhere, and is not checked.
    """
    file.seek(-min(66_000, file.seek(0, os.SEEK_END)), os.SEEK_END)
    end = file.read()
    at = end.rindex(b"PK\5\6") + 10
    said = int.from_bytes(end[at : at + 2], "little")
    if said not in (0xFFFF, count):
        raise zipfile.BadZipFile(f"{said} members are said to be there, {count} are")
