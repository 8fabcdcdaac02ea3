"""Errors as callers of HTTP see them: the whole tree against the table, the shape, and the headers that say whether to retry."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_aigateway import errors
from starlette_aigateway.errors import AIGatewayError
from starlette_aigateway.http.errors import DAMAGED, STATUS, UNCONFIGURED, error_response, status_of
from starlette_aigateway.types import WindowClaim, WindowState


def tree(root: type[AIGatewayError] = AIGatewayError) -> Iterator[type[AIGatewayError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from tree(kind)


TREE = sorted(set(tree()), key=lambda kind: kind.__name__)
FINAL = {"SpendCapExceeded", "CostUnbounded", "ProviderError", "ProviderTimeout", "ProviderRejected", "NoProviderAvailable"}


def made(kind: type[AIGatewayError], retry_after: float | None = None) -> AIGatewayError:
    if issubclass(kind, errors.RateLimitExceeded):
        return kind("no", retry_after=retry_after, scope="principal", window="requests", limit=3)
    return kind("no", retry_after=retry_after)


def test_every_error_of_the_tree_is_in_the_table_and_the_table_holds_nothing_else() -> None:
    assert set(STATUS) == set(TREE)


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    for kind in TREE:
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_a_type_and_a_code_of_its_own_and_one_shape(kind: type[AIGatewayError]) -> None:
    error = made(kind)
    error.request_id = "req_1"
    answer = error_response(error)
    body = json.loads(bytes(answer.body))
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "code", "param", "request_id", "details"]
    assert answer.status_code == STATUS[kind][0]
    assert 400 <= answer.status_code < 600
    assert (body["error"]["type"], body["error"]["code"], body["error"]["request_id"]) == (STATUS[kind][1], kind.default_code, "req_1")
    assert answer.headers["cache-control"] == "no-store"
    assert ("x-should-retry" in answer.headers) == (kind.__name__ in FINAL)
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
    assert "retry-after" not in answer.headers


def test_a_hosts_own_error_is_rendered_as_its_nearest_ancestor() -> None:
    class Mine(errors.SpendCapHeld):
        pass

    assert status_of(Mine("no")) == STATUS[errors.SpendCapHeld]


@given(st.floats(0, 10**7))
def test_retry_after_is_never_too_early(seconds: float) -> None:
    answer = error_response(made(errors.RateLimitExceeded, seconds))
    assert int(answer.headers["retry-after"]) >= seconds
    assert int(answer.headers["retry-after-ms"]) >= seconds * 1000
    assert int(answer.headers["retry-after"]) <= seconds + 1


def test_a_wait_without_end_is_not_promised() -> None:
    assert "retry-after" not in error_response(made(errors.RateLimitExceeded, float("inf"))).headers


def test_a_wrong_configuration_is_the_hosts_business_and_not_the_callers() -> None:
    error = errors.ConfigurationError("data_dir /srv/secret is not writable", param="data_dir", details={"path": "/srv/secret"})
    body = json.loads(bytes(error_response(error).body))["error"]
    assert (body["message"], body["param"], body["details"]) == (UNCONFIGURED, None, None)


def test_what_the_host_has_to_do_about_a_damaged_file_is_not_told_to_callers() -> None:
    error = errors.StorageDamaged("ledger.db is damaged: stop the service and put a backup back")
    answer = error_response(error)
    body = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, body["code"], body["message"]) == (503, "storage_unavailable", DAMAGED)


def test_a_refusal_by_a_window_tells_the_tightest_one_of_each_kind() -> None:
    states = [
        WindowState(WindowClaim("principal:a", "requests", 10), 4, 12.3456),
        WindowState(WindowClaim("tenant:b", "requests", 100), 0, 60.0),
        WindowState(WindowClaim("principal:a", "tokens", 1000), 10, 0.5),
    ]
    error = errors.RateLimitExceeded("no", retry_after=1.0, scope="tenant", window="requests", limit=100, states=states)
    headers = error_response(error).headers
    assert headers["x-ratelimit-limit-requests"] == "100"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "60s"
    assert headers["x-ratelimit-remaining-tokens"] == "10"
    assert headers["x-ratelimit-reset-tokens"] == "0.5s"
