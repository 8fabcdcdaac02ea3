"""Waiting for so long and no longer, which costs nothing where nothing has to be waited for.

Most bodies are there when they are asked for; a scope of anyio's for each of them would cost as much as reading it ten times."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` brings, None where it takes longer. Raises what `work` raises.

    On asyncio the time begins with the first wait of `work`, which has its own scopes of anyio's around it by then. None of those can be
    entered outside of them any more; a timeout of asyncio's, which only cancels the task, can."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        with anyio.move_on_after(seconds):
            return await work
        return None
    try:
        waited_for = work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await _rest(work, waited_for)
    except TimeoutError:
        if not limit.expired():
            raise  # one of `work`
    return None


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
