"""No statement of a call or of a report reads a table from end to end that grows with use. The statements are those that SQLite was given
while all of it was done, so that none can be forgotten; `WALKS` names those that may, each with its reason."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import anyio
import pytest

from starlette_aigateway.accounts import GROUPINGS, ScopeClaim
from starlette_aigateway.errors import SpendCapHeld
from starlette_aigateway.protocols import Ledger
from starlette_aigateway.stores import sqlite
from starlette_aigateway.stores.sqlite import ledger as ledger_module
from starlette_aigateway.stores.sqlite.ledger_inserts import Insert
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.ledger_kit import DAY, LEASE, NOON, cached_record, completed, hold_request, refused
from starlette_aigateway.testing.ledger_limits import credit
from starlette_aigateway.types import Caps

from .http_host import ALICE, Service, furnish, service

GROWING = (
    "balances", "holds", "entries", "usage", "rollups", "credits", "caps", "keys", "tenants", "prices", "prompts", "labels",
    "admin_actions", "answers", "Cache",
)  # fmt: skip

WALKS = {
    "SELECT provider, model, price FROM prices": "all prices are the answer; they are read once after each change",
    "SELECT key FROM Cache WHERE raw = ?": "the keys of all answers, for the sieve: once when a process opens the cache, on its thread",
    "FROM usage ORDER BY seq DESC LIMIT ?": "the newest page of all: it ends with the page",
    "FROM credits ORDER BY id DESC LIMIT ?": "the newest page of all: it ends with the page",
    "FROM admin_actions WHERE ? ORDER BY id DESC LIMIT ?": "the newest page of all: it ends with the page",
}
"""How a statement ends, its literals as `?`, and why it may read from an end of the table on."""

AUDITS = {"ledger_check", "ledger_check_meta", "ledger_check_records", "ledger_check_rollups", "inspection"}
"""Modules whose statements are the audit's, which reads everything."""

NO_PLAN = ("--", "BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "PRAGMA", "CREATE", "DROP", "ALTER", "EXPLAIN", "ANALYZE", "VACUUM")
PARAMETER = re.compile(r"[?:]\w+")
LITERAL = re.compile(r"\bNULL\b|(?:\bx)?'(?:[^']|'')*'|(?<![\w$])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
VERB = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b")
SPACES = re.compile(r"\s+")


class Statement(NamedTuple):
    """As SQLite carried it out, values and all."""

    path: str
    sql: str


def shape(sql: str) -> str:
    """A statement without its values."""
    return SPACES.sub(" ", LITERAL.sub("?", PARAMETER.sub("?", sql))).strip()


class Recorder:
    """Everything that is asked of any database file, one statement of each shape."""

    def __init__(self) -> None:
        self.seen: dict[str, Statement] = {}
        self.plans: dict[str, list[str]] = {}
        self._connect = sqlite3.connect

    def connect(self, database: Any, *arguments: Any, **more: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = self._connect(database, *arguments, **more)
        connection.set_trace_callback(lambda sql: self.note(str(database), sql))
        return connection

    def note(self, path: str, sql: str) -> None:
        if not sql.lstrip().upper().startswith(NO_PLAN):
            self.seen.setdefault(shape(sql), Statement(path, sql))

    def plan(self) -> None:
        """Asks SQLite, while the files are still there, how it carries each of them out."""
        for name, statement in self.seen.items():
            with closing(self._connect(statement.path)) as connection:
                self.plans[name] = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement.sql}")]


def walked(plan: list[str]) -> list[str]:
    return [step for step in plan if (found := re.match(r"SCAN (\w+)", step)) and found[1] in GROWING]


def written() -> Iterator[tuple[str, set[str]]]:
    """What each statement is called that a module of the stores has a name for, and its shapes, which are several for inserts."""
    for info in pkgutil.iter_modules(sqlite.__path__):
        module = importlib.import_module(f"{sqlite.__name__}.{info.name}")
        for name, value in vars(module).items() if info.name not in AUDITS else ():
            texts = [*value._texts.values()] if isinstance(value, Insert) else [value]
            shapes = {shape(sql) for sql in texts if isinstance(sql, str) and VERB.match(sql) and "{" not in sql}
            if shapes:
                yield f"{info.name}.{name}", shapes


def calls(host: Service, clock: FakeClock) -> None:
    headers = furnish(host)
    for number in range(3):
        again = {"idempotency-key": f"{number}"}
        body = {"model": "echo", "messages": [{"role": "user", "content": f"{number}"}]}
        for more in ({}, {"stream": True}, {"prompt": {"name": "greet"}, "messages": None}):
            given = {name: value for name, value in {**body, **more}.items() if value is not None}
            for who in (headers, ALICE):
                host.call("POST", "/complete", {**who, **again}, json=given)
                host.call("POST", "/complete", who, json=given)
        clock.advance(DAY)


def reports(host: Service) -> None:
    filters = [
        {},
        {"principal": "alice"},
        {"tenant": "acme"},
        {"key": host.key_id},
        {"model": "echo"},
        {"principal": "alice", "model": "echo"},
    ]
    ranges = [{}, {"since": "2026-03-31"}, {"until": "2026-04-30"}, {"since": "2026-03-31", "until": "2026-04-30"}]
    groupings = [{}, *({"group_by": name} for name in GROUPINGS), {"group_by": "day,model"}, {"group_by": "month,principal,outcome"}]
    for asked, between, group_by in product(filters, ranges, groupings):
        host.call("GET", "/usage", params={**asked, **between, **group_by}).raise_for_status()
    cursor = host.call("GET", "/usage", params={"limit": 1}).json()["next_cursor"]
    host.call("GET", "/usage", params={"limit": 1, "cursor": cursor}).raise_for_status()


def lists(host: Service) -> None:
    for path, more in (
        ("/keys", [{}, {"tenant": "acme"}]),
        ("/tenants", [{}]),
        ("/prompts", [{}]),
        ("/credits", [{}, {"tenant": "acme"}, {"principal": "alice"}]),
        (
            "/audit",
            [{}, {"actor": "root"}, {"action": "key.create"}, {"subject": host.key_id}, {"tenant": "acme"}, {"since": "2026-01-01"}],
        ),
        ("/audit", [{"until": "2026-01-01"}, {"actor": "root", "since": "2026-01-01"}, {"since": "2026-01-01", "until": "2027-01-01"}]),
    ):
        for query in more:
            page = host.call("GET", path, params={**query, "limit": 1}).raise_for_status().json()
            if page["next_cursor"]:
                host.call("GET", path, params={**query, "limit": 1, "cursor": page["next_cursor"]}).raise_for_status()


async def ends(ledger: Ledger, now: float) -> None:
    """Of holds, in every way; and of credits."""
    for name in "abcdef":
        await ledger.reserve(hold_request(name, now=now, max_parallel=100, caps=Caps(total=10**5)), now=now)
    await ledger.settle("use_a", completed(90_000), now=now)
    await ledger.settle("use_a", completed(5), now=now)
    await ledger.release("use_b", now=now)
    await ledger.renew("use_c", now + 2 * LEASE, now=now)
    await ledger.expire(now=now + LEASE)
    await ledger.settle("use_d", completed(5), now=now + LEASE)
    await ledger.record(cached_record("hit", created_at=now))
    await ledger.add_credit(credit("short", created_at=now, expires_at=now + LEASE))
    await ledger.end_credit("crd_short", now=now)
    await ledger.probe(hold_request("probe"), now=now)
    carol: dict[str, Any] = {"principal": "carol", "scopes": [ScopeClaim("principal:carol", Caps(total=100))]}
    await ledger.reserve(hold_request("all", 100, now=now, **carol), now=now)
    for _ in range(3):
        assert isinstance(await refused(ledger.reserve(hold_request("none", 1, now=now, **carol), now=now)), SpendCapHeld)
    async with anyio.create_task_group() as group:
        for number in range(70):
            group.start_soon(partial(ledger.reserve, hold_request(f"many_{number}", now=now), now=now))


@pytest.fixture(scope="module")
def asked() -> Recorder:
    """All that was asked of the files by calls, reports, lists and what keeps the files small."""
    recorder, clock = Recorder(), FakeClock(NOON)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sqlite3, "connect", recorder.connect)
        patched.setattr(ledger_module, "AT_ONCE", 2)
        with service(clock=clock) as host:
            calls(host, clock)
            reports(host)
            clock.advance(3 * DAY)
            for name in ("early", "late"):
                anyio.run(host.gateway._ledger.record, cached_record(name, created_at=clock.now - 2 * DAY))
                anyio.run(host.gateway.prune_usage, datetime.fromtimestamp(clock.now - DAY, UTC))
            host.complete(ALICE, "meta/llama")
            host.complete(ALICE)
            anyio.run(ends, host.gateway._ledger, clock.now)
            reports(host)
            lists(host)
            recorder.plan()
    return recorder


def test_no_statement_walks_a_table_that_grows(asked: Recorder) -> None:
    found = {sql: steps for sql, plan in asked.plans.items() if (steps := walked(plan)) and not sql.endswith(tuple(WALKS))}
    assert found == {}
    assert all(any(sql.endswith(end) for sql in asked.plans) for end in WALKS), "one that is gone needs no reason any more"


def test_every_statement_of_the_stores_was_asked(asked: Recorder) -> None:
    assert {name for name, shapes in written() if shapes.isdisjoint(asked.plans)} == set()
