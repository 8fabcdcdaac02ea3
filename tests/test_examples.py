"""Every example runs by the command that its own docstring gives, and the README's apps are served."""

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Price, Principal
from starlette_aigateway.protocols import KeyStore
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.testing.keys import KeyStoreContract

from .serving import serve

pytestmark = pytest.mark.anyio

CHECKOUT = Path(__file__).resolve().parents[1]
EXAMPLES = CHECKOUT / "examples"
README = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
README_GATEWAY = next(block for block in README if "gateway = AIGateway(" in block)
README_CALLS = [next(block for block in README if said in block) for said in ("create_key(", "openai import OpenAI", "def summary(")]
README_APPS = {re.findall(r"starlette|fastapi|quart", block)[0]: block for block in README if "gateway=gateway" in block}


def documented_command(example: str) -> str:
    commands = re.findall(r"^ *\$ (.+)$", (EXAMPLES / example).read_text(), re.MULTILINE)
    assert len(commands) == 1, f"{example} documents {len(commands)} commands"
    return str(commands[0])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")}
    return {**kept, "PATH": path, **more}


def run(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_documents_one_command_that_starts_it(example: str) -> None:
    assert example.removesuffix(".py") in documented_command(example)


def test_the_custom_providers_answer_whole_and_in_pieces_and_are_billed() -> None:
    said = run(documented_command("custom_provider.py"))
    assert "reverse-1: desserts ($0.000003" in said
    assert "countdown-1: 5 4 3 2 1 0 in 6 pieces" in said
    assert "refused: count down from what?" in said
    assert "2 calls, $0.000016" in said


def test_the_custom_key_store_opens_rotates_and_closes() -> None:
    said = run(documented_command("custom_key_store.py"))
    assert [line.partition(": ")[2].partition(" at ")[0] for line in said.splitlines()] == [
        "hello",
        "this API key does not exist",
        "opens",
        "this API key was revoked",
    ]


class TestTheCustomKeyStore(KeyStoreContract):
    @pytest.fixture
    def store(self, monkeypatch: pytest.MonkeyPatch) -> KeyStore:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        import custom_key_store

        store: KeyStore = custom_key_store.DictKeyStore()
        return store

    @pytest.fixture
    def elsewhere(self, store: KeyStore) -> KeyStore:
        return store


@pytest.fixture
def starlette_app(tmp_path: Path) -> Iterator[str]:
    """The base URL of the app, served by its documented command, but for the port."""
    command = "exec " + documented_command("starlette_app.py").replace("--port 8000", "--port 0")
    env = environment(AIGATEWAY_DATA_DIR=str(tmp_path / "data"), AIGATEWAY_ADMIN_TOKEN="letmein")
    with subprocess.Popen(["bash", "-c", command], cwd=CHECKOUT, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            running = (re.search(r"running on (http://[\d.:]+)", line) for line in process.stderr)
            yield next(match[1] for match in running if match)
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.slow
def test_the_starlette_app_serves_its_own_pages_and_the_gateway(starlette_app: str) -> None:
    with httpx.Client(base_url=starlette_app) as client:
        assert "An ordinary app" in client.get("/").text
        assert client.get("/shout").status_code == 401
        shouted = client.get("/shout", params={"text": "hello there"}, headers={"x-session": "session-of-ana"})
        assert shouted.text.startswith("HELLO THERE!\n($0.000009")

        below = "/api/ai-gateway"
        body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
        assert client.post(f"{below}/complete", json=body).status_code == 401
        as_ana = client.post(f"{below}/complete", json=body, headers={"x-session": "session-of-ana"})
        assert as_ana.json()["message"]["content"] == "hi"
        admin = {"authorization": "Bearer letmein"}
        assert client.get(f"{below}/keys", headers=admin).json()["data"] == []
        assert client.get(f"{below}/keys", headers={"authorization": "Bearer guess"}).status_code == 403
        assert client.get(f"{below}/usage", headers=admin).json()["totals"]["calls"] == 2


@pytest.mark.slow
def test_the_official_client_needs_a_base_url_and_a_key(starlette_app: str) -> None:
    url = f"{starlette_app}/api/ai-gateway"
    created = httpx.post(f"{url}/keys", json={"name": "example"}, headers={"authorization": "Bearer letmein"})
    command = documented_command("openai_client.py").replace("http://127.0.0.1:8000/api/ai-gateway", url)
    said = run(command.replace("aigw_...", created.json()["key"]))
    assert "whole: Hello from the official client\n" in said
    assert "streamed: These words come one by one (" in said
    assert "404 model_not_found" in said


@pytest.mark.parametrize("framework", ["starlette", "fastapi", "quart"])
def test_the_app_of_the_readme_serves_the_gateway(framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"readme_{framework}.py").write_text(README_GATEWAY + README_APPS[framework])
    with serve(import_module(f"readme_{framework}").app) as base:
        below = f"{base}/api/ai-gateway"
        assert httpx.get(f"{below}/healthz").status_code == 200
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
        refused = httpx.post(f"{below}/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (tmp_path / "ai-gateway-data" / "ledger.db").exists()


async def test_the_calls_of_the_readme_work_one_after_the_other() -> None:
    gateway = AIGateway.in_memory(providers=[EchoProvider()], prices={"gpt-4o-mini": Price("0.15", "0.60")}, resolve_principal=somebody)
    app = Starlette()
    app.mount("/api/ai-gateway", gateway)
    app.add_middleware(AIGatewayMiddleware, gateway=gateway)
    names: dict[str, Any] = {"gateway": gateway}
    with serve(app) as base:
        for block in README_CALLS:
            await run_block(block.replace("http://127.0.0.1:8000", base), names)
        app.add_route("/summary", names["summary"])
        by_a_user = await to_thread.run_sync(httpx.get, f"{base}/summary")
    names["client"].close()
    assert names["answer"].choices[0].message.content == "Hello"
    assert by_a_user.json() == {"text": "Hello", "cost_usd": "0.000001500"}


async def somebody(connection: HTTPConnection) -> Principal:
    return Principal("user:somebody")


async def run_block(source: str, names: dict[str, Any]) -> None:
    """In a thread, where nothing in it is awaited: the official client blocks."""
    code = compile(source, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)
    else:
        await to_thread.run_sync(eval, code, names)
