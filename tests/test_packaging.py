"""The wheel: what is in it, that it installs where nothing else is, and what importing it costs."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
IMPORT_SECONDS = 0.5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("wheel")
    """Built in an environment of its own, as pip builds it."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(into), str(CHECKOUT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(into.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what it requires, no extra."""
    directory = tmp_path_factory.mktemp("empty")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return python


def run(python: Path, code: str) -> str:
    done = subprocess.run([python, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, cwd=python.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name.partition("/")[0] for name in names} == {"starlette_aigateway", "starlette_aigateway-0.1.0.dist-info"}
    assert "starlette_aigateway/py.typed" in names
    sources = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "starlette_aigateway").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: MIT" in metadata
    assert {line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Provides-Extra")} == {
        "cli", "fast", "prices", "demo", "dev",
    }  # fmt: skip


HELLO = """
import anyio
from starlette_aigateway import AIGateway, CompletionRequest, Price
from starlette_aigateway.providers import EchoProvider

async def main():
    async with AIGateway.in_memory(providers=[EchoProvider()], prices={"echo": Price(1, 2)}) as gateway:
        raw_key, _ = await gateway.create_key("first", hard_cap_usd=1)
        answer = await gateway.complete(raw_key, CompletionRequest(model="echo", messages=[{"role": "user", "content": "hello"}]))
        print(answer.message["content"], answer.cost_usd)

anyio.run(main)
"""


def test_a_call_works_with_nothing_but_what_the_wheel_requires(installed: Path) -> None:
    assert run(installed, HELLO).split() == ["hello", "0.000006000"]


def test_importing_loads_no_http_client_no_extra_and_no_server(installed: Path) -> None:
    code = "import sys, starlette_aigateway; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run(installed, code).split())
    assert (
        loaded & {"aiohttp", "httptools", "httpx", "httpx2", "genai_prices", "uvicorn", "click", "rich", "pytest", "trio", "fastapi"}
        == set()
    )


def test_the_command_without_its_extra_says_how_to_install_it(installed: Path) -> None:
    for command in ([installed.with_name("aigateway")], [installed, "-m", "starlette_aigateway"]):
        done = subprocess.run([*command, "check"], capture_output=True, text=True, timeout=60, cwd=installed.parent)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "aigateway needs click and rich: pip install 'starlette_aigateway[cli]'\n"


def test_importing_costs_less_than_half_a_second_of_cpu(installed: Path) -> None:
    code = "import starlette_aigateway, time; print(time.process_time())"
    assert min(float(run(installed, code)) for _ in range(5)) < IMPORT_SECONDS
