"""What stands in front of every cached value on disk: when it expires, by the gateway's clock, and a checksum of its key and of itself.

Nothing of the cache is synced to the disk. So the death of the machine may leave a file in which a value is another key's, or half of one
and half of another; it must never be an answer.
"""

from __future__ import annotations

from struct import Struct, error
from zlib import crc32

_seal = Struct(">dI")


def sealed(key: str, value: bytes, expires_at: float) -> bytearray:
    return bytearray(_seal.pack(expires_at, _checksum(key, value))) + value


def unsealed(key: str, packed: bytes) -> tuple[float, bytes]:
    """When it expires, and the value. Raises `ValueError` for what was not sealed for this key."""
    try:
        expires_at, checksum = _seal.unpack_from(packed)
    except error as short:
        raise ValueError("a value has no seal") from short
    value = packed[_seal.size :]
    if _checksum(key, value) != checksum:
        raise ValueError("a value is not what was sealed for its key")
    return expires_at, value


def _checksum(key: str, value: bytes) -> int:
    return crc32(value, crc32(key.encode()))
