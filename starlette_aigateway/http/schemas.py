"""The JSON schemas of all bodies (JSON Schema 2020-12, as OpenAPI 3.1 uses it). Answers are closed: a field that is not here is a lie.

`tests/test_openapi.py` holds them against the answers of real calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from ..accounts import GROUPINGS
from ..bookkeeping import MAX_NOTE
from ..policy.prompts import ROLES, SETTINGS
from ..prices import FOLLOWS, MAX_ABOVE, MAX_TIERS, RATES
from ..types import CAP_NAMES, COUNT_NAMES, MAX_WINDOW
from .shapes import TOKEN_FIELDS

Schema: TypeAlias = dict[str, Any]

TEXT: Schema = {"type": "string"}
ID: Schema = {"type": "string", "minLength": 1, "maxLength": 200}
COUNT: Schema = {"type": "integer", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object", "additionalProperties": True}
MOMENT: Schema = {"type": "string", "format": "date-time", "description": "RFC 3339, in UTC"}
USD: Schema = {"type": "string", "pattern": r"^-?\d+(\.\d{1,9})?$", "description": "US dollars as a decimal string"}
USD_IN: Schema = {
    "anyOf": [{"type": "string", "pattern": r"^\s*\+?[\d._]+([eE][+-]?\d+)?\s*$"}, {"type": "integer", "minimum": 0}],
    "description": "US dollars as a decimal string or an integer. A JSON number with a fraction is refused: it is not exact.",
}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def maybe(schema: Schema) -> Schema:
    """`schema` or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def closed(properties: Mapping[str, Schema], required: tuple[str, ...] | None = None) -> Schema:
    """An object of these properties and no other; all of them are there, unless `required` says which."""
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": dict(properties), "required": needed, "additionalProperties": False}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def page_of(name: str) -> Schema:
    return closed({"data": array(ref(name)), "has_more": TRUTH, "next_cursor": maybe(TEXT)})


def limits_out() -> dict[str, Schema]:
    counts: dict[str, Schema] = {name: maybe({"type": "integer", "minimum": 1, "maximum": MAX_WINDOW}) for name in COUNT_NAMES}
    return counts | {name: maybe(USD) for name in CAP_NAMES}


def limits_in() -> dict[str, Schema]:
    return limits_out() | {name: maybe(USD_IN) for name in CAP_NAMES}


def components() -> dict[str, Schema]:
    return {**_calls(), **_accounts(), **_keys(), **_prompts(), **_usage(), **_errors()}


def _calls() -> dict[str, Schema]:
    message = {"type": "object", "properties": {"role": TEXT}, "required": ["role"], "additionalProperties": True}
    reference = closed(
        {"name": ID, "version": maybe({"type": "integer", "minimum": 1}), "label": maybe(TEXT), "variables": maybe(ANYTHING)}, ("name",)
    )
    bound = maybe({"type": "integer", "minimum": 1})
    fields: dict[str, Schema] = {
        "model": {**TEXT, "description": "may be left out where the prompt's settings name one"},
        "messages": array(ref("Message")),
        "prompt": maybe(ref("PromptReference")),
        "temperature": maybe({"type": "number"}),
        "max_tokens": bound,
        "max_completion_tokens": bound,
        "n": maybe({"type": "integer", "minimum": 1}),
        "stream": maybe(TRUTH),
        "stream_options": maybe(ANYTHING),
    }
    call: Schema = {
        "type": "object",
        "properties": fields,
        "anyOf": [{"required": ["messages"]}, {"required": ["prompt"]}],
        "additionalProperties": True,
        "description": "Parameters that are not named here go to the provider untouched.",
    }
    choice: Schema = {
        "type": "object",
        "properties": {"index": COUNT, "message": ref("Message"), "finish_reason": maybe(TEXT)},
        "required": ["index", "message", "finish_reason"],
    }
    return {
        "Message": {**message, "description": "A message in the OpenAI chat shape"},
        "PromptReference": reference,
        "CompletionRequest": {**call, "properties": {**fields, "n": maybe({"const": 1})}},
        "ChatCompletionRequest": call,
        "Completion": closed(
            {
                "id": {**TEXT, "description": "the id of the request"},
                "model": TEXT,
                "provider": TEXT,
                "message": ref("Message"),
                "finish_reason": maybe(TEXT),
                "usage": maybe(ref("Usage")),
                "cost_usd": maybe(USD),
                "cached": TRUTH,
            }
        ),
        "ChatCompletion": {
            "type": "object",
            "properties": {"id": TEXT, "object": TEXT, "created": COUNT, "model": TEXT, "choices": array(choice), "usage": ANYTHING},
            "required": ["choices"],
            "additionalProperties": True,
            "description": "As the provider sent it where it speaks this wire, else built in its shape",
        },
        "Usage": closed(dict.fromkeys(TOKEN_FIELDS, COUNT)),
        **_quotes(),
        "Model": closed({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT}),
        "ModelList": closed({"object": {"const": "list"}, "data": array(ref("Model"))}),
    }


def _quotes() -> dict[str, Schema]:
    amount = maybe(USD)
    bounded = {**TRUTH, "description": "false where the call could cost more than `worst_case_usd`"}
    target: dict[str, Schema] = {
        "provider": TEXT,
        "model": {**TEXT, "description": "as the provider names it"},
        "price": maybe(ref("Price")),
        "input_tokens": {**COUNT, "description": "the upper bound of the input"},
        "max_tokens": {**maybe(COUNT), "description": "the output bound in each choice that would be sent; null where none would be"},
        "imposed": {**TRUTH, "description": "the gateway chose `max_tokens`, as far as the budget affords it now"},
        "minimum_usd": amount,
        "worst_case_usd": amount,
        "bounded": bounded,
    }
    refusal: dict[str, Schema] = {
        "status": COUNT,
        "type": TEXT,
        "code": TEXT,
        "message": TEXT,
        "param": maybe(TEXT),
        "scope": maybe({"enum": ["principal", "tenant", "gateway"]}),
        "window": maybe({"enum": ["requests", "tokens", "parallel", "day", "month", "total"]}),
        "retry_after_seconds": maybe({"type": "number", "minimum": 0}),
        "details": maybe(ANYTHING),
    }
    quote: dict[str, Schema] = {
        "model": TEXT,
        "prompt": maybe({**TEXT, "description": "name@version"}),
        "cached": {**TRUTH, "description": "the answer would come from the cache, at no cost"},
        "required_usd": {**amount, "description": "what has to fit below every cap; null where it is not known"},
        "worst_case_usd": {
            **amount,
            "description": "the most that one attempt at any of the targets would hold; null where it is not known",
        },
        "bounded": bounded,
        "targets": array(ref("QuotedTarget")),
        "windows": array(ref("Window")),
        "budgets": array(ref("Budget")),
        "would_refuse": maybe(ref("WouldRefuse")),
    }
    return {
        "Quote": closed(quote),
        "QuotedTarget": {**closed(target), "description": "A planned target, in the order in which they would be tried"},
        "WouldRefuse": {**closed(refusal), "description": "The answer that the call would get from the first limit that refuses it now"},
    }


def _accounts() -> dict[str, Schema]:
    amount = maybe(USD)
    return {
        "Limits": closed(limits_in(), ()),
        "Budget": closed(
            {
                "scope": {"enum": ["principal", "tenant", "gateway"]},
                "window": {"enum": ["day", "month", "total"]},
                "period": {**TEXT, "description": "2026-01-31, 2026-01, or empty for a lifetime"},
                "cap_usd": amount,
                "credit_usd": {**USD, "description": "what running credits add to the cap"},
                "spent_usd": USD,
                "held_usd": USD,
                "remaining_usd": amount,
            }
        ),
        "Window": closed(
            {
                "scope": {"enum": ["principal", "tenant"]},
                "window": {"enum": ["requests", "tokens"]},
                "limit": COUNT,
                "seconds": COUNT,
                "remaining": COUNT,
                "reset_after_seconds": {"type": "number", "minimum": 0},
            }
        ),
        "Me": closed(
            {
                "principal": TEXT,
                "tenant": maybe(TEXT),
                "key_id": maybe(TEXT),
                "allowed_models": maybe(array(TEXT)),
                **limits_out(),
                "windows": array(ref("Window")),
                "budgets": array(ref("Budget")),
            }
        ),
        "Tenant": closed({"id": ID, **limits_out(), "budgets": array(ref("Budget"))}),
        "TenantList": page_of("Tenant"),
        **_credits(),
        **_audit(),
    }


def _credits() -> dict[str, Schema]:
    note: Schema = {"type": "string", "maxLength": MAX_NOTE}
    whose: dict[str, Schema] = {"principal": maybe(ID), "tenant": maybe(ID), "gateway": maybe(TRUTH)}
    return {
        "NewCredit": {
            **closed({**whose, "amount_usd": USD_IN, "expires_at": MOMENT, "note": note}, ("amount_usd", "expires_at")),
            "description": "One of principal (a key's id, too), tenant and gateway says whose caps are raised until expires_at.",
        },
        "Credit": closed(
            {
                "id": {**ID, "pattern": "^crd_"},
                "scope": {"enum": ["principal", "tenant", "gateway"]},
                "principal": maybe(ID),
                "tenant": maybe(ID),
                "amount_usd": USD,
                "created_at": MOMENT,
                "expires_at": MOMENT,
                "ended_at": maybe(MOMENT),
                "actor": ID,
                "note": note,
            }
        ),
        "CreditList": page_of("Credit"),
    }


def _keys() -> dict[str, Schema]:
    given: dict[str, Schema] = {
        "name": ID,
        "tenant": maybe(ID),
        "allowed_models": maybe(array(ID)),
        **limits_in(),
        "expires_at": maybe(MOMENT),
        "metadata": maybe(ANYTHING),
    }
    key: dict[str, Schema] = {
        "id": {**ID, "pattern": "^key_"},
        "name": ID,
        "hint": {**TEXT, "description": "the last four characters of the raw key"},
        "tenant": maybe(ID),
        "allowed_models": maybe(array(ID)),
        **limits_out(),
        "expires_at": maybe(MOMENT),
        "revoked_at": maybe(MOMENT),
        "created_at": MOMENT,
        "metadata": ANYTHING,
        "budgets": array(ref("Budget")),
    }
    return {
        "Key": closed(key),
        "RawKey": closed({**key, "key": {"type": "string", "pattern": "^aigw_", "description": "the raw key, shown this once"}}),
        "KeyList": page_of("Key"),
        "NewKey": closed(given, ("name",)),
        "KeyChanges": closed(given, ()),
        "Rotation": closed(
            {"grace_seconds": {"type": "number", "minimum": 0, "description": "how long the key until now still opens"}}, ()
        ),
    }


def _prompts() -> dict[str, Schema]:
    version: Schema = {"type": "integer", "minimum": 1}
    summary: dict[str, Schema] = {"name": ID, "version": version, "labels": array(TEXT), "tenant": maybe(ID), "created_at": MOMENT}
    settings: Schema = closed({name: {"description": expected} for name, (_, expected) in SETTINGS.items()}, ())
    message = closed({"role": {"enum": list(ROLES)}, "content": {"type": ["string", "array"]}, "name": ID}, ("role", "content"))
    templates: Schema = {"anyOf": [{"type": "string", "description": "one system message"}, array(ref("PromptMessage"))]}
    given = {"messages": templates, "settings": maybe(settings), "labels": array(TEXT)}
    return {
        "PromptMessage": message,
        "PromptSummary": closed(summary),
        "PromptList": page_of("PromptSummary"),
        "Prompt": closed({**summary, "messages": array(ref("PromptMessage")), "settings": settings, "variables": array(TEXT)}),
        "PromptVersions": page_of("Prompt"),
        "PromptOrVersions": {"oneOf": [ref("Prompt"), ref("PromptVersions")], "description": "one Prompt with `version` or `label`"},
        "NewVersion": closed(given, ("messages",)),
        "NewPrompt": closed({"name": {**ID, "pattern": "^[^/]+$"}, **given}, ("name", "messages")),
        "Activation": closed({"version": version, "label": TEXT}, ("version",)),
        "Rendering": closed({"variables": ANYTHING, "version": maybe(version), "label": maybe(TEXT)}, ()),
        "Rendered": closed({"name": ID, "version": version, "messages": array(ref("PromptMessage")), "settings": settings}),
    }


def _audit() -> dict[str, Schema]:
    told: Schema = {
        **ANYTHING,
        "description": "the settings that were given; `also` names what is not told: metadata, notes, texts of prompts",
    }
    action = {"id": TEXT, "created_at": MOMENT, "actor": TEXT, "action": TEXT, "subject": TEXT, "tenant": maybe(TEXT), "details": told}
    return {"AdminAction": closed(action), "AdminActionList": page_of("AdminAction")}


ROLLED_UP = (
    "before this midnight (UTC) records may be rolled up: they are in totals and groups, and not in `data`, and each of their days counts "
    "as at its own midnight, so that a `since` or `until` before this means the next midnight"
)


def _usage() -> dict[str, Schema]:
    totals: dict[str, Schema] = {"calls": COUNT, "cached_calls": COUNT, "input_tokens": COUNT, "output_tokens": COUNT, "cost_usd": USD}
    outcomes = ("completed", "estimated", "ambiguous", "overrun", "expired", "cached", "released", "adjusted")
    by: Schema = {"type": "object", "properties": {name: maybe(TEXT) for name in GROUPINGS}, "additionalProperties": False}
    record: dict[str, Schema] = {
        "id": TEXT,
        "request_id": TEXT,
        "attempt": COUNT,
        "created_at": MOMENT,
        "principal": TEXT,
        "tenant": maybe(TEXT),
        "key_id": maybe(TEXT),
        "provider": TEXT,
        "model": TEXT,
        "response_model": maybe(TEXT),
        **dict.fromkeys(TOKEN_FIELDS, COUNT),
        "cost_usd": USD,
        "price": maybe(ref("Price")),
        "outcome": {"enum": list(outcomes)},
        "cached": TRUTH,
        "latency_ms": maybe(COUNT),
        "prompt": maybe({**TEXT, "description": "name@version"}),
        "tags": TEXTS,
        "would_refuse": maybe({**TEXT, "description": "limits are only reported: the code of the refusal that it would have got"}),
    }
    return {
        "UsageTotals": closed(totals),
        "UsageGroup": closed({"by": by, **totals}),
        "UsageRecord": closed(record),
        "UsageReport": closed(
            {
                "totals": ref("UsageTotals"),
                "groups": array(ref("UsageGroup")),
                "data": array(ref("UsageRecord")),
                "has_more": TRUTH,
                "next_cursor": maybe(TEXT),
                "rolled_up_before": maybe({**MOMENT, "description": ROLLED_UP}),
            }
        ),
        **_prices(),
        "NewPrice": closed({"model": ID, "provider": maybe(ID), "price": maybe(ref("GivenPrice"))}, ("model", "price")),
        "StoredPrice": closed({"provider": maybe(ID), "model": ID, "price": maybe(ref("Price"))}),
        "PriceList": page_of("StoredPrice"),
    }


def _prices() -> dict[str, Schema]:
    rates, given = dict.fromkeys(RATES, USD), {name: maybe(USD_IN) if name in FOLLOWS else USD_IN for name in RATES}
    needed = tuple(name for name in RATES if name not in FOLLOWS)
    above: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_ABOVE, "description": "input tokens that such a call exceeds"}
    tiers: Schema = {"maxItems": MAX_TIERS, "description": "for long contexts, ascending: the whole call is at the rates of its tier"}
    price = {**rates, "request": USD, "tiers": {**array(ref("PriceTier")), **tiers}}
    given_price: dict[str, Schema] = {**given, "request": maybe(USD_IN), "tiers": maybe({**array(ref("GivenPriceTier")), **tiers})}
    return {
        "Price": {**closed(price), "description": "per million tokens; `request` per call"},
        "PriceTier": closed({"above": above, **rates}),
        "GivenPrice": closed(given_price, needed),
        "GivenPriceTier": closed({"above": above, **given}, ("above", *needed)),
    }


def _errors() -> dict[str, Schema]:
    error = closed(
        {
            "message": TEXT,
            "type": TEXT,
            "code": {**TEXT, "description": "stable and machine-readable; each status names its own"},
            "param": {**maybe(TEXT), "description": "the field or parameter that is wrong"},
            "request_id": maybe(TEXT),
            "details": maybe(ANYTHING),
        }
    )
    return {
        "Error": closed({"error": error}),
        "Health": closed({"status": {"enum": ["ok", "ready"]}}),
        "Document": {"type": "object", "required": ["openapi", "info", "paths"], "additionalProperties": True},
    }
