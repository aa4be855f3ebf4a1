"""A data set of the image files in a ZIP archive, such as those that dataset_tool.py of EDM and StyleGAN writes."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from udddm.data import access, folder_labels
from udddm.data.archive_names import MEMBERS, check_mode, check_name
from udddm.data.encoded import LARGEST_FILE, PREFIX, ImageFiles, require_pillow
from udddm.data.folder import report_others, split_names
from udddm.errors import DataError

LARGEST_DIRECTORY = 2 << 30
"""Bytes of a central directory. That of ImageNet has 0.1 GB."""
_LOCAL = struct.Struct("<4s5H3L2H")  # APPNOTE.TXT 4.3.7: signature, ..., lengths of name and extra field
_END = struct.Struct("<4s4H2LH")  # 4.3.16: end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_LOCATOR64 = struct.Struct("<4sLQL")  # 4.3.15


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    """Of the local header."""
    stored: int
    """Bytes in the archive."""
    size: int
    """Bytes of the file."""
    crc: int
    deflated: bool


class ZipFiles(ImageFiles):
    """The image files in a ZIP archive at a path or URL, sorted by name.

    Names, types, sizes and offsets of all members are checked when the archive is opened, and the checksum of a file
    when it is read. A file is read into memory only up to the size that the archive states. Nothing is extracted.

    Raises DataError, which names the archive and the member: for a damaged archive; names that are absolute, contain
    `..` or occur twice; links and devices; encryption; other compression than deflate; overlapping members; image files
    of more than 256 MiB.
    """

    def __init__(self, where: str) -> None:
        require_pillow(where)
        self.where = where
        self.remote = access.is_url(where)
        self._reader = access.RangeReader()
        self._stamp = access.stamp(where)
        members = {member.name: member for member in self._directory()}
        _check_overlap(list(members.values()), where)
        files, others, directories = split_names(members)
        report_others(where, files, others)
        self._members = [members[file.as_posix()] for file in files]
        for member in self._members:
            if member.size > LARGEST_FILE:
                raise DataError(
                    f"{member.name} in {where} has {member.size} bytes, more than an image file may have "
                    f"({LARGEST_FILE}): it is not read"
                )
        index = members.get(folder_labels.INDEX)
        if index is not None and index.size > folder_labels.LARGEST_INDEX:
            raise DataError(f"{index.name} in {where} has {index.size} bytes, more than {folder_labels.LARGEST_INDEX}")
        read = None if index is None else partial(self._contents, index)
        self.found = folder_labels.find(where, files, others, read, directories)

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        return f"{self.relative(index)} in {self.where}"

    def relative(self, index: int) -> str:
        return self._members[index].name

    def read(self, index: int) -> bytes:
        return self._contents(self._members[index])

    def prefix(self, index: int) -> bytes:
        member = self._members[index]
        if member.size <= PREFIX:
            return self.read(index)
        start = self._start(member)
        data = self._reader.read(self.where, start, min(PREFIX, member.stored))
        return self._inflate(member, data, PREFIX) if member.deflated else data

    def _start(self, member: _Member) -> int:
        """Where the data of a member begin. The local header may be longer than the central one."""
        header = self._reader.read(self.where, member.offset, _LOCAL.size)
        fields = _LOCAL.unpack(header)
        start = member.offset + _LOCAL.size + int(fields[-2]) + int(fields[-1])
        if fields[0] != b"PK\3\4" or start + member.stored > self._stamp.size:
            raise self._damaged(member, "its local header is not valid")
        return start

    def _contents(self, member: _Member) -> bytes:
        data = self._reader.read(self.where, self._start(member), member.stored)
        if member.deflated:
            data = self._inflate(member, data, member.size + 1)
        if len(data) != member.size:
            raise self._damaged(member, f"it has another size than the {member.size} bytes that the archive states")
        if zlib.crc32(data) != member.crc:
            raise self._damaged(member, "its checksum is wrong")
        return data

    def _inflate(self, member: _Member, data: bytes, most: int) -> bytes:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
        except zlib.error as error:
            raise self._damaged(member, str(error)) from error

    def _damaged(self, member: _Member, why: str) -> DataError:
        return DataError(f"{member.name} in {self.where} is damaged: {why}. Copy the archive again")

    def _directory(self) -> Iterator[_Member]:
        """The members in the central directory, without directories, in its order."""
        self._check_directory_size()
        names = set()
        try:
            with access.open_sequential(self.where) as file, zipfile.ZipFile(file) as archive:
                found = archive.infolist()
        except DataError:
            raise
        except Exception as error:  # BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError and others
            raise access.failed(self.where, "a ZIP archive", error) from error
        for info in found:
            # zipfile cuts names at a NUL and turns the separators of other systems around; the original is checked.
            check_name(info.orig_filename, self.where)
            check_mode(info.external_attr >> 16, info.filename, self.where)
            name = PurePosixPath(info.filename).as_posix()  # without ./ and //
            if name in names:
                raise DataError(f"{self.where} has two members named {name!r}: it is ambiguous which is meant")
            names.add(name)
            if info.is_dir():
                continue
            if info.flag_bits & 0x1:
                raise DataError(f"{info.filename} in {self.where} is encrypted: it is not read")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{info.filename} in {self.where} is compressed by method {info.compress_type}: pack the archive "
                    "with deflate, or without compression"
                )
            if not 0 <= info.header_offset <= self._stamp.size - info.compress_size:
                raise DataError(f"{info.filename} in {self.where} lies beyond the end of the archive: copy it again")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            yield _Member(name, info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)

    def _check_directory_size(self) -> None:
        """Raise DataError for a central directory that is too large, before zipfile reads it into memory."""
        size = self._stamp.size
        tail = self._reader.read(self.where, max(0, size - (1 << 16) - _END.size), min(size, (1 << 16) + _END.size))
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < _END.size:
            raise DataError(f"{self.where} is not a complete ZIP archive: its directory, at the end, is missing")
        end = _END.unpack_from(tail, at)
        count, length = int(end[4]), int(end[5])
        if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size :].startswith(b"PK\6\7"):
            place = int(_LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)[2])
            if place + _END64.size > size:
                raise DataError(f"{self.where} is not a valid ZIP archive: its directory is beyond its end")
            end64 = _END64.unpack(self._reader.read(self.where, place, _END64.size))
            count, length = int(end64[7]), int(end64[8])
        if length > LARGEST_DIRECTORY or count > MEMBERS:
            raise DataError(
                f"{self.where} announces a directory of {count} members and {length} bytes; at most {MEMBERS} members "
                f"and {LARGEST_DIRECTORY} bytes are read"
            )


def _check_overlap(members: list[_Member], where: str) -> None:
    """Raise DataError if members share bytes, as in archives that expand to many times their size."""
    ordered = sorted(members, key=lambda member: member.offset)
    starts = np.array([member.offset for member in ordered], dtype=np.int64)
    ends = starts + np.array([_LOCAL.size + member.stored for member in ordered], dtype=np.int64)
    wrong = np.flatnonzero(starts[1:] < ends[:-1])
    if len(wrong):
        first, second = ordered[int(wrong[0])], ordered[int(wrong[0]) + 1]
        raise DataError(f"{where}: the members {first.name!r} and {second.name!r} overlap: it is not read")
