"""Looking into the files of a `data_dir` from outside the gateway: nothing is created, migrated or written, and nobody is held up."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from ...accounts import GATEWAY_SCOPE, Finding
from ...errors import ConfigurationError, StorageUnavailable
from .connection import NETWORK_FILE_SYSTEMS, file_system
from .ledger_schema import LAST_ENTRY
from .witness import shortfall

FIGURES: Final = """
SELECT (SELECT count(*) FROM entries), (SELECT count(*) FROM holds WHERE expired = 0), (SELECT count(*) FROM usage),
  (SELECT coalesce(sum(records), 0) FROM rollups),
  (SELECT coalesce(sum(spent), 0) FROM balances WHERE scope = ? AND period = '')
"""

VERSION: Final = "SELECT user_version, (SELECT count(*) FROM sqlite_schema) FROM pragma_user_version"


class LedgerFigures(Struct, frozen=True, kw_only=True):
    """How much is in a ledger. `rolled_up` counts the records that are only there as sums. `spent` is what the gateway as a whole has spent
    in its lifetime, in nano-USD."""

    entries: int
    open_holds: int
    records: int
    rolled_up: int
    spent: int


@contextmanager
def inspected(path: Path, schema: Sequence[str]) -> Iterator[sqlite3.Connection]:
    """A connection to the database at `path` that cannot write, on one snapshot for as long as the block lasts. Writers go on beside it;
    only what they write is not taken out of the WAL until the block ends. A file that no process has open gets its `-wal` and `-shm`
    beside it again, which the next gateway takes over.

    Raises `ConfigurationError` where there is no such file or `schema` is not its version, and `StorageUnavailable` where it cannot be
    read; both say what to do. `StorageUnavailable` is also what becomes of a stored value that the block can make nothing of.
    """
    _check_place(path)
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:
            connection.execute("PRAGMA query_only=ON")
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("BEGIN")
            applied, tables = connection.execute(VERSION).fetchone()
            _check_version(path.name, applied, tables, len(schema))
            yield connection
    except UnicodeEncodeError:  # what was read is fine, and cannot be printed
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # SQLite keeps any value in any column
        raise StorageUnavailable(f"{path.name} holds what no gateway wrote: {error}") from error
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise StorageUnavailable(
            f"{path.name} cannot be read ({error}): run this as the user of the service; a damaged file is replaced by a backup of it"
        ) from error


def damage(connection: sqlite3.Connection, name: str) -> list[Finding]:
    """What SQLite itself finds wrong with the file; up to 100 findings."""
    return [Finding("file", name, message) for (message,) in connection.execute("PRAGMA quick_check") if message != "ok"]


def missing(connection: sqlite3.Connection, name: str, known: int | None) -> list[Finding]:
    """What was committed to the ledger by a time before the snapshot (`witness.noted`), and is not there any more."""
    (reached,) = connection.execute(LAST_ENTRY).fetchone()
    told = shortfall(reached, known)
    return [] if told is None else [Finding("I4", name, told)]


def ledger_figures(connection: sqlite3.Connection) -> LedgerFigures:
    entries, open_holds, records, rolled_up, spent = connection.execute(FIGURES, (GATEWAY_SCOPE,)).fetchone()
    return LedgerFigures(entries=entries, open_holds=open_holds, records=records, rolled_up=rolled_up, spent=spent)


def _check_place(path: Path) -> None:
    directory = path.parent
    if not directory.is_dir():
        raise ConfigurationError(f"there is no directory {directory}; --data-dir is the gateway's data_dir=", param="data_dir")
    if not path.is_file():
        lost = f"; {path.name}.lock says that there was one: put a backup back" if path.with_name(path.name + ".lock").exists() else ""
        raise ConfigurationError(f"there is no {path.name} in {directory}; --data-dir is the gateway's data_dir={lost}", param="data_dir")
    kind = file_system(directory)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            f"{directory} lies on a network file system ({kind}), where another host's writes are not seen whole; run this on that host",
            param="data_dir",
        )


def _check_version(name: str, applied: int, tables: int, known: int) -> None:
    if applied > known:
        raise ConfigurationError(f"{name} has schema version {applied}, this release knows {known}: upgrade the package")
    if not applied and tables:
        raise ConfigurationError(f"{name} is the database of another program; --data-dir is the gateway's data_dir=", param="data_dir")
    if not applied:
        raise ConfigurationError(f"{name} is empty: put a backup back, with the service stopped")
    if applied < known:
        raise ConfigurationError(
            f"{name} has schema version {applied}, this release reads {known}: start the gateway of this release once, which brings the "
            "file up to date, or use the command of the release that wrote it"
        )
