"""Group commit of a file that waits for no disk: an event loop writes to it itself, and never waits there."""

import asyncio
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.errors import NotFound, StorageUnavailable
from starlette_aigateway.stores import commit as commit_module
from starlette_aigateway.stores import writer as writer_module
from starlette_aigateway.stores.commit import GroupCommit
from starlette_aigateway.stores.writer import Waiter, Writer
from starlette_aigateway.wakeup import wakeup
from tests.test_commit import Store, together

pytestmark = pytest.mark.anyio
HERE = threading.get_ident
A_MOMENT = 0.2
"""Seconds; long enough for a thread to do what it is not kept from."""


@pytest.fixture(autouse=True)
def never_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long this machine keeps the loop from its batch."""
    monkeypatch.setattr(writer_module, "SLOW", 1e9)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
async def commit(store: Store) -> AsyncIterator[GroupCommit[int, int]]:
    """Opened, by its thread: opening a file may take long."""
    commit = store.commit(quick=True)
    assert await commit.run(0) == 0
    assert store.threads.pop() != HERE()
    store.batches.clear()
    yield commit
    store.go_on.set()
    commit.close()


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """As another process has it locked."""
    descriptor = os.open(store.lock_file, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


async def with_the_thread(commit: GroupCommit[int, int]) -> None:
    writer = commit._writer
    assert writer is not None
    while not (writer._asked or writer._thread_commits):
        await anyio.lowlevel.checkpoint()


async def test_what_one_pass_brings_is_one_batch_on_the_thread_of_the_loop(store: Store, commit: GroupCommit[int, int]) -> None:
    assert await together(commit, [1, 2, -1]) | {-1: None} == {1: 2, 2: 4, -1: None}
    assert [sorted(batch) for batch in store.batches] == [[-1, 1, 2]]
    assert store.threads == [HERE()]
    assert store.stored() == [0, 1, 2]
    assert isinstance((await together(commit, [-5]))[-5], NotFound)


async def test_where_several_come_at_a_time_the_next_batch_waits_some_passes_for_more_and_a_call_alone_waits_for_none(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "PASSES", 10**9)
    monkeypatch.setattr(commit_module, "FEWEST", 10**9)
    for alone in (1, 2):
        await commit.run(alone)
    await together(commit, [3, 4])
    many = range(5, 5 + Writer.ENOUGH)
    async with anyio.create_task_group() as group:
        for op in many:
            group.start_soon(commit.run, op)
            await anyio.lowlevel.checkpoint()
    assert [sorted(batch) for batch in store.batches] == [[1], [2], [3, 4], [*many]]
    assert store.threads == [HERE()] * 4


async def test_a_batch_waits_for_few_passes_only_where_they_are_long(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "PASSES", 10**9)
    monkeypatch.setattr(commit_module, "LONGEST", 0.0)
    await together(commit, [1, 2])
    with anyio.fail_after(5):
        assert await commit.run(3) == 6
    assert store.batches[-1] == [3]


@pytest.mark.parametrize("how", ["by the lock file", "in the database"])
async def test_a_lock_of_another_process_is_awaited_by_the_thread_and_not_by_the_loop(
    store: Store, commit: GroupCommit[int, int], how: str
) -> None:
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        if how == "in the database":
            other.execute("BEGIN IMMEDIATE")
        lock = locked(store) if how == "by the lock file" else closing(sqlite3.connect(":memory:"))
        async with anyio.create_task_group() as group:
            with lock:
                group.start_soon(commit.run, 1)
                await with_the_thread(commit)
                assert store.stored() == [0]
                if how == "in the database":
                    other.execute("ROLLBACK")
    assert store.stored() == [0, 1]
    assert HERE() not in store.threads
    assert commit._writer is not None
    assert commit._writer._resting_until == 0.0, "the loop was not held up"


async def test_a_lock_that_stays_taken_is_storage_unavailable_and_goes_on_afterwards(store: Store) -> None:
    commit = store.commit(timeout=0.05, quick=True)
    await commit.run(0)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable):
            await commit.run(1)
    with locked(store), pytest.raises(StorageUnavailable):
        await commit.run(2)
    assert await commit.run(3) == 6
    commit.close()
    assert store.stored() == [0, 3]


async def test_what_comes_while_the_thread_carries_out_a_batch_is_the_loops_next_one(store: Store, commit: GroupCommit[int, int]) -> None:
    writer = commit._writer
    assert writer is not None
    writer._resting_until = inf
    store.entered.clear()
    store.go_on.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(commit.run, 1)
        while not store.entered.is_set():
            await anyio.lowlevel.checkpoint()
        writer._resting_until = 0.0
        for number in (2, 3):
            group.start_soon(commit.run, number)
            await anyio.wait_all_tasks_blocked()
        store.go_on.set()
    assert store.batches == [[1], [2, 3]]
    assert [thread == HERE() for thread in store.threads] == [False, True]


async def test_a_batch_that_would_hold_up_the_loop_is_the_threads(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_AT_ONCE", 3)
    await together(commit, [1, 2, 3])
    await together(commit, [4, 5, 6, 7])
    assert [thread == HERE() for thread in store.threads] == [True, False]


async def test_after_a_slow_batch_the_loop_carries_out_none_for_a_while(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SLOW", -1.0)
    await commit.run(1)
    await commit.run(2)
    monkeypatch.setattr(writer_module, "SLOW", 1e9)
    await commit.run(3)
    writer = commit._writer
    assert writer is not None
    writer._resting_until = 0.0
    await commit.run(4)
    assert [thread == HERE() for thread in store.threads] == [True, False, False, True]


async def test_an_operation_that_breaks_its_batch_takes_no_other_with_it(store: Store, commit: GroupCommit[int, int]) -> None:
    await commit.run(1)
    outcomes = await together(commit, [2, 1, 3])
    assert (outcomes[2], outcomes[3]) == (4, 6)
    assert isinstance(outcomes[1], StorageUnavailable)
    assert store.stored() == [0, 1, 2, 3]


async def test_a_storage_fault_rolls_all_back_and_the_next_batch_opens_anew(store: Store, commit: GroupCommit[int, int]) -> None:
    store.fault = sqlite3.OperationalError("disk I/O error")
    outcomes = await together(commit, [1, 2])
    assert all(isinstance(outcome, StorageUnavailable) for outcome in outcomes.values())
    assert outcomes[1] is not outcomes[2]
    assert await commit.run(3) == 6
    assert store.opened == 2
    assert store.stored() == [0, 3]


async def test_a_process_that_is_interrupted_in_a_batch_takes_it_back_and_can_still_close(
    store: Store, commit: GroupCommit[int, int]
) -> None:
    """Ctrl-C comes at any line of the main thread. What it interrupted is carried out at the end, by the thread."""
    writer = commit._writer
    assert writer is not None
    waiters = [Waiter[int, int](1, wakeup())]
    commit._gathered[id(waiters[0].wakeup.loop)] = waiters
    store.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        commit._end_pass(id(waiters[0].wakeup.loop))
    assert store.stored() == [0]
    with anyio.fail_after(10):
        await anyio.to_thread.run_sync(commit.close, abandon_on_cancel=True)
    assert store.stored() == [0, 1]


async def test_what_nobody_waits_for_is_carried_out_in_order_and_a_failure_is_told(store: Store, commit: GroupCommit[int, int]) -> None:
    failures: list[BaseException] = []
    commit.tell(1, failures.append)
    commit.tell(-1, failures.append)
    assert await commit.run(2) == 4
    assert [type(failure) for failure in failures] == [NotFound]
    assert store.batches == [[1, -1, 2]]


async def test_closing_from_another_thread_in_the_midst_of_a_batch_carries_nothing_out_twice(
    store: Store, commit: GroupCommit[int, int]
) -> None:
    closer = threading.Thread(target=commit.close)

    def close_meanwhile() -> None:
        store.entered.wait()
        closer.start()
        while commit._writer is not None:
            time.sleep(0)
        store.go_on.set()

    store.entered.clear()
    store.go_on.clear()
    meanwhile = threading.Thread(target=close_meanwhile)
    meanwhile.start()
    assert await commit.run(1) == 2
    meanwhile.join()
    await anyio.to_thread.run_sync(closer.join)
    assert store.batches == [[1]]
    assert store.stored() == [0, 1]


async def test_what_waits_for_more_passes_is_carried_out_at_the_end_also_where_its_caller_was_cancelled(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "PASSES", 10**9)
    monkeypatch.setattr(commit_module, "FEWEST", 10**9)
    await together(commit, [1, 2])
    async with anyio.create_task_group() as group:
        group.start_soon(commit.run, 3)
        while not commit._gathered:
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    commit.tell(4, lambda _failure: None)
    assert store.stored() == [0, 1, 2]
    await anyio.to_thread.run_sync(commit.close)
    assert store.stored() == [0, 1, 2, 3, 4]


async def test_closing_from_another_thread_loses_nothing_that_is_just_joining_what_it_takes(
    store: Store, commit: GroupCommit[int, int]
) -> None:
    taken = threading.Event()

    class Gathered(dict[int, list[Waiter[int, int]]]):
        """Another thread closes between two lines of who joins the others."""

        def get(self, loop: int, default: object = None) -> list[Waiter[int, int]] | None:  # type: ignore[override]
            gathered = super().get(loop)
            if gathered is not None and not closer.ident:
                closer.start()
                taken.wait(A_MOMENT)
            return gathered

    def close() -> None:
        commit.close()
        taken.set()

    closer = threading.Thread(target=close)
    commit._gathered = Gathered()
    with anyio.fail_after(10):
        assert await together(commit, [1, 2]) == {1: 2, 2: 4}
    await anyio.to_thread.run_sync(closer.join)
    assert store.stored() == [0, 1, 2]


async def test_closing_carries_out_what_waits_and_a_later_run_opens_again(store: Store, commit: GroupCommit[int, int]) -> None:
    await commit.run(1)
    commit.tell(2, lambda _failure: None)
    commit.close()
    assert store.stored() == [0, 1, 2]
    assert await commit.run(3) == 6
    assert store.opened == 2


async def test_a_cancelled_wait_does_not_cancel_the_operation(store: Store, commit: GroupCommit[int, int]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await commit.run(1)
    await commit.run(2)
    assert store.stored() == [0, 1, 2]


def test_loops_of_several_threads_share_one_connection(store: Store) -> None:
    commit = store.commit(quick=True)

    async def many(first: int) -> None:
        for number in range(first, first + 40):
            assert await commit.run(number) == 2 * number

    threads = [threading.Thread(target=anyio.run, args=(many, 100 * number)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    commit.close()
    assert len(store.stored()) == 160
    assert store.opened == 1


def test_what_a_loop_gathered_that_was_closed_is_carried_out_by_the_next_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "PASSES", 10**9)
    monkeypatch.setattr(commit_module, "FEWEST", 10**9)
    monkeypatch.setattr(commit_module, "CALM", 1)
    commit = store.commit(quick=True)

    async def leave_behind() -> None:
        await commit.run(1)
        await together(commit, [2, 3])
        commit.tell(4, lambda _failure: None)

    async def go_on() -> None:
        await commit.run(5)
        await commit.run(6)
        assert commit.now(7) == 14

    asyncio.run(leave_behind())
    assert store.stored() == [1, 2, 3]
    monkeypatch.setattr(commit_module, "PASSES", 1)
    asyncio.run(go_on())
    assert store.stored() == [1, 2, 3, 4, 5, 6, 7]
    commit.close()


async def test_what_waits_for_more_passes_of_a_loop_that_is_about_to_end_is_the_threads(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of `trio.run` callbacks still run, and ask for nothing more."""

    def refused(_wakeup: object, _callback: object) -> None:
        raise RuntimeError("the run has finished")

    await together(commit, [1, 2])
    commit.tell(3, lambda _failure: None)
    waiter = next(iter(commit._gathered.values()))[0]
    with monkeypatch.context() as patched:
        patched.setattr(type(waiter.wakeup), "soon", refused)
        commit._wait_for_more(id(waiter.wakeup.loop))
    commit.close()
    assert store.stored() == [0, 1, 2, 3]


def test_a_loop_that_was_closed_before_its_operations_were_counted_spoils_no_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "RECOUNT", 4)
    commit = store.commit(quick=True)

    async def several() -> None:
        for op in range(2, 10):
            commit.now(op)
            commit.now(op + 100)
            await anyio.lowlevel.checkpoint()

    def alone(loop: asyncio.AbstractEventLoop) -> None:
        assert commit.now(1) == 2
        loop.stop()

    anyio.run(commit.run, 0)
    with closing(asyncio.new_event_loop()) as loop:
        loop.call_soon(alone, loop)
        loop.run_forever()
    anyio.run(several)
    assert commit._busy
    commit.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # such a fork is what is tested
def test_a_forked_child_opens_its_own_connection(store: Store) -> None:
    commit = store.commit(quick=True)

    async def several(first: int) -> None:
        for number in range(first, first + 3):
            await commit.run(number)

    anyio.run(several, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            anyio.run(several, 10)
            commit.close()
            status = 0 if store.opened == 2 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    anyio.run(several, 20)
    commit.close()
    assert store.stored() == [0, 1, 2, 10, 11, 12, 20, 21, 22]


# --- now, without a wait ------------------------------------------------------------------------------------------------


async def test_an_operation_alone_is_carried_out_now_with_its_own_result_or_error(store: Store, commit: GroupCommit[int, int]) -> None:
    assert commit.now(1) == 2
    with pytest.raises(NotFound):
        commit.now(-1)
    store.fault = sqlite3.OperationalError("disk I/O error")
    with pytest.raises(StorageUnavailable):
        commit.now(2)
    assert store.stored() == [0, 1]
    assert await commit.run(3) == 6, "the next one opens everything anew"
    assert store.threads[:2] == [HERE()] * 2


async def test_nothing_is_carried_out_now_before_what_was_asked_for_earlier(store: Store, commit: GroupCommit[int, int]) -> None:
    failures: list[BaseException] = []
    commit.tell(1, failures.append)
    assert commit.now(2) is None, "that is gathered"
    await anyio.wait_all_tasks_blocked()
    assert commit.now(3) == 6
    store.go_on.clear()
    store.entered.clear()
    async with anyio.create_task_group() as group:
        with locked(store):
            group.start_soon(commit.run, 4)
            await with_the_thread(commit)
        await anyio.to_thread.run_sync(store.entered.wait)
        assert commit.now(5) is None, "the thread carries it out"
        store.go_on.set()
    assert store.stored() == [0, 1, 3, 4]


async def test_nothing_is_carried_out_now_before_what_the_thread_is_about_to_begin_with(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = commit._writer
    assert writer is not None
    monkeypatch.setattr(writer_module, "MAX_AT_ONCE", 0)
    async with anyio.create_task_group() as group:
        with writer._turn:
            group.start_soon(commit.run, 1)
            await with_the_thread(commit)
        assert commit.now(2) is None
    assert store.stored() == [0, 1]


async def test_nothing_is_carried_out_now_where_it_would_have_to_wait(store: Store) -> None:
    commit = store.commit(quick=True)
    assert commit.now(1) is None, "nothing is open yet"
    await commit.run(2)
    with locked(store):
        assert commit.now(3) is None
    commit.close()
    assert commit.now(4) is None
    assert store.stored() == [2]


async def test_what_comes_now_several_times_in_a_pass_is_gathered_until_it_is_calm(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_module, "CALM", 2)
    assert [commit.now(1), commit.now(2)] == [2, 4]
    await anyio.lowlevel.checkpoint()
    await anyio.lowlevel.checkpoint()
    assert commit.now(3) is None, "the loop is busy"
    for op in (4, 5):
        await commit.run(op)
    assert commit.now(6) == 12, "two came alone"
