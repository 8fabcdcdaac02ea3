"""What the tests of the file of the windows share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from starlette_aigateway.stores.windows import log as log_module
from starlette_aigateway.stores.windows.log import WindowLog
from starlette_aigateway.testing.clock import FakeClock
from tests.windows.logs import SMALL


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "windows.log"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "HALF", SMALL)


@pytest.fixture
def logs(path: Path) -> Iterator[list[WindowLog]]:
    """Closed in the end, whatever a test put in."""
    opened: list[WindowLog] = []
    yield opened
    for log in opened:
        log.close()
