"""All windows of one storage, in memory, and what changes them.

The same changes in the same order make the same windows in every process. Looking at a window changes nothing. Times are Unix
microseconds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import chain
from typing import TypeAlias

from msgspec import Struct

from ...policy.windows import Fixed, Sliding, Window, moving_wait

STALE = 32
"""Hits that have left an exact window, after which they are forgotten, if they are half of those that are kept."""


class Exact:
    """An exact window: the running total after each hit, and the moment of it. Moments never fall."""

    __slots__ = ("_moments", "_totals", "span")

    def __init__(self, span: int, totals: bytes = b"", moments: bytes = b"") -> None:
        self.span = span
        self._totals = array("q", totals)
        self._moments = array("q", moments)

    @property
    def latest(self) -> int:
        return self._moments[-1] if self._moments else 0

    def idle(self, now: int) -> bool:
        return self.latest + self.span <= now

    def used(self, now: int) -> int:
        """What came in less than a span ago."""
        totals = self._totals
        if not totals:
            return 0
        gone = bisect_right(self._moments, now - self.span)
        return totals[-1] - (totals[gone - 1] if gone else 0)

    def reset(self, now: int) -> int:
        """Microseconds after which nothing of it counts any more."""
        return moving_wait(self._moments[-1], now, self.span) if self._moments else 0

    def wait(self, room: int, now: int) -> int:
        """Microseconds until no more than `room` counts, which is less than what does now."""
        return moving_wait(self._moments[bisect_left(self._totals, self._totals[-1] - room)], now, self.span)

    def oldest(self, now: int) -> int:
        """When the oldest came in that still counts; there is one."""
        return self._moments[bisect_right(self._moments, now - self.span)]

    def add(self, amount: int, now: int) -> None:
        moments, totals = self._moments, self._totals
        if len(moments) >= 2 * STALE and moments[STALE] <= now - self.span:
            moments, totals = self._forget(now - self.span)
        total = (totals[-1] if totals else 0) + amount
        if moments and moments[-1] == now:
            totals[-1] = total
        else:
            moments.append(now)
            totals.append(total)

    def step_back(self, now: int) -> None:
        """After the clock was, nothing can have come in later than now: it counts for a whole window from now on."""
        moments = self._moments
        for number in range(bisect_right(moments, now), len(moments)):
            moments[number] = now

    def copy(self, window: Window) -> Change:
        return ExactCopy(window, self._totals.tobytes(), self._moments.tobytes())

    def _forget(self, until: int) -> tuple[array[int], array[int]]:
        """What came in by then. Running totals begin anew, so that they stay small."""
        gone = bisect_right(self._moments, until)
        if 2 * gone >= len(self._moments):
            before = self._totals[gone - 1]
            self._moments = self._moments[gone:]
            self._totals = array("q", [total - before for total in self._totals[gone:]])
        return self._moments, self._totals


class Counter:
    """A sliding counter."""

    __slots__ = ("_counter", "span")

    def __init__(self, span: int, counter: Sliding) -> None:
        self.span = span
        self._counter = counter

    @property
    def latest(self) -> int:
        return self._counter.bucket * self.span

    def idle(self, now: int) -> bool:
        return (self._counter.bucket + 2) * self.span <= now

    def at(self, now: int) -> Sliding:
        counter = self._counter
        return counter if now // self.span == counter.bucket else counter.at(now, self.span)

    def used(self, now: int) -> int:
        return self.at(now).used(now, self.span)

    def reset(self, now: int) -> int:
        return self.at(now).wait(0, now, self.span)

    def wait(self, room: int, now: int) -> int:
        return self.at(now).wait(room, now, self.span)

    def add(self, amount: int, now: int) -> None:
        self._counter = self.at(now).hit(amount)

    def correct(self, delta: int, charged_at: int, now: int) -> None:
        self._counter = self.at(now).adjusted(delta, charged_at // self.span)

    def step_back(self, now: int) -> None:
        self._counter = self.at(now)

    def copy(self, window: Window) -> Change:
        counter = self._counter
        return CounterCopy(window, counter.current, counter.previous, counter.bucket)


State: TypeAlias = Exact | Counter


class Windows:
    """`latest` is the last moment that anything is known of. `uncopied` are those of the log's older half that are not in the newer one
    yet."""

    def __init__(self) -> None:
        self.sliding: dict[Window, State] = {}
        self.fixed: dict[Window, Fixed] = {}
        self.latest = 0
        self.uncopied: dict[Window, None] = {}

    def __len__(self) -> int:
        return len(self.sliding) + len(self.fixed)

    def __iter__(self) -> Iterator[Window]:
        return chain(self.sliding, self.fixed)

    def state(self, window: Window) -> State:
        """One that knows nothing where there is none; it is kept once something changes it."""
        return self.sliding.get(window) or (Exact(window.span) if window.form == "moving" else Counter(window.span, Sliding()))

    def drop(self, window: Window) -> None:
        self.uncopied.pop(window, None)
        self.sliding.pop(window, None)
        self.fixed.pop(window, None)

    def idle(self, window: Window, now: int) -> bool:
        """Whether nothing in it counts any more."""
        state = self.sliding.get(window)
        return self.fixed[window].expires_at <= now if state is None else state.idle(now)

    def copy(self, window: Window, now: int) -> Change:
        """What makes this window anew wherever nothing is known of it, or drops it."""
        if self.idle(window, now):
            return Drop(window)
        state = self.sliding.get(window)
        if state is not None:
            return state.copy(window)
        fixed = self.fixed[window]
        return FixedCopy(window, fixed.value, fixed.expires_at, fixed.span)

    def put(self, window: Window, state: State) -> None:
        """One that was copied."""
        self.sliding[window] = state
        self.latest = max(self.latest, state.latest)
        self.uncopied.pop(window, None)


class Hit(Struct, frozen=True, gc=False, array_like=True, tag="h"):
    """`amount` was let in."""

    window: Window
    amount: int

    def apply(self, windows: Windows, now: int) -> None:
        window = self.window
        state = windows.sliding[window] = windows.state(window)
        state.add(self.amount, now)


class Correction(Struct, frozen=True, gc=False, array_like=True, tag="a"):
    window: Window
    delta: int
    charged_at: int

    def apply(self, windows: Windows, now: int) -> None:
        state = windows.state(self.window)
        if isinstance(state, Counter):
            windows.sliding[self.window] = state
            state.correct(self.delta, self.charged_at, now)


class Count(Struct, frozen=True, gc=False, array_like=True, tag="i"):
    """`amount` more in the fixed window, which lasts `lasting` microseconds from its first hit on."""

    window: Window
    amount: int
    lasting: int

    def apply(self, windows: Windows, now: int) -> None:
        windows.fixed[self.window] = windows.fixed.get(self.window, UNBEGUN).at(now).hit(self.amount, now, self.lasting)


class SteppedBack(Struct, frozen=True, gc=False, array_like=True, tag="b"):
    """The window was seen at a moment before what it knows."""

    window: Window

    def apply(self, windows: Windows, now: int) -> None:
        if self.window.form == "fixed":
            windows.fixed[self.window] = windows.fixed.get(self.window, UNBEGUN).at(now)
        else:
            windows.state(self.window).step_back(now)


class Drop(Struct, frozen=True, gc=False, array_like=True, tag="d"):
    window: Window

    def apply(self, windows: Windows, now: int) -> None:
        windows.drop(self.window)


class ExactCopy(Struct, frozen=True, gc=False, array_like=True, tag="m"):
    """`totals` and `moments` are 64-bit integers as this machine has them."""

    window: Window
    totals: bytes
    moments: bytes

    def apply(self, windows: Windows, now: int) -> None:
        windows.put(self.window, Exact(self.window.span, self.totals, self.moments))


class CounterCopy(Struct, frozen=True, gc=False, array_like=True, tag="s"):
    window: Window
    current: int
    previous: int
    bucket: int

    def apply(self, windows: Windows, now: int) -> None:
        windows.put(self.window, Counter(self.window.span, Sliding(self.current, self.previous, self.bucket)))


class FixedCopy(Struct, frozen=True, gc=False, array_like=True, tag="f"):
    window: Window
    value: int
    expires_at: int
    lasting: int

    def apply(self, windows: Windows, now: int) -> None:
        windows.fixed[self.window] = Fixed(self.value, self.expires_at, self.lasting)
        windows.uncopied.pop(self.window, None)


Change: TypeAlias = Hit | Correction | Count | SteppedBack | Drop | ExactCopy | CounterCopy | FixedCopy
UNBEGUN = Fixed()
