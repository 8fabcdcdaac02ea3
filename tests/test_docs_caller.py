"""The code of docs/caller.md, as it stands there, is imported and asked."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from starlette_aigateway import Principal
from starlette_aigateway.testing import ASGIClient, override

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "caller.md").read_text()
FILES = dict(block.split("\n", 1) for block in re.findall(r"```python\n# (.*?)```", PAGE, re.DOTALL))
ADA = {"x-user": "ada"}
COST = "0.000003000"
"""One token in, one out."""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the page, in a directory of its own."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield import_module
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_every_block_of_the_page_is_one_that_is_tried_here() -> None:
    assert len(FILES) == PAGE.count("```python")
    assert FILES.keys() == {"gateways.py", "in_starlette.py", "in_fastapi.py", "in_quart.py", "elsewhere.py", "two.py"}


@pytest.mark.parametrize("module", ["in_starlette", "in_fastapi"])
async def test_a_route_answers_as_whoever_is_logged_in(page: Any, module: str) -> None:
    async with ASGIClient(page(module).app, headers=ADA) as client:
        assert (await client.get("/ask")).json() == {"text": "hi", "cost_usd": COST}
        assert (await client.get("/ask", headers={"x-user": ""})).status == 401


@pytest.mark.parametrize(("module", "anyio_backend"), [("in_starlette", "asyncio"), ("in_starlette", "trio"), ("in_quart", "asyncio")])
async def test_a_route_streams_or_is_refused(page: Any, module: str) -> None:
    loaded = page(module)
    async with ASGIClient(loaded.app, headers=ADA) as client:
        assert (await client.get("/stream")).text.endswith("data: [DONE]\n\n")
        if module == "in_starlette":
            assert loaded.spent == [Decimal(COST)]
        with override(page("gateways").gateway, principal=Principal("poor", daily_cap_usd="0")):
            assert (await client.get("/stream")).status == 402
    assert Path("ai-gateway-data").exists()


def test_a_websocket_talks_and_tells_what_it_cost(page: Any) -> None:
    with TestClient(page("elsewhere").app) as client, client.websocket_connect("/talk", headers=ADA) as websocket:
        websocket.send_text("hi")
        said = [websocket.receive_text()]
        while not said[-1].startswith("$"):
            said.append(websocket.receive_text())
    assert ("".join(said[:-1]), said[-1]) == ("hi", f"${COST}")


async def test_a_job_is_carried_out_once(page: Any) -> None:
    nightly, gateway = page("elsewhere").nightly, page("gateways").gateway
    async with override(gateway) as recorded:
        assert [await nightly(), await nightly()] == ["sum up", "sum up"]
    assert [(record.principal, record.tags) for record in recorded.records] == [("nightly", {"job": "nightly"})]


async def test_two_gateways_are_told_apart(page: Any) -> None:
    two = page("two")
    with override(two.batch, principal=Principal("ada")) as in_batch, override(two.chat) as in_chat:
        async with ASGIClient(two.app) as client:
            assert (await client.get("/ask")).json() == "hi"
            assert [(await client.get(f"/api/{name}/healthz")).status for name in ("chat", "batch", "other")] == [200, 200, 404]
    assert (len(in_batch.calls), len(in_chat.calls)) == (1, 0)
