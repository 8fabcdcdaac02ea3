"""What a cap means: periods, balances, and the decision whether a hold fits. Pure; amounts are nano-USD.

A hold of `amount` counts as *held* in the day, the month and the lifetime of each of its scopes until it is resolved; then what is
booked counts as *spent* in the same periods. A grant keeps `spent + held <= cap` in each of them (invariant I1).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

from .. import money
from ..accounts import Credit, HoldRequest, ScopeClaim, Settlement, Window
from ..errors import CostUnbounded, InvalidArgument, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from ..types import NO_CAPS, Caps

SECONDS_PER_DAY = 86_400
EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
THRESHOLDS = (80, 100)
"""Percents of a cap that are told when spending reaches them, where the host says nothing else."""
WINDOWS: tuple[Window, ...] = ("day", "month", "total")
MAX_AMOUNT = 10**15
"""A million US dollars for one attempt, or one credit; far below it lie all real ones, and sums of it stay within SQLite's 64 bits."""
END_OF_TIME = 8e9
"""Unix seconds, in the year 2223. Any present time in milliseconds is above it."""
LONGEST_RETRY = 5.0
SHORTEST_RETRY = 0.5
PARALLEL_RETRY = 1.0


class Periods(NamedTuple):
    """The names of the UTC calendar periods that a moment lies in: `2026-01-31`, `2026-01` and the lifetime, which is empty."""

    day: str
    month: str
    total: str = ""


def day_number(now: float) -> int:
    """Whole UTC days since 1970-01-01 of Unix seconds."""
    return int(now // SECONDS_PER_DAY)


def periods_of(day: int) -> Periods:
    text = date.fromordinal(EPOCH_ORDINAL + day).isoformat()
    return Periods(text, text[:7])


def day_from(name: str) -> int:
    """The `day_number` of a day as `Periods.day` names it."""
    return date.fromisoformat(name).toordinal() - EPOCH_ORDINAL


def periods_from(day: str) -> Periods:
    """The periods of a day as `Periods.day` names it."""
    return Periods(day, day[:7])


def resets_at(window: Window, periods: Periods) -> datetime | None:
    """When the period ends; None for a lifetime."""
    day = date.fromisoformat(periods.day)
    if window == "day":
        end = day + timedelta(days=1)
    elif window == "month":
        end = (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    else:
        return None
    return datetime.combine(end, time(), UTC)


class Balance:
    """One scope in one period, as it will be. `open` is the number of open holds, in the lifetime only. `told` is the highest threshold in
    percent that was told. `known` is false where it was not read."""

    __slots__ = ("held", "known", "open", "spent", "told")

    def __init__(self, spent: int = 0, held: int = 0, open_holds: int = 0, told: int = 0, *, known: bool = True) -> None:
        self.spent = spent
        self.held = held
        self.open = open_holds
        self.told = told
        self.known = known


class Group:
    """The balances of some scopes in some periods, those of them in their lifetimes, and what was added to each of them."""

    __slots__ = ("changed", "everywhere", "held", "lifetimes", "open", "pairs", "spent")

    def __init__(self, pairs: list[tuple[str, str]], everywhere: list[Balance], lifetimes: list[Balance]) -> None:
        self.pairs = pairs
        self.everywhere = everywhere
        self.lifetimes = lifetimes
        self.spent = self.held = self.open = 0
        self.changed = False

    def add(self, spent: int, held: int, opened: int) -> None:
        self.spent += spent
        self.held += held
        self.open += opened
        for balance in self.everywhere:
            balance.spent += spent
            balance.held += held
        for balance in self.lifetimes:
            balance.open += opened

    def take(self) -> tuple[int, int, int]:
        """What was added since this was last asked."""
        added = self.spent, self.held, self.open
        self.spent = self.held = self.open = 0
        self.changed = False
        return added


class Books:
    """The balances and stored caps that a batch of decisions works on. All that is known is put in before the first decision."""

    def __init__(self) -> None:
        self.balances: dict[tuple[str, str], Balance] = {}
        self.caps: dict[str, Caps] = {}
        self.credits: dict[str, int] = {}
        self.next_lease_end: float | None = None
        self._groups: dict[tuple[tuple[str, ...], Periods], Group] = {}
        self._changed: list[Group] = []
        self._unknown: list[tuple[str, str]] = []

    def known(self, scope: str, period: str) -> Balance:
        """A balance to decide on. Raises `LookupError` where it was not read: a decision on it would be a guess."""
        balance = self.balances[scope, period]
        if not balance.known:
            raise LookupError(f"the balance of {scope} in {period!r} was not read")
        return balance

    def caps_of(self, claim: ScopeClaim) -> Caps:
        return self.caps.get(claim.scope, NO_CAPS) if claim.caps is None else claim.caps

    def raised_caps(self, claim: ScopeClaim) -> Caps:
        """The caps that hold now: what running credits add to them included."""
        return raised(self.caps_of(claim), self.credits.get(claim.scope, 0))

    def hold(self, scopes: tuple[str, ...], periods: Periods, amount: int) -> None:
        self._touched(scopes, periods).add(0, amount, 1)

    def resolve(self, scopes: tuple[str, ...], periods: Periods, *, held: int, booked: int) -> None:
        self._touched(scopes, periods).add(booked, -held, -1)

    def adjust(self, scopes: tuple[str, ...], periods: Periods, difference: int) -> None:
        self._touched(scopes, periods).add(difference, 0, 0)

    def changes(self) -> list[tuple[str, str, int, int, int]]:
        """Scope, period, and what was added to `spent`, `held` and `open` since this was last asked. What was not read is forgotten."""
        totals: dict[tuple[str, str], tuple[int, int, int]] = {}
        for group in self._changed:
            spent, held, opened = group.take()
            for pair in group.pairs:
                so_far = totals.get(pair, UNCHANGED)
                totals[pair] = so_far[0] + spent, so_far[1] + held, so_far[2] + (0 if pair[1] else opened)
        self._changed = []
        if self._unknown:
            self._forget_unknown()
        return [(*pair, *total) for pair, total in totals.items() if total != UNCHANGED]

    def _forget_unknown(self) -> None:
        for pair in self._unknown:
            del self.balances[pair]
        self._unknown = []
        self._groups = {}

    def _touched(self, scopes: tuple[str, ...], periods: Periods) -> Group:
        """A group that is about to change. There are few of them: most holds are of the same scopes."""
        group = self._groups.get((scopes, periods)) or self._grouped(scopes, periods)
        if not group.changed:
            group.changed = True
            self._changed.append(group)
        return group

    def _grouped(self, scopes: tuple[str, ...], periods: Periods) -> Group:
        everywhere = [self._changeable(scope, period) for scope in scopes for period in periods]
        pairs = [(scope, period) for scope in scopes for period in periods]
        group = self._groups[scopes, periods] = Group(pairs, everywhere, [self.balances[scope, ""] for scope in scopes])
        return group

    def _changeable(self, scope: str, period: str) -> Balance:
        balance = self.balances.get((scope, period))
        if balance is None:
            balance = self.balances[scope, period] = Balance(known=False)
            self._unknown.append((scope, period))
        return balance


UNCHANGED = (0, 0, 0)


def raised(caps: Caps, credit: int) -> Caps:
    """`caps` with `credit` added to each that is one."""
    if not credit:
        return caps
    return Caps(*[None if cap is None else cap + credit for cap in caps])


def check_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    """Percents of a cap, in ascending order. Raises `InvalidArgument`, naming `budget_thresholds`."""
    for value in thresholds:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
            raise InvalidArgument("budget_thresholds must be whole percents of a cap, such as (80, 100)", param="budget_thresholds")
    return tuple(sorted(set(thresholds)))


def thresholds_reached(spent: int, cap: int, thresholds: Sequence[int], told: int) -> list[int]:
    """Which of the `thresholds` (percent, ascending) `spent` has reached of `cap` and nobody was told yet. A cap of nothing has none."""
    return [threshold for threshold in thresholds if threshold > told and spent * 100 >= threshold * cap > 0]


class Refusal(NamedTuple):
    """One window that a hold does not fit in."""

    scope: str
    window: Window
    cap: int
    spent: int
    held: int

    def final(self, required: int) -> bool:
        """Whether it would not fit either if nothing were held."""
        return self.spent + required > self.cap


def check_request(request: HoldRequest) -> None:
    """Raises `InvalidArgument` for a hold that no ledger could keep."""
    if not 0 <= request.minimum <= request.wanted <= MAX_AMOUNT:
        raise InvalidArgument(f"a hold needs 0 <= minimum <= wanted <= {MAX_AMOUNT} nano-USD", param="wanted")
    if not request.minimum <= request.admission <= MAX_AMOUNT:
        raise InvalidArgument(f"a hold needs minimum <= admission <= {MAX_AMOUNT} nano-USD", param="admission")
    if not request.scopes or len({claim.scope for claim in request.scopes}) != len(request.scopes):
        raise InvalidArgument("a hold needs one or more different scopes", param="scopes")
    check_moment(request.expires_at, "expires_at")


def check_moment(moment: float, name: str) -> None:
    """Raises `InvalidArgument` for what is not a time in Unix seconds: NaN, infinity, milliseconds. The latest day is kept for good, so
    that a wrong one would end all daily and monthly budgets."""
    if not 0 <= moment < END_OF_TIME:
        raise InvalidArgument(f"{name} must be a moment in Unix seconds before the year 2223", param=name)


def check_credit(credit: Credit) -> None:
    """Raises `InvalidArgument` for a credit that no ledger could keep."""
    if not 1 <= credit.amount <= MAX_AMOUNT:
        raise InvalidArgument(f"a credit is between 1 and {MAX_AMOUNT} nano-USD", param="amount")
    check_moment(credit.created_at, "created_at")
    check_moment(credit.expires_at, "expires_at")


def check_settlement(settlement: Settlement) -> None:
    """Raises `InvalidArgument` for an amount that no ledger could book."""
    if not 0 <= settlement.amount <= MAX_AMOUNT:
        raise InvalidArgument(f"a settlement books between 0 and {MAX_AMOUNT} nano-USD", param="amount")


def grant(request: HoldRequest, books: Books, periods: Periods, now: float) -> int:
    """How much `request` gets under the caps of its scopes that hold now; it changes nothing.

    `admission` has to fit below every cap of every scope; then the grant is what is wanted, as far as the
    tightest cap affords. Raises `SpendCapExceeded` where a cap refuses for good, else `TooManyParallelRequests`, else `SpendCapHeld`;
    `CostUnbounded` where there is a cap and the attempt is not bounded.
    """
    refusals: list[Refusal] = []
    amount = request.wanted
    for claim in request.scopes:
        caps = books.raised_caps(claim)
        if caps is NO_CAPS:
            continue
        if not request.bounded and caps != NO_CAPS:
            raise CostUnbounded(
                f"{OWNER.get(kind_of(claim.scope), claim.scope)} has a spend cap that this call was not bounded for; try again"
            )
        for window, period, cap in zip(WINDOWS, periods, caps, strict=True):
            if cap is None:
                continue
            balance = books.known(claim.scope, period)
            room = cap - balance.spent - balance.held
            if request.admission > room:
                refusals.append(Refusal(claim.scope, window, cap, balance.spent, balance.held))
            elif room < amount:
                amount = room
    if refusals:
        final = [refusal for refusal in refusals if refusal.final(request.admission)]
        if final:
            raise exceeded(max(final, key=_lasting), request.admission, periods)
    check_parallel(request.scopes, books)
    if refusals:
        raise still_held(max(refusals, key=_lasting), request.admission, periods, books.next_lease_end, now)
    return amount


def check_parallel(claims: Sequence[ScopeClaim], books: Books) -> None:
    for claim in claims:
        if claim.max_parallel is not None and books.known(claim.scope, "").open >= claim.max_parallel:
            kind = kind_of(claim.scope)
            raise TooManyParallelRequests(
                f"{OWNER.get(kind, kind)} may run {claim.max_parallel} calls at the same time; try again when one has ended",
                retry_after=PARALLEL_RETRY,
                scope=kind,
                window="parallel",
                limit=claim.max_parallel,
            )


OWNER = {"principal": "this account", "tenant": "this tenant", "gateway": "this gateway"}
WINDOW_NAME = {"day": "daily", "month": "monthly", "total": "lifetime"}


def kind_of(scope: str) -> str:
    """`principal`, `tenant` or `gateway`; whatever stands before the colon."""
    return scope.partition(":")[0]


def exceeded(refusal: Refusal, required: int, periods: Periods) -> SpendCapExceeded:
    kind = kind_of(refusal.scope)
    end = resets_at(refusal.window, periods)
    state = "is reached" if refusal.spent >= refusal.cap else "leaves too little for this call"
    message = f"the {WINDOW_NAME[refusal.window]} spend cap of {OWNER.get(kind, kind)} {state}{_figures(kind, refusal, required)}"
    if end is not None:
        message += f"; the next period begins at {end:%Y-%m-%d %H:%M} UTC"
    return SpendCapExceeded(message, scope=kind, window=refusal.window, resets_at=end, details=_details(kind, refusal, required))


def still_held(refusal: Refusal, required: int, periods: Periods, next_lease_end: float | None, now: float) -> SpendCapHeld:
    kind = kind_of(refusal.scope)
    wait = LONGEST_RETRY if next_lease_end is None else next_lease_end - now
    return SpendCapHeld(
        f"the {WINDOW_NAME[refusal.window]} spend cap of {OWNER.get(kind, kind)} is held by calls that are still running"
        f"{_figures(kind, refusal, required)}; try again when one has ended",
        scope=kind,
        window=refusal.window,
        resets_at=resets_at(refusal.window, periods),
        retry_after=min(LONGEST_RETRY, max(SHORTEST_RETRY, wait)),
        details=_details(kind, refusal, required),
    )


def _lasting(refusal: Refusal) -> int:
    """The longest window says the most about when a retry makes sense; `max` keeps the first scope of equals."""
    return WINDOWS.index(refusal.window)


def _usd(amount: int) -> str:
    return money.text(money.dollars(amount)) or "0"


def _figures(kind: str, refusal: Refusal, required: int) -> str:
    if kind != "principal":
        return ""
    return (
        f": {_usd(refusal.spent)} USD spent and {_usd(refusal.held)} USD held of {_usd(refusal.cap)} USD,"
        f" and this call may cost {_usd(required)} USD"
    )


def _details(kind: str, refusal: Refusal, required: int) -> dict[str, str]:
    """Amounts of the caller's own scope only: those of a tenant or of the gateway would tell what others spend."""
    if kind != "principal":
        return {}
    return {
        "cap_usd": _usd(refusal.cap),
        "spent_usd": _usd(refusal.spent),
        "held_usd": _usd(refusal.held),
        "required_usd": _usd(required),
    }
