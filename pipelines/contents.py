"""What is in a file, by its bytes: its fingerprint, and whether it is text at all."""

from hashlib import blake2b
from typing import Any

PIECE_BYTES = 64 << 10
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_MOST_CONTROLS = 0.03
_KNOWN = {
    b"PAR1": ("Parquet", "parquet"),
    b"ARROW1": ("Arrow", "arrow"),
    b"\xff\xff\xff\xff": ("Arrow", "arrow"),
    b"FEA1": ("Feather version 1", None),
    b"PK\x03\x04": ("zip", None),
    b"\xff\xfe": ("UTF-16", None),
    b"\xfe\xff": ("UTF-16", None),
}
"""By the first bytes of a file: what it is, and the `format` that reads it."""


def fingerprint(fs: Any, path: str, size: int) -> tuple[bytes, str]:
    """Return the first bytes of a file, and a hash of its size and its content.

    A file above three PIECE_BYTES is hashed by its first, middle and last PIECE_BYTES; the hash does not depend on name and time.
    """
    if size <= 3 * PIECE_BYTES:
        pieces = [fs.cat_file(path)] if size else [b""]
    else:
        pieces = [fs.cat_file(path, start=at, end=at + PIECE_BYTES) for at in (0, size // 2, size - PIECE_BYTES)]
    return pieces[0][:PIECE_BYTES], blake2b(b"".join([b"%d\n" % size, *pieces]), digest_size=12).hexdigest()


def binary_kind(head: bytes) -> tuple[str, str | None] | None:
    """Return the kind of a binary file, and the `format` that reads it (None: no format does); return None for a text file.

    A file is binary if its first bytes are those of a known binary format, contain a zero byte, or are control characters by more than
    3 %. Text may be UTF-8 or another encoding of single bytes, such as Latin-1.

    Args:
        head: the first bytes of the file.
    """
    for magic, kind in _KNOWN.items():
        if head.startswith(magic):
            return kind
    if b"\0" in head:
        odd, even = head[1::2].count(0), head[::2].count(0)
        return ("UTF-16" if max(odd, even) > len(head) / 5 and min(odd, even) < len(head) / 50 else "binary"), None
    num_controls = len(head) - len(head.translate(None, _CONTROLS))
    return ("binary", None) if num_controls > _MOST_CONTROLS * len(head) else None
