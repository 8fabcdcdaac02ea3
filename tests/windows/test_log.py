"""The file of the windows: several processes at one log, its halves, its moves, and what kills and damage leave of it."""

import errno
import signal
import struct
import subprocess
import sys
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from pathlib import Path
from random import Random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starlette_aigateway.errors import StorageUnavailable
from starlette_aigateway.limiter import SharedWindows
from starlette_aigateway.policy.windows import MICROSECONDS, Demand, Refusal, Window
from starlette_aigateway.stores.windows import log as log_module
from starlette_aigateway.stores.windows import mapped_file
from starlette_aigateway.stores.windows.book import Book
from starlette_aigateway.stores.windows.log import WindowLog
from starlette_aigateway.stores.windows.mapped_file import PAGE, MappedFile, framed
from starlette_aigateway.stores.windows.ops import Acquire
from starlette_aigateway.stores.windows.states import Change, Count, Hit, Windows
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.windows import admitted, remaining, requests, tokens
from tests.windows.logs import GUARD, NOW, SMALL, SPAN, Log, keep, used, window

pytestmark = pytest.mark.anyio

# --- several processes, each with a log of its own over one file --------------------------------------------------------


Told = dict[Window, list[tuple[int, int]]]
STEPS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([0, 1, MICROSECONDS, 20 * MICROSECONDS]),
        st.integers(0, 12),
        st.sampled_from(["moving", "sliding", "fixed"]),
        st.integers(1, 30),
    ),
    min_size=60,
    max_size=250,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_all_processes_see_the_same_windows_over_halves_and_moves(
    steps: list[tuple[int, int, int, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Compared with windows that nobody else changes and that are never written; what is idle may be forgotten or not."""
    path = tmp_path_factory.mktemp("log") / "windows.log"
    alone, now = Windows(), NOW
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log_module, "HALF", SMALL)
        logs = [Log(path, GUARD) for _ in range(3)]
        turns = set()
        for who, pause, number, form, amount in steps:
            now += pause
            key = window(number, form)
            change = Count(key, amount, SPAN) if form == "fixed" else Hit(key, amount)
            change.apply(alone, now)
            keep(logs[who], now, change)
            turns.add((logs[who]._file.identity, logs[who]._number))
            assert used(logs[who].windows, now) == used(alone, now)
        late = Log(path, GUARD)
        for log in (*logs, late):
            log.catch_up()
            assert used(log.windows, now) == used(alone, now)
            log.close()


@settings(max_examples=15, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_all_processes_agree_whatever_the_clock_does(random: Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, now = tmp_path_factory.mktemp("log") / "windows.log", NOW
    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        patched.setattr(log_module, "HALF", SMALL)
        logs = [stack.enter_context(closing(Log(path, GUARD))) for _ in range(3)]
        for _ in range(200):
            now += random.choice([0, 1, 5, 70, 200, -1, -30, -200]) * MICROSECONDS
            exact, counter = (window(random.randrange(10), form) for form in ("moving", "sliding"))
            log = random.choice(logs)
            log.catch_up()
            book = Book(log.windows, now)
            if random.random() < 0.3:
                book.correct(counter, random.randrange(-50, 50), now - 60 * MICROSECONDS)
            else:
                verdict = Acquire([Demand(exact, 5, 1), Demand(counter, 100, random.randrange(60))]).apply(book)
                assert verdict.wait is None or 0 <= verdict.wait <= 2 * SPAN
            if book.changes:
                log.append(now, book.changes)
            for one in logs:
                one.catch_up()
                assert used(one.windows, now) == used(logs[0].windows, now)
        late = stack.enter_context(closing(Log(path, GUARD)))
        assert used(late.windows, now) == used(logs[0].windows, now)


def test_a_full_half_goes_on_in_the_other_and_keeps_what_counts(path: Path, small: None, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]
    short, long = window(0), Window("key:1", "sliding", 10**6)
    for number in range(400):
        keep(logs[number % 2], NOW + number * MICROSECONDS, Hit(short, 1), Hit(long, 1))
    assert logs[0]._number > 4
    assert path.stat().st_size == PAGE + 2 * SMALL
    logs += [Log(path, GUARD)]
    for log in logs[1:]:
        assert used(log.windows, NOW + 399 * MICROSECONDS) == {short: 60, long: 400}


def test_halves_that_are_filled_again_and_again_are_not_damaged(
    path: Path, small: None, logs: list[WindowLog], caplog: pytest.LogCaptureFixture
) -> None:
    logs += [Log(path, GUARD)]
    for filled in range(8 * SMALL // 64):
        keep(logs[0], NOW + filled, Count(window(filled % 8, "fixed"), 1, SPAN))
        if filled % 16 == 0:
            logs += [Log(path, GUARD)]
            assert used(logs[-1].windows, NOW + filled) == used(logs[0].windows, NOW + filled)
    assert logs[0]._number > 3
    assert caplog.text == ""


def test_what_needs_more_room_moves_to_a_larger_file(path: Path, small: None, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]
    before = logs[0]._file.identity
    for number in range(300):
        keep(logs[0], NOW, Hit(window(number), 1))
    assert path.stat().st_size > PAGE + 2 * SMALL
    assert logs[0]._file.identity != before
    logs[1].catch_up()
    assert used(logs[1].windows, NOW) == {window(number): 1 for number in range(300)}
    assert logs[1].in_place


def test_a_process_that_was_away_for_long_reads_everything_anew(path: Path, small: None, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]
    for number in range(600):
        keep(logs[0], NOW + number * MICROSECONDS, Hit(window(0), 1), Hit(window(1, "sliding"), 2))
    assert logs[0]._number > logs[1]._number + 2
    logs[1].catch_up()
    now = NOW + 599 * MICROSECONDS
    assert used(logs[1].windows, now) == used(logs[0].windows, now)


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Where a process dies."""


def test_a_frame_that_was_not_finished_is_not_there(path: Path, logs: list[WindowLog]) -> None:
    """The first bytes of a frame are written last; what comes after takes its place."""
    logs += [Log(path, GUARD)]
    keep(logs[0], NOW, Hit(window(0), 1))
    file = logs[0]._file
    file._memory[file.position + 8 : file.position + 200] = b"\xff" * 192
    logs += [Log(path, GUARD)]
    for log in logs:
        log.catch_up()
        assert used(log.windows, NOW) == {window(0): 1}
    keep(logs[1], NOW, Hit(window(0), 1))
    keep(logs[0], NOW, Hit(window(0), 1))
    logs += [Log(path, GUARD)]
    assert used(logs[2].windows, NOW) == {window(0): 3}


@pytest.mark.parametrize("at", ["before the head", "before the turn"])
def test_a_kill_between_two_halves_loses_nothing(
    path: Path, small: None, logs: list[WindowLog], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]

    def die(log: WindowLog) -> None:
        if at == "before the turn":
            log._go_on_in(log._number + 1)
            log._file.append(framed(log_module._encode(log_module.Head(log._number))))
        raise Killed

    total = 0
    with monkeypatch.context() as patched:
        patched.setattr(WindowLog, "_turn_over", die)
        with suppress(Killed):
            while total < 1000:
                total += 1
                keep(logs[0], NOW, Hit(window(0), 1))
    assert total < 1000, "it was killed"
    logs += [Log(path, GUARD)]
    for log in logs[1:]:
        log.catch_up()
        assert used(log.windows, NOW) == {window(0): total}
    for _ in range(200):
        keep(logs[1], NOW, Hit(window(0), 1))
        keep(logs[2], NOW, Hit(window(0), 1))
    assert logs[2]._number > 2
    assert used(logs[2].windows, NOW) == {window(0): total + 400}


def test_a_kill_while_the_head_of_a_half_is_written_over_an_older_one_is_no_damage(
    path: Path, small: None, logs: list[WindowLog], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logs += [Log(path, GUARD)]
    total = 0
    while logs[0]._number < 3:
        total += 1
        keep(logs[0], NOW, Hit(window(0), 1))

    def die(file: MappedFile, frames: bytes) -> bool:
        """Between the two stores of `append`."""
        if file.used:
            return append(file, frames)
        file._memory[file.position + 8 : file.position + len(frames)] = frames[8:]
        raise Killed

    append = MappedFile.append
    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(MappedFile, "append", die)
        while True:
            total += 1
            keep(logs[0], NOW, Hit(window(0), 1))
    logs += [Log(path, GUARD)]
    assert used(logs[1].windows, NOW) == {window(0): total}
    assert caplog.text == ""


def test_what_tells_which_half_is_written_is_stored_at_once(path: Path, logs: list[WindowLog]) -> None:
    """A process is killed before it or after it, and never halfway."""
    logs += [Log(path, GUARD)]
    stored: list[bytes] = []

    class Memory:
        def __setitem__(self, place: slice, cell: bytes) -> None:
            assert place.stop - place.start == len(cell) == 8
            stored.append(cell)

    memory, logs[0]._file._memory = logs[0]._file._memory, Memory()  # type: ignore[assignment]
    logs[0]._file.turn = 2
    logs[0]._file._memory = memory
    assert len(stored) == 1


@pytest.mark.parametrize("after", [False, True], ids=["before the new file is in place", "after"])
def test_a_kill_while_the_log_moves_loses_nothing(
    path: Path, small: None, logs: list[WindowLog], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]
    make = mapped_file.make

    def die(*arguments: object) -> None:
        if after:
            make(*arguments)  # type: ignore[arg-type]
        raise Killed

    count = 0
    with monkeypatch.context() as patched:
        patched.setattr(log_module, "make", die)
        with suppress(Killed):
            while count < 1000:
                count += 1
                keep(logs[0], NOW, Hit(window(count), 1))
    assert count < 1000, "it was killed"
    logs += [Log(path, GUARD)]
    told = {window(number): 1 for number in range(1, count + 1)}
    for log in logs[1:]:
        log.catch_up()
        known = used(log.windows, NOW)
        assert set(told) - set(known) <= {window(count)}, "only what was under way may be lost, which nobody was told of"
        assert set(known) <= set(told)
    keep(logs[1], NOW, Hit(window(count + 1), 1))
    logs[2].catch_up()
    assert used(logs[1].windows, NOW) == used(logs[2].windows, NOW)


def test_a_record_of_a_process_that_was_killed_before_it_noted_the_end_is_there(path: Path, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD), Log(path, GUARD)]
    noted = logs[0]._file._filled
    keep(logs[0], NOW, Hit(window(0), 1))
    with path.open("r+b") as file:
        file.seek(logs[0]._file._filled_at)
        file.write(struct.pack("<Q", noted))
    keep(logs[1], NOW, Hit(window(0), 1))
    logs += [Log(path, GUARD)]
    assert used(logs[2].windows, NOW) == used(logs[1].windows, NOW) == {window(0): 2}


VICTIM = """
import sys, anyio
sys.path.insert(0, {root!r})
from starlette_aigateway.stores.windows import log
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from starlette_aigateway.testing.windows import admitted, requests, tokens
log.HALF = 4096

async def main():
    async with FileWindowStorage(path={path!r}) as storage:
        for number in range(10**9):
            let_in = await admitted(storage, requests(10**6, scope="gateway", seconds=10**6), requests(9, scope=f"login:{{number % 40}}"))
            print(int(let_in), flush=True)

anyio.run(main)
"""


def test_kills_in_the_midst_of_it_lose_nothing_that_was_told(path: Path) -> None:
    """Over halves of 4 KiB, so that they fall into all that there is; two processes at a time."""
    source = VICTIM.format(root=str(Path(__file__).parents[2]), path=str(path))
    told = 0
    for lines in range(40, 400, 60):
        victims = [subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for victim in victims:
            assert victim.stdout is not None
            read = [victim.stdout.readline() for _ in range(lines)]
            victim.send_signal(signal.SIGKILL)
            rest, _ = victim.communicate()
            told += sum(int(line) for line in (*read, *rest.splitlines(keepends=True)) if line.endswith("\n"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log_module, "HALF", SMALL)
        counted = anyio.run(look, path)
    assert told <= counted <= told + 12, "each of the 12 may have had one under way"


async def look(path: Path) -> int:
    async with FileWindowStorage(path=path) as storage:
        (left,) = await remaining(storage, requests(10**6, scope="gateway", seconds=10**6))
    return 10**6 - left


# --- one at a time ------------------------------------------------------------------------------------------------------


async def test_what_failed_in_memory_is_read_anew_from_the_file(path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FileWindowStorage(path=path, clock=clock) as storage:
        assert await admitted(storage, requests(2))
        with monkeypatch.context() as patched:
            patched.setattr(MappedFile, "append", broken)
            with pytest.raises(StorageUnavailable):
                await storage.acquire_all([requests(2)])
        assert await remaining(storage, requests(2)) == [1]


def broken(*_: object) -> bool:
    raise OSError(errno.EIO, "broken")


async def test_operations_that_come_together_are_one_turn_and_alone_they_are_done_at_once(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FileWindowStorage(path=path, clock=clock) as storage:
        records: list[int] = []
        append = WindowLog.append

        def counted(log: WindowLog, now: int, changes: list[Change]) -> None:
            records.append(len(changes))
            append(log, now, changes)

        monkeypatch.setattr(WindowLog, "append", counted)
        for _ in range(3):
            assert await admitted(storage, requests(100))
        assert records == [1, 1, 1]

        async def several(storage: SharedWindows) -> None:
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(admitted, storage, requests(100))

        await several(storage)
        await several(storage)
        assert sum(records) == 43
        assert max(records) > 1, "the loop was busy then"
        assert await remaining(storage, requests(100)) == [57]


async def test_a_fixed_window_ends_at_the_latest_its_length_after_a_clock_that_stepped_back(path: Path, clock: FakeClock) -> None:
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(FileWindowStorage(path=path, clock=clock)) for _ in range(2)]
        assert await one.incr("key", 60) == 1
        clock.advance(-86_400)
        assert await one.get_expiry("key") == clock() + 60
        clock.advance(20)
        assert await other.get_expiry("key") == clock() + 40
        assert await other.incr("key", 60) == 2
        clock.advance(-20)
        assert await other.incr("key", 60) == 3
        clock.advance(60)
        assert [await storage.get("key") for storage in (one, other)] == [0, 0]


async def test_a_clock_that_steps_back_is_seen_by_every_process(path: Path, clock: FakeClock) -> None:
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(FileWindowStorage(path=path, clock=clock)) for _ in range(2)]
        assert await admitted(one, requests(1), tokens(10, 10))
        clock.advance(-1000)
        for storage in (other, one):
            refusal = await storage.acquire_all([requests(1)])
            assert isinstance(refusal, Refusal)
            assert refusal.wait == 60
        clock.advance(60)
        assert await admitted(other, requests(1))
        assert not await admitted(one, requests(1))
