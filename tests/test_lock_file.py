"""The lock between processes, where its holder is another open file."""

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from starlette_aigateway.errors import StorageUnavailable
from starlette_aigateway.stores import lock_file
from starlette_aigateway.stores.lock_file import LockFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def other(path: Path) -> Iterator[IO[bytes]]:
    """Has it."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def opened(path: Path, other: IO[bytes], *, brief: bool) -> LockFile:
    lock = LockFile(path, "test", 0.01, brief=brief)
    fcntl.flock(other, fcntl.LOCK_UN)
    with lock:
        pass
    fcntl.flock(other, fcntl.LOCK_EX)
    return lock


def test_a_brief_turn_of_another_process_is_waited_for_on_the_spot(path: Path, other: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    lock, looks = opened(path, other, brief=True), []

    def give_way() -> None:
        looks.append(1)
        if len(looks) == 3:
            fcntl.flock(other, fcntl.LOCK_UN)

    monkeypatch.setattr(lock_file, "_give_way", give_way)
    assert lock.enter_at_once()
    assert len(looks) == 3
    lock.close()


def test_a_turn_that_is_not_over_soon_is_not_waited_for_on_the_spot(path: Path, other: IO[bytes]) -> None:
    for brief in (True, False):
        lock = opened(path, other, brief=brief)
        assert not lock.enter_at_once()
        with pytest.raises(StorageUnavailable, match="locked by another process"):
            lock.__enter__()
        lock.close()


def test_who_had_to_wait_leaves_it_to_others_once_unless_turns_are_brief(
    path: Path, other: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("starlette_aigateway.stores.lock_file.time.sleep", pauses.append)
    for brief, expected in ((True, []), (False, [LockFile.COURTESY])):
        lock = opened(path, other, brief=brief)
        with pytest.raises(StorageUnavailable):
            lock.__enter__()
        fcntl.flock(other, fcntl.LOCK_UN)
        pauses.clear()
        assert lock.enter_at_once() is brief
        lock.leave()
        with lock:
            assert pauses == expected
        assert lock.enter_at_once()
        lock.close()
        fcntl.flock(other, fcntl.LOCK_EX)
