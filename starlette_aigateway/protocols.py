"""Every seam on one screen. Hosts inject objects that fit; nothing has to be inherited.

Stores may also be async context managers: they are entered once per process, after fork, and left at the end. A store that cannot
be reached raises `StorageUnavailable`. Verbs are atomic domain operations, never get-and-set. `testing.py` ships the contract suites.
Times are Unix seconds and come in as `now`; a store reads no clock of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from msgspec import Struct

from .accounts import (
    AdminAction,
    AuditQuery,
    Budget,
    Credit,
    Finding,
    Hold,
    HoldRequest,
    Settlement,
    StoredPrompt,
    UsageQuery,
    UsageRecord,
    UsageReport,
)
from .events import BudgetReached, Event
from .types import Caps, Chunk, Completion, CompletionRequest, Key, Price, ProviderCall, StreamItem, Tenant

Clock: TypeAlias = Callable[[], float]
"""Unix seconds, as `time.time` gives them."""

Observer: TypeAlias = Callable[[Event], Awaitable[None]]
"""Told what happened, behind a bounded queue; can alter nothing, and what it raises is logged."""


class KeyStore(Protocol):
    """Stored keys. A change is true in every worker from the next `find` on."""

    async def add(self, key: Key, digest: bytes) -> None:
        """`digest` is the SHA-256 of the raw key. Raises `Conflict` if the id or the digest exists."""

    async def find(self, digest: bytes, *, now: float) -> Key | None:
        """The key of `digest`, or of a digest that was rotated away and is still in its grace period. Expired and revoked keys too."""

    async def get(self, key_id: str) -> Key | None: ...

    async def update(self, key_id: str, changes: Mapping[str, Any]) -> Key | None:
        """Sets the named fields of `Key` in one step; others stay. None: no such key. Revoking is `{"revoked_at": ...}`."""

    async def rotate(self, key_id: str, digest: bytes, hint: str, *, previous_until: float) -> Key | None:
        """Gives the key a new digest and hint; the digest until now opens until `previous_until`, older ones no more."""

    async def list(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[Key]:
        """Keys in the order of their ids, those after the id `after`, at most `limit`."""


class TenantStore(Protocol):
    async def get(self, tenant_id: str) -> Tenant | None: ...

    async def put(self, tenant: Tenant) -> None:
        """Creates it or replaces all its limits."""

    async def update(self, tenant_id: str, changes: Mapping[str, Any]) -> Tenant | None:
        """Sets the named limits in one step; others stay. None: no such tenant."""

    async def list(self, *, limit: int = 100, after: str | None = None) -> Sequence[Tenant]: ...


class PriceStore(Protocol):
    async def put(self, provider: str | None, model: str, price: Price | None) -> None:
        """`provider` of None is the price of `model` anywhere; a `price` of None removes it."""

    async def all(self) -> Mapping[tuple[str | None, str], Price]:
        """Every stored price by `(provider, model)`, as it is now in every worker. Called for each call: it has to be cheap."""


class AuditStore(Protocol):
    """What administrators did. Nothing here changes or removes anything."""

    async def add(self, action: AdminAction) -> None:
        """Durable when it returns; once per id."""

    async def list(self, query: AuditQuery) -> Sequence[AdminAction]:
        """In the descending order of their ids, which is that of time."""


class PromptStore(Protocol):
    """Prompts by `(tenant, name)`. A tenant's own prompt hides a shared one (tenant None) of the same name; `tenant` in the reads is
    who asks. Versions count from 1 and never change; labels move. `latest` is not stored: it is the highest version."""

    async def add(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        settings: Mapping[str, Any],
        tenant: str | None,
        labels: Sequence[str],
        text: bool,
        created_at: datetime,
    ) -> StoredPrompt:
        """Adds the next version and moves `labels` to it. The first version of a prompt also gets `production`."""

    async def get(
        self, name: str, *, version: int | None = None, label: str | None = None, tenant: str | None = None
    ) -> StoredPrompt | None:
        """By `version`, else by `label`, else by `production`."""

    async def list(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[StoredPrompt]:
        """The highest version of each prompt that `tenant` can see, in the order of names, those after the name `after`."""

    async def versions(self, name: str, *, tenant: str | None = None) -> Sequence[StoredPrompt]:
        """All versions, newest first; empty if there is no such prompt."""

    async def move_label(self, name: str, label: str, version: int, *, tenant: str | None = None) -> StoredPrompt | None:
        """Points `label` at `version`, also back. None: no such prompt or version."""


class Ledger(Protocol):
    """Money. Each verb is one transaction over all workers of the host, applied once however often it is called (I1 to I5).

    What one event loop asks for is carried out in that order, also where the wait for it is cancelled: a release by its id gives back a
    hold whose grant nobody learned of."""

    async def reserve(self, request: HoldRequest, *, now: float) -> Hold:
        """Grants a hold in all scopes or in none. Raises `SpendCapExceeded`, `SpendCapHeld`, `TooManyParallelRequests`, and `CostUnbounded`
        where a cap holds and the request is not `bounded`; a request that does not `enforce` its limits is granted all the same,
        marked with the code of that refusal."""

    async def probe(self, request: HoldRequest, *, now: float) -> Hold:
        """The hold that `reserve` would grant now, or the error that it would raise; nothing is held, booked or written."""

    async def settle(self, hold_id: str, settlement: Settlement, *, now: float) -> UsageRecord | None:
        """Books an attempt and writes its record. A hold that is settled or released already: nothing happens and its record comes
        back. An expired one: the difference is booked as an `adjusted` record. None: the hold is unknown."""

    async def release(self, hold_id: str, *, now: float, latency_ms: int | None = None) -> None:
        """Gives a hold back; its record says `released`, cost 0. Of a hold that is resolved already: nothing happens."""

    async def renew(self, hold_id: str, expires_at: float, *, now: float) -> bool:
        """Moves the end of an open hold's lease. False: the hold is not open any more."""

    async def record(self, record: UsageRecord) -> None:
        """Writes the record of an answer that cost nothing (`cached`), once per id."""

    async def expire(self, *, now: float) -> Sequence[UsageRecord]:
        """Books every hold in full whose lease is over, and says which. Happens in passing of `reserve` too."""

    async def set_caps(self, scope: str, caps: Caps) -> None:
        """Stores the caps of a tenant's scope or the gateway's; what is spent and held stays."""

    async def add_credit(self, credit: Credit) -> Credit:
        """Gives a scope a temporary top-up, once per id. From `expires_at` on it counts no more; the first reserve that sees it so ends
        it for good. Gives the credit back as it is stored."""

    async def end_credit(self, credit_id: str, *, now: float) -> Credit | None:
        """Ends a credit early; what was spent of it stays spent. Of one that has ended nothing happens. None: there is none of that id."""

    async def credit(self, credit_id: str) -> Credit | None: ...

    async def credits(self, scope: str | None = None, *, limit: int = 100, before: str | None = None) -> Sequence[Credit]:
        """Credits of a scope, or all, ended ones too, in the descending order of their ids, those below the id `before`."""

    def listen(self, tell: Callable[[BudgetReached], None]) -> None:
        """`tell` is called in the event loop of a verb that found what is spent to have reached a threshold of a cap: once for each
        scope, period and threshold, over all workers. A process that dies at that very moment tells nobody."""

    async def budgets(self, scopes: Mapping[str, Caps | None], *, now: float) -> Sequence[Budget]:
        """Day, month and total of each scope; caps of None are the stored ones."""

    async def usage(self, query: UsageQuery) -> UsageReport: ...

    async def prune(self, before: float) -> int:
        """Replaces what the audit needs of holds that were settled for good before `before` by its sums. What `budgets` tells and usage
        records stay as they are. Gives the number of entries that are gone."""

    async def roll_up(self, before: float) -> int:
        """Replaces the usage records of the UTC days that ended by `before` by their sums, and prunes what belongs to them; whatever may
        still be adjusted stays. Totals and groups of `usage` over whole days stay as they are. A hold whose record is gone is unknown,
        so `before` is further back than anybody asks twice for. Gives the number of records that are gone."""

    async def check(self) -> Sequence[Finding]:
        """Verifies the invariants over everything stored; empty when they hold."""

    async def ping(self) -> None:
        """Raises `StorageUnavailable` if a reserve could not be written now."""


class Claim(Struct, frozen=True):
    """What a claim on an idempotency key met: `claimed`, it is the caller's now; `running`, another has it; `kept`, with the `outcome` that
    was kept; `other_request`, it is taken by a request with another fingerprint, running or kept."""

    state: Literal["claimed", "running", "kept", "other_request"]
    outcome: bytes | None = None


class IdempotencyStore(Protocol):
    """Calls by idempotency key, and what is kept of those that were carried out. `key` already stands for principal, route and the
    caller's key. A claim has a `holder`, a random name, and a lease: one whose lease is over is free for the next, so that a killed
    process does not block its key. Until somebody took it, its holder may still renew it or keep an outcome."""

    async def claim(self, key: str, fingerprint: str, *, holder: str, until: float, now: float) -> Claim:
        """Takes the key until `until`, if it is free: never claimed, released, its lease over, or its outcome kept long enough. Of
        concurrent claims in all workers exactly one is granted."""

    async def renew(self, key: str, *, holder: str, until: float) -> bool:
        """Moves the end of the lease. False: the claim is not this holder's any more."""

    async def keep(self, key: str, outcome: bytes, *, holder: str, until: float) -> bool:
        """Ends the claim and keeps `outcome` until `until`, durably. False: the claim is not this holder's any more, nothing is kept."""

    async def release(self, key: str, *, holder: str) -> None:
        """Frees the key. A claim that is not this holder's any more stays as it is."""


class ResponseCache(Protocol):
    """Bytes by key. Whatever fails is a miss: no verb raises."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        """Keeps `value` for `ttl` seconds at most."""

    async def purge(self) -> int:
        """Forgets everything; says how many entries that were."""


@runtime_checkable
class Provider(Protocol):
    """A provider of the host's own: a name and one method.

    Optional attributes, read once at registration: `models` (the names that it serves, or `{public: upstream}`; without it, every
    name), `timeout` (seconds for one attempt), `max_output_tokens` (what it produces at the most), `bounds_output` (False if it does
    not obey `max_tokens`: principals under a cap are then refused unless `max_output_tokens` is given), `reasons` (True, or a function of a
    model's name, if the models make tokens that they do not send: an answer that breaks off is then estimated at its output bound).
    """

    name: str

    async def complete(self, request: CompletionRequest) -> Completion:
        """Raises `ProviderError` to say what is known of retries and of money; anything else is booked in full."""


@runtime_checkable
class StreamingProvider(Provider, Protocol):
    def stream(self, request: CompletionRequest) -> AsyncIterator[Chunk]:
        """An async generator; the gateway closes it."""


class ProviderAnswer(Protocol):
    """What an open attempt gives: `completion()` of a whole answer, `events()` of a stream. Both raise `ProviderError`. Events that also
    have a `pour` as in `pouring.py` are read by that."""

    async def completion(self) -> Completion: ...

    def events(self) -> AsyncIterator[StreamItem]: ...


@runtime_checkable
class Adapter(Protocol):
    """The fuller seam that our own providers speak; simple providers are wrapped into it. The same optional attributes as `Provider`.

    `open` sends the request, waits for the status and raises `ProviderError` for one that is not a success; leaving it closes the
    connection. What it gives may have an attribute `unsent`, true while the provider can have heard nothing: a call that is given up then
    costs nothing. An adapter may also be an async context manager, entered once per process and event loop.
    """

    name: str

    def open(self, call: ProviderCall) -> AbstractAsyncContextManager[ProviderAnswer]: ...


class HTTPRequest(Struct, frozen=True, gc=False):
    """A POST to a provider."""

    url: str
    headers: Mapping[str, str]
    body: bytes


class HTTPAnswer(Protocol):
    """`headers` have lower-case names. `chunks` gives the body as it comes, decoded from any content coding; chunks that also have a
    `pour` as in `pouring.py` are read by that."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises `ProviderError` when it is longer than `limit` bytes."""

    def chunks(self) -> AsyncIterator[bytes]: ...


class Transport(Protocol):
    """HTTP to providers: send; status, headers, byte stream; close.

    Raises `ProviderError(billed="no")` where the request certainly was not sent (refused, DNS, TLS, connect timeout), `ProviderTimeout`
    and `ProviderError(billed="unknown")` otherwise. Redirects are not followed. `connect` and `read` are seconds. What `send` gives may
    have an attribute `unsent`, true while it is certain that nothing of the request was sent, and never after that.
    """

    def send(self, request: HTTPRequest, *, connect: float, read: float) -> AbstractAsyncContextManager[HTTPAnswer]: ...

    async def aclose(self) -> None: ...
