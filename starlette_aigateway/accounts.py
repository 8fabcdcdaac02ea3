"""What the ledger speaks: scopes, holds, settlements, records, budgets, reports. Amounts are nano-USD unless a name says `usd`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from msgspec import Struct

from . import money
from .types import Caps, Price, Usage

GATEWAY_SCOPE = "gateway"

Window = Literal["day", "month", "total"]
Outcome = Literal["completed", "estimated", "ambiguous", "overrun", "expired", "cached", "released", "adjusted"]
"""How an attempt was booked (design, section 4):

- `completed`: usage was reported and fits the hold; `overrun`: it was reported and is above the hold, booked in full;
- `estimated`: no usage was reported, or the client left and the drain reached its bounds;
- `ambiguous`: sent, and nothing is known: the full hold; `expired`: the process died, the lease ran out: the full hold;
- `cached`: a cache hit or a joined flight, cost 0; `released`: never sent, or an error came back unbilled, cost 0;
- `adjusted`: the difference that a late settlement of an expired hold makes, negative as a rule.
"""


def principal_scope(principal_id: str) -> str:
    return f"principal:{principal_id}"


def tenant_scope(tenant_id: str) -> str:
    return f"tenant:{tenant_id}"


class ScopeClaim(Struct, frozen=True, gc=False):
    """One scope that a hold counts in. `caps` of None: the caps stored with `Ledger.set_caps` hold. `max_parallel` counts open holds."""

    scope: str
    caps: Caps | None = None
    max_parallel: int | None = None


class HoldRequest(Struct, frozen=True, gc=False):
    """One attempt that asks for money.

    The hold is granted between `minimum` and `wanted`, as far as the tightest cap of all `scopes` affords, and only if `admission`
    (the least that the dearest planned target needs, at least `minimum`) fits as well. `id` is minted by the gateway for this
    attempt and becomes the usage record's. `price` is the snapshot that the settlement uses. `expires_at` is the end of the lease
    (Unix seconds). `replaces` names an open hold of the same call that is released in the same transaction, before the check. Without
    `enforce` the hold is granted as `wanted` also where a limit would refuse it, and says so in `would_refuse`; what is given there is
    the code of a refusal that the call has passed over already. What is not `bounded` may cost more than it holds: any cap refuses it.
    """

    # Not `kw_only`: with more than fifteen keywords a call of Python's goes by way of a dict, at four times the cost.
    id: str
    request_id: str
    attempt: int
    scopes: tuple[ScopeClaim, ...]
    principal: str
    tenant: str | None
    key_id: str | None
    provider: str
    model: str
    price: Price | None
    minimum: int
    wanted: int
    admission: int
    expires_at: float
    prompt: str | None = None
    tags: Mapping[str, str] = {}
    replaces: str | None = None
    enforce: bool = True
    bounded: bool = True
    would_refuse: str | None = None


class Hold(Struct, frozen=True, kw_only=True, gc=False):
    """Granted money. `made_at` is Unix seconds; the settlement is booked into the periods of that moment. `would_refuse` is the code of
    the refusal that it would have got if limits were enforced."""

    id: str
    amount: int
    made_at: float
    expires_at: float
    would_refuse: str | None = None


class Settlement(Struct, frozen=True, kw_only=True, gc=False):
    """How an attempt ended. `amount` is booked in full, also above the hold."""

    outcome: Outcome
    amount: int
    usage: Usage | None = None
    response_model: str | None = None
    latency_ms: int | None = None


class UsageRecord(Struct, frozen=True, gc=False):
    """One attempt in the books. `cost` is nano-USD; `price` of None is a model without a price. `would_refuse`: limits were only
    reported (`enforce=False`), and this is the code of the refusal that the attempt would have got."""

    # Not `kw_only`, as above.
    id: str
    request_id: str
    attempt: int
    created_at: float
    principal: str
    tenant: str | None
    key_id: str | None
    provider: str
    model: str
    response_model: str | None
    usage: Usage
    cost: int
    price: Price | None
    outcome: Outcome
    latency_ms: int | None
    prompt: str | None = None
    tags: Mapping[str, str] = {}
    would_refuse: str | None = None

    @property
    def cached(self) -> bool:
        return self.outcome == "cached"

    @property
    def cost_usd(self) -> Decimal:
        return money.dollars(self.cost)


class Budget(Struct, frozen=True, kw_only=True):
    """One scope in one window; nano-USD. `period` is `2026-01-31`, `2026-01` or empty for a lifetime; `cap` of None is no cap, `credit`
    is what running credits add to it."""

    scope: str
    window: Window
    period: str
    cap: int | None
    spent: int
    held: int
    credit: int = 0

    @property
    def remaining(self) -> int | None:
        return None if self.cap is None else max(0, self.cap + self.credit - self.spent - self.held)

    @property
    def cap_usd(self) -> Decimal | None:
        return None if self.cap is None else money.dollars(self.cap)

    @property
    def credit_usd(self) -> Decimal:
        return money.dollars(self.credit)

    @property
    def spent_usd(self) -> Decimal:
        return money.dollars(self.spent)

    @property
    def held_usd(self) -> Decimal:
        return money.dollars(self.held)

    @property
    def remaining_usd(self) -> Decimal | None:
        return None if self.remaining is None else money.dollars(self.remaining)


class Credit(Struct, frozen=True, kw_only=True):
    """A temporary top-up: from when it is given until `expires_at` it adds `amount` to each cap of its scope, by the day, the month and
    the lifetime. Nano-USD, Unix seconds. `ended_at` is when the ledger took it away again: the first reserve that came after `expires_at`,
    or whoever ended it early. `actor` gave it, and said why in `note`."""

    id: str
    scope: str
    amount: int
    created_at: float
    expires_at: float
    actor: str
    note: str = ""
    ended_at: float | None = None

    @property
    def amount_usd(self) -> Decimal:
        return money.dollars(self.amount)

    def running_at(self, now: float) -> bool:
        return self.ended_at is None and now < self.expires_at


class AdminAction(Struct, frozen=True, kw_only=True):
    """What an administrator did, or the host's own code (`actor` `host`, unless it names one). `action` is `key.create`, `price.set`, …;
    `subject` the id; `tenant` the one that it belongs to, None for what is the gateway's. `created_at` is in Unix seconds. `details` tell
    which settings were given; metadata, notes and the texts of prompts are only named there, in `also`."""

    id: str
    created_at: float
    actor: str
    action: str
    subject: str
    tenant: str | None = None
    details: Mapping[str, Any] = {}


class AuditQuery(Struct, frozen=True, kw_only=True):
    """Filters are exact and combined by `and`; the range is half-open, Unix seconds. At most `limit`, those below the id `before`."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    tenant: str | None = None
    since: float | None = None
    until: float | None = None
    limit: int = 100
    before: str | None = None


class UsageQuery(Struct, frozen=True, kw_only=True):
    """Filters are exact and combined by `and`; the range is half-open, Unix seconds. `group_by` takes `day`, `month`, `model`, `provider`,
    `principal`, `tenant`, `key`, `outcome`. `cursor` is the `next_cursor` of an earlier page; records come newest first. Without
    `totals` nothing has to be summed up: whoever reads page after page has the sums from the first."""

    principal: str | None = None
    tenant: str | None = None
    key_id: str | None = None
    model: str | None = None
    since: float | None = None
    until: float | None = None
    group_by: tuple[str, ...] = ()
    limit: int = 100
    cursor: str | None = None
    totals: bool = True


GROUPINGS = ("day", "month", "model", "provider", "principal", "tenant", "key", "outcome")


class UsageTotals(Struct, frozen=True, kw_only=True):
    """`calls` counts answered or billed attempts: neither `released` nor `adjusted` records. Cost in nano-USD."""

    calls: int = 0
    cached_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0

    @property
    def cost_usd(self) -> Decimal:
        return money.dollars(self.cost)


class UsageGroup(Struct, frozen=True, kw_only=True):
    by: Mapping[str, str | None]
    totals: UsageTotals


class UsageReport(Struct, frozen=True, kw_only=True):
    """Totals and groups are over everything that the filters match; `data` is one page of records.

    `rolled_up_before` is the midnight (UTC, Unix seconds) before which records may be rolled up: they are in totals and groups, and not in
    `data`, and count as at the midnight that their day began with. So a `since` or `until` before it means the next midnight."""

    totals: UsageTotals
    groups: Sequence[UsageGroup]
    data: Sequence[UsageRecord]
    next_cursor: str | None
    rolled_up_before: float | None = None

    @property
    def has_more(self) -> bool:
        return self.next_cursor is not None


class Finding(Struct, frozen=True):
    """What `check_ledger` found wrong: the invariant (`I1` to `I5`), where, and the figures."""

    invariant: str
    subject: str
    message: str


class StoredPrompt(Struct, frozen=True, kw_only=True):
    """One immutable version of a prompt. `messages` hold templates; `settings` are optional model settings (`model`, `temperature`,
    `max_tokens`, …); `labels` are those that point at this version now. A prompt of a tenant does not exist for others."""

    name: str
    version: int
    messages: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = {}
    labels: Sequence[str] = ()
    tenant: str | None = None
    created_at: datetime
    text: bool = False
