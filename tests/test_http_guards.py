"""Who may pass at each route of the table, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from starlette_aigateway import AuthenticationError, StorageUnavailable
from starlette_aigateway.http.router import Guard, Route
from starlette_aigateway.http.routes import ROUTES

from .http_host import ACME, ALICE, EXAMPLES, ROOT, Service, furnish, send, service

Attempt = tuple[str, str, dict[str, Any] | None]
ADMIN_ROUTES = [route for route in ROUTES if route.guard == "admin"]
MISTYPED = {"authorization": "Bearer aigw_" + "0" * 49}
FOREIGN = {"authorization": "Bearer sk-something-else"}

# What somebody without the right gets, by guard and by who it is; None: let in.
REFUSALS: dict[Guard, dict[str, int | None]] = {
    "open": {"nobody": None, "mistyped": None, "foreign": None, "key": None, "user": None, "admin": None},
    "caller": {"nobody": 401, "mistyped": 401, "foreign": 401, "key": None, "user": None, "admin": 401},
    "admin": {"nobody": 403, "mistyped": 403, "foreign": 403, "key": 403, "user": 403, "admin": None},
    "caller_or_admin": {"nobody": 401, "mistyped": 401, "foreign": 401, "key": None, "user": None, "admin": None},
}


@pytest.fixture
def host() -> Iterator[Service]:
    with service() as host:
        yield host


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def test_there_is_an_example_of_every_route() -> None:
    assert EXAMPLES.keys() == {(route.method, route.path) for route in ROUTES}


@pytest.mark.parametrize("who", ["nobody", "mistyped", "foreign", "key", "user", "admin"])
def test_every_route_lets_in_whom_its_guard_names_and_nobody_else(host: Service, who: str) -> None:
    for route in ROUTES:
        visitors = {"nobody": {}, "mistyped": MISTYPED, "foreign": FOREIGN, "key": furnish(host), "user": ALICE, "admin": ROOT}
        answer = send(host, route, visitors[who])
        expected = REFUSALS[route.guard][who]
        assert answer.status_code == (route.status if expected is None else expected), (name_of(route), answer.text)
        if expected is not None:
            assert answer.json()["error"]["type"] in ("authentication_error", "permission_error")
            assert "aigw_0" not in answer.text


def test_without_authorize_admin_there_are_no_admin_routes() -> None:
    with service(authorize_admin=None) as host:
        for headers in ({}, ROOT, ALICE, MISTYPED):
            for route in ADMIN_ROUTES:
                answer = send(host, route, headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), name_of(route)
        for path in {route.path for route in ADMIN_ROUTES}:
            assert host.call("OPTIONS", path, {}).status_code == 404, "a 405 would say that the route is there"
        assert host.call("GET", "/usage", ROOT).status_code == 401
        assert host.call("GET", "/usage", ALICE).status_code == 200


def test_a_data_key_is_never_an_admin_key_whatever_the_host_says_about_the_rest(host: Service) -> None:
    headers = furnish(host) | ROOT
    for route in ADMIN_ROUTES:
        assert send(host, route, headers).status_code == 403, name_of(route)
    own = host.call("GET", "/usage", headers).json()
    assert {record["key_id"] for record in own["data"]} == {host.key_id}


FURNISHED = {"key.create", "tenant.save", "prompt.save", "price.set", "credit.add"}


def test_a_cookie_login_changes_things_only_from_the_hosts_own_pages(host: Service) -> None:
    furnish(host)
    elsewhere = ROOT | {"cookie": "session=1", "origin": "https://evil.example"}
    own = ROOT | {"cookie": "session=1", "origin": str(host.client.base_url).rstrip("/")}
    for route in ADMIN_ROUTES:
        answer = send(host, route, elsewhere)
        if route.method == "GET":
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin"), name_of(route)
    assert {event.action for event in host.acted} == FURNISHED, "only what `furnish` did"
    assert host.call("PATCH", f"/keys/{host.key_id}", own, json={"name": "renamed"}).status_code == 200


def test_a_form_of_another_site_is_not_taken_for_a_body(host: Service) -> None:
    furnish(host)
    for route in ADMIN_ROUTES:
        if route.body is not None:
            answer = host.call(route.method, EXAMPLES[route.method, route.path].path or route.path, data={"name": "x"})
            assert answer.status_code == 415, name_of(route)


def test_no_answer_shows_a_raw_key_but_those_that_create_or_rotate_one(host: Service) -> None:
    headers = furnish(host)
    for route in ROUTES:
        answer = send(host, route, ROOT if route.guard != "caller" else headers)
        shown = "aigw_" in answer.text.replace("(`aigw_…`)", "").replace("^aigw_", "")
        assert shown == (route.path in ("/keys", "/keys/{id}/rotate") and route.method == "POST"), name_of(route)
        if shown:
            assert answer.headers["cache-control"] == "no-store"
        headers = furnish(host)  # a route may have revoked or rotated the key


def test_an_administrator_is_never_slowed_down_by_the_failed_logins_of_an_address(host: Service) -> None:
    for _ in range(70):
        assert host.call("GET", "/usage", ROOT).status_code == 200
    statuses = [host.call("GET", "/me", MISTYPED).status_code for _ in range(70)]
    assert statuses[:60] == [401] * 60
    assert set(statuses[60:]) == {429}
    assert host.call("GET", "/usage", ROOT).status_code == 200
    assert host.call("GET", "/me", ALICE).status_code == 200


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        (HTTPException(401, headers={"www-authenticate": "Basic"}), 401, "refused_by_host"),
        (HTTPException(418, "no"), 418, "refused_by_host"),
        (HTTPException(500), 503, "login_unavailable"),
        (RuntimeError("database: secret-password"), 503, "login_unavailable"),
        (AuthenticationError("log in first"), 401, "invalid_api_key"),
        (1, 503, "login_unavailable"),
        ("root", 503, "login_unavailable"),
        (None, 403, "permission_denied"),
    ],
)
def test_whatever_the_hosts_admin_login_does_wrong_lets_nobody_through(outcome: Any, status: int, code: str) -> None:
    async def authorize(connection: HTTPConnection) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with service(authorize_admin=authorize) as host:
        for route in ADMIN_ROUTES:
            answer = send(host, route, {})
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), name_of(route)
            assert "secret-password" not in answer.text
        if status < 500:
            assert host.call("GET", "/usage", ALICE).status_code == 200, "a caller needs no admin"


def test_head_is_answered_as_get_without_a_body(host: Service) -> None:
    for path in ("/healthz", "/readyz", "/keys"):
        answer = host.call("HEAD", path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_method_that_a_route_does_not_take_is_405_and_says_which_it_takes(host: Service) -> None:
    answer = host.call("DELETE", "/keys")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert host.call("GET", "/keys/").status_code == 404
    assert host.call("GET", "/nowhere").status_code == 404


CREDIT = {"amount_usd": "5", "expires_at": "2126-01-31T12:00:00Z"}


def test_an_administrator_of_a_tenant_reaches_no_other_tenants_things(host: Service) -> None:
    furnish(host)  # acme's key
    _, foreign = host.key(tenant="umbrella", name="theirs")
    _, homeless = host.key(name="nobody's")
    host.call("PUT", "/tenants/umbrella", json={}).raise_for_status()
    host.call("POST", "/prompts?tenant=umbrella", json={"name": "theirs", "messages": "secret plan"}).raise_for_status()
    theirs = host.call("POST", "/credits", json={**CREDIT, "principal": foreign["id"]}).json()["id"]
    tenants_own = host.call("POST", "/credits", json={**CREDIT, "tenant": "acme"}).json()["id"]
    for key in (foreign["id"], homeless["id"]):
        attempts: list[Attempt] = [("GET", "", None), ("PATCH", "", {"name": "mine"}), ("DELETE", "", None), ("POST", "/rotate", {})]
        for method, path, body in attempts:
            answer = host.call(method, f"/keys/{key}{path}", ACME, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")
    invisible: list[Attempt] = [
        ("GET", "/tenants/umbrella", None),
        ("PUT", "/tenants/umbrella", {}),
        ("PATCH", "/tenants/umbrella", {}),
        ("GET", "/keys?tenant=umbrella", None),
        ("POST", "/keys", {"name": "x", "tenant": "umbrella"}),
        ("PATCH", f"/keys/{host.key_id}", {"tenant": "umbrella"}),
        ("GET", "/usage?tenant=umbrella", None),
        ("GET", "/prompts?tenant=umbrella", None),
        ("POST", "/prompts?tenant=umbrella", {"name": "x", "messages": "y"}),
        ("GET", "/prompts/theirs", None),
        ("GET", "/prompts/greet", None),
        ("POST", "/prompts/greet/activate", {"version": 1}),
        ("POST", "/prompts/greet/render", {"variables": {"name": "Ada"}}),
        ("GET", "/audit?tenant=umbrella", None),
        ("GET", "/credits?tenant=umbrella", None),
        ("GET", "/credits?gateway=true", None),
        ("GET", f"/credits?principal={foreign['id']}", None),
        ("GET", f"/credits/{theirs}", None),
        ("DELETE", f"/credits/{theirs}", None),
        ("POST", "/credits", {**CREDIT, "principal": foreign["id"]}),
        ("POST", "/credits", {**CREDIT, "principal": "somebody"}),
        ("POST", "/credits", {**CREDIT, "tenant": "umbrella"}),
        ("POST", "/credits", {**CREDIT, "gateway": True}),
        ("GET", "/prices", None),
        ("PUT", "/prices", {"model": "echo", "price": None}),
    ]
    for method, path, body in invisible:
        answer = host.call(method, path, ACME, json=body)
        assert answer.status_code == 404, (method, path, answer.text)
        assert "secret plan" not in answer.text
    forbidden: list[Attempt] = [
        ("PUT", "/tenants/acme", {"daily_cap_usd": 1000}),
        ("PATCH", "/tenants/acme", {"daily_cap_usd": None}),
        ("PATCH", f"/keys/{host.key_id}", {"tenant": None}),
        ("POST", "/credits", {**CREDIT, "tenant": "acme"}),
        ("DELETE", f"/credits/{tenants_own}", None),
    ]
    for method, path, body in forbidden:
        assert host.call(method, path, ACME, json=body).status_code == 403
    assert host.call("GET", "/tenants/acme").json()["daily_cap_usd"] == "2.5"
    assert not [event for event in host.acted if event.actor == "acme"]


def test_an_administrator_of_a_tenant_sees_and_changes_what_is_its_own(host: Service) -> None:
    furnish(host)
    host.key(tenant="umbrella")
    assert [key["id"] for key in host.call("GET", "/keys", ACME).json()["data"]] == [host.key_id]
    made = host.call("POST", "/keys", ACME, json={"name": "second"}).json()
    assert made["tenant"] == "acme"
    assert {budget["scope"] for budget in made["budgets"]} == {"principal", "tenant"}, "what all others spend is not its business"
    assert {budget["scope"] for budget in host.call("GET", f"/keys/{made['id']}").json()["budgets"]} == {"principal", "tenant", "gateway"}
    assert host.call("PATCH", f"/keys/{made['id']}", ACME, json={"tenant": "acme", "daily_cap_usd": 1}).json()["daily_cap_usd"] == "1"
    assert host.call("POST", f"/keys/{made['id']}/rotate", ACME, json={}).status_code == 200
    assert host.call("DELETE", f"/keys/{made['id']}", ACME).json()["revoked_at"] is not None
    assert host.call("GET", "/tenants/acme", ACME).json()["daily_cap_usd"] == "2.5"
    assert [tenant["id"] for tenant in host.call("GET", "/tenants", ACME).json()["data"]] == ["acme"]
    assert {record["tenant"] for record in host.call("GET", "/usage", ACME).json()["data"]} == {"acme"}
    assert host.call("POST", "/prompts", ACME, json={"name": "greet", "messages": "Ours: {{name}}"}).json()["tenant"] == "acme"
    assert [prompt["name"] for prompt in host.call("GET", "/prompts", ACME).json()["data"]] == ["greet"]
    rendered = host.call("POST", "/prompts/greet/render", ACME, json={"variables": {"name": "Ada"}}).json()
    assert rendered["messages"][0]["content"] == "Ours: Ada"
    shared = host.call("POST", "/prompts/greet/render", json={"variables": {"name": "Ada"}}).json()
    assert shared["messages"][0]["content"] == "Greet Ada."
    assert host.call("GET", "/tenants", {"x-admin": "never-saved"}).json()["data"] == []


def test_an_administrator_of_a_tenant_gives_credits_to_its_keys(host: Service) -> None:
    furnish(host)
    given = host.call("POST", "/credits", ACME, json={**CREDIT, "principal": host.key_id}).json()
    assert (given["actor"], given["principal"], given["amount_usd"]) == ("acme", host.key_id, "5")
    listed = host.call("GET", f"/credits?principal={host.key_id}", ACME).json()["data"]
    assert [one["id"] for one in listed] == [given["id"], host.credit_id]
    assert host.call("GET", "/credits", ACME).json()["data"] == [], "of the tenant itself there are none"
    assert host.call("GET", f"/credits/{given['id']}", ACME).json() == given
    assert host.call("DELETE", f"/credits/{given['id']}", ACME).json()["ended_at"] is not None
    assert [(event.action, event.subject) for event in host.acted if event.actor == "acme"] == [
        ("credit.add", given["id"]),
        ("credit.end", given["id"]),
    ]


STORE_VERBS = {
    "add",
    "add_credit",
    "all",
    "budgets",
    "credit",
    "credits",
    "end_credit",
    "get",
    "list",
    "move_label",
    "ping",
    "put",
    "rotate",
    "set_caps",
    "update",
    "usage",
    "versions",
}


def test_with_the_stores_down_every_admin_route_is_503_and_says_when_to_come_back(host: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def down(*_: Any, **__: Any) -> None:
        raise StorageUnavailable("the disk is gone", retry_after=1.0)

    furnish(host)
    gateway = host.gateway
    for store in (gateway._keys, gateway._tenants, gateway._prompts, gateway._stored_prices, gateway._ledger, gateway._trail.store):
        for verb in STORE_VERBS & set(dir(store)):
            monkeypatch.setattr(store, verb, down)
    before = len(host.acted)
    for route in ROUTES:
        if route.guard in ("admin", "caller_or_admin"):
            answer = send(host, route, ROOT)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable"), name_of(route)
            assert answer.headers["retry-after"] == "1"
    assert len(host.acted) == before, "what did not happen is not told"


def test_a_connection_whose_body_was_not_read_ends_with_its_refusal_and_no_other_does(host: Service) -> None:
    """A server closes it in any case, and without a word about it the client's next request is lost."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    unread = [
        host.call("POST", "/complete", FOREIGN, json=body),
        host.call("POST", "/nowhere", ALICE, json=body),
        host.call("POST", "/usage", ALICE, json=body),
        host.call("POST", "/complete", ALICE | {"content-type": "text/plain"}, content=b"{}"),
    ]
    assert [(answer.status_code, answer.headers.get("connection")) for answer in unread] == [
        (401, "close"), (404, "close"), (405, "close"), (415, "close"),
    ]  # fmt: skip
    read = [
        host.call("POST", "/complete", ALICE, json=body),
        host.call("POST", "/complete", ALICE, json={**body, "model": 5}),
        host.call("GET", "/usage", FOREIGN),
    ]
    assert [(answer.status_code, answer.headers.get("connection")) for answer in read] == [(200, None), (400, None), (401, None)]
