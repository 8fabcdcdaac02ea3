"""Content codings. We ask for none; an upstream that compresses all the same is understood where the standard library can do it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

PIECE_BYTES = 2**18
ZLIB_METHOD = 8
GZIP_WINDOW = 16 + zlib.MAX_WBITS


class BadCoding(ValueError):
    """The body is not what its `content-encoding` says, or in a coding that we do not know."""


class Decoder:
    """Of one body in `coding`: `gzip` or `deflate`, the latter with or without zlib's frame (RFC 9110, section 8.4.1.2)."""

    def __init__(self, coding: str) -> None:
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise BadCoding
        self._window = zlib.MAX_WBITS if coding == "deflate" else GZIP_WINDOW
        self._inflate: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """`data` decoded, in pieces of bounded size: a small body may stand for a huge one. Raises `BadCoding`."""
        if self._inflate is None:
            raw = self._window == zlib.MAX_WBITS and data[0] & 0xF != ZLIB_METHOD
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS if raw else self._window)
        while data:
            try:
                piece = self._inflate.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise BadCoding from None
            if self._inflate.unused_data:
                raise BadCoding
            data = self._inflate.unconsumed_tail
            if piece:
                yield piece

    def close(self) -> None:
        """Raises `BadCoding` if the body was cut short. One of no bytes is whole: it may have had no content at all."""
        if self._inflate is not None and not self._inflate.eof:
            raise BadCoding
