"""The host's login at the gateway's door: what reaches it, what its principals are held to, and what it may do wrong."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from starlette.authentication import AuthCredentials, SimpleUser, UnauthenticatedUser
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from starlette_aigateway import (
    Admin,
    AIGateway,
    AuthenticationError,
    ConfigurationError,
    InvalidRequest,
    Limits,
    PermissionDenied,
    Principal,
    Tenant,
)
from starlette_aigateway.auth import bearer_admin, scopes_admin
from starlette_aigateway.http.origins import Origins, parse

from .http_host import ALICE, ROOT, service

KEY = "aigw_" + "0" * 49
COST = "0.000001"


# -- limits --------------------------------------------------------------------------------------------------------------


LIMITS: list[tuple[dict[str, Any], str]] = [
    ({"requests_per_minute": 1}, "rate_limit_exceeded"),
    ({"tokens_per_minute": 120}, "rate_limit_exceeded"),
    ({"daily_cap_usd": COST}, "spend_cap_exceeded"),
    ({"monthly_cap_usd": COST}, "spend_cap_exceeded"),
    ({"hard_cap_usd": COST}, "spend_cap_exceeded"),
    ({"allowed_models": ["meta/llama"]}, "model_not_allowed"),
]


CASES = [(whose, *case) for whose in ("principal", "tenant") for case in LIMITS if (whose, case[1]) != ("tenant", "model_not_allowed")]


@pytest.mark.parametrize(("whose", "limits", "code"), CASES, ids=lambda value: next(iter(value)) if isinstance(value, dict) else value)
def test_a_user_of_the_hosts_login_is_held_to_every_limit_as_a_key_is(whose: str, limits: dict[str, Any], code: str) -> None:
    async def resolve(connection: HTTPConnection) -> Principal:
        return Principal("ada", **limits) if whose == "principal" else Principal("ada", tenant=Tenant("acme", **limits))

    with service(resolve_principal=resolve) as host:
        if whose == "principal":
            key, _ = host.key(**limits)
        else:
            host.call("PUT", "/tenants/umbrella", json=limits).raise_for_status()
            key, _ = host.key(tenant="umbrella")
        for headers in (key, {}):
            answers = (host.complete(headers, max_tokens=60 + turn) for turn in range(20))
            refused = next(answer.json()["error"] for answer in answers if answer.status_code != 200)
            assert refused["code"] == code
            assert code == "model_not_allowed" or refused["details"]["scope"] == whose


def test_calls_at_the_same_time_are_counted_for_a_user_as_for_a_key() -> None:
    async def resolve(connection: HTTPConnection) -> Principal:
        return Principal("ada", max_parallel_requests=1)

    with service(resolve_principal=resolve) as host:
        key, _ = host.key(max_parallel_requests=1)
        body = {"model": "echo", "messages": [{"role": "user", "content": "word " * 20_000}], "stream": True}
        for headers in (key, {}):
            with host.client.stream("POST", "/complete", json=body, headers=headers) as running:
                assert running.status_code == 200
                answer = host.complete(headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_parallel_requests")


# -- which credentials reach it ------------------------------------------------------------------------------------------


class Login:
    """A resolver and an authorizer that let everybody in, and remember whom they saw."""

    def __init__(self) -> None:
        self.asked = 0

    async def resolve(self, connection: HTTPConnection) -> Principal:
        self.asked += 1
        return Principal("anybody")

    async def authorize(self, connection: HTTPConnection) -> bool:
        self.asked += 1
        return True


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


CARRIED: list[tuple[dict[str, str], str]] = [
    ({"authorization": f"Bearer {KEY}"}, ""),
    ({"authorization": f"bEARER   {KEY}"}, ""),
    ({"authorization": "Bearer aigw_short"}, ""),
    ({"authorization": KEY}, ""),
    ({"authorization": f"Token {KEY}"}, ""),
    ({"authorization": f'Digest username="x", response="{KEY}"'}, ""),
    ({"authorization": basic("", KEY)}, ""),
    ({"authorization": basic(KEY, "").rstrip("=")}, ""),
    ({"authorization": "Bearer sk-of-the-host", "x-api-key": KEY}, ""),
    ({"authorization": basic("ada", "pass"), "x-api-key": KEY}, ""),
    ({"x-api-key": KEY}, ""),
    ({"api-key": "aigw_short"}, ""),
    ({"x-goog-api-key": KEY}, ""),
    ({"proxy-authorization": f"Bearer {KEY}"}, ""),
    ({"x-anything": f"key={KEY}"}, ""),
    ({"cookie": f"a=b; key={KEY}"}, ""),
    ({}, f"?key={KEY}"),
    ({}, f"?a=b&key=%61igw_{'0' * 49}"),
]


@pytest.mark.parametrize(("headers", "query"), CARRIED, ids=lambda value: str(value).replace(KEY, "KEY"))
def test_a_stored_key_never_reaches_the_hosts_login_wherever_it_is_put(headers: dict[str, str], query: str) -> None:
    login = Login()
    with service(resolve_principal=login.resolve, authorize_admin=login.authorize) as host:
        for method, path, status in (("GET", "/me", {401}), ("GET", "/keys", {401, 403}), ("GET", "/usage", {401})):
            answer = host.call(method, path + query, headers)
            assert answer.status_code in status, (path, answer.text)
            assert KEY not in answer.text
    assert login.asked == 0


def test_credentials_of_the_hosts_own_reach_its_login() -> None:
    login = Login()
    with service(resolve_principal=login.resolve) as host:
        own = [
            {"authorization": "Bearer sk-1"},
            {"x-api-key": "mine"},
            {"authorization": basic("ada", "x")},
            {"cookie": "session=abc.aigw_x"},
        ]
        for headers in [*own, {"authorization": "Basic not-base64!"}, {}]:
            assert host.call("GET", "/me?", headers).status_code == 200, headers
        assert login.asked == len(own) + 2


def test_a_stored_key_opens_also_beside_a_credential_of_the_hosts() -> None:
    login = Login()
    with service(resolve_principal=login.resolve) as host:
        key, shown = host.key()
        raw = key["authorization"].removeprefix("Bearer ")
        answer = host.call("GET", "/me", {"authorization": "Bearer host-token", "x-api-key": raw})
        assert answer.json()["principal"] == shown["id"]
    assert login.asked == 0


# -- what it may do wrong ------------------------------------------------------------------------------------------------


class Strange(BaseException):
    pass


WRONG: list[tuple[Any, int, str]] = [
    (HTTPException(401, headers={"www-authenticate": "Negotiate"}), 401, "refused_by_host"),
    (ExceptionGroup("of a task group", [HTTPException(403, "no")]), 403, "refused_by_host"),
    (HTTPException(502), 503, "login_unavailable"),
    (AuthenticationError("log in first"), 401, "invalid_api_key"),
    (ExceptionGroup("", [AuthenticationError("log in first")]), 401, "invalid_api_key"),
    (PermissionDenied("not you"), 403, "permission_denied"),
    (InvalidRequest("secret-password"), 503, "login_unavailable"),
    (RuntimeError("secret-password"), 503, "login_unavailable"),
    (ExceptionGroup("", [HTTPException(401), HTTPException(401)]), 503, "login_unavailable"),
    (BaseExceptionGroup("", [Strange("secret-password"), HTTPException(401)]), 503, "login_unavailable"),
    (Strange("secret-password"), 503, "login_unavailable"),
    (asyncio.CancelledError(), 503, "login_unavailable"),
    (StopAsyncIteration(), 503, "login_unavailable"),
    (Limits(), 503, "login_unavailable"),
    ("alice", 503, "login_unavailable"),
    (True, 503, "login_unavailable"),
    (None, 401, "invalid_api_key"),
]


@pytest.mark.parametrize(("outcome", "status", "code"), WRONG, ids=repr)
def test_whatever_a_resolver_does_wrong_lets_nobody_through(outcome: Any, status: int, code: str) -> None:
    async def resolve(connection: HTTPConnection) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with service(resolve_principal=resolve) as host:
        for answer in (host.call("GET", "/me", {}), host.complete({})):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert "secret-password" not in answer.text
            if isinstance(outcome, HTTPException) and status == 401:
                assert answer.headers["www-authenticate"] == "Negotiate"
        assert host.call("GET", "/usage", ROOT).json()["data"] == []


def test_an_admin_that_is_none_is_refused_where_it_is_made() -> None:
    for wrong in ("", 5, None, " padded "):
        with pytest.raises(InvalidRequest):
            Admin(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        Admin("ada", tenant=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest):
        Admin("ada", tenant="")


def sync(connection: HTTPConnection) -> None: ...


async def of_nothing() -> None: ...


async def of_two(connection: HTTPConnection, scope: Any) -> None: ...


async def a_generator(connection: HTTPConnection) -> AsyncIterator[None]:
    yield


class Login2:
    async def __call__(self, connection: HTTPConnection) -> None: ...


def str_of(value: Any) -> str:
    """The same in every process: no address."""
    return str(getattr(value, "__name__", repr(value)))


@pytest.mark.parametrize("name", ["resolve_principal", "authorize_admin"])
@pytest.mark.parametrize("wrong", [sync, of_nothing, of_two, a_generator, Login2, "login", 5, Principal("ada")], ids=str_of)
def test_a_login_that_cannot_be_asked_is_refused_at_construction_by_the_name_of_its_argument(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AIGateway.in_memory(**{name: wrong})
    assert caught.value.param == name
    assert name in caught.value.message


def test_every_kind_of_async_function_of_one_argument_is_taken() -> None:
    async def more(connection: HTTPConnection, again: bool = False) -> None: ...

    for good in (more, partial(of_two, scope=None), Login2(), Login().resolve):
        AIGateway.in_memory(resolve_principal=good)


# -- pages of other sites ------------------------------------------------------------------------------------------------


HOST = {"host": "app.example.com"}
COOKIE = {"cookie": "session=1"}
OWN: list[dict[str, str]] = [
    {},
    {"origin": "https://app.example.com"},
    {"origin": "HTTPS://App.Example.com", "host": "app.example.com:443"},
    {"origin": "http://app.example.com:8000", "host": "app.example.com:8000"},
    {"origin": "http://[::1]:8000", "host": "[::1]:8000"},
    {"origin": "https://app.example.com", "host": "internal:8000", "sec-fetch-site": "same-origin"},
    {"sec-fetch-site": "none"},
    {"origin": "https://spa.example.com", "sec-fetch-site": "same-site"},
    {"origin": "https://spa.example.com:443"},
]
FOREIGN: list[dict[str, str]] = [
    {"origin": "null"},
    {"origin": ""},
    {"origin": "https://evil.example"},
    {"origin": "https://app.example.com.evil.example"},
    {"origin": "https://app.example.com@evil.example"},
    {"origin": "https://app.example.com:8443"},
    {"origin": "http://app.example.com:99999"},
    {"origin": "http://["},
    {"origin": "https://evil.example", "x-forwarded-host": "evil.example"},
    {"origin": "https://app.example.com", "host": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "https://app.example.com", "sec-fetch-site": "cross-site"},
    {"origin": "http://spa.example.com"},
]


def asked(method: str, headers: dict[str, str]) -> HTTPConnection:
    raw = [(name.encode(), value.encode()) for name, value in (HOST | headers).items()]
    return HTTPConnection({"type": "http", "method": method, "path": "/", "headers": raw, "query_string": b""})


ORIGINS = Origins(["https://spa.example.com"])
AMBIENT = [COOKIE, {"authorization": basic("ada", "x")}, {"authorization": "Negotiate abc"}, {}, COOKIE | {"authorization": "Bearer sk-1"}]


@pytest.mark.parametrize("login", AMBIENT, ids=str)
def test_what_a_browser_sends_of_itself_changes_things_from_the_hosts_own_pages_only(login: dict[str, str]) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for headers in OWN:
            ORIGINS.check(asked(method, login | headers))
        for headers in FOREIGN:
            with pytest.raises(PermissionDenied) as caught:
                ORIGINS.check(asked(method, login | headers))
            assert caught.value.code == "foreign_origin", headers
    for method in ("GET", "HEAD"):
        for headers in FOREIGN:
            ORIGINS.check(asked(method, login | headers))


@pytest.mark.parametrize("login", [{"authorization": "Bearer sk-1"}, {"x-api-key": "k"}], ids=str)
def test_a_credential_that_a_script_has_to_know_comes_in_from_any_page(login: dict[str, str]) -> None:
    for headers in FOREIGN:
        ORIGINS.check(asked("POST", login | headers))


def test_a_page_of_another_site_does_not_spend_by_its_visitors_login() -> None:
    with service(trusted_origins=["https://spa.example.com"]) as host:
        answer = host.complete(ALICE | COOKIE | {"origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert host.complete(ALICE | COOKIE | {"origin": "https://spa.example.com"}).status_code == 200
        key, _ = host.key()
        assert host.complete(key | {"origin": "https://evil.example"}).status_code == 200
        assert host.complete({"x-api-key": key["authorization"][7:], "origin": "https://evil.example"}).status_code == 200


@pytest.mark.parametrize("wrong", ["https://a.example", ["a.example"], ["https://a.example/path"], ["*"], ["null"], [None], 5])
def test_what_is_no_list_of_origins_is_refused_at_construction(wrong: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        AIGateway.in_memory(trusted_origins=wrong)
    assert caught.value.param == "trusted_origins"


def test_an_origin_has_the_port_of_its_scheme_when_it_names_none() -> None:
    assert parse("https://a.example") == parse("HTTPS://A.example:443")
    assert parse("http://a.example") != parse("https://a.example")


# -- helpers -------------------------------------------------------------------------------------------------------------


TOKEN, OTHER = "t" * 32, "o" * 43


def test_administrators_come_in_by_their_bearer_tokens_and_each_has_its_name() -> None:
    tokens: dict[str | Admin, str] = {"ada": TOKEN, Admin("acme-ops", tenant="acme"): OTHER}
    with service(authorize_admin=bearer_admin(tokens)) as host:
        made = host.call("POST", "/keys", {"authorization": f"Bearer {TOKEN}"}, json={"name": "x"})
        assert made.status_code == 201
        assert host.acted[0].actor == "ada"
        own = host.call("POST", "/keys", {"authorization": f"bearer {OTHER}"}, json={"name": "x"})
        assert own.json()["tenant"] == "acme"
        key = {"authorization": "Bearer " + made.json()["key"]}
        for headers in ({}, key, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}, {"x-api-key": TOKEN}):
            assert host.call("GET", "/keys", headers).status_code in (401, 403), headers
        for wrong in ("", "t" * 31, "t" * 33, TOKEN + "\xe9"):
            headers = {"authorization": f"Bearer {wrong}".strip()}
            assert host.call("GET", "/keys", {k: v.encode("latin-1") for k, v in headers.items()}).status_code == 403  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong", ["", "short", "t" * 31, {}, {"ada": ""}, {"a": TOKEN, "b": TOKEN}, {"": TOKEN}, "aigw_" + TOKEN, "é" * 32, None, {"a": None}]
)
def test_tokens_that_guard_nothing_are_refused_at_construction(wrong: Any) -> None:
    with pytest.raises((ConfigurationError, InvalidRequest)):
        bearer_admin(wrong)


@pytest.mark.anyio
async def test_administrators_come_in_by_the_scopes_that_the_hosts_middleware_gave() -> None:
    authorize = scopes_admin("admin", "mfa", tenant=lambda user: user.display_name.partition("@")[2] or None)

    def connection(user: Any, *scopes: str) -> HTTPConnection:
        return HTTPConnection({"type": "http", "headers": [], "user": user, "auth": AuthCredentials(scopes)})

    assert await authorize(connection(SimpleUser("ada"), "mfa", "admin", "more")) == Admin("ada")
    assert await authorize(connection(SimpleUser("bob@acme"), "mfa", "admin")) == Admin("bob@acme", tenant="acme")
    assert await authorize(connection(SimpleUser("ada"), "admin")) is False
    assert await authorize(connection(UnauthenticatedUser(), "admin", "mfa")) is False
    with pytest.raises(ConfigurationError, match="AuthenticationMiddleware"):
        await authorize(HTTPConnection({"type": "http", "headers": []}))


@pytest.mark.parametrize("wrong", [(), ("",), (5,)])
def test_scopes_that_everybody_has_are_refused_at_construction(wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        scopes_admin(*wrong)
