"""OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.1), made from the route table and `schemas.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from ..accounts import GROUPINGS
from ..bookkeeping import MAX_PAGE
from ..errors import AIGatewayError
from ..policy.idempotency import MAX_KEY_LENGTH
from .errors import STATUS
from .router import REST, Guard, Route
from .schemas import Schema, components, ref

DISTRIBUTION = "starlette_aigateway"

ALWAYS = (500,)
ERRORS_OF_GUARD: dict[Guard, tuple[int, ...]] = {
    "open": (),
    "caller": (401, 403, 429, 503),
    "admin": (400, 401, 403, 404, 429, 503),
    "caller_or_admin": (401, 429, 503),
}
ERRORS_OF_BODY = (400, 408, 413, 415)

MORE_CODES: dict[int, tuple[str, ...]] = {
    400: ("invalid_json", "request_too_large_for_limit"),
    401: ("invalid_api_key",),
    403: ("model_not_allowed", "foreign_origin"),
    404: ("credit_not_found", "key_not_found", "model_not_found", "prompt_not_found", "tenant_not_found"),
    409: ("idempotency_answer_not_kept", "idempotency_in_progress"),
    422: ("idempotency_key_reused", "missing_variable", "prompt_render_failed"),
    503: ("login_unavailable",),
}
"""Codes besides the classes' own. `method_not_allowed` (405) and `refused_by_host` are those of answers to no route in particular."""

MEANING = {
    400: "The request is malformed, or the provider rejected it",
    401: "No credential, or one that is not valid",
    402: "The worst case of the call does not fit below a spend cap",
    403: "Known, but not allowed",
    404: "There is no such thing, or not for this caller",
    409: "The same thing is running, or exists already",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not application/json",
    422: "Well-formed, but it cannot be carried out",
    429: "A sliding window is full, or too many calls run; also for an address whose logins keep failing",
    500: "The gateway failed; its log has the details",
    502: "The provider failed",
    503: "Nothing was let through: a store, a provider, a price or the login is missing",
    504: "The provider did not answer in time",
}

PARAMETERS: dict[str, tuple[str, Schema]] = {
    "actor": ("who did it", {"type": "string"}),
    "action": ("what was done, such as key.create", {"type": "string"}),
    "subject": ("the id of what it was done to", {"type": "string"}),
    "tenant": ("what belongs to this tenant", {"type": "string"}),
    "limit": (f"items per page, at most {MAX_PAGE}", {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 100}),
    "cursor": ("`next_cursor` of an earlier page", {"type": "string"}),
    "version": ("this version", {"type": "integer", "minimum": 1}),
    "label": ("the version under this label", {"type": "string"}),
    "principal": ("of this principal", {"type": "string"}),
    "gateway": ("`true`: of the gateway as a whole", {"enum": ["false", "true"], "default": "false"}),
    "key": ("of the key with this id", {"type": "string"}),
    "model": ("of this model", {"type": "string"}),
    "since": ("from this moment on (RFC 3339, or a date)", {"type": "string"}),
    "until": ("before this moment (RFC 3339, or a date)", {"type": "string"}),
    "group_by": (f"of {', '.join(GROUPINGS)}, separated by commas", {"type": "string"}),
    "format": ("csv: every record that the filters match, or with group_by the groups", {"enum": ["json", "csv"], "default": "json"}),
}
CALL_PARAMETERS: dict[str, tuple[str, Schema]] = {
    "idempotency-key": (
        "the same key and body are carried out and billed once, and answered alike for a day; 409 while the first call runs, else 422",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH, "pattern": "^[ -~]+$"},
    ),
    "cache-control": ("no-cache, no-store, max-age=N", {"type": "string"}),
}

HEADERS: dict[str, str] = {
    "x-request-id": "the client's own id of the request, or ours",
    "request-id": "our id of the request",
    "cache-control": "answers are nobody else's and not kept",
    "retry-after": "whole seconds after which a retry makes sense, rounded up",
    "retry-after-ms": "the same in milliseconds",
    "x-should-retry": "`false` where a retry makes no sense",
    "www-authenticate": "`Bearer`",
    "x-ratelimit-limit-requests": "the size of the tightest request window",
    "x-ratelimit-remaining-requests": "what is left of it",
    "x-ratelimit-reset-requests": "when it is as good as unused",
    "x-ratelimit-limit-tokens": "the size of the tightest token window",
    "x-ratelimit-remaining-tokens": "what is left of it",
    "x-ratelimit-reset-tokens": "when it is as good as unused",
    "x-cache": "`hit`, `miss` or `bypass`",
    "age": "seconds since a cached answer was stored",
    "x-aigateway-provider": "who answered",
    "x-aigateway-cost-usd": "what it cost, in US dollars; not for a stream",
    "x-aigateway-max-tokens": "the output bound, where the budget lowered it",
    "idempotency-replayed": "`true`: the outcome of an earlier call with the same idempotency key; this one was not billed",
    "x-accel-buffering": "`no`, for a stream",
    "content-disposition": "a file name, for CSV",
}
IDS = ("x-request-id", "request-id")
WINDOWS = tuple(name for name in HEADERS if name.startswith("x-ratelimit-"))
RETRY = ("retry-after", "retry-after-ms", "x-should-retry")
OF_CALL = (
    *WINDOWS,
    "cache-control",
    "x-cache",
    "age",
    *(name for name in HEADERS if name.startswith("x-aigateway-")),
    "idempotency-replayed",
    "x-accel-buffering",
)

SCHEMES: dict[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key (`aigw_…`)"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key in another header"},
    "hostLogin": {
        "type": "apiKey",
        "in": "header",
        "name": "authorization",
        "description": "The login of the service that this gateway is a part of: whatever it takes, a cookie for instance. Administrators "
        "always come in by it; an API key is never an administrator's.",
    },
}
SECURITY: dict[Guard, list[Schema]] = {
    "open": [],
    "caller": [{"bearer": []}, {"apiKey": []}, {"hostLogin": []}],
    "admin": [{"hostLogin": []}],
    "caller_or_admin": [{"bearer": []}, {"apiKey": []}, {"hostLogin": []}],
}


def document(routes: Sequence[Route], *, server: str, has_admins: bool) -> dict[str, Any]:
    """The routes that exist, below `server` (the mount path). Without administrators there are no admin routes."""
    paths: dict[str, dict[str, Schema]] = {}
    for route in routes:
        if has_admins or route.guard != "admin":
            paths.setdefault(public_path(route), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.1",
        "info": {"title": "AI gateway", "version": version(DISTRIBUTION)},
        "servers": [{"url": server}],
        "paths": paths,
        "components": {
            "schemas": components(),
            "responses": {f"Status{status}": _failure(status) for status in MEANING} | {"RefusedByHost": _refused_by_host()},
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()},
            "securitySchemes": SCHEMES,
        },
    }


def public_path(route: Route) -> str:
    """OpenAPI knows no `{id:path}`: there a slash in an id is written `%2F`, which works here too."""
    return route.path.replace(REST, "}")


def errors_of(route: Route) -> list[int]:
    body = ERRORS_OF_BODY if route.body is not None else ()
    return sorted({*ALWAYS, *ERRORS_OF_GUARD[route.guard], *body, *route.errors})


def codes_of(status: int) -> list[str]:
    own = {kind.default_code for kind, (of_kind, _) in STATUS.items() if of_kind == status and kind is not AIGatewayError}
    internal = {AIGatewayError.default_code} if status == STATUS[AIGatewayError][0] else set()
    return sorted({*own, *internal, *MORE_CODES.get(status, ())})


def _operation(route: Route) -> Schema:
    operation: Schema = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "security": SECURITY[route.guard],
        "parameters": list(_parameters(route)),
        "responses": {str(route.status): _success(route)} | {str(status): _response(f"Status{status}") for status in errors_of(route)},
    }
    if route.guard != "open":
        operation["responses"]["default"] = _response("RefusedByHost")
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": ref(route.body)}}}
    return operation


def _parameters(route: Route) -> Iterator[Schema]:
    for name in re.findall(r"{(\w+)", route.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name in route.query:
        text, schema = PARAMETERS[name]
        yield {"name": name, "in": "query", "description": text, "schema": schema}
    for name in CALL_PARAMETERS if route.metered else route.headers:
        text, schema = CALL_PARAMETERS[name]
        yield {"name": name, "in": "header", "description": text, "schema": schema}


def _success(route: Route) -> Schema:
    content: Schema = {"application/json": {"schema": ref(route.answer)}} if route.answer is not None else {}
    if route.metered:
        text = "`stream: true`: server-sent events in the dialect of the route; a failure after the first content is an event too"
        content["text/event-stream"] = {"schema": {"type": "string", "description": text}}
    if route.csv:
        content["text/csv"] = {"schema": {"type": "string", "description": "`format=csv`: a header line, then the rows"}}
    more = (*(OF_CALL if route.metered else ("cache-control",)), *(("content-disposition",) if route.csv else ()))
    return {"description": route.summary, "headers": _headers((*IDS, *more)), "content": content}


def _response(name: str) -> Schema:
    return {"$ref": f"#/components/responses/{name}"}


def _failure(status: int) -> Schema:
    names = [*IDS, "cache-control"]
    if status == 401:
        names.append("www-authenticate")
    if status in (400, 402, 409, 429, 502, 503, 504):
        names += RETRY
    if status in (400, 409, 502, 503, 504):
        names.append("idempotency-replayed")
    if status == 429:
        names += WINDOWS
    codes = ", ".join(f"`{code}`" for code in codes_of(status))
    return {
        "description": f"{MEANING[status]}. Codes: {codes}",
        "headers": _headers(names),
        "content": {"application/json": {"schema": ref("Error")}},
    }


def _refused_by_host() -> Schema:
    return {
        "description": "The host's own login refused with a status of its own. Code: `refused_by_host`",
        "headers": _headers(IDS),
        "content": {"application/json": {"schema": ref("Error")}},
    }


def _headers(names: Sequence[str]) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
