"""The headers of a request, whatever a server hands them over as, and those of an answer."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from starlette_aigateway.http.connection import Connection, first_of, first_values
from starlette_aigateway.http.credentials import credential
from starlette_aigateway.http.errors import window_headers
from starlette_aigateway.http.replies import Reply, as_text
from starlette_aigateway.types import WindowClaim, WindowState

PAIRS = [(b"x-api-key", b"first"), (b"x-api-key", b"second"), (b"accept", b"*/*")]


def scope(headers: Iterable[Any]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers}


def ours(scope: dict[str, Any]) -> HTTPConnection:
    return Connection(scope, first_of(scope))


@pytest.mark.parametrize(
    "given", [list, tuple, iter, lambda pairs: [[*pair] for pair in pairs]], ids=["list", "tuple", "iterator", "lists"]
)
@pytest.mark.parametrize("kind", [ours, HTTPConnection])
def test_of_a_header_that_came_twice_the_first_value_counts(
    given: Callable[[list[Any]], Iterable[Any]], kind: Callable[[dict[str, Any]], HTTPConnection]
) -> None:
    connection = kind(scope(given(PAIRS)))
    assert first_values(connection) == {b"x-api-key": b"first", b"accept": b"*/*"}
    assert credential(connection) == "first"
    assert connection.headers.getlist("x-api-key") == ["first", "second"]


def state(kind: Any, limit: int, remaining: int, reset_after: float) -> WindowState:
    return WindowState(WindowClaim("gateway", kind, limit), remaining, reset_after)


def test_the_tightest_window_of_each_kind_is_told_and_of_equals_the_first() -> None:
    windows = [
        state("requests", 10, 5, 1.0), state("tokens", 900, 100, 2.0), state("requests", 20, 4, 1.2341), state("requests", 30, 4, 9.0),
    ]  # fmt: skip
    assert as_text(window_headers(windows)) == {
        "x-ratelimit-limit-requests": "20",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "1.235s",
        "x-ratelimit-limit-tokens": "900",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "2s",
    }
    assert window_headers([]) == []


def test_a_reply_has_its_type_and_length_and_can_be_given_more() -> None:
    own = [(b"x-cache", b"hit")]
    reply = Reply(b'{"a":1}', own, 201)
    reply.headers["request-id"] = "req_1"
    assert (reply.status_code, reply.body) == (201, b'{"a":1}')
    assert dict(reply.headers) == {"x-cache": "hit", "content-length": "7", "content-type": "application/json", "request-id": "req_1"}
    assert own == [(b"x-cache", b"hit")]
