"""Blocks of a task that are cancelled at their deadline, as cheaply as the event loop allows: there are four in each call.

On asyncio that is a timer and `Task.cancel`, as in `asyncio.timeout`, for a tenth of what a scope of anyio's costs. Everywhere else it is
anyio's scope. Both are entered by `with`, swallow their own cancellation, and go on cancelling a block that does not hear.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

import anyio

AGAIN_SECONDS = 0.5
"""Until a block that swallowed its cancellation is cancelled again; what closes a connection meanwhile has that long for it."""


class Deadline(Protocol):
    """`cancel_called`: it has passed while the block ran. `cancelled_caught`: the block was cut off by it."""

    @property
    def cancel_called(self) -> bool: ...

    @property
    def cancelled_caught(self) -> bool: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool: ...

    def within(self, seconds: float) -> None:
        """It passes in `seconds` at the latest. From any task of the same event loop."""

    def anew(self, seconds: float) -> None:
        """It passes in `seconds`, whenever it was to before."""

    def critical(self, seconds: float) -> Deadline:
        """For a block within, which this one does not cancel. What has passed by then cancels when that block is over."""


def deadline(seconds: float, *, shield: bool = False, passed: Callable[[], None] | None = None) -> Deadline:
    """For the event loop that runs now; `seconds` count from here. With `shield`, scopes of anyio's around the block do not cancel it.
    On asyncio, `passed` is called when it passes, also where it cancels nothing for the time being."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return ScopeDeadline(seconds, shield)
    return TaskDeadline(loop, seconds, passed=passed)


class TaskDeadline:
    """On asyncio, for a task of the gateway's own, which has no scope around it. Made anywhere, entered in the task that it cancels."""

    __slots__ = (
        "_around", "_at", "_before", "_due", "_fired", "_innermost", "_loop", "_passed", "_shielded", "_task", "_timer",
        "cancelled_caught", "held",
    )  # fmt: skip

    _before: int
    _shielded: TaskDeadline

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        *,
        around: TaskDeadline | None = None,
        passed: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._at = monotonic() + seconds
        self._around = around
        self._passed = passed
        self._innermost: TaskDeadline | None = None  # this one: no cycle for the garbage collector
        self.held = False
        self._due = False
        self._fired = 0
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.cancelled_caught = False

    @property
    def cancel_called(self) -> bool:
        return self._fired > 0

    def __enter__(self) -> Self:
        around = self._around
        if around is None:
            task = asyncio.current_task(self._loop)
        else:
            task = around._task  # noqa: SLF001  # one of its own kind
            self._shielded = around.shield(self)
        assert task is not None, "a block has a task to cancel"
        self._task = task
        self._before = task.cancelling()
        if self._at < math.inf:
            self._timer = self._loop.call_later(self._at - monotonic(), self._fire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        task, self._task = self._task, None
        self._passed = None  # it may be of an object that has this deadline
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._around is not None:
            self._around.unshield(self._shielded)
        if not self._fired:
            return False
        assert task is not None
        for _ in range(self._fired):
            task.uncancel()
        self.cancelled_caught = isinstance(error, asyncio.CancelledError) and task.cancelling() <= self._before
        return self.cancelled_caught

    def within(self, seconds: float) -> None:
        if monotonic() + seconds < self._at:
            self.anew(seconds)

    def anew(self, seconds: float) -> None:
        self._at = monotonic() + seconds
        self._due = False
        if self._task is not None and not self._fired:
            self._arm()

    def critical(self, seconds: float) -> TaskDeadline:
        return TaskDeadline(self._loop, seconds, around=self)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, self._at - monotonic()), self._fire)

    def _fire(self) -> None:
        """Called by the loop, so that the task stands at an await and is cancelled there."""
        self._timer = None
        if self._task is None:
            return
        if self._passed is not None:
            self._passed()
            self._passed = None
        if self.held:
            self._due = True
            return
        self._fired += 1
        self._task.cancel()
        self._timer = self._loop.call_later(AGAIN_SECONDS, self._fire)

    def shield(self, critical: TaskDeadline) -> TaskDeadline:
        """From now on only `critical` cancels. Gives the one that did so until now, which may be a critical one itself."""
        before, self._innermost = self._innermost or self, critical
        before.held = True
        return before

    def unshield(self, before: TaskDeadline) -> None:
        self._innermost = None if before is self else before
        before.release()

    def release(self) -> None:
        self.held = False
        if self._due:
            self._due = False
            self._at = 0.0
            self._arm()


class ScopeDeadline:
    """Where anyio does it."""

    def __init__(self, seconds: float, shield: bool) -> None:
        self._scope = anyio.CancelScope(deadline=anyio.current_time() + seconds, shield=shield)

    @property
    def cancel_called(self) -> bool:
        return self._scope.cancel_called

    @property
    def cancelled_caught(self) -> bool:
        return self._scope.cancelled_caught

    def __enter__(self) -> Self:
        self._scope.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        return bool(self._scope.__exit__(kind, error, trace))

    def within(self, seconds: float) -> None:
        self._scope.deadline = min(self._scope.deadline, anyio.current_time() + seconds)

    def anew(self, seconds: float) -> None:
        self._scope.deadline = anyio.current_time() + seconds

    def critical(self, seconds: float) -> ScopeDeadline:
        return ScopeDeadline(seconds, shield=True)
