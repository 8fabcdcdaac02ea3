"""A host with a gateway as tests of HTTP need it: who is who at its door, and one example request for each route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import httpx
from starlette.requests import HTTPConnection

from starlette_aigateway import Admin, AIGateway, Limits, Price, Principal
from starlette_aigateway.events import AdminActed, Event
from starlette_aigateway.http.router import Route
from starlette_aigateway.providers import EchoProvider

from .serving import serve

MESSAGES = [{"role": "user", "content": "hello there"}]
ROOT = {"x-admin": "root"}
ACME = {"x-admin": "acme"}
ALICE = {"x-user": "alice"}


async def resolve_principal(connection: HTTPConnection) -> Principal | None:
    """The host's own login: `x-user`."""
    user = connection.headers.get("x-user")
    return None if user is None else Principal(user, monthly_cap_usd="5")


async def authorize_admin(connection: HTTPConnection) -> Admin | bool:
    """`x-admin: root` administers everything, `x-admin: acme` the tenant acme."""
    name = connection.headers.get("x-admin")
    return name is not None and Admin(name, tenant=None if name == "root" else name)


class Ear:
    """An observer, and how much there was to hear: a route emits before it answers, and observers are told a little later."""

    def __init__(self) -> None:
        self.emitted = 0
        self._heard: list[AdminActed] = []
        self._news = Condition()

    def listen_to(self, gateway: AIGateway) -> None:
        emit = gateway._composition.observers.emit

        def counted(event: Event) -> None:
            self.emitted += isinstance(event, AdminActed)
            emit(event)

        gateway._composition.observers.emit = counted  # type: ignore[method-assign]  # counts what is on its way

    async def __call__(self, event: Event) -> None:
        if isinstance(event, AdminActed):
            with self._news:
                self._heard.append(event)
                self._news.notify_all()

    def heard(self) -> list[AdminActed]:
        """All that was emitted by now."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._heard) >= self.emitted, timeout=20)
            return [*self._heard]


@dataclass
class Service:
    """A gateway at a real socket; `acted` is what its observer was told of admins."""

    client: httpx.Client
    gateway: AIGateway
    ear: Ear = field(default_factory=Ear)
    key_id: str = "key_none"
    credit_id: str = "crd_none"

    @property
    def acted(self) -> list[AdminActed]:
        return self.ear.heard()

    def call(self, method: str, path: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        return self.client.request(method, path, headers=ROOT if headers is None else headers, **more)

    def key(self, **fields: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """A new key: the headers that come in by it, and what the answer said."""
        answer = self.call("POST", "/keys", json={"name": "app", **fields})
        assert answer.status_code == 201, answer.text
        return {"authorization": f"Bearer {answer.json()['key']}"}, answer.json()

    def complete(self, headers: dict[str, str], model: str = "echo", **more: Any) -> httpx.Response:
        return self.call("POST", "/complete", headers, json={"model": model, "messages": MESSAGES, **more})


def settings(**more: Any) -> dict[str, Any]:
    return {
        "providers": [EchoProvider()],
        "prices": {"echo": Price("1", "2"), "meta/llama": Price.free()},
        "resolve_principal": resolve_principal,
        "authorize_admin": authorize_admin,
        "limits": Limits(hard_cap_usd=1000),
        **more,
    }


@contextmanager
def service(**more: Any) -> Iterator[Service]:
    ear = Ear()
    gateway = AIGateway.in_memory(**settings(observers=[ear], **more))
    ear.listen_to(gateway)
    with serve(gateway) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield Service(client, gateway, ear)


@dataclass
class Example:
    """A request of a route that succeeds, once `furnish` has been called."""

    path: str = ""
    body: Any = None
    query: dict[str, str] = field(default_factory=dict)


def furnish(service: Service) -> dict[str, str]:
    """A key, a tenant, a prompt and a price, and one call on the books. Gives the key's headers."""
    headers, key = service.key(tenant="acme", allowed_models=["echo", "meta/llama"], requests_per_minute=1000, metadata={"team": "a"})
    service.call("PUT", "/tenants/acme", json={"tokens_per_minute": 100_000, "daily_cap_usd": "2.5"}).raise_for_status()
    service.call("POST", "/prompts", json={"name": "greet", "messages": "Greet {{name}}."}).raise_for_status()
    service.call("PUT", "/prices", json={"model": "echo", "provider": "echo", "price": {"input": 1, "output": "2"}}).raise_for_status()
    service.complete(headers).raise_for_status()
    service.key_id = key["id"]
    credit = {"principal": service.key_id, "amount_usd": "5", "expires_at": "2126-01-31T12:00:00Z", "note": "a busy week"}
    service.credit_id = service.call("POST", "/credits", json=credit).raise_for_status().json()["id"]
    return headers


EXAMPLES: dict[tuple[str, str], Example] = {
    ("POST", "/complete"): Example(body={"model": "echo", "messages": MESSAGES}),
    ("POST", "/v1/chat/completions"): Example(body={"model": "echo", "messages": MESSAGES}),
    ("POST", "/quote"): Example(body={"model": "echo", "messages": MESSAGES, "max_completion_tokens": 9, "n": 2, "stream": True}),
    ("GET", "/v1/models"): Example(),
    ("GET", "/v1/models/{id:path}"): Example("/v1/models/meta/llama"),
    ("GET", "/me"): Example(),
    ("GET", "/keys"): Example(query={"tenant": "acme", "limit": "10"}),
    ("POST", "/keys"): Example(body={"name": "new", "monthly_cap_usd": "10", "expires_at": "2126-01-31T12:00:00Z"}),
    ("GET", "/keys/{id}"): Example(),
    ("PATCH", "/keys/{id}"): Example(body={"daily_cap_usd": 3}),
    ("DELETE", "/keys/{id}"): Example(),
    ("POST", "/keys/{id}/rotate"): Example(body={"grace_seconds": 60}),
    ("GET", "/tenants"): Example(),
    ("GET", "/tenants/{id:path}"): Example("/tenants/acme"),
    ("PUT", "/tenants/{id:path}"): Example("/tenants/acme", body={"requests_per_minute": 600}),
    ("PATCH", "/tenants/{id:path}"): Example("/tenants/acme", body={"hard_cap_usd": "100"}),
    ("GET", "/prompts"): Example(),
    ("POST", "/prompts"): Example(body={"name": "sort", "messages": [{"role": "user", "content": "Sort {{items}}."}], "labels": ["beta"]}),
    ("GET", "/prompts/{name}"): Example("/prompts/greet"),
    ("POST", "/prompts/{name}"): Example("/prompts/greet", body={"messages": "Hello {{name}}.", "settings": {"temperature": 0.5}}),
    ("POST", "/prompts/{name}/activate"): Example("/prompts/greet/activate", body={"version": 1}),
    ("POST", "/prompts/{name}/render"): Example("/prompts/greet/render", body={"variables": {"name": "Ada"}}),
    ("GET", "/prices"): Example(),
    ("PUT", "/prices"): Example(body={"model": "other", "price": {"input": "0.15", "output": "0.6", "cache_read": "0.05"}}),
    ("GET", "/credits"): Example(query={"tenant": "acme"}),
    ("POST", "/credits"): Example(body={"tenant": "acme", "amount_usd": "2.5", "expires_at": "2126-01-31T12:00:00Z"}),
    ("GET", "/credits/{id}"): Example(),
    ("DELETE", "/credits/{id}"): Example(),
    ("GET", "/audit"): Example(query={"tenant": "acme", "since": "2020-01-01"}),
    ("GET", "/usage"): Example(query={"group_by": "day,model", "since": "2020-01-01"}),
    ("GET", "/healthz"): Example(),
    ("GET", "/readyz"): Example(),
    ("GET", "/openapi.json"): Example(),
}  # fmt: skip


def path_of(service: Service, route: Route) -> str:
    """The path of the example request of `route`."""
    some_id = service.credit_id if route.path.startswith("/credits") else service.key_id
    return EXAMPLES[route.method, route.path].path or route.path.replace("{id}", some_id)


def send(service: Service, route: Route, headers: dict[str, str]) -> httpx.Response:
    """The example request of `route`, by whoever has `headers`."""
    example = EXAMPLES[route.method, route.path]
    body = {} if example.body is None else {"json": example.body}
    return service.call(route.method, path_of(service, route), headers, params=example.query, **body)
