"""Group commit: whatever waits is carried out in one turn at a file, a transaction as a rule, one after the other, on the event loop or by
one writer thread per process and file.

Operations are values; every waiter learns its own result only when the turn lasts. So a batch costs one sync to the disk and few
statements, and since each SQLite statement gives up the interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the file: SQLite's own busy handler sleeps ever longer and starves its waiters
(seconds at four processes). What waits joins the batch until the moment the lock is ours.

The event loop carries out a batch itself, at the end of a pass or of a few, where nothing at all has to be waited for: two changes of
threads cost more than the batch. The thread does what waits: opening the file, locks of others, syncs to the disk. What comes meanwhile is
the next batch.
"""

from __future__ import annotations

import threading
from functools import partial
from time import monotonic
from typing import Generic

from ..process import THIS
from ..wakeup import wakeup
from .turns import Op, Result, Store
from .writer import Again, AtOnce, Failed, Waiter, Writer

PASSES = 16
"""Passes of its event loop that a batch of less than `Writer.ENOUGH` operations waits for more: after another one, and where the loop is
busy: several came at a time not long ago. Calls that come together stay together by that, and share their next batches, too."""
LONGEST = 0.005
"""Seconds of waiting after which `FEWEST` passes are enough: passes of a host's loop may be long."""
FEWEST = 3
CALM = 16
"""Single operations, one after the other, after which an event loop is taken to be busy no more."""
RECOUNT = 64
"""Operations carried out at once, after which a count that was asked for and never came is asked for again."""


class GroupCommit(Generic[Op, Result]):
    """`await commit.run(op)` applies `op` durably. Cancelling the wait does not cancel the operation: shield what has to know.

    Opens nothing before the first `run`, and opens anew in a forked child. Raises `StorageUnavailable` when the database cannot be
    written within the `timeout` of its `store`, and when it is not the file any more that was opened.
    """

    def __init__(self, store: Store[Op, Result]) -> None:
        self._store = store
        self._guard = threading.Lock()
        self._writer: Writer[Op, Result] | None = None
        self._ending: Writer[Op, Result] | None = None
        """One that a `close` waits for."""
        self._gathered: dict[int, list[Waiter[Op, Result]]] = {}
        self._busy = 0
        """Batches of one operation, or passes of an event loop with one, until it is calm."""
        self._came = 0
        THIS.call_in_child(self._forget_parent)

    async def run(self, op: Op) -> Result:
        waiter: Waiter[Op, Result] = Waiter(op, wakeup())
        self._gather(waiter)
        await waiter.wakeup.wait()
        outcome = waiter.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]  # set before the wakeup

    def now(self, op: Op) -> Result | None:
        """Applies `op` here and now, without any wait; None where that cannot be, and nothing was done: something came before it, or it is
        another process's turn. For a store that is quick and lasts at once. Raises as `run`."""
        writer = self._writer
        if writer is None or self._busy or self._gathered:
            return None
        outcome = writer.now(op)
        self._came += 1
        if self._came % RECOUNT == 1:  # again and again, should the loop of the first have ended before it was counted
            wakeup().soon(self._count)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _count(self) -> None:
        """At the end of a pass of the event loop in which something was applied at once."""
        self._notice(self._came)
        self._came = 0

    def _notice(self, operations: int) -> None:
        """Of a batch, or of a pass of the event loop."""
        self._busy = CALM if operations > 1 else max(0, self._busy - 1)

    def tell(self, op: Op, failed: Failed) -> None:
        """Applies `op` after what this event loop has asked for before it and before what it asks for later, and waits for nothing."""
        self._gather(Waiter(op, wakeup(), failed))

    def close(self) -> None:
        """Commits what is waiting and ends the thread. A later `run` starts a new one."""
        for loop in list(self._gathered):
            self._submit(loop)
        with self._guard:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.stop()
                self._ending = writer
        if writer is not None:
            writer.join()
            with self._guard:
                if self._ending is writer:
                    self._ending = None

    def _gather(self, waiter: Waiter[Op, Result]) -> None:
        """What one pass of the event loop brings is carried out together, and what a few bring where it is busy: each transaction costs
        as much as several operations. The thread is woken once, and begins with a batch."""
        loop = id(waiter.wakeup.loop)
        with self._guard:  # a `close` in another thread takes the others with this one or without it
            gathered = self._gathered.get(loop)
            if gathered is not None:
                gathered.append(waiter)
        if gathered is None:
            self._begin_with(waiter, loop)
        elif len(gathered) == Writer.ENOUGH:
            waiter.wakeup.soon(partial(self._end_pass, loop))

    def _begin_with(self, waiter: Waiter[Op, Result], loop: int) -> None:
        """The first one of a batch."""
        self._submit_stranded()
        self._gathered[loop] = [waiter]
        waiter.wakeup.soon(partial(self._wait_for_more if self._busy else self._end_pass, loop))

    def _end_pass(self, loop: int) -> None:
        """In the loop. What it carries out is taken from where a `close` in another thread would find it."""
        writer, waiters = self._writer, self._gathered.pop(loop, None)
        if not waiters:
            return
        self._notice(len(waiters))
        if writer is None or not self._store.quick:
            self._put(waiters)
            return
        try:
            became = writer.at_once(waiters, Again(waiters[0].wakeup, partial(self._wait_for_more, loop), partial(self._submit, loop)))
        except BaseException:  # the process is interrupted
            self._gathered[loop] = waiters
            raise
        if became is AtOnce.LATER:
            self._gathered[loop] = waiters
        elif became is AtOnce.THREAD:
            self._put(waiters)

    def _wait_for_more(self, loop: int) -> None:
        """Where the loop is busy, some passes make the next batch larger; where it is not, they take no time."""
        self._pass_by(loop, 0, monotonic() + LONGEST)

    def _pass_by(self, loop: int, passed: int, until: float) -> None:
        waiters = self._gathered.get(loop)
        if waiters and len(waiters) < Writer.ENOUGH and passed < PASSES and (passed < FEWEST or monotonic() < until):
            try:
                waiters[0].wakeup.soon(partial(self._pass_by, loop, passed + 1, until))
            except RuntimeError:  # the loop is about to end
                self._submit(loop)
        else:
            self._end_pass(loop)

    def _submit_stranded(self) -> None:
        """What other event loops brought that have ended since."""
        for loop, waiters in list(self._gathered.items()):
            try:
                waiters[0].wakeup.schedule(nothing)
            except RuntimeError:  # it is closed
                self._submit(loop)

    def _submit(self, loop: int) -> None:
        with self._guard:
            waiters = self._gathered.pop(loop, None)
        if waiters is not None:
            self._put(waiters)

    def _put(self, waiters: list[Waiter[Op, Result]]) -> None:
        with self._guard:
            if self._writer is None:
                self._writer = Writer(self._store, after=self._ending)
            self._writer.put(waiters)

    def _forget_parent(self) -> None:
        """In a forked child: the thread stayed behind."""
        self._writer = self._ending = None
        self._gathered = {}
        self._came = 0
        self._guard = threading.Lock()


def nothing() -> None:
    """For a loop that is asked whether it still runs."""
