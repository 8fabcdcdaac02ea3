"""Sliding windows: the arithmetic against a model, and our storage in one process, in several, and after faults."""

import errno
import fcntl
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from math import inf, nan
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.errors import StorageError
from limits.storage import storage_from_string

from starlette_aigateway.errors import ConfigurationError, InvalidArgument, StorageUnavailable
from starlette_aigateway.limiter import SharedWindows
from starlette_aigateway.policy.windows import MICROSECONDS, Refusal, Sliding, WindowClaim
from starlette_aigateway.stores.windows import log as log_module
from starlette_aigateway.stores.windows.mapped_file import MappedFile
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.windows import (
    LimitsContract,
    WindowsContract,
    admitted,
    remaining,
    requests,
    tokens,
)

pytestmark = pytest.mark.anyio

SPAN = 60 * MICROSECONDS


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def storage(tmp_path: Path, clock: FakeClock) -> AsyncIterator[FileWindowStorage]:
    async with FileWindowStorage(path=tmp_path / "data" / "windows.log", clock=clock) as storage:
        yield storage


class TestFileWindows(WindowsContract):
    pass


class TestFileWindowsUnderLimits(LimitsContract):
    @pytest.fixture(autouse=True)
    def _one_time(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
        """The strategies of `limits` add the time of their own clock to what a sliding storage tells."""
        monkeypatch.setattr("limits.aio.strategies.time.time", clock)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@given(
    current=st.integers(0, 500),
    previous=st.integers(0, 500),
    room=st.integers(0, 300),
    elapsed=st.integers(0, SPAN - 1),
)
def test_the_wait_of_a_counter_is_the_first_microsecond_at_which_there_is_room(
    current: int, previous: int, room: int, elapsed: int
) -> None:
    start = 1000 * SPAN + elapsed
    counter = Sliding(current, previous, 1000)

    def used_at(now: int) -> int:
        return counter.at(now, SPAN).used(now, SPAN)

    wait = counter.wait(room, start, SPAN)
    assert used_at(start + wait) <= room
    if wait:
        assert used_at(start + wait - 1) > room


@given(
    hits=st.lists(st.tuples(st.integers(0, 2 * SPAN), st.integers(1, 50)), max_size=20),
    pause=st.integers(0, 2 * SPAN),
)
def test_a_counter_only_falls_while_nothing_comes_in(hits: list[tuple[int, int]], pause: int) -> None:
    now, counter = 0, Sliding()
    for step, amount in hits:
        now += step
        counter = counter.at(now, SPAN).hit(amount)
    assert counter.at(now + pause, SPAN).used(now + pause, SPAN) <= counter.at(now, SPAN).used(now, SPAN)


class Model:
    """Brute force: every hit that was ever let in."""

    def __init__(self) -> None:
        self.hits: list[tuple[int, int]] = []

    def used(self, now: int, span: int) -> int:
        return sum(amount for at, amount in self.hits if now - span < at <= now)

    def wait(self, limit: int, amount: int, now: int, span: int) -> int:
        later = [0, *(at + span - now for at, _ in self.hits if at + span > now)]
        return min(wait for wait in later if self.used(now + wait, span) + amount <= limit)


Step = tuple[int, int, int, str]
STEPS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 4 * MICROSECONDS), st.just(2 * MICROSECONDS)),
        st.integers(1, 4),
        st.integers(4, 7),
        st.sampled_from(["a", "b"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_the_moving_window_agrees_with_brute_force(steps: list[Step]) -> None:
    """Over changing limits, amounts and keys, in windows of two seconds: admission, remaining and wait."""

    async def run() -> None:
        clock, models = FakeClock(), {"a": Model(), "b": Model()}
        async with FileWindowStorage(path=":memory:", clock=clock) as storage:
            for pause, amount, limit, key in steps:
                clock.advance(pause / MICROSECONDS)
                now, model, span = round(clock() * MICROSECONDS), models[key], 2 * MICROSECONDS
                used = model.used(now, span)
                outcome = await storage.acquire_all([requests(limit, scope=key, amount=amount, seconds=2)])
                if used + amount <= limit:
                    assert not isinstance(outcome, Refusal)
                    model.hits.append((now, amount))
                    assert outcome[0].remaining == limit - used - amount
                else:
                    assert isinstance(outcome, Refusal)
                    assert outcome.wait is not None
                    assert round(outcome.wait * MICROSECONDS) == model.wait(limit, amount, now, span)
                    assert outcome.states[0].remaining == max(0, limit - used)

    anyio.run(run)


@settings(max_examples=30, deadline=None)
@given(pauses=st.lists(st.integers(0, MICROSECONDS), min_size=20, max_size=120), limit=st.integers(1, 6))
def test_no_interval_of_a_window_holds_more_than_the_limit(pauses: list[int], limit: int) -> None:
    async def run() -> list[int]:
        clock, let_in = FakeClock(), []
        async with FileWindowStorage(path=":memory:", clock=clock) as storage:
            for pause in pauses:
                clock.advance(pause / MICROSECONDS)
                if await admitted(storage, requests(limit, seconds=1)):
                    let_in.append(round(clock() * MICROSECONDS))
        return let_in

    let_in = anyio.run(run)
    for start in let_in:
        assert sum(start <= at < start + MICROSECONDS for at in let_in) <= limit


# --- one process ------------------------------------------------------------------------------------------------------


def test_a_new_storage_touches_no_file(tmp_path: Path) -> None:
    FileWindowStorage(path=tmp_path / "data" / "windows.log")
    assert list(tmp_path.iterdir()) == []


async def test_a_storage_is_made_from_a_string(tmp_path: Path) -> None:
    storage = storage_from_string(f"async+aigateway:///{tmp_path}/da%20ta/windows.log")
    assert isinstance(storage, FileWindowStorage)
    async with storage:
        assert await storage.incr("a", 60) == 1
    assert storage.path == tmp_path / "da ta" / "windows.log"
    assert stat.S_IMODE(storage.path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("uri", [None, "async+aigateway://", "async+aigateway://host/x.db", "async+aigateway:///"])
def test_a_storage_without_a_path_is_refused(uri: str | None) -> None:
    with pytest.raises(ConfigurationError, match="path"):
        FileWindowStorage(uri)


async def test_windows_are_kept_over_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    for expected in (True, False):
        async with FileWindowStorage(path=tmp_path / "windows.log", clock=clock) as storage:
            assert await admitted(storage, requests(1)) is expected


async def test_two_claims_on_one_window_are_refused(storage: FileWindowStorage) -> None:
    with pytest.raises(InvalidArgument, match="same window"):
        await storage.acquire_all([requests(5), requests(3)])


@pytest.mark.parametrize(
    "claim", [requests(5, scope="a\x00b"), requests(5, scope="\ud800"), requests(5, seconds=0), tokens(5, -1), tokens(5, 2**70)]
)
async def test_a_claim_that_makes_no_sense_is_refused(storage: FileWindowStorage, claim: WindowClaim) -> None:
    with pytest.raises(InvalidArgument):
        await storage.acquire_all([claim])


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize("path", ["windows.log", ":memory:"])
async def test_what_is_no_whole_number_or_no_text_reaches_no_window(tmp_path: Path, clock: FakeClock, path: str) -> None:
    """Also where the same number was asked for before, as an int that is equal to it."""
    at = path if path == ":memory:" else tmp_path / path
    async with FileWindowStorage(path=at, clock=clock) as storage:
        assert await admitted(storage, requests(3), tokens(100, 60))
        assert await storage.incr("key", 60) == 1
        assert await storage.acquire_entry("key", 5, 60)
        refused: list[Callable[[], Awaitable[object]]] = [
            lambda: storage.acquire_all([requests(3, amount=True)]),
            lambda: storage.acquire_all([requests(3, amount=1.0)]),  # type: ignore[arg-type]
            lambda: storage.acquire_all([requests(3, seconds=60.0)]),  # type: ignore[arg-type]
            lambda: storage.acquire_all([requests(True)]),
            lambda: storage.acquire_all([requests(None)]),  # type: ignore[arg-type]
            lambda: storage.acquire_entry("key", 5, 60, 1.5),  # type: ignore[arg-type]
            lambda: storage.acquire_entry("key", 5, 60.0),  # type: ignore[arg-type]
            lambda: storage.acquire_entry(7, 5, 60),  # type: ignore[arg-type]
            lambda: storage.acquire_sliding_window_entry("key", 5, 60, True),
            lambda: storage.incr("key", 60.0),  # type: ignore[arg-type]
            lambda: storage.incr("key", 60, 1.0),  # type: ignore[arg-type]
            lambda: storage.adjust([(tokens(100, 60), -5.0)]),  # type: ignore[list-item]
            lambda: storage.adjust([(tokens(100, 60), False)]),
            lambda: storage.acquire_entry(Text("key"), 5, 60),
            *(partial(storage.adjust, [(tokens(100, 60), -5)], charged_at=moment) for moment in (inf, -inf, nan, 1e15, True)),
        ]
        for ask in refused:
            with pytest.raises(InvalidArgument):
                await ask()
        assert await remaining(storage, requests(3), tokens(100, 0)) == [2, 40]
        assert await storage.get("key") == 1
        if at != ":memory:":
            async with FileWindowStorage(path=at, clock=clock) as other:
                assert await remaining(other, requests(3), tokens(100, 0)) == [2, 40]


async def test_windows_in_memory_outlive_an_operation_that_fails(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FileWindowStorage(path=":memory:", clock=clock) as storage:
        assert await admitted(storage, requests(3))
        with monkeypatch.context() as patched:
            patched.setattr("starlette_aigateway.stores.windows.ops.Acquire.apply", lambda *_: 1 / 0)
            with pytest.raises(StorageUnavailable):
                await storage.acquire_all([requests(3)])
        assert await remaining(storage, requests(3)) == [2]


async def test_a_window_of_requests_cannot_be_corrected(storage: FileWindowStorage) -> None:
    with pytest.raises(InvalidArgument, match="tokens"):
        await storage.adjust([(requests(5), -1)])


async def test_mixed_operations_of_one_batch_take_effect_in_their_order(storage: FileWindowStorage) -> None:
    """Sent together, so that the writer takes them as one batch or few; `clear` in the middle is seen by what follows."""
    claim, outcomes = requests(2), []

    async def send() -> None:
        outcomes.append(await admitted(storage, claim))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(send)
    await storage.clear(claim.key)
    outcomes.append(await admitted(storage, claim))
    assert outcomes.count(True) == 3


@pytest.mark.parametrize("path", ["windows.log", ":memory:"])
async def test_what_has_expired_is_removed_in_passing(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(log_module, "HALF", 2**14)
    async with FileWindowStorage(path=path if path == ":memory:" else tmp_path / path, clock=clock) as storage:
        for number in range(400):
            assert await admitted(storage, requests(1, scope=f"login:{number}"), tokens(1, 1, scope=f"login:{number}"))
            clock.advance(1)
        for _ in range(1500):
            assert await admitted(storage, requests(1000))
            clock.advance(1)
        left = await storage.reset()
    assert left is not None
    assert left < 50, "of 801"


async def test_what_still_counts_is_never_removed(storage: FileWindowStorage, clock: FakeClock) -> None:
    clock.advance(59)
    assert await admitted(storage, tokens(100, 100), requests(3))
    for pause in (1, 30):
        clock.advance(pause)
        for number in range(150):
            assert await admitted(storage, requests(1, scope=f"login:{number}", seconds=1))
    assert await remaining(storage, tokens(100, 0), requests(3)) == [50, 2]


async def test_a_burst_that_expired_long_ago_does_not_count(storage: FileWindowStorage, clock: FakeClock) -> None:
    for _ in range(300):
        assert await admitted(storage, requests(300))
        clock.advance(0.1)
    assert await remaining(storage, requests(300)) == [0]
    clock.advance(45)
    assert await remaining(storage, requests(300)) == [151]
    clock.advance(600)
    assert await remaining(storage, requests(300)) == [300]
    assert await admitted(storage, requests(300, amount=300))


# --- several event loops and processes --------------------------------------------------------------------------------


async def hammer(storage: SharedWindows, calls: int, limit: int) -> int:
    let_in = 0

    async def one() -> None:
        nonlocal let_in
        if await admitted(storage, requests(limit, scope="gateway"), tokens(10**6, 1, scope="gateway")):
            let_in += 1

    async with anyio.create_task_group() as group:
        for _ in range(calls):
            group.start_soon(one)
    return let_in


def test_two_event_loops_share_one_storage(tmp_path: Path) -> None:
    storage = FileWindowStorage(path=tmp_path / "windows.log", clock=FakeClock())
    counts: list[int] = []

    def loop(backend: str) -> None:
        counts.append(anyio.run(hammer, storage, 60, 50, backend=backend))

    threads = [threading.Thread(target=loop, args=(backend,)) for backend in ("asyncio", "trio", "asyncio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    assert sum(counts) == 50


HAMMER = """
import sys, anyio
sys.path.insert(0, {root!r})
from starlette_aigateway.stores.windows import log as log_module
from starlette_aigateway.stores.windows.mapped_file import MappedFile
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from tests.test_windows import hammer

async def main():
    async with FileWindowStorage(path={path!r}) as storage:
        await storage.check()
        print("ready", flush=True)
        sys.stdin.readline()
        print(await hammer(storage, 80, 100), flush=True)

anyio.run(main, backend={backend!r})
"""


def test_four_processes_together_get_exactly_the_limit(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER.format(root=root, path=str(tmp_path / "windows.log"), backend=backend)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for backend in ("asyncio", "trio", "asyncio", "trio")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    counts = [int(process.communicate("go\n", timeout=60)[0]) for process in processes]
    assert sum(counts) == 100, counts


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # forking with a live writer thread is what is tested
def test_a_forked_child_counts_in_the_same_windows(tmp_path: Path) -> None:
    storage = FileWindowStorage(path=tmp_path / "windows.log", clock=FakeClock())
    assert anyio.run(hammer, storage, 3, 5) == 3
    child = os.fork()
    if child == 0:
        let_in = 99
        try:
            let_in = anyio.run(hammer, storage, 4, 5)
            storage.close()
        finally:
            os._exit(let_in)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    assert anyio.run(hammer, storage, 3, 5) == 0
    storage.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_process_let_in_still_counts(tmp_path: Path) -> None:
    storage = FileWindowStorage(path=tmp_path / "windows.log", clock=FakeClock())
    child = os.fork()
    if child == 0:
        try:
            anyio.run(hammer, storage, 3, 5)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert anyio.run(hammer, storage, 4, 5) == 2
    storage.close()


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_a_file_that_cannot_be_opened_is_storage_unavailable(tmp_path: Path) -> None:
    (tmp_path / "windows.log").mkdir()
    async with FileWindowStorage(path=tmp_path / "windows.log") as storage:
        with pytest.raises(StorageUnavailable):
            await storage.acquire_all([requests(1)])
        assert not await storage.check()


async def test_errors_are_wrapped_where_limits_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "windows.log").mkdir()
    async with FileWindowStorage(path=tmp_path / "windows.log", wrap_exceptions=True) as storage:
        with pytest.raises(StorageError):
            await storage.incr("a", 60)


async def test_a_full_disk_refuses_and_a_freed_one_goes_on(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a file that is made, for the first time or for more room, needs the disk."""
    monkeypatch.setattr(log_module, "HALF", 4096)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    async with FileWindowStorage(path=tmp_path / "windows.log", clock=clock) as storage:
        assert await admitted(storage, requests(3))
        with monkeypatch.context() as patched:
            patched.setattr(log_module, "make", full)
            refused = 0
            for number in range(200):
                try:
                    assert await admitted(storage, requests(1, scope=f"login:{number}"))
                except StorageUnavailable:
                    refused = number
                    break
            assert refused, "200 windows do not fit"
        assert await remaining(storage, requests(3)) == [2]
        assert await admitted(storage, requests(1, scope=f"login:{refused}")), "what failed took nothing"
        assert not await admitted(storage, requests(1, scope=f"login:{refused - 1}"))


async def test_a_lock_held_by_another_process_is_waited_for_and_then_refused(tmp_path: Path) -> None:
    path = tmp_path / "windows.log"
    async with FileWindowStorage(path=path, timeout=0.05) as storage:
        assert await admitted(storage, requests(3))
        with path.with_name("windows.log.lock").open() as blocker:
            fcntl.flock(blocker, fcntl.LOCK_EX)
            with pytest.raises(StorageUnavailable):
                await storage.acquire_all([requests(3)])
        assert await admitted(storage, requests(3))


async def test_a_correction_for_which_the_file_is_too_new_is_told(tmp_path: Path, clock: FakeClock) -> None:
    path, failures = tmp_path / "windows.log", list[BaseException]()
    async with FileWindowStorage(path=path, clock=clock) as storage:
        assert await admitted(storage, tokens(100, 60))
        with path.open("r+b") as file:
            file.seek(8)
            file.write(struct.pack("<Q", 99))
            file.seek(40)
            file.write(struct.pack("<q", 7))
        storage.adjust_soon([(tokens(100, 60), -50)], failed=failures.append)
    assert [type(failure) for failure in failures] == [ConfigurationError]


async def test_a_correction_that_cannot_be_made_is_told(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FileWindowStorage(path=tmp_path / "windows.log", clock=clock) as storage:
        assert await admitted(storage, tokens(100, 60))
        failures: list[BaseException] = []
        with monkeypatch.context() as patched:
            patched.setattr(MappedFile, "append", lambda *_: 1 / 0)
            storage.adjust_soon([(tokens(100, 60), -50)], failed=failures.append)
            assert [type(failure) for failure in failures] == [StorageUnavailable]
        assert await remaining(storage, tokens(100, 0)) == [40]
        storage.adjust_soon([(tokens(100, 60), -50)], failed=failures.append)
        assert await remaining(storage, tokens(100, 0)) == [90], "in its place before what is asked later"
        assert len(failures) == 1
