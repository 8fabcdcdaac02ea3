"""`/tenants`: limits that several principals share. An administrator of a tenant sees its own, and changes none."""

from __future__ import annotations

from starlette.responses import Response

from ..errors import NotFound, PermissionDenied
from ..policy import keys as key_policy
from ..types import Tenant
from . import pages, realm, shapes
from .exchange import Exchange


async def list_tenants(exchange: Exchange) -> Response:
    page = pages.asked_page(exchange.query("limit", "cursor"))
    own = exchange.administrator.tenant
    if own is not None:
        tenants, cursor = await _only(exchange, own), None
    else:
        tenants, cursor = await pages.collect(
            page, lambda limit, after: exchange.administration.list_tenants(limit=limit, after=after), lambda tenant: tenant.id
        )
    budgets = await exchange.administration.budgets_of_tenants(tenants)
    return exchange.answer(pages.list_of([shapes.tenant(*pair) for pair in zip(tenants, budgets, strict=True)], cursor))


async def _only(exchange: Exchange, tenant: str) -> list[Tenant]:
    try:
        return [await exchange.administration.get_tenant(tenant)]
    except NotFound:
        return []


async def get_tenant(exchange: Exchange) -> Response:
    exchange.query()
    own = exchange.administrator.tenant
    if own is not None and exchange.path["id"] != own:
        raise realm.no_tenant(exchange.path["id"])
    return await _answer(exchange, await exchange.administration.get_tenant(exchange.path["id"]))


async def put_tenant(exchange: Exchange) -> Response:
    _check_may_change(exchange)
    limits = key_policy.tenant_changes(await exchange.json())
    tenant = await exchange.administration.save_tenant(Tenant(exchange.path["id"], **limits), actor=exchange.administrator.actor)
    exchange.acted("tenant.save", tenant.id)
    return await _answer(exchange, tenant)


async def update_tenant(exchange: Exchange) -> Response:
    _check_may_change(exchange)
    limits = key_policy.tenant_changes(await exchange.json())
    tenant = await exchange.administration.update_tenant(exchange.path["id"], actor=exchange.administrator.actor, **limits)
    if limits:
        exchange.acted("tenant.update", tenant.id)
    return await _answer(exchange, tenant)


def _check_may_change(exchange: Exchange) -> None:
    own = exchange.administrator.tenant
    if own is not None and exchange.path["id"] != own:
        raise realm.no_tenant(exchange.path["id"])
    if own is not None:
        raise PermissionDenied("an administrator of a tenant cannot change the tenant's own limits")


async def _answer(exchange: Exchange, tenant: Tenant) -> Response:
    return exchange.answer(shapes.tenant(tenant, await exchange.administration.budgets(tenant=tenant)))
