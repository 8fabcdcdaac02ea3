"""Whether the client is still there while its answer is being made. Servers do not cancel a request whose client has left: they tell
whoever asks (`http.disconnect`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Protocol, TypeVar

import anyio
from starlette.types import Receive

from .bodies import ClientLeft
from .pace import Pace

T = TypeVar("T")
A_MOMENT = 0.002
"""Seconds; a few passes of the event loop, since some servers let one go by before they tell what they know."""
MOMENTS = 5
LISTEN_AFTER = 0.1
"""Seconds: most of what is over by then has no client that left, and a task that listens costs as much as passing on several chunks."""


class StreamClient(Protocol):
    """The client of a stream, as what makes the stream knows it."""

    async def present(self) -> bool:
        """Whether it still waits, as far as the server knows at this moment."""

    def end(self) -> None:
        """What follows is not to be cut off, should it leave."""


async def while_present(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` brings. When the client leaves, it is cancelled. Raises `ClientLeft`, and what `work` raises as it came."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return await _with_a_group(receive, work, None)
    with anyio.CancelScope() as scope:
        watch = _Watch(loop, receive, scope.cancel)
        watch.listen()
        try:
            return await work()
        finally:
            watch.end()
    watch.check()
    raise ClientLeft


async def while_taken(receive: Receive, work: Callable[[StreamClient], Awaitable[T]], pace: Pace, *, at_once: bool = False) -> T:
    """As `while_present`, for a stream: it is also cancelled when the client takes nothing for too long by its `pace`. A client that leaves
    may be noticed `LISTEN_AFTER` seconds after the beginning only, unless `at_once`. `work` calls `end` before what is not to be cut off;
    where asyncio runs, no scope of anyio's within shields from this, which costs a tenth."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return await _with_a_group(receive, lambda: work(_Heard()), pace)
    task = asyncio.current_task()
    assert task is not None, "a request has a task"
    before = task.cancelling()
    watch = _Watch(loop, receive, task.cancel)
    if at_once:
        watch.listen()
    watch.begin_later(pace)
    try:
        return await work(watch)
    except asyncio.CancelledError:
        if not watch.saw_it_leave or task.cancelling() - 1 > before:
            raise
        watch.check()
        raise ClientLeft from None
    finally:
        watch.end()
        if watch.saw_it_leave:
            task.uncancel()


class _Heard:
    """A client that somebody listens to: whoever works for it is cancelled when it leaves."""

    async def present(self) -> bool:
        return True

    def end(self) -> None:
        pass


class _Watch:
    """Looks for the client in a bare task and by a timer: a task group with both costs ten times as much. `leave` is called once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receive: Receive, leave: Callable[[], object]) -> None:
        self._loop = loop
        self._receive = receive
        self._leave = leave
        self._over = False
        self.saw_it_leave = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def listen(self) -> None:
        self._task = self._loop.create_task(self._listen())

    def begin_later(self, pace: Pace) -> None:
        """Listens in a while, if it does not yet, and looks from then on whether the client takes what it is sent."""
        self._timer = self._loop.call_later(LISTEN_AFTER, self._begin, pace)

    def _begin(self, pace: Pace) -> None:
        if self._task is None:
            self.listen()
        self._look(pace)

    async def present(self) -> bool:
        """Listens from now on, and for two moments before it answers: it may have begun to just now."""
        if self._task is None and not self._over:
            self.listen()
        for _ in range(2):
            if not self._over:
                await asyncio.sleep(A_MOMENT)
        return not self.saw_it_leave

    async def _listen(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        finally:
            self._left()

    def _left(self) -> None:
        if not self._over:
            self._over = self.saw_it_leave = True
            self._leave()

    def _look(self, pace: Pace) -> None:
        left = pace.left()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look, pace)
        else:
            self._left()

    def end(self) -> None:
        self._over = True
        if self._task is not None:
            self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def check(self) -> None:
        """Raises what kept it from listening."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()


async def _with_a_group(receive: Receive, work: Callable[[], Awaitable[T]], pace: Pace | None) -> T:
    results: list[T] = []
    failure: BaseException | None = None
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def look(pace: Pace) -> None:
            left = pace.left()
            while left > 0:
                await anyio.sleep(left)
                left = pace.left()
            group.cancel_scope.cancel()

        group.start_soon(listen)
        if pace is not None:
            group.start_soon(look, pace)
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
    """As far as the server knows at this moment. The request's body has been read, and nobody else waits for `receive`. It has to say
    nothing for two moments: where the process had to wait for its turn, one may be over before `receive` was asked at all. One that took
    much longer does not count; there are `MOMENTS` at the most."""
    quiet = 0
    for _ in range(MOMENTS):
        began = monotonic()
        with anyio.move_on_after(A_MOMENT):
            message = await receive()
            return bool(message["type"] != "http.disconnect")
        quiet += monotonic() - began < 2 * A_MOMENT
        if quiet == 2:
            break
    return True
