"""Opening a SQLite file of the gateway: where it may lie, how it is opened, which schema it has."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from ...errors import ConfigurationError, StorageDamaged
from ...process import THIS, let_go

T = TypeVar("T")

Durability = Literal["FULL", "NORMAL", "OFF"]
"""`PRAGMA synchronous`. In WAL mode only `FULL` syncs each commit to the disk (https://sqlite.org/pragma.html#pragma_synchronous)."""

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs", "fuse.s3fs", "fuse.glusterfs", "lustre", "gfs2", "ocfs2"}
)


DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
CHECK_SECONDS = 2.0
"""The longest that a start looks for damage. `aigateway check` reads all."""

CHECK_BYTES = 2**28
"""Of larger files a start reads the vital tables only: off a cold disk all would take minutes, and SQLite does not look at the time while
it checks one tree."""


def connect(
    path: Path, *, durability: Durability, schema: Sequence[str], busy_timeout: float = 5.0, remedy: str | None = None
) -> sqlite3.Connection:
    """A connection in autocommit mode to the WAL-mode database at `path`, its schema brought up to date.

    `schema` is the list of migration scripts; `PRAGMA user_version` counts those that were applied. Raises `StorageUnavailable` when
    the file cannot be opened, with the `remedy` where it is damaged, and `ConfigurationError` when it was written by a newer version.
    """
    create_private(path)
    try:
        connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False, cached_statements=256)
    except sqlite3.Error as error:
        raise StorageDamaged(f"the database {path.name} cannot be opened: {error}") from error
    try:
        _enter_wal(connection, busy_timeout)
        connection.execute(f"PRAGMA synchronous={durability}")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute("PRAGMA trusted_schema=OFF")
        migrate(connection, schema, path.name)
    except sqlite3.Error as error:
        connection.close()
        if remedy is not None and is_damage(error):
            raise damaged(path, str(error), remedy) from error
        raise StorageDamaged(f"the database {path.name} cannot be opened: {error}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the contents of the file are at fault, not its surroundings."""
    return isinstance(code := getattr(error, "sqlite_errorcode", None), int) and code & 0xFF in DAMAGE


def damaged(path: Path, reason: str, remedy: str) -> StorageDamaged:
    return StorageDamaged(f"{path.name} is damaged or no database ({reason}): {remedy}")


def look_for_damage(connection: sqlite3.Connection, path: Path, remedy: str, vital: Sequence[str] = ()) -> None:
    """Reads the file, its first tables first, for `CHECK_SECONDS` at most; of one of more than
    `CHECK_BYTES` its `vital` tables. Raises `StorageUnavailable` for what it finds."""
    checks = [f"PRAGMA quick_check({table})" for table in vital] if path.stat().st_size > CHECK_BYTES else ["PRAGMA quick_check(1)"]
    deadline = time.monotonic() + CHECK_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        found = next((said for check in checks if (said := connection.execute(check).fetchone()[0]) != "ok"), "ok")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return
    except sqlite3.DatabaseError as error:
        raise damaged(path, str(error), remedy) from error
    finally:
        connection.set_progress_handler(None, 0)
    if found != "ok":
        raise damaged(path, " ".join(found.split()), remedy)


def _enter_wal(connection: sqlite3.Connection, busy_timeout: float) -> None:
    """Two workers that turn a new file into WAL mode at once would deadlock, so SQLite refuses one of them without asking its busy
    handler (https://sqlite.org/c3ref/busy_handler.html): wait here."""
    deadline = time.monotonic() + busy_timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(0.002)
        else:
            return


def create_private(path: Path) -> None:
    """An empty file at `path` with the mode 0600, if there is none; SQLite gives its `-wal` and `-shm` files the same mode.

    The file is made under another name and linked into place, so that no descriptor of the database itself is ever opened and closed
    here: closing one drops all POSIX locks of this process on the file (https://sqlite.org/howtocorrupt.html, section 2.2).
    """
    if str(path) == ":memory:" or path.exists():
        return
    try:
        descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            Path(draft).unlink()
    except OSError as error:
        raise StorageDamaged(f"the database {path.name} cannot be created: {error.strerror}") from error


def migrate(connection: sqlite3.Connection, schema: Sequence[str], name: str) -> None:
    """Applies what is missing, all or nothing; safe when several workers start at once."""
    if _version(connection) == len(schema):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        applied = _version(connection)
        if applied > len(schema):
            raise ConfigurationError(
                f"{name} in data_dir has schema version {applied}, and this release knows {len(schema)}: a newer release wrote it."
                " Upgrade the package to that release, or give this one a data_dir of its own",
                param="data_dir",
            )
        for script in schema[applied:]:
            for statement in script.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute(f"PRAGMA user_version={len(schema)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def prepare_directory(path: Path) -> None:
    """Creates the data directory for this user only (0700). Raises `ConfigurationError`, naming `data_dir`, where that cannot be: not a
    directory, not writable, another user's, or on a network file system (locks and WAL do not hold there, https://sqlite.org/wal.html)."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.stat()
    except OSError as error:
        raise ConfigurationError(f"data_dir {path} cannot be created: {error.strerror}", param="data_dir") from error
    if not stat.S_ISDIR(facts.st_mode) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigurationError(f"data_dir {path} is not a directory that this process can write to", param="data_dir")
    if facts.st_uid != os.geteuid():
        raise ConfigurationError(f"data_dir {path} belongs to another user; give the gateway a directory of its own", param="data_dir")
    kind = file_system(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            f"data_dir {path} lies on a network file system ({kind}), where SQLite's locks do not hold; use a local directory",
            param="data_dir",
        )


def file_system(path: Path) -> str | None:
    """The type of the file system below `path`, as Linux names it; None where that cannot be told."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    resolved = path.resolve()
    best: tuple[int, str] | None = None
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if resolved.is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            best = (len(point.parts), fields[2])
    return best[1] if best else None


class PerProcess:
    """One connection for short queries, opened at its first use, and again after a fork in the parent and in the child."""

    in_use_for_long: ClassVar[bool] = False

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._connection: sqlite3.Connection | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        THIS.pause_for_forks(self)

    def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """`read`, now, which must not ask for another one. Raises what it raises, and what opening raises."""
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            return read(self._connection)

    def close(self) -> None:
        with self._lock:
            self.close_files()

    def pause(self, timeout: float) -> bool:
        return self._lock.acquire(timeout=timeout)

    def resume(self) -> None:
        let_go(self._lock)

    def abandon(self) -> None:
        THIS.keep(self._connection)
        self._connection = None
        self._begin()

    def close_files(self) -> None:
        """Under the lock."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
