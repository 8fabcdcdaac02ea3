"""Keys: how they look, whether one opens a door, what may be changed about them. No raw key is kept or shown by anything here."""

from __future__ import annotations

import hashlib
import string
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

from ..errors import AuthenticationError, InvalidArgument, PermissionDenied
from ..hints import did_you_mean
from ..types import LIMIT_NAMES, Key, LimitFields, Limits, Principal, Tenant, check_id, limit_fields, model_names, rfc3339
from . import plain

Random: TypeAlias = Callable[[int], bytes]
"""So many random bytes, as `os.urandom` gives them."""

PREFIX = "aigw_"
SECRET_LENGTH = 43
CHECKSUM_LENGTH = 6
KEY_LENGTH = len(PREFIX) + SECRET_LENGTH + CHECKSUM_LENGTH
HINT_LENGTH = 4
MAX_METADATA_BYTES = 16 * 1024
SHOWN_MODELS = 20

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase

KEY_FIELDS = LIMIT_NAMES | {"name", "tenant", "allowed_models", "expires_at", "metadata"}
"""What `update_key` and PATCH may name."""

STORED_FIELDS = KEY_FIELDS | {"revoked_at"}
"""What a store's `update` may name."""


def mint(random: Random) -> str:
    """A new raw key: `aigw_`, 43 base62 characters that carry 256 random bits, and 6 of a CRC32 over all that.

    The prefix lets secret scanners find a leaked key and the checksum lets a typo be refused without a lookup; the design is GitHub's
    (https://github.blog/2021-04-05-behind-githubs-new-authentication-token-formats/).
    """
    body = PREFIX + _base62(int.from_bytes(random(32), "big"), SECRET_LENGTH)
    return body + _checksum(body)


def looks_like_key(credential: str) -> bool:
    """Whether a credential is to be treated as a stored key and never given to the host's resolver."""
    return credential.startswith(PREFIX)


def well_formed(raw: str) -> bool:
    """Whether `raw` has the shape and the checksum of a key; says nothing about whether it exists."""
    if len(raw) != KEY_LENGTH or not raw.startswith(PREFIX) or not raw.isascii() or not raw[len(PREFIX) :].isalnum():
        return False
    body = raw[:-CHECKSUM_LENGTH]
    return raw[-CHECKSUM_LENGTH:] == _checksum(body)


def digest(raw: str) -> bytes:
    """What is stored in place of the key: SHA-256 of the whole. A key carries 256 random bits, so a slow hash would add nothing."""
    return hashlib.sha256(raw.encode()).digest()


def hint(raw: str) -> str:
    """The last four characters, by which a person recognises a key."""
    return raw[-HINT_LENGTH:]


def mint_id(prefix: str, now: float, random: Random) -> str:
    """A unique id whose order as text is the order of time: `prefix` (`key_`, `req_`, `use_`), 48 bits of milliseconds and 80 random
    bits, in lower-case hexadecimal. The layout is UUIDv7's (RFC 9562, section 5.7) without its version bits."""
    return prefix + (int(now * 1000).to_bytes(6, "big") + random(10)).hex()


def check(key: Key | None, now: float) -> Key:
    """`key`, if it opens a door at `now` (Unix seconds). Raises `AuthenticationError` with the code `invalid_api_key`."""
    if key is None:
        raise AuthenticationError("this API key does not exist")
    if key.usable_at(now):
        return key
    if key.revoked_at is not None:
        raise AuthenticationError(f"this API key was revoked at {rfc3339(key.revoked_at)}")
    raise AuthenticationError(f"this API key expired at {rfc3339(key.expires_at)}")


def authorize(principal: Principal, model: str) -> None:
    """Raises `PermissionDenied` (`model_not_allowed`) if `principal` may not use `model`."""
    allowed = principal.allowed_models
    if allowed is None or model in allowed:
        return
    shown = ", ".join(allowed[:SHOWN_MODELS]) or "none"
    more = f" and {len(allowed) - SHOWN_MODELS} more" if len(allowed) > SHOWN_MODELS else ""
    raise PermissionDenied(
        f"the model {model!r} is not allowed here; allowed are: {shown}{more}",
        code="model_not_allowed",
        param="model",
    )


def key_changes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a key, checked and in the types of `Key`: a field that is absent stays as it is, a limit of None is no limit.

    `expires_at` is an aware datetime or RFC 3339 text; `metadata` a JSON object of at most 16 KiB, None an empty one. Raises
    `InvalidArgument`, whose `param` names the field.
    """
    _known(fields, KEY_FIELDS, "a key")
    changes: dict[str, Any] = _limit_changes(fields)
    if "name" in fields:
        changes["name"] = check_id(fields["name"], "name")
    if "tenant" in fields:
        tenant = fields["tenant"]
        changes["tenant"] = None if tenant is None else check_id(tenant, "tenant")
    if "allowed_models" in fields:
        changes["allowed_models"] = model_names(fields["allowed_models"])
    if "expires_at" in fields:
        changes["expires_at"] = moment(fields["expires_at"], "expires_at")
    if "metadata" in fields:
        changes["metadata"] = _metadata(fields["metadata"])
    return changes


def tenant_changes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a tenant, which has limits and nothing else."""
    _known(fields, LIMIT_NAMES, "a tenant")
    return _limit_changes(fields)


def revised(key: Key, changes: Mapping[str, Any]) -> Key:
    """`key` with `changes` set, which may also name `revoked_at`; what a `KeyStore.update` stores. Raises `InvalidArgument`."""
    _known(changes, STORED_FIELDS, "a stored key")
    checked = key_changes({name: value for name, value in changes.items() if name in KEY_FIELDS})
    if "revoked_at" in changes:
        checked["revoked_at"] = moment(changes["revoked_at"], "revoked_at")
    fields: dict[str, Any] = {
        "name": key.name,
        "tenant": key.tenant,
        "allowed_models": key.allowed_models,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "metadata": key.metadata,
        **limit_fields(key),
        **checked,
    }
    return Key(id=key.id, hint=key.hint, created_at=key.created_at, **fields)


def with_hint(key: Key, hint: str) -> Key:
    """`key` after a rotation: the same in everything but its hint."""
    return Key(
        id=key.id,
        name=key.name,
        hint=hint,
        created_at=key.created_at,
        tenant=key.tenant,
        allowed_models=key.allowed_models,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
        metadata=key.metadata,
        **limit_fields(key),
    )


def revised_tenant(tenant: Tenant, changes: Mapping[str, Any]) -> Tenant:
    """`tenant` with the limits in `changes` set. Raises `InvalidArgument`."""
    _known(changes, LIMIT_NAMES, "a tenant")
    fields: dict[str, Any] = {**limit_fields(tenant), **changes}
    return Tenant(tenant.id, **fields)


def _known(fields: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = [name for name in fields if name not in known]
    if unknown:
        name = str(unknown[0])
        hint = did_you_mean(name, known) or f"; there are {', '.join(sorted(known))}"
        raise InvalidArgument(f"{what} has no field {name!r} that can be set{hint}", param=name)


def _limit_changes(fields: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {name: value for name, value in fields.items() if name in LIMIT_NAMES}
    checked: LimitFields = limit_fields(Limits(**given))
    return {name: value for name, value in checked.items() if name in given}


def moment(value: Any, name: str) -> datetime | None:
    """`value` as an aware datetime in UTC: one already, or RFC 3339 text; None stays None. Raises `InvalidArgument`, naming `name`."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidArgument(f"{name} must be a time such as '2026-01-31T12:00:00Z' (RFC 3339)", param=name) from None
    if not isinstance(value, datetime):
        raise InvalidArgument(f"{name} must be a datetime or None, not {type(value).__name__}", param=name)
    if value.utcoffset() is None:
        raise InvalidArgument(f"{name} must say its time zone, for example datetime.now(UTC) or '...Z'", param=name)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidArgument(f"{name} lies beyond the years that can be counted", param=name) from None


def _metadata(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    copy = plain.plain_object(value, "metadata")
    size = len(msgspec.json.encode(copy))
    if size > MAX_METADATA_BYTES:
        raise InvalidArgument(f"metadata must be at most {MAX_METADATA_BYTES} bytes as JSON, not {size}", param="metadata")
    return copy


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, remainder = divmod(number, 62)
        digits.append(BASE62[remainder])
    return "".join(reversed(digits))


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), CHECKSUM_LENGTH)
