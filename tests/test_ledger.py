"""The SQLite ledger against the contract, and what only this backend promises."""

import fcntl
import math
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway.accounts import GATEWAY_SCOPE, ScopeClaim, UsageQuery, UsageRecord
from starlette_aigateway.errors import ConfigurationError, InvalidArgument, StorageUnavailable
from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_batch import Batch
from starlette_aigateway.stores.sqlite.ledger_load import LOAD, LOOK_UP, LOOK_UP_ONE, Touched
from starlette_aigateway.stores.sqlite.ledger_memory import TAKEN_SEQS, Memory
from starlette_aigateway.stores.sqlite.ledger_ops import Expire, Reserve, Settle
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA, HoldFacts, Prices, as_json
from starlette_aigateway.stores.sqlite.ledger_usage import UsageReader
from starlette_aigateway.stores.sqlite.ledger_writer import BatchWriter
from starlette_aigateway.testing.ledger import LedgerContract
from starlette_aigateway.testing.ledger_kit import (
    ACME,
    ALICE,
    DAY,
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
from starlette_aigateway.types import Caps, Price, PriceTier

pytestmark = pytest.mark.anyio


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


class TestSQLiteLedger(LedgerContract):
    pass


async def test_constructing_opens_and_creates_nothing(path: Path) -> None:
    SQLiteLedger(path)
    assert list(path.parent.iterdir()) == []


async def test_it_opens_at_its_first_use_and_again_after_closing(path: Path) -> None:
    ledger = SQLiteLedger(path)
    await ledger.reserve(hold_request("a"), now=NOON)
    await ledger.aclose()
    await ledger.settle("use_a", completed(5), now=NOON)
    assert await money(ledger) == (5, 0)
    await ledger.aclose()


async def test_entering_a_damaged_file_says_what_to_do(path: Path) -> None:
    path.write_bytes(b"this is no database, " * 100)
    with pytest.raises(StorageUnavailable, match=r"ledger\.db .*put a backup back"):
        async with SQLiteLedger(path):
            pass


async def test_a_file_of_a_newer_release_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={len(SCHEMA) + 1}")
    connection.close()
    with pytest.raises(ConfigurationError, match="newer release"):
        async with SQLiteLedger(path):
            pass
    with pytest.raises(ConfigurationError, match="newer release"):
        await SQLiteLedger(path).reserve(hold_request("a"), now=NOON)


async def test_a_directory_that_is_missing_is_storage_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable):
        async with SQLiteLedger(tmp_path / "no" / "ledger.db"):
            pass


async def test_text_that_cannot_be_stored_is_refused_and_harms_no_other(ledger: SQLiteLedger) -> None:
    with pytest.raises(InvalidArgument):
        await ledger.reserve(hold_request("a", model="\ud800"), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.reserve(hold_request("a", amount=10**16), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.reserve(hold_request("a\0b"), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.reserve(hold_request("a", scopes=[ScopeClaim("principal:alice\0")]), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.settle("use_a", completed(1, latency_ms=2**63), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.settle("use_a", completed(-1), now=NOON)
    with pytest.raises(InvalidArgument):
        await ledger.record(cached_record("a", cost=1))
    await assert_clean(ledger)


NO_TEXT = "\ud800"


@pytest.mark.parametrize(
    "field",
    ["id", "request_id", "principal", "tenant", "key_id", "provider", "model", "prompt", "replaces", "would_refuse", "tags", "scopes"],
)
async def test_no_part_of_a_hold_may_be_text_that_cannot_be_stored(ledger: SQLiteLedger, field: str) -> None:
    values: dict[str, Any] = {"tags": {"team": NO_TEXT}, "scopes": [ScopeClaim(NO_TEXT)]}
    with pytest.raises(InvalidArgument):
        await ledger.reserve(hold_request("a", **{field: values.get(field, NO_TEXT)}), now=NOON)
    await assert_clean(ledger)


@pytest.mark.parametrize("moment", [NOON * 1000, math.inf, math.nan, -1.0])
async def test_a_time_that_is_none_is_refused_before_it_becomes_the_latest_day(ledger: SQLiteLedger, moment: float) -> None:
    await ledger.reserve(hold_request("a"), now=NOON)
    verbs: list[Awaitable[object]] = [
        ledger.reserve(hold_request("b"), now=moment),
        ledger.reserve(hold_request("c", expires_at=moment), now=NOON),
        ledger.settle("use_a", completed(1), now=moment),
        ledger.release("use_a", now=moment),
        ledger.renew("use_a", moment, now=NOON),
        ledger.expire(now=moment),
        ledger.record(cached_record("d", created_at=moment)),
        ledger.budgets({}, now=moment),
    ]
    for verb in verbs:
        assert isinstance(await refused(verb), InvalidArgument)
    assert await money(ledger, "day") == (0, 100)
    await assert_clean(ledger)


async def test_odd_but_legal_text_comes_back_unchanged(ledger: SQLiteLedger) -> None:
    name = 'a"b\\c\n\u2028é🙂'
    await ledger.reserve(
        hold_request(name, principal=name, tags={name: name}, model=name, scopes=[ScopeClaim(f"principal:{name}", Caps(day=100))]), now=NOON
    )
    record = await ledger.settle(f"use_{name}", completed(5), now=NOON)
    assert record is not None
    assert (record.model, record.tags) == (name, {name: name})
    assert (await ledger.usage(UsageQuery(model=name))).data == [record]
    await assert_clean(ledger)


async def test_expiring_goes_on_until_nothing_is_due(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.stores.sqlite.ledger.DUE_AT_ONCE", 2)
    monkeypatch.setattr("starlette_aigateway.stores.sqlite.ledger_load.DUE_AT_ONCE", 2)
    for number in range(5):
        await ledger.reserve(hold_request(str(number)), now=NOON)
    expired = await ledger.expire(now=NOON + 10_000)
    assert sorted(record.id for record in expired) == [f"use_{number}" for number in range(5)]


def test_price_snapshots_are_remembered_within_a_bound_and_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prices, "BOUND", 2)
    prices = Prices()
    made = [Price(str(number), "2", cache_read="0.5", cache_write="1.25", request="0.001") for number in range(5)]
    texts = [prices.dump(price) for price in made]
    assert [prices.load(text) for text in texts] == made
    assert prices.load(prices.dump(None)) is None


async def test_expired_holds_come_back_with_their_price(ledger: SQLiteLedger) -> None:
    price = Price("0.000000001", "1000", cache_read="0.1", cache_write=3, request="0.25", tiers=[PriceTier(200_000, 2, "0.5", reasoning=1)])
    await ledger.reserve(hold_request("a", price=price), now=NOON)
    await ledger.reserve(hold_request("b", price=None), now=NOON)
    assert {record.id: record.price for record in await ledger.expire(now=NOON + LEASE)} == {"use_a": price, "use_b": None}


@pytest.mark.parametrize(
    "query",
    [
        UsageQuery(),
        UsageQuery(principal="alice"),
        UsageQuery(tenant="acme"),
        UsageQuery(key_id="key_1"),
        UsageQuery(model="m1"),
        UsageQuery(since=NOON),
        UsageQuery(since=NOON, until=NOON + 1),
        UsageQuery(principal="alice", since=NOON, until=NOON + 1),
        UsageQuery(tenant="acme", model="m1", until=NOON),
    ],
)
async def test_no_filter_makes_a_page_scan_or_sort(path: Path, ledger: SQLiteLedger, query: UsageQuery) -> None:
    sql, values = UsageReader(query, Prices()).page()
    connection = sqlite3.connect(path)
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    connection.close()
    assert not any("TEMP B-TREE" in step for step in plan), plan
    assert query == UsageQuery() or not any(step.startswith("SCAN") for step in plan), plan


Corruption = tuple[str, str, str]
CORRUPTIONS: list[Corruption] = [
    ("spent", "UPDATE balances SET spent = spent + 1 WHERE scope = 'gateway' AND period = '2026-03'", "I2"),
    ("held", "UPDATE balances SET held = 0 WHERE scope = 'principal:alice' AND period = ''", "I2"),
    ("open", "UPDATE balances SET open = open + 1 WHERE scope = 'tenant:acme' AND period = ''", "I2"),
    ("balance gone", "DELETE FROM balances WHERE scope = 'tenant:acme' AND period = '2026-03-31'", "I2"),
    ("balance made up", "INSERT INTO balances (scope, period, spent, held, open) VALUES ('principal:eve', '', 5, 0, 0)", "I2"),
    ("hold gone", "DELETE FROM holds WHERE id = 'use_open'", "I3"),
    ("hold reopened", "UPDATE holds SET expired = 0 WHERE id = 'use_expired'", "I3"),
    ("hold of another amount", "UPDATE holds SET facts = json_set(facts, '$[12]', 1) WHERE id = 'use_open'", "I2"),
    ("settled twice", "INSERT INTO entries (hold, kind, at, amount) VALUES ('use_settled', 'settle', 0, 7)", "I3"),
    ("adjusted without expiry", "INSERT INTO entries (hold, kind, at, amount) VALUES ('use_settled', 'adjust', 0, -7)", "I3"),
    ("entry gone", "DELETE FROM entries WHERE hold = 'use_settled' AND kind = 'settle'", "I3"),
    ("unknown kind", "INSERT INTO entries (hold, kind, at, amount) VALUES ('use_settled', 'gift', 0, 7)", "I3"),
    ("entry changed", "UPDATE entries SET amount = 1 WHERE hold = 'use_settled' AND kind = 'settle'", "I2"),
    ("grant changed", "UPDATE entries SET amount = 10000 WHERE hold = 'use_open' AND kind = 'hold'", "I1"),
    ("expiry changed", "UPDATE entries SET amount = 1 WHERE hold = 'use_expired' AND kind = 'expire'", "I2"),
    ("record gone", "DELETE FROM usage WHERE id = 'use_settled'", "I2"),
    ("record of another cost", "UPDATE usage SET cost = cost + 1 WHERE id = 'use_late.adjust'", "I2"),
    ("record of another outcome", "UPDATE usage SET outcome = 'completed' WHERE id = 'use_expired'", "I2"),
    ("record made up", "UPDATE usage SET outcome = 'completed' WHERE id = 'use_hit'", "I2"),
    ("settled at another price", "UPDATE usage SET price = NULL WHERE id = 'use_settled'", "I2"),
    ("settled below what was reported", "UPDATE usage SET output_tokens = 1000000 WHERE id = 'use_settled'", "I4"),
    ("a credit that never was", "DELETE FROM entries WHERE hold = 'crd_running' AND amount > 0", "I1"),
    ("a credit of another amount", "UPDATE credits SET amount = 900000 WHERE id = 'crd_running'", "I2"),
    ("a credit that came back", "UPDATE credits SET ended_at = NULL WHERE id = 'crd_ended'", "I2"),
    (
        "a credit that ended twice",
        "INSERT INTO entries (hold, kind, at, amount) VALUES ('crd_ended', 'credit', 0, -50)",
        "I3",
    ),
    ("a carry changed", "UPDATE entries SET amount = amount + 1 WHERE kind = 'carry' AND hold = 'gateway' AND day = '2026-03'", "I2"),
    ("carried bookings changed", "UPDATE entries SET amount = amount + 1 WHERE kind = 'carry' AND hold = ''", "I2"),
    ("a hit that cost", "UPDATE usage SET cost = 9 WHERE id = 'use_hit'", "I2"),
    ("recorded for another principal", "UPDATE usage SET principal = 'eve' WHERE id = 'use_settled'", "I2"),
    ("recorded for another tenant", "UPDATE usage SET tenant = 'umbrella' WHERE id = 'use_settled'", "I2"),
    ("adjusted for another principal", "UPDATE usage SET principal = 'eve' WHERE id = 'use_late.adjust'", "I2"),
    ("adjusted for no tenant", "UPDATE usage SET tenant = NULL WHERE id = 'use_late.adjust'", "I2"),
    ("a credit moved", "UPDATE credits SET scope = 'principal:eve' WHERE id = 'crd_running'", "I2"),
    ("a credit moved by its entry", "UPDATE entries SET scopes = '[\"gateway\"]' WHERE hold = 'crd_ended' AND amount > 0", "I3"),
    ("negative tokens", "UPDATE usage SET input_tokens = -5 WHERE id = 'use_settled'", "I2"),
    ("unknown outcome", "UPDATE usage SET outcome = 'gift' WHERE id = 'use_carried'", "I2"),
    ("carried above the last entry", "UPDATE meta SET value = 90000 WHERE name = 'carried'", "I4"),
    ("carried up to what is there", "UPDATE meta SET value = 7 WHERE name = 'carried'", "I4"),
    ("carried unknown", "DELETE FROM meta WHERE name = 'carried'", "I4"),
    ("left deletable", "UPDATE meta SET value = 1 WHERE name = 'carrying'", "I4"),
    ("a gap between entries", "DELETE FROM entries WHERE hold = 'use_released' AND kind = 'hold'", "I4"),
    ("a carry among the entries", "UPDATE entries SET seq = 100 WHERE kind = 'carry' AND hold = 'gateway' AND day = ''", "I4"),
    ("an amount that is none", "UPDATE entries SET amount = 'abc' WHERE hold = 'use_settled' AND kind = 'settle'", "I2"),
    ("scopes that are none", "UPDATE entries SET scopes = '[[1, 2]]' WHERE hold = 'use_settled' AND kind = 'hold'", "I2"),
    ("facts that are none", "UPDATE holds SET facts = 'xx' WHERE id = 'use_open'", "I2"),
    ("tokens that are none", "UPDATE usage SET input_tokens = 'abc' WHERE id = 'use_settled'", "I2"),
    ("a price that is none", 'UPDATE usage SET price = \'["a", "b", "c", "d", "e"]\' WHERE id = \'use_carried\'', "I2"),
    ("a price of other things", "UPDATE usage SET price = '[]' WHERE id = 'use_carried'", "I2"),
    ("tags that are none", "UPDATE usage SET tags = 'x' WHERE id = 'use_carried'", "I2"),
]


async def eventful(ledger: SQLiteLedger) -> None:
    """Books with something of every kind in them."""
    scopes = (ScopeClaim("principal:alice", Caps(day=5_000)), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE))
    await ledger.reserve(hold_request("carried", 100, tenant="acme", scopes=scopes), now=NOON - LEASE)
    await ledger.settle("use_carried", completed(40), now=NOON - LEASE)
    await ledger.reserve(hold_request("left", 100, tenant="acme", scopes=scopes), now=NOON - LEASE)
    await ledger.settle("use_left", completed(40), now=NOON)
    assert await ledger.prune(NOON) == 2
    for name in ("expired", "late", "settled", "released"):
        await ledger.reserve(hold_request(name, 100, tenant="acme", scopes=scopes), now=NOON)
    await ledger.settle("use_settled", completed(40), now=NOON)
    await ledger.release("use_released", now=NOON)
    await ledger.expire(now=NOON + LEASE)
    await ledger.settle("use_late", completed(30), now=NOON + LEASE)
    await ledger.reserve(hold_request("open", 100, tenant="acme", scopes=scopes, now=NOON + LEASE), now=NOON + LEASE)
    await ledger.record(cached_record("hit"))
    await ledger.add_credit(credit("running", 50))
    await ledger.add_credit(credit("ended", 50))
    await ledger.end_credit("crd_ended", now=NOON)
    await ledger.reserve(hold_request("credited", 100, tenant="acme", scopes=scopes, now=NOON + LEASE), now=NOON + LEASE)


async def test_check_is_clean_over_books_with_everything_in_them(ledger: SQLiteLedger) -> None:
    await eventful(ledger)
    await assert_clean(ledger)


@pytest.mark.parametrize("sql", ["UPDATE entries SET amount = 1", "DELETE FROM entries"])
async def test_entries_are_append_only(path: Path, ledger: SQLiteLedger, sql: str) -> None:
    await eventful(ledger)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(sql)
    connection.close()
    await assert_clean(ledger)


@pytest.mark.parametrize(("sql", "invariant"), [row[1:] for row in CORRUPTIONS], ids=[row[0] for row in CORRUPTIONS])
async def test_check_finds(path: Path, ledger: SQLiteLedger, sql: str, invariant: str) -> None:
    await eventful(ledger)
    connection = sqlite3.connect(path)
    with connection:
        guards = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in guards:
            connection.execute(f"DROP TRIGGER {name}")
        assert connection.execute(sql).rowcount == 1
        for _, guard in guards:
            connection.execute(guard)
    connection.close()
    assert invariant in {finding.invariant for finding in await ledger.check()}


async def test_an_entry_that_cannot_be_read_is_not_said_to_be_gone(path: Path, ledger: SQLiteLedger) -> None:
    await ledger.reserve(hold_request("a"), now=NOON)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("INSERT INTO entries (hold, kind, at, amount) VALUES ('use_odd', 'settle', 0, 'abc')")
    connection.close()
    await ledger.reserve(hold_request("b"), now=NOON)
    found = await ledger.check()
    assert any(finding.message.startswith("entry 2 holds what no gateway wrote") for finding in found)
    assert "entries" not in {finding.subject for finding in found}


@pytest.mark.parametrize("name", ["entries_never_change", "entries_are_only_carried"])
async def test_check_finds_a_guard_of_the_entries_that_is_gone_or_lets_all_pass(path: Path, ledger: SQLiteLedger, name: str) -> None:
    await eventful(ledger)
    connection = sqlite3.connect(path)
    connection.execute(f"DROP TRIGGER {name}")
    (gone,) = await ledger.check()
    connection.execute(f"CREATE TRIGGER {name} BEFORE UPDATE ON entries BEGIN SELECT 1; END")
    (other,) = await ledger.check()
    connection.close()
    assert (gone.invariant, gone.subject) == (other.invariant, other.subject) == ("I4", name)


async def test_row_numbers_have_no_gap_after_operations_that_failed_and_after_pruning(
    path: Path, ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the audit takes for granted when it calls a gap a loss."""
    book = Batch._book

    def book_unless_it_is_bad(batch: Batch, facts: HoldFacts, record: UsageRecord) -> UsageRecord:
        booked = book(batch, facts, record)
        if facts.id.startswith("use_bad"):
            batch.flush()  # its entries are written, and then rolled back
            raise RuntimeError("bad")
        return booked

    monkeypatch.setattr(Batch, "_book", book_unless_it_is_bad)
    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(reserve_and_fail_to_settle if number % 4 == 0 else reserve_and_settle, ledger, number)
    await assert_clean(ledger)
    assert await ledger.prune(NOON + 1) > 0
    await reserve_and_settle(ledger, 41)
    await assert_clean(ledger)
    connection = sqlite3.connect(path)
    (carried,) = connection.execute("SELECT value FROM meta WHERE name = 'carried'").fetchone()
    numbers = [seq for (seq,) in connection.execute("SELECT seq FROM entries WHERE seq > ? ORDER BY seq", (carried,))]
    connection.close()
    assert numbers == list(range(carried + 1, 40 + 30 + 2 + 1))


async def reserve_and_fail_to_settle(ledger: SQLiteLedger, number: int) -> None:
    await ledger.reserve(hold_request(f"bad_{number}", 100), now=NOON)
    with pytest.raises(StorageUnavailable):
        await ledger.settle(f"use_bad_{number}", completed(60), now=NOON)


async def test_an_expired_hold_is_not_carried_without_its_late_settlement(ledger: SQLiteLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_aigateway.stores.sqlite.ledger_stories.LOOK_AT", 2)
    late = NOON + LEASE
    await ledger.reserve(hold_request("late", 100), now=NOON)
    await ledger.expire(now=late)
    for number in range(3):
        await reserve_and_settle(ledger, number)
    await ledger.reserve(hold_request("between", 100, now=late + 0.7), now=late + 0.7)
    await ledger.settle("use_between", completed(60), now=late + 0.8)
    await ledger.settle("use_late", completed(30), now=late + 1)
    await ledger.reserve(hold_request("last", 100, now=late + 1), now=late + 1)
    for before, carried in ((late + 0.5, 6), (late + 2, 5), (late + 2, 0)):
        assert await ledger.prune(before) == carried
        await assert_clean(ledger)
    assert await money(ledger) == (4 * 60 + 30, 100)


async def test_check_is_safe_while_others_write(ledger: SQLiteLedger) -> None:
    async with anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(reserve_and_settle, ledger, number)
        for _ in range(10):
            await assert_clean(ledger)
    await assert_clean(ledger)


async def reserve_and_settle(ledger: SQLiteLedger, number: int) -> None:
    await ledger.reserve(hold_request(str(number), 100), now=NOON)
    await ledger.settle(f"use_{number}", completed(60), now=NOON)


async def test_a_call_that_is_cancelled_while_it_waits_is_still_in_the_books(ledger: SQLiteLedger) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await ledger.reserve(hold_request("a", 100), now=NOON)
    await ledger.ping()
    assert await money(ledger) == (0, 100)
    await ledger.release("use_a", now=NOON)
    await assert_clean(ledger)


async def test_a_full_lock_wait_is_storage_unavailable_and_then_recovers(path: Path, ledger: SQLiteLedger) -> None:
    impatient = SQLiteLedger(path, timeout=0.05)
    descriptor = os.open(path.with_name("ledger.db.lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StorageUnavailable) as caught:
        await impatient.reserve(hold_request("a"), now=NOON)
    assert caught.value.retry_after is not None
    os.close(descriptor)
    await impatient.reserve(hold_request("a"), now=NOON)
    await impatient.aclose()
    assert await money(ledger) == (0, 100)


async def test_records_of_one_millisecond_all_have_their_place(ledger: SQLiteLedger) -> None:
    await gather([partial(ledger.reserve, hold_request(str(number), 1), now=NOON) for number in range(500)])
    async with anyio.create_task_group() as group:
        for number in range(500):
            group.start_soon(partial(ledger.settle, f"use_{number}", completed(1), now=NOON))
    assert (await ledger.usage(UsageQuery(limit=1000))).totals.calls == 500
    await assert_clean(ledger)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_settlement_that_arrives_with_the_sweep_is_exact_and_needs_no_adjustment(path: Path, ledger: SQLiteLedger) -> None:
    await ledger.reserve(hold_request("a", 100), now=NOON)
    connection = connect(path, durability="OFF", schema=SCHEMA)
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        late = NOON + LEASE
        expired, record = BatchWriter(Prices()).apply(connection, [Expire(late), Settle("use_a", completed(30), late)])
    connection.close()
    assert expired == []
    assert isinstance(record, UsageRecord)
    assert (record.outcome, record.cost) == ("completed", 30)
    await assert_clean(ledger)


async def test_a_ledger_of_the_first_release_is_brought_up_to_date_with_its_open_holds(path: Path) -> None:
    """Entries had no price then, and holds neither caps nor marks."""
    connection = connect(path, durability="OFF", schema=SCHEMA[:1])
    facts = ["use_old", "req_old", 1, [ALICE], "alice", None, None, "openai", "gpt-4o-mini", '["0.0001","0.0002","0.0001","0.0001","0"]']
    facts += [None, None, 100, "2026-03-31", NOON, NOON + LEASE, False]
    with connection:
        connection.execute("INSERT INTO holds VALUES (?, ?, 0, ?)", ("use_old", NOON + LEASE, as_json(facts)))
        limits = as_json([(ALICE, 500, None, None)])
        connection.execute("INSERT INTO entries VALUES (1, 'use_old', 'hold', ?, 100, '2026-03-31', ?)", (NOON, limits))
        for period, open_holds in (("2026-03-31", 0), ("2026-03", 0), ("", 1)):
            connection.execute("INSERT INTO balances VALUES (?, ?, 0, 100, ?)", (ALICE, period, open_holds))
        connection.execute(f"UPDATE meta SET value = {int(NOON // DAY)} WHERE name = 'day'")
    connection.close()
    async with SQLiteLedger(path, durability="OFF") as ledger:
        await assert_clean(ledger)
        record = await ledger.settle("use_old", completed(40), now=NOON)
        assert record is not None
        assert (record.cost, record.price, record.would_refuse) == (40, Price("0.0001", "0.0002"), None)
        assert await money(ledger) == (40, 0)
        await ledger.reserve(hold_request("new", 100, caps=Caps(day=140)), now=NOON)
        await assert_clean(ledger)


@pytest.mark.parametrize("table", ["balances", "holds", "entries", "usage", "caps", "credits"])
async def test_a_batch_reads_no_table_from_end_to_end(path: Path, ledger: SQLiteLedger, table: str) -> None:
    await eventful(ledger)
    connection = sqlite3.connect(path)
    touched = Touched([Reserve(hold_request("x"), None, NOON), Settle("use_open", completed(1), NOON)], Memory())
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {LOAD}", touched.parameters())]
    plan += [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {LOOK_UP}", {"holds": "[]", "records": "[]"})]
    plan += [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {LOOK_UP_ONE}", ("a",))]
    plan += [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {TAKEN_SEQS}", ("[]",))]
    connection.close()
    assert not [step for step in plan if step.startswith(f"SCAN {table}")], plan
