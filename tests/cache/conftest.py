"""What the tests of the response cache share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from starlette_aigateway.cache import DiskResponseCache
from starlette_aigateway.testing.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
async def cache(directory: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with DiskResponseCache(directory, clock=clock) as opened:
        yield opened


@pytest.fixture
async def other(directory: Path, clock: FakeClock) -> AsyncIterator[DiskResponseCache]:
    async with DiskResponseCache(directory, clock=clock) as opened:
        yield opened
