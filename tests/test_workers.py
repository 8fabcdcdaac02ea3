"""Several worker processes, one `data_dir`: windows, caps and revocations hold over all of them, and a killed process loses nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from starlette_aigateway import AIGateway, Key, Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

ROOT = Path(__file__).parent.parent


class Worker:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url


@contextmanager
def worker(data_dir: Path, *options: str, **environment: str) -> Iterator[Worker]:
    """A uvicorn of its own over `data_dir`, asked to stop at the end."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.worker_app:app", "--port", str(port), "--no-access-log", *options]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DATA_DIR": str(data_dir), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stderr is not None
            awaited = {"Application startup complete", "Uvicorn running on"}
            while awaited:
                line = process.stderr.readline()
                assert line, "the worker did not start"
                awaited = {sign for sign in awaited if sign not in line}
            yield Worker(process, f"http://127.0.0.1:{port}/api/ai-gateway")
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def workers(data_dir: Path, count: int = 2) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        yield [stack.enter_context(worker(data_dir)) for _ in range(count)]


def body(text: str, model: str = "echo") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


async def new_key(data_dir: Path, **fields: Any) -> tuple[str, Key]:
    async with AIGateway(data_dir=data_dir) as gateway:
        return await gateway.create_key("k", **fields)


async def storm(urls: list[str], raw: str, calls: int) -> Counter[int]:
    """`calls` calls at the same time, spread over the workers; how many got which status."""
    statuses: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=calls)
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {raw}"}, timeout=60, limits=limits) as client:

        async def call(number: int) -> None:
            answer = await client.post(urls[number % len(urls)] + "/complete", json=body(f"call {number}"))
            statuses[answer.status_code] += 1

        async with anyio.create_task_group() as group:
            for number in range(calls):
                group.start_soon(call, number)
    return statuses


async def test_a_window_admits_exactly_its_limit_over_two_workers(tmp_path: Path) -> None:
    raw, _ = await new_key(tmp_path, requests_per_minute=100)
    with workers(tmp_path) as pair:
        assert await storm([one.url for one in pair], raw, 400) == {200: 100, 429: 300}


@pytest.mark.parametrize("whose", ["principal", "tenant"])
async def test_a_cap_admits_exactly_what_fits_over_two_workers(tmp_path: Path, whose: str) -> None:
    if whose == "principal":
        raw, _ = await new_key(tmp_path, monthly_cap_usd="50")
    else:
        async with AIGateway(data_dir=tmp_path) as gateway:
            await gateway.save_tenant(Tenant("t", daily_cap_usd="50"))
            raw, _ = await gateway.create_key("k", tenant="t")
    with workers(tmp_path) as pair:
        assert await storm([one.url for one in pair], raw, 300) == {200: 50, 402: 250}
    async with AIGateway(data_dir=tmp_path) as gateway:
        assert await gateway.check_ledger() == []
        assert (await gateway.usage()).totals.calls == 50


async def test_what_one_worker_revokes_or_changes_the_other_knows_at_once(tmp_path: Path) -> None:
    raw, key = await new_key(tmp_path)
    admin = {"authorization": "Bearer admin"}
    with workers(tmp_path) as (one, other), httpx.Client(timeout=20) as client:
        mine = {"authorization": f"Bearer {raw}"}

        def call(text: str) -> int:
            return client.post(other.url + "/complete", json=body(text), headers=mine).status_code

        assert call("a") == 200
        assert client.patch(f"{one.url}/keys/{key.id}", json={"hard_cap_usd": "0.5"}, headers=admin).status_code == 200
        assert call("b") == 402
        assert client.patch(f"{one.url}/keys/{key.id}", json={"hard_cap_usd": None}, headers=admin).status_code == 200
        assert call("c") == 200
        assert client.delete(f"{one.url}/keys/{key.id}", headers=admin).status_code == 200
        assert call("d") == 401


async def test_a_killed_process_loses_nothing_and_its_holds_are_booked_when_their_lease_ends(tmp_path: Path) -> None:
    raw, key = await new_key(tmp_path, hard_cap_usd="20")
    headers = {"authorization": f"Bearer {raw}"}
    async with AIGateway(data_dir=tmp_path) as ledger, httpx.AsyncClient(headers=headers, timeout=60) as client:

        async def held() -> int:
            return round(next(budget.held_usd for budget in await ledger.budgets(key) if budget.window == "total"))

        async def call(url: str, number: int) -> None:
            with pytest.raises(httpx.TransportError):
                await client.post(url + "/complete", json=body(f"slow {number}", "slow"))

        with worker(tmp_path) as victim:
            for number in range(3):
                answer = await client.post(victim.url + "/complete", json=body(f"before {number}"))
                assert answer.status_code == 200
            async with anyio.create_task_group() as group:
                for number in range(10):
                    group.start_soon(call, victim.url, number)
                with anyio.fail_after(20):
                    while await held() < 10:
                        await anyio.sleep(0.01)
                victim.process.send_signal(signal.SIGKILL)
        assert await ledger.check_ledger() == []
        assert await held() == 10
    with worker(tmp_path, CLOCK_AHEAD="3600") as reborn:
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            assert (await client.post(reborn.url + "/complete", json=body("after"))).status_code == 200
            budgets = (await client.get(reborn.url + "/me")).json()["budgets"]
            assert {budget["held_usd"] for budget in budgets} == {"0"}
    async with AIGateway(data_dir=tmp_path) as gateway:
        outcomes = Counter(record.outcome for record in (await gateway.usage()).data)
        assert outcomes == {"completed": 4, "expired": 10}
        assert (await gateway.usage()).totals.cost_usd == 14
        assert await gateway.check_ledger() == []


async def test_a_restart_keeps_keys_prompts_spend_usage_windows_and_cache(tmp_path: Path) -> None:
    raw, key = await new_key(tmp_path, requests_per_minute=2)
    headers = {"authorization": f"Bearer {raw}"}
    async with AIGateway(data_dir=tmp_path) as gateway:
        await gateway.save_prompt("p", "Say {{word}}.")
    with worker(tmp_path) as first, httpx.Client(headers=headers, timeout=20) as client:
        assert client.post(first.url + "/complete", json=body("hello")).headers["x-cache"] == "miss"
    with worker(tmp_path) as second, httpx.Client(headers=headers, timeout=20) as client:
        again = client.post(second.url + "/complete", json=body("hello"))
        assert (again.status_code, again.headers["x-cache"]) == (200, "hit")
        assert client.post(second.url + "/complete", json=body("hello")).status_code == 429
    async with AIGateway(data_dir=tmp_path) as gateway:
        assert (await gateway.get_key(key.id)).name == "k"
        assert (await gateway.render_prompt("p", {"word": "hi"}))[0]["content"] == "Say hi."
        assert (await gateway.usage()).totals.calls == 2
        assert next(budget.spent_usd for budget in await gateway.budgets(key) if budget.window == "total") == 1


async def test_workers_of_one_server_share_the_directory_from_their_first_request(tmp_path: Path) -> None:
    raw, _ = await new_key(tmp_path, requests_per_minute=20)
    with worker(tmp_path, "--workers", "2") as server:
        assert await storm([server.url], raw, 60) == {200: 20, 429: 40}


@contextmanager
def preforked(data_dir: Path, **environment: str) -> Iterator[dict[str, Any]]:
    """Two workers, forked after the app was imported; gives what their parent said of itself."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.prefork"],
        cwd=ROOT,
        env={**os.environ, "DATA_DIR": str(data_dir), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
            process.communicate(timeout=20)
            assert process.returncode == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


async def test_an_app_that_is_imported_before_the_fork_has_opened_nothing_and_its_workers_share_the_directory(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with preforked(data_dir) as parent:
        assert (parent["opened"], parent["threads"], parent["files"]) == ([], 1, [])
        raw, _ = await new_key(data_dir, requests_per_minute=20)
        assert await storm([f"http://127.0.0.1:{parent['port']}/api/ai-gateway"], raw, 60) == {200: 20, 429: 40}


async def test_a_gateway_that_was_used_before_the_fork_begins_anew_in_each_worker_and_the_books_are_right(tmp_path: Path) -> None:
    raw, _ = await new_key(tmp_path, hard_cap_usd="20")
    with preforked(tmp_path, USED="1") as parent:
        assert await storm([f"http://127.0.0.1:{parent['port']}/api/ai-gateway"], raw, 60) == {200: 20, 402: 40}
    async with AIGateway(data_dir=tmp_path) as gateway:
        assert await gateway.check_ledger() == []
        assert (await gateway.usage()).totals.calls == 23
