"""Group commit: whatever waits is committed as one transaction, one after the other, on the event loop or by one writer thread per
process and file.

Operations are values. All that wait are handed to one `apply` function inside `BEGIN IMMEDIATE` ... `COMMIT`; every waiter learns its own
result only when the commit lasts. So a batch costs one sync to the disk and few statements, and since each SQLite statement gives up the
interpreter lock, few statements also means few waits for the event loop's thread.

Between processes a lock file stands before the database: SQLite's own busy handler sleeps ever longer and starves its waiters
(seconds at four processes). What waits joins the batch until the moment the lock is ours.

The event loop carries out a batch itself, at the end of a pass or of a few, where nothing at all has to be waited for: two changes of
threads cost more than the batch. The thread does what waits: opening the file, locks of others, syncs to the disk. What comes meanwhile is
the next batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import Generic, NamedTuple

from ..process import THIS
from ..wakeup import Wakeup, ring_all, wakeup
from .turns import Op, Result, Store

Failed = Callable[[BaseException], None]
"""Hears, in whichever thread, what kept an operation from being carried out; must not raise."""

MAX_BATCH = 256
"""Operations after which a batch takes no more; what one pass of an event loop brings is never divided."""
MAX_AT_ONCE = 128
"""Operations that an event loop may carry out itself: a millisecond or two."""
ENOUGH = 24
"""Operations that begin the next batch while the one before it is synced. Fewer wait for that sync, for larger batches."""
PASSES = 3
"""Passes of its event loop that a batch of less than `ENOUGH` operations waits for more: after that, and where the loop is busy: several
came at a time not long ago."""
CALM = 16
"""Single operations, one after the other, after which an event loop is taken to be busy no more."""
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

    def __init__(self, store: Store[Op, Result]) -> None:
        self._store = store
        self._pid = THIS.pid
        self._guard = threading.Lock()
        self._writer: Writer[Op, Result] | None = None
        self._gathered: dict[int, list[Waiter[Op, Result]]] = {}
        self._busy = 0
        """Batches of one operation, or passes of an event loop with one, until it is calm."""
        self._came = 0

    async def run(self, op: Op) -> Result:
        waiter: Waiter[Op, Result] = Waiter(op)
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
        if writer is None or self._busy or self._gathered or self._pid != THIS.pid:
            return None
        outcome = writer.now(op)
        self._came += 1
        if self._came == 1:
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
        """What one pass of the event loop brings is carried out together, and what a few bring where it is busy: each transaction costs
        as much as several operations. The thread is woken once, and begins with a batch."""
        if self._pid != THIS.pid:
            self._forget_parent()
        loop = id(waiter.wakeup.loop)
        gathered = self._gathered.get(loop)
        if gathered is None:
            self._gathered[loop] = [waiter]
            passes = PASSES if self._busy else 0
            waiter.wakeup.soon(lambda: self._pass_by(loop, passes))
        else:
            gathered.append(waiter)
            if len(gathered) == ENOUGH:
                waiter.wakeup.soon(lambda: self._end_pass(loop))

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
            became = writer.at_once(waiters, Again(waiters[0].wakeup, lambda: self._pass_by(loop, PASSES), lambda: self._submit(loop)))
        except BaseException:  # the process is interrupted
            self._gathered[loop] = waiters
            raise
        if became is AtOnce.LATER:
            self._gathered[loop] = waiters
        elif became is AtOnce.THREAD:
            self._put(waiters)

    def _pass_by(self, loop: int, passes: int) -> None:
        """Where the loop is busy, a few passes make the next batch larger; where it is not, they take no time."""
        waiters = self._gathered.get(loop)
        if waiters and passes and len(waiters) < ENOUGH:
            waiters[0].wakeup.soon(lambda: self._pass_by(loop, passes - 1))
        else:
            self._end_pass(loop)

    def _submit(self, loop: int) -> None:
        waiters = self._gathered.pop(loop, None)
        if waiters is not None:
            self._put(waiters)

    def _put(self, waiters: list[Waiter[Op, Result]]) -> None:
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


class Committed(NamedTuple, Generic[Op, Result]):
    """A batch that lasts once it is synced."""

    batch: Sequence[Waiter[Op, Result]]
    outcomes: Sequence[Result | BaseException]


class Writer(Generic[Op, Result]):
    """The thread and its queue; whoever has the `_turn` may take turns at its file. None in the queue ends it."""

    def __init__(self, store: Store[Op, Result]) -> None:
        self._turns = store.turns()
        self._lasts_at_once = store.lasts_at_once
        self._turn = threading.Lock()
        self._queue: SimpleQueue[list[Waiter[Op, Result]] | Committed[Op, Result] | None] = SimpleQueue()
        self._guard = threading.Lock()
        self._asked = 0
        """Batches that are the thread's and that it has not taken yet: until it has the lock, what comes joins them."""
        self._loop_commits = self._thread_commits = False
        self._syncing = 0
        """Batches of event loops that are committed and wait for a sync."""
        self._came_between: list[Committed[Op, Result]] = []
        self._again: dict[int, Again] = {}
        self._unnoted_since: float | None = None
        self._resting_until = 0.0
        self._stopping = self._stopped = False
        self._thread = threading.Thread(target=self._work, name=f"aigateway-{store.name}", daemon=True)
        self._thread.start()

    def put(self, waiters: list[Waiter[Op, Result]]) -> None:
        with self._guard:
            self._asked += 1
            self._queue.put(waiters)

    def stop(self) -> None:
        """Ends the thread after what is in the queue, and after the batch that an event loop is just carrying out."""
        with self._guard:
            self._stopping = True
            self._queue.put(None)

    def join(self) -> None:
        self._thread.join()

    def forget(self) -> None:
        self._turns.lock.close()

    def at_once(self, waiters: Sequence[Waiter[Op, Result]], again: Again) -> AtOnce:
        """Carries them out on the thread of their event loop, if nothing is under way but a sync, they are few and nothing has to be waited
        for."""
        began = time.monotonic()
        with self._guard:
            if self._asked or self._stopping or len(waiters) > MAX_AT_ONCE or began < self._resting_until:
                return AtOnce.THREAD
            if self._loop_commits or self._thread_commits or (self._syncing and len(waiters) < ENOUGH):
                self._again[id(again.wakeup.loop)] = again
                return AtOnce.LATER
            self._loop_commits = True
        try:
            outcomes = self._outcomes_at_once(waiters)
        except BaseException:  # the process is interrupted; the batch was taken back
            begin_again(self._committed(None))
            raise
        ended = time.monotonic()
        if ended - began > SLOW:
            self._resting_until = ended + REST
        if outcomes is not None and self._lasts_at_once:
            deliver(waiters, outcomes)
            for waiter in waiters:
                waiter.wakeup.ring()
        begin_again(self._committed(None if outcomes is None or self._lasts_at_once else Committed(waiters, outcomes)))
        return AtOnce.THREAD if outcomes is None else AtOnce.DONE

    def now(self, op: Op) -> Result | BaseException | None:
        """As that of `GroupCommit`."""
        if self._asked or self._thread_commits or self._loop_commits or not self._turn.acquire(blocking=False):
            return None
        try:
            outcomes = self._turns.at_once((op,))
        except Exception as error:  # noqa: BLE001  # as below
            outcomes = self._turns.fail(error, 1)
        finally:
            self._turn.release()
        return None if outcomes is None else outcomes[0]

    def _outcomes_at_once(self, waiters: Sequence[Waiter[Op, Result]]) -> Sequence[Result | BaseException] | None:
        """None: something would have to be waited for, the house that the thread keeps perhaps. So is what failed while the thread syncs:
        it tries that again, and closes what is broken when nothing needs it any more."""
        if not self._turn.acquire(blocking=False):
            return None
        try:
            return self._turns.at_once([waiter.op for waiter in waiters])
        except Exception as error:  # noqa: BLE001  # as below
            return None if self._syncing else self._turns.fail(error, len(waiters))
        finally:
            self._turn.release()

    def _committed(self, batch: Committed[Op, Result] | None) -> Sequence[Again]:
        """On the event loop: a transaction is over, and `batch` waits for a sync. Gives those who asked meanwhile."""
        with self._guard:
            self._loop_commits = False
            if batch is not None:
                self._syncing += 1
                self._queue.put(batch)
            return self._over()

    def _synced_one(self) -> Sequence[Again]:
        with self._guard:
            self._syncing -= 1
            return self._over()

    def _carried_out(self) -> Sequence[Again]:
        with self._guard:
            self._thread_commits = False
            return self._over()

    def _over(self) -> Sequence[Again]:
        """Those who wanted to begin meanwhile. Under the guard."""
        again, self._again = self._again, {}
        if self._stopping:
            self._queue.put(None)
        return list(again.values())

    def _work(self) -> None:
        try:
            while not (self._stopped and self._idle):
                match self._next():
                    case None:
                        self._stopped = True
                    case Committed(batch, outcomes):
                        self._finish(batch, outcomes, self._synced_one)
                    case batch:
                        with self._turn:
                            outcomes = self._outcomes(batch)
                        self._finish(batch, outcomes, self._carried_out)
                        between, self._came_between = self._came_between, []
                        for earlier in between:
                            self._finish(*earlier, self._synced_one)
        finally:
            with self._turn:
                self._turns.note()
                self._turns.close()

    @property
    def _idle(self) -> bool:
        """For the thread: nothing is with an event loop, and nothing comes from one any more."""
        with self._guard:
            return not (self._loop_commits or self._syncing or self._asked)

    def _finish(
        self, batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException], over: Callable[[], Sequence[Again]]
    ) -> None:
        deliver(batch, self._synced(outcomes))
        full = self._turns.full
        again = () if full else over()
        ring_all([waiter.wakeup for waiter in batch if waiter.failed is None])
        if full:
            with self._turn:
                self._turns.checkpoint()
            again = over()
        begin_again(again)
        if self._unnoted_since is None and not self._turns.noted:
            self._unnoted_since = time.monotonic()

    def _outcomes(self, batch: list[Waiter[Op, Result]]) -> Sequence[Result | BaseException]:
        """Of `batch` and all that came while the lock was awaited, which it appends."""
        try:
            return self._turns.turn(lambda: self._take(batch))
        except Exception as error:  # noqa: BLE001  # the thread must outlive any fault; every waiter is told
            self._take(batch)
            return self._turns.fail(error, len(batch))

    def _synced(self, outcomes: Sequence[Result | BaseException]) -> Sequence[Result | BaseException]:
        """The same, once they last. Nobody is told of what may not: whoever asked has to find out."""
        try:
            self._turns.sync()
        except Exception as error:  # noqa: BLE001  # as above
            with self._turn:
                return self._turns.fail(error, len(outcomes))
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
            self._turns.note()
        self._unnoted_since = None

    def _take(self, batch: list[Waiter[Op, Result]]) -> Sequence[Op]:
        """`batch` and what was asked for since. From the first call for a batch on it is under way."""
        with self._guard:
            if not self._thread_commits:
                self._thread_commits = True
                self._asked -= 1
            while len(batch) < MAX_BATCH and self._queue.qsize():
                match self._queue.get():
                    case None:
                        self._stopped = True
                        break
                    case Committed(waiters, outcomes):  # an event loop was about to say so when this was asked for
                        self._came_between.append(Committed(waiters, outcomes))
                    case more:
                        self._asked -= 1
                        batch.extend(more)
        return [waiter.op for waiter in batch]


def deliver(batch: Sequence[Waiter[Op, Result]], outcomes: Sequence[Result | BaseException]) -> None:
    for waiter, outcome in zip(batch, outcomes, strict=True):
        waiter.outcome = outcome
        if waiter.failed is not None and isinstance(outcome, BaseException):
            waiter.failed(outcome)
