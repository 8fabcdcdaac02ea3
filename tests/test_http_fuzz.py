"""Whatever is sent, no route answers with a 500: bodies and query strings that Hypothesis makes up, over a real socket."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starlette_aigateway.http.router import Route
from starlette_aigateway.http.routes import ROUTES
from starlette_aigateway.http.schemas import components

from .http_host import ALICE, EXAMPLES, ROOT, Service, furnish, service


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    with service() as host:
        furnish(host)
        yield host


SCHEMAS = components()
FIELDS = sorted({name for schema in SCHEMAS.values() for name in schema.get("properties", {})} | {"self", "key_id"})
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
    | st.sampled_from(["echo", "1", "0.5", "acme", "greet", "2126-01-01T00:00:00Z",
                       "latest", "{{x}}", "{% for x in y %}", "\x00", "1e99", 2**63, -1])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def bodies(route: Route) -> st.SearchStrategy[dict[str, Any]]:
    """The example of the route with fields left out, changed and added: mostly its own, sometimes any."""
    if route.body is None:
        return st.just({})
    example: dict[str, Any] = EXAMPLES[route.method, route.path].body
    own = st.sampled_from(sorted(SCHEMAS[route.body].get("properties", {})))
    names = st.one_of(own, own, own, st.sampled_from(["self", "key_id", "name", "id"]), st.text(max_size=5))
    kept = st.dictionaries(st.sampled_from(sorted(example)), st.none(), max_size=len(example)) if example else st.just({})
    return st.builds(
        lambda left_out, changes: {name: value for name, value in example.items() if name not in left_out} | changes,
        kept,
        st.dictionaries(names, values, max_size=3),
    )


def queries(route: Route) -> st.SearchStrategy[dict[str, str]]:
    names = st.sampled_from(route.query) if route.query else st.nothing()
    texts = st.text(max_size=12) | st.sampled_from(["1", "day", "csv", "acme", "production", "2026-01-01", "9" * 5000])
    return st.dictionaries(names | st.just("x") if not route.query else names, texts, max_size=2)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.guard != "open"], ids=lambda route: f"{route.method} {route.path}")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_body_and_no_query_is_ever_answered_by_a_500(shared: Service, route: Route, data: st.DataObject) -> None:
    example = EXAMPLES[route.method, route.path].path or route.path.replace("{id}", shared.key_id)
    content = None if route.body is None else msgspec.json.encode(data.draw(bodies(route), "body"))
    query = data.draw(queries(route), "query")
    path = example
    if "{" in route.path and data.draw(st.integers(0, 3), "elsewhere") == 0:
        segment = quote(data.draw(st.text(min_size=1, max_size=8), "segment"), safe="", errors="surrogatepass")
        path = re.sub(r"{\w+(:path)?}", lambda _: segment, route.path)
    headers = (ALICE if route.guard == "caller" else ROOT) | ({} if content is None else {"content-type": "application/json"})
    answer = shared.client.request(route.method, path, headers=headers, params=query, content=content)
    expected = answer.status_code < 500 or answer.json()["error"]["code"] == "price_unknown"
    assert expected, answer.text
    if answer.status_code >= 400:
        assert list(answer.json()["error"]) == ["message", "type", "code", "param", "request_id", "details"]
