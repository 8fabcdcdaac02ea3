"""What can be asked of the windows: values, each carried out on a book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from ...policy.windows import MICROSECONDS, Demand, Usage, Window
from .book import Book
from .states import Exact

Figures: TypeAlias = tuple[float, ...]


class Verdict(Struct, frozen=True, gc=False):
    """`usages` are in the order of the demands. Of a refusal, `blocked` is the position of the one that waits longest, and `wait` its
    microseconds, None for ever."""

    usages: Sequence[Usage]
    blocked: int | None = None
    wait: int | None = None


class Acquire(Struct, frozen=True, gc=False):
    """Without `taking`, only tells: the usages are then those before it."""

    demands: Sequence[Demand]
    taking: bool = True

    def apply(self, book: Book) -> Verdict:
        now, seen = book.now, []
        for demand in self.demands:
            state = book.state(demand.window)
            used = state.used(now)
            if used + demand.amount > demand.limit:
                return self._refuse(book)
            seen.append((demand, state, used))
        usages = []
        for demand, state, used in seen:
            if self.taking and demand.amount:
                used += demand.amount
                book.hit(demand.window, state, demand.amount)
            usages.append(Usage(demand.limit - used, state.reset(now) if used else 0))
        return Verdict(usages)

    def _refuse(self, book: Book) -> Verdict:
        usages = [_usage(book, demand) for demand in self.demands]
        waits: dict[int, int] = {}
        for position, demand in enumerate(self.demands):
            state, room = book.state(demand.window), demand.limit - demand.amount
            if state.used(book.now) > room:
                if room < 0:
                    return Verdict(usages, position, None)
                waits[position] = state.wait(room, book.now)
        longest = max(waits, key=lambda position: waits[position])
        return Verdict(usages, longest, waits[longest])


class Peek(Struct, frozen=True, gc=False):
    demands: Sequence[Demand]

    def apply(self, book: Book) -> Verdict:
        return Verdict([_usage(book, demand) for demand in self.demands])


def _usage(book: Book, demand: Demand) -> Usage:
    state = book.state(demand.window)
    used = state.used(book.now)
    return Usage(max(0, demand.limit - used), state.reset(book.now) if used else 0)


class Adjust(Struct, frozen=True, gc=False):
    """`charged_at` in microseconds; None is now."""

    corrections: Sequence[tuple[Window, int]]
    charged_at: int | None

    def apply(self, book: Book) -> Figures:
        charged_at = book.now if self.charged_at is None else self.charged_at
        for window, delta in self.corrections:
            book.correct(window, delta, charged_at)
        return ()


class Increment(Struct, frozen=True, gc=False):
    """Gives the count after it. The window lasts `lasting` microseconds from its first hit on."""

    window: Window
    amount: int
    lasting: int

    def apply(self, book: Book) -> Figures:
        return (book.count(self.window, self.amount, self.lasting),)


class Read(Struct, frozen=True, gc=False):
    """The figures of one window, as the verb of `limits` for its form gives them; times in seconds."""

    window: Window

    def apply(self, book: Book) -> Figures:
        window, now = self.window, book.now
        if window.form == "fixed":
            fixed = book.fixed(window)
            return (fixed.value, (fixed.expires_at if fixed.value else now) / MICROSECONDS)
        state = book.state(window)
        if isinstance(state, Exact):
            used = state.used(now)
            return ((state.oldest(now) if used else now) / MICROSECONDS, used)
        counter = state.at(now)
        left = (window.span - now % window.span) / MICROSECONDS
        return (counter.previous, left if counter.previous else 0.0, counter.current, left + window.seconds)


class Erase(Struct, frozen=True, gc=False):
    """Forgets everything, or all windows of a key, or of these the sliding one over `seconds`; gives how many windows that were. Looks
    at all that there are."""

    key: str | None = None
    seconds: int | None = None

    def apply(self, book: Book) -> Figures:
        return (book.forget(self.key, self.seconds),)


class Ping(Struct, frozen=True, gc=False):
    def apply(self, book: Book) -> Figures:
        return ()


Op: TypeAlias = Acquire | Peek | Adjust | Increment | Read | Erase | Ping
Outcome: TypeAlias = Verdict | Figures
