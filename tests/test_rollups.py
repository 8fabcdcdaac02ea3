"""Usage records that are rolled up in the SQLite ledger: figures at any cut, faults in the middle, what the audit knows of it."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from starlette_aigateway.accounts import ScopeClaim, UsageQuery, UsageReport, principal_scope
from starlette_aigateway.stores.sqlite import ledger as ledger_module
from starlette_aigateway.stores.sqlite import ledger_rollups, ledger_stories
from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_check import audit
from starlette_aigateway.stores.sqlite.ledger_ops import Op, Prune, Pruned, RolledUp, RollUp
from starlette_aigateway.stores.sqlite.ledger_schema import DAY_STEP, SCHEMA, Prices
from starlette_aigateway.stores.sqlite.ledger_stories import Stories
from starlette_aigateway.stores.sqlite.ledger_usage import UsageReader
from starlette_aigateway.stores.sqlite.ledger_writer import BatchWriter
from starlette_aigateway.testing.ledger_kit import DAY, LEASE, NOON, assert_clean, cached_record, completed, hold_request, money, records
from starlette_aigateway.testing.ledger_rollups import FILTERS, GROUPINGS, MIDNIGHT, figures, lively

pytestmark = pytest.mark.anyio

EVERYTHING = UsageQuery(group_by=("day", "principal", "tenant", "key", "provider", "model", "outcome"))
TODAY = int(MIDNIGHT // DAY)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many turns, and no rest between them."""
    monkeypatch.setattr(ledger_rollups, "AT_ONCE", 3)
    monkeypatch.setattr(ledger_module, "AT_ONCE", 2)
    monkeypatch.setattr(ledger_stories, "LOOK_AT", 7)
    monkeypatch.setattr(ledger_module, "OTHERS_SHARE", 0.0)


async def history(path: Path, days: int = 3) -> None:
    """Ends with a hold of today, so that everything before may be rolled up."""
    async with SQLiteLedger(path, durability="OFF") as ledger:
        await lively(ledger, days)
        await ledger.expire(now=NOON + 10 * DAY)
        await ledger.reserve(hold_request("last", now=NOON + 10 * DAY), now=NOON + 10 * DAY)


# -- at any cut --------------------------------------------------------------------------------------------------------

edges = st.sampled_from((-DAY, -DAY + 0.0004, -0.0004, 0.0, DAY - 2.4e-7, DAY))
seconds = st.one_of(st.floats(-2 * DAY, 2 * DAY), edges).map(lambda offset: MIDNIGHT + offset)
payers = st.fixed_dictionaries(
    {
        "principal": st.sampled_from(("alice", "bob", "")),
        "tenant": st.sampled_from((None, "", "acme")),
        "key_id": st.sampled_from((None, "key_1")),
        "model": st.sampled_from(("m1", "m2")),
        "provider": st.sampled_from(("openai", "echo")),
    }
)
ends = st.sampled_from(("cached", "completed", "ambiguous", "released", "expired", "late", "open"))
calls = st.lists(st.tuples(seconds, payers, ends, st.integers(2, 100)), min_size=1, max_size=25)


async def carry_out(ledger: SQLiteLedger, number: int, moment: float, payer: dict[str, Any], end: str, amount: int) -> None:
    name = f"{number}_{end}"
    if end == "cached":
        await ledger.record(cached_record(name, created_at=moment, **payer))
        return
    scopes = [ScopeClaim(principal_scope(payer["principal"]))]
    await ledger.reserve(hold_request(name, 100, now=moment, scopes=scopes, **payer), now=moment)
    match end:
        case "completed":
            await ledger.settle(f"use_{name}", completed(amount), now=moment + 1)
        case "ambiguous":
            await ledger.settle(f"use_{name}", completed(100, outcome="ambiguous", usage=None), now=moment + 1)
        case "released":
            await ledger.release(f"use_{name}", now=moment + 1)
        case "expired" | "late":
            await ledger.expire(now=moment + 2 * LEASE)
            if end == "late":
                await ledger.settle(f"use_{name}", completed(amount), now=moment + 2 * LEASE)


midnights = st.sampled_from((None, MIDNIGHT - DAY, MIDNIGHT, MIDNIGHT + DAY))
queries = st.builds(replace, st.sampled_from(FILTERS), since=midnights, until=midnights, group_by=st.sampled_from(GROUPINGS))


@given(calls, st.lists(seconds, min_size=1, max_size=4), st.lists(queries, min_size=4, max_size=12), st.integers(1, 4), st.booleans())
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=settings().max_examples // 2)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_usage_over_whole_days_is_the_same_after_any_number_of_cuts(
    tmp_path_factory: pytest.TempPathFactory,
    anyio_backend: str,
    history: Sequence[tuple[float, dict[str, Any], str, int]],
    cuts: Sequence[float],
    asked: list[UsageQuery],
    at_once: int,
    final: bool,
) -> None:
    path = tmp_path_factory.mktemp("cuts") / "ledger.db"
    asked = [*asked, EVERYTHING]

    async def run() -> None:
        async with SQLiteLedger(path, durability="OFF") as ledger:
            for number, call in enumerate(history):
                await carry_out(ledger, number, *call)
            if final:
                await ledger.expire(now=MIDNIGHT + 30 * DAY)
            before, ids = await figures(ledger, asked), {one.id for one in await records(ledger, limit=1000)}
            for cut in cuts:
                await ledger.roll_up(cut)
                assert await figures(ledger, asked) == before
                await assert_clean(ledger)
            left = await records(ledger, limit=1000)
            assert {one.id for one in left} <= ids
            assert not any(one.outcome == "cached" and one.created_at < max(cuts) // DAY * DAY for one in left)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ledger_rollups, "AT_ONCE", at_once)
        patched.setattr(ledger_module, "OTHERS_SHARE", 0.0)
        anyio.run(run)


@given(st.lists(st.tuples(seconds, st.integers(0, 3)), max_size=20), seconds, st.lists(seconds, min_size=2, max_size=5).map(sorted))
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=settings().max_examples // 2)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_ranges_that_adjoin_add_up_wherever_they_begin(
    tmp_path_factory: pytest.TempPathFactory, anyio_backend: str, hits: list[tuple[float, int]], cut: float, bounds: list[float]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "ledger.db"

    async def run() -> None:
        async with SQLiteLedger(path, durability="OFF") as ledger:
            for number, (moment, _) in enumerate(hits):
                await ledger.record(cached_record(str(number), created_at=moment))
            await ledger.roll_up(cut)
            for number, (moment, later) in enumerate(hits):
                if later:
                    await ledger.record(cached_record(f"later_{number}", created_at=moment))

            async def count(since: float | None, until: float | None) -> int:
                return (await ledger.usage(UsageQuery(since=since, until=until))).totals.calls

            edges = [None, *bounds, None]
            parts = [await count(since, until) for since, until in pairwise(edges)]
            assert sum(parts) == await count(None, None)

    anyio.run(run)


# -- faults in the middle ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more."""


class Mortal(sqlite3.Connection):
    """Dies at the statement before which `left` has come to nothing."""

    left = 10**9

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self._live()
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        self._live()
        return super().executemany(*arguments)


def in_turns(connection: sqlite3.Connection, day: int) -> int:
    """What `SQLiteLedger.roll_up` does, on this connection; gives the number of records."""
    writer = BatchWriter(Prices())

    def apply(op: Op) -> Any:
        connection.execute("BEGIN IMMEDIATE")
        (outcome,) = writer.apply(connection, [op])
        connection.execute("COMMIT")
        return outcome

    stories = Stories(day * DAY)
    while not stories.over:
        told = stories.step(connection)
        for story in told:
            apply(Prune(day * DAY, [story]))
    rolled_up = RolledUp(0, 0)
    gone = 0
    while rolled_up.start is not None:
        rolled_up = apply(RollUp(day, rolled_up.start))
        gone += rolled_up.records
    return gone


def report(path: Path) -> list[UsageReport]:
    with closing(connect(path, durability="OFF", schema=SCHEMA)) as connection:
        assert audit(connection) == []
        queries = [
            UsageQuery(group_by=groups, limit=1) for groups in (("day", "principal", "tenant", "key", "model", "outcome"), ("month",))
        ]
        return [UsageReader(query, Prices()).read(connection) for query in queries]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_death_at_any_statement_leaves_all_figures_exact_and_the_rest_to_be_done(path: Path, small_turns: None) -> None:
    async with SQLiteLedger(path, durability="OFF") as ledger:
        for number, end in enumerate(("cached", "late", "completed", "released", "cached")):
            await carry_out(ledger, number, NOON - DAY, {"principal": f"{number % 2}"}, end, 40)
        await ledger.expire(now=NOON + 10 * DAY)
        await ledger.reserve(hold_request("last", now=NOON + 10 * DAY), now=NOON + 10 * DAY)
    whole = [(one.totals, one.groups) for one in report(path)]
    deaths = 0
    while True:
        copy = path.with_name(f"copy_{deaths}.db")
        shutil.copy(path, copy)
        connection = sqlite3.connect(copy, isolation_level=None, factory=Mortal)
        connection.left = deaths
        try:
            in_turns(connection, TODAY)
            died = False
        except Killed:
            died = True
        connection.left = 10**9
        connection.close()
        assert [(one.totals, one.groups) for one in report(copy)] == whole
        with closing(connect(copy, durability="OFF", schema=SCHEMA)) as again:
            assert (in_turns(again, TODAY) > 0) <= died
            assert again.execute("SELECT count(*) FROM usage WHERE created_at < ?", (MIDNIGHT,)).fetchone() == (0,)
        assert [(one.totals, one.groups) for one in report(copy)] == whole
        for file in copy.parent.glob(f"{copy.name}*"):
            file.unlink()
        if not died:
            break
        deaths += 1
    assert deaths > 50


KILLED = """
import sys
from pathlib import Path
import anyio
from starlette_aigateway.stores.sqlite import ledger, ledger_rollups, ledger_stories

ledger_rollups.AT_ONCE, ledger_stories.LOOK_AT, ledger.AT_ONCE, ledger.OTHERS_SHARE = 2, 7, 2, 0.0
run = ledger.SQLiteLedger._run

async def told(self, op):
    print(op, flush=True)
    return await run(self, op)

ledger.SQLiteLedger._run = told
anyio.run(ledger.SQLiteLedger(Path(sys.argv[1])).roll_up, float(sys.argv[2]))
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("turns", [1, 4, 11, 23])
async def test_a_process_that_is_killed_while_it_rolls_up_leaves_all_figures_exact(path: Path, turns: int) -> None:
    await history(path, days=2)
    whole = [(one.totals, one.groups) for one in report(path)]
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(MIDNIGHT)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for _ in range(turns):
            process.stdout.readline()
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [(one.totals, one.groups) for one in report(path)] == whole
    async with SQLiteLedger(path, durability="OFF") as ledger:
        assert await ledger.roll_up(MIDNIGHT) > 0
        await assert_clean(ledger)
    assert [(one.totals, one.groups) for one in report(path)] == whole


async def test_calls_go_on_between_the_turns(path: Path, small_turns: None) -> None:
    await history(path)
    async with SQLiteLedger(path, durability="OFF") as ledger, SQLiteLedger(path, durability="OFF") as peer:
        before = (await ledger.usage(UsageQuery(until=MIDNIGHT, group_by=("day", "model")))).groups
        made = 0
        ended = anyio.Event()

        async def roll_up(which: SQLiteLedger) -> None:
            await which.roll_up(MIDNIGHT)
            ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(roll_up, ledger)
            group.start_soon(roll_up, peer)
            while not ended.is_set():
                now = NOON + 10 * DAY
                await ledger.reserve(hold_request(f"beside_{made}", now=now), now=now)
                await ledger.settle(f"use_beside_{made}", completed(7), now=now)
                assert (await ledger.usage(UsageQuery(until=MIDNIGHT, group_by=("day", "model")))).groups == before
                made += 1
        assert made > 1
        await assert_clean(ledger)
        assert await ledger.roll_up(MIDNIGHT) == 0


# -- what stays --------------------------------------------------------------------------------------------------------


def periods_of(path: Path) -> tuple[set[str], set[str]]:
    """Of which periods there are balances, and carries."""
    with closing(sqlite3.connect(path)) as connection:
        carries = connection.execute("SELECT DISTINCT day FROM entries WHERE kind = 'carry' AND hold <> ''").fetchall()
        return {period for (period,) in connection.execute("SELECT period FROM balances")}, {period for (period,) in carries}


async def test_a_day_that_is_over_leaves_nothing_but_its_part_of_month_and_lifetime(path: Path, small_turns: None) -> None:
    async with SQLiteLedger(path, durability="OFF") as ledger:
        await lively(ledger, 3)
        await ledger.expire(now=NOON + 10 * DAY)
        budgets = await ledger.budgets({"principal:alice": None, "gateway": None}, now=NOON)
        await ledger.prune(NOON - DAY + LEASE / 2)
        await assert_clean(ledger)  # in the middle of a day
        assert periods_of(path) == ({"2026-03-30", "2026-03-31", "2026-03", ""}, {"2026-03-30", "2026-03", ""})
        await ledger.prune(MIDNIGHT)
        await assert_clean(ledger)
        assert periods_of(path) == ({"2026-03-31", "2026-03", ""}, {"2026-03", ""})
        await ledger.prune(NOON + 10 * DAY)
        await assert_clean(ledger)
        assert periods_of(path) == ({"2026-03-31", "2026-03", ""},) * 2, "the day that the ledger is in may still be asked for"
        assert await ledger.budgets({"principal:alice": None, "gateway": None}, now=NOON) == budgets
        april = NOON + 10 * DAY
        await ledger.reserve(hold_request("new", scopes=[ScopeClaim("principal:alice")], now=april), now=april)
        await ledger.settle("use_new", completed(5), now=april)
        await ledger.reserve(hold_request("last", now=april + 3 * DAY), now=april + 3 * DAY)
        await ledger.prune(april + DAY)
        await assert_clean(ledger)
        assert "2026-04-10" not in periods_of(path)[0]


async def test_two_workers_that_prune_at_once_carry_everything_once(path: Path) -> None:
    await history(path)
    async with SQLiteLedger(path, durability="OFF") as ledger:
        stories = Stories(MIDNIGHT)
        with closing(sqlite3.connect(path)) as connection:
            told = list(stories.step(connection))
        assert await ledger.prune(MIDNIGHT) > 0
        assert await ledger._run(Prune(MIDNIGHT, told)) == Pruned(0)
        await assert_clean(ledger)


async def test_a_hold_of_a_day_that_is_over_is_settled_in_it_all_the_same(path: Path) -> None:
    async with SQLiteLedger(path, durability="OFF") as ledger:
        for name in ("done", "running"):
            await ledger.reserve(hold_request(name, 100, expires_at=NOON + 9 * DAY), now=NOON)
        await ledger.settle("use_done", completed(30), now=NOON)
        for number, day in enumerate((1, 2, 3)):
            await ledger.reserve(hold_request(str(number), 100, expires_at=NOON + 9 * DAY), now=NOON + day * DAY)
            await ledger.prune(NOON + day * DAY)
            await assert_clean(ledger)
        await ledger.settle("use_running", completed(40), now=NOON + 3 * DAY)
        await assert_clean(ledger)
        assert await ledger.roll_up(NOON + 3 * DAY) == 1, "the other was settled on the last day"
        await ledger.reserve(hold_request("last", 100, expires_at=NOON + 9 * DAY), now=NOON + 4 * DAY)
        assert await ledger.roll_up(NOON + 4 * DAY) == 1
        assert await money(ledger) == (70, 400)
        await assert_clean(ledger)
        assert not any(period.startswith("2026-03-31") for period in periods_of(path)[0])


# -- turns -------------------------------------------------------------------------------------------------------------


async def test_days_behind_too_many_holds_that_may_still_change_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_rollups, "HELD_AT_ONCE", 2)
    async with SQLiteLedger(path, durability="OFF") as ledger:
        for day in range(3):
            now = NOON + day * DAY
            await ledger.reserve(hold_request(f"open_{day}", expires_at=NOON + 30 * DAY), now=now)
            await ledger.record(cached_record(str(day), created_at=now))
        assert await ledger.roll_up(NOON + 3 * DAY) == 1
        await assert_clean(ledger)
        for day in range(2):
            await ledger.settle(f"use_open_{day}", completed(5), now=NOON + 2 * DAY)
        await ledger.reserve(hold_request("today"), now=NOON + 3 * DAY)
        assert await ledger.roll_up(NOON + 3 * DAY) == 4
        await assert_clean(ledger)


async def test_what_no_gateway_wrote_stays_for_the_audit_to_find(path: Path) -> None:
    async with SQLiteLedger(path, durability="OFF") as ledger:
        for name in "ab":
            await ledger.record(cached_record(name, created_at=NOON - DAY))
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE usage SET input_tokens = 'many' WHERE id = 'use_a'")
        assert await ledger.roll_up(NOON) == 1
        (finding,) = await ledger.check()
        assert finding.subject == "use_a"


# -- the audit, and older files ----------------------------------------------------------------------------------------


def first(outcome: str) -> str:
    return f"WHERE seq = (SELECT min(seq) FROM rollups WHERE outcome = '{outcome}')"


CORRUPTIONS = [
    ("a rollup gone", f"DELETE FROM rollups {first('completed')}"),
    ("a rollup of another cost", f"UPDATE rollups SET cost = cost + 1 {first('completed')}"),
    ("a rollup of more records", f"UPDATE rollups SET records = records + 1 {first('released')}"),
    ("a hit that cost", f"UPDATE rollups SET cost = 1 {first('cached')}"),
    ("an unknown outcome", f"UPDATE rollups SET outcome = 'gift' {first('completed')}"),
    ("negative tokens", f"UPDATE rollups SET output_tokens = -1 {first('completed')}"),
    ("no records", f"UPDATE rollups SET records = 0 {first('cached')}"),
    ("tokens that are none", f"UPDATE rollups SET input_tokens = 'abc' {first('cached')}"),
    ("a rollup of a later day", f"UPDATE rollups SET seq = seq + {100 * DAY_STEP} {first('cached')}"),
    ("a day that nobody knows", "DELETE FROM meta WHERE name = 'rolled_up'"),
    ("a day that is none", "UPDATE meta SET value = 'x' WHERE name = 'rolled_up'"),
]  # fmt: skip


@pytest.mark.parametrize("sql", [row[1] for row in CORRUPTIONS], ids=[row[0] for row in CORRUPTIONS])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_audit_finds(path: Path, sql: str) -> None:
    await history(path, days=2)
    async with SQLiteLedger(path, durability="OFF") as ledger:
        await ledger.roll_up(MIDNIGHT)
        await assert_clean(ledger)
        with closing(sqlite3.connect(path)) as connection, connection:
            assert connection.execute(sql).rowcount == 1
        assert await ledger.check() != []


async def test_a_ledger_with_data_of_the_release_before_is_brought_up_to_date(path: Path) -> None:
    await history(path)
    older = path.with_name("older.db")
    with closing(connect(older, durability="OFF", schema=SCHEMA[:2])) as earlier, closing(sqlite3.connect(path)) as file, file:
        (guard,) = earlier.execute("SELECT sql FROM sqlite_schema WHERE name = 'entries_never_change'").fetchone()
        undone = ("DROP TABLE rollups", "DROP INDEX expired_holds", "DROP TRIGGER entries_never_change", guard)
        for statement in (*undone, "DELETE FROM meta WHERE name = 'rolled_up'", "PRAGMA user_version=2"):
            file.execute(statement)
        assert set(tables(file)) == set(tables(earlier))
    async with SQLiteLedger(path, durability="OFF") as ledger:
        await assert_clean(ledger)
        before = await figures(ledger)
        assert await ledger.roll_up(MIDNIGHT) > 0
        assert await figures(ledger) == before
        await assert_clean(ledger)


def tables(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    yield from connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
