"""Shared fixtures. Every async test runs on asyncio and on trio, unless it names one backend itself."""

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
