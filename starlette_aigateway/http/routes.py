"""Every route in one table: method, path, who may pass, and who answers. OpenAPI and the guards' test read the same table."""

from __future__ import annotations

from starlette.responses import Response

from . import admin_audit, admin_credits, admin_keys, admin_prices, admin_prompts, admin_tenants, calls, health, me, models, openapi, usage
from .exchange import Exchange
from .router import Route

CALL_ERRORS = (402, 403, 404, 409, 422, 502, 504)
PAGED = ("limit", "cursor")


async def openapi_json(exchange: Exchange) -> Response:
    """The truth about this table, as it is served here."""
    root = exchange.scope.get("root_path", "")
    return exchange.answer(openapi.document(ROUTES, server=root or "/", has_admins=exchange.has_admins))


ROUTES: tuple[Route, ...] = (
    Route(
        "POST", "/complete", "caller", calls.complete, "A completion, whole or streamed",
        body="CompletionRequest", answer="Completion", errors=CALL_ERRORS, metered=True,
    ),
    Route(
        "POST", "/v1/chat/completions", "caller", calls.chat_completions, "A completion on the OpenAI Chat Completions wire",
        body="ChatCompletionRequest", answer="ChatCompletion", errors=CALL_ERRORS, metered=True,
    ),
    Route(
        "POST", "/quote", "caller", calls.quote, "What a call would cost, and what would refuse it; it is not made",
        body="ChatCompletionRequest", answer="Quote", errors=(403, 404, 422), headers=("cache-control",),
    ),
    Route("GET", "/v1/models", "caller", models.list_models, "The models that the caller may use", answer="ModelList"),
    Route("GET", "/v1/models/{id:path}", "caller", models.get_model, "One of these models", answer="Model", errors=(404,)),
    Route("GET", "/me", "caller", me.me, "The caller's own limits, windows and budgets", answer="Me", errors=(400,)),
    Route("GET", "/keys", "admin", admin_keys.list_keys, "Keys, oldest first", answer="KeyList", query=("tenant", *PAGED)),
    Route("POST", "/keys", "admin", admin_keys.create_key, "A new key, shown this once", body="NewKey", answer="RawKey", status=201),
    Route("GET", "/keys/{id}", "admin", admin_keys.get_key, "A key and its budgets", answer="Key"),
    Route("PATCH", "/keys/{id}", "admin", admin_keys.update_key, "Changes a key; null is no limit", body="KeyChanges", answer="Key"),
    Route("DELETE", "/keys/{id}", "admin", admin_keys.revoke_key, "Revokes a key, from the next call on", answer="Key"),
    Route(
        "POST", "/keys/{id}/rotate", "admin", admin_keys.rotate_key, "A new raw key for the same id, shown this once",
        body="Rotation", answer="RawKey",
    ),
    Route("GET", "/tenants", "admin", admin_tenants.list_tenants, "Tenants in the order of their ids", answer="TenantList", query=PAGED),
    Route("GET", "/tenants/{id:path}", "admin", admin_tenants.get_tenant, "A tenant and its budgets", answer="Tenant"),
    Route(
        "PUT", "/tenants/{id:path}", "admin", admin_tenants.put_tenant, "Creates a tenant or replaces all its limits",
        body="Limits", answer="Tenant",
    ),
    Route(
        "PATCH", "/tenants/{id:path}", "admin", admin_tenants.update_tenant, "Changes a tenant; null is no limit",
        body="Limits", answer="Tenant",
    ),
    Route(
        "GET", "/prompts", "admin", admin_prompts.list_prompts, "The highest version of each prompt",
        answer="PromptList", query=("tenant", *PAGED),
    ),
    Route(
        "POST", "/prompts", "admin", admin_prompts.create_prompt, "Adds a version of the prompt that the body names",
        body="NewPrompt", answer="Prompt", status=201, query=("tenant",),
    ),
    Route(
        "GET", "/prompts/{name}", "admin", admin_prompts.get_prompt, "All versions, newest first, or the one that is named",
        answer="PromptOrVersions", query=("tenant", "version", "label", *PAGED),
    ),
    Route(
        "POST", "/prompts/{name}", "admin", admin_prompts.add_version, "Adds a version",
        body="NewVersion", answer="Prompt", status=201, query=("tenant",),
    ),
    Route(
        "POST", "/prompts/{name}/activate", "admin", admin_prompts.activate_prompt, "Points a label at a version, forward or back",
        body="Activation", answer="Prompt", query=("tenant",),
    ),
    Route(
        "POST", "/prompts/{name}/render", "admin", admin_prompts.render_prompt, "The messages that a call would send",
        body="Rendering", answer="Rendered", query=("tenant",), errors=(422,),
    ),
    Route("GET", "/prices", "admin", admin_prices.list_prices, "The stored prices", answer="PriceList"),
    Route("PUT", "/prices", "admin", admin_prices.put_price, "Sets or removes one stored price", body="NewPrice", answer="StoredPrice"),
    Route(
        "GET", "/credits", "admin", admin_credits.list_credits, "Temporary top-ups, newest first",
        answer="CreditList", query=("principal", "tenant", "gateway", *PAGED),
    ),
    Route(
        "POST", "/credits", "admin", admin_credits.add_credit, "Raises the caps of one scope until a moment",
        body="NewCredit", answer="Credit", status=201, errors=(403, 404),
    ),
    Route("GET", "/credits/{id}", "admin", admin_credits.get_credit, "One of them", answer="Credit"),
    Route("DELETE", "/credits/{id}", "admin", admin_credits.end_credit, "Ends a credit before its time", answer="Credit", errors=(403,)),
    Route(
        "GET", "/audit", "admin", admin_audit.list_actions, "What administrators did, newest first",
        answer="AdminActionList", query=(*admin_audit.FILTERS, *PAGED),
    ),
    Route(
        "GET", "/usage", "caller_or_admin", usage.usage, "Totals, groups and records: all for an admin, a caller's own",
        answer="UsageReport", query=(*usage.FILTERS, "group_by", *PAGED, "format"), errors=(400, 403, 404), csv=True,
    ),
    Route("GET", "/healthz", "open", health.alive, "This process answers", answer="Health"),
    Route("GET", "/readyz", "open", health.ready, "A call could be metered now", answer="Health", errors=(503,)),
    Route("GET", "/openapi.json", "open", openapi_json, "This document", answer="Document"),
)  # fmt: skip
