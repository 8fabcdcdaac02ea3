"""What is remembered of claims that come again decides as the rules do, and is forgotten with every cap and credit that changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from starlette_aigateway.accounts import ScopeClaim
from starlette_aigateway.errors import RequestError, SpendCapExceeded
from starlette_aigateway.policy.budgets import Balance, Books, Periods, grant
from starlette_aigateway.stores.sqlite import ledger_memory
from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.stores.sqlite.ledger_ops import AddCredit, EndCredit, Op
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA, Prices
from starlette_aigateway.stores.sqlite.ledger_terms import Terms
from starlette_aigateway.stores.sqlite.ledger_writer import BatchWriter
from starlette_aigateway.testing.ledger_kit import ACME, ALICE, NOON, assert_clean, hold_request
from starlette_aigateway.testing.ledger_limits import credit
from starlette_aigateway.types import NO_CAPS, Caps

PERIODS = Periods("2026-03-31", "2026-03")
SCOPES = ("a", "b")

amounts = st.integers(0, 12)
caps = st.one_of(st.just(NO_CAPS), st.builds(Caps, *[st.none() | amounts] * 3))
claims = st.tuples(*[st.builds(ScopeClaim, st.just(scope), st.none() | caps, st.none() | st.integers(1, 3)) for scope in SCOPES])


@st.composite
def books(draw: st.DrawFn) -> Books:
    made = Books()
    for scope in SCOPES:
        made.caps[scope] = draw(caps)
        made.credits[scope] = draw(st.sampled_from([0, 0, 3]))
        for period in PERIODS:
            made.balances[scope, period] = Balance(draw(amounts), draw(amounts), draw(st.integers(0, 3)))
    return made


@given(claims, books(), st.lists(amounts, min_size=3, max_size=3).map(sorted), st.booleans())
def test_what_is_afforded_is_what_the_rules_grant(asked: tuple[ScopeClaim, ...], kept: Books, three: list[int], bounded: bool) -> None:
    minimum, admission, wanted = three
    request = hold_request("a", scopes=asked, minimum=minimum, admission=admission, wanted=wanted, bounded=bounded)
    terms = Terms(asked, kept, ())
    for _ in range(2):
        try:
            granted: int | None = grant(request, kept, PERIODS, NOON)
        except RequestError:
            granted = None
        assert terms.afforded(request, kept, PERIODS) == granted
        kept.hold(terms.names, PERIODS, wanted)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[SQLiteLedger]:
    async with SQLiteLedger(tmp_path / "ledger.db", durability="OFF") as ledger:
        yield ledger


@pytest.mark.anyio
async def test_claims_that_come_again_meet_every_cap_and_credit_that_was_changed_meanwhile(ledger: SQLiteLedger) -> None:
    scopes = (ScopeClaim(ALICE, Caps(total=100)), ScopeClaim(ACME))
    names = iter(range(100))

    async def granted(now: float = NOON) -> bool:
        request = hold_request(str(next(names)), 60, now=now, scopes=scopes)
        assert request.scopes is scopes
        try:
            hold = await ledger.reserve(request, now=now)
        except SpendCapExceeded:
            return False
        await ledger.release(hold.id, now=now)
        return True

    assert await granted()
    await ledger.set_caps(ACME, Caps(day=50))
    assert not await granted()
    await ledger.set_caps(ACME, Caps(day=70))
    assert await granted()
    await ledger.set_caps(ACME, Caps(day=0))
    assert not await granted()
    await ledger.add_credit(credit("c", 60, scope=ACME))
    assert await granted()
    await ledger.end_credit("crd_c", now=NOON)
    assert not await granted()
    await ledger.add_credit(credit("short", 60, scope=ACME))
    assert await granted(NOON + 3599)
    assert not await granted(NOON + 3600), "it has lapsed"
    await assert_clean(ledger)


def test_terms_are_kept_of_so_many_claims_and_right_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_memory, "MOST_TERMS", 2)
    memory = ledger_memory.Memory()
    many = [(ScopeClaim(f"principal:{number}", Caps(total=number)),) for number in range(5)]
    for _ in range(2):
        for claims in many:
            assert memory.terms_of(claims).caps == (claims[0].caps,)
            assert memory.terms_of(claims) is memory.terms_of(claims)
            assert len(memory._terms) <= 2


def test_a_credit_that_is_ended_twice_in_one_batch_ends_once(tmp_path: Path) -> None:
    with closing(connect(tmp_path / "ledger.db", durability="OFF", schema=SCHEMA)) as connection:
        one = credit("c", 60)
        ops: list[Op] = [AddCredit(one), EndCredit(one.id, NOON), EndCredit(one.id, NOON + 1)]
        added, first, second = BatchWriter(Prices()).apply(connection, ops)
        assert added == one
        assert first == second == replace(one, ended_at=NOON)
        amounts = [amount for (amount,) in connection.execute("SELECT amount FROM entries WHERE hold = ?", (one.id,))]
    assert amounts == [60, -60]
