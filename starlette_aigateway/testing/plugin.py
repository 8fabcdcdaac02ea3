"""A pytest plugin: `pytest_plugins = ["starlette_aigateway.testing.plugin"]` in the `conftest.py` at the root of the tests.

It is not registered as an entry point: pytest would then import the package in every session of everybody who has it installed, also
where no test needs it, and before a coverage tool could see it.

Its fixtures are run by anyio's plugin, on the backends of `anyio_backend`; a test that is not asynchronous can use them as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ..gateway import AIGateway
from ..providers import EchoProvider
from ..settings import SettingFields


@pytest.fixture
def aigateway_settings() -> SettingFields:
    """What `aigateway` is made from: override this fixture. By default an `EchoProvider` serves every name."""
    return {"providers": [EchoProvider()]}


@pytest.fixture
async def aigateway(anyio_backend: object, aigateway_settings: SettingFields) -> AsyncIterator[AIGateway]:
    """A gateway that runs, in memory. When the test is over its books are verified (`check_ledger`), and it is closed."""
    async with AIGateway.in_memory(**aigateway_settings) as gateway:
        yield gateway
        findings = await gateway.check_ledger()
        assert findings == [], f"the ledger does not hold what it promises: {findings}"
