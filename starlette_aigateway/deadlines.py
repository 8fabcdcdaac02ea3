"""Blocks of a task that are cancelled at their deadline, as cheaply as the event loop allows: there are four in each call.

On asyncio that is `Task.cancel`, as in `asyncio.timeout`, by one timer for all of them, for a tenth of what scopes of anyio's cost.
Everywhere else it is anyio's scope. Both are entered by `with`, swallow their own cancellation, and go on cancelling a block that does
not hear.
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

GLANCE = 5.0
CLOCK_STEP = 0.001
"""Seconds by which a loop's timers may come too early."""


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
        """For a block within, which no deadline around it cancels. What has passed by then cancels when that block is over."""

    def inner(self, seconds: float) -> Deadline:
        """For a block within, which this one cancels as well."""


def deadline(seconds: float, *, shield: bool = False, passed: Callable[[], None] | None = None) -> Deadline:
    """For the event loop that runs now; `seconds` count from here. With `shield`, scopes of anyio's around the block do not cancel it.
    On asyncio, `passed` is called when it passes, also where it cancels nothing for the time being."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # not asyncio
        return ScopeDeadline(seconds, shield)
    return TaskDeadline(Alarm(loop), monotonic() + seconds, False, passed)


class Alarm:
    """The one timer of a task, for all deadlines around the block that runs in it, of which `innermost` was entered last. It rings when the
    first of them passes, or before, and looks which have. A timer costs more than everything else here, and hardly any is needed: so it
    first looks after `GLANCE` seconds, before most deadlines and after the end of most calls."""

    __slots__ = ("_loop", "_timer", "innermost", "overdue", "rings_at", "task")

    task: asyncio.Task[object]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self.rings_at = math.inf
        self.innermost: TaskDeadline | None = None
        self.overdue = False

    def begin(self, at: float) -> None:
        """With the outermost deadline, which passes at `at`."""
        task = asyncio.current_task(self._loop)
        assert task is not None, "a block has a task to cancel"
        self.task = task
        if at < math.inf:
            glance = monotonic() + GLANCE
            self.ring_by(at if at < glance else glance)

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def ring_by(self, at: float) -> None:
        if at < self.rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self.rings_at = at
            left = at - monotonic()
            self._timer = self._loop.call_later(left if left > 0.0 else 0.0, self._ring)

    def _ring(self) -> None:
        """Called by the loop, so that the task stands at an await and is cancelled there."""
        self._timer, self.rings_at = None, math.inf
        now, held, first = monotonic() + CLOCK_STEP, False, math.inf
        one = self.innermost
        while one is not None:
            if one.at <= now:
                self.overdue = one.passes(held) or self.overdue
            if one.at > now:
                first = min(first, one.at)
            held = held or one.is_critical
            one = one.outer
        if first < math.inf:
            self.ring_by(first)


class TaskDeadline:
    """On asyncio, for a task of the gateway's own, which has no scope around it. Made anywhere, entered in the task that it cancels.
    `at` is on the monotonic clock; `outer` is the deadline around it whose alarm it shares."""

    __slots__ = ("_alarm", "_before", "_fired", "_passed", "at", "cancelled_caught", "entered", "is_critical", "outer")

    _before: int
    """Cancellations of the task that were under way when it was entered."""

    outer: TaskDeadline | None

    def __init__(self, alarm: Alarm, at: float, is_critical: bool = False, passed: Callable[[], None] | None = None) -> None:
        self._alarm = alarm
        self._passed = passed
        self._fired = 0
        self.at = at
        self.is_critical = is_critical
        self.entered = False
        self.cancelled_caught = False

    @property
    def cancel_called(self) -> bool:
        return self._fired > 0

    def __enter__(self) -> Self:
        alarm, at = self._alarm, self.at
        self.outer = outer = alarm.innermost
        alarm.innermost = self
        if outer is None:
            alarm.begin(at)
        elif at < alarm.rings_at:
            alarm.ring_by(at)
        self._before = alarm.task.cancelling()
        self.entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        alarm = self._alarm
        alarm.innermost = outer = self.outer
        self.outer = None
        self.entered = False
        self._passed = None  # it may be of an object that has this deadline
        if outer is None:
            alarm.end()
        elif alarm.overdue and self.is_critical:
            alarm.overdue = False
            alarm.ring_by(0.0)
        if not self._fired:
            return False
        task = alarm.task
        for _ in range(self._fired):
            task.uncancel()
        self.cancelled_caught = isinstance(error, asyncio.CancelledError) and task.cancelling() <= self._before
        return self.cancelled_caught

    def within(self, seconds: float) -> None:
        if monotonic() + seconds < self.at:
            self.anew(seconds)

    def anew(self, seconds: float) -> None:
        if self._fired:
            return
        self.at = monotonic() + seconds
        if self.entered:
            self._alarm.ring_by(self.at)

    def critical(self, seconds: float) -> TaskDeadline:
        return TaskDeadline(self._alarm, monotonic() + seconds, True)

    def inner(self, seconds: float) -> TaskDeadline:
        return TaskDeadline(self._alarm, monotonic() + seconds)

    def passes(self, held: bool) -> bool:
        """Cancels, and does so again until the block has heard; or, while it is `held` by what is critical, has yet to: True."""
        if self._passed is not None:
            self._passed()
            self._passed = None
        if not held:
            self._fired += 1
            self._alarm.task.cancel()
            self.at = monotonic() + AGAIN_SECONDS
        return held


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

    def inner(self, seconds: float) -> ScopeDeadline:
        return ScopeDeadline(seconds, shield=False)
