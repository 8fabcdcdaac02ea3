"""Default limits, for principals and keys that bring none of a kind."""

from __future__ import annotations

from ..types import LimitFields, Limits, limit_fields


def with_defaults(own: Limits, defaults: Limits | None) -> Limits:
    """`own`, each limit that it leaves open taken from `defaults`."""
    if defaults is None:
        return own
    given, fallback = limit_fields(own), limit_fields(defaults)
    merged: LimitFields = {**fallback}
    for name, value in given.items():
        if value is not None:
            merged[name] = value  # type: ignore[literal-required]  # a key of the same TypedDict
    return Limits(**merged)
