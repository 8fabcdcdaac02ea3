"""Rate limits: the windows of one call, taken together or not at all.

Over a storage that can take several windows at once (ours, `stores/windows/`) a refusal takes nothing, the wait is true and
a limit holds over all processes that share the file. Over any other storage of `limits` (`async+memory://`, `async+redis://`) the
strategies of `limits` are asked one window after the other, first whether each has room, then to take it. That is weaker: a call
that loses a race for its second window has used its first; a wait is as `limits` reports it; what was charged too much stays charged.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from limits import RateLimitItemPerSecond
from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.aio.strategies import MovingWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from msgspec.structs import replace

from .errors import ConfigurationError, InvalidRequest, RateLimitExceeded, StorageUnavailable
from .policy.windows import Refusal, Sliding, WindowClaim, WindowState, check_fits, exceeded, in_seconds, microseconds, too_large
from .protocols import Clock
from .types import MAX_WINDOW

log = logging.getLogger("starlette_aigateway")

Outcome = TypeVar("Outcome")


@runtime_checkable
class SharedWindows(Protocol):
    """What a storage has to offer for exact windows; each verb is one transaction. `testing/windows.py` says what it promises."""

    async def acquire_all(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal: ...

    async def probe(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal: ...

    async def peek(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]: ...

    async def adjust(self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None) -> None: ...


@runtime_checkable
class CorrectedSoon(Protocol):
    """What a storage may offer besides: a correction that nobody waits for, in the order of what the event loop asks. `failed` is called
    from any thread."""

    def adjust_soon(
        self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None, failed: Callable[[BaseException], None]
    ) -> None: ...


class ClaimItem(RateLimitItemPerSecond):
    """A claim as a limit of `limits`. Its key leaves the amount out: a changed limit keeps what was used."""

    def __init__(self, claim: WindowClaim) -> None:
        super().__init__(claim.limit, claim.seconds, namespace="aigateway")

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return "/".join((self.namespace, *map(str, identifiers), str(self.multiples)))


class Limiter:
    """Holds the sliding windows of `storage`, by scope, never by raw keys.

    A storage that cannot be reached refuses every call with `StorageUnavailable`; with `fail_open` it lets every call through, and
    says so once in the log. `clock` gives Unix seconds. Raises `ConfigurationError` for a storage that has no sliding windows.
    """

    def __init__(self, storage: Storage, *, clock: Clock, fail_open: bool = False) -> None:
        self._windows: SharedWindows = storage if isinstance(storage, SharedWindows) else StrategyWindows(storage, clock)
        self._soon = storage if isinstance(storage, CorrectedSoon) else None
        self._faults = _faults(storage)
        self._fail_open = fail_open
        self._reported = False

    async def admit(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]:
        """Takes all `claims` or none, and tells the windows after that, in the same order; empty where the storage failed open.

        Raises `RateLimitExceeded`, whose `retry_after` is the wait after which exactly this set is let in; `InvalidRequest`
        (`request_too_large_for_limit`) where a claim is larger than its whole window; `StorageUnavailable`.
        """
        if not claims:
            return ()
        for claim in claims:
            if claim.amount > claim.limit:
                raise too_large(claim)
        try:
            outcome = await self._windows.acquire_all(claims)
        except self._faults as error:
            return self._unreachable(error)
        self._reported = False
        if isinstance(outcome, Refusal):
            raise exceeded(outcome)
        return outcome

    async def probe(self, claims: Sequence[WindowClaim]) -> tuple[Sequence[WindowState], RateLimitExceeded | InvalidRequest | None]:
        """The windows of `claims` as they are, in the same order, and the error with which `admit` would refuse them now, None if it
        would let them in. Takes nothing. Raises `StorageUnavailable`; no windows where the storage failed open."""
        try:
            check_fits(claims)
        except InvalidRequest as error:
            return await self.peek([replace(claim, amount=0) for claim in claims]), error
        outcome = await self._guarded(self._windows.probe, claims) if claims else ()
        return (outcome.states, exceeded(outcome)) if isinstance(outcome, Refusal) else (outcome, None)

    async def correct(self, claims: Sequence[WindowClaim], actual_tokens: int, *, admitted_at: float | None = None) -> None:
        """Charges the windows of tokens among `claims` with what was used instead of what was claimed. `admitted_at` (Unix seconds) is
        when they were taken, so that the right bucket is corrected after a long call. A storage that fails is logged, never raised. Nobody
        waits for the default storage to have done it; what is asked of the windows later finds it done."""
        deltas = [(claim, actual_tokens - claim.amount) for claim in claims if claim.kind == "tokens" and claim.amount != actual_tokens]
        if not deltas:
            return
        if self._soon is not None:
            self._soon.adjust_soon(deltas, charged_at=admitted_at, failed=self._uncorrected)
            return
        try:
            await self._windows.adjust(deltas, charged_at=admitted_at)
        except self._faults as error:
            self._uncorrected(error)

    def _uncorrected(self, error: BaseException) -> None:
        self._report(error, "tokens stay charged as estimated")

    async def peek(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]:
        """The windows of `claims` as they are, in the same order; takes nothing. Raises `StorageUnavailable`; empty where the
        storage failed open."""
        return await self._guarded(self._windows.peek, claims) if claims else ()

    async def _guarded(
        self, ask: Callable[[Sequence[WindowClaim]], Awaitable[Outcome]], claims: Sequence[WindowClaim]
    ) -> Outcome | tuple[()]:
        try:
            outcome = await ask(claims)
        except self._faults as error:
            return self._unreachable(error)
        self._reported = False
        return outcome

    def _unreachable(self, error: Exception) -> tuple[()]:
        """Lets a call through, or raises `StorageUnavailable`."""
        if self._fail_open:
            self._report(error, "calls are let through")
            return ()
        self._report(error, "calls are refused")
        if isinstance(error, StorageUnavailable):
            raise error
        raise StorageUnavailable("the rate limits cannot be checked now", retry_after=1.0) from error

    def _report(self, error: BaseException, consequence: str) -> None:
        """Once for each outage: a call that gets through ends it."""
        if not self._reported:
            self._reported = True
            log.error("the storage of the rate limits failed, %s: %s", consequence, type(error).__name__)


class StrategyWindows:
    """Test, then hit, with the strategies of `limits` over any of its storages."""

    def __init__(self, storage: Storage, clock: Clock) -> None:
        if not isinstance(storage, MovingWindowSupport) or not isinstance(storage, SlidingWindowCounterSupport):
            raise ConfigurationError(
                f"{type(storage).__name__} has no sliding windows; use async+memory://, async+redis:// or the default", param="windows"
            )
        self._storage: SlidingWindowCounterSupport = storage
        self._strategies: dict[str, RateLimiter] = {
            "requests": MovingWindowRateLimiter(storage),
            "tokens": SlidingWindowCounterRateLimiter(storage),
        }
        self._clock = clock

    async def acquire_all(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal:
        if (blocked := await self._blocked(claims)) is not None:
            return await self._refused(blocked, claims)
        for claim in claims:
            if not await self._strategies[claim.kind].hit(ClaimItem(claim), *_place(claim), cost=claim.amount):
                return await self._refused(claim, claims)
        return await self.peek(claims)

    async def probe(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal:
        blocked = await self._blocked(claims)
        return await self.peek(claims) if blocked is None else await self._refused(blocked, claims)

    async def peek(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]:
        return tuple([await self._state(claim) for claim in claims])

    async def adjust(self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None) -> None:
        """Only upwards: `limits` has no verb that gives back."""
        for claim, delta in deltas:
            if delta > 0:
                boundless = ClaimItem(WindowClaim(claim.scope, claim.kind, 2 * MAX_WINDOW, delta, claim.seconds))
                await self._strategies[claim.kind].hit(boundless, *_place(claim), cost=delta)

    async def _blocked(self, claims: Sequence[WindowClaim]) -> WindowClaim | None:
        """The first window that has no room."""
        for claim in claims:
            if not await self._strategies[claim.kind].test(ClaimItem(claim), *_place(claim), cost=claim.amount):
                return claim
        return None

    async def _refused(self, claim: WindowClaim, claims: Sequence[WindowClaim]) -> Refusal:
        states = await self.peek(claims)
        return Refusal(claim, await self._wait(claim), states)

    async def _wait(self, claim: WindowClaim) -> float:
        if claim.kind == "tokens":
            counter, now, span = await self._counter(claim)
            return in_seconds(counter.wait(claim.limit - claim.amount, now, span))
        reset_at, _ = await self._strategies[claim.kind].get_window_stats(ClaimItem(claim), *_place(claim))
        return max(0.0, reset_at - self._clock())

    async def _state(self, claim: WindowClaim) -> WindowState:
        if claim.kind == "tokens":
            counter, now, span = await self._counter(claim)
            usage = counter.usage(claim.limit, now, span)
            return WindowState(claim, usage.remaining, in_seconds(usage.reset))
        reset_at, remaining = await self._strategies[claim.kind].get_window_stats(ClaimItem(claim), *_place(claim))
        used = remaining < claim.limit
        return WindowState(claim, max(0, remaining), max(0.0, reset_at - self._clock()) if used else 0.0)

    async def _counter(self, claim: WindowClaim) -> tuple[Sliding, int, int]:
        """The counter, and a moment in its bucket: the current bucket counts for two spans, so what it has left tells how far it is."""
        previous, _, current, left = await self._storage.get_sliding_window(ClaimItem(claim).key_for(*_place(claim)), claim.seconds)
        span = microseconds(claim.seconds)
        now = max(0, 2 * span - microseconds(left)) % span
        return Sliding(current, previous, 0), now, span


def _place(claim: WindowClaim) -> tuple[str, str]:
    return claim.scope, claim.kind


def _faults(storage: Storage) -> tuple[type[Exception], ...]:
    """What `storage` raises when it cannot be reached."""
    own = storage.base_exceptions
    return (StorageUnavailable, StorageError, OSError, *(own if isinstance(own, tuple) else (own,)))
