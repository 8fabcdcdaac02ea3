"""diskcache, as the response cache uses it: rows of bytes and nothing else, one connection. Imported when the files are opened."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from diskcache import Cache, Disk
from diskcache.core import MODE_RAW, UNKNOWN

SELECT = "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1"
KEYS = "SELECT key FROM Cache WHERE raw = 1"  # from its index alone
LONGEST = "SELECT max(expire_time) FROM Cache"
UPSERT = f"""
INSERT INTO Cache (key, raw, store_time, expire_time, access_time, access_count, tag, size, mode, filename, value)
VALUES (?, 1, ?, ?, ?, 0, NULL, 0, {MODE_RAW}, NULL, ?)
ON CONFLICT (key, raw) DO UPDATE SET store_time = excluded.store_time, expire_time = excluded.expire_time,
    access_time = excluded.access_time, access_count = 0, tag = NULL, size = 0, mode = excluded.mode, filename = NULL,
    value = excluded.value
"""  # noqa: S608  # a number
NO_FILES = 2**62
"""A `min_file_size` that no value reaches."""

DIGEST_DIGITS = 64


def stored(key: str) -> str | bytearray:
    """A key as it stands in its row. Keys of the gateway are SHA-256 in hexadecimal: as bytes their index has half the pages, and each
    new row writes one of these. sqlite3 asks adapters what to do with bytes, and binds a bytearray at once."""
    if len(key) == DIGEST_DIGITS:
        with suppress(ValueError):
            digest = bytearray.fromhex(key)
            if digest.hex() == key:
                return digest
    return key


def restored(found: object) -> str:
    """The key that `stored` made this of. Raises `ValueError` for what it never makes."""
    if type(found) is bytes and 2 * len(found) == DIGEST_DIGITS:
        return found.hex()
    if type(found) is str and stored(found) is found:
        return found
    raise ValueError("a row's key is not one of ours")


class BytesDisk(Disk):  # type: ignore[misc]  # diskcache ships no types
    """A `Disk` that takes and gives bytes only, in the row itself.

    The stock one unpickles what a row tells it to, and opens and removes the files that a row names: whoever can write to `cache.db` runs
    code in every worker (CVE-2025-69872; `JSONDisk` is no better). Here such rows raise `ValueError`, and no file is ever touched.
    """

    def put(self, key: object) -> tuple[str | bytearray, bool]:
        if type(key) is not str:
            raise ValueError("a key must be a string")
        return stored(key), True

    def get(self, key: object, raw: object) -> str:
        if not raw:
            raise ValueError("a row's key is not one of ours")
        return restored(key)

    def store(self, value: object, read: bool, key: object = UNKNOWN) -> tuple[int, int, None, bytes]:
        if read or type(value) is not bytes:
            raise ValueError("a value must be bytes")
        return 0, MODE_RAW, None, value

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> bytes:
        if read or mode != MODE_RAW or filename is not None or type(value) is not bytes:
            raise ValueError("a row's value is not bytes")
        return value

    def filename(self, key: object = UNKNOWN, value: object = UNKNOWN) -> NoReturn:
        raise ValueError("values are never kept in files")

    def remove(self, file_path: str) -> None:
        """Nothing: a row that names a file was planted, and the file is somebody else's."""


class OneConnection(Cache):  # type: ignore[misc]  # diskcache ships no types
    """A diskcache with one connection to the database at `path`, whichever thread asks, so that `close` closes it. Not for two threads at
    a time. Statements wait `timeout` seconds for the file, those that set up the tables `patience`; `page_cache` is in KiB.

    The stock class has one for each thread, which no other thread can close. Should a later diskcache know no `_con`, it goes back to
    that.
    """

    _connection: sqlite3.Connection | None = None

    def __init__(self, path: Path, *, timeout: float, patience: float, size_limit: int, page_cache: int) -> None:
        self._path = path
        self._patience = patience
        self._page_cache = page_cache
        try:
            super().__init__(
                str(path.parent),
                timeout=timeout,
                disk=BytesDisk,
                size_limit=size_limit,
                eviction_policy="least-recently-stored",
                cull_limit=0,  # the thread culls after each batch: within one, the file has not shrunk yet
                statistics=0,
                tag_index=0,
                disk_min_file_size=NO_FILES,
                disk_pickle_protocol=0,
                sqlite_mmap_size=0,  # a file that another process damages must be an error, not a SIGBUS
            )
        except BaseException:
            self.close()
            raise

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            patience = self.timeout or self._patience  # it is 0 while the tables are set up, where diskcache retries some statements only
            self._connection = sqlite3.connect(self._path, timeout=patience, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA trusted_schema=OFF")  # planted triggers and views call no function with side effects
            self._connection.execute("PRAGMA synchronous=OFF")  # a third of a write, and the ledger's syncs wait for no others
            self._connection.execute("PRAGMA journal_size_limit=16777216")
            self._connection.execute(f"PRAGMA cache_size=-{self._page_cache}")
        return self._connection

    def read(self, key: str) -> bytes | None:
        """As `get`, at a fraction of its cost, and whatever time diskcache would keep the row for. Raises `ValueError` for a row that is
        not bytes."""
        row = self._con.execute(SELECT, (stored(key),)).fetchone()
        return None if row is None else self._disk.fetch(*row, False)

    def write(self, values: Sequence[tuple[str, bytearray, float]]) -> None:
        """As `set` of each key, value and seconds to live, with one statement for all of them."""
        now = time.time()
        self._con.executemany(UPSERT, [(stored(key), now, now + ttl, now, value) for key, value, ttl in values])

    def keys(self) -> Iterator[str]:
        """Those of all rows that `read` may find."""
        for (found,) in self._con.execute(KEYS):
            with suppress(ValueError):
                yield restored(found)

    def longest_ttl(self) -> float:
        """Seconds that the last row has to live; 0 without any."""
        (latest,) = self._con.execute(LONGEST).fetchone()
        return 0.0 if latest is None else latest - time.time()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
