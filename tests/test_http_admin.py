"""The admin routes over a real socket: keys, tenants, prompts, prices, models; what they do, and what they refuse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from starlette_aigateway import StorageUnavailable, money
from starlette_aigateway.http.routes import ROUTES
from starlette_aigateway.providers import EchoProvider

from .http_host import ALICE, ROOT, Service, furnish, path_of, service


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """One service for all tests that do not count what it holds."""
    with service() as host:
        yield host


@pytest.fixture
def host() -> Iterator[Service]:
    with service() as host:
        yield host


def told(answer: Any) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_opens_from_its_creation_to_its_revocation(host: Service) -> None:
    headers, key = host.key(name="mobile-app", metadata={"owner": {"team": "a"}}, expires_at="2126-01-31T13:00:00+01:00")
    assert key["hint"] == headers["authorization"][-4:]
    assert (key["name"], key["metadata"], key["expires_at"]) == ("mobile-app", {"owner": {"team": "a"}}, "2126-01-31T12:00:00Z")
    assert host.complete(headers).status_code == 200
    revoked = host.call("DELETE", f"/keys/{key['id']}").json()
    assert revoked["revoked_at"] is not None
    assert host.complete(headers).status_code == 401
    assert host.call("DELETE", f"/keys/{key['id']}").json()["revoked_at"] == revoked["revoked_at"], "revoking again changes nothing"


def test_a_rotated_key_opens_under_both_until_the_grace_is_over(host: Service) -> None:
    old, key = host.key()
    answer = host.call("POST", f"/keys/{key['id']}/rotate", json={"grace_seconds": 3600})
    assert answer.headers["cache-control"] == "no-store"
    new = {"authorization": f"Bearer {answer.json()['key']}"}
    assert answer.json()["id"] == key["id"]
    assert [host.call("GET", "/me", headers).status_code for headers in (old, new)] == [200, 200]
    once_more = host.call("POST", f"/keys/{key['id']}/rotate", json={}).json()["key"]
    newest = {"authorization": f"Bearer {once_more}"}
    assert [host.call("GET", "/me", headers).status_code for headers in (old, new, newest)] == [401, 401, 200]


def test_in_a_change_what_is_absent_stays_and_null_is_no_limit(host: Service) -> None:
    headers, key = host.key(requests_per_minute=60, monthly_cap_usd="50.00", allowed_models=["echo"])
    path = f"/keys/{key['id']}"
    changed = host.call("PATCH", path, json={"monthly_cap_usd": None, "name": "renamed"}).json()
    assert (changed["monthly_cap_usd"], changed["name"], changed["requests_per_minute"]) == (None, "renamed", 60)
    assert changed["allowed_models"] == ["echo"]
    assert host.call("PATCH", path, json={}).json() == changed
    assert host.complete(headers, model="meta/llama").status_code == 403
    assert host.call("PATCH", path, json={"allowed_models": None}).json()["allowed_models"] is None
    assert host.complete(headers, model="meta/llama").status_code == 200, "a change holds from the next call on"


def test_a_changed_cap_keeps_what_is_spent(host: Service) -> None:
    headers, key = host.key(monthly_cap_usd="1")
    host.complete(headers)
    month = host.call("PATCH", f"/keys/{key['id']}", json={"monthly_cap_usd": 2}).json()["budgets"][1]
    assert (month["cap_usd"], month["spent_usd"], month["remaining_usd"]) == ("2", "0.000009", "1.999991")


def test_keys_are_listed_page_by_page_each_once(host: Service) -> None:
    made = [host.key(tenant="acme" if index % 2 else None)[1]["id"] for index in range(7)]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 3}
    while True:
        page = host.call("GET", "/keys", params=query).json()
        seen += [key["id"] for key in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if not page["has_more"]:
            break
        query["cursor"] = page["next_cursor"]
    assert seen == sorted(made)
    acme = host.call("GET", "/keys", params={"tenant": "acme", "limit": 3}).json()
    assert (len(acme["data"]), acme["has_more"]) == (3, False), "a page that is just full is the last one"
    assert acme["data"][0]["budgets"] == host.call("GET", f"/keys/{acme['data'][0]['id']}").json()["budgets"]


MONEY = ("daily_cap_usd", "monthly_cap_usd", "hard_cap_usd")
COUNTS = ("requests_per_minute", "tokens_per_minute", "max_parallel_requests")
BAD_MONEY: list[Any] = [0.5, -1, "-0.01", True, "ten", "NaN", "Infinity", "1e400", "0.0000000001", 10**10, [], {}]
BAD_COUNTS: list[Any] = [0, -1, True, 1.5, "60", 10**13, 10**30, [], {}]
BAD_KEYS: list[tuple[str, Any]] = [
    *[(name, value) for name in MONEY for value in BAD_MONEY],
    *[(name, value) for name in COUNTS for value in BAD_COUNTS],
    ("name", ""), ("name", "x" * 201), ("name", None), ("name", 7), ("name", "a\nb"), ("name", " a"),
    ("tenant", ""), ("tenant", 7), ("tenant", {}), ("tenant", "x" * 201),
    ("allowed_models", "echo"), ("allowed_models", {"echo": 1}), ("allowed_models", [1]), ("allowed_models", [""]),
    ("allowed_models", [[]]),
    ("allowed_models", True), ("expires_at", "tomorrow"), ("expires_at", "2126-01-31T12:00:00"), ("expires_at", 1893456000),
    ("expires_at", "0001-01-01T00:00:00+23:59"), ("metadata", []), ("metadata", "x"), ("metadata", {"a": "x" * 20_000}),
    ("surprise", 1), ("id", "key_mine"), ("revoked_at", None), ("self", 1), ("key_id", "x"), ("key", "aigw_x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_KEYS, ids=lambda value: repr(value)[:40])
def test_a_bad_field_of_a_key_is_400_and_named_and_nothing_is_made_of_it(shared: Service, name: str, value: Any) -> None:
    before = len(shared.acted)
    content = {"name": "app", name: value}
    status, code, param = told(shared.call("POST", "/keys", json=content))
    assert (status, code) == (400, "invalid_request")
    assert param is not None
    assert param.partition(".")[0] == name
    assert len(shared.acted) == before
    _, key = shared.key()
    assert told(shared.call("PATCH", f"/keys/{key['id']}", json={name: value}))[::2] == (400, param)


def test_unknown_fields_are_refused_with_those_that_are_known(shared: Service) -> None:
    error = shared.call("POST", "/keys", json={"name": "x", "monthly_cap": 5}).json()["error"]
    assert error["param"] == "monthly_cap"
    assert "monthly_cap_usd" in error["message"]


def test_a_fraction_of_money_is_refused_with_a_hint_and_integers_and_texts_are_exact(shared: Service) -> None:
    error = shared.call("POST", "/keys", json={"name": "x", "daily_cap_usd": 0.1}).json()["error"]
    assert '"0.1"' in error["message"]
    assert shared.key(daily_cap_usd=3)[1]["daily_cap_usd"] == "3"
    assert shared.key(daily_cap_usd="0.000000001")[1]["daily_cap_usd"] == "0.000000001"


def test_a_zero_of_a_hundred_million_digits_is_a_zero(shared: Service) -> None:
    assert shared.key(daily_cap_usd="0E-99999999")[1]["daily_cap_usd"] == "0"
    assert money.usd("0E-99999999").as_tuple().exponent == 0


def test_a_key_needs_a_name_and_a_future(shared: Service) -> None:
    assert told(shared.call("POST", "/keys", json={})) == (400, "invalid_request", "name")
    assert told(shared.call("POST", "/keys", json={"name": "x", "expires_at": "2020-01-01T00:00:00Z"})) == (
        400,
        "invalid_request",
        "expires_at",
    )


@pytest.mark.parametrize("grace", [-1, True, "60", None, [], 10**9, 1e300])
def test_a_bad_grace_is_400_and_the_key_stays_as_it_is(shared: Service, grace: Any) -> None:
    headers, key = shared.key()
    assert told(shared.call("POST", f"/keys/{key['id']}/rotate", json={"grace_seconds": grace})) == (
        400,
        "invalid_request",
        "grace_seconds",
    )
    assert shared.call("GET", "/me", headers).status_code == 200


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}'])
def test_a_body_that_is_no_json_object_is_400(shared: Service, body: bytes) -> None:
    answer = shared.client.post("/keys", headers=ROOT | {"content-type": "application/json"}, content=body)
    assert told(answer)[:2] == (400, "invalid_json")


def test_a_body_that_is_too_large_is_413() -> None:
    with service(max_body_bytes=1000) as host:
        assert told(host.call("POST", "/keys", json={"name": "x" * 2000}))[:2] == (413, "request_too_large")


# -- tenants ---------------------------------------------------------------------------------------------------------


def test_a_tenants_limits_are_replaced_by_put_and_changed_by_patch(host: Service) -> None:
    whole = host.call("PUT", "/tenants/acme", json={"daily_cap_usd": "2.50", "requests_per_minute": 5}).json()
    assert (whole["daily_cap_usd"], whole["requests_per_minute"], whole["budgets"][0]["cap_usd"]) == ("2.5", 5, "2.5")
    changed = host.call("PATCH", "/tenants/acme", json={"daily_cap_usd": None}).json()
    assert (changed["daily_cap_usd"], changed["requests_per_minute"], changed["budgets"][0]["cap_usd"]) == (None, 5, None)
    assert host.call("PUT", "/tenants/acme", json={}).json()["requests_per_minute"] is None
    assert host.call("GET", "/tenants/acme").json() == host.call("GET", "/tenants").json()["data"][0]


def test_a_tenants_cap_holds_all_its_keys_together(host: Service) -> None:
    host.call("PUT", "/tenants/acme", json={"hard_cap_usd": 0}).raise_for_status()
    headers, _ = host.key(tenant="acme")
    assert told(host.complete(headers))[:2] == (402, "spend_cap_exceeded")
    host.call("PATCH", "/tenants/acme", json={"hard_cap_usd": 1}).raise_for_status()
    assert host.complete(headers).status_code == 200


@pytest.mark.parametrize("tenant", ["a/b", "a b", "ünï", "a%2Fb?", "acme:1"])
def test_a_tenants_id_may_hold_whatever_an_id_may_and_is_decoded_once(host: Service, tenant: str) -> None:
    path = f"/tenants/{quote(tenant, safe='')}"
    assert host.call("PUT", path, json={}).json()["id"] == tenant
    assert host.call("GET", path).json()["id"] == tenant
    assert [one["id"] for one in host.call("GET", "/tenants").json()["data"]] == [tenant]


def test_tenants_are_listed_page_by_page(host: Service) -> None:
    for name in ("c", "a", "b"):
        host.call("PUT", f"/tenants/{name}", json={}).raise_for_status()
    page = host.call("GET", "/tenants?limit=2").json()
    assert ([tenant["id"] for tenant in page["data"]], page["next_cursor"]) == (["a", "b"], "b")
    page = host.call("GET", "/tenants?limit=2&cursor=b").json()
    assert ([tenant["id"] for tenant in page["data"]], page["has_more"]) == (["c"], False)


def test_what_does_not_exist_is_404_with_a_code_of_its_own(shared: Service) -> None:
    missing: list[tuple[str, str, Any, str]] = [
        ("GET", "/keys/key_none", None, "key_not_found"),
        ("PATCH", "/keys/key_none", {"name": "x"}, "key_not_found"),
        ("DELETE", "/keys/key_none", None, "key_not_found"),
        ("POST", "/keys/key_none/rotate", {}, "key_not_found"),
        ("GET", "/tenants/none", None, "tenant_not_found"),
        ("PATCH", "/tenants/none", {"daily_cap_usd": 1}, "tenant_not_found"),
        ("GET", "/prompts/none", None, "prompt_not_found"),
        ("GET", "/prompts/none?version=1", None, "prompt_not_found"),
        ("POST", "/prompts/none/activate", {"version": 1}, "prompt_not_found"),
        ("POST", "/prompts/none/render", {}, "prompt_not_found"),
    ]
    for method, path, body, code in missing:
        answer = shared.call(method, path, json=body)
        assert told(answer)[:2] == (404, code), (method, path)


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_versions_count_up_and_labels_move_forward_and_back(host: Service) -> None:
    first = host.call("POST", "/prompts", json={"name": "greet", "messages": "Hello {{name}}"})
    assert (first.status_code, first.json()["version"], first.json()["labels"], first.json()["variables"]) == (
        201,
        1,
        ["production"],
        ["name"],
    )
    second = host.call("POST", "/prompts/greet", json={"messages": [{"role": "user", "content": "Hi {{ who }}"}], "labels": ["beta"]})
    assert (second.json()["version"], second.json()["labels"]) == (2, ["beta"])
    assert host.call("GET", "/prompts/greet?label=latest").json()["version"] == 2
    assert host.call("GET", "/prompts/greet?label=production").json()["version"] == 1
    moved = host.call("POST", "/prompts/greet/activate", json={"version": 2}).json()
    assert moved["labels"] == ["beta", "production"]
    back = host.call("POST", "/prompts/greet/activate", json={"version": 1, "label": "production"}).json()
    assert (back["version"], back["labels"]) == (1, ["production"])
    assert [prompt["version"] for prompt in host.call("GET", "/prompts/greet").json()["data"]] == [2, 1]
    page = host.call("GET", "/prompts/greet?limit=1").json()
    assert (page["data"][0]["version"], page["next_cursor"]) == (2, "2")
    page = host.call("GET", "/prompts/greet?limit=1&cursor=2").json()
    assert (page["data"][0]["version"], page["has_more"]) == (1, False)
    assert "messages" not in host.call("GET", "/prompts").json()["data"][0], "a list is light"


def test_a_rendering_is_what_a_call_would_send(host: Service) -> None:
    host.call("POST", "/prompts", json={"name": "greet", "messages": "Hello {{name}}", "settings": {"model": "echo"}}).raise_for_status()
    rendered = host.call("POST", "/prompts/greet/render", json={"variables": {"name": "{{secret}}"}}).json()
    assert rendered == {
        "name": "greet", "version": 1, "settings": {"model": "echo"}, "messages": [{"role": "system", "content": "Hello {{secret}}"}],
    }  # fmt: skip
    assert told(host.call("POST", "/prompts/greet/render", json={})) == (422, "missing_variable", "variables.name")
    assert told(host.call("POST", "/prompts/greet/render", json={"version": 1, "label": "production"})) == (400, "invalid_request", "label")


def test_a_tenants_prompt_hides_the_shared_one_and_the_shared_ones_labels_are_not_moved_through_it(host: Service) -> None:
    host.call("POST", "/prompts", json={"name": "greet", "messages": "shared"}).raise_for_status()
    assert host.call("GET", "/prompts/greet?tenant=acme&label=latest").json()["tenant"] is None
    answer = host.call("POST", "/prompts/greet/activate?tenant=acme", json={"version": 1, "label": "beta"})
    assert told(answer)[:2] == (404, "prompt_not_found")
    host.call("POST", "/prompts/greet?tenant=acme", json={"messages": "own"}).raise_for_status()
    assert host.call("GET", "/prompts/greet?tenant=acme&label=latest").json()["messages"][0]["content"] == "own"
    assert host.call("GET", "/prompts/greet?label=latest").json()["messages"][0]["content"] == "shared"
    headers, _ = host.key(tenant="acme")
    called = host.call("POST", "/complete", headers, json={"model": "echo", "prompt": {"name": "greet"}})
    assert called.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/prompts", {"messages": "x"}, "name"),
        ("/prompts", {"name": "a/b", "messages": "x"}, "name"),
        ("/prompts", {"name": "x"}, "messages"),
        ("/prompts", {"name": "x", "messages": []}, "messages"),
        ("/prompts", {"name": "x", "messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ("/prompts", {"name": "x", "messages": "{{ open"}, "messages[0].content"),
        ("/prompts", {"name": "x", "messages": "x", "labels": "beta"}, "labels"),
        ("/prompts", {"name": "x", "messages": "x", "labels": ["latest"]}, "label"),
        ("/prompts", {"name": "x", "messages": "x", "labels": [[]]}, "label"),
        ("/prompts", {"name": "x", "messages": "x", "settings": {"tools": []}}, "settings.tools"),
        ("/prompts", {"name": "x", "messages": "x", "tenant": "acme"}, "tenant"),
        ("/prompts/greet", {"name": "greet", "messages": "x"}, "name"),
        ("/prompts/greet/activate", {}, "version"),
        ("/prompts/greet/activate", {"version": True}, "version"),
        ("/prompts/greet/activate", {"version": 0}, "version"),
        ("/prompts/greet/activate", {"version": 1, "label": "latest"}, "label"),
        ("/prompts/greet/activate", {"version": 1, "label": None}, "label"),
        ("/prompts/greet/render", {"variables": []}, "variables"),
        ("/prompts/greet/render", {"version": "1"}, "version"),
        ("/prompts/greet/render", {"label": 1}, "label"),
        ("/prompts/greet/render", {"variables": {"self": 1, "name": "x"}}, "variables.self"),
    ],
)
def test_a_bad_prompt_is_400_and_its_place_is_named(shared: Service, path: str, body: dict[str, Any], param: str) -> None:
    furnish(shared)
    assert told(shared.call("POST", path, json=body)) == (400, "invalid_request", param)


# -- credits ---------------------------------------------------------------------------------------------------------


def test_a_credit_lets_a_key_pass_its_cap_until_it_ends(host: Service) -> None:
    headers, key = host.key(monthly_cap_usd="0.0000001", hard_cap_usd="0.0000001")
    assert host.complete(headers).status_code == 402
    body = {"principal": key["id"], "amount_usd": "3.25", "expires_at": "2126-01-31T12:00:00Z", "note": "the launch"}
    given = host.call("POST", "/credits", json=body)
    assert given.status_code == 201
    credit = given.json()
    assert credit["ended_at"] is None
    assert (credit["scope"], credit["principal"], credit["tenant"]) == ("principal", key["id"], None)
    assert (credit["amount_usd"], credit["note"], credit["expires_at"]) == ("3.25", "the launch", "2126-01-31T12:00:00Z")
    assert host.complete(headers).status_code == 200
    budgets = {budget["window"]: budget for budget in host.call("GET", "/me", headers).json()["budgets"]}
    assert (budgets["month"]["credit_usd"], budgets["day"]["credit_usd"]) == ("3.25", "0")
    ended = host.call("DELETE", f"/credits/{credit['id']}").json()
    assert ended["ended_at"] is not None
    assert host.call("DELETE", f"/credits/{credit['id']}").json() == ended, "ending it again changes nothing"
    assert (
        host.call("POST", "/complete", headers, json={"model": "echo", "messages": [{"role": "user", "content": "more"}]}).status_code
        == 402
    )
    assert [(event.action, event.subject) for event in host.acted[-2:]] == [("credit.add", credit["id"]), ("credit.end", credit["id"])]


def test_credits_are_listed_newest_first_page_by_page(host: Service) -> None:
    made = [
        host.call("POST", "/credits", json={"tenant": f"t{number % 2}", "amount_usd": 1, "expires_at": "2126-01-31T12:00:00Z"}).json()["id"]
        for number in range(5)
    ]
    page = host.call("GET", "/credits?limit=2").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([made[4], made[3]], True)
    page = host.call("GET", f"/credits?limit=5&cursor={page['next_cursor']}").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([made[2], made[1], made[0]], False)
    assert [one["id"] for one in host.call("GET", "/credits?tenant=t1").json()["data"]] == [made[3], made[1]]
    assert host.call("GET", "/credits?gateway=true").json()["data"] == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"amount_usd": 0}, "amount_usd"),
        ({"amount_usd": 0.5}, "amount_usd"),
        ({"amount_usd": "-1"}, "amount_usd"),
        ({"amount_usd": None}, "amount_usd"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"expires_at": None}, "expires_at"),
        ({"expires_at": 7}, "expires_at"),
        ({"note": "x" * 1001}, "note"),
        ({"note": 5}, "note"),
        ({"tenant": "acme"}, "principal"),
        ({"principal": None}, "principal"),
        ({"principal": 5}, "principal"),
        ({"gateway": "yes"}, "gateway"),
        ({"surely": "not"}, "surely"),
    ],
)
def test_a_credit_that_makes_no_sense_is_refused_with_the_field(shared: Service, changes: dict[str, Any], param: str) -> None:
    body = {"principal": "alice", "amount_usd": "1", "expires_at": "2126-01-31T12:00:00Z"} | changes
    assert told(shared.call("POST", "/credits", json=body)) == (400, "invalid_request", param)


def test_a_credit_for_a_key_that_does_not_exist_is_404(shared: Service) -> None:
    body = {"principal": "key_nobody", "amount_usd": "1", "expires_at": "2126-01-31T12:00:00Z"}
    assert shared.call("POST", "/credits", json=body).json()["error"]["code"] == "key_not_found"
    assert shared.call("GET", "/credits/crd_none").json()["error"]["code"] == "credit_not_found"
    assert shared.call("DELETE", "/credits/crd_none").json()["error"]["code"] == "credit_not_found"


# -- prices and models -----------------------------------------------------------------------------------------------


def test_a_stored_price_holds_from_the_next_call_on_until_it_is_removed(host: Service) -> None:
    headers, _ = host.key()
    put = host.call("PUT", "/prices", json={"model": "echo", "price": {"input": 1000, "output": "2000", "request": "0.5"}}).json()
    assert put["price"] == {
        "input": "1000", "output": "2000", "cache_read": "1000", "cache_write": "1000", "cache_write_1h": "1000", "reasoning": "2000",
        "request": "0.5", "tiers": [],
    }  # fmt: skip
    assert host.complete(headers, max_tokens=10).headers["x-aigateway-cost-usd"] == "0.509"
    assert host.call("GET", "/prices").json()["data"] == [put]
    assert host.call("PUT", "/prices", json={"model": "echo", "price": None}).json()["price"] is None
    assert host.call("GET", "/prices").json()["data"] == []
    assert host.complete(headers, max_tokens=11).headers["x-aigateway-cost-usd"] == "0.000009"


def test_a_price_with_tiers_is_shown_as_it_was_put(host: Service) -> None:
    tier = {"above": 200_000, "input": "6", "output": "22.5", "cache_read": "0.6", "cache_write": "7.5", "cache_write_1h": "12"}
    price = {"input": "3", "output": "15", "cache_read": "0.3", "cache_write": "3.75", "cache_write_1h": "6", "tiers": [tier]}
    put = host.call("PUT", "/prices", json={"model": "claude", "price": price}).json()
    assert put["price"] == {**price, "reasoning": "15", "request": "0", "tiers": [{**tier, "reasoning": "22.5"}]}
    assert host.call("GET", "/prices").json()["data"] == [put]
    assert host.call("PUT", "/prices", json={"model": "claude", "price": put["price"]}).json() == put


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "model"), ({"model": "x"}, "price"), ({"model": "x", "price": 5}, "price"),
        ({"model": "x", "price": {"input": 1}}, "price.output"),
        ({"model": "x", "price": {"input": 0.15, "output": 1}}, "price.input"),
        ({"model": "x", "price": {"input": None, "output": 1}}, "price.input"),
        ({"model": "x", "price": {"input": 1, "output": 1, "extra": 1}}, "price.extra"),
        ({"model": "x", "price": {"input": 1, "output": 1, "cache_write_1h": 0.5}}, "price.cache_write_1h"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": {}}}, "price.tiers"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [5]}}, "price.tiers[0]"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"input": 1, "output": 1}]}}, "price.tiers[0].above"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"above": 5, "input": 1}]}}, "price.tiers[0].output"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"above": 0, "input": 1, "output": 1}]}}, "price.tiers[0].above"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"above": 5, "input": 1, "output": 0.5}]}}, "price.tiers[0].output"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"above": 5, "input": 1, "output": 1}] * 2}}, "price.tiers"),
        ({"model": "x", "price": {"input": 1, "output": 1, "tiers": [{"above": 5, "input": 1, "output": 1, "request": 1}]}},
         "price.tiers[0].request"),
        ({"model": "x", "provider": 1, "price": None}, "provider"),
        ({"model": "x", "price": None, "more": 1}, "more"),
    ],
)  # fmt: skip
def test_a_bad_price_is_400_and_its_field_is_named(shared: Service, body: dict[str, Any], param: str) -> None:
    assert told(shared.call("PUT", "/prices", json=body)) == (400, "invalid_request", param)


def test_models_are_those_that_a_caller_may_use_and_can_be_asked_for_one_by_one(host: Service) -> None:
    host.call("PUT", "/prices", json={"model": "stored", "provider": "echo", "price": {"input": 1, "output": 1}}).raise_for_status()
    host.call("PUT", "/prices", json={"model": "elsewhere", "provider": "azure", "price": {"input": 1, "output": 1}}).raise_for_status()

    def listed(headers: dict[str, str]) -> list[str]:
        whole = host.call("GET", "/v1/models", headers).json()
        assert whole["object"] == "list"
        return [model["id"] for model in whole["data"]]

    assert listed(ALICE) == ["echo", "meta/llama", "stored"]
    narrow, _ = host.key(allowed_models=["meta/llama", "unpriced-but-named"])
    assert listed(narrow) == ["meta/llama", "unpriced-but-named"]
    for path in ("/v1/models/meta/llama", "/v1/models/meta%2Fllama"):
        assert host.call("GET", path, narrow).json() == {"id": "meta/llama", "object": "model", "created": 0, "owned_by": "echo"}
    for hidden in ("echo", "none", "meta", "meta/llama/", "meta/llama/x"):
        assert told(host.call("GET", f"/v1/models/{hidden}", narrow)) == (404, "model_not_found", "model")


def test_providers_with_a_list_of_models_are_listed_by_it_alone_in_the_order_of_the_providers() -> None:
    with service(providers=[EchoProvider("first", ["b", "a"]), EchoProvider("second", ["c", "a"])]) as host:
        models = host.call("GET", "/v1/models", ALICE).json()["data"]
    assert [(model["id"], model["owned_by"]) for model in models] == [("b", "first"), ("a", "first"), ("c", "second")]


# -- health ----------------------------------------------------------------------------------------------------------


def test_readiness_asks_the_stores_and_liveness_does_not(host: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down() -> None:
        raise StorageUnavailable("the ledger cannot be written", retry_after=1.0)

    assert host.call("GET", "/readyz", {}).json() == {"status": "ready"}
    monkeypatch.setattr(host.gateway._ledger, "ping", down)
    refused = host.call("GET", "/readyz", {})
    assert told(refused)[:2] == (503, "storage_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert host.call("GET", "/healthz", {}).json() == {"status": "ok"}


# -- what administrators do is told ----------------------------------------------------------------------------------


def test_every_change_is_told_to_observers_and_to_the_log_with_its_actor_and_no_reading_is(
    host: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "starlette_aigateway")
    headers = furnish(host)
    for route in ROUTES:
        if route.guard == "admin" and route.method == "GET":
            host.call("GET", path_of(host, route)).raise_for_status()
    host.call("PATCH", "/tenants/acme", json={"daily_cap_usd": 1}).raise_for_status()
    host.call("PATCH", f"/keys/{host.key_id}", json={}).raise_for_status()  # changes nothing
    host.call("PATCH", f"/keys/{host.key_id}", json={"name": "x"}).raise_for_status()
    host.call("POST", f"/keys/{host.key_id}/rotate", json={}).raise_for_status()
    host.call("DELETE", f"/keys/{host.key_id}").raise_for_status()
    host.call("POST", "/prompts/greet/activate", json={"version": 1}).raise_for_status()
    done = [("key.create", host.key_id), ("tenant.save", "acme"), ("prompt.save", "greet@1"), ("price.set", "echo/echo")]
    done += [
        ("credit.add", host.credit_id),
        ("tenant.update", "acme"),
        ("key.update", host.key_id),
        ("key.rotate", host.key_id),
        ("key.revoke", host.key_id),
    ]
    done += [("prompt.activate", "greet@1")]
    logged = [record.getMessage() for record in caplog.records if record.name == "starlette_aigateway" and "admin" in record.getMessage()]
    assert len(logged) == len(done)
    assert all(message.startswith("admin 'root': ") for message in logged)
    assert "aigw_" not in caplog.text
    assert headers["authorization"][-20:] not in caplog.text
    host.call("GET", "/readyz")
    assert [(event.action, event.subject) for event in host.acted] == done
    assert {event.actor for event in host.acted} == {"root"}
