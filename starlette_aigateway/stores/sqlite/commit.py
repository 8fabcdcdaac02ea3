"""Group commit: whatever waits is committed as one transaction, one after the other, on the event loop or by one writer thread per
process and file.

Operations are values. All that wait are handed to one `apply` function inside `BEGIN IMMEDIATE` ... `COMMIT`; every waiter learns its own
result only when the commit lasts. So a batch costs one sync to the disk and few statements, and since each SQLite statement gives up the
interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the database: SQLite's own busy handler sleeps ever longer and starves its waiters
(seconds at four processes). What waits joins the batch until the moment the lock is ours.

The event loop carries out a batch itself, at the end of a pass, where nothing at all has to be waited for: two changes of threads cost more
than the batch. The thread does what waits: opening the file, locks of others, syncs to the disk. What comes meanwhile is the next batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple

from ...process import THIS
from ...wakeup import Wakeup, ring_all, wakeup
from .transactions import Op, Result, StoreFile, Transactions

Failed = Callable[[BaseException], None]
"""Hears, in whichever thread, what kept an operation from being carried out; must not raise."""

MAX_BATCH = 256
"""Operations after which a batch takes no more; what one pass of an event loop brings is never divided."""
MAX_AT_ONCE = 128
"""Operations that an event loop may carry out itself: a millisecond or two."""
ENOUGH = 32
PASSES = 3
"""Passes of its event loop that a batch of less than `ENOUGH` operations waits for more, where another one was under way."""
SLOW = 0.05
REST = 1.0
"""A batch that held up the event loop for longer than `SLOW` seconds is followed by `REST` seconds in which it carries out none."""

NOTE_AFTER = 0.25
"""Seconds without work, or `NOTE_AT_LAST` seconds with it, after which a witness notes how far the file has got."""

NOTE_AT_LAST = 1.0
log = logging.getLogger("starlette_aigateway")


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
        writer, waiters = self._writer, self._gathered.get(loop)
        if not waiters:
            return
        if writer is not None and self._store.quick:
            match writer.at_once(waiters, Again(waiters[0].wakeup, lambda: self._pass_by(loop, PASSES), lambda: self._submit(loop))):
                case AtOnce.LATER:
                    return
                case AtOnce.DONE:
                    del self._gathered[loop]
                    return
        self._submit(loop)

    def _pass_by(self, loop: int, passes: int) -> None:
        """Where the loop is busy, a few passes make the next batch larger; where it is not, they take no time."""
        waiters = self._gathered.get(loop)
        if waiters and passes and len(waiters) < ENOUGH:
            waiters[0].wakeup.soon(lambda: self._pass_by(loop, passes - 1))
        else:
            self._end_pass(loop)

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


class Again(NamedTuple):
    """What goes on when a batch is over: `begin`, in the event loop of `wakeup`; `closed` where that one is."""

    wakeup: Wakeup
    begin: Callable[[], None]
    closed: Callable[[], None]


def begin_again(those: Sequence[Again]) -> None:
    for one in those:
        try:
            one.wakeup.schedule(one.begin)
        except RuntimeError:
            log.debug("the event loop of a batch is closed")
            one.closed()


class AtOnce(Enum):
    """What became of a batch that an event loop wanted to carry out itself: done; to be asked again when the one that runs is over; or it
    is the thread's, which something has to be waited for by."""

    DONE = auto()
    LATER = auto()
    THREAD = auto()


class Stage(Enum):
    """Where the one batch is that is under way: nowhere; with the thread, which takes whatever comes along until it has the lock; or past
    that, on either thread."""

    IDLE = auto()
    OPEN = auto()
    CLOSED = auto()


class Committed(NamedTuple, Generic[Op, Result]):
    """A batch that lasts once it is synced."""

    batch: Sequence[Waiter[Op, Result]]
    outcomes: Sequence[Result | BaseException]


class Writer(Generic[Op, Result]):
    """The thread and its queue; whoever has the `_turn` may use its transactions. None in the queue ends it."""

    def __init__(self, store: StoreFile[Op, Result]) -> None:
        self._transactions = Transactions(store)
        self._lasts_at_once = store.write_ahead_log is None
        self._turn = threading.Lock()
        self._queue: SimpleQueue[list[Waiter[Op, Result]] | Committed[Op, Result] | None] = SimpleQueue()
        self._guard = threading.Lock()
        self._stage = Stage.IDLE
        self._again: dict[int, Again] = {}
        self._unnoted_since: float | None = None
        self._resting_until = 0.0
        self._stopping = self._stopped = False
        self._thread = threading.Thread(target=self._work, name=f"aigateway-{store.name}", daemon=True)
        self._thread.start()

    def put(self, waiters: list[Waiter[Op, Result]]) -> None:
        with self._guard:
            if self._stage is Stage.IDLE:
                self._stage = Stage.OPEN
            self._queue.put(waiters)

    def stop(self) -> None:
        """Ends the thread after what is in the queue, and after the batch that an event loop is just carrying out."""
        with self._guard:
            self._stopping = True
            self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def forget(self) -> None:
        self._transactions.lock.close()

    def at_once(self, waiters: Sequence[Waiter[Op, Result]], again: Again) -> AtOnce:
        """Carries them out on the thread of their event loop, if nothing is under way, they are few and nothing has to be waited for."""
        began = time.monotonic()
        with self._guard:
            if self._stage is Stage.CLOSED:
                self._again[id(again.wakeup.loop)] = again
                return AtOnce.LATER
            if self._stage is Stage.OPEN or self._stopping or len(waiters) > MAX_AT_ONCE or began < self._resting_until:
                return AtOnce.THREAD
            self._stage = Stage.CLOSED
            if not self._lasts_at_once:
                self._again[id(again.wakeup.loop)] = again
        outcomes = self._outcomes_at_once(waiters)
        ended = time.monotonic()
        if ended - began > SLOW:
            self._resting_until = ended + REST
        if outcomes is None:
            begin_again(self._over())
            return AtOnce.THREAD
        if self._lasts_at_once:
            deliver(waiters, outcomes)
            for waiter in waiters:
                waiter.wakeup.ring()
            begin_again(self._over())
        else:
            self._queue.put(Committed(waiters, outcomes))
        return AtOnce.DONE

    def _outcomes_at_once(self, waiters: Sequence[Waiter[Op, Result]]) -> Sequence[Result | BaseException] | None:
        """None: something would have to be waited for, the house that the thread keeps perhaps."""
        if not self._turn.acquire(blocking=False):
            return None
        try:
            return self._transactions.at_once([waiter.op for waiter in waiters])
        except Exception as error:  # noqa: BLE001  # as below
            return self._transactions.fail(error, len(waiters))
        finally:
            self._turn.release()

    def _over(self) -> Sequence[Again]:
        """The batch that was under way is, on either thread: the next one is that of the queue, or of whoever comes. Gives those who asked
        meanwhile."""
        with self._guard:
            self._stage = Stage.OPEN if self._queue.qsize() else Stage.IDLE
            again, self._again = self._again, {}
            if self._stopping:
                self._queue.put(None)
        return list(again.values())

    def _work(self) -> None:
        try:
            while not (self._stopped and self._stage is not Stage.CLOSED):
                match self._next():
                    case None:
                        self._stopped = True
                    case Committed(batch, outcomes):
                        self._finish(batch, outcomes)
                    case batch:
                        with self._turn:
                            outcomes = self._outcomes(batch)
                        self._finish(batch, outcomes)
        finally:
            with self._turn:
                self._transactions.note()
                self._transactions.close()

    def _finish(self, batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
        deliver(batch, self._synced(outcomes))
        full = self._transactions.full
        again = () if full else self._over()
        ring_all([waiter.wakeup for waiter in batch if waiter.failed is None])
        if full:
            with self._turn:
                self._transactions.checkpoint()
            again = self._over()
        begin_again(again)
        if self._unnoted_since is None and not self._transactions.noted:
            self._unnoted_since = time.monotonic()

    def _outcomes(self, batch: list[Waiter[Op, Result]]) -> Sequence[Result | BaseException]:
        """Of `batch` and all that came while the lock was awaited, which it appends."""
        try:
            return self._transactions.turn(lambda: self._take(batch))
        except Exception as error:  # noqa: BLE001  # the thread must outlive any fault; every waiter is told
            self._take(batch)
            return self._transactions.fail(error, len(batch))

    def _synced(self, outcomes: Sequence[Result | BaseException]) -> Sequence[Result | BaseException]:
        """The same, once they last. Nobody is told of what may not: whoever asked has to find out."""
        try:
            self._transactions.sync()
        except Exception as error:  # noqa: BLE001  # as above
            with self._turn:
                return self._transactions.fail(error, len(outcomes))
        return outcomes

    def _next(self) -> list[Waiter[Op, Result]] | Committed[Op, Result] | None:
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
        with self._turn:
            self._transactions.note()
        self._unnoted_since = None

    def _take(self, batch: list[Waiter[Op, Result]]) -> Sequence[Op]:
        with self._guard:
            self._stage = Stage.CLOSED
        while len(batch) < MAX_BATCH and self._queue.qsize():
            waiters = self._queue.get()
            if waiters is None:
                self._stopped = True
                break
            assert not isinstance(waiters, Committed), "nothing is committed while a batch is with the thread"
            batch.extend(waiters)
        return [waiter.op for waiter in batch]


def deliver(batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
    for waiter, outcome in zip(batch, outcomes, strict=True):
        waiter.outcome = outcome
        if waiter.failed is not None and isinstance(outcome, BaseException):
            waiter.failed(outcome)
