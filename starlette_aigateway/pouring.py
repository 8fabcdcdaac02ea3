"""Reading what comes piece by piece, without a task that wakes for each: where the source can, pieces are handed on where they arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar, cast

T = TypeVar("T")


def pour(source: AsyncIterator[T], take: Callable[[T], bool]) -> Awaitable[bool]:
    """Gives `take` what comes, until it says no, and then brings True; False at the end. What follows a no waits for the next call.

    `take` must neither wait nor raise: an iterator that has a `pour(take)` of its own calls it in the event loop, outside of any task."""
    own = getattr(source, "pour", None)
    return _pour(source, take) if own is None else cast("Awaitable[bool]", own(take))


async def _pour(source: AsyncIterator[T], take: Callable[[T], bool]) -> bool:
    async for piece in source:
        if not take(piece):
            return True
    return False
