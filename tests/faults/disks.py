"""Disks that a test can fill: a small one that is mounted, where that is permitted, and a database that is kept from growing anywhere."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest

from starlette_aigateway.stores.sqlite.connection import connect

SIZE = "3m"
NO_LIMIT = 4294967294


class Disk(Protocol):
    """`path` is an empty directory on it. After `spoil` nothing more can be written there, after `mend` it can again. `pings`: what is
    there already can still be written over, which is all that a ping of the ledger needs."""

    path: Path
    pings: bool

    def spoil(self) -> None: ...

    def mend(self) -> None: ...


def mount(point: Path, options: str) -> bool:
    """Mounts a file system in memory at `point`; whether that is permitted here."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def unmount(point: Path) -> None:
    subprocess.run(["umount", "-l", str(point)], check=True)


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as point:
        if not mount(Path(point), "size=4k"):
            return False
        unmount(Path(point))
        return True


class Mounted:
    """A file system of `SIZE`, which is filled to its last byte."""

    pings = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def spoil(self) -> None:
        descriptor = os.open(self.path / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (65_536, 4096, 512, 1):
                with suppress(OSError):
                    while os.write(descriptor, b"x" * size):
                        pass
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                os.write(descriptor, b"x")
        finally:
            os.close(descriptor)

    def mend(self) -> None:
        (self.path / "filler").unlink()


class Restricted:
    """Any directory; the connections to the ledger are told by a pragma to write no more."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, spoiling: str, mending: str, *, pings: bool = False) -> None:
        self.path = path
        self.pings = pings
        self._pragma = self._mending = mending
        self._spoiling = spoiling
        self._connections: list[sqlite3.Connection] = []
        monkeypatch.setattr("starlette_aigateway.stores.sqlite.ledger.connect", self._restricted(connect))

    def spoil(self) -> None:
        self._tell(self._spoiling)

    def mend(self) -> None:
        self._tell(self._mending)

    def _tell(self, pragma: str) -> None:
        self._pragma = pragma
        for connection in self._connections:
            with suppress(sqlite3.ProgrammingError):  # closed since
                connection.execute(pragma)

    def _restricted(self, opens: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        def opened(*args: Any, **more: Any) -> sqlite3.Connection:
            connection = opens(*args, **more)
            connection.execute(self._pragma)
            self._connections.append(connection)
            return connection

        return opened


KINDS = (["mounted"] if may_mount() else []) + ["quota", "read-only"]
"""A full disk twice, and one that the system has made read-only after an error."""


@contextmanager
def disk(kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    path = directory / "disk"
    path.mkdir(mode=0o700)
    if kind == "mounted":
        assert mount(path, f"size={SIZE},mode=0700")
        try:
            yield Mounted(path)
        finally:
            unmount(path)
    elif kind == "quota":
        yield Restricted(path, monkeypatch, "PRAGMA max_page_count=1", f"PRAGMA max_page_count={NO_LIMIT}", pings=True)
    else:
        yield Restricted(path, monkeypatch, "PRAGMA query_only=ON", "PRAGMA query_only=OFF")
