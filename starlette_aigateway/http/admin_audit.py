"""`/audit`: what administrators did. An administrator of a tenant sees what was done to its tenant, by whomever."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..errors import InvalidRequest
from . import pages, realm, shapes
from .exchange import Exchange

FILTERS = ("actor", "action", "subject", "tenant", "since", "until")


async def list_actions(exchange: Exchange) -> Response:
    query = exchange.query(*FILTERS, "limit", "cursor")
    filters: dict[str, Any] = {name: query.text(name) for name in ("actor", "action", "subject")}
    filters["tenant"] = realm.tenant_asked(exchange.administrator, query.text("tenant"))
    filters["since"], filters["until"] = query.moment("since"), query.moment("until")
    if filters["since"] is not None and filters["until"] is not None and filters["until"] < filters["since"]:
        raise InvalidRequest("until must not be before since", param="until")
    actions, cursor = await pages.collect(
        pages.asked_page(query),
        lambda limit, before: exchange.administration.audit(**filters, limit=limit, before=before),
        lambda action: action.id,
    )
    return exchange.answer(pages.list_of([shapes.admin_action(action) for action in actions], cursor))
