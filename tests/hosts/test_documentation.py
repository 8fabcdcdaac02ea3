"""What docs/hosts.md says of mounting the gateway is carried out as it stands there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .cells import CHECKOUT, SERVERS
from .common import PREFIX
from .processes import free_port, serving
from .table import DOCUMENT

BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
UVICORN = SERVERS[0]
GATEWAY = next(block for block in BLOCKS if "gateway = AIGateway(" in block)
MOUNTS = [block for block in BLOCKS if "from ai import gateway" in block]
DJANGO = "SECRET_KEY = 'of a test'\nROOT_URLCONF = __name__\nurlpatterns = []\nALLOWED_HOSTS = ['127.0.0.1']\nUSE_TZ = True\n"


def framework(block: str) -> str:
    named = re.findall(r"^from (starlette|fastapi|quart|litestar|django)\b", block, re.MULTILINE)
    kind = named[0] if named else "asgi"
    return kind if "AIGatewayMiddleware" in block else f"{kind} and nothing else"


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The base URL of the app that a block makes, in a directory that has nothing but what the page says."""
    modules = {"ai": GATEWAY, "site_settings": DJANGO, "site_app": request.param}
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    app = "application" if "\napplication =" in request.param else "app"
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", f"site_app:{app}", "--port", str(port)]
    with serving(command, UVICORN.ready, tmp_path, {"DJANGO_SETTINGS_MODULE": "site_settings", "PYTHONPATH": str(CHECKOUT)}):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("host", MOUNTS, ids=framework, indirect=True)
def test_the_gateway_stands_where_the_page_says(host: str, tmp_path: Path) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{host}{PREFIX}/complete", json=body, headers={"x-user": "ada"})
    assert (answer.status_code, answer.json()["message"]["content"]) == (200, "hi")
    assert httpx.post(f"{host}{PREFIX}/complete", json=body).status_code == 401
    assert httpx.get(f"{host}{PREFIX}x/healthz").status_code == 404
    assert (tmp_path / "ai-gateway-data" / "ledger.db").exists()


def test_every_host_of_the_matrix_is_shown_in_at_most_six_lines() -> None:
    shown = {framework(block): len([line for line in block.splitlines() if line.strip()]) for block in MOUNTS}
    assert shown.keys() == {"starlette", "fastapi", "quart", "litestar", "django", "asgi", "starlette and nothing else"}
    assert {name: lines for name, lines in shown.items() if lines > 6} == {}
