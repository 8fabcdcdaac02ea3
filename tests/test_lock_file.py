"""The lock between processes, where its holder is another open file."""

import fcntl
import os
import signal
import subprocess
import sys
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


HOLDER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from starlette_aigateway.stores.lock_file import LockFile

lock = LockFile(Path({path!r}), "test", 1.0)
lock.__enter__()
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.readline()
else:
    signal.pause()
"""


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_never_uses_the_lock_does_not_keep_that_of_a_killed_parent(path: Path) -> None:
    source = HOLDER.format(root=str(Path(__file__).parent.parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        mine = LockFile(path, "test", 0.05)
        with pytest.raises(StorageUnavailable):
            mine.__enter__()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        with mine:
            pass
        mine.close()
        parent.stdin.close()


def test_a_lock_knows_whether_who_comes_now_would_wait_for_it(path: Path) -> None:
    lock = LockFile(path, "test", 0.05)
    with lock:
        assert lock.in_place
        first = lock.identity
        path.rename(path.with_name("kept"))
        assert not lock.in_place
        path.touch()
        assert not lock.in_place
    lock.close()
    assert lock.identity is None
    with lock:
        assert lock.in_place
        assert lock.identity not in (None, first)
    lock.close()
