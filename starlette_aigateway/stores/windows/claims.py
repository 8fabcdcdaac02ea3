"""Windows and demands from what callers give, checked: what gets past here is written to a log that all processes read, and has to be of
exactly the types that they expect. A bool or a 60.0 is not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ...errors import InvalidArgument
from ...policy.windows import Demand, Form, Window, WindowClaim, WindowKind, microseconds, window_of
from ...types import MAX_WINDOW
from .ops import Acquire, Adjust

LONGEST_SECONDS = 10**9
LATEST = 10**12


def named(key: str, form: Form, seconds: int) -> Window:
    return _checked(Window(key, form, seconds))


def fixed(key: str) -> Window:
    """There is one for each key: `limits` asks for its count without saying how long it is."""
    return named(key, "fixed", 1)


def demand(window: Window, limit: int, amount: int) -> Demand:
    if type(amount) is not int or not 0 <= amount <= MAX_WINDOW:
        raise InvalidArgument(f"an amount has to be a whole number between 0 and {MAX_WINDOW}", param="amount")
    if type(limit) is not int:
        raise InvalidArgument("a limit has to be a whole number", param="limit")
    return Demand(window, limit, amount)


def demands(claims: Sequence[WindowClaim]) -> Sequence[Demand]:
    asked = [demand(_claimed(claim.scope, claim.kind, claim.seconds), claim.limit, claim.amount) for claim in claims]
    if len(asked) > 1 and len({one.window for one in asked}) != len(asked):
        raise InvalidArgument("two claims name the same window", param="claims")
    return asked


def acquisition(claims: Sequence[WindowClaim], *, taking: bool = True) -> Acquire:
    return Acquire(demands(claims), taking)


def adjustment(deltas: Sequence[tuple[WindowClaim, int]], charged_at: float | None) -> Adjust:
    if charged_at is not None and not (type(charged_at) in (int, float) and -LATEST <= charged_at <= LATEST):  # nor is it NaN
        raise InvalidArgument(f"a time has to be within {LATEST} seconds of 1970", param="charged_at")
    corrections = []
    for claim, delta in deltas:
        window = _claimed(claim.scope, claim.kind, claim.seconds)
        if window.form != "sliding":
            raise InvalidArgument("only windows of tokens can be corrected", param="deltas")
        if type(delta) is not int:
            raise InvalidArgument("a correction has to be a whole number", param="deltas")
        if not -MAX_WINDOW <= delta <= MAX_WINDOW:
            delta = MAX_WINDOW if delta > 0 else -MAX_WINDOW
        corrections.append((window, delta))
    return Adjust(corrections, None if charged_at is None else microseconds(charged_at))


@lru_cache(maxsize=4096, typed=True)
def _claimed(scope: str, kind: WindowKind, seconds: int) -> Window:
    return _checked(window_of(scope, kind, seconds))


def _checked(window: Window) -> Window:
    if type(window.key) is not str or not window.key.isprintable():
        raise InvalidArgument("the key of a window has to be a printable string", param="key")
    if type(window.seconds) is not int or not 1 <= window.seconds <= LONGEST_SECONDS:
        raise InvalidArgument(f"a window has to be 1 to {LONGEST_SECONDS} whole seconds long", param="seconds")
    return window
