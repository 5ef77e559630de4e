"""Compressed files as streams of their text: found by content, read forward, in bounded memory.

A compressed file has no random access. `ForwardReader` keeps the last HELD_BYTES of what it has decompressed; a read before those starts
again at the beginning of the file. The units of a compressed file are therefore read one after the other (`pipelines/sources.py`).
"""

import io
import lzma
from collections import deque
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

ENDINGS = (".gz", ".bgz", ".zst", ".zstd", ".bz2", ".xz")
"""Endings of compressed files, after the ending that says what is in them: `a.jsonl.gz`."""
CHUNK_BYTES = 1 << 20
HELD_BYTES = 8 << 20
"""Text before the last read that can be read again without a new start."""


def compression_of(head: bytes) -> str | None:
    """Return gzip, zstd, bz2 or xz by the first bytes of a file; None for any other content."""
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bz2"
    magics = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0"}
    return next((name for name, magic in magics.items() if head.startswith(magic)), None)


class ForwardReader:
    """The text of a compressed file.

    Args:
        fs, path: the file.
        compression: as `compression_of` gives it.
    """

    def __init__(self, fs: Any, path: str, compression: str) -> None:
        self._fs, self._path, self._compression = fs, path, compression
        self._stream: Any = None
        self._held: deque[bytes] = deque()
        self._start = self._stop = 0

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes start .. stop - 1 of the text, fewer at its end; raise OSError where the file is damaged."""
        if self._stream is None or start < self._start:
            self._open()
        while self._stop < stop and (chunk := self._next_chunk()):
            self._held.append(chunk)
            self._stop += len(chunk)
            while self._held and self._start + len(self._held[0]) <= start - HELD_BYTES:
                self._start += len(self._held.popleft())
        pieces, at = [], self._start
        for chunk in self._held:
            pieces.append(chunk[max(start - at, 0) : max(stop - at, 0)])
            at += len(chunk)
        return b"".join(pieces)

    def count(self) -> int:
        """Return the length of the text: reads the whole file."""
        self._open()
        while chunk := self._next_chunk():
            self._stop += len(chunk)
        size = self._stop
        self.close()
        return size

    def close(self) -> None:
        """Close the file and drop what is held; the next read starts again."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._held.clear()
        self._start = self._stop = 0

    def _open(self) -> None:
        self.close()
        if isinstance(self._fs, LocalFileSystem):
            stored: Any = open(self._path, "rb")  # noqa: SIM115, closed with the stream
        else:
            stored = self._fs.open(self._path, "rb")
        if self._compression == "xz":
            self._stream = _Xz(stored)
        else:
            self._stream = pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), self._compression)

    def _next_chunk(self) -> bytes:
        try:
            return self._stream.read(CHUNK_BYTES)
        except lzma.LZMAError as error:
            raise OSError(f"xz: {error}") from error


class _Xz(lzma.LZMAFile):
    """Closes the file below too."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored
        super().__init__(stored)

    def close(self) -> None:
        super().close()
        self._stored.close()


class SeekableText(io.RawIOBase):
    """A ForwardReader as a file object: for libraries that read a file from its beginning to its end."""

    def __init__(self, reader: ForwardReader, size: int) -> None:
        super().__init__()
        self._reader, self._size, self._at = reader, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read(self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._reader.close()
        super().close()
