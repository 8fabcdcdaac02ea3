"""The embedded default: every store of one `data_dir`, over SQLite files and diskcache."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from limits.aio.storage import Storage

from .cache import DiskResponseCache
from .errors import ConfigurationError
from .policy.caching import CachePolicy
from .protocols import AuditStore, Clock, IdempotencyStore, KeyStore, Ledger, PriceStore, PromptStore, ResponseCache, TenantStore
from .stores.sqlite.audit import SQLiteAuditStore
from .stores.sqlite.config import ConfigDatabase
from .stores.sqlite.connection import prepare_directory
from .stores.sqlite.idempotency import SQLiteIdempotencyStore
from .stores.sqlite.keys import SQLiteKeyStore
from .stores.sqlite.ledger import SQLiteLedger
from .stores.sqlite.prices import SQLitePriceStore
from .stores.sqlite.prompts import SQLitePromptStore
from .stores.sqlite.tenants import SQLiteTenantStore
from .stores.windows.storage import FileWindowStorage
from .types import Timeouts


class Embedded:
    """The stores of one `data_dir`; each object is made at most once, and nothing is opened."""

    def __init__(self, directory: Path, timeouts: Timeouts, clock: Clock, cache: CachePolicy) -> None:
        self.directory = directory
        self._timeouts = timeouts
        self._clock = clock
        self._cache = cache
        self._config = ConfigDatabase(directory / "config.db", timeout=timeouts.storage)
        self._configures = False

    def keys(self) -> KeyStore:
        return SQLiteKeyStore(self._configuration())

    def tenants(self) -> TenantStore:
        return SQLiteTenantStore(self._configuration())

    def prices(self) -> PriceStore:
        return SQLitePriceStore(self._configuration())

    def prompts(self) -> PromptStore:
        return SQLitePromptStore(self._configuration())

    def audit(self) -> AuditStore:
        return SQLiteAuditStore(self._configuration())

    def ledger(self, thresholds: Sequence[int]) -> Ledger:
        return SQLiteLedger(self.directory / "ledger.db", timeout=self._timeouts.storage, thresholds=thresholds)

    def responses(self) -> ResponseCache:
        return DiskResponseCache(self.directory / "cache", size_limit=self._cache.size_limit_bytes, clock=self._clock)

    def windows(self) -> Storage:
        return FileWindowStorage(path=self.directory / "windows.log", clock=self._clock, timeout=self._timeouts.storage)

    def idempotency(self) -> IdempotencyStore:
        return SQLiteIdempotencyStore(self.directory / "answers.db", timeout=self._timeouts.storage)

    async def open(self, opened: AsyncExitStack) -> None:
        """The directory, and what is not a store of its own; the stores are entered by whoever asked for them."""
        prepare_directory(self.directory)
        if self._configures:
            await opened.enter_async_context(self._config)

    def _configuration(self) -> ConfigDatabase:
        self._configures = True
        return self._config


def directory_of(data_dir: str | os.PathLike[str] | None) -> Path:
    if data_dir is None:
        return Path(os.devnull)  # never used: every store is the host's own
    if data_dir == "":
        raise ConfigurationError("data_dir is empty; '.' is the current directory", param="data_dir")
    if not isinstance(data_dir, str | os.PathLike):
        raise ConfigurationError(f"data_dir must be a path, not {type(data_dir).__name__}", param="data_dir")
    return Path(data_dir)


def temporary_path() -> Path:
    """A directory of this process that is not there yet."""
    return Path(tempfile.gettempdir()) / f"aigateway-{os.getpid()}-{os.urandom(8).hex()}"


def remove_with(owner: object, path: Path) -> Callable[[], object]:
    """Removes `path` when `owner` is gone, or at once when what this gives is called; in the process that made it, not in those that were
    forked from it."""
    return weakref.finalize(owner, _remove, path, os.getpid())


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
