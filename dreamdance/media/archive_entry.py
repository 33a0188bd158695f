"""Reads an entry of a zip archive at any place without inflating all that precedes it.

A compressed entry has no places to begin at. While it is read, copies of the decompressor are kept at even distances:
a later read continues from the nearest one before its place.
"""

import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

# At most this number of copies is kept, of about 50 kB each.
MAX_KEPT = 64
_BLOCK_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and of the extra field


@dataclass
class _Decoder:
    """A decompressor and where it is: bytes that it has given, and where its next input is in the file."""

    given: int
    position: int
    inflater: Any
    rest: bytes = b""

    def copy(self) -> "_Decoder":
        return _Decoder(self.given, self.position, self.inflater.copy(), self.rest)


@dataclass
class ArchiveEntry:
    """An entry that is stored or deflated; the checksum is the caller's concern.

    Attributes:
        path: the archive.
        header_offset: place of the entry's own header in it.
        is_deflated: whether it is compressed.
        size: number of its bytes, uncompressed.
    """

    path: Path
    header_offset: int
    is_deflated: bool
    size: int
    _kept: list[_Decoder] = field(default_factory=list, repr=False)
    _last: _Decoder | None = field(default=None, repr=False)

    @classmethod
    def of(cls, path: Path, info: zipfile.ZipInfo) -> "ArchiveEntry":
        """The entry that an archive's list describes.

        Raises:
            zipfile.BadZipFile: it is compressed in another way.
        """
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"compression of type {info.compress_type}; np.savez_compressed uses deflate")
        return cls(path, info.header_offset, info.compress_type == zipfile.ZIP_DEFLATED, info.file_size)

    def read(self, file: IO[bytes], start: int, size: int) -> bytes:
        """Bytes from `start` on; fewer than `size` where the entry ends.

        Args:
            file: the opened archive.
            start: place in the uncompressed entry.
            size: number of bytes.

        Raises:
            zipfile.BadZipFile, zlib.error: the archive is damaged.
        """
        if not self.is_deflated:
            file.seek(self._data_offset(file) + start)
            return file.read(size)
        decoder = self._nearest(file, start)
        while decoder.given < start and self._inflate(file, decoder, min(start - decoder.given, _BLOCK_BYTES)):
            pass
        parts = []
        while size > 0 and (part := self._inflate(file, decoder, min(size, _BLOCK_BYTES))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _nearest(self, file: IO[bytes], start: int) -> _Decoder:
        kept = max((one for one in self._kept if one.given <= start), key=lambda one: one.given, default=None)
        if self._last is None or self._last.given > start or (kept is not None and kept.given > self._last.given):
            first = _Decoder(0, self._data_offset(file), zlib.decompressobj(-zlib.MAX_WBITS))
            self._last = first if kept is None else kept.copy()
        return self._last

    def _inflate(self, file: IO[bytes], decoder: _Decoder, size: int) -> bytes:
        """The next bytes, up to `size`; empty at the end."""
        part = b""
        while not part and not decoder.inflater.eof:
            source = decoder.rest
            if not source:
                file.seek(decoder.position)
                source = file.read(_BLOCK_BYTES)
                decoder.position += len(source)
            part = decoder.inflater.decompress(source, size)
            decoder.rest = decoder.inflater.unconsumed_tail
            if not source and not part:
                break  # the file ends before the entry
        decoder.given += len(part)
        newest = self._kept[-1].given if self._kept else 0
        if decoder.given - newest >= max(self.size // MAX_KEPT, _BLOCK_BYTES):
            self._kept.append(decoder.copy())
        return part

    def _data_offset(self, file: IO[bytes]) -> int:
        file.seek(self.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("an entry has no header")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        return self.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)
