"""What an `AIGateway` may be told, setting by setting: a wrong type is refused at construction, by the name of its argument, and not where
it is used first, in the middle of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from . import protocols
from .errors import ConfigurationError
from .http.questions import check_function
from .policy.caching import CachePolicy
from .policy.idempotency import IdempotencyPolicy
from .policy.retention import Retention
from .policy.routing import RetryPolicy
from .types import ImageTokens, Limits, Timeouts, check_id

Check: TypeAlias = Callable[[Any, str], object]


def optional(check: Check) -> Check:
    """`check`, of anything but None, which stands for the default."""

    def checked(value: Any, name: str) -> None:
        if value is not None:
            check(value, name)

    return checked


def made_of(kind: type[Any]) -> Check:
    def check(value: Any, name: str) -> None:
        if not isinstance(value, kind):
            raise ConfigurationError(f"{name} must be {kind.__name__}(...), not {_shown(value)}", param=name)

    return check


def seam(protocol: type[Any]) -> Check:
    """Whether all verbs of a store are there; what they do is for its contract suite."""
    verbs = sorted(verb for verb, function in vars(protocol).items() if callable(function) and not verb.startswith("_"))

    def check(value: Any, name: str) -> None:
        missing = [verb for verb in verbs if not callable(getattr(value, verb, None))]
        if missing or isinstance(value, type):
            lacking = f"; it has no {', '.join(missing)}" if missing else ""
            raise ConfigurationError(f"{name} must be a {protocol.__name__}, not {_shown(value)}{lacking}", param=name)

    return check


def truth(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {_shown(value)}", param=name)


def positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a positive integer", param=name)


def many(value: Any, name: str) -> None:
    """A list, a tuple or the like; a text is one too, and never meant."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{name} must be a list, not {_shown(value)}", param=name)


def texts(value: Any, name: str) -> None:
    many(value, name)
    if not all(isinstance(item, str) for item in value):
        raise ConfigurationError(f"{name} must be a list of texts", param=name)


def observers(value: Any, name: str) -> None:
    many(value, name)
    for observer in value:
        check_function(observer, name, takes="the event")


def function(value: Any, name: str) -> None:
    if not callable(value):
        raise ConfigurationError(f"{name} must be a function, not {_shown(value)}", param=name)


def on_disconnect(value: Any, name: str) -> None:
    if value not in ("drain", "cancel"):
        raise ConfigurationError(f'{name} must be "drain" or "cancel"', param=name)


def elsewhere(value: Any, name: str) -> None:
    """Whoever uses it looks at it closely, at construction too."""


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "providers": many,
        "data_dir": elsewhere,
        "prices": elsewhere,
        "resolve_principal": elsewhere,
        "authorize_admin": elsewhere,
        "trusted_origins": elsewhere,
        "limits": optional(made_of(Limits)),
        "default_limits": optional(made_of(Limits)),
        "cache": optional(made_of(CachePolicy)),
        "timeouts": optional(made_of(Timeouts)),
        "observers": observers,
        "keys": optional(seam(protocols.KeyStore)),
        "tenants": optional(seam(protocols.TenantStore)),
        "price_store": optional(seam(protocols.PriceStore)),
        "prompts": optional(seam(protocols.PromptStore)),
        "ledger": optional(seam(protocols.Ledger)),
        "responses": optional(seam(protocols.ResponseCache)),
        "windows": elsewhere,
        "idempotency": optional(seam(protocols.IdempotencyStore)),
        "idempotency_policy": optional(made_of(IdempotencyPolicy)),
        "audit_store": optional(seam(protocols.AuditStore)),
        "retention": optional(made_of(Retention)),
        "retries": optional(made_of(RetryPolicy)),
        "public_prices": truth,
        "default_max_tokens": optional(positive),
        "min_output_tokens": positive,
        "allow_unbounded": texts,
        "image_tokens": optional(made_of(ImageTokens)),
        "limiter_fail_open": truth,
        "enforce": truth,
        "budget_thresholds": many,
        "max_body_bytes": positive,
        "on_disconnect": on_disconnect,
        "max_drain_bytes": positive,
        "max_drains": positive,
        "name": check_id,
        "clock": function,
        "random": function,
    }
)


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
