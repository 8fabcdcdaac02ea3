"""The pytest plugin for hosts: off unless it is asked for; then a gateway that runs."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

CONFTEST = 'pytest_plugins = ["starlette_aigateway.testing.plugin"]\n'
TESTS = """
import pytest
from starlette_aigateway import Price, Principal
from starlette_aigateway.testing import ScriptedProvider

HELLO = [{"role": "user", "content": "hello"}]
started = []


@pytest.mark.anyio
async def test_a_gateway_runs(aigateway):
    assert aigateway._composition.lifecycle.started
    answer = await aigateway.acting_as(Principal("ada")).complete(model="any", messages=HELLO)
    assert answer.message["content"] == "hello"


def test_also_where_nothing_is_awaited(aigateway):
    assert aigateway.name == "default"


class TestSettings:
    @pytest.fixture
    def aigateway_settings(self):
        return {"providers": [ScriptedProvider("scripted")], "prices": {"m": Price(1, 2)}, "name": "mine"}

    @pytest.mark.anyio
    async def test_of_one_s_own(self, aigateway):
        answer = await aigateway.acting_as(Principal("ada", hard_cap_usd="1")).complete(model="m", messages=HELLO)
        assert (answer.message["content"], aigateway.name) == ("scripted", "mine")
"""


def run(directory: Path, conftest: str, tests: str) -> str:
    (directory / "conftest.py").write_text(conftest)
    (directory / "test_host.py").write_text(tests)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(directory), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def test_its_gateway_runs_on_every_backend_and_is_made_from_settings_of_one_s_own(tmp_path: Path) -> None:
    assert "6 passed" in run(tmp_path, CONFTEST, TESTS)


def test_nothing_of_it_is_there_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert "fixture 'aigateway' not found" in run(tmp_path, "", TESTS)
    ours = [point.value for point in entry_points(group="pytest11") if "aigateway" in point.value]
    assert ours == []


@pytest.mark.parametrize("module", ["starlette_aigateway", "starlette_aigateway.fastapi", "starlette_aigateway.providers"])
def test_nothing_that_is_for_tests_is_loaded_by_anything_else(module: str) -> None:
    code = (
        f"import sys, {module}; print([name for name in sys.modules if name.startswith('starlette_aigateway.testing') or name == 'pytest'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
