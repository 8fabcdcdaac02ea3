from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .kit import FaultyLedger


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[FaultyLedger]:
    async with FaultyLedger(tmp_path / "ledger.db") as ledger:
        yield ledger
