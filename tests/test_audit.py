"""The record of what administrators did: complete, durable, and without secrets."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from starlette_aigateway import AIGateway, InvalidRequest, Price, StorageUnavailable, Tenant
from starlette_aigateway.http.routes import ROUTES
from starlette_aigateway.stores.sqlite.audit import SQLiteAuditStore
from starlette_aigateway.stores.sqlite.config import ConfigDatabase
from starlette_aigateway.testing import AuditStoreContract
from starlette_aigateway.testing.audit import action

from .http_host import ACME, ROOT, Service, furnish, send, service

pytestmark = pytest.mark.anyio
SECRET = "hunter2-in-a-place-of-the-hosts"


class TestSQLiteAuditStore(AuditStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SQLiteAuditStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLiteAuditStore(database)
        database.close()

    @pytest.fixture
    def elsewhere(self, tmp_path: Path) -> Iterator[SQLiteAuditStore]:
        database = ConfigDatabase(tmp_path / "config.db")
        yield SQLiteAuditStore(database)
        database.close()

    async def test_the_table_itself_refuses_to_change_or_to_forget(self, store: SQLiteAuditStore, tmp_path: Path) -> None:
        await store.add(action(1))
        with closing(sqlite3.connect(tmp_path / "config.db")) as connection:
            for statement in ("UPDATE admin_actions SET actor = 'x'", "DELETE FROM admin_actions"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    connection.execute(statement)


@pytest.fixture
def host() -> Iterator[Service]:
    with service() as host:
        yield host


def recorded(host: Service, headers: dict[str, str] = ROOT, **filters: Any) -> list[dict[str, Any]]:
    answer = host.call("GET", "/audit", headers, params=filters)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


CHANGES = [route for route in ROUTES if route.guard == "admin" and route.method != "GET" and not route.path.endswith("/render")]


def test_every_admin_route_that_changes_something_leaves_a_record_with_its_actor(host: Service) -> None:
    for route in CHANGES:
        furnish(host)
        before = {one["id"] for one in recorded(host)}
        assert send(host, route, ROOT).status_code == route.status
        made = [one for one in recorded(host) if one["id"] not in before]
        assert [one["actor"] for one in made] == ["root"], f"{route.method} {route.path}"
        assert made[0]["action"] == host.acted[-1].action
        assert host.acted[-1].subject.startswith(made[0]["subject"])


def test_what_only_reads_and_what_is_refused_leaves_no_record(host: Service) -> None:
    furnish(host)
    before = recorded(host)
    for route in ROUTES:
        if route.method == "GET" or route.path.endswith("/render"):
            send(host, route, ROOT)
    for headers in ({}, ACME):
        assert host.call("PUT", "/tenants/umbrella", headers, json={"daily_cap_usd": 1}).status_code in (403, 404)
    assert host.call("POST", "/keys", json={"name": "x", "daily_cap_usd": -1}).status_code == 400
    assert host.call("PATCH", "/keys/key_none", json={"daily_cap_usd": 1}).status_code == 404
    assert host.call("PATCH", f"/keys/{host.key_id}", json={}).status_code == 200
    assert recorded(host) == before


def test_a_record_tells_the_settings_and_never_what_may_hold_a_secret(host: Service) -> None:
    _, key = host.key(
        tenant="acme", monthly_cap_usd="12.50", allowed_models=["echo"], expires_at="2126-01-31T12:00:00Z", metadata={"password": SECRET}
    )
    host.call("POST", "/prompts", json={"name": "p", "messages": SECRET, "settings": {"model": SECRET}}).raise_for_status()
    credit = {"principal": key["id"], "amount_usd": "5", "expires_at": "2126-01-31T12:00:00Z", "note": SECRET}
    host.call("POST", "/credits", json=credit).raise_for_status()
    host.call("PUT", "/prices", json={"model": "echo", "price": {"input": 1, "output": "2"}}).raise_for_status()
    price, given, prompt, made = recorded(host)
    assert made["details"] == {
        "name": "app",
        "tenant": "acme",
        "monthly_cap_usd": "12.5",
        "allowed_models": ["echo"],
        "expires_at": "2126-01-31T12:00:00Z",
        "also": ["metadata"],
    }
    assert (made["tenant"], given["tenant"], prompt["tenant"], price["tenant"]) == ("acme", "acme", None, None)
    assert given["details"] == {
        "scope": f"principal:{key['id']}",
        "amount_usd": "5",
        "expires_at": "2126-01-31T12:00:00Z",
        "also": ["note"],
    }
    assert prompt["details"]["also"] == ["messages", "settings"]
    assert price["details"]["price"]["output"] == "2"
    everything = msgspec.json.encode(recorded(host)).decode()
    assert SECRET not in everything
    assert "aigw_" not in everything


def test_an_administrator_of_a_tenant_sees_what_was_done_to_its_tenant_by_whomever(host: Service) -> None:
    furnish(host)
    _, foreign = host.key(tenant="umbrella")
    host.call("POST", "/keys", ACME, json={"name": "ours"}).raise_for_status()
    seen = recorded(host, ACME)
    assert {one["tenant"] for one in seen} == {"acme"}
    assert {one["actor"] for one in seen} == {"root", "acme"}
    assert recorded(host, ACME, subject=foreign["id"]) == []
    assert host.call("GET", "/audit?tenant=umbrella", ACME).status_code == 404
    assert [one["subject"] for one in recorded(host, tenant="umbrella")] == [foreign["id"]]


def test_the_record_is_asked_by_filters_and_page_by_page(host: Service) -> None:
    keys = [host.key(name=f"k{number}")[1]["id"] for number in range(5)]
    host.call("DELETE", f"/keys/{keys[0]}").raise_for_status()
    assert [one["action"] for one in recorded(host, subject=keys[0])] == ["key.revoke", "key.create"]
    assert [one["subject"] for one in recorded(host, action="key.revoke")] == [keys[0]]
    assert recorded(host, actor="nobody") == []
    assert recorded(host, until="2020-01-01") == []
    page = host.call("GET", "/audit?limit=4&action=key.create").json()
    assert ([one["subject"] for one in page["data"]], page["has_more"]) == (keys[:0:-1], True)
    page = host.call("GET", f"/audit?limit=4&action=key.create&cursor={page['next_cursor']}").json()
    assert ([one["subject"] for one in page["data"]], page["has_more"]) == (keys[:1], False)
    for wrong in ("since=yesterday", "since=2026-02-01&until=2026-01-01", "limit=0", "who=x", "actor="):
        assert host.call("GET", f"/audit?{wrong}").status_code == 400, wrong


async def test_the_hosts_own_code_is_recorded_too_and_may_name_who_acts() -> None:
    async with AIGateway.in_memory() as gateway:
        _, key = await gateway.create_key("app", actor="cron")
        await gateway.update_key(key.id, actor="ada", daily_cap_usd="1")
        await gateway.rotate_key(key.id, grace=timedelta(hours=1), actor="ada")
        await gateway.save_tenant(Tenant("acme"), actor="ada")
        await gateway.update_tenant("acme", actor="ada", daily_cap_usd="1")
        await gateway.set_price("m", Price(1, 2), provider="azure", actor="ada")
        await gateway.save_prompt("p", "Hello", actor="ada")
        await gateway.activate_prompt("p", 1, label="beta", actor="ada")
        credit = await gateway.add_credit(key.id, "5", expires=timedelta(days=1), actor="ada")
        await gateway.end_credit(credit.id, actor="ada")
        await gateway.end_credit(credit.id, actor="ada")
        await gateway.revoke_key(key.id)
        await gateway.revoke_key(key.id)
        actions = await gateway.audit()
        assert [(one.action, one.subject, one.actor) for one in reversed(actions)] == [
            ("key.create", key.id, "cron"),
            ("key.update", key.id, "ada"),
            ("key.rotate", key.id, "ada"),
            ("tenant.save", "acme", "ada"),
            ("tenant.update", "acme", "ada"),
            ("price.set", "azure/m", "ada"),
            ("prompt.save", "p", "ada"),
            ("prompt.activate", "p", "ada"),
            ("credit.add", credit.id, "ada"),
            ("credit.end", credit.id, "ada"),
            ("key.revoke", key.id, "host"),
        ]
        assert actions[3].details == {"label": "beta", "version": 1}
        now = datetime.now(UTC)
        assert list(await gateway.audit(since=now - timedelta(hours=1), until=now + timedelta(hours=1))) == list(actions)
        assert list(await gateway.audit(actor="ada", limit=2, before=actions[1].id)) == list(actions[2:4])


async def test_an_actor_that_is_none_changes_nothing() -> None:
    async with AIGateway.in_memory() as gateway:
        for wrong in ("", None, 5):
            with pytest.raises(InvalidRequest):
                await gateway.create_key("app", actor=wrong)  # type: ignore[arg-type]
        assert list(await gateway.list_keys()) == []


class Full:
    """An audit store that cannot write."""

    async def add(self, action: Any) -> None:
        raise StorageUnavailable("the disk is full")

    async def list(self, query: Any) -> list[Any]:
        return []


async def test_what_cannot_be_recorded_is_not_done() -> None:
    gateway = AIGateway.in_memory(audit_store=Full())
    async with gateway:
        for change in (
            lambda: gateway.create_key("app"),
            lambda: gateway.save_tenant(Tenant("acme")),
            lambda: gateway.set_price("m", Price.free()),
            lambda: gateway.save_prompt("p", "Hello"),
            lambda: gateway.add_credit("ada", "5", expires=timedelta(days=1)),
        ):
            with pytest.raises(StorageUnavailable):
                await change()
        assert list(await gateway.list_keys()) == []
        assert list(await gateway.list_tenants()) == []
        assert dict(await gateway.list_prices()) == {}
        assert list(await gateway.list_prompts()) == []
        assert list(await gateway.list_credits()) == []


async def test_the_record_outlives_the_process_and_is_the_same_in_every_worker(tmp_path: Path) -> None:
    async with AIGateway(data_dir=tmp_path) as gateway:
        await gateway.create_key("app", actor="ada")
    async with AIGateway(data_dir=tmp_path) as other:
        assert [one.actor for one in await other.audit()] == ["ada"]
