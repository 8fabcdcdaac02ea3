"""A key that was looked up before opens without a wait, and by the same rules as at its first call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from starlette_aigateway.testing import FakeClock
from starlette_aigateway.types import rfc3339, utc

from .http_host import Service, service


@pytest.fixture
def host() -> Iterator[Service]:
    with service() as host:
        yield host


def known(host: Service, **fields: Any) -> tuple[dict[str, str], dict[str, Any]]:
    headers, key = host.key(**fields)
    host.complete(headers).raise_for_status()
    return headers, key


def recognised(host: Service, headers: dict[str, str]) -> bool:
    door = host.gateway._composition.door
    return door.recognised({name.encode(): value.encode() for name, value in headers.items()}) is not None


def test_a_key_is_recognised_from_its_second_call_on_in_either_header(host: Service) -> None:
    headers, key = host.key()
    assert not recognised(host, headers)
    host.complete(headers).raise_for_status()
    for sent in (headers, {"x-api-key": key["key"]}):
        assert recognised(host, sent)
        host.complete(sent).raise_for_status()


def test_what_was_changed_holds_at_the_next_call_of_a_key_that_was_recognised(host: Service) -> None:
    headers, key = known(host)
    host.call("PATCH", f"/keys/{key['id']}", json={"allowed_models": []}).raise_for_status()
    assert host.complete(headers).status_code == 403
    host.call("POST", f"/keys/{key['id']}/rotate", json={}).raise_for_status()
    assert host.complete(headers).status_code == 401
    headers, key = known(host)
    host.call("DELETE", f"/keys/{key['id']}").raise_for_status()
    assert host.complete(headers).status_code == 401
    assert not recognised(host, headers)


def test_a_page_of_another_site_that_sends_a_cookie_as_well_is_refused_though_its_key_is_known(host: Service) -> None:
    headers, _ = known(host)
    answer = host.complete(headers | {"cookie": "session=1", "origin": "https://evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")


@pytest.mark.parametrize("made", ["Bearer {}x", "Basic {}", "Bearer", "{}", "Bearer sk-1"])
def test_nothing_but_the_key_itself_is_recognised(host: Service, made: str) -> None:
    _, key = known(host)
    sent = {"authorization": made.format(key["key"])}
    assert not recognised(host, sent)
    assert host.complete(sent).status_code == 401


def test_a_key_that_expires_is_not_recognised_any_more() -> None:
    clock = FakeClock()
    with service(clock=clock) as host:
        headers, _ = known(host, expires_at=rfc3339(utc(clock() + 60)))
        assert recognised(host, headers)
        clock.advance(61)
        assert not recognised(host, headers)
        assert host.complete(headers).status_code == 401
