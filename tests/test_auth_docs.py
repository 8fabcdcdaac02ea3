"""What docs/auth.md shows is carried out as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import Depends, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from starlette_aigateway import AIGateway, Price
from starlette_aigateway.providers import EchoProvider

from .serving import serve

PAGE = Path(__file__).parents[1] / "docs" / "auth.md"
BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
CALL = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}


def block(mark: str) -> str:
    (found,) = [text for text in BLOCKS if mark in text]
    return found


def carried_out(mark: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(block(mark), str(PAGE), "exec"), names)
    return names


def gateway_of(names: dict[str, Any]) -> AIGateway:
    settings = {name: names[name] for name in ("resolve_principal", "authorize_admin") if name in names}
    return AIGateway.in_memory(providers=[EchoProvider()], prices={"echo": Price(1, 1)}, **settings)


@contextmanager
def served(app: Any) -> Iterator[httpx.Client]:
    with serve(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


def test_every_block_of_the_page_is_tried_here() -> None:
    marks = ("PARTNERS", "oauth2", "aget_user", "bearer_admin", "scopes_admin")
    assert sorted(map(block, marks)) == sorted(BLOCKS)


def test_the_user_of_the_session_else_an_api_key_of_the_hosts() -> None:
    async def login(request: Request) -> PlainTextResponse:
        request.session["user_id"] = 7
        return PlainTextResponse("welcome")

    gateway = gateway_of(carried_out("PARTNERS"))
    app = Starlette(
        routes=[Route("/login", login, methods=["POST"]), Mount("/ai", gateway)],
        middleware=[Middleware(SessionMiddleware, secret_key="of a test")],
    )
    with served(app) as client:
        assert client.post("/ai/complete", json=CALL).status_code == 401
        assert client.post("/ai/complete", json=CALL, headers={"x-partner-key": "wrong"}).status_code == 401
        partner = client.get("/ai/me", headers={"x-partner-key": "partner-key-of-your-own"}).json()
        assert (partner["principal"], partner["tenant"], partner["hard_cap_usd"]) == ("partner:weather-app", "partners", "500")
        client.post("/login").raise_for_status()
        both = client.get("/ai/me", headers={"x-partner-key": "partner-key-of-your-own"}).json()
        assert (both["principal"], both["monthly_cap_usd"]) == ("user:7", "20")
        assert client.post("/ai/complete", json=CALL).status_code == 200
        elsewhere = client.post("/ai/complete", json=CALL, headers={"origin": "https://evil.example"})
        assert elsewhere.json()["error"]["code"] == "foreign_origin"


def test_a_dependency_of_fastapi_is_the_login_and_its_refusals_are_the_answers() -> None:
    app = FastAPI()
    app.mount("/ai", gateway_of(carried_out("oauth2")))
    with served(app) as client:
        assert client.get("/ai/me", headers={"authorization": "Bearer token-of-ada"}).json()["principal"] == "ada"
        refused = client.get("/ai/me", headers={"authorization": "Bearer old"})
        assert (refused.status_code, refused.json()["error"]["message"]) == (401, "log in again")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/ai/me").status_code == 401


def test_dependencies_of_the_app_do_not_guard_a_mount() -> None:
    """The trap that the page warns of: were it otherwise, the page would be wrong."""

    async def nobody() -> None:
        raise HTTPException(403, "nobody gets in")

    app = FastAPI(dependencies=[Depends(nobody)])

    @app.get("/own")
    async def own() -> str:
        raise AssertionError

    gateway = AIGateway.in_memory(providers=[EchoProvider()], prices={"echo": Price(1, 1)})
    app.mount("/ai", gateway)
    with served(app) as client:
        assert client.get("/own").status_code == 403
        assert client.get("/ai/healthz").status_code == 200, "nobody asked the dependency"
        assert client.post("/ai/complete", json=CALL).status_code == 401, "the gateway's own door holds"


DJANGO = """
import sys, asyncio
from django.conf import settings
settings.configure(SECRET_KEY="of a test", USE_TZ=True,
                   INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
                   DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[2]}})
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from django.contrib.auth.models import User
from django.test import Client
user = User.objects.create_user("ada", password="x")
client = Client(); client.force_login(user)
cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
names = {}
exec(open(sys.argv[1]).read(), names)
from starlette.requests import HTTPConnection

def asked(cookie):
    headers = [(b"cookie", f"sessionid={cookie}".encode())] if cookie else []
    return asyncio.run(names["resolve_principal"](HTTPConnection({"type": "http", "headers": headers})))

principal = asked(cookie)
assert principal.id == f"user:{user.pk}", principal
assert str(principal.monthly_cap_usd) == "20"
assert asked("forged") is None
assert asked("") is None
print("fine")
"""


def test_the_session_of_django_is_the_login(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(block("aget_user"))
    command = [sys.executable, "-W", "ignore", "-c", DJANGO, str(tmp_path / "snippet.py"), str(tmp_path / "db.sqlite3")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr


def test_administrators_by_bearer_tokens() -> None:
    with served(gateway_of(carried_out("bearer_admin"))) as client:
        ada = {"authorization": "Bearer a-token-of-at-least-32-characters"}
        assert client.post("/keys", json={"name": "x"}, headers=ada).status_code == 201
        assert client.get("/audit", headers=ada).json()["data"][0]["actor"] == "ada"
        assert client.get("/audit", headers={"authorization": "Bearer guessed"}).status_code == 403


class ByHeader(AuthenticationBackend):
    async def authenticate(self, connection: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        name = connection.headers.get("x-user")
        return None if name is None else (AuthCredentials(["authenticated", *(["admin"] if name == "ada" else [])]), SimpleUser(name))


def test_administrators_by_the_scopes_of_the_hosts_authentication_middleware() -> None:
    gateway = gateway_of(carried_out("scopes_admin"))
    app = Starlette(routes=[Mount("/ai", gateway)], middleware=[Middleware(AuthenticationMiddleware, backend=ByHeader())])
    with served(app) as client:
        assert client.post("/ai/keys", json={"name": "x"}, headers={"x-user": "ada"}).status_code == 201
        assert client.get("/ai/audit", headers={"x-user": "ada"}).json()["data"][0]["actor"] == "ada"
        assert client.get("/ai/keys", headers={"x-user": "bob"}).status_code == 403
        assert client.get("/ai/keys").status_code == 403
    with served(gateway) as bare:
        assert bare.get("/keys", headers={"x-user": "ada"}).json()["error"]["code"] == "login_unavailable", "the middleware is missing"
