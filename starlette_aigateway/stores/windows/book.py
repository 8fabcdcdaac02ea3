"""The windows as one batch of operations sees and changes them: at one moment, each operation after the ones before it."""

from __future__ import annotations

from collections.abc import Iterable

from ...policy.windows import Fixed, Window
from .states import UNBEGUN, Change, Correction, Count, Drop, Hit, State, SteppedBack, Windows


class Book:
    """`now` in Unix microseconds. `changes` is what the operations did, to be kept by whoever gave them the book."""

    __slots__ = ("_windows", "changes", "now")

    def __init__(self, windows: Windows, now: int) -> None:
        self._windows = windows
        self.now = now
        self.changes: list[Change] = []

    def state(self, window: Window) -> State:
        """As it is now."""
        state = self._windows.state(window)
        if self.now < self._windows.latest and self.now < state.latest:
            self._change(SteppedBack(window))
        return state

    def hit(self, window: Window, state: State, amount: int) -> None:
        """Lets `amount` into the window, whose `state` this is."""
        self._windows.sliding[window] = state
        state.add(amount, self.now)
        self.changes.append(Hit(window, amount))

    def correct(self, window: Window, delta: int, charged_at: int) -> None:
        self.state(window)
        self._change(Correction(window, delta, charged_at))

    def fixed(self, window: Window) -> Fixed:
        known = self._windows.fixed.get(window, UNBEGUN)
        seen = known.at(self.now)
        if 0 < seen.expires_at < known.expires_at:
            self._change(SteppedBack(window))
        return seen

    def count(self, window: Window, amount: int, lasting: int) -> int:
        self._change(Count(window, amount, lasting))
        return self._windows.fixed[window].value

    def forget(self, key: str | None, seconds: int | None) -> int:
        """All windows, or those of a key, or of these the sliding counter over `seconds`; gives how many."""
        gone = [window for window in self._windows if key is None or window.key == key]
        if seconds is not None:
            gone = [window for window in gone if window[1:] == ("sliding", seconds)]
        self._drop(gone)
        return len(gone)

    def _drop(self, windows: Iterable[Window]) -> None:
        for window in windows:
            self._change(Drop(window))

    def _change(self, change: Change) -> None:
        change.apply(self._windows, self.now)
        self.changes.append(change)
