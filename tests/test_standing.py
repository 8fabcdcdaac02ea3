"""What holds for a principal is worked out once, and anew as soon as the principal or its tenant is another one."""

from __future__ import annotations

import pytest

from starlette_aigateway import Limits, Principal, Tenant, standing
from starlette_aigateway.accounts import ScopeClaim
from starlette_aigateway.standing import Standings
from starlette_aigateway.types import NO_CAPS, Caps, WindowClaim

NONE = Limits()


def standings(gateway: Limits = NONE, defaults: Limits | None = None) -> Standings:
    return Standings(gateway, defaults, "tenant")


def test_scopes_and_windows_come_in_the_order_in_which_they_are_taken() -> None:
    who = Principal("ada", tenant="acme", requests_per_minute=3, tokens_per_minute=500, max_parallel_requests=2)
    found = standings(Limits(tokens_per_minute=9000)).of(who, Tenant("acme", requests_per_minute=7, daily_cap_usd=1))
    assert found.scopes == (
        ScopeClaim("principal:ada", NO_CAPS, 2),
        ScopeClaim("tenant:acme", Caps(day=10**9)),
        ScopeClaim("gateway", None),
    )
    assert found.claims(40) == (
        WindowClaim("principal:ada", "requests", 3),
        WindowClaim("principal:ada", "tokens", 500, 40),
        WindowClaim("tenant:acme", "requests", 7),
        WindowClaim("gateway", "tokens", 9000, 40),
    )
    assert found.requests == (WindowClaim("principal:ada", "requests", 3), WindowClaim("tenant:acme", "requests", 7))
    assert found.shared_by == "tenant:acme"


@pytest.mark.parametrize(
    ("principal", "tenant", "gateway"),
    [
        (Limits(hard_cap_usd=1), NONE, NONE),
        (NONE, Limits(monthly_cap_usd=1), NONE),
        (NONE, NONE, Limits(daily_cap_usd=1)),
    ],
)
def test_a_cap_of_any_scope_caps(principal: Limits, tenant: Limits, gateway: Limits) -> None:
    assert standings(gateway).of(Principal("ada", tenant="acme", hard_cap_usd=principal.hard_cap_usd), tenant).capped
    assert not standings().of(Principal("ada", tenant="acme"), NONE).capped


def test_an_equal_principal_stands_as_it_did() -> None:
    known = standings()
    first = known.of(Principal("ada", tenant="acme", hard_cap_usd="1"), Tenant("acme", requests_per_minute=5))
    assert known.of(Principal("ada", tenant="acme", hard_cap_usd=1), Tenant("acme", requests_per_minute=5)) is first


@pytest.mark.parametrize(
    ("who", "tenant"),
    [
        (Principal("ada", tenant="acme"), Tenant("acme", requests_per_minute=5)),
        (Principal("ada", tenant="acme", hard_cap_usd=2), Tenant("acme", requests_per_minute=5)),
        (Principal("ada", tenant="other", hard_cap_usd=1), Tenant("acme", requests_per_minute=5)),
        (Principal("ada", tenant="acme", hard_cap_usd=1), Tenant("acme", requests_per_minute=6)),
        (Principal("ada", tenant="acme", hard_cap_usd=1), NONE),
    ],
)
def test_whatever_changes_counts_at_once(who: Principal, tenant: Limits) -> None:
    known = standings()
    known.of(Principal("ada", tenant="acme", hard_cap_usd=1), Tenant("acme", requests_per_minute=5))
    assert known.of(who, tenant) == standings().of(who, tenant)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "MAX_STANDINGS", 10)
    known = standings()
    for number in range(100):
        known.of(Principal(f"user-{number}"), NONE)
        assert len(known._known) <= 10


def test_a_default_limit_holds_where_the_principal_brings_none() -> None:
    found = standings(defaults=Limits(requests_per_minute=2, daily_cap_usd=1)).of(Principal("ada", requests_per_minute=9), NONE)
    assert found.capped
    assert found.windows == (WindowClaim("principal:ada", "requests", 9),)
