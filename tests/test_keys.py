"""The rules of keys: their shape, whether they open a door, what may be changed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zlib
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway.errors import AuthenticationError, InvalidArgument, PermissionDenied
from starlette_aigateway.policy import keys
from starlette_aigateway.types import Key, Principal, Tenant

NOW = 1_800_000_000.0
CREATED = datetime(2026, 1, 31, tzinfo=UTC)


def key(**fields: Any) -> Key:
    return Key(**{"id": "key_1", "name": "mobile-app", "hint": "wxyz", "created_at": CREATED, **fields})


@given(st.binary(min_size=32, max_size=32))
def test_every_minted_key_is_well_formed_and_keeps_all_256_bits(secret: bytes) -> None:
    raw = keys.mint(lambda size: secret[:size])
    assert keys.well_formed(raw)
    assert keys.looks_like_key(raw)
    assert len(raw) == 54
    number = 0
    for character in raw[5:48]:
        number = number * 62 + keys.BASE62.index(character)
    assert number.to_bytes(32, "big") == secret


def test_a_key_is_its_prefix_its_secret_and_a_crc32_of_both() -> None:
    raw = keys.mint(lambda size: b"\xff" * size)
    checksum = 0
    for character in raw[-6:]:
        checksum = checksum * 62 + keys.BASE62.index(character)
    assert raw.startswith("aigw_")
    assert checksum == zlib.crc32(raw[:-6].encode())
    assert keys.digest(raw) == hashlib.sha256(raw.encode()).digest()
    assert keys.hint(raw) == raw[-4:]


@given(st.binary(min_size=32, max_size=32), st.integers(0, 53), st.characters())
def test_a_key_with_one_other_character_is_not_well_formed(secret: bytes, place: int, character: str) -> None:
    raw = keys.mint(lambda size: secret[:size])
    mistyped = raw[:place] + character + raw[place + 1 :]
    assert keys.well_formed(mistyped) == (mistyped == raw)


@given(st.text())
def test_no_credential_of_another_shape_is_well_formed_or_makes_the_check_fail(credential: str) -> None:
    assert not keys.well_formed(credential)
    assert not keys.well_formed("aigw_" + credential)


def test_a_key_that_lacks_or_gains_a_character_is_not_well_formed() -> None:
    raw = keys.mint(os.urandom)
    for wrong in (raw[:-1], raw + "0", raw[1:], raw.upper(), raw.replace("aigw_", "aigw-"), f" {raw}", raw[:-1] + "٣"):
        assert not keys.well_formed(wrong)


@given(st.floats(0, 2.8e11), st.floats(0, 2.8e11))  # 48 bits of milliseconds: until the year 10,889
def test_ids_sort_as_the_milliseconds_of_their_time(one: float, other: float) -> None:
    first, second = sorted((one, other))
    if int(first * 1000) < int(second * 1000):
        assert keys.mint_id("req_", first, lambda size: b"\xff" * size) < keys.mint_id("req_", second, lambda size: b"\x00" * size)


def test_an_id_is_its_prefix_and_32_lower_case_hexadecimal_digits_and_not_repeated() -> None:
    minted = {keys.mint_id("use_", NOW, os.urandom) for _ in range(1000)}
    assert len(minted) == 1000
    for each in minted:
        assert each.startswith("use_")
        assert len(each) == 36
        assert set(each[4:]) <= set("0123456789abcdef")


def test_a_usable_key_passes_the_check() -> None:
    usable = key(expires_at=datetime.fromtimestamp(NOW + 1, UTC))
    assert keys.check(usable, NOW) is usable


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (None, "does not exist"),
        (key(expires_at=datetime.fromtimestamp(NOW, UTC)), "expired at 2027-01-15T08:00:00Z"),
        (key(revoked_at=datetime(2026, 2, 1, tzinfo=UTC)), "revoked at 2026-02-01T00:00:00Z"),
    ],
    ids=["unknown", "expired", "revoked"],
)
def test_a_key_that_opens_no_door_is_refused_with_the_reason(refused: Key | None, says: str) -> None:
    with pytest.raises(AuthenticationError, match=says) as caught:
        keys.check(refused, NOW)
    assert caught.value.code == "invalid_api_key"


def test_a_principal_without_a_list_may_use_every_model() -> None:
    keys.authorize(Principal("ana"), "anything")
    keys.authorize(Principal("ana", allowed_models=["gpt-4o-mini"]), "gpt-4o-mini")


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        (["a", "b"], "allowed are: a, b"),
        ([], "allowed are: none"),
        ([f"m{number}" for number in range(25)], "m19 and 5 more"),
    ],
)
def test_a_model_outside_the_list_is_denied_and_the_list_is_told(allowed: list[str], says: str) -> None:
    with pytest.raises(PermissionDenied, match=says) as caught:
        keys.authorize(Principal("ana", allowed_models=allowed), "gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
    assert "'gpt-5'" in caught.value.message


def test_changes_hold_what_was_named_and_nothing_else() -> None:
    assert keys.key_changes({}) == {}
    assert keys.key_changes({"requests_per_minute": None, "metadata": None}) == {"requests_per_minute": None, "metadata": {}}
    assert keys.tenant_changes({"hard_cap_usd": None}) == {"hard_cap_usd": None}


def test_changes_come_in_the_types_of_a_key() -> None:
    paris = timezone(timedelta(hours=2))
    changes = keys.key_changes(
        {"name": "n", "tenant": "acme", "allowed_models": ["b", "a", "b"], "expires_at": datetime(2030, 1, 1, 2, tzinfo=paris)}
    )
    assert changes == {"name": "n", "tenant": "acme", "allowed_models": ("b", "a"), "expires_at": datetime(2030, 1, 1, tzinfo=UTC)}
    assert keys.revised(key(), changes) == key(**changes)
    assert keys.key_changes({"expires_at": "2030-01-01T02:00:00+02:00"}) == {"expires_at": datetime(2030, 1, 1, tzinfo=UTC)}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"tenant": " x"}, "tenant"),
        ({"allowed_models": "gpt-4o"}, "allowed_models"),
        ({"allowed_models": [1]}, "allowed_models"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"daily_cap_usd": 1.5}, "daily_cap_usd"),
        ({"monthly_cap_usd": "-1"}, "monthly_cap_usd"),
        ({"expires_at": datetime(2030, 1, 1)}, "expires_at"),  # noqa: DTZ001  # a naive time is what is refused
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": "2030-01-01"}, "expires_at"),
        ({"expires_at": 5}, "expires_at"),
        ({"expires_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-2)))}, "expires_at"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"a": {1: 2}}}, "metadata.a"),
        ({"metadata": {"a": [1, object()]}}, "metadata.a[1]"),
        ({"metadata": {"a": float("nan")}}, "metadata.a"),
        ({"metadata": {"a": 2**64}}, "metadata.a"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
        ({"metadata": {"a": "x" * 16_384}}, "metadata"),
        ({"metadata": {"a": nested(64)}}, "metadata.a" + "[0]" * 63),
        ({"id": "key_2"}, "id"),
        ({"revoked_at": None}, "revoked_at"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_change_names_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        keys.key_changes(fields)
    assert caught.value.param == param


def test_an_unknown_field_is_answered_with_those_that_exist() -> None:
    with pytest.raises(InvalidArgument, match=r"'colour'.*allowed_models.*tokens_per_minute"):
        keys.key_changes({"colour": "red"})
    with pytest.raises(InvalidArgument, match=r"'name'.*daily_cap_usd"):
        keys.tenant_changes({"name": "x"})


def test_a_key_can_be_revoked_but_not_given_another_id() -> None:
    assert keys.revised(key(), {"revoked_at": CREATED}) == key(revoked_at=CREATED)
    with pytest.raises(InvalidArgument):
        keys.revised(key(), {"id": "key_2"})
    assert keys.revised(key(requests_per_minute=5, metadata={"a": 1}), {"name": "x"}) == key(
        name="x", requests_per_minute=5, metadata={"a": 1}
    )


def test_a_rotation_changes_the_hint_and_nothing_else() -> None:
    before = key(tenant="acme", requests_per_minute=5, hard_cap_usd="1", metadata={"a": 1}, revoked_at=CREATED, allowed_models=["m"])
    after = keys.with_hint(before, "abcd")
    assert after.hint == "abcd"
    assert keys.with_hint(after, before.hint) == before


def test_a_revised_tenant_keeps_what_was_not_named() -> None:
    tenant = Tenant("acme", requests_per_minute=5, daily_cap_usd="1")
    assert keys.revised_tenant(tenant, {"daily_cap_usd": None}) == Tenant("acme", requests_per_minute=5)


def test_a_principal_and_a_tenant_can_be_copied_with_a_change() -> None:
    principal = Principal("user", tenant=Tenant("team", hard_cap_usd="5"), monthly_cap_usd="10")
    richer = dataclasses.replace(principal, monthly_cap_usd=Decimal(20))
    assert richer == Principal("user", tenant=Tenant("team", hard_cap_usd="5"), monthly_cap_usd="20")
    assert richer.caps.month == 20 * 10**9
    assert dataclasses.replace(Tenant("team", hard_cap_usd="5"), hard_cap_usd=None) == Tenant("team")
