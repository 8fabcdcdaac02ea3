"""`/prompts`: versions that never change, and labels that move. `?tenant=` says whose prompt it is; without it, it is shared by all.

An administrator of a tenant has that tenant's prompts only: the shared ones are not its own to read or to move.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ..accounts import StoredPrompt
from ..errors import InvalidRequest, NotFound
from ..policy import plain
from ..policy.prompts import PRODUCTION
from . import pages, realm, shapes
from .bodies import known_fields
from .exchange import Exchange
from .query import Query

SAVED = ("messages", "settings", "labels")


async def list_prompts(exchange: Exchange) -> Response:
    query = exchange.query("tenant", "limit", "cursor")
    tenant = _tenant(exchange, query)
    own = exchange.administrator.tenant
    prompts, cursor = await pages.collect(
        pages.asked_page(query),
        lambda limit, after: exchange.administration.list_prompts(tenant=tenant, limit=limit, after=after),
        lambda prompt: prompt.name,
        lambda prompt: own is None or prompt.tenant == own,
    )
    return exchange.answer(pages.list_of([shapes.prompt_summary(prompt) for prompt in prompts], cursor))


async def create_prompt(exchange: Exchange) -> Response:
    tenant = _tenant(exchange, exchange.query("tenant"))
    body = await exchange.json()
    known_fields(body, ("name", *SAVED))
    return await _save(exchange, body.get("name"), body, tenant)


async def add_version(exchange: Exchange) -> Response:
    tenant = _tenant(exchange, exchange.query("tenant"))
    body = await exchange.json()
    known_fields(body, SAVED)
    return await _save(exchange, exchange.path["name"], body, tenant)


async def _save(exchange: Exchange, name: Any, body: dict[str, Any], tenant: str | None) -> Response:
    if "messages" not in body:
        raise InvalidRequest("messages is required: a text, or a list of messages", param="messages")
    labels = body.get("labels", [])
    if not isinstance(labels, list):
        raise InvalidRequest("labels must be a list of texts", param="labels")
    prompt = await exchange.administration.save_prompt(
        name, body["messages"], settings=body.get("settings"), labels=labels, tenant=tenant, actor=exchange.administrator.actor
    )
    exchange.acted("prompt.save", f"{prompt.name}@{prompt.version}")
    return exchange.answer(shapes.prompt(prompt), 201)


async def get_prompt(exchange: Exchange) -> Response:
    """All versions, or with `version` or `label` the one that is meant."""
    query = exchange.query("tenant", "version", "label", "limit", "cursor")
    tenant = _tenant(exchange, query)
    version, label = query.integer("version"), query.text("label")
    if version is not None or label is not None:
        return exchange.answer(shapes.prompt(await _found(exchange, tenant, version, label)))
    return await _versions(exchange, query, tenant)


async def _versions(exchange: Exchange, query: Query, tenant: str | None) -> Response:
    """Newest first; the cursor is a version number."""
    page, before = pages.asked_page(query), query.integer("cursor")
    versions = await exchange.administration.prompt_versions(exchange.path["name"], tenant=tenant)
    _check_own(exchange, versions[0])
    rest = [prompt for prompt in versions if before is None or prompt.version < before]
    shown = rest[: page.limit]
    cursor = str(shown[-1].version) if len(rest) > len(shown) else None
    return exchange.answer(pages.list_of([shapes.prompt(prompt) for prompt in shown], cursor))


async def activate_prompt(exchange: Exchange) -> Response:
    tenant = _tenant(exchange, exchange.query("tenant"))
    body = await exchange.json()
    known_fields(body, ("version", "label"))
    if "version" not in body:
        raise InvalidRequest("version is required: the one that the label is to point at", param="version")
    name, label = exchange.path["name"], body.get("label", PRODUCTION)
    versions = await exchange.administration.prompt_versions(name, tenant=tenant)
    if versions[0].tenant != tenant:  # a tenant sees shared prompts by name, and their labels are not its own to move
        raise _no_prompt(name)
    prompt = await exchange.administration.activate_prompt(
        name, body["version"], label=label, tenant=tenant, actor=exchange.administrator.actor
    )
    exchange.acted("prompt.activate", f"{prompt.name}@{prompt.version}")
    return exchange.answer(shapes.prompt(prompt))


async def render_prompt(exchange: Exchange) -> Response:
    """What a call with this reference would send; no provider is asked."""
    tenant = _tenant(exchange, exchange.query("tenant"))
    body = await exchange.json()
    known_fields(body, ("variables", "version", "label"))
    variables = plain.plain_object(body.get("variables", {}), "variables")
    prompt = await _found(exchange, tenant, _version(body), _label(body))
    try:
        messages = await exchange.administration.render_prompt(prompt.name, variables, version=prompt.version, tenant=tenant)
    except InvalidRequest as error:  # it names the variable as in a call, where the reference is the field `prompt`
        error.param = None if error.param is None else error.param.removeprefix("prompt.")
        raise
    return exchange.answer({"name": prompt.name, "version": prompt.version, "messages": messages, "settings": prompt.settings})


def _version(body: dict[str, Any]) -> int | None:
    version = body.get("version")
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 1):
        raise InvalidRequest("version must be an integer of at least 1", param="version")
    return version


def _label(body: dict[str, Any]) -> str | None:
    label = body.get("label")
    if label is not None and not isinstance(label, str):
        raise InvalidRequest("label must be a text", param="label")
    return label


async def _found(exchange: Exchange, tenant: str | None, version: int | None, label: str | None) -> StoredPrompt:
    if version is not None and label is not None:
        raise InvalidRequest("give a version or a label, not both", param="label")
    prompt = await exchange.administration.get_prompt(exchange.path["name"], version=version, label=label, tenant=tenant)
    _check_own(exchange, prompt)
    return prompt


def _check_own(exchange: Exchange, prompt: StoredPrompt) -> None:
    own = exchange.administrator.tenant
    if own is not None and prompt.tenant != own:
        raise _no_prompt(prompt.name)


def _no_prompt(name: str) -> NotFound:
    return NotFound(f"there is no prompt {name!r}", code="prompt_not_found")


def _tenant(exchange: Exchange, query: Query) -> str | None:
    return realm.tenant_asked(exchange.administrator, query.text("tenant"))
