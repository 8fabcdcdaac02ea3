"""The ledger in one SQLite file: durable, exact, shared by all processes of the host."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import anyio.to_thread
import msgspec

from ...accounts import Budget, Finding, Hold, HoldRequest, Settlement, UsageQuery, UsageRecord, UsageReport
from ...errors import InvalidArgument
from ...policy.budgets import check_request, check_settlement
from ...types import Caps
from .commit import GroupCommit
from .connection import Durability, connect
from .ledger_batch import DUE_AT_ONCE, BatchWriter, Expire, Op, Ping, Record, Release, Renew, Reserve, Result, SetCaps, Settle
from .ledger_budgets import read_budgets
from .ledger_check import audit
from .ledger_schema import SCHEMA, Prices
from .ledger_usage import UsageReader
from .readers import Readers


class SQLiteLedger:
    """The `Ledger` seam over the file `path`, whose directory exists; `path` + `.lock` lies beside it.

    Opens nothing before its first use, and opens anew in a forked child. Entering it opens the file, so that a host learns at start
    what is wrong with it. `durability` is SQLite's `synchronous`: with `FULL` a grant survives a power cut. `timeout` is the longest
    wait in seconds for other processes. Verbs raise `StorageUnavailable` where the file cannot be written or read.

    A cancelled verb may still be carried out: shield it where its outcome matters.
    """

    def __init__(self, path: Path, *, durability: Durability = "FULL", timeout: float = 5.0) -> None:
        self._path = Path(path)
        self._durability: Durability = durability
        self._timeout = timeout
        self._prices = Prices()
        self._commit = GroupCommit[Op, Result](
            self._connect,
            BatchWriter(self._prices).apply,
            name="ledger",
            lock_file=self._path.with_name(self._path.name + ".lock"),
            timeout=timeout,
        )
        self._readers = Readers(self._connect, "ledger")

    def _connect(self) -> sqlite3.Connection:
        return connect(self._path, durability=self._durability, schema=SCHEMA, busy_timeout=self._timeout)

    async def __aenter__(self) -> Self:
        try:
            await self._readers.run(_probe)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            await self.aclose()

    async def aclose(self) -> None:
        """Commits what is waiting and closes the file. A later verb opens it again."""
        await anyio.to_thread.run_sync(self._commit.close)
        self._readers.close()

    async def reserve(self, request: HoldRequest, *, now: float) -> Hold:
        check_request(request)
        _check_storable(request)
        result = await self._commit.run(Reserve(request, self._prices.dump(request.price), now))
        assert isinstance(result, Hold)
        return result

    async def settle(self, hold_id: str, settlement: Settlement, *, now: float) -> UsageRecord | None:
        check_settlement(settlement)
        _check_storable(settlement)
        result = await self._commit.run(Settle(hold_id, settlement, now))
        assert result is None or isinstance(result, UsageRecord)
        return result

    async def release(self, hold_id: str, *, now: float, latency_ms: int | None = None) -> None:
        await self._commit.run(Release(hold_id, now, latency_ms))

    async def renew(self, hold_id: str, expires_at: float, *, now: float) -> bool:
        return bool(await self._commit.run(Renew(hold_id, expires_at)))

    async def record(self, record: UsageRecord) -> None:
        if record.cost != 0:
            raise InvalidArgument("a record without a hold costs nothing; what costs is reserved and settled", param="cost")
        _check_storable(record)
        await self._commit.run(Record(record, self._prices.dump(record.price)))

    async def expire(self, *, now: float) -> Sequence[UsageRecord]:
        expired: list[UsageRecord] = []
        while True:
            some = await self._commit.run(Expire(now))
            assert isinstance(some, list)
            expired.extend(some)
            if len(some) < DUE_AT_ONCE:
                return expired

    async def set_caps(self, scope: str, caps: Caps) -> None:
        _check_storable(scope)
        await self._commit.run(SetCaps(scope, caps))

    async def budgets(self, scopes: Mapping[str, Caps | None], *, now: float) -> Sequence[Budget]:
        return await self._readers.run(lambda connection: read_budgets(connection, scopes, now))

    async def usage(self, query: UsageQuery) -> UsageReport:
        reader = UsageReader(query, self._prices)
        return await self._readers.run(reader.read)

    async def check(self) -> Sequence[Finding]:
        return await self._readers.run(audit)

    async def ping(self) -> None:
        await self._commit.run(Ping())


def _probe(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT count(*) FROM meta").fetchone()


MAX_INTEGER = 2**63 - 1


def _check_storable(value: object) -> None:
    """Raises `InvalidArgument` for text that is not Unicode (a lone surrogate) before it reaches the writer and others wait with it."""
    try:
        msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidArgument(f"the ledger cannot store this: {type(error).__name__}") from None
