"""Shared fixtures. Every async test runs on asyncio and on trio, unless it names one backend itself.

`HYPOTHESIS_PROFILE=campaign` looks at `EXAMPLES` examples of each property (10,000) where the default is 100.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "campaign", max_examples=int(os.environ.get("EXAMPLES", "10000")), deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
