"""Sliding windows that all worker processes of a host share: a storage for `limits`, with verbs more."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

import anyio
from anyio.to_thread import run_sync
from limits.aio.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage

from ...errors import AIGatewayError, ConfigurationError, StorageUnavailable
from ...policy.windows import MICROSECONDS, Demand, Refusal, WindowClaim, WindowState, in_seconds
from ...protocols import Clock
from ..commit import GroupCommit
from .claims import acquisition, adjustment, demand, demands, fixed, named
from .ops import Acquire, Erase, Figures, Increment, Op, Outcome, Peek, Ping, Read, Verdict
from .turns import WindowFile

IN_MEMORY = Path(":memory:")


class FileWindowStorage(Storage, MovingWindowSupport, SlidingWindowCounterSupport):
    """Windows in the file `path`, for asyncio and trio, shared by all processes of the host, kept over restarts.

    `limits` makes it from `async+aigateway:////absolute/path` too. The directory of `path` has to be the gateway's own; the path
    `:memory:` keeps the windows in this process. `clock` gives Unix seconds and is read under the lock between processes, so that they
    agree on the order; `timeout` is the longest wait for that lock, in seconds. Opens nothing before the first verb. Every verb raises
    `StorageUnavailable` where the file cannot be written (`wrap_exceptions`: `limits`' `StorageError`), and `InvalidArgument` for a key
    that cannot be printed, an amount or a time that makes no sense.

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
        kept_in = None if self.path == IN_MEMORY else self.path
        self._commit = GroupCommit[Op, Outcome](WindowFile(path=kept_in, clock=clock, timeout=timeout))

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return StorageUnavailable

    async def __aenter__(self) -> FileWindowStorage:
        """Raises `ConfigurationError` for a file of a newer release. Whether calls go on without a file that cannot be opened is the
        limiter's to say."""
        try:
            with suppress(StorageUnavailable):
                await self._do(Ping())
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
        op = acquisition(claims)
        verdict = self._commit.now(op) or await self._commit.run(op)  # as `_judge`: each call comes here
        assert isinstance(verdict, Verdict)
        return _told(claims, verdict)

    async def probe(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState] | Refusal:
        """As `acquire_all` would answer now; takes nothing, and tells the windows as they are."""
        return _told(claims, await self._judge(acquisition(claims, taking=False)))

    async def peek(self, claims: Sequence[WindowClaim]) -> Sequence[WindowState]:
        """The windows of the claims as they are; takes nothing."""
        return _states(claims, await self._judge(Peek(demands(claims))))

    async def adjust(self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None) -> None:
        """Corrects windows of tokens, each by its delta, never below zero. Less is taken out of the bucket that was charged at
        `charged_at` (Unix seconds, None: the current one); more is charged now, whatever the limit."""
        await self._do(adjustment(deltas, charged_at))

    def adjust_soon(
        self, deltas: Sequence[tuple[WindowClaim, int]], *, charged_at: float | None = None, failed: Callable[[BaseException], None]
    ) -> None:
        """As `adjust`, which it does not wait for: whatever the same event loop asks for later finds the windows corrected. `failed` is
        called, from any thread, with what kept it from being done."""
        op = adjustment(deltas, charged_at)
        try:
            if self._commit.now(op) is None:
                self._commit.tell(op, failed)
        except AIGatewayError as error:
            failed(error)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Counts `amount` in the fixed window of `key`, which ends `expiry` seconds after its first hit; gives the count."""
        lasting = demand(named(key, "fixed", expiry), 0, amount).window.span
        (count,) = await self._figures(Increment(fixed(key), amount, lasting))
        return int(count)

    async def get(self, key: str) -> int:
        """The count of the fixed window of `key`."""
        return int((await self._figures(Read(fixed(key))))[0])

    async def get_expiry(self, key: str) -> float:
        """When the fixed window of `key` ends, in Unix seconds; now if there is none."""
        return (await self._figures(Read(fixed(key))))[1]

    async def check(self) -> bool:
        try:
            await self._do(Ping())
        except StorageUnavailable:
            return False
        return True

    async def reset(self) -> int | None:
        """Forgets everything; says how many windows that were."""
        (count,) = await self._figures(Erase())
        return int(count)

    async def clear(self, key: str) -> None:
        """Forgets every window of `key`."""
        await self._do(Erase(key))

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Lets `amount` into the exact window of `key`, if at most `limit` are in it then."""
        return await self._acquire(demand(named(key, "moving", expiry), limit, amount))

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest that still counts came in (Unix seconds, now if there is none), and how many count."""
        oldest, used = await self._figures(Read(named(key, "moving", expiry)))
        return oldest, int(used)

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Counts `amount` in the sliding counter of `key`, if the weighted count is at most `limit` then."""
        return await self._acquire(demand(named(key, "sliding", expiry), limit, amount))

    async def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Count and remaining seconds of the previous bucket, then of the current one (which counts for two spans)."""
        previous, previous_left, current, current_left = await self._figures(Read(named(key, "sliding", expiry)))
        return int(previous), previous_left, int(current), current_left

    async def clear_sliding_window(self, key: str, expiry: int) -> None:
        await self._do(Erase(key, expiry))

    async def _acquire(self, asked: Demand) -> bool:
        return (await self._judge(Acquire((asked,)))).blocked is None

    async def _judge(self, op: Acquire | Peek) -> Verdict:
        verdict = await self._do(op)
        assert isinstance(verdict, Verdict)
        return verdict

    async def _figures(self, op: Increment | Read | Erase) -> Figures:
        figures = await self._do(op)
        assert not isinstance(figures, Verdict)
        return figures

    async def _do(self, op: Op) -> Outcome:
        """At once, as a rule; after what came before it, and when others have had their turn."""
        outcome = self._commit.now(op)
        return await self._commit.run(op) if outcome is None else outcome


def _path_of(uri: str | None, path: Path | str | None) -> Path:
    """Four slashes begin an absolute path, three a relative one."""
    if path is not None:
        return Path(path)
    parts = urlsplit(uri or "")
    if parts.netloc or len(parts.path) < 2:
        raise ConfigurationError("the windows need a path: FileWindowStorage(path=...) or async+aigateway:////absolute/path")
    return Path(unquote(parts.path[1:]))


def _told(claims: Sequence[WindowClaim], verdict: Verdict) -> Sequence[WindowState] | Refusal:
    if verdict.blocked is None:
        return _states(claims, verdict)
    wait = None if verdict.wait is None else in_seconds(verdict.wait)
    return Refusal(claims[verdict.blocked], wait, _states(claims, verdict))


def _states(claims: Sequence[WindowClaim], verdict: Verdict) -> Sequence[WindowState]:
    return [WindowState(claim, usage.remaining, usage.reset / MICROSECONDS) for claim, usage in zip(claims, verdict.usages, strict=True)]
