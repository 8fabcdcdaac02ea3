"""What an upstream's HTTP status means for retries and for money (design, section 4)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from email.utils import parsedate_to_datetime

from ..errors import ProviderError, ProviderRejected, ProviderTimeout

MAX_RETRY_AFTER = 86_400.0
REJECTED = frozenset({400, 413, 422})
AMBIGUOUS = frozenset({408, 504, 524})  # a gateway on the way gave up waiting: the model may have answered, and billed
UNKNOWN_MODEL = frozenset({"model_not_found"})


def status_error(
    name: str,
    status: int,
    headers: Mapping[str, str],
    facts: Mapping[str, str],
    *,
    now: float,
    ambiguous: Collection[int] = AMBIGUOUS,
) -> ProviderError:
    """The error of an answer that is not a success. `facts` are the safe identifiers of its body, all that a caller gets to see of it.

    `now` is Unix seconds, for a `Retry-After` date whose answer says no date of its own. After an `ambiguous` status the model may have
    answered, and billed.
    """
    message = f"the provider {name} answered with status {status}: {_meaning(status)}"
    details = dict(facts) or None
    if status in ambiguous:
        return ProviderTimeout(message, billed="unknown", status=status, retry_after=retry_after(headers, now=now), details=details)
    if status in REJECTED and facts.get("code") not in UNKNOWN_MODEL:
        return ProviderRejected(message, retryable=False, billed="no", status=status, param=facts.get("param"), details=details)
    return ProviderError(message, billed="no", status=status, retry_after=retry_after(headers, now=now), details=details)


def _meaning(status: int) -> str:
    if status < 400:
        return "no answer of a model; redirects are not followed"
    if status in (401, 403):
        return "the gateway's own access was refused"
    if status == 404:
        return "it does not know the model"
    if status == 429:
        return "it is rate limited"
    if status in REJECTED:
        return "it refuses the request as it is"
    if status in AMBIGUOUS:
        return "it timed out"
    return "it is failing" if status >= 500 else "it refuses to answer"


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds of `retry-after-ms` or `retry-after` (seconds or a date: RFC 9110, section 10.2.3), at most a day; None if there are none."""
    seconds = _number(headers.get("retry-after-ms"), 0.001)
    if seconds is None:
        seconds = _number(headers.get("retry-after"), 1.0)
    if seconds is None:
        until = _date(headers.get("retry-after"))
        if until is None:
            return None
        since = _date(headers.get("date"))
        seconds = until - (now if since is None else since)
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _number(value: str | None, unit: float) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number * unit if math.isfinite(number) else None


def _date(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
