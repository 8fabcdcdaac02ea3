"""Group commit: what a waiter is promised whatever happens to the thread, the file, the loop or the process."""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import anyio
import pytest

from starlette_aigateway.errors import AIGatewayError, ConfigurationError, NotFound, StorageUnavailable
from starlette_aigateway.stores.commit import GroupCommit
from starlette_aigateway.stores.lock_file import LockFile
from starlette_aigateway.stores.sqlite.transactions import StoreFile

pytestmark = pytest.mark.anyio

Apply = Callable[[sqlite3.Connection, Sequence[int]], Sequence[int | AIGatewayError]]


class Store:
    """A table of numbers. `hold` makes the writer wait inside a batch, so that others gather behind it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "numbers.db"
        self.lock_file = directory / "numbers.lock"
        self.batches: list[list[int]] = []
        self.threads: list[int] = []
        self.opened = 0
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fault: BaseException | None = None

    def connect(self) -> sqlite3.Connection:
        self.opened += 1
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("CREATE TABLE IF NOT EXISTS numbers (n INTEGER PRIMARY KEY)")
        return connection

    def apply(self, connection: sqlite3.Connection, ops: Sequence[int]) -> Sequence[int | AIGatewayError]:
        self.entered.set()
        self.go_on.wait()
        self.batches.append(list(ops))
        self.threads.append(threading.get_ident())
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        connection.executemany("INSERT INTO numbers VALUES (?)", [(n,) for n in ops if n >= 0])
        return [n * 2 if n >= 0 else NotFound("negative") for n in ops]

    def stored(self) -> list[int]:
        connection = sqlite3.connect(self.path)
        rows = [n for (n,) in connection.execute("SELECT n FROM numbers ORDER BY n")]
        connection.close()
        return rows

    def commit(self, *, timeout: float = 5.0, quick: bool = False) -> GroupCommit[int, int]:
        return GroupCommit(
            StoreFile(connect=self.connect, apply=self.apply, name="numbers", lock_file=self.lock_file, timeout=timeout, quick=quick)
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def commit(store: Store) -> Iterator[GroupCommit[int, int]]:
    commit = store.commit()
    yield commit
    store.go_on.set()
    commit.close()


async def together(commit: GroupCommit[int, int], numbers: Sequence[int], begun: anyio.Event | None = None) -> dict[int, object]:
    """What each number gave, all run at the same time."""
    outcomes: dict[int, object] = {}

    async def one(number: int) -> None:
        try:
            outcomes[number] = await commit.run(number)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            outcomes[number] = error

    async with anyio.create_task_group() as group:
        for number in numbers:
            group.start_soon(one, number)
        if begun is not None:
            begun.set()
    return outcomes


async def test_nothing_is_opened_before_the_first_operation(store: Store, tmp_path: Path) -> None:
    commit = store.commit()
    assert store.opened == 0
    assert list(tmp_path.iterdir()) == []
    commit.close()


async def test_each_waiter_gets_its_own_result_or_error(store: Store, commit: GroupCommit[int, int]) -> None:
    outcomes = await together(commit, [1, -1, 2, -2, 3])
    assert {n: outcome for n, outcome in outcomes.items() if n > 0} == {1: 2, 2: 4, 3: 6}
    assert isinstance(outcomes[-1], NotFound)
    assert outcomes[-1] is not outcomes[-2]
    assert store.stored() == [1, 2, 3]


async def test_a_result_comes_only_after_the_commit(store: Store, commit: GroupCommit[int, int]) -> None:
    for number in range(5):
        await commit.run(number)
        assert number in store.stored()


async def test_what_waits_is_one_batch(store: Store, commit: GroupCommit[int, int]) -> None:
    store.go_on.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(commit.run, 0)
        await anyio.to_thread.run_sync(store.entered.wait)
        for number in range(1, 51):
            group.start_soon(commit.run, number)
        await anyio.wait_all_tasks_blocked()
        store.go_on.set()
    assert [sorted(batch) for batch in store.batches] == [[0], list(range(1, 51))]


async def test_what_comes_while_the_lock_is_awaited_joins_the_batch(
    store: Store, commit: GroupCommit[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    await commit.run(0)
    refused = threading.Event()
    attempt = LockFile._try

    def watched(lock: LockFile, descriptor: int) -> bool:
        taken = attempt(lock, descriptor)
        if not taken:
            refused.set()
        return taken

    monkeypatch.setattr(LockFile, "_try", watched)
    descriptor = os.open(store.lock_file, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    async with anyio.create_task_group() as group:
        group.start_soon(commit.run, 1)
        await anyio.to_thread.run_sync(refused.wait)
        group.start_soon(commit.run, 2)
        await anyio.wait_all_tasks_blocked()
        await anyio.lowlevel.checkpoint()  # what a pass of the loop brings is handed over after it
        os.close(descriptor)
    assert store.batches == [[0], [1, 2]]


async def test_a_lock_that_stays_taken_is_storage_unavailable_for_each_waiter(store: Store) -> None:
    commit = store.commit(timeout=0.02)
    descriptor = os.open(store.lock_file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    outcomes = await together(commit, [1, 2, 3])
    errors = list(outcomes.values())
    assert all(isinstance(error, StorageUnavailable) and error.retry_after for error in errors)
    assert len({id(error) for error in errors}) == 3, "the gateway writes each request's id into its own error"
    os.close(descriptor)
    assert await commit.run(4) == 8
    assert store.stored() == [4]
    commit.close()


async def test_an_operation_that_breaks_its_batch_takes_no_other_with_it(store: Store, commit: GroupCommit[int, int]) -> None:
    await commit.run(5)
    store.go_on.clear()
    store.entered.clear()
    async with anyio.create_task_group() as group:
        group.start_soon(commit.run, 0)
        await anyio.to_thread.run_sync(store.entered.wait)
        begun = anyio.Event()
        outcomes: dict[int, object] = {}

        async def others() -> None:
            outcomes.update(await together(commit, [1, 5, 2], begun))  # 5 is there already: an IntegrityError

        group.start_soon(others)
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        store.go_on.set()
    assert (outcomes[1], outcomes[2]) == (2, 4)
    assert isinstance(outcomes[5], StorageUnavailable)
    assert store.stored() == [0, 1, 2, 5]


async def test_a_storage_fault_rolls_all_back_and_the_next_batch_opens_anew(store: Store, commit: GroupCommit[int, int]) -> None:
    store.fault = sqlite3.OperationalError("disk I/O error")
    with pytest.raises(StorageUnavailable) as caught:
        await commit.run(1)
    assert "disk" not in str(caught.value), "what SQLite says is for the log, not for callers"
    assert await commit.run(2) == 4
    assert store.opened == 2
    assert store.stored() == [2]


async def test_too_few_results_are_a_fault_and_not_a_hang(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit: GroupCommit[int, int] = GroupCommit(StoreFile(connect=store.connect, apply=lambda _connection, _ops: [], name="numbers"))
    with pytest.raises(StorageUnavailable):
        await commit.run(1)
    commit.close()


async def test_a_configuration_error_at_opening_reaches_the_waiter(tmp_path: Path) -> None:
    def connect() -> sqlite3.Connection:
        raise ConfigurationError("mend me")

    commit: GroupCommit[int, int] = GroupCommit(StoreFile(connect=connect, apply=Store(tmp_path).apply, name="numbers"))
    with pytest.raises(ConfigurationError, match="mend me"):
        await commit.run(1)
    commit.close()


async def test_closing_commits_what_waits_and_a_later_run_opens_again(store: Store, commit: GroupCommit[int, int]) -> None:
    store.go_on.clear()
    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(commit.run, number)
        await anyio.to_thread.run_sync(store.entered.wait)
        await anyio.wait_all_tasks_blocked()
        store.go_on.set()
        await anyio.to_thread.run_sync(commit.close)
        assert store.stored() == list(range(20))
    assert await commit.run(20) == 40
    assert not [thread for thread in threading.enumerate() if thread.name == "aigateway-numbers"][1:]


async def test_runs_that_race_with_closing_are_all_carried_out(store: Store, commit: GroupCommit[int, int]) -> None:
    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(commit.run, number)
            if number % 10 == 5:
                group.start_soon(anyio.to_thread.run_sync, commit.close)
            await anyio.lowlevel.checkpoint()
    assert store.stored() == list(range(60))


async def test_what_is_told_is_carried_out_in_its_place_and_waited_for_by_nobody(store: Store, commit: GroupCommit[int, int]) -> None:
    faults: list[BaseException] = []
    commit.tell(1, faults.append)
    commit.tell(-2, faults.append)
    assert store.batches == []
    await commit.run(3)
    assert [number for batch in store.batches for number in batch] == [1, -2, 3]
    assert [type(fault) for fault in faults] == [NotFound]
    assert store.stored() == [1, 3]


async def test_closing_carries_out_what_was_told(store: Store, commit: GroupCommit[int, int]) -> None:
    faults: list[BaseException] = []
    commit.tell(1, faults.append)
    commit.close()
    assert store.stored() == [1]
    assert faults == []


async def test_a_cancelled_wait_does_not_cancel_the_operation(store: Store, commit: GroupCommit[int, int]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await commit.run(1)
    await commit.run(2)
    assert store.stored() == [1, 2]


def test_one_writer_serves_loops_of_several_threads_and_survives_their_end(store: Store) -> None:
    commit = store.commit()

    async def leave_behind(number: int) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await commit.run(number)

    store.go_on.clear()
    anyio.run(leave_behind, 1, backend="asyncio")
    anyio.run(leave_behind, 2, backend="trio")
    store.go_on.set()
    threads = [threading.Thread(target=anyio.run, args=(commit.run, number), kwargs={"backend": "asyncio"}) for number in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert anyio.run(commit.run, 6, backend="trio") == 12
    commit.close()
    assert store.stored() == [1, 2, 3, 4, 5, 6]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of forks beside threads, which is the case meant
def test_a_forked_child_writes_by_its_own_thread_and_frees_the_parents_lock(store: Store) -> None:
    commit = store.commit()
    assert anyio.run(commit.run, 1) == 2
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if anyio.run(commit.run, 2) == 4:
                commit.close()
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert anyio.run(commit.run, 3) == 6
    commit.close()
    assert store.stored() == [1, 2, 3]
