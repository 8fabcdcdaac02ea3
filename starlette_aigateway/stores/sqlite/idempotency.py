"""Claims on idempotency keys and the outcomes that were kept, in a SQLite file of their own: answers are large, the ledger is not."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import anyio
import anyio.to_thread
from msgspec import Struct

from ...errors import AIGatewayError, StorageUnavailable
from ...policy.budgets import check_moment
from ...protocols import Claim
from ..commit import GroupCommit
from .connection import PerProcess, connect
from .transactions import StoreFile

SCHEMA = (
    """
CREATE TABLE answers (
    key TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    holder TEXT NOT NULL,
    outcome BLOB,
    until REAL NOT NULL
) STRICT;
CREATE INDEX answers_by_end ON answers (until)
""",
)
"""`outcome` of NULL is a claim. A rowid table on purpose: large rows would make a tree of keys deep."""

UNCLAIMED_SECONDS = 86_400
"""How long a claim stays in the file after its lease: its holder may be slow rather than dead, and come back to keep its outcome."""

PRUNED_AT_ONCE = 32
"""Rows; more than a batch adds per claim, so that pruning keeps up, and few, since freeing a megabyte takes its time."""


class Take(Struct, frozen=True):
    key: str
    fingerprint: str
    holder: str
    until: float
    now: float


class Renew(Struct, frozen=True):
    key: str
    holder: str
    until: float


class Keep(Struct, frozen=True):
    key: str
    holder: str
    outcome: bytes
    until: float


class Release(Struct, frozen=True):
    key: str
    holder: str


Op: TypeAlias = Take | Renew | Keep | Release
Result: TypeAlias = Claim | bool


class SQLiteIdempotencyStore:
    """The `IdempotencyStore` seam over the file `path`, whose directory exists; `path` + `.lock` lies beside it.

    Opens nothing before its first use, and opens anew in a forked child. Every verb is on the disk when it returns (`synchronous=FULL`):
    an outcome lost in a power cut would let a retry be billed a second time. `timeout` is the longest wait in seconds for other
    processes. Verbs raise `StorageUnavailable` where the file cannot be written.

    A cancelled verb may still be carried out: shield it where its outcome matters.
    """

    def __init__(self, path: Path, *, timeout: float = 5.0) -> None:
        self._path = Path(path)
        self._timeout = timeout
        self._commit = GroupCommit[Op, Result](
            StoreFile[Op, Result](
                connect=self._connect,
                apply=_apply,
                name="idempotency",
                lock_file=self._path.with_name(self._path.name + ".lock"),
                timeout=timeout,
            )
        )

    def _connect(self) -> sqlite3.Connection:
        return connect(self._path, durability="FULL", schema=SCHEMA, busy_timeout=self._timeout)

    async def __aenter__(self) -> Self:
        """Raises `ConfigurationError` for a file of a newer release. One that cannot be opened fails the calls that need it, no others."""
        with suppress(StorageUnavailable):
            if self._path.exists():
                await anyio.to_thread.run_sync(self._try_to_open)
        return self

    def _try_to_open(self) -> None:
        opened = PerProcess(self._connect)
        try:
            opened.run(lambda _: None)
        finally:
            opened.close()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    async def aclose(self) -> None:
        """Commits what is waiting and closes the file. A later verb opens it again."""
        await anyio.to_thread.run_sync(self._commit.close)

    async def claim(self, key: str, fingerprint: str, *, holder: str, until: float, now: float) -> Claim:
        check_moment(until, "until")
        check_moment(now, "now")
        result = await self._commit.run(Take(key, fingerprint, holder, until, now))
        assert isinstance(result, Claim)
        return result

    async def renew(self, key: str, *, holder: str, until: float) -> bool:
        check_moment(until, "until")
        return bool(await self._commit.run(Renew(key, holder, until)))

    async def keep(self, key: str, outcome: bytes, *, holder: str, until: float) -> bool:
        check_moment(until, "until")
        return bool(await self._commit.run(Keep(key, holder, outcome, until)))

    async def release(self, key: str, *, holder: str) -> None:
        await self._commit.run(Release(key, holder))


def _apply(connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Result | AIGatewayError]:
    results = [_carry_out(connection, op) for op in ops]
    if takes := [op for op in ops if isinstance(op, Take)]:
        _prune(connection, min(take.now for take in takes), PRUNED_AT_ONCE + 2 * len(takes))
    return results


def _carry_out(connection: sqlite3.Connection, op: Op) -> Result:
    match op:
        case Take():
            return _take(connection, op)
        case Renew(key, holder, until):
            return _changed(
                connection, "UPDATE answers SET until = ? WHERE key = ? AND holder = ? AND outcome IS NULL", (until, key, holder)
            )
        case Keep(key, holder, outcome, until):
            return _changed(
                connection,
                "UPDATE answers SET outcome = ?, until = ? WHERE key = ? AND holder = ?",
                (outcome, until, key, holder),
            )
        case Release(key, holder):
            return _changed(connection, "DELETE FROM answers WHERE key = ? AND holder = ? AND outcome IS NULL", (key, holder))


def _take(connection: sqlite3.Connection, op: Take) -> Claim:
    row = connection.execute("SELECT fingerprint, until, outcome FROM answers WHERE key = ?", (op.key,)).fetchone()
    if row is not None:
        fingerprint, until, outcome = row
        if until > op.now and fingerprint != op.fingerprint:
            return Claim("other_request")
        if until > op.now:
            return Claim("running") if outcome is None else Claim("kept", outcome)
    connection.execute(
        "INSERT OR REPLACE INTO answers (key, fingerprint, holder, outcome, until) VALUES (?, ?, ?, NULL, ?)",
        (op.key, op.fingerprint, op.holder, op.until),
    )
    return Claim("claimed")


def _changed(connection: sqlite3.Connection, statement: str, values: tuple[object, ...]) -> bool:
    return connection.execute(statement, values).rowcount > 0


def _prune(connection: sqlite3.Connection, now: float, most: int) -> None:
    """In passing: outcomes whose time is over, and claims that nobody came back to."""
    connection.execute(
        "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers "
        "WHERE until <= ? AND (outcome IS NOT NULL OR until <= ?) ORDER BY until LIMIT ?)",
        (now, now - UNCLAIMED_SECONDS, most),
    )
