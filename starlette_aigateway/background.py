"""Work that must finish though its caller leaves: a call at a provider, its settlement, the drain of a stream.

A job runs in a task of its own, so that neither a cancelled request nor a disconnected client can tear a read or a commit in two.
With a lifespan the gateway owns it and waits for it at the end. On a bare mount there is no such owner, so the request's own task
waits, shielded, until its work is over.

Code of a host's may swallow its cancellation. Then its job is given up: nobody waits for it any longer, and what it holds is settled if it
ever ends. Trio's task groups wait for their tasks in any case; there a shutdown, and a call on a bare mount, last as long as such code.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from types import TracebackType
from typing import Any, Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from .deadlines import Deadline, deadline
from .drains import Drains
from .errors import AIGatewayError, NoProviderAvailable, ProviderTimeout
from .wakeup import Latch, current_loop, running_asyncio_loop

GIVE_UP_SECONDS = 1.0
"""For work to end by itself, once its cancellation was due."""

log = logging.getLogger("starlette_aigateway")
T = TypeVar("T")
Work = Callable[["Job[T]"], Awaitable[T]]


class Job(Generic[T]):
    """One piece of owned work, for `limit` seconds at the most. `abandoned`: it is given a deadline to come to its end, and `patience`
    seconds more for what is not cancelled. `awaited` tells whether others than its caller wait for what it brings; then it goes on though
    that one leaves. `asks` is the provider that it waits for, and `given_up` is called when nobody waits for the job any longer."""

    def __init__(self, work: Work[T], drains: Drains, limit: float, patience: float) -> None:
        self._work = work
        self._drains = drains
        self._patience = patience
        self._deadline = deadline(limit, shield=True, passed=self._alarmed)
        self._last = monotonic() + limit + GIVE_UP_SECONDS
        self.asks: str | None = None
        self.given_up: Callable[[], None] = nothing
        self._done = Latch()
        self._known = Latch()
        self._value: T
        self._brought = False
        self._error: BaseException | None = None
        self.abandoned = False
        self.awaited: Callable[[], bool] = nobody
        self._owner: Owner | None = None
        self._tasks: set[asyncio.Task[None]]
        self._task: asyncio.Task[None] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, owner: Owner | None, tasks: set[asyncio.Task[None]]) -> None:
        """In a bare task, which costs a fifth of one in a task group. The job itself says when it is done."""
        self._owner, self._tasks = owner, tasks
        task = loop.create_task(self.run())
        if task.done():  # a loop of the host's that begins tasks at once
            return
        self._task = task
        tasks.add(task)
        if owner is not None:
            owner.jobs.add(self)
        task.add_done_callback(self._over)

    async def run(self) -> None:
        try:
            with self._deadline:
                self.tell(await self._work(self))
            if self._deadline.cancelled_caught:
                self._error = shut_down()
        except Exception as error:  # noqa: BLE001  # the error belongs to whoever waits; a task group must not die of it
            self._error = error
        except BaseException as error:
            self._error = shut_down()
            self._error.__cause__ = error
            raise
        finally:
            self.ended()

    def tell(self, value: T) -> None:
        """What its caller waits for is known: `value`. What is still to be done keeps nobody, and changes nothing of it."""
        if not self._known.is_set:
            self._value, self._brought = value, True
            self._known.set()

    def abandon(self) -> None:
        """Its caller has left. What has begun is ended within the grace that there is for it."""
        if not (self.abandoned or self.awaited()):
            self._end_within(self._drains.grace(self))

    def shut_down(self) -> None:
        """The gateway stops. Who still reads an answer has as long for it as a drain."""
        self._end_within(self._drains.seconds)

    def _end_within(self, seconds: float) -> None:
        self.abandoned = True
        self._deadline.within(seconds)
        self._last = min(self._last, monotonic() + seconds + self._patience + GIVE_UP_SECONDS)

    def give_up(self) -> None:
        """It has not ended though it was to: whoever waits is told so. It begins nothing new, and still settles what it has begun."""
        if self.done:
            return
        self.abandoned = True
        if self.asks is None:
            log.error("work of the gateway does not end; it is waited for no longer")
        else:
            log.error("the provider %s does not end when it is cancelled; it is waited for no longer", self.asks)
        self._error = unheard(self.asks)
        self.given_up()
        self._end()

    def _alarmed(self) -> None:
        """It is cancelled now; if it does not hear, it is given up."""
        asyncio.get_running_loop().call_later(max(0.0, self._last - monotonic()), self.give_up)

    def critical(self, seconds: float) -> Deadline:
        """For what has to be known to have happened or not: within, being abandoned cancels nothing, and it ends after `seconds` in any
        case."""
        return self._deadline.critical(seconds)

    def inner(self, seconds: float) -> Deadline:
        """For a block of its work that ends after `seconds`, or with the job before."""
        return self._deadline.inner(seconds)

    def ended(self) -> None:
        """The job's task is over, whether it ever ran or not."""
        task, self._task = self._task, None
        if task is not None:
            task.remove_done_callback(self._over)
            self._tasks.discard(task)
            if self._owner is not None:
                self._owner.jobs.discard(self)
        if self.abandoned:
            self._drains.ended(self)
        self._end()

    def _over(self, task: asyncio.Task[None]) -> None:
        """Of a task that was cancelled before it ran."""
        self.ended()

    async def left(self) -> None:
        """Nobody waits for what it brings any more; without an owner, its end is waited for here."""
        if not self.told:
            self.abandon()
        if self._owner is None:
            with anyio.CancelScope(shield=True):
                await self.finished_or_given_up()

    def _end(self) -> None:
        self._done.set()
        self._known.set()

    @property
    def done(self) -> bool:
        return self._done.is_set

    async def finished(self) -> None:
        await self._done.wait()

    async def finished_or_given_up(self) -> None:
        with anyio.move_on_after(max(0.0, self._last - monotonic())):
            await self._done.wait()
        self.give_up()

    @property
    def told(self) -> bool:
        """Whether nobody has to wait for it any longer."""
        return self._known.is_set

    async def result(self) -> T:
        if not self._known.is_set:
            await self._known.coming()
        if self._brought:
            return self._value
        assert self._error is not None, "work that brings nothing has failed"
        raise self._error


def nobody() -> bool:
    return False


def nothing() -> None:
    pass


def unheard(provider: str | None) -> AIGatewayError:
    return shut_down() if provider is None else ProviderTimeout(f"{provider} did not answer in time", billed="unknown")


def shut_down() -> NoProviderAvailable:
    return NoProviderAvailable("the gateway is shutting down; the call was given up", retryable=True, retry_after=1.0)


class Owner:
    """A lifespan in one event loop, and the jobs that were started within."""

    def __init__(self, group: TaskGroup) -> None:
        self.loop = current_loop()
        self.group = group
        self.jobs: set[Job[Any]] = set()


class Background:
    """Starts jobs, and knows who owns them. `drains` says how long work goes on after its caller left, and `patience` how many seconds
    more it may take to settle then."""

    def __init__(self, drains: Drains, *, patience: float = math.inf) -> None:
        self.drains = drains
        self._patience = patience
        self._owners: list[Owner] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[TaskGroup]:
        """Owns the jobs that are started within, in this event loop. At the end they get their grace, and are waited for."""
        left: BaseException | None = None
        async with anyio.create_task_group() as group:
            owner = Owner(group)
            self._owners.append(owner)
            try:
                yield group
            except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                left = error
            self._owners.remove(owner)
            with anyio.CancelScope(shield=True):
                for job in [*owner.jobs]:
                    job.shut_down()
                for job in [*owner.jobs]:
                    await job.finished_or_given_up()
        if left is not None:
            raise left

    @property
    def shared(self) -> bool:
        """Whether work may be shared between requests: there is an owner that outlives each of them."""
        return self._owner(current_loop()) is not None

    @property
    def movable(self) -> bool:
        """Whether the block of a job may be left by another task than the one that entered it: not where the job needs a task group of
        its own."""
        return self.shared or running_asyncio_loop() is not None

    def _owner(self, loop: object) -> Owner | None:
        for owner in reversed(self._owners):
            if owner.loop is loop:
                return owner
        return None

    def job(self, work: Work[T], limit: float) -> Job[T]:
        return Job(work, self.drains, limit, self._patience)

    async def run(self, work: Work[T], limit: float = math.inf) -> T:
        """Waits for `work`; if the wait is cancelled, the work goes on for its grace."""
        loop = running_asyncio_loop()
        if loop is None:
            async with self.start(work, limit) as job:
                return await job.result()
        job = self.job(work, limit)
        job.begin(loop, self._owner(loop), self._tasks)
        try:
            return await job.result()
        finally:
            if not job.done:
                await job.left()

    def start(self, work: Work[T], limit: float = math.inf) -> AbstractAsyncContextManager[Job[T]]:
        """Runs `work` beside the block, for `limit` seconds at most. When the block is left before the work is done, the job is
        abandoned; without an owner, leaving waits for it."""
        job = self.job(work, limit)
        loop = running_asyncio_loop()
        return _in_group(job, self._owner(current_loop())) if loop is None else InTask(job, loop, self._owner(loop), self._tasks)


class InTask(AbstractAsyncContextManager[Job[T]]):
    def __init__(self, job: Job[T], loop: asyncio.AbstractEventLoop, owner: Owner | None, tasks: set[asyncio.Task[None]]) -> None:
        self._job = job
        self._begin = loop, owner, tasks

    async def __aenter__(self) -> Job[T]:
        self._job.begin(*self._begin)
        return self._job

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._job.done:
            await self._job.left()


@asynccontextmanager
async def _in_group(job: Job[T], owner: Owner | None) -> AsyncIterator[Job[T]]:
    """A job in a task group: the owner's, or one of its own that is waited for."""
    if owner is not None:
        owner.jobs.add(job)
        owner.group.start_soon(_keep, job, owner)
        owner.group.start_soon(_watch, job)
        try:
            yield job
        finally:
            if not job.told:
                job.abandon()
        return
    left: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(job.run)
        group.start_soon(_watch, job)
        try:
            yield job
        except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
            left = error
        if not job.told:
            job.abandon()
    if left is not None:
        raise left


async def _keep(job: Job[Any], owner: Owner) -> None:
    try:
        await job.run()
    finally:
        owner.jobs.discard(job)


async def _watch(job: Job[Any]) -> None:
    with anyio.CancelScope(shield=True):
        await job.finished_or_given_up()
