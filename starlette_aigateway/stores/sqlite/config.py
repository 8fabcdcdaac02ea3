"""`config.db`: keys, tenants, prices and prompts in one small file that is read at each call and rarely written.

Reads run inline on the event loop: a row by its key takes a few microseconds, and a reader in WAL mode waits for no writer. What was
read is kept in memory for as long as nobody, in any process, has committed anything to the file, which its `Version` tells.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeAlias, TypeVar, cast

import anyio
import msgspec

from ...errors import InvalidArgument, StorageDamaged, StorageUnavailable
from ..commit import GroupCommit
from .commit_mark import CommitMark, Version
from .connection import PerProcess, connect, look_for_damage
from .transactions import StoreFile
from .witness import Witness

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

Read: TypeAlias = Callable[[sqlite3.Connection], T]
Write: TypeAlias = Callable[[sqlite3.Connection], T]
"""Changes rows inside an open transaction, of which nothing stays if it raises. May be called again."""

READ_TIMEOUT_MS = 250
"""The longest that a read may hold up the event loop. Readers wait only while another process recovers or closes the WAL."""

MAX_REMEMBERED = 10_000

REMEDY = (
    "stop the service and put a backup back: keys, tenants, prices and prompts are then what they were. To begin anew, with no keys, move"
    " config.db, config.db-wal and config.db.lock away"
)

UNSTORABLE = (UnicodeEncodeError, OverflowError)
"""What `sqlite3` raises for a lone surrogate and for an integer beyond 64 bits."""

SCHEMA = (
    """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    previous_digest BLOB UNIQUE,
    previous_until REAL,
    name TEXT NOT NULL,
    hint TEXT NOT NULL,
    tenant TEXT,
    allowed_models TEXT,
    limits TEXT NOT NULL,
    metadata TEXT NOT NULL,
    created_at TEXT NOT NULL,
    expires_at TEXT,
    revoked_at TEXT
) WITHOUT ROWID;
CREATE INDEX keys_of_tenant ON keys (tenant, id) WHERE tenant IS NOT NULL;
CREATE TABLE tenants (
    id TEXT PRIMARY KEY,
    limits TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE prices (
    provider TEXT NOT NULL,
    model TEXT NOT NULL,
    price TEXT NOT NULL,
    PRIMARY KEY (provider, model)
) WITHOUT ROWID;
CREATE TABLE prompts (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    messages TEXT NOT NULL,
    settings TEXT NOT NULL,
    text INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    PRIMARY KEY (tenant, name, version)
) WITHOUT ROWID;
CREATE TABLE labels (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    label TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, label),
    FOREIGN KEY (tenant, name, version) REFERENCES prompts (tenant, name, version)
) WITHOUT ROWID
""",
    """
CREATE TABLE admin_actions (
    id TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    tenant TEXT,
    details TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX actions_of_tenant ON admin_actions (tenant, id) WHERE tenant IS NOT NULL;
CREATE INDEX actions_on_subject ON admin_actions (subject, id);
CREATE TRIGGER actions_stay BEFORE UPDATE ON admin_actions BEGIN SELECT RAISE(ABORT, 'admin_actions is append-only'); END;
CREATE TRIGGER actions_remain BEFORE DELETE ON admin_actions BEGIN SELECT RAISE(ABORT, 'admin_actions is append-only'); END
""",
    """
CREATE INDEX actions_by_actor ON admin_actions (actor, id);
CREATE INDEX actions_of_kind ON admin_actions (action, id);
CREATE INDEX actions_by_time ON admin_actions (created_at)
""",
)
"""The empty string stands for `any provider` in `prices` and for `shared by all tenants` in `prompts`: neither is an id."""


class ConfigDatabase:
    """Owns the connections to `config.db`: a writer thread, a reader and one that watches for changes.

    Opened at first use, or by `async with`, and anew in a forked child. `timeout` is the longest wait of a write, in seconds. Whatever
    keeps the file from being read or written is a `StorageUnavailable`.
    """

    def __init__(self, path: Path, *, timeout: float = 5.0) -> None:
        self._path = path
        self._timeout = timeout
        self._witness = Witness(path, progress="SELECT 0", remedy=REMEDY)
        self._writer: GroupCommit[Write[Any], Any] = GroupCommit(
            StoreFile(
                connect=self._open,
                apply=_apply,
                name="config",
                lock_file=self._witness.lock_file,
                timeout=timeout,
                witness=self._witness,
                mark=CommitMark(path, self._witness.lock_file),
            )
        )
        self._reader = PerProcess(self._open_reader)
        self._watch = PerProcess(self._open_watch)
        self._openings = 0
        self._version = Version(path, self._data_version)
        self.version = self._version.get
        """A number that is another one after any commit to the file, in whichever process; one that marks nothing (`commit_mark.py`) is
        noticed within 50 ms. Raises `StorageUnavailable`."""

    async def __aenter__(self) -> Self:
        try:
            self.version()
            await anyio.to_thread.run_sync(self._reader.run, lambda connection: look_for_damage(connection, self._path, REMEDY))
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """Commits what is waiting and closes everything; a later use opens it again. Blocks for the length of a commit."""
        self._writer.close()
        self._reader.close()
        self._watch.close()
        self._version.forget()

    def _data_version(self) -> int:
        try:
            row = self._watch.run(lambda connection: connection.execute("PRAGMA data_version").fetchone())
        except sqlite3.Error as error:
            raise self._unreadable(error, self._watch) from error
        return self._openings << 32 | int(row[0])  # the pragma's numbers of two connections cannot be compared

    def read(self, op: Read[T]) -> T:
        """Runs short queries, now. Raises `InvalidArgument` for a value that no row can hold."""
        try:
            return self._reader.run(op)
        except UNSTORABLE:
            raise _unstorable() from None
        except sqlite3.Error as error:
            raise self._unreadable(error, self._reader) from error

    async def write(self, op: Write[T]) -> T:
        """Runs `op` in a transaction on the writer thread and waits until it is on the disk. Raises what `op` raises."""
        return cast("T", await self._writer.run(op))

    def _open(self) -> sqlite3.Connection:
        return self._witness.open(lambda: connect(self._path, durability="FULL", schema=SCHEMA, busy_timeout=self._timeout, remedy=REMEDY))

    def _open_reader(self) -> sqlite3.Connection:
        connection = self._open()
        connection.execute(f"PRAGMA busy_timeout={READ_TIMEOUT_MS}")
        connection.execute("PRAGMA query_only=ON")
        return connection

    def _open_watch(self) -> sqlite3.Connection:
        connection = self._open_reader()
        self._openings += 1
        return connection

    def _unreadable(self, error: sqlite3.Error, connection: PerProcess) -> StorageUnavailable:
        connection.close()
        return StorageUnavailable(f"the database {self._path.name} cannot be read: {error}", retry_after=1.0)


def _apply(connection: sqlite3.Connection, ops: Sequence[Write[Any]]) -> Sequence[Any]:
    return [_apply_one(connection, op) for op in ops]


def _apply_one(connection: sqlite3.Connection, op: Write[Any]) -> Any:
    connection.execute("SAVEPOINT op")
    try:
        outcome = op(connection)
    except Exception as error:  # whatever is wrong with one write is its caller's, not that of the whole batch
        if not connection.in_transaction:  # a full disk, say: SQLite has rolled back the whole batch
            raise
        connection.execute("ROLLBACK TO op")
        outcome = _refusal(error)
    connection.execute("RELEASE op")
    return outcome


def _refusal(error: Exception) -> Exception:
    if isinstance(error, UNSTORABLE):
        return _unstorable()
    if isinstance(error, sqlite3.Error):
        return StorageUnavailable(f"the config store refused a write: {error}")
    return error


def _unstorable() -> InvalidArgument:
    return InvalidArgument("a text that is not valid Unicode or a number beyond 64 bits cannot be stored")


class Remembered(Generic[K, V]):
    """What was read from the database, for as long as it is still true there."""

    def __init__(self, database: ConfigDatabase, limit: int = MAX_REMEMBERED) -> None:
        self._database = database
        self._limit = limit
        self._version = -1
        self._entries: dict[K, V] = {}

    def entries(self) -> dict[K, V]:
        """What is known now. Put into this very dict what is read after this call, not into a later one."""
        version = self._database.version()
        if version != self._version:
            self._entries = {}
            self._version = version
        return self._entries

    def get(self, key: K, load: Callable[[], V]) -> V:
        entries = self.entries()
        try:
            return entries[key]
        except KeyError:
            value = load()
            self.put(entries, key, value)
            return value

    def put(self, entries: dict[K, V], key: K, value: V) -> None:
        """Keeps `value` in `entries`; the oldest one goes when there are too many."""
        while len(entries) >= self._limit:
            entries.pop(next(iter(entries)), None)
        entries[key] = value


def encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def decode(text: str) -> Any:
    """Raises `StorageUnavailable` for a cell that somebody else has written: nothing is guessed."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise StorageDamaged("the config database holds a row that cannot be read") from error
