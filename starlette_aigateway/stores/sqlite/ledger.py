"""The ledger in one SQLite file: durable, exact, shared by all processes of the host."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import astuple

from ...accounts import Budget, Credit, Finding, Hold, HoldRequest, Settlement, UsageQuery, UsageRecord, UsageReport
from ...errors import AIGatewayError, InvalidArgument
from ...events import BudgetReached
from ...policy.budgets import (
    SECONDS_PER_DAY,
    THRESHOLDS,
    check_credit,
    check_moment,
    check_request,
    check_settlement,
    check_thresholds,
    day_number,
)
from ...types import Caps, Usage
from ..commit import GroupCommit
from .connection import Durability, connect, look_for_damage
from .ledger_budgets import read_budgets
from .ledger_check import audit
from .ledger_credits import find_credit, list_credits
from .ledger_load import DUE_AT_ONCE
from .ledger_ops import (
    AddCredit,
    EndCredit,
    Expire,
    Op,
    Outcome,
    Ping,
    Prune,
    Pruned,
    Record,
    Release,
    Renew,
    Reserve,
    Result,
    RolledUp,
    RollUp,
    SetCaps,
    Settle,
    Told,
)
from .ledger_prune import AT_ONCE
from .ledger_schema import LAST_ENTRY, SCHEMA, Prices
from .ledger_stories import Stories
from .ledger_usage import UsageReader
from .ledger_writer import BatchWriter
from .readers import Readers
from .transactions import StoreFile
from .witness import Witness
from .write_ahead_log import WriteAheadLog

OTHERS_SHARE = 4.0
LONGEST_REST = 0.25
"""Between two turns of pruning the writer is left to the calls: so many times as long as the turn took, and at most so many seconds."""

VITAL = ("meta", "caps", "credits", "holds", "balances")
"""What decides on grants. The other tables are history, and most of a large file."""

REMEDY = (
    "stop the service, see with `aigateway check --data-dir ...` what is left, and put a backup back: what was spent since is then in no"
    " cap. To begin anew, with nothing spent, move ledger.db, ledger.db-wal and ledger.db.lock away"
)


class SQLiteLedger:
    """The `Ledger` seam over the file `path`, whose directory exists; `path` + `.lock` lies beside it.

    Opens nothing before its first use, and opens anew in a forked child. Entering it opens the file and writes to it, so that a host
    learns at start what is wrong. `durability` is as SQLite's `synchronous`: with `FULL` a grant survives a power cut. `timeout` is the
    longest wait in seconds for other processes. `thresholds` are the percents of a cap that listeners are told of. Verbs raise
    `StorageUnavailable` where the file cannot be written or read.

    A cancelled verb may still be carried out: shield it where its outcome matters.
    """

    def __init__(
        self, path: Path, *, durability: Durability = "FULL", timeout: float = 5.0, thresholds: Sequence[int] = THRESHOLDS
    ) -> None:
        self._path = Path(path)
        self._synchronous: Durability = "NORMAL" if durability == "FULL" else durability  # what makes it full is the writer's to sync
        self._timeout = timeout
        self._prices = Prices()
        self._writer = BatchWriter(self._prices, check_thresholds(thresholds))
        self._witness = Witness(self._path, progress=LAST_ENTRY, remedy=REMEDY)
        self._commit = GroupCommit[Op, Result](
            StoreFile[Op, Result](
                connect=self._connect,
                apply=self._writer.apply,
                name="ledger",
                lock_file=self._witness.lock_file,
                timeout=timeout,
                witness=self._witness,
                committed=self._writer.committed,
                quick=True,
                write_ahead_log=WriteAheadLog(self._path) if durability == "FULL" else None,
            )
        )
        self._readers = Readers(self._connect, "ledger")
        self._listeners: list[Callable[[BudgetReached], None]] = []

    def _connect(self) -> sqlite3.Connection:
        return self._witness.open(
            lambda: connect(self._path, durability=self._synchronous, schema=SCHEMA, busy_timeout=self._timeout, remedy=REMEDY)
        )

    async def __aenter__(self) -> Self:
        try:
            await self._readers.run(lambda connection: look_for_damage(connection, self._path, REMEDY, VITAL))
            await self.ping()
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

    def listen(self, tell: Callable[[BudgetReached], None]) -> None:
        self._listeners.append(tell)

    async def _run(self, op: Op) -> Outcome:
        return self._told(await self._commit.run(op))

    def _told(self, result: Result) -> Outcome:
        """Whoever runs the operation that a batch ends with tells what the batch has reached."""
        if not isinstance(result, Told):
            return result
        for reached in result.reached:
            for tell in self._listeners:
                tell(reached)
        if isinstance(result.outcome, AIGatewayError):
            raise result.outcome
        return result.outcome

    async def reserve(self, request: HoldRequest, *, now: float) -> Hold:
        _check_hold(request)
        check_moment(now, "now")
        result = self._told(await self._commit.run(Reserve(request, self._prices.dump(request.price), now)))
        assert isinstance(result, Hold)
        return result

    async def probe(self, request: HoldRequest, *, now: float) -> Hold:
        """Decided as in `reserve`, beside the writer, on one snapshot."""
        _check_hold(request)
        check_moment(now, "now")
        op = Reserve(request, self._prices.dump(request.price), now)
        return await self._readers.run(lambda connection: self._writer.probe(connection, op))

    async def settle(self, hold_id: str, settlement: Settlement, *, now: float) -> UsageRecord | None:
        check_settlement(settlement)
        check_moment(now, "now")
        _check_numbers(settlement.usage, settlement.latency_ms)
        _check_storable(settlement)
        result = self._told(await self._commit.run(Settle(hold_id, settlement, now)))
        assert result is None or isinstance(result, UsageRecord)
        return result

    async def release(self, hold_id: str, *, now: float, latency_ms: int | None = None) -> None:
        check_moment(now, "now")
        await self._run(Release(hold_id, now, latency_ms))

    async def renew(self, hold_id: str, expires_at: float, *, now: float) -> bool:
        check_moment(expires_at, "expires_at")
        return bool(await self._run(Renew(hold_id, expires_at)))

    async def record(self, record: UsageRecord) -> None:
        if record.cost != 0:
            raise InvalidArgument("a record without a hold costs nothing; what costs is reserved and settled", param="cost")
        check_moment(record.created_at, "created_at")
        _check_numbers(record.usage, record.latency_ms)
        _check_storable(record)
        self._told(await self._commit.run(Record(record, self._prices.dump(record.price))))

    async def expire(self, *, now: float) -> Sequence[UsageRecord]:
        check_moment(now, "now")
        expired: list[UsageRecord] = []
        while True:
            some = await self._run(Expire(now))
            assert isinstance(some, list)
            expired.extend(some)
            if len(some) < DUE_AT_ONCE:
                return expired

    async def add_credit(self, credit: Credit) -> Credit:
        check_credit(credit)
        _check_storable(credit)
        result = await self._run(AddCredit(credit))
        assert isinstance(result, Credit)
        return result

    async def end_credit(self, credit_id: str, *, now: float) -> Credit | None:
        check_moment(now, "now")
        _check_storable(credit_id)
        result = await self._run(EndCredit(credit_id, now))
        assert result is None or isinstance(result, Credit)
        return result

    async def credit(self, credit_id: str) -> Credit | None:
        return await self._readers.run(lambda connection: find_credit(connection, credit_id))

    async def credits(self, scope: str | None = None, *, limit: int = 100, before: str | None = None) -> Sequence[Credit]:
        return await self._readers.run(lambda connection: list_credits(connection, scope, limit, before))

    async def prune(self, before: float) -> int:
        check_moment(before, "before")
        stories, entries = Stories(before), 0
        while not stories.over:
            told = await self._readers.run(stories.step)
            for first in range(0, len(told), AT_ONCE):
                pruned = await self._in_turn(Prune(before, told[first : first + AT_ONCE]))
                assert isinstance(pruned, Pruned)
                entries += pruned.entries
        return entries

    async def roll_up(self, before: float) -> int:
        check_moment(before, "before")
        day = day_number(before)
        await self.prune(float(day * SECONDS_PER_DAY))
        records, start = 0, None
        while True:
            rolled_up = await self._in_turn(RollUp(day, start))
            assert isinstance(rolled_up, RolledUp)
            records, start = records + rolled_up.records, rolled_up.start
            if start is None:
                return records

    async def _in_turn(self, op: Prune | RollUp) -> Outcome:
        """One of many turns, and the time after it that is the others'."""
        begun = monotonic()
        outcome = await self._run(op)
        await anyio.sleep(min(OTHERS_SHARE * (monotonic() - begun), LONGEST_REST))
        return outcome

    async def set_caps(self, scope: str, caps: Caps) -> None:
        _check_storable(scope)
        await self._run(SetCaps(scope, caps))

    async def budgets(self, scopes: Mapping[str, Caps | None], *, now: float) -> Sequence[Budget]:
        check_moment(now, "now")
        return await self._readers.run(lambda connection: read_budgets(connection, scopes, now))

    async def usage(self, query: UsageQuery) -> UsageReport:
        reader = UsageReader(query, self._prices)
        return await self._readers.run(reader.read)

    async def check(self) -> Sequence[Finding]:
        return await self._readers.run(audit)

    async def ping(self) -> None:
        await self._run(Ping())


MAX_COUNT = 10**15
"""Of tokens and milliseconds: sums of such numbers stay within 64 bits."""


def _check_hold(request: HoldRequest) -> None:
    """SQLite's JSON functions end a text at a NUL: such a name would be looked up as another one."""
    check_request(request)
    who = request.scopes, request.principal, request.tenant, request.key_id
    what = request.provider, request.model, request.prompt, request.tags, request.would_refuse
    encoded = _check_storable((request.id, request.request_id, request.attempt, request.replaces, who, what))
    if encoded.find(b"\\u0000") >= 0 and ("\0" in request.id or any("\0" in claim.scope for claim in request.scopes)):
        raise InvalidArgument("ids and scopes must not contain a NUL character", param="id")


_encoder = msgspec.json.Encoder()


def _check_storable(value: object) -> bytes:
    """Raises `InvalidArgument` for text that is not Unicode (a lone surrogate), before it reaches the writer where others wait. Gives
    `value` as JSON."""
    try:
        return _encoder.encode(value)
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise InvalidArgument(f"the ledger cannot store this: {type(error).__name__}") from None


def _check_numbers(usage: Usage | None, latency_ms: int | None) -> None:
    numbers = () if usage is None else astuple(usage)
    for number in numbers if latency_ms is None else (*numbers, latency_ms):
        if not 0 <= number <= MAX_COUNT:
            raise InvalidArgument(f"tokens and milliseconds are between 0 and {MAX_COUNT}", param="usage")
