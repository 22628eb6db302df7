"""Reads .tar (plain, .gz, .xz, .bz2) and .zip archives; nothing is unpacked to disk.

An archive may be anybody's, and made to do harm: a few kilobytes can claim names, members and
dictionaries of gigabytes. Memory stays below one document, one description of a member and what
unpacking needs; an archive that claims more is refused in one line.

Left out: members of a .zip that are encrypted, or packed by another method than deflate.
"""

import bz2
import gzip
import lzma
import os
import stat
import tarfile
import zipfile

from corpus.languages import SKIPPED_DIRECTORIES
from corpus.records import LARGEST, SOURCE_FILES, Damaged
from corpus.remote import open_source

DESCRIPTION = 1_000_000  # bytes that may describe a member of a .tar: its name, its attributes
XZ_MEMORY = 200_000_000  # bytes that unpacking may take; `xz -9` needs 65 MB
BLOCK = 1 << 20  # bytes that are read at once


def is_skipped(name):
    """True for a member in one of SKIPPED_DIRECTORIES."""
    return not SKIPPED_DIRECTORIES.isdisjoint(name.split("/")[:-1])


# ---- .tar ----------------------------------------------------------------------------------------


def read_tar(source, skipped, progress, choice=SOURCE_FILES):
    """The documents of a .tar archive; a reader (see `sources.Source`)."""
    # tarfile can unpack these itself, but then nothing could stand between it and the content.
    unpack = {".gz": gzip.open, ".tgz": gzip.open, ".xz": XzStream, ".bz2": bz2.open}
    ending = os.path.splitext(source)[1]
    with open_source(source) as packed:
        stream = GuardedStream(unpack[ending](packed) if ending in unpack else packed)
        archive = tarfile.open(fileobj=stream, mode="r:")
        while member := archive.next():
            # tarfile would remember every member, and all that headers say of all members.
            archive.members.clear()
            archive.pax_headers.clear()

            progress(packed.tell(), absolute=True)
            unseen = member.isdir() or is_skipped(member.name)
            is_file = member.isfile()  # not a link or a device
            if not unseen and choice.may_be(member.name, is_file, member.size, skipped):
                stream.left = LARGEST  # enough for the content, whose size has been checked
                content = archive.extractfile(member).read()
                if document := choice.made_of(member.name, content, skipped):
                    yield document
            stream.left = DESCRIPTION
        stream.check_end()


class GuardedStream:
    """What tarfile may read of a .tar: forward only, and `left` bytes before the next member."""

    def __init__(self, stream):
        self.stream = stream  # without seek
        self.position = 0
        self.left = DESCRIPTION  # bytes
        self.last = b""  # what was read last

    def read(self, size):
        """The next bytes."""
        # tarfile would take a name of any length, and any number of headers in a row.
        self.left -= size
        if size < 0 or self.left < 0:
            raise Damaged(f"what describes a member takes over {DESCRIPTION:,} bytes")
        self.last = self.stream.read(size)
        self.position += len(self.last)
        return self.last

    def tell(self):
        """The number of bytes so far."""
        return self.position

    def seek(self, position):
        """Skips bytes, which do not count."""
        if position < self.position:
            # Going back would read the same members for ever.
            raise Damaged("a member of negative size")
        while block := self.stream.read(min(BLOCK, position - self.position)):
            self.position += len(block)

    def check_end(self):
        """Raises tarfile.ReadError if the archive is cut."""
        # To tarfile, a damaged header is an end like any other; at the real end are only zeros.
        end = self.last + self.stream.read(BLOCK)
        if not end or any(end):
            raise tarfile.ReadError("it ends in the middle")
        # A packed file has its checksum at the very end.
        while self.stream.read(BLOCK):
            pass


class XzStream:
    """Unpacks an .xz file, as lzma.open does; but that takes the gigabytes that a file asks for."""

    def __init__(self, packed):
        self.packed = packed
        # Raises LZMAError if the file asks for more memory.
        self.decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def read(self, size):
        """The next bytes, fewer only at the end. Raises EOFError if the file is cut."""
        pieces = []
        while size > 0:
            block = b""  # packed
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
            # What is beyond `size` waits in the decoder, packed.
            pieces.append(self.decoder.decompress(block, size))
            size -= len(pieces[-1])
        return b"".join(pieces)


# ---- .zip ----------------------------------------------------------------------------------------


def read_zip(source, skipped, progress, choice=SOURCE_FILES):
    """The documents of a .zip archive; a reader (see `sources.Source`)."""
    with open_source(source) as file, zipfile.ZipFile(file) as archive:
        check_count(file, len(archive.infolist()))
        for member in archive.infolist():
            progress(member.compress_size)
            is_file = not stat.S_ISLNK(member.external_attr >> 16)  # the mode in Unix
            if member.is_dir() or is_skipped(member.filename):
                continue
            if not choice.may_be(member.filename, is_file, member.file_size, skipped):
                continue
            if member.flag_bits & 1:  # needs a password
                skipped["encrypted"] += 1
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks bzip2 and LZMA to any size, whatever size a member claims.
                skipped["neither stored nor deflated"] += 1
            else:
                with archive.open(member) as f:  # gives no more than the size that was checked
                    content = f.read(LARGEST)
                if document := choice.made_of(member.filename, content, skipped):
                    yield document


def check_count(file, count):
    """Raises zipfile.BadZipFile if the end record of a .zip counts more or fewer members."""
    # zipfile does not look: if the table of contents is damaged, members would be lost in silence.
    # The record is in the last 66 kB, and holds numbers up to 65,534.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 66_000))
    end = file.read()
    at = end.rindex(b"PK\5\6") + 10
    said = int.from_bytes(end[at : at + 2], "little")
    if said not in (0xFFFF, count):
        raise zipfile.BadZipFile(f"{said} members are said to be there, {count} are")
