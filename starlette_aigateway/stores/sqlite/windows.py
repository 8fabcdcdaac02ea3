"""Sliding windows in a small SQLite file that all worker processes of a host share: a storage for `limits`, with three verbs more.

`PRAGMA synchronous=OFF`: a window has to survive the death of a process, which WAL does, but not that of the machine. A file that the
machine's death left damaged is found when it is opened, and replaced by an empty one.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import anyio
from anyio.to_thread import run_sync
from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from msgspec import Struct

from ...errors import ConfigurationError, InvalidArgument, StorageUnavailable
from ...policy.windows import (
    MICROSECONDS,
    Demand,
    Form,
    Refusal,
    Usage,
    Window,
    WindowClaim,
    WindowKind,
    WindowState,
    in_seconds,
    microseconds,
    moving_wait,
    window_of,
)
from ...protocols import Clock
from ...types import MAX_WINDOW
from .commit import GroupCommit
from .connection import connect, prepare_directory
from .lock_file import LockFile
from .transactions import StoreFile
from .window_book import SCHEMA, Book, Need, Sweeper

log = logging.getLogger("starlette_aigateway")

IN_MEMORY = Path(":memory:")
LONGEST_SECONDS = 10**9


Figures: TypeAlias = "tuple[float, ...]"


class Verdict(Struct, frozen=True, gc=False):
    """`usages` are in the order of the demands. Of a refusal, `blocked` is the position of the one that waits longest, and `wait` its
    microseconds, None for ever."""

    usages: Sequence[Usage]
    blocked: int | None = None
    wait: int | None = None


class Pending(NamedTuple):
    """An outcome that still has to know some moments of hits; they are looked up for the whole batch at once."""

    needs: Sequence[Need]
    finish: Callable[[Sequence[int]], Verdict | Figures]


class Acquire(Struct, frozen=True, gc=False):
    """`windows` are those of the demands. Without `taking`, only tells: the usages are then those before it."""

    demands: Sequence[Demand]
    windows: Sequence[Window]
    taking: bool = True

    def apply(self, book: Book) -> Verdict | Pending:
        demands = self.demands
        for demand in demands:
            if not book.admits(demand):
                return self._refuse(book, [position for position, demand in enumerate(demands) if not book.admits(demand)])
        if self.taking:
            for demand in demands:
                book.hit(demand)
        return Verdict([book.usage(demand) for demand in demands])

    def _refuse(self, book: Book, blocked: Sequence[int]) -> Verdict | Pending:
        usages = [book.usage(demand) for demand in self.demands]
        waits: dict[int, int] = {}
        needs: dict[int, Need] = {}
        for position in blocked:
            demand = self.demands[position]
            window, limit, amount = demand.window, demand.limit, demand.amount
            if amount > limit:
                return Verdict(usages, position, None)
            if window.form == "moving":
                needs[position] = (window.key, window.seconds, book.moving(window).need(limit, amount))
            else:
                waits[position] = book.sliding(window).wait(limit - amount, book.now, window.span)

        def finish(moments: Sequence[int]) -> Verdict:
            for position, at in zip(needs, moments, strict=True):
                waits[position] = moving_wait(at, book.now, self.demands[position].window.span)
            longest = max(waits, key=lambda position: waits[position])
            return Verdict(usages, longest, waits[longest])

        return Pending(list(needs.values()), finish)


class Peek(Struct, frozen=True, gc=False):
    demands: Sequence[Demand]

    @property
    def windows(self) -> Sequence[Window]:
        return [demand.window for demand in self.demands]

    def apply(self, book: Book) -> Verdict:
        return Verdict([book.usage(demand) for demand in self.demands])


class Adjust(Struct, frozen=True, gc=False):
    """`charged_at` in microseconds; None is now."""

    windows: Sequence[Window]
    deltas: Sequence[int]
    charged_at: int | None

    def apply(self, book: Book) -> Figures:
        for window, delta in zip(self.windows, self.deltas, strict=True):
            book.adjust(window, delta, book.now if self.charged_at is None else self.charged_at)
        return ()


class Increment(NamedTuple):
    """Gives the count after it."""

    window: Window
    amount: int
    span: int

    @property
    def windows(self) -> Sequence[Window]:
        return (self.window,)

    def apply(self, book: Book) -> Figures:
        return (book.increment(self.window, self.amount, self.span),)


class Read(NamedTuple):
    """The figures of one window, as the verb of `limits` for its form gives them; times in seconds."""

    window: Window

    @property
    def windows(self) -> Sequence[Window]:
        return (self.window,)

    def apply(self, book: Book) -> Figures | Pending:
        window, now, span = self.window, book.now, self.window.span
        if window.form == "moving":
            state = book.moving(window)
            used = state.total - state.expired
            if not used:
                return (now / MICROSECONDS, 0)
            oldest = (window.key, window.seconds, state.expired + 1)
            return Pending([oldest], lambda moments: (moments[0] / MICROSECONDS, used))
        if window.form == "sliding":
            counter = book.sliding(window)
            left = (span - now % span) / MICROSECONDS
            return (counter.previous, left if counter.previous else 0.0, counter.current, left + window.seconds)
        fixed = book.fixed(window)
        return (fixed.value, (fixed.expires_at if fixed.value else now) / MICROSECONDS)


class Erase(NamedTuple):
    """Forgets everything, or all windows of a key, or of these the sliding one over `seconds`; gives how many windows that were."""

    key: str | None = None
    seconds: int | None = None

    def apply(self, connection: sqlite3.Connection) -> Figures:
        if self.key is None:
            connection.execute("DELETE FROM hits")
            return (connection.execute("DELETE FROM windows").rowcount,)
        if self.seconds is None:
            connection.execute("DELETE FROM hits WHERE key = ?", (self.key,))
            return (connection.execute("DELETE FROM windows WHERE key = ?", (self.key,)).rowcount,)
        place = (self.key, self.seconds)
        return (connection.execute("DELETE FROM windows WHERE key = ? AND form = 'sliding' AND seconds = ?", place).rowcount,)


class Ping(NamedTuple):
    def apply(self, connection: sqlite3.Connection) -> Figures:
        return ()


BookOp: TypeAlias = Acquire | Peek | Adjust | Increment | Read
DirectOp: TypeAlias = Erase | Ping
Op: TypeAlias = BookOp | DirectOp
DIRECT = (Erase, Ping)


class SQLiteWindowStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """Windows in the SQLite file `path`, for asyncio and trio, shared by all processes of the host, kept over restarts.

    `limits` makes it from `async+aigateway:////absolute/path` too. The directory of `path` has to be the gateway's own; the path
    `:memory:` keeps the windows in this process. `clock` gives Unix seconds and is read once for each batch, inside its transaction, so
    that the processes of a host agree on the order; `timeout` is the longest wait for the file, in seconds. Opens nothing before the
    first verb. Every verb raises `StorageUnavailable` where the file cannot be written (`wrap_exceptions`: `limits`' `StorageError`), and
    `InvalidArgument` for a key that cannot be printed, an amount or a time that makes no sense.

    Windows are exact and half-open: what came in at t counts in [t, t + seconds). Cancelling a verb does not undo it.
    """

    STORAGE_SCHEME = ["async+aigateway"]  # noqa: RUF012  # read by the metaclass of `limits`, which types it so

    def __init__(
        self,
        uri: str | None = None,
        wrap_exceptions: bool = False,
        *,
        path: Path | str | None = None,
        clock: Clock = time.time,
        timeout: float = 5.0,
    ) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)
        self.path = _path_of(uri, path)
        self._clock = clock
        self._timeout = timeout
        self._lock_path = None if self.path == IN_MEMORY else self.path.with_name(f"{self.path.name}.lock")
        self._sweeper = Sweeper()
        self._commit: GroupCommit[Op, Verdict | Figures] = GroupCommit(
            StoreFile(connect=self._open, apply=self._apply, name="window", lock_file=self._lock_path, timeout=timeout, quick=True)
        )

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return StorageUnavailable

    async def __aenter__(self) -> SQLiteWindowStorage:
        """Raises `ConfigurationError` for a file of a newer release. Whether calls go on without a file that cannot be opened is the
        limiter's to say."""
        try:
            with suppress(StorageUnavailable):
                await self._commit.run(Ping())
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            await run_sync(self.close)

    def close(self) -> None:
        """Closes the file. A later verb opens it again."""
        self._commit.close()

    async def acquire_all(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal:
        """Takes the windows of all claims in one transaction, or none of them. Raises `InvalidArgument` if two name the same window."""
        verdict = await self._commit.run(_acquisition(claims))
        assert isinstance(verdict, Verdict)
        return _outcome(claims, verdict)

    async def probe(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal:
        """As `acquire_all` would answer now; takes nothing, and tells the windows as they are."""
        return _outcome(claims, await self._judge(_acquisition(claims, taking=False)))

    async def peek(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]:
        """The windows of the claims as they are; takes nothing."""
        return _states(claims, await self._judge(Peek(_demands(claims))))

    async def adjust(self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None) -> None:
        """Corrects windows of tokens, each by its delta, never below zero. Less is taken out of the bucket that was charged at
        `charged_at` (Unix seconds, None: the current one); more is charged now, whatever the limit."""
        await self._commit.run(_adjustment(deltas, charged_at))

    def adjust_soon(
        self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None, failed: Callable[[BaseException], None]
    ) -> None:
        """As `adjust`, which it does not wait for: whatever the same event loop asks for later finds the windows corrected. `failed` is
        called from a thread with what kept it from being done."""
        self._commit.tell(_adjustment(deltas, charged_at), failed)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Counts `amount` in the fixed window of `key`, which ends `expiry` seconds after its first hit; gives the count."""
        _checked(Demand(Window(key, "fixed", expiry), 0, amount))
        (count,) = await self._figures(Increment(_fixed(key), amount, expiry * MICROSECONDS))
        return int(count)

    async def get(self, key: str) -> int:
        """The count of the fixed window of `key`."""
        return int((await self._figures(Read(_fixed(key))))[0])

    async def get_expiry(self, key: str) -> float:
        """When the fixed window of `key` ends, in Unix seconds; now if there is none."""
        return (await self._figures(Read(_fixed(key))))[1]

    async def check(self) -> bool:
        try:
            await self._commit.run(Ping())
        except StorageUnavailable:
            return False
        return True

    async def reset(self) -> int | None:
        """Forgets everything; says how many windows that were."""
        (count,) = await self._figures(Erase())
        return int(count)

    async def clear(self, key: str) -> None:
        """Forgets every window of `key`."""
        await self._commit.run(Erase(key))

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Lets `amount` into the exact window of `key`, if at most `limit` are in it then."""
        return await self._acquire(Demand(Window(key, "moving", expiry), limit, amount))

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest that still counts came in (Unix seconds, now if there is none), and how many count."""
        oldest, used = await self._figures(Read(_window(key, "moving", expiry)))
        return oldest, int(used)

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts `amount` in the sliding counter of `key`, if the weighted count is at most `limit` then."""
        return await self._acquire(Demand(Window(key, "sliding", expiry), limit, amount))

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Count and remaining seconds of the previous bucket, then of the current one (which counts for two spans)."""
        previous, previous_left, current, current_left = await self._figures(Read(_window(key, "sliding", expiry)))
        return int(previous), previous_left, int(current), current_left

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        await self._commit.run(Erase(key, expiry))

    async def _acquire(self, demand: Demand) -> bool:
        return (await self._judge(Acquire((_checked(demand),), (demand.window,)))).blocked is None

    async def _judge(self, op: Acquire | Peek) -> Verdict:
        verdict = await self._commit.run(op)
        assert isinstance(verdict, Verdict)
        return verdict

    async def _figures(self, op: Increment | Read | Erase) -> Figures:
        figures = await self._commit.run(op)
        assert not isinstance(figures, Verdict)
        return figures

    def _apply(self, connection: sqlite3.Connection, ops: Sequence[Op]) -> Sequence[Verdict | Figures]:
        now = microseconds(self._clock())
        results: list[Verdict | Figures] = []
        for direct, group in groupby(ops, key=_is_direct):
            if direct:
                results.extend(op.apply(connection) for op in group if isinstance(op, Erase | Ping))
            else:
                results.extend(self._apply_to_book(connection, cast("list[BookOp]", [*group]), now))
        return results

    def _apply_to_book(self, connection: sqlite3.Connection, ops: Sequence[BookOp], now: int) -> Sequence[Verdict | Figures]:
        windows = list({window for op in ops for window in op.windows})
        book = Book(connection, windows, now)
        outcomes = [op.apply(book) for op in ops]
        book.save()
        moments = iter(book.moments([need for outcome in outcomes if isinstance(outcome, Pending) for need in outcome.needs]))
        self._sweeper.sweep(connection, len(windows), now)
        return [outcome.finish([next(moments) for _ in outcome.needs]) if isinstance(outcome, Pending) else outcome for outcome in outcomes]

    def _open(self) -> sqlite3.Connection:
        if self.path == IN_MEMORY:
            return self._connect()
        prepare_directory(self.path.parent)
        lock = LockFile(self._lock_path, "window", self._timeout)
        try:
            with lock:
                return self._open_or_replace()
        finally:
            lock.close()

    def _open_or_replace(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except StorageUnavailable as error:
            if type(error.__cause__) is not sqlite3.DatabaseError:  # its subclasses: locked, disk full, not permitted
                raise
        log.warning("the window store %s was damaged; the windows begin anew", self.path.name)
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self.path, durability="OFF", schema=SCHEMA, busy_timeout=self._timeout)
        try:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
        except sqlite3.Error as error:
            connection.close()
            raise StorageUnavailable(f"the database {self.path.name} is damaged") from error
        return connection


def _is_direct(op: Op) -> bool:
    return isinstance(op, DIRECT)


def _path_of(uri: str | None, path: Path | str | None) -> Path:
    """Four slashes begin an absolute path, three a relative one."""
    if path is not None:
        return Path(path)
    parts = urlsplit(uri or "")
    if parts.netloc or len(parts.path) < 2:
        raise ConfigurationError("the windows need a path: SQLiteWindowStorage(path=...) or async+aigateway:////absolute/path")
    return Path(unquote(parts.path[1:]))


def _window(key: str, form: Form, seconds: int) -> Window:
    return _named(Window(key, form, seconds))


def _checked(demand: Demand) -> Demand:
    _named(demand.window)
    if not 0 <= demand.amount <= MAX_WINDOW:
        raise InvalidArgument(f"an amount has to be between 0 and {MAX_WINDOW}", param="amount")
    return demand


def _named(window: Window) -> Window:
    if not window.key.isprintable():
        raise InvalidArgument("the key of a window has to be printable", param="key")
    if not 1 <= window.seconds <= LONGEST_SECONDS:
        raise InvalidArgument(f"a window has to be 1 to {LONGEST_SECONDS} seconds long", param="seconds")
    return window


@lru_cache(maxsize=4096)
def _claimed(scope: str, kind: WindowKind, seconds: int) -> Window:
    return _named(window_of(scope, kind, seconds))


def _fixed(key: str) -> Window:
    """There is one for each key: `limits` asks for its count without saying how long it is."""
    return _window(key, "fixed", 1)


def _demands(claims: Sequence[WindowClaim]) -> Sequence[Demand]:
    demands: list[Demand] = []
    for claim in claims:
        window = _claimed(claim.scope, claim.kind, claim.seconds)
        if not 0 <= claim.amount <= MAX_WINDOW:
            raise InvalidArgument(f"an amount has to be between 0 and {MAX_WINDOW}", param="amount")
        demands.append(Demand(window, claim.limit, claim.amount))
    if len(demands) > 1 and len({demand.window for demand in demands}) != len(demands):
        raise InvalidArgument("two claims name the same window", param="claims")
    return demands


def _acquisition(claims: Sequence[WindowClaim], *, taking: bool = True) -> Acquire:
    demands = _demands(claims)
    return Acquire(demands, [demand.window for demand in demands], taking)


def _adjustment(deltas: Sequence[tuple[WindowClaim, int]], charged_at: float | None) -> Adjust:
    windows = [_claimed(claim.scope, claim.kind, claim.seconds) for claim, _ in deltas]
    if any(window.form != "sliding" for window in windows):
        raise InvalidArgument("only windows of tokens can be corrected", param="deltas")
    amounts = [max(-MAX_WINDOW, min(delta, MAX_WINDOW)) for _, delta in deltas]
    return Adjust(windows, amounts, None if charged_at is None else microseconds(charged_at))


def _outcome(claims: Sequence[WindowClaim], verdict: Verdict) -> Sequence[WindowState] | Refusal:
    if verdict.blocked is None:
        return _states(claims, verdict)
    wait = None if verdict.wait is None else in_seconds(verdict.wait)
    return Refusal(claims[verdict.blocked], wait, _states(claims, verdict))


def _states(claims: Sequence[WindowClaim], verdict: Verdict) -> Sequence[WindowState]:
    return [WindowState(claim, usage.remaining, usage.reset / MICROSECONDS) for claim, usage in zip(claims, verdict.usages, strict=True)]
