"""Who carries out the batches of one file: the thread that belongs to it, or the event loop that gathered them, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import ClassVar, Generic, NamedTuple

from msgspec import Struct

from ..process import THIS, let_go, take_all
from ..wakeup import Wakeup, ring_all
from .turns import Op, Result, Store

Failed = Callable[[BaseException], None]
"""Hears, in whichever thread, what kept an operation from being carried out; must not raise."""

MAX_BATCH = 256
"""Operations after which a batch takes no more; what one pass of an event loop brings is never divided."""
MAX_AT_ONCE = 128
"""Operations that an event loop may carry out itself: a millisecond or two."""
SLOW = 0.05
REST = 1.0
"""A batch that held up the event loop for longer than `SLOW` seconds is followed by `REST` seconds in which it carries out none."""

NOTE_AFTER = 0.25
"""Seconds without work, or `NOTE_AT_LAST` seconds with it, after which a witness notes how far the file has got."""

NOTE_AT_LAST = 1.0

log = logging.getLogger("starlette_aigateway")


class Waiter(Struct, Generic[Op, Result], eq=False):
    """One operation under way. Its outcome is read by the event loop after it is woken; or nobody waits for it, and `failed` is called
    where it was not carried out."""

    op: Op
    wakeup: Wakeup
    failed: Failed | None = None
    outcome: Result | BaseException | None = None


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
    """The thread and its queue; whoever has the `_turn` may take turns at its file. None in the queue ends it. It begins when the one
    `after` which it comes has ended: what two of them had open of one file, the end of the first would close."""

    in_use_for_long: ClassVar[bool] = False

    ENOUGH: ClassVar[int] = 24
    """Operations that begin the next batch while the one before it is synced. Fewer wait for that sync, for larger batches."""

    def __init__(self, store: Store[Op, Result], *, after: Writer[Op, Result] | None = None) -> None:
        self._after = after
        self._turns = store.turns()
        self._lasts_at_once = store.lasts_at_once
        self._turn = threading.RLock()
        self._sync = threading.RLock()
        """Held during a sync, which needs no turn; a fork waits for both."""
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
        THIS.pause_for_forks(self)
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

    def pause(self, timeout: float) -> bool:
        return take_all(timeout, self._turn, self._sync)

    def close_files(self) -> None:
        self._turns.close_for_fork()

    def resume(self) -> None:
        let_go(self._sync, self._turn)

    def abandon(self) -> None:
        THIS.keep(self)

    def at_once(self, waiters: Sequence[Waiter[Op, Result]], again: Again) -> AtOnce:
        """Carries them out on the thread of their event loop, if nothing is under way but a sync, they are few and nothing has to be waited
        for."""
        began = time.monotonic()
        with self._guard:
            if self._asked or self._stopping or len(waiters) > MAX_AT_ONCE or began < self._resting_until:
                return AtOnce.THREAD
            if self._loop_commits or self._thread_commits or (self._syncing and len(waiters) < self.ENOUGH):
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
        after, self._after = self._after, None
        if after is not None:
            after.join()
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
            with self._sync:
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
