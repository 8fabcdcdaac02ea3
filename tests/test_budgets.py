"""The pure decisions: properties over all balances, caps and requests."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.accounts import HoldRequest, ScopeClaim, Settlement
from starlette_aigateway.errors import AIGatewayError, InvalidArgument, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from starlette_aigateway.policy.budgets import (
    WINDOWS,
    Balance,
    Books,
    Periods,
    check_request,
    check_settlement,
    day_number,
    grant,
    kind_of,
    periods_of,
    resets_at,
)
from starlette_aigateway.testing.ledger_kit import NOON, hold_request
from starlette_aigateway.types import Caps

TODAY = periods_of(day_number(NOON))
SCOPES = ("principal:alice", "tenant:acme", "gateway")

amounts = st.integers(0, 1_000)
caps = st.builds(Caps, *[st.none() | amounts] * 3)
balances = st.builds(Balance, amounts, amounts, st.integers(0, 4))


@st.composite
def requests(draw: st.DrawFn) -> HoldRequest:
    minimum, wanted = sorted((draw(amounts), draw(amounts)))
    claims = [
        ScopeClaim(scope, draw(st.none() | caps), draw(st.none() | st.integers(1, 5)))
        for scope in draw(st.lists(st.sampled_from(SCOPES), min_size=1, unique=True))
    ]
    return hold_request("a", scopes=claims, minimum=minimum, wanted=wanted, admission=draw(st.integers(minimum, 1_000)))


@st.composite
def all_books(draw: st.DrawFn) -> Books:
    books = Books()
    books.balances = {(scope, period): draw(balances) for scope in SCOPES for period in TODAY}
    books.caps = draw(st.dictionaries(st.sampled_from(SCOPES), caps))
    books.next_lease_end = draw(st.none() | st.floats(NOON, NOON + 600))
    return books


def limits(request: HoldRequest, books: Books) -> list[tuple[Balance, int]]:
    """Every balance that has a cap, with the cap."""
    return [
        (books.balances[claim.scope, period], cap)
        for claim in request.scopes
        for period, cap in zip(TODAY, books.caps_of(claim), strict=True)
        if cap is not None
    ]


@pytest.mark.parametrize("window", range(3))
def test_a_cap_is_exact_to_the_last_nano_dollar(window: int) -> None:
    limit = Caps(*[100 if number == window else None for number in range(3)])

    def granted(amount: int) -> int:
        books = Books()
        books.balances = {("principal:alice", period): Balance(30, 20) for period in TODAY}
        claims = [ScopeClaim("principal:alice", limit)]
        return grant(hold_request("a", scopes=claims, minimum=amount, admission=amount, wanted=amount), books, TODAY, NOON)

    assert granted(50) == 50
    with pytest.raises(SpendCapHeld):
        granted(51)


def figures(books: Books) -> list[tuple[int, int, int]]:
    return [(balance.spent, balance.held, balance.open) for balance in books.balances.values()]


@given(requests(), all_books())
def test_a_grant_fits_below_every_cap_and_is_no_less_than_it_can_be(request: HoldRequest, books: Books) -> None:
    before = figures(books)
    try:
        amount = grant(request, books, TODAY, NOON)
    except (SpendCapExceeded, TooManyParallelRequests):
        return
    finally:
        assert figures(books) == before, "deciding changes nothing"
    assert request.minimum <= amount <= request.wanted
    rooms = [cap - balance.spent - balance.held for balance, cap in limits(request, books)]
    assert all(amount <= room for room in rooms)
    assert all(request.admission <= room for room in rooms)
    assert amount == request.wanted or amount in rooms


@given(requests(), all_books())
def test_a_refusal_is_right_and_says_the_truth_about_trying_again(request: HoldRequest, books: Books) -> None:
    full = [(balance, cap) for balance, cap in limits(request, books) if balance.spent + balance.held + request.admission > cap]
    spent_up = any(balance.spent + request.admission > cap for balance, cap in full)
    crowded = any(claim.max_parallel is not None and books.balances[claim.scope, ""].open >= claim.max_parallel for claim in request.scopes)
    error = refusal(request, books)
    if spent_up:
        assert type(error) is SpendCapExceeded
        assert error.retry_after is None
    elif crowded:
        assert isinstance(error, TooManyParallelRequests)
        assert error.limit >= 1
    elif full:
        assert isinstance(error, SpendCapHeld)
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 5
    else:
        assert error is None
    if isinstance(error, SpendCapExceeded):
        assert error.window in WINDOWS
        assert (error.resets_at is None) == (error.window == "total")
        assert (error.scope == "principal") == ("spent_usd" in (error.details or {}))


def refusal(request: HoldRequest, books: Books) -> AIGatewayError | None:
    try:
        grant(request, books, TODAY, NOON)
    except AIGatewayError as error:
        return error
    return None


@given(all_books(), amounts, amounts, amounts)
def test_whatever_happens_to_a_hold_the_books_add_up(books: Books, held: int, booked: int, late: int) -> None:
    before = {key: (balance.spent, balance.held, balance.open) for key, balance in books.balances.items()}
    books.hold(SCOPES, TODAY, held)
    books.resolve(SCOPES, TODAY, held=held, booked=booked)
    books.adjust(SCOPES, TODAY, late - booked)
    for key, (spent, holding, open_holds) in before.items():
        balance = books.balances[key]
        assert (balance.spent, balance.held, balance.open) == (spent + late, holding, open_holds)
    changed = {(scope, period) for scope in SCOPES for period in TODAY} if late else set()
    changes = books.changes()
    assert {(scope, period): added for scope, period, *added in changes} == {pair: [late, 0, 0] for pair in changed}
    assert len(changes) == len(changed)
    assert books.changes() == []


def test_only_the_lifetime_counts_open_holds() -> None:
    books = Books()
    books.hold(("gateway",), TODAY, 5)
    assert {period: balance.open for (_, period), balance in books.balances.items()} == {TODAY.day: 0, TODAY.month: 0, "": 1}


def test_nothing_is_decided_on_a_balance_that_was_not_read() -> None:
    books = Books()
    books.adjust(("principal:alice",), TODAY, 5)
    with pytest.raises(LookupError):
        grant(hold_request("a", caps=Caps(total=100)), books, TODAY, NOON)


@given(st.floats(0, 4e9))
def test_periods_are_the_utc_calendars(now: float) -> None:
    moment = datetime.fromtimestamp(now, UTC)
    periods = periods_of(day_number(now))
    assert periods == (f"{moment:%Y-%m-%d}", f"{moment:%Y-%m}", "")
    day_end, month_end = resets_at("day", periods), resets_at("month", periods)
    assert day_end is not None
    assert month_end is not None
    assert 0 < day_end.timestamp() - moment.timestamp() <= 86_400
    assert month_end.day == 1
    assert month_end >= day_end
    assert (month_end.month - moment.month) % 12 == 1


def test_a_leap_day_and_a_year_have_their_ends() -> None:
    assert resets_at("month", Periods("2028-02-29", "2028-02")) == datetime(2028, 3, 1, tzinfo=UTC)
    assert resets_at("day", Periods("2026-12-31", "2026-12")) == datetime(2027, 1, 1, tzinfo=UTC)
    assert resets_at("total", Periods("2026-12-31", "2026-12")) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"minimum": -1},
        {"minimum": 101},
        {"wanted": 10**16, "admission": 10**16},
        {"admission": 99},
        {"admission": 10**16},
        {"scopes": ()},
        {"scopes": (ScopeClaim("gateway"), ScopeClaim("gateway"))},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        check_request(hold_request("a", 100, **fields))


def test_a_settlement_books_no_negative_amount() -> None:
    with pytest.raises(InvalidArgument):
        check_settlement(Settlement(outcome="completed", amount=-1))


def test_the_kind_of_a_scope_is_what_it_begins_with() -> None:
    assert [kind_of(scope) for scope in ("principal:a:b", "tenant:x", "gateway")] == ["principal", "tenant", "gateway"]
