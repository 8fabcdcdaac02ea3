"""What `GroupCommit` writes to: a file, and the turns of one process at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from typing import Protocol, TypeVar

from ..errors import AIGatewayError, StorageUnavailable
from .lock_file import LockFile

Op = TypeVar("Op")
Result = TypeVar("Result")
Asked = TypeVar("Asked", contravariant=True)
Given = TypeVar("Given", covariant=True)

log = logging.getLogger("starlette_aigateway")


class Turns(Protocol[Asked, Given]):
    """Turns at one file, of one process; not for two threads at a time, but for `sync`."""

    lock: LockFile
    """Between processes."""

    @property
    def noted(self) -> bool:
        """Whether there is nothing that `note` would write down."""

    @property
    def full(self) -> bool:
        """Whether it is time for a `checkpoint`."""

    def turn(self, take: Callable[[], Sequence[Asked]]) -> Sequence[Given | BaseException]:
        """Waits for the lock, and carries out what there is to `take` by then. Raises what keeps all of it from being done."""

    def at_once(self, ops: Sequence[Asked]) -> Sequence[Given | BaseException] | None:
        """Carries out `ops` without any wait; None where that cannot be, and nothing was done. Raises as `turn`."""

    def sync(self) -> None:
        """Returns when everything lasts that was done before. Raises what `fail` is to be told."""

    def checkpoint(self) -> None: ...

    def note(self) -> None: ...

    def fail(self, error: Exception, count: int) -> Sequence[BaseException]:
        """What `count` waiters are told of a turn that raised. The next one opens everything anew."""

    def close(self) -> None: ...

    def close_for_fork(self) -> None:
        """Closes what a forked child must not share; the next turn opens it again, in the parent and in the child."""


class Store(Protocol[Asked, Given]):
    """A file that turns are taken at. What is `quick` waits for no disk: it may be written on an event loop. What `lasts_at_once` needs no
    `sync` after its turn."""

    @property
    def name(self) -> str: ...

    @property
    def quick(self) -> bool: ...

    @property
    def lasts_at_once(self) -> bool: ...

    def turns(self) -> Turns[Asked, Given]: ...


def told(name: str, error: Exception, count: int) -> Sequence[AIGatewayError]:
    """What each of `count` waiters is told of an `error` that all of them met."""
    log.error("the %s store failed: %s: %s", name, type(error).__name__, error)
    return [unavailable(name, error) for _ in range(count)]


def unavailable(name: str, error: Exception) -> AIGatewayError:
    """An error for one waiter alone: the gateway writes the request's id into it."""
    if isinstance(error, AIGatewayError):
        return copy(error)
    one = StorageUnavailable(f"the {name} store is unavailable", retry_after=1.0)
    one.__cause__ = error
    return one
