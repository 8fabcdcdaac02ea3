"""What becomes of the file of the windows where it is damaged, somebody else's, removed, or has no room on the disk."""

import errno
import fcntl
import logging
import resource
import struct
from contextlib import AsyncExitStack, ExitStack, closing
from pathlib import Path

import pytest

from starlette_aigateway import AIGateway
from starlette_aigateway.errors import ConfigurationError, StorageUnavailable
from starlette_aigateway.policy.windows import Demand, window_of
from starlette_aigateway.stores.lock_file import LockFile
from starlette_aigateway.stores.windows import log as log_module
from starlette_aigateway.stores.windows import mapped_file
from starlette_aigateway.stores.windows import turns as turns_module
from starlette_aigateway.stores.windows.log import WindowLog
from starlette_aigateway.stores.windows.mapped_file import PAGE, MappedFile
from starlette_aigateway.stores.windows.ops import Acquire
from starlette_aigateway.stores.windows.states import Hit, SteppedBack
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.windows import admitted, remaining, requests
from tests.windows.logs import GUARD, NOW, SMALL, Log, keep, used, window

pytestmark = pytest.mark.anyio


def header(half: int = SMALL, version: int = 1) -> bytes:
    return struct.pack("<8sQQQQq", b"aigwinds", version, half, *GUARD, 1).ljust(PAGE, b"\x00")


def test_what_came_before_the_damage_still_counts(path: Path, logs: list[WindowLog], caplog: pytest.LogCaptureFixture) -> None:
    logs += [Log(path, GUARD)]
    places = []
    for number in range(20):
        places.append(logs[0]._file.position)
        keep(logs[0], NOW, Hit(window(number), 1))
    with path.open("r+b") as file:
        file.seek(places[10] + 12)
        file.write(b"\xff" * 100)
    with caplog.at_level(logging.WARNING, "starlette_aigateway"):
        logs += [Log(path, GUARD)]
    assert used(logs[1].windows, NOW) == {window(number): 1 for number in range(10)}
    assert "damaged" in caplog.text
    keep(logs[1], NOW, Hit(window(99), 1))
    logs += [Log(path, GUARD)]
    assert used(logs[2].windows, NOW) == used(logs[1].windows, NOW)


@pytest.mark.parametrize("finder", ["who starts", "who runs"])
def test_a_length_that_reads_as_zero_is_damage_and_not_the_end(path: Path, logs: list[WindowLog], small: None, finder: str) -> None:
    """In either half: whoever took it for the end would write over what the others know."""
    logs += [Log(path, GUARD)]
    while logs[0]._number < 2 or logs[0]._file.used < SMALL // 2 or logs[0].windows.uncopied:
        keep(logs[0], NOW, Hit(window(0), 1))
    logs += [Log(path, GUARD)]
    before = used(logs[0].windows, NOW)
    place = logs[0]._file.position
    keep(logs[0], NOW, Hit(window(1), 1))
    keep(logs[0], NOW, Hit(window(2), 1))
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(8))
    if finder == "who starts":
        logs += [Log(path, GUARD)]
    keep(logs[-1], NOW, Hit(window(3), 1))
    for log in (*logs, Log(path, GUARD)):
        log.catch_up()
        assert used(log.windows, NOW) == before | {window(3): 1}
        assert log.in_place


def test_so_it_is_in_a_file_that_the_log_just_moved_to(path: Path, logs: list[WindowLog], caplog: pytest.LogCaptureFixture) -> None:
    logs += [Log(path, GUARD)]
    keep(logs[0], NOW, *(Hit(window(number), 1) for number in range(2 * log_module.COPIED_IN_MOVE)))
    logs[0]._move(NOW)
    with closing(MappedFile(path)) as file:
        file.go_to(1)
        while not file.at_end:
            last = file.position
            file.next()
    with path.open("r+b") as written:
        written.seek(last)
        written.write(bytes(8))
    logs += [Log(path, GUARD)]
    assert "damaged" in caplog.text
    assert len(used(logs[1].windows, NOW)) == log_module.COPIED_IN_MOVE


@pytest.mark.parametrize(
    "content",
    [b"", b"SQLite format 3\x00" + bytes(20_000), b"aigwinds", header(10**6), header(0), header(version=2**40), header(version=0)],
    ids=["empty", "another file", "short", "cut short", "nothing but a head", "a version of no release", "version 0"],
)
async def test_a_file_that_is_none_of_ours_is_replaced(path: Path, clock: FakeClock, content: bytes) -> None:
    path.write_bytes(content)
    async with FileWindowStorage(path=path, clock=clock) as storage:
        assert await admitted(storage, requests(1))
        assert not await admitted(storage, requests(1))


def test_who_read_on_before_the_damage_agrees_with_everybody_else(path: Path, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD) for _ in range(3)]
    keep(logs[0], NOW, Hit(window(0), 1))
    place = logs[0]._file.position
    keep(logs[0], NOW, Hit(window(0), 1))
    keep(logs[1], NOW, Hit(window(0), 1))
    with path.open("r+b") as file:
        file.seek(place + 12)
        file.write(b"\xff" * 10)
    keep(logs[2], NOW, Hit(window(0), 1))
    for log in (*logs, Log(path, GUARD)):
        log.catch_up()
        assert used(log.windows, NOW) == {window(0): 2}
        assert log.in_place


@pytest.mark.parametrize("turn", [0, 1, 2**62 + 1, -(2**63), 77])
async def test_a_half_that_was_never_noted_is_damage_and_what_the_halves_themselves_tell_is_kept(
    path: Path, clock: FakeClock, turn: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with FileWindowStorage(path=path, clock=clock) as storage:
        assert await admitted(storage, requests(5))
        with path.open("r+b") as file:
            file.seek(40)
            file.write(struct.pack("<q", turn))
        for more in (1, 2):
            assert await admitted(storage, requests(5))
            assert await remaining(storage, requests(5)) == [5 - 1 - more]
    assert "damaged" in caplog.text


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_no_flipped_bit_makes_workers_go_on_in_another_half_than_the_others(path: Path, small: None, number: int) -> None:
    """Who runs and knows all, who runs and was away for a while, and who starts then."""
    for bit in range(64):
        path.unlink(missing_ok=True)
        with ExitStack() as stack:
            logs = [stack.enter_context(closing(Log(path, GUARD))) for _ in range(2)]
            hits = 0
            while logs[0]._number < number or logs[0]._file.used < SMALL // 2 or logs[0].windows.uncopied:
                hits += 1
                keep(logs[0], NOW, Hit(window(0), 1))
                if logs[0]._number < number:
                    logs[1].catch_up()
            with path.open("r+b") as file:
                file.seek(40 + bit // 8)
                (byte,) = file.read(1)
                file.seek(40 + bit // 8)
                file.write(bytes([byte ^ 1 << bit % 8]))
            logs.append(stack.enter_context(closing(Log(path, GUARD))))
            for log in logs:
                keep(log, NOW, Hit(window(0), 1))
            for log in logs:
                log.catch_up()
                assert used(log.windows, NOW) == {window(0): hits + len(logs)}, f"bit {bit}"


async def test_who_replaces_a_file_that_is_none_of_ours_any_more_tells_those_who_have_it_open(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "LOOK_EVERY", 1e9)
    async with FileWindowStorage(path=path, clock=clock) as running:
        assert await admitted(running, requests(5))
        with path.open("r+b") as file:
            file.write(b"?")
        async with FileWindowStorage(path=path, clock=clock) as starting:
            for left in (4, 3):
                assert await admitted(starting, requests(5))
                assert await remaining(running, requests(5)) == [left]


async def test_who_finds_no_room_to_replace_a_damaged_file_takes_it_from_nobody(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with FileWindowStorage(path=path, clock=clock) as running:
        assert await admitted(running, requests(2))
        with path.open("r+b") as file:
            file.write(b"?")
        with monkeypatch.context() as patched:
            patched.setattr(log_module, "make", full)
            async with FileWindowStorage(path=path, clock=clock) as starting:
                with pytest.raises(StorageUnavailable):
                    await admitted(starting, requests(2))
            assert await admitted(running, requests(2))
            assert not await admitted(running, requests(2))


def test_a_correction_of_the_clock_in_a_window_that_the_damage_took_changes_nothing(path: Path, logs: list[WindowLog]) -> None:
    logs += [Log(path, GUARD)]
    for form in ("fixed", "moving", "sliding"):
        logs[0].append(NOW, [SteppedBack(window(0, form))])
    logs += [Log(path, GUARD)]
    assert used(logs[1].windows, NOW) == {}


async def test_a_half_without_its_head_begins_anew(path: Path, clock: FakeClock) -> None:
    for head in (PAGE, PAGE + log_module.HALF):
        async with FileWindowStorage(path=path, clock=clock) as storage:
            await storage.reset()
            assert await admitted(storage, requests(1))
        with path.open("r+b") as file:
            file.seek(head)
            file.write(b"\xff" * 8)
        async with FileWindowStorage(path=path, clock=clock) as storage:
            assert await admitted(storage, requests(2))
            assert len(await remaining(storage, requests(2))) == 1


async def test_a_file_of_a_newer_release_fails_the_start_and_says_what_to_do_and_is_left_alone(tmp_path: Path) -> None:
    async with AIGateway(data_dir=tmp_path) as gateway:
        assert gateway is not None
    path = tmp_path / "windows.log"
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<Q", 99))
    content = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"version 99.*Upgrade the package"):
        async with AIGateway(data_dir=tmp_path):
            pytest.fail("it started")
    assert path.read_bytes() == content


async def test_a_file_that_was_removed_begins_anew_for_everybody(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(turns_module, "LOOK_EVERY", 0.0)
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(FileWindowStorage(path=path, clock=clock)) for _ in range(2)]
        assert await admitted(one, requests(1))
        assert not await admitted(other, requests(1))
        path.unlink()
        assert await admitted(one, requests(1))
        assert not await admitted(other, requests(1))
    assert "removed or replaced" in caplog.text


async def test_who_opened_a_lock_file_that_was_removed_since_waits_for_who_came_later(path: Path, clock: FakeClock) -> None:
    lock = path.with_name("windows.log.lock")
    async with AsyncExitStack() as stack:
        earlier = await stack.enter_async_context(FileWindowStorage(path=path, clock=clock, timeout=0.05))
        assert await admitted(earlier, requests(3))
        lock.unlink()
        assert await admitted(earlier, requests(3)), "nobody else is there"
        later = await stack.enter_async_context(FileWindowStorage(path=path, clock=clock, timeout=0.05))
        with lock.open("r+b") as another:
            fcntl.flock(another, fcntl.LOCK_EX)
            for storage in (earlier, later):
                with pytest.raises(StorageUnavailable, match="locked"):
                    await storage.acquire_all([requests(3)])
        for storage in (earlier, later):
            assert await remaining(storage, requests(3)) == [1]
        assert await admitted(earlier, requests(3))
        assert not await admitted(later, requests(3))


async def test_who_has_the_lock_of_a_file_that_was_removed_takes_nobody_for_killed_who_moves_the_log_under_another(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FileWindowStorage(path=path, clock=clock) as earlier:
        assert await admitted(earlier, requests(3))
        path.with_name("windows.log.lock").unlink()
        make, told, writer = mapped_file.make, [], earlier._commit._writer
        assert writer is not None

        def make_while_another_asks(*arguments: object) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(log_module, "make", make)
                told.append(writer.now(Acquire([Demand(window_of("principal:a", "requests", 60), 3, 1)])))
            make(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(log_module, "make", make_while_another_asks)
        async with FileWindowStorage(path=path, clock=clock) as later:
            assert told == [None], "it has to wait for the other one"
            assert await admitted(later, requests(3))
            assert await admitted(earlier, requests(3))
            assert not await admitted(later, requests(3))


def test_two_who_make_the_file_at_the_same_moment_do_not_write_to_the_same(
    path: Path, logs: list[WindowLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    replace = Path.replace

    def noted(unfinished: Path, target: Path) -> Path:
        names.append(unfinished.name)
        return replace(unfinished, target)

    monkeypatch.setattr(Path, "replace", noted)
    left_behind = path.with_name("windows.log.killed.new")
    left_behind.touch()
    for _ in range(2):
        mapped_file.make(path, SMALL, b"", GUARD)
    assert len(set(names)) == 2
    assert not left_behind.exists()


def test_a_file_that_the_disk_has_no_room_for_is_not_left_behind(path: Path) -> None:
    mapped_file.make(path, SMALL, b"", GUARD)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SMALL, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            mapped_file.make(path, SMALL, b"", GUARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(path.parent.iterdir()) == [path]


async def test_a_lock_file_that_is_replaced_whenever_it_is_entered_is_storage_unavailable(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = path.with_name("windows.log.lock")
    async with FileWindowStorage(path=path, clock=clock) as storage:
        assert await admitted(storage, requests(3))
        enter = LockFile.__enter__

        def replaced(self: LockFile) -> None:
            enter(self)
            lock.unlink()

        with monkeypatch.context() as patched:
            patched.setattr(LockFile, "__enter__", replaced)
            lock.unlink()
            await storage.reset()
            async with FileWindowStorage(path=path, clock=clock) as other:
                assert not await other.check()
            with pytest.raises(StorageUnavailable, match="again and again"):
                await other.reset()
        assert await admitted(storage, requests(3))
