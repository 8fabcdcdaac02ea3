"""`/openapi.json` is true: the answers of real calls fit what it says, and it says nothing of what is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from starlette_aigateway import AIGateway
from starlette_aigateway.http import openapi
from starlette_aigateway.http.router import Route
from starlette_aigateway.http.routes import ROUTES

from .http_host import ALICE, EXAMPLES, MESSAGES, ROOT, Service, furnish, path_of, send, service, settings
from .serving import serve

PACKAGE = Path(openapi.__file__).parents[1]
SERVERS_OWN = {"date", "server", "content-type", "content-length", "transfer-encoding", "connection"}
WRONG = {"authorization": "Bearer aigw_wrong"}

Document = dict[str, Any]


@pytest.fixture(scope="module")
def host() -> Iterator[Service]:
    with service() as host:
        yield host


@pytest.fixture(scope="module")
def document(host: Service) -> Document:
    whole: Document = host.call("GET", "/openapi.json", {}).json()
    return whole


def resolved(document: Document, node: Any) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        reference = node["$ref"]
        node = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    return node


def validator(document: Document, schema: Any) -> Any:
    """Of a schema in `document`, whose references point into the components."""
    return jsonschema_rs.Draft202012Validator({"$ref": "#/wanted", "wanted": schema, "components": document["components"]})


def check(document: Document, route: Route, answer: httpx.Response) -> None:
    """Raises AssertionError where an answer is not as the document says: its status, headers, media type or body."""
    operation = document["paths"][openapi.public_path(route)][route.method.lower()]
    responses = operation["responses"]
    assert str(answer.status_code) in responses, f"{route.method} {route.path} answered {answer.status_code}, which is not documented"
    response = resolved(document, responses[str(answer.status_code)])
    undocumented = set(answer.headers) - SERVERS_OWN - set(response["headers"])
    assert not undocumented, (route.path, answer.status_code, undocumented)
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in response["content"], (route.path, media_type)
    if media_type == "application/json":
        errors = list(validator(document, response["content"][media_type]["schema"]).iter_errors(answer.json()))
        assert not errors, (route.path, [str(error) for error in errors])
    if answer.status_code >= 400:
        assert f"`{answer.json()['error']['code']}`" in response["description"]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_real_answer_of_every_route_fits_the_document(host: Service, document: Document, route: Route) -> None:
    key = furnish(host)
    answer = send(host, route, key if route.guard == "caller" else ROOT)
    assert answer.status_code == route.status, answer.text
    check(document, route, answer)
    if route.body is not None:
        schema = document["paths"][openapi.public_path(route)][route.method.lower()]["requestBody"]["content"]["application/json"]["schema"]
        assert validator(document, schema).is_valid(EXAMPLES[route.method, route.path].body)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_real_refusals_of_every_route_fit_the_document(host: Service, document: Document, route: Route) -> None:
    key = furnish(host)
    who = key if route.guard == "caller" else ROOT
    path = path_of(host, route)
    if route.guard == "admin":
        check(document, route, send(host, route, {}))
    elif route.guard != "open":
        check(document, route, send(host, route, WRONG))
    if route.body is not None:
        for body in ({"content": b"{", "headers": who | {"content-type": "application/json"}}, {"data": {"a": "b"}, "headers": who}):
            check(document, route, host.client.request(route.method, path, **body))
        check(document, route, host.call(route.method, path, who, json={"surely not a field": 1, "model": 3}))
    for name in route.query:
        check(document, route, host.call(route.method, path, who, params={name: "\x00"}, json=EXAMPLES[route.method, route.path].body))
    if "{" in route.path:
        nowhere = re.sub(r"{\w+(:path)?}", "nowhere", route.path)
        check(document, route, host.call(route.method, nowhere, who, json=EXAMPLES[route.method, route.path].body))


def test_streams_csv_and_the_refusals_of_calls_fit_the_document(host: Service, document: Document) -> None:
    key, _ = host.key(hard_cap_usd="0.0000001", requests_per_minute=6)
    by_path = {(route.method, route.path): route for route in ROUTES}
    complete, usage = by_path["POST", "/complete"], by_path["GET", "/usage"]
    stream = host.complete(ALICE, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    check(document, complete, stream)
    check(document, usage, host.call("GET", "/usage", ALICE, params={"format": "csv"}))
    statuses = [host.complete(key).status_code for _ in range(2)]
    refused = host.complete(key)
    assert (*statuses, refused.status_code) == (402, 402, 402)
    check(document, complete, refused)
    narrow, _ = host.key(allowed_models=["other"], requests_per_minute=1)
    check(document, complete, host.complete(narrow))
    full, _ = host.key(requests_per_minute=1)
    first, last = host.complete(full), host.complete(full)
    assert (first.status_code, last.status_code) == (200, 429)
    check(document, complete, last)
    check(document, complete, host.call("POST", "/complete", ALICE, json={"model": "echo", "messages": MESSAGES, "n": 2}))
    check(document, complete, host.call("POST", "/complete", ALICE, json={"prompt": {"name": "nowhere"}}))


def test_every_reference_points_at_something_and_every_schema_is_one(document: Document) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    seen = set(references(document))
    for reference in seen:
        assert resolved(document, {"$ref": reference}) is not None
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        assert f"#/components/schemas/{name}" in seen, f"{name} describes nothing"


def test_the_document_names_every_route_with_guard_parameters_and_a_unique_id(document: Document) -> None:
    operations = {(method.upper(), path): operation for path, methods in document["paths"].items() for method, operation in methods.items()}
    assert operations.keys() == {(route.method, openapi.public_path(route)) for route in ROUTES}
    assert len({operation["operationId"] for operation in operations.values()}) == len(ROUTES)
    for route in ROUTES:
        operation = operations[route.method, openapi.public_path(route)]
        schemes = {name for requirement in operation["security"] for name in requirement}
        assert schemes <= set(document["components"]["securitySchemes"])
        assert ("bearer" in schemes) == (route.guard in ("caller", "caller_or_admin"))
        assert bool(schemes) == (route.guard != "open")
        in_path = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", openapi.public_path(route)))


def test_every_code_that_the_package_raises_is_named(document: Document) -> None:
    described = " ".join(response["description"] for response in document["components"]["responses"].values())
    codes = {code for path in PACKAGE.rglob("*.py") for code in re.findall(r'(?:code|CODE)\s?=\s?"([a-z_]+)"', path.read_text())}
    assert {"invalid_api_key", "key_not_found"} <= codes
    assert {code for code in codes if f"`{code}`" not in described} == {"method_not_allowed"}


def test_the_document_says_where_it_is_mounted_and_leaves_out_admin_routes_that_do_not_exist() -> None:
    gateway = AIGateway.in_memory(**settings(authorize_admin=None))
    host = Starlette(routes=[Mount("/api/ai-gateway", gateway)], lifespan=gateway.lifespan)
    with serve(host) as url, httpx.Client() as client:
        document = client.get(f"{url}/api/ai-gateway/openapi.json").json()
    assert document["servers"] == [{"url": "/api/ai-gateway"}]
    assert "/keys" not in document["paths"]
    assert "/usage" in document["paths"]
