"""The SQLite ledger against a naive model that recomputes every figure from a list of holds; Hypothesis makes up the history."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from starlette_aigateway.accounts import GATEWAY_SCOPE, HoldRequest, ScopeClaim, UsageQuery
from starlette_aigateway.errors import AIGatewayError, SpendCapExceeded, SpendCapHeld, TooManyParallelRequests
from starlette_aigateway.events import BudgetReached
from starlette_aigateway.policy.budgets import THRESHOLDS, Periods, day_number, periods_of
from starlette_aigateway.stores.sqlite.ledger import SQLiteLedger
from starlette_aigateway.testing.ledger_kit import ACME, NOON, completed, hold_request
from starlette_aigateway.testing.ledger_limits import credit
from starlette_aigateway.types import NO_CAPS, Caps

PRINCIPALS = ("principal:alice", "principal:bob")
SCOPES = (*PRINCIPALS, ACME, GATEWAY_SCOPE)
amounts = st.integers(0, 120)
all_caps = st.builds(Caps, *[st.none() | st.integers(0, 400)] * 3)
names = st.integers(0, 40)


@dataclass
class Held:
    request: HoldRequest
    amount: int
    day: int
    expires_at: float
    caps: tuple[Caps, ...]
    state: str = "open"
    booked: int = 0

    @property
    def periods(self) -> Periods:
        return periods_of(self.day)

    def counts_in(self, scope: str, period: str) -> bool:
        return period in self.periods and any(claim.scope == scope for claim in self.request.scopes)


@dataclass
class Given:
    """A credit; `counts` until somebody saw or made it end."""

    scope: str
    amount: int
    expires_at: float
    counts: bool = True


class Model:
    def __init__(self) -> None:
        self.holds: dict[str, Held] = {}
        self.forgotten: list[Held] = []
        self.caps: dict[str, Caps] = {}
        self.credits: dict[str, Given] = {}
        self.latest_day = 0

    def spent(self, scope: str, period: str) -> int:
        return sum(hold.booked for hold in [*self.holds.values(), *self.forgotten] if hold.counts_in(scope, period))

    def held(self, scope: str, period: str) -> int:
        return sum(hold.amount for hold in self.holds.values() if hold.state == "open" and hold.counts_in(scope, period))

    def open(self, scope: str) -> int:
        return sum(hold.state == "open" and hold.counts_in(scope, "") for hold in self.holds.values())

    def forget(self, known: set[str], today: int) -> None:
        """All but the `known` were rolled up: they stay spent, and their names may be given again."""
        for name in {name for name, hold in self.holds.items() if hold.state != "open"} - known:
            hold = self.holds.pop(name)
            assert (hold.state, hold.day < today) == ("resolved", True)
            self.forgotten.append(hold)

    def expire(self, now: float, *, but: set[str]) -> set[str]:
        due = {name for name, hold in self.holds.items() if hold.state == "open" and hold.expires_at <= now} - but
        for name in due:
            self.holds[name].state, self.holds[name].booked = "expired", self.holds[name].amount
        return due

    def resolve(self, name: str, amount: int) -> bool:
        hold = self.holds.get(name)
        if hold is None or hold.state == "resolved":
            return False
        hold.state, hold.booked = "resolved", amount
        return True

    def reserve(self, request: HoldRequest, now: float) -> int | type[AIGatewayError]:
        self.expire(now, but={request.replaces or ""})
        if request.id in self.holds:
            return self.holds[request.id].amount
        if request.replaces is not None:
            self.resolve(request.replaces, 0)
        day = max(self.latest_day, day_number(now))
        self.lapse({claim.scope for claim in request.scopes}, now)
        verdict = self.verdict(request, periods_of(day))
        self.latest_day = day  # seen is seen, also by a request that is refused
        if not request.enforce:
            verdict = request.wanted
        if isinstance(verdict, int):
            caps = tuple(self.caps_of(claim) for claim in request.scopes)
            self.holds[request.id] = Held(request, verdict, day, request.expires_at, caps)
        return verdict

    def lapse(self, scopes: set[str], now: float) -> None:
        for given in self.credits.values():
            if given.scope in scopes and given.expires_at <= now:
                given.counts = False

    def credit(self, scope: str, now: float = -1.0) -> int:
        return sum(given.amount for given in self.credits.values() if given.scope == scope and given.counts and given.expires_at > now)

    def caps_of(self, claim: ScopeClaim) -> Caps:
        caps = self.caps.get(claim.scope, NO_CAPS) if claim.caps is None else claim.caps
        return Caps(*[None if cap is None else cap + self.credit(claim.scope) for cap in caps])

    def verdict(self, request: HoldRequest, periods: Periods) -> int | type[AIGatewayError]:
        rooms, final, held = [request.wanted], False, False
        for claim in request.scopes:
            for period, cap in zip(periods, self.caps_of(claim), strict=True):
                if cap is not None:
                    spent = self.spent(claim.scope, period)
                    room = cap - spent - self.held(claim.scope, period)
                    rooms.append(room)
                    held |= room < request.admission
                    final |= spent + request.admission > cap
        if final:
            return SpendCapExceeded
        if any(claim.max_parallel is not None and self.open(claim.scope) >= claim.max_parallel for claim in request.scopes):
            return TooManyParallelRequests
        return SpendCapHeld if held else min(rooms)


class LedgerMachine(RuleBasedStateMachine):
    """Names are drawn from a small range, so that most operations meet a hold that others met before."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.portal: BlockingPortal = self.stack.enter_context(start_blocking_portal())
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.model = Model()
        self.now = NOON
        self.told: set[tuple[str, str, int]] = set()
        self.heard: list[BudgetReached] = []

    @initialize()
    def open(self) -> None:
        self.ledgers = [SQLiteLedger(self.directory / "ledger.db", durability="OFF") for _ in range(2)]
        for ledger in self.ledgers:
            self.stack.enter_context(self.portal.wrap_async_context_manager(ledger))
            ledger.listen(self.hear)

    def hear(self, reached: BudgetReached) -> None:
        """Each threshold once, and never an untrue one."""
        threshold = reached.scope, reached.period, reached.threshold
        assert threshold not in self.told
        self.told.add(threshold)
        self.heard.append(reached)

    def check_told(self, scopes: Sequence[str], caps: Sequence[Caps], periods: Periods) -> None:
        """What was heard is true, and nothing that these caps have reached was kept back."""
        for reached in self.heard:
            assert reached.spent == self.model.spent(reached.scope, reached.period)
            assert reached.spent * 100 >= reached.threshold * reached.cap > 0
        self.heard.clear()
        for scope, cap_of in zip(scopes, caps, strict=True):
            for period, cap in zip(periods, cap_of, strict=True):
                for threshold in THRESHOLDS:
                    if cap and self.model.spent(scope, period) * 100 >= threshold * cap:
                        highest = max((told for at, when, told in self.told if (at, when) == (scope, period)), default=0)
                        assert highest >= threshold

    def teardown(self) -> None:
        self.stack.close()

    @rule(
        name=names,
        which=st.integers(0, 1),
        claims=st.tuples(all_caps | st.none(), st.none() | st.integers(1, 4), st.none() | all_caps, st.sampled_from(PRINCIPALS)),
        money=st.tuples(amounts, amounts, amounts).map(sorted),
        lease=st.floats(0, 100_000),
        replaces=st.none() | names,
        enforce=st.sampled_from((True, True, True, False)),
    )
    def reserve(
        self,
        name: int,
        which: int,
        claims: tuple[Caps | None, int | None, Caps | None, str],
        money: list[int],
        lease: float,
        replaces: int | None,
        enforce: bool,
    ) -> None:
        caps, max_parallel, shared, principal = claims
        request = hold_request(
            str(name),
            minimum=money[0],
            admission=money[1],
            wanted=money[2],
            scopes=(ScopeClaim(principal, caps, max_parallel), ScopeClaim(ACME), ScopeClaim(GATEWAY_SCOPE, shared)),
            principal=principal.removeprefix("principal:"),
            expires_at=self.now + lease,
            replaces=None if replaces in (None, name) else f"use_{replaces}",
            enforce=enforce,
        )
        is_new = request.id not in self.model.holds
        expected = self.model.reserve(request, self.now)
        try:
            got: int | type[AIGatewayError] = self.portal.call(partial(self.ledgers[which].reserve, request, now=self.now)).amount
        except AIGatewayError as error:
            got = type(error)
        assert got == expected
        claimed = request.scopes if is_new else ()
        seen = [self.model.caps_of(claim) for claim in claimed]
        self.check_told([claim.scope for claim in claimed], seen, periods_of(self.model.latest_day))

    @rule(name=names, which=st.integers(0, 1), amount=amounts)
    def settle(self, name: int, which: int, amount: int) -> None:
        known, was = f"use_{name}" in self.model.holds, self.model.holds.get(f"use_{name}")
        late = was is not None and was.state == "expired"
        changed = self.model.resolve(f"use_{name}", amount)
        record = self.portal.call(partial(self.ledgers[which].settle, f"use_{name}", completed(amount), now=self.now))
        assert (record is not None) == known
        if record is not None and was is not None and changed:
            assert record.cost == (amount - was.amount if late else amount)
            self.check_told([claim.scope for claim in was.request.scopes], was.caps, was.periods)

    @rule(name=names, which=st.integers(0, 1))
    def release(self, name: int, which: int) -> None:
        self.model.resolve(f"use_{name}", 0)
        self.portal.call(partial(self.ledgers[which].release, f"use_{name}", now=self.now))
        self.check_told([], [], periods_of(self.model.latest_day))

    @rule(name=names, lease=st.floats(0, 100_000))
    def renew(self, name: int, lease: float) -> None:
        hold = self.model.holds.get(f"use_{name}")
        is_open = hold is not None and hold.state == "open"
        if hold is not None and is_open:
            hold.expires_at = self.now + lease
        assert self.portal.call(partial(self.ledgers[0].renew, f"use_{name}", self.now + lease, now=self.now)) == is_open

    @rule()
    def expire(self) -> None:
        due = self.model.expire(self.now, but=set())
        assert {record.id for record in self.portal.call(partial(self.ledgers[0].expire, now=self.now))} == due
        self.check_told([], [], periods_of(self.model.latest_day))

    @rule(scope=st.sampled_from((ACME, GATEWAY_SCOPE)), caps=all_caps)
    def set_caps(self, scope: str, caps: Caps) -> None:
        self.model.caps[scope] = caps
        self.portal.call(self.ledgers[1].set_caps, scope, caps)

    @rule(name=names, scope=st.sampled_from(SCOPES), amount=st.integers(1, 200), lasts=st.floats(1, 100_000), which=st.integers(0, 1))
    def add_credit(self, name: int, scope: str, amount: int, lasts: float, which: int) -> None:
        given = credit(str(name), amount, scope=scope, created_at=self.now, expires_at=self.now + lasts)
        self.model.credits.setdefault(given.id, Given(scope, amount, given.expires_at))
        stored = self.portal.call(self.ledgers[which].add_credit, given)
        assert (stored.scope, stored.amount) == (self.model.credits[given.id].scope, self.model.credits[given.id].amount)

    @rule(name=names, which=st.integers(0, 1))
    def end_credit(self, name: int, which: int) -> None:
        known = self.model.credits.get(f"crd_{name}")
        ended = self.portal.call(partial(self.ledgers[which].end_credit, f"crd_{name}", now=self.now))
        assert (ended is None) == (known is None)
        if known is not None:
            known.counts = False

    @rule(age=st.floats(0, 200_000), which=st.integers(0, 1))
    def prune(self, age: float, which: int) -> None:
        self.portal.call(self.ledgers[which].prune, self.now - age)

    @rule(age=st.floats(0, 200_000), which=st.integers(0, 1))
    def roll_up(self, age: float, which: int) -> None:
        before = self.now - age
        self.portal.call(self.ledgers[which].roll_up, before)
        report = self.portal.call(self.ledgers[1 - which].usage, UsageQuery(limit=1000))
        self.model.forget({record.id for record in report.data}, day_number(before))
        assert report.totals.cost == sum(hold.booked for hold in [*self.model.holds.values(), *self.model.forgotten])

    @rule(step=st.floats(-90_000, 90_000))
    def step_the_clock(self, step: float) -> None:
        self.now = min(max(self.now + step, NOON - 200_000), NOON + 400_000)

    @invariant()
    def the_budgets_are_the_models(self) -> None:
        if not hasattr(self, "ledgers"):
            return
        for budget in self.portal.call(partial(self.ledgers[0].budgets, dict.fromkeys(SCOPES), now=self.now)):
            assert budget.period in periods_of(max(self.model.latest_day, day_number(self.now)))
            assert (budget.spent, budget.held) == (
                self.model.spent(budget.scope, budget.period),
                self.model.held(budget.scope, budget.period),
            )

    @invariant()
    def credits_are_the_models(self) -> None:
        if hasattr(self, "ledgers"):
            for budget in self.portal.call(partial(self.ledgers[1].budgets, dict.fromkeys(SCOPES, Caps(total=1)), now=self.now)):
                if budget.window == "total":
                    assert budget.credit == self.model.credit(budget.scope, self.now)

    @invariant()
    def the_audit_finds_nothing(self) -> None:
        if hasattr(self, "ledgers"):
            assert self.portal.call(self.ledgers[0].check) == []


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=settings().max_examples // 5, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
