"""Whether the client is still there while its answer is being made. Servers do not cancel a request whose client has left: they tell
whoever asks (`http.disconnect`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.types import Receive

from .bodies import ClientLeft

T = TypeVar("T")
A_MOMENT = 0.002
"""Seconds; a few passes of the event loop, since some servers let one go by before they tell what they know."""


async def while_present(receive: Receive, work: Callable[[], Awaitable[T]], stalled: Callable[[], Awaitable[None]] | None = None) -> T:
    """What `work` brings. When the client leaves, or `stalled` returns, it is cancelled. Raises `ClientLeft`, and what `work` raises as it
    came."""
    results: list[T] = []
    failure: BaseException | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def look(stalled: Callable[[], Awaitable[None]]) -> None:
            await stalled()
            group.cancel_scope.cancel()

        group.start_soon(watch)
        if stalled is not None:
            group.start_soon(look, stalled)
        try:
            results.append(await work())
        except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
            failure = error
        cancelled = group.cancel_scope.cancel_called
        group.cancel_scope.cancel()
    if results:
        return results[0]
    if cancelled and isinstance(failure, anyio.get_cancelled_exc_class()):
        raise ClientLeft
    assert failure is not None
    raise failure


async def present(receive: Receive) -> bool:
    """As far as the server knows at this moment. The request's body has been read, and nobody else waits for `receive`."""
    with anyio.move_on_after(A_MOMENT):
        message = await receive()
        return bool(message["type"] != "http.disconnect")
    return True
