"""Shared fixtures. Every async test runs on asyncio and on trio, unless it names one backend itself.

`HYPOTHESIS_PROFILE=campaign` looks at `EXAMPLES` examples of each property (10,000) where the default is 100.
"""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "campaign", max_examples=int(os.environ.get("EXAMPLES", "10000")), deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    """Processes that tests start are not traced, which would take twice as long; those of pytest-xdist are, which begin after this."""
    if not config.getoption("numprocesses"):
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(scope="module", autouse=True)
def campaigns_are_not_traced(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("untraced") is None or (coverage := sys.modules.get("coverage")) is None:
        yield
        return
    tracer = coverage.Coverage.current()
    tracer.stop()
    yield
    tracer.start()
