"""Waiting for so long and no longer, which costs nothing where nothing has to be waited for: most bodies are there when they are asked for,
and most observers have heard what they are told at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar

from .deadlines import deadline

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` brings, None where it takes longer. Raises what `work` raises.

    On asyncio the time begins with the first wait of `work`, which may stand in scopes of anyio's by then: a deadline there is a timer,
    which does not mind who was entered first."""
    done, rest = at_once(work)
    if done is not None:
        return done
    with deadline(seconds):
        return await rest
    return None


def at_once(work: Coroutine[Any, Any, T]) -> tuple[T | None, Awaitable[T]]:
    """What `work`, which brings no None, brings without a wait; else None, and the rest of it, which has to be awaited."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return None, work
    try:
        waited_for = work.send(None)
    except StopIteration as done:
        return done.value, work
    return None, _rest(work, waited_for)


@coroutine
def _rest(work: Coroutine[Any, Any, T], waited_for: Any) -> Generator[Any, Any, T]:
    """`await work`, from its first wait on."""
    try:
        while True:
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001  # a cancellation, most likely: for `work` to see, as by `await`
                waited_for = work.throw(error)
            else:
                return (yield from work.__await__())
    except StopIteration as done:
        result: T = done.value
        return result
