"""What the writer of the ledger knows from its batches before: it saves reading, and it is never wrong."""

import random
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from starlette_aigateway.accounts import GATEWAY_SCOPE, Hold, ScopeClaim, UsageRecord
from starlette_aigateway.errors import SpendCapExceeded, SpendCapHeld, StorageUnavailable
from starlette_aigateway.stores.sqlite import ledger_memory
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_batch import Batch
from starlette_aigateway.stores.sqlite.ledger_ops import Op, Reserve
from starlette_aigateway.stores.sqlite.transactions import Transactions
from starlette_aigateway.testing.ledger_kit import (
    ACME,
    ALICE,
    LEASE,
    NOON,
    assert_clean,
    cached_record,
    completed,
    gather,
    hold_request,
    money,
    refused,
)
from starlette_aigateway.testing.ledger_limits import credit
from starlette_aigateway.types import Caps

pytestmark = pytest.mark.anyio
Statements = list[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def ledger(path: Path) -> AsyncIterator[SQLiteLedger]:
    async with SQLiteLedger(path, durability="OFF") as ledger:
        yield ledger


@pytest.fixture
async def peer(path: Path) -> AsyncIterator[SQLiteLedger]:
    async with SQLiteLedger(path, durability="OFF") as peer:
        yield peer


def asked(ledger: SQLiteLedger) -> Statements:
    """Fills with what the writer asks of its connection."""
    writer = ledger._commit._writer
    assert writer is not None
    assert isinstance(writer._turns, Transactions)
    assert writer._turns._connection is not None
    statements: Statements = []
    writer._turns._connection.set_trace_callback(lambda sql: statements.append(" ".join(sql.split())))
    return statements


def tables_read(statements: Statements) -> set[str]:
    selects = [sql for sql in statements if sql.startswith("SELECT")]
    return {table for table in ("balances", "caps", "credits", "meta", "usage", "holds") for sql in selects if f"FROM {table}" in sql}


async def test_what_is_known_is_not_read_again(ledger: SQLiteLedger) -> None:
    scopes = (ScopeClaim(ALICE, Caps(day=1000)), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
    await ledger.reserve(hold_request("a", scopes=scopes), now=NOON)
    statements = asked(ledger)
    await ledger.settle("use_a", completed(40), now=NOON)
    assert tables_read(statements) == {"usage"}, "the row numbers that are taken, once"
    statements.clear()
    await ledger.reserve(hold_request("b", scopes=scopes), now=NOON + 1)
    assert tables_read(statements) == {"holds", "usage"}, "whether the id is new"
    statements.clear()
    await ledger.settle("use_b", completed(40), now=NOON + 1)
    assert tables_read(statements) == set()
    assert await money(ledger) == (80, 0)
    await assert_clean(ledger)


async def test_a_scope_is_read_when_it_is_first_claimed_and_for_each_new_day(ledger: SQLiteLedger) -> None:
    await ledger.reserve(hold_request("a"), now=NOON)
    statements = asked(ledger)
    await ledger.reserve(hold_request("b", scopes=[ScopeClaim(ALICE), ScopeClaim(ACME)]), now=NOON)
    assert "credits" in tables_read(statements)
    statements.clear()
    await ledger.reserve(hold_request("c", now=NOON + 86_400, expires_at=NOON + 90_000), now=NOON + 86_400)
    assert "credits" in tables_read(statements)
    assert await money(ledger, "day", now=NOON + 86_400) == (0, 100)


async def test_a_commit_of_another_process_is_seen_in_the_next_batch(ledger: SQLiteLedger, peer: SQLiteLedger) -> None:
    caps = Caps(total=500)
    for number in range(5):
        turn = (ledger, peer)[number % 2]
        await turn.reserve(hold_request(str(number), caps=caps), now=NOON)
    for turn in (ledger, peer):
        assert isinstance(await refused(turn.reserve(hold_request("no", caps=caps), now=NOON)), SpendCapHeld)
    for number in range(5):
        await (peer, ledger)[number % 2].settle(f"use_{number}", completed(100), now=NOON)
    for turn in (ledger, peer):
        assert isinstance(await refused(turn.reserve(hold_request("no", caps=caps), now=NOON)), SpendCapExceeded)
    await assert_clean(ledger)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE balances SET spent = spent + 400 WHERE scope = 'principal:alice'",
        "INSERT INTO credits VALUES ('c', 'principal:alice', 500, 0, 1e10, NULL, 'x', 'x')",
        "DELETE FROM holds WHERE id = 'use_a'",
    ],
)
async def test_what_anybody_else_writes_is_seen_in_the_next_batch(path: Path, ledger: SQLiteLedger, sql: str) -> None:
    caps = Caps(total=500)
    await ledger.reserve(hold_request("a", 300, caps=caps), now=NOON)
    with closing(sqlite3.connect(path)) as shell:
        shell.execute(sql)
        shell.commit()
    fits = await gather([partial(ledger.reserve, hold_request("b", 300, caps=caps), now=NOON)])
    settled = await ledger.settle("use_a", completed(1), now=NOON)
    assert (len(fits[0]), settled is None) == ("credits" in sql, "holds" in sql)


async def test_own_changes_of_caps_and_credits_are_seen_in_the_next_batch(ledger: SQLiteLedger) -> None:
    scopes = [ScopeClaim(ALICE), ScopeClaim(ACME)]
    await ledger.reserve(hold_request("a", 100, scopes=scopes), now=NOON)
    await ledger.set_caps(ACME, Caps(total=250))
    await ledger.reserve(hold_request("b", 100, scopes=scopes), now=NOON)
    assert isinstance(await refused(ledger.reserve(hold_request("c", 100, scopes=scopes), now=NOON)), SpendCapHeld)
    await ledger.add_credit(credit("more", 50, scope=ACME, expires_at=NOON + 10))
    await ledger.reserve(hold_request("c", 100, scopes=scopes), now=NOON)
    await ledger.release("use_c", now=NOON)
    assert isinstance(await refused(ledger.reserve(hold_request("d", 100, scopes=scopes), now=NOON + 10)), SpendCapHeld)
    await assert_clean(ledger)


class Fault:
    """Makes the end of one transaction fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed: Exception | None = None
        self.after_the_commit = False
        real = Transactions._end

        def end(writer: "Transactions[Op, object]", connection: sqlite3.Connection) -> None:
            fault, self.armed = self.armed, None
            if fault is None or self.after_the_commit:
                real(writer, connection)
            if fault is not None:
                raise fault

        monkeypatch.setattr(Transactions, "_end", end)


@pytest.mark.parametrize("fault", [sqlite3.OperationalError("disk I/O error"), sqlite3.IntegrityError("no"), RuntimeError("a defect")])
@pytest.mark.parametrize("committed", [False, True])
async def test_what_was_decided_in_a_transaction_that_failed_is_forgotten(
    ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch, fault: Exception, committed: bool
) -> None:
    """Also where it may have been written, and nobody knows."""
    ending = Fault(monkeypatch)
    caps = Caps(total=300)
    await ledger.reserve(hold_request("a", 100, caps=caps), now=NOON)
    ending.armed, ending.after_the_commit = fault, committed
    assert isinstance(await refused(ledger.reserve(hold_request("b", 100, caps=caps), now=NOON)), StorageUnavailable)
    assert await money(ledger) == (0, 200 if committed else 100)
    fit, refusals = await gather([partial(ledger.reserve, hold_request(f"{n}", 100, caps=caps), now=NOON) for n in range(3)])
    assert (len(fit), len(refusals)) == ((1, 2) if committed else (2, 1))
    ending.armed = fault
    assert isinstance(await refused(ledger.settle("use_a", completed(100), now=NOON)), StorageUnavailable)
    settled = await ledger.settle("use_a", completed(60), now=NOON)
    assert settled is not None
    assert settled.cost == (100 if committed else 60)
    await assert_clean(ledger)


async def test_a_batch_that_failed_is_decided_anew_operation_by_operation(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = Fault(monkeypatch)
    caps = Caps(total=450)
    await ledger.reserve(hold_request("first", 100, caps=caps), now=NOON)
    ending.armed = RuntimeError("a defect")
    granted, errors = await gather([partial(ledger.reserve, hold_request(name, 100, caps=caps), now=NOON) for name in "abcd"])
    assert (len(granted), [type(error) for error in errors]) == (3, [SpendCapHeld])
    assert await money(ledger) == (0, 400)
    await assert_clean(ledger)


async def test_an_operation_that_fails_alone_takes_nothing_with_it(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    decide = Batch.decide

    def fails(batch: Batch, op: Op) -> object:
        outcome = decide(batch, op)
        if isinstance(op, Reserve) and op.request.id == "use_bad":
            raise RuntimeError("after it was decided")
        return outcome

    monkeypatch.setattr(Batch, "decide", fails)
    caps = Caps(total=500)
    await ledger.reserve(hold_request("first", 100, caps=caps), now=NOON)
    calls = [partial(ledger.reserve, hold_request(name, 100, caps=caps), now=NOON) for name in ("a", "bad", "b", "c", "d", "e")]
    granted, errors = await gather(calls)
    assert len(granted) == 4
    assert "use_bad" not in {hold.id for hold in granted}
    assert {type(error) for error in errors} == {StorageUnavailable, SpendCapHeld}
    assert await money(ledger) == (0, 500)
    await assert_clean(ledger)


@pytest.mark.parametrize("known", [False, True])
async def test_a_refusal_says_when_the_next_lease_ends_whether_or_not_the_scope_is_known(ledger: SQLiteLedger, known: bool) -> None:
    caps = Caps(total=300)
    for name, lease in (("a", 1.0), ("b", 3.0), ("c", 4.0)):
        await ledger.reserve(hold_request(name, 100, caps=caps, expires_at=NOON + lease), now=NOON)
    await ledger.release("use_a", now=NOON)
    await ledger.reserve(hold_request("d", 100, caps=caps), now=NOON)
    if not known:
        await ledger.ping()
    error = await refused(ledger.reserve(hold_request("e", 100, caps=caps), now=NOON))
    assert isinstance(error, SpendCapHeld)
    assert error.retry_after == 3.0


@pytest.mark.parametrize("renewed", [False, True])
async def test_a_lease_that_ends_is_noticed_by_a_batch_that_knows_all_it_touches(ledger: SQLiteLedger, renewed: bool) -> None:
    caps = Caps(total=300)
    for name, lease in (("a", 50.0), ("b", 50.0 if renewed else 30.0), ("c", 40.0)):
        await ledger.reserve(hold_request(name, 100, caps=caps, expires_at=NOON + lease), now=NOON)
    if renewed:
        assert await ledger.renew("use_b", NOON + 30, now=NOON)
    await ledger.settle("use_a", completed(10), now=NOON)
    await ledger.reserve(hold_request("d", 80, caps=caps), now=NOON + 29)
    assert await money(ledger) == (10, 280)
    assert isinstance(await refused(ledger.reserve(hold_request("e", 80, caps=caps), now=NOON + 30)), SpendCapHeld)
    assert await money(ledger) == (110, 180)
    await assert_clean(ledger)


async def test_row_numbers_stay_apart_whatever_the_order_of_times(ledger: SQLiteLedger, peer: SQLiteLedger) -> None:
    dice = random.Random(5)
    for number in range(60):
        turn = peer if number % 13 == 0 else ledger
        await turn.record(cached_record(str(number), created_at=NOON + dice.choice((-1.0, 0.0, 0.0, 0.001, 0.002, 1.0)) + number // 20))
    await assert_clean(ledger)


async def test_what_is_kept_is_bounded_and_right_all_the_same(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_memory, "MOST", 7)
    caps = Caps(total=10_000)
    held: list[Hold] = []
    for number in range(20):
        scopes = [ScopeClaim(f"principal:{number % 3}", caps), ScopeClaim(ACME)]
        held.append(await ledger.reserve(hold_request(str(number), 10, scopes=scopes, principal=f"{number % 3}"), now=NOON))
        assert len(ledger._writer._known.memory.holds if ledger._writer._known else ()) <= 7
        if number % 2:
            assert isinstance(await ledger.settle(held.pop(0).id, completed(5), now=NOON), UsageRecord)
    assert await money(ledger, scope=ACME) == (50, 100)
    await assert_clean(ledger)


async def test_doing_it_twice_changes_nothing_for_a_batch_that_knows_its_scopes(ledger: SQLiteLedger, peer: SQLiteLedger) -> None:
    async def all_twice(turn: SQLiteLedger) -> Sequence[object]:
        first = await turn.reserve(hold_request("a", 100), now=NOON)
        second = await turn.reserve(hold_request("a", 100), now=NOON)
        settled = await turn.settle("use_a", completed(40), now=NOON)
        third = await turn.reserve(hold_request("a", 100), now=NOON)
        return [first == second == third, settled == await turn.settle("use_a", completed(99), now=NOON)]

    assert await all_twice(ledger) == [True, True]
    await ledger.reserve(hold_request("other", 100, expires_at=NOON + LEASE), now=NOON)
    assert await all_twice(peer) == [True, True]
    await ledger.record(cached_record("hit"))
    await ledger.record(cached_record("hit"))
    assert await money(ledger) == (40, 100)
    await assert_clean(ledger)
