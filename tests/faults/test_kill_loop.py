"""The short form of the kill loop; `scripts/campaign kills` is the long one."""

from pathlib import Path

import pytest

from .kill_loop import kill_loop

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


@pytest.mark.slow
async def test_workers_killed_under_load_pass_no_cap_and_lose_no_billed_call(tmp_path: Path) -> None:
    found = await kill_loop(tmp_path, kills=6, seed=7, clients=16)
    assert found.wrong == []
    assert found.findings == []
    assert found.billed_calls > 50
    assert found.outcomes["expired"] > 0, "no kill met a call"
