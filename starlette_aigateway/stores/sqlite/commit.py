"""Group commit: one writer thread per process and file, which commits whatever is waiting as one transaction.

Operations are values. The thread takes all that wait, and hands them to one `apply` function inside `BEGIN IMMEDIATE` ... `COMMIT`;
every waiter learns its own result only after the commit. So a batch costs one sync to the disk and few statements, and since each
SQLite statement gives up the interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the database: SQLite's own busy handler sleeps ever longer and starves its waiters
(seconds at four processes). What waits joins the batch until the moment the lock is ours.

A file that waits for no disk is written on the event loop itself, at the end of a pass, where nothing at all has to be waited for: two
changes of threads cost more than such a batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic

from ...process import THIS
from ...wakeup import ring_all, wakeup
from .transactions import Op, Result, StoreFile, Transactions

Failed = Callable[[BaseException], None]
"""Hears, in whichever thread, what kept an operation from being carried out; must not raise."""

MAX_BATCH = 256
"""Operations after which a batch takes no more; what one pass of an event loop brings is never divided."""
MAX_AT_ONCE = 64
"""Operations that an event loop may carry out itself: about a millisecond."""
SLOW = 0.05
REST = 1.0
"""A batch that held up the event loop for longer than `SLOW` seconds is followed by `REST` seconds in which it carries out none."""

NOTE_AFTER = 0.25
"""Seconds without work, or `NOTE_AT_LAST` seconds with it, after which a witness notes how far the file has got."""

NOTE_AT_LAST = 1.0


class Waiter(Generic[Op, Result]):
    """One operation under way. Its outcome is read by the event loop after it is woken; or nobody waits for it, and `failed` is called
    where it was not carried out."""

    __slots__ = ("failed", "op", "outcome", "wakeup")

    def __init__(self, op: Op, failed: Failed | None = None) -> None:
        self.op = op
        self.failed = failed
        self.wakeup = wakeup()
        self.outcome: Result | BaseException | None = None


class GroupCommit(Generic[Op, Result]):
    """`await commit.run(op)` applies `op` durably. Cancelling the wait does not cancel the operation: shield what has to know.

    Opens nothing before the first `run`, and opens anew in a forked child. Raises `StorageUnavailable` when the database cannot be
    written within the `timeout` of its `store`, and when it is not the file any more that was opened.
    """

    def __init__(self, store: StoreFile[Op, Result]) -> None:
        self._store = store
        self._pid = THIS.pid
        self._guard = threading.Lock()
        self._writer: Writer[Op, Result] | None = None
        self._gathered: dict[int, list[Waiter[Op, Result]]] = {}

    async def run(self, op: Op) -> Result:
        waiter: Waiter[Op, Result] = Waiter(op)
        self._gather(waiter)
        await waiter.wakeup.wait()
        outcome = waiter.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]  # set before the wakeup

    def tell(self, op: Op, failed: Failed) -> None:
        """Applies `op` after what this event loop has asked for before it and before what it asks for later, and waits for nothing."""
        self._gather(Waiter(op, failed))

    def close(self) -> None:
        """Commits what is waiting and ends the thread. A later `run` starts a new one."""
        if self._pid != THIS.pid:
            return
        for loop in list(self._gathered):
            self._submit(loop)
        with self._guard:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.stop()
        if writer is not None:
            writer.join()

    def _gather(self, waiter: Waiter[Op, Result]) -> None:
        """What one pass of the event loop brings is carried out together: the thread is woken once, and begins with a batch."""
        if self._pid != THIS.pid:
            self._forget_parent()
        loop = id(waiter.wakeup.loop)
        gathered = self._gathered.get(loop)
        if gathered is None:
            self._gathered[loop] = [waiter]
            waiter.wakeup.soon(lambda: self._end_pass(loop))
        else:
            gathered.append(waiter)

    def _end_pass(self, loop: int) -> None:
        """In the loop."""
        writer = self._writer
        if writer is not None and self._store.quick:
            waiters = self._gathered.get(loop)
            if waiters is None or writer.at_once(waiters):
                self._gathered.pop(loop, None)
                return
        self._submit(loop)

    def _submit(self, loop: int) -> None:
        waiters = self._gathered.pop(loop, None)
        if waiters is None:
            return
        with self._guard:
            if self._writer is None:
                self._writer = Writer(self._store)
            self._writer.put(waiters)

    def _forget_parent(self) -> None:
        """In a forked child: the thread stayed behind, and the descriptor that came along must not keep the parent's lock alive."""
        writer, self._writer = self._writer, None
        self._gathered = {}
        self._guard = threading.Lock()
        self._pid = THIS.pid
        if writer is not None:
            writer.forget()


class Writer(Generic[Op, Result]):
    """The thread and its queue; whoever has the `_turn` may use its transactions. None in the queue ends it."""

    def __init__(self, store: StoreFile[Op, Result]) -> None:
        self._transactions = Transactions(store)
        self._turn = threading.Lock()
        self._queue: SimpleQueue[list[Waiter[Op, Result]] | None] = SimpleQueue()
        self._given = 0
        self._done = 0
        self._unnoted_since: float | None = None
        self._resting_until = 0.0
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name=f"aigateway-{store.name}", daemon=True)
        self._thread.start()

    def put(self, waiters: list[Waiter[Op, Result]]) -> None:
        """Not by two threads at a time."""
        self._given += len(waiters)
        self._queue.put(waiters)

    def stop(self) -> None:
        self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def forget(self) -> None:
        self._transactions.lock.close()

    def at_once(self, waiters: Sequence[Waiter[Op, Result]]) -> bool:
        """Carries them out on the thread of their event loop, which is woken, or says that they are the thread's: what was asked for before
        is still with it, they are many, or something would have to be waited for."""
        began = time.monotonic()
        if self._given != self._done or len(waiters) > MAX_AT_ONCE or began < self._resting_until:
            return False
        if not self._turn.acquire(blocking=False):
            return False
        try:
            outcomes = self._outcomes_at_once(waiters)
        finally:
            self._turn.release()
        ended = time.monotonic()
        if ended - began > SLOW:
            self._resting_until = ended + REST
        if outcomes is None:
            return False
        deliver(waiters, outcomes)
        for waiter in waiters:
            waiter.wakeup.ring()
        return True

    def _outcomes_at_once(self, waiters: Sequence[Waiter[Op, Result]]) -> Sequence[Result | BaseException] | None:
        try:
            return self._transactions.at_once([waiter.op for waiter in waiters])
        except Exception as error:  # noqa: BLE001  # as below
            return self._transactions.fail(error, len(waiters))

    def _work(self) -> None:
        try:
            while (batch := self._next()) is not None:
                with self._turn:
                    outcomes = self._outcomes(batch)
                deliver(batch, outcomes)
                self._done += len(batch)
                ring_all([waiter.wakeup for waiter in batch if waiter.failed is None])
                if self._stopped:
                    return
        finally:
            with self._turn:
                self._transactions.note()
                self._transactions.close()

    def _outcomes(self, batch: list[Waiter[Op, Result]]) -> Sequence[Result | BaseException]:
        """Of `batch` and all that came while the lock was awaited, which it appends."""
        try:
            outcomes = self._transactions.turn(lambda: self._take(batch))
        except Exception as error:  # noqa: BLE001  # the thread must outlive any fault; every waiter is told
            self._take(batch)
            return self._transactions.fail(error, len(batch))
        if self._unnoted_since is None and not self._transactions.noted:
            self._unnoted_since = time.monotonic()
        return outcomes

    def _next(self) -> list[Waiter[Op, Result]] | None:
        """The next batch. While none comes there is time to note how far the file has got; in the end it is taken."""
        if self._unnoted_since is not None:
            if time.monotonic() - self._unnoted_since >= NOTE_AT_LAST:
                self._note()
            try:
                return self._queue.get(timeout=NOTE_AFTER)
            except Empty:
                self._note()
        return self._queue.get()

    def _note(self) -> None:
        self._transactions.note()
        self._unnoted_since = None

    def _take(self, batch: list[Waiter[Op, Result]]) -> Sequence[Op]:
        while len(batch) < MAX_BATCH and self._queue.qsize():
            waiters = self._queue.get()
            if waiters is None:
                self._stopped = True
                break
            batch.extend(waiters)
        return [waiter.op for waiter in batch]


def deliver(batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
    for waiter, outcome in zip(batch, outcomes, strict=True):
        waiter.outcome = outcome
        if waiter.failed is not None and isinstance(outcome, BaseException):
            waiter.failed(outcome)
