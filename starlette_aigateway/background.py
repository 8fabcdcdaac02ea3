"""Work that must finish though its caller leaves: a call at a provider, its settlement, the drain of a stream.

With a lifespan, the gateway's one task group owns it. On a bare mount there is no such owner, so the request's own task does: it
waits, shielded, until its work is over. Either way a job runs in a task of its own, so that neither a cancelled request nor a
disconnected client can tear a read or a commit in two.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token

from .errors import NoProviderAvailable

T = TypeVar("T")
Work = Callable[["Job[T]"], Awaitable[T]]


class Job(Generic[T]):
    """One piece of owned work. `abandon` tells it that nobody waits any more and gives it a deadline to come to its end."""

    def __init__(self, work: Work[T], grace: float) -> None:
        self._work = work
        self._grace = grace
        self._scope = anyio.CancelScope(shield=True)
        self._done = anyio.Event()
        self._value: T
        self._error: BaseException | None = None
        self.abandoned = False

    async def run(self) -> None:
        try:
            with self._scope:
                self._value = await self._work(self)
            if self._scope.cancelled_caught:
                self._error = shut_down()
        except Exception as error:  # noqa: BLE001  # the error belongs to whoever waits; a task group must not die of it
            self._error = error
        except BaseException as error:
            self._error = shut_down()
            self._error.__cause__ = error
            raise
        finally:
            self._done.set()

    def abandon(self, grace: float | None = None) -> None:
        """Nobody waits for the result. What has begun is ended within `grace` seconds (the default is the job's)."""
        self.abandoned = True
        deadline = anyio.current_time() + (self._grace if grace is None else grace)
        self._scope.deadline = min(self._scope.deadline, deadline)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    async def finished(self) -> None:
        await self._done.wait()

    async def result(self) -> T:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value


def shut_down() -> NoProviderAvailable:
    return NoProviderAvailable("the gateway is shutting down; the call was given up", retryable=True, retry_after=1.0)


class Owner:
    """A task group in one event loop, and the jobs that run in it."""

    def __init__(self, group: TaskGroup) -> None:
        self.token = current_token()
        self._group = group
        self._jobs: set[Job[Any]] = set()

    def start(self, job: Job[Any]) -> None:
        self._jobs.add(job)
        self._group.start_soon(self._keep, job)

    def abandon(self) -> None:
        for job in self._jobs:
            job.abandon()

    async def _keep(self, job: Job[Any]) -> None:
        try:
            await job.run()
        finally:
            self._jobs.discard(job)


class Background:
    """Starts jobs, and knows who owns them. `grace` is in seconds: how long work goes on after its caller left."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._owners: list[Owner] = []

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
            owner.abandon()
        if left is not None:
            raise left

    @property
    def shared(self) -> bool:
        """Whether work may be shared between requests: there is an owner that outlives each of them."""
        return self._owner() is not None

    def _owner(self) -> Owner | None:
        if not self._owners:
            return None
        token = current_token()
        return next((owner for owner in reversed(self._owners) if owner.token == token), None)

    async def run(self, work: Work[T]) -> T:
        """Waits for `work`; if the wait is cancelled, the work goes on for its grace."""
        async with self.start(work) as job:
            return await job.result()

    @asynccontextmanager
    async def start(self, work: Work[T]) -> AsyncIterator[Job[T]]:
        """Runs `work` beside the block. When the block is left before the work is done, the job is abandoned; without an owner, leaving
        waits for it."""
        job = Job(work, self._grace)
        owner = self._owner()
        if owner is not None:
            owner.start(job)
            try:
                yield job
            finally:
                if not job.done:
                    job.abandon()
            return
        left: BaseException | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(job.run)
            try:
                yield job
            except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                left = error
            if not job.done:
                job.abandon()
        if left is not None:
            raise left
