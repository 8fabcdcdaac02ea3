"""Sliding windows as arithmetic. Times and spans are integer microseconds, `now` comes in, nothing is stored here.

Windows of requests are exact: everything that was let in less than a span ago counts (`stores/windows/states.py`). Windows of tokens are
counters that weigh the previous bucket, after a strategy of `limits`
(https://limits.readthedocs.io/en/stable/strategies.html#sliding-window-counter): approximate, in constant space, and correctable after
the fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from msgspec import Struct

from ..errors import InvalidRequest, RateLimitExceeded
from ..types import WindowClaim, WindowKind, WindowState

__all__ = [
    "MICROSECONDS",
    "Demand",
    "Fixed",
    "Form",
    "Refusal",
    "Sliding",
    "Usage",
    "Window",
    "WindowClaim",
    "WindowKind",
    "WindowState",
    "check_fits",
    "exceeded",
    "in_seconds",
    "microseconds",
    "moving_wait",
    "too_large",
    "window_of",
]

MICROSECONDS = 1_000_000
TOO_LARGE_CODE = "request_too_large_for_limit"

Form = Literal["moving", "sliding", "fixed"]


class Window(NamedTuple):
    """Which window: the same key in another form or over other `seconds` is another window."""

    key: str
    form: Form
    seconds: int

    @property
    def span(self) -> int:
        return self.seconds * MICROSECONDS


class Demand(Struct, frozen=True, gc=False):
    """What an acquisition asks of one window."""

    window: Window
    limit: int
    amount: int


class Usage(Struct, frozen=True, gc=False):
    """`remaining` may go in now; after `reset` microseconds the window is as good as unused."""

    remaining: int
    reset: int


class Refusal(Struct, frozen=True):
    """`claim` is the one that has to wait longest, `wait` the seconds after which the whole set would be let in, None if it never
    would; `states` are all windows of the set, unchanged."""

    claim: WindowClaim
    wait: float | None
    states: Sequence[WindowState]


def moving_wait(at: int, now: int, span: int) -> int:
    """Until what came in at `at` has left its window, which is half-open: [at, at + span)."""
    left = at + span - now
    return left if left > 0 else 0


class Sliding(Struct, frozen=True, gc=False):
    """A counter of one bucket, by its number (bucket n is [n * span, (n + 1) * span)) and of the one before it."""

    current: int = 0
    previous: int = 0
    bucket: int = 0

    def at(self, now: int, span: int) -> Sliding:
        """The same counter in the bucket of `now`. A clock that was stepped back forgets nothing."""
        bucket = now // span
        if bucket <= self.bucket:
            return Sliding(self.current, self.previous, bucket)
        return Sliding(0, self.current if bucket == self.bucket + 1 else 0, bucket)

    def used(self, now: int, span: int) -> int:
        """`previous` weighs as much as of its bucket is less than a span ago, rounded down, as in `limits`."""
        return self.current + self.previous * (span - now % span) // span

    def wait(self, room: int, now: int, span: int) -> int:
        """Microseconds until at most `room` (not negative) counts as used, if nothing more comes in."""
        elapsed = now % span
        if self.current <= room:
            left = _elapsed_until(self.previous, room - self.current, span) - elapsed
            return left if left > 0 else 0
        return span - elapsed + _elapsed_until(self.current, room, span)

    def hit(self, amount: int) -> Sliding:
        return Sliding(self.current + amount, self.previous, self.bucket)

    def adjusted(self, delta: int, bucket: int) -> Sliding:
        """More is charged to the current bucket; less is taken out of the `bucket` that it was charged to, never below zero, and
        out of none if that one does not count any more."""
        if delta >= 0 or bucket >= self.bucket:
            current = self.current + delta
            return Sliding(current if current > 0 else 0, self.previous, self.bucket)
        if bucket == self.bucket - 1:
            return Sliding(self.current, max(0, self.previous + delta), self.bucket)
        return self

    def usage(self, limit: int, now: int, span: int) -> Usage:
        remaining = limit - self.used(now, span)
        return Usage(remaining if remaining > 0 else 0, self.wait(0, now, span))


class Fixed(Struct, frozen=True, gc=False):
    """A plain counter that begins anew when it expires; for the fixed windows of `limits`."""

    value: int = 0
    expires_at: int = 0
    span: int = 0

    def at(self, now: int) -> Fixed:
        """After the clock was stepped back it lasts no longer than a span from now on."""
        if now >= self.expires_at:
            return Fixed()
        return self if self.expires_at <= now + self.span else Fixed(self.value, now + self.span, self.span)

    def hit(self, amount: int, now: int, span: int) -> Fixed:
        return Fixed(self.value + amount, self.expires_at or now + span, self.span or span)


def _elapsed_until(count: int, room: int, span: int) -> int:
    """How far a bucket has to have run before the `count` of the previous one weighs at most `room`: the smallest `elapsed` with
    count * (span - elapsed) // span <= room."""
    return 0 if count <= room else span - ((room + 1) * span - 1) // count


def microseconds(seconds: float) -> int:
    return round(seconds * MICROSECONDS)


def in_seconds(span: int) -> float:
    return span / MICROSECONDS


@lru_cache(maxsize=4096, typed=True)
def window_of(scope: str, kind: WindowKind, seconds: int) -> Window:
    """Requests are counted exactly, tokens by the counter."""
    return Window(WindowClaim(scope, kind, 1, 1, seconds).key, "moving" if kind == "requests" else "sliding", seconds)


def check_fits(claims: Sequence[WindowClaim]) -> None:
    """Raises `InvalidRequest` for a claim that is larger than its whole window: no wait would help."""
    for claim in claims:
        if claim.amount > claim.limit:
            raise too_large(claim)


def too_large(claim: WindowClaim) -> InvalidRequest:
    advice = "; shorten the input or lower max_tokens" if claim.kind == "tokens" else ""
    return InvalidRequest(
        f"this request needs up to {claim.amount} {claim.kind}, which is more than the whole limit of this {claim.scope_kind}: "
        f"{claim.limit} {claim.kind} {_period(claim)}{advice}",
        code=TOO_LARGE_CODE,
        param="max_tokens" if claim.kind == "tokens" else None,
        details={"scope": claim.scope_kind, "window": claim.kind, "limit": claim.limit, "requested": claim.amount},
    )


def exceeded(refusal: Refusal) -> RateLimitExceeded | InvalidRequest:
    """The error that a refused caller sees; it names the kind of the scope, never its id."""
    claim = refusal.claim
    if refusal.wait is None:
        return too_large(claim)
    return RateLimitExceeded(
        f"rate limit exceeded: at most {claim.limit} {claim.kind} {_period(claim)} for this {claim.scope_kind}; "
        f"retry in {max(refusal.wait, 0.001):.3f} seconds",
        retry_after=refusal.wait,
        scope=claim.scope_kind,
        window=claim.kind,
        limit=claim.limit,
        states=refusal.states,
    )


def _period(claim: WindowClaim) -> str:
    return "per minute" if claim.seconds == 60 else f"per {claim.seconds} seconds"
