"""`/credits`: temporary top-ups. An administrator of a tenant gives them to the tenant's keys, and only sees the tenant's own."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..accounts import Credit, tenant_scope
from ..errors import InvalidArgument, InvalidRequest, NotFound, PermissionDenied
from ..policy.keys import moment
from . import pages, realm, shapes
from .bodies import known_fields
from .exchange import Exchange

WHOSE = ("principal", "tenant", "gateway")


async def list_credits(exchange: Exchange) -> Response:
    query = exchange.query(*WHOSE, "limit", "cursor")
    page = pages.asked_page(query)
    whose: dict[str, Any] = {"principal": query.text("principal"), "tenant": query.text("tenant")}
    whose["gateway"] = query.word("gateway", ("false", "true")) == "true"
    own = exchange.administrator.tenant
    if own is not None and whose["principal"] is None:
        whose["tenant"] = realm.tenant_asked(exchange.administrator, whose["tenant"])
    await _check_reach(exchange, whose)
    shown, cursor = await pages.collect(
        page,
        lambda limit, before: exchange.administration.list_credits(**whose, limit=limit, before=before),
        lambda credit: credit.id,
    )
    return exchange.answer(pages.list_of([shapes.credit(credit) for credit in shown], cursor))


async def add_credit(exchange: Exchange) -> Response:
    body = await exchange.json()
    known_fields(body, (*WHOSE, "amount_usd", "expires_at", "note"))
    for name in ("amount_usd", "expires_at"):
        if body.get(name) is None:
            raise InvalidRequest(f"{name} is required", param=name)
    whose = _whose(body)
    await _check_reach(exchange, whose)
    _check_may_give(exchange, whose)
    expires = moment(body["expires_at"], "expires_at")
    assert expires is not None
    try:
        credit = await exchange.administration.add_credit(
            amount=body["amount_usd"], expires=expires, note=body.get("note", ""), actor=exchange.administrator.actor, **whose
        )
    except InvalidArgument as error:
        raise _said_of_the_body(error) from None
    exchange.acted("credit.add", credit.id)
    return exchange.answer(shapes.credit(credit), 201)


async def get_credit(exchange: Exchange) -> Response:
    exchange.query()
    return exchange.answer(shapes.credit(await _reachable(exchange)))


async def end_credit(exchange: Exchange) -> Response:
    exchange.query()
    credit = await _reachable(exchange)
    _check_may_give(exchange, {"tenant": None} if credit.scope.startswith("principal:") else {"tenant": credit.scope})
    if credit.ended_at is None:
        credit = await exchange.administration.end_credit(credit.id, actor=exchange.administrator.actor)
        exchange.acted("credit.end", credit.id)
    return exchange.answer(shapes.credit(credit))


def _said_of_the_body(error: InvalidArgument) -> InvalidRequest:
    if error.param in ("expires", "expires_at"):
        return InvalidRequest("expires_at must be a moment in the future (RFC 3339), before the year 2223", param="expires_at")
    if error.param == "amount":
        return InvalidRequest(error.message.replace("amount", "amount_usd", 1), param="amount_usd")
    return InvalidRequest(error.message, param=error.param)


def _whose(body: dict[str, Any]) -> dict[str, Any]:
    gateway = body.get("gateway")
    if gateway is not None and not isinstance(gateway, bool):
        raise InvalidRequest("gateway must be true or false", param="gateway")
    return {"principal": body.get("principal"), "tenant": body.get("tenant"), "gateway": bool(gateway)}


def _check_may_give(exchange: Exchange, whose: dict[str, Any]) -> None:
    if exchange.administrator.tenant is not None and whose["tenant"] is not None:
        raise PermissionDenied("an administrator of a tenant cannot change the tenant's own limits")


async def _check_reach(exchange: Exchange, whose: dict[str, Any]) -> None:
    """Raises `NotFound` for an administrator of a tenant that asks for anything but its own tenant and that one's keys."""
    own = exchange.administrator.tenant
    if own is None:
        return
    if whose["gateway"]:
        realm.whole_gateway(exchange.administrator)
    if whose["tenant"] is not None:
        realm.tenant_asked(exchange.administrator, whose["tenant"])
    if whose["principal"] is not None:
        await realm.own_key(exchange, whose["principal"])


async def _reachable(exchange: Exchange) -> Credit:
    """The credit that the path names. Raises `NotFound` also for one that is out of reach."""
    credit = await exchange.administration.get_credit(exchange.path["id"])
    own = exchange.administrator.tenant
    if own is None or credit.scope == tenant_scope(own):
        return credit
    try:
        kind, _, name = credit.scope.partition(":")
        if kind == "principal":
            await realm.own_key(exchange, name)
            return credit
    except NotFound:
        pass
    raise NotFound(f"there is no credit {credit.id!r}", code="credit_not_found")
