"""`/keys`: the raw key is in the answer that creates or rotates it, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from ..administration import MAX_GRACE
from ..errors import InvalidRequest, PermissionDenied
from ..policy import keys as key_policy
from ..types import Key
from . import pages, realm, shapes
from .bodies import known_fields
from .door import Admin
from .exchange import Exchange


async def list_keys(exchange: Exchange) -> Response:
    query = exchange.query("tenant", "limit", "cursor")
    tenant = realm.tenant_asked(exchange.administrator, query.text("tenant"))
    page = pages.asked_page(query)
    keys, cursor = await pages.collect(
        page, lambda limit, after: exchange.administration.list_keys(tenant=tenant, limit=limit, after=after), lambda key: key.id
    )
    return exchange.answer(pages.list_of(await _shown(exchange, keys), cursor))


async def create_key(exchange: Exchange) -> Response:
    body = await exchange.json()
    fields = key_policy.key_changes(body)
    if "name" not in fields:
        raise InvalidRequest("name is required: what this key is for, in a word or two", param="name")
    fields["tenant"] = realm.tenant_asked(exchange.administrator, fields.get("tenant"))
    raw, key = await exchange.administration.create_key(**fields, actor=exchange.administrator.actor)
    exchange.acted("key.create", key.id)
    return exchange.answer({**await _shown_one(exchange, key), "key": raw}, 201)


async def get_key(exchange: Exchange) -> Response:
    exchange.query()
    return exchange.answer(await _shown_one(exchange, await realm.reachable_key(exchange)))


async def update_key(exchange: Exchange) -> Response:
    changes = key_policy.key_changes(await exchange.json())
    key = await realm.reachable_key(exchange)
    if "tenant" in changes:
        _check_move(exchange.administrator, changes["tenant"])
    if changes:
        key = await exchange.administration.update_key(key.id, actor=exchange.administrator.actor, **changes)
        exchange.acted("key.update", key.id)
    return exchange.answer(await _shown_one(exchange, key))


async def revoke_key(exchange: Exchange) -> Response:
    exchange.query()
    key = await exchange.administration.revoke_key((await realm.reachable_key(exchange)).id, actor=exchange.administrator.actor)
    exchange.acted("key.revoke", key.id)
    return exchange.answer(await _shown_one(exchange, key))


async def rotate_key(exchange: Exchange) -> Response:
    body = await exchange.json()
    known_fields(body, ("grace_seconds",))
    grace = body.get("grace_seconds", 0)
    if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= MAX_GRACE:
        raise InvalidRequest(f"grace_seconds must be a number between 0 and {MAX_GRACE}", param="grace_seconds")
    key = await realm.reachable_key(exchange)
    raw, key = await exchange.administration.rotate_key(key.id, grace=grace, actor=exchange.administrator.actor)
    exchange.acted("key.rotate", key.id)
    return exchange.answer({**await _shown_one(exchange, key), "key": raw})


def _check_move(admin: Admin, tenant: str | None) -> None:
    if admin.tenant is not None and tenant is None:
        raise PermissionDenied("an administrator of a tenant cannot take a key out of it", param="tenant")
    realm.tenant_asked(admin, tenant)


async def _shown(exchange: Exchange, keys: Sequence[Key]) -> list[dict[str, Any]]:
    """With the budgets of every scope that a call with the key counts in; a tenant's administrator does not see the gateway's."""
    budgets = await exchange.administration.budgets_of_keys(keys, gateway=exchange.administrator.tenant is None)
    return [shapes.key(key, of_key) for key, of_key in zip(keys, budgets, strict=True)]


async def _shown_one(exchange: Exchange, key: Key) -> dict[str, Any]:
    return (await _shown(exchange, [key]))[0]
