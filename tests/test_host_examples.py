"""The example of each framework is served by the command at its top: its own pages, and the gateway, under one login."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .hosts.cells import SERVERS
from .hosts.processes import free_port, serving
from .hosts.switchboard import PATIENCE
from .test_examples import CHECKOUT, documented_command, environment

pytestmark = pytest.mark.slow

READY = {server.name: server.ready for server in SERVERS}
BELOW = "/api/ai-gateway"
BODY = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
ANA = {
    "fastapi_app.py": {"authorization": "Bearer token-of-ana"},
    "quart_app.py": {"x-session": "session-of-ana"},
    "litestar_app.py": {"x-session": "session-of-ana"},
    "asgi_app.py": {"x-session": "session-of-ana"},
}


@contextmanager
def served(example: str, data_dir: Path) -> Iterator[httpx.Client]:
    """The app at its documented command, but for the port."""
    port = free_port()
    command = documented_command(example)
    assert command.count("8000") == 1
    asked = ["bash", "-c", "exec " + command.replace("8000", str(port))]
    with (
        serving(asked, READY[command.split()[0]], CHECKOUT, environment(AIGATEWAY_DATA_DIR=str(data_dir))),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client,
    ):
        yield client


def visit(client: httpx.Client, ana: dict[str, str]) -> None:
    """Everything that these apps have in common. `client` may have cookies of Ana's."""
    shouted = client.get("/shout", headers=ana)
    assert (shouted.status_code, shouted.json()["text"]) == (200, "HELLO")
    with client.stream("GET", "/stream", headers=ana) as answer:
        events = "".join(answer.iter_text())
    assert (answer.status_code, events.count("event: delta")) == (200, 5)
    assert "event: done" in events
    called = client.post(f"{BELOW}/complete", json=BODY, headers=ana)
    assert (called.status_code, called.json()["message"]["content"]) == (200, "hi")
    assert client.get(f"{BELOW}/usage", headers=ana).json()["totals"]["calls"] == 3


def be_turned_away(client: httpx.Client) -> None:
    for answer in (client.get("/shout"), client.get("/stream"), client.post(f"{BELOW}/complete", json=BODY)):
        assert answer.status_code == 401


@pytest.mark.parametrize("example", ANA)
def test_the_app_of_a_framework_serves_its_own_pages_and_the_gateway_under_one_login(example: str, tmp_path: Path) -> None:
    with served(example, tmp_path / "data") as client:
        be_turned_away(client)
        visit(client, ANA[example])


def test_the_django_project_serves_its_own_pages_and_the_gateway_under_one_login(tmp_path: Path) -> None:
    with served("django_app/asgi.py", tmp_path / "data") as client:
        be_turned_away(client)
        assert client.get("/login/ana").text == "hello, ana"
        visit(client, {})
