"""`/usage` and `/me`: who sees what, exact sums, pages, and CSV that no spreadsheet runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from starlette_aigateway import Limits, Principal, Tenant, UsageReport
from starlette_aigateway.accounts import UsageQuery
from starlette_aigateway.http import sheets, usage
from starlette_aigateway.testing.clock import FakeClock

from .http_host import ACME, ALICE, ROOT, Service, service

DAY = 86_400.0
START = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(START)


@pytest.fixture
def host(clock: FakeClock) -> Iterator[Service]:
    with service(clock=clock, default_limits=Limits(tokens_per_minute=10_000)) as host:
        yield host


def report(host: Service, headers: dict[str, str] = ROOT, **query: Any) -> dict[str, Any]:
    answer = host.call("GET", "/usage", headers, params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    whole: dict[str, Any] = answer.json()
    return whole


def refused(host: Service, headers: dict[str, str] = ROOT, **query: Any) -> tuple[int, str | None]:
    answer = host.call("GET", "/usage", headers, params=query)
    return answer.status_code, answer.json()["error"]["param"]


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_a_record_tells_who_what_when_and_at_which_price(host: Service) -> None:
    headers, key = host.key(tenant="acme", name="app")
    host.call("POST", "/prompts", json={"name": "greet", "messages": "Greet."}).raise_for_status()
    answer = host.call("POST", "/complete", headers, json={"model": "echo", "prompt": {"name": "greet"}})
    (record,) = report(host)["data"]
    assert record | {"id": "", "latency_ms": 0} == {
        "id": "", "request_id": answer.headers["request-id"], "attempt": 1, "created_at": "2026-01-31T12:00:00Z",
        "principal": key["id"], "tenant": "acme", "key_id": key["id"], "provider": "echo", "model": "echo", "response_model": "echo",
        "input_tokens": 2, "output_tokens": 0, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0,
        "cache_creation_1h_input_tokens": 0, "reasoning_output_tokens": 0, "cost_usd": "0.000002",
        "price": {
            "input": "1", "output": "2", "cache_read": "1", "cache_write": "1", "cache_write_1h": "1", "reasoning": "2", "request": "0",
            "tiers": [],
        },
        "outcome": "completed", "cached": False, "latency_ms": 0, "prompt": "greet@1", "tags": {}, "would_refuse": None,
    }  # fmt: skip
    assert record["id"].startswith("use_")


def test_a_caller_sees_its_own_and_a_filter_that_names_somebody_else_is_403(host: Service) -> None:
    headers, key = host.key(tenant="acme")
    other, _ = host.key(tenant="acme")
    host.complete(headers)
    host.complete(other, model="meta/llama")
    host.complete(ALICE)
    for asked in ({}, {"principal": key["id"]}, {"key": key["id"]}, {"tenant": "acme"}):
        assert [record["principal"] for record in report(host, headers, **asked)["data"]] == [key["id"]]
    assert [record["principal"] for record in report(host, ALICE)["data"]] == ["alice"]
    for name, value in (("principal", "alice"), ("tenant", "umbrella"), ("key", "key_other")):
        assert refused(host, headers, **{name: value}) == (403, name)
        assert refused(host, headers, **{name: value, "format": "csv"}) == (403, name)
    for name, value in (("principal", key["id"]), ("tenant", "acme"), ("key", key["id"])):
        assert refused(host, ALICE, **{name: value}) == (403, name)
    assert report(host, headers, model="meta/llama")["data"] == []
    assert len(report(host)["data"]) == 3
    assert len(report(host, ACME)["data"]) == 2
    assert report(host, ACME, principal="alice")["data"] == []


def test_totals_and_groups_are_over_everything_that_the_filters_match(host: Service, clock: FakeClock) -> None:
    headers, key = host.key()
    for model in ("echo", "echo", "meta/llama"):
        host.complete(headers, model=model)  # a day later the cache has forgotten
        clock.now += DAY
    whole = report(host, group_by="day,model", limit=1)
    assert whole["totals"] == {"calls": 3, "cached_calls": 0, "input_tokens": 9, "output_tokens": 9, "cost_usd": "0.000018"}
    assert [(group["by"]["day"], group["by"]["model"], group["cost_usd"]) for group in whole["groups"]] == [
        ("2026-01-31", "echo", "0.000009"), ("2026-02-01", "echo", "0.000009"), ("2026-02-02", "meta/llama", "0"),
    ]  # fmt: skip
    assert report(host, group_by="key")["groups"][0]["by"] == {"key": key["id"]}
    assert len(whole["data"]) == 1
    assert whole["has_more"]


def test_a_range_is_half_open_and_a_date_is_its_midnight_in_utc(host: Service, clock: FakeClock) -> None:
    for _ in range(3):
        host.complete(ALICE)
        clock.now += DAY
    assert len(report(host, since="2026-02-01T12:00:00Z")["data"]) == 2
    assert len(report(host, until="2026-02-01T12:00:00Z")["data"]) == 1
    assert len(report(host, since="2026-02-01T14:00:00+02:00", until="2026-02-01T12:00:00.000001Z")["data"]) == 1
    assert len(report(host, since="2026-02-01", until="2026-02-02")["data"]) == 1


def test_pages_hold_every_record_once_newest_first(host: Service, clock: FakeClock) -> None:
    for _ in range(7):
        host.complete(ALICE)
        clock.now += 1
    seen: list[str] = []
    cursor = None
    while True:
        page = report(host, ALICE, limit=3, **({} if cursor is None else {"cursor": cursor}))
        seen += [record["created_at"] for record in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert len(seen) == 7
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"), ("limit", "1001"), ("limit", "-1"), ("limit", "ten"), ("limit", "1e2"), ("limit", "\u0663"), ("limit", "9" * 5000),
        ("cursor", "nonsense"), ("cursor", ""), ("cursor", "\x00"), ("cursor", "AAAA"), ("since", "yesterday"),
        ("since", "2026-01-31T12:00:00"), ("since", "2026-02-30"), ("until", "1769860800"), ("until", ""),
        ("group_by", "hour"), ("group_by", "day,,model"), ("group_by", ""),
        ("group_by", "day;DROP TABLE usage"), ("format", "xml"), ("principal", ""), ("model", "x" * 201), ("tennant", "acme"),
        ("self", "x"),
    ],
)  # fmt: skip
def test_a_malformed_parameter_is_400_and_named(host: Service, name: str, value: str) -> None:
    assert refused(host, ALICE, **{name: value}) == (400, name)


def test_a_parameter_that_is_given_twice_is_400_and_so_is_a_range_that_ends_before_it_begins(host: Service) -> None:
    answer = host.call("GET", "/usage?model=a&model=b", ALICE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert refused(host, ALICE, since="2026-02-01", until="2026-01-01") == (400, "until")


def test_csv_holds_every_record_under_a_header_line_across_pages(host: Service, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(8):
        host.complete(ALICE)
        clock.now += 1
    monkeypatch.setattr(usage, "MAX_PAGE", 3)
    answer = host.call("GET", "/usage", ALICE, params={"format": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage.csv"'
    header, *lines = rows(answer.text)
    assert header == list(report(host)["data"][0])
    assert len({line[0] for line in lines}) == 8
    assert lines[0][header.index("created_at")] == "2026-01-31T12:00:07Z"
    for limit in (1, 3, 4, 6, 7):
        assert len(rows(host.call("GET", "/usage", ALICE, params={"format": "csv", "limit": limit}).text)) == limit + 1
    assert rows(host.call("GET", "/usage", ALICE, params={"format": "csv", "model": "none"}).text) == [header]


def test_csv_of_groups_holds_the_groups(host: Service) -> None:
    host.complete(ALICE)
    answer = host.call("GET", "/usage", ROOT, params={"format": "csv", "group_by": "principal,key"})
    assert rows(answer.text) == [
        ["principal", "key", "calls", "cached_calls", "input_tokens", "output_tokens", "cost_usd"],
        ["alice", "", "1", "0", "3", "3", "0.000009"],
    ]


def test_nothing_that_a_caller_chose_becomes_a_formula(host: Service) -> None:
    formula = '=HYPERLINK("http://evil.example";"click")'
    host.call("PUT", "/prices", json={"model": formula, "price": {"input": 0, "output": 0}}).raise_for_status()
    host.complete({"x-user": "@SUM(1+1)"}, model=formula)
    for group_by in ("", "principal,model"):
        answer = host.call("GET", "/usage", ROOT, params={"format": "csv"} | ({"group_by": group_by} if group_by else {}))
        cells = [cell for row in rows(answer.text)[1:] for cell in row]
        assert f"'{formula}" in cells
        assert "'@SUM(1+1)" in cells
        assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]


def test_records_as_csv_sum_nothing_up_page_by_page(host: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_PAGE", 2)
    asked: list[UsageQuery] = []
    ledger = host.gateway._ledger
    read = ledger.usage

    async def told(query: UsageQuery) -> UsageReport:
        asked.append(query)
        return await read(query)

    monkeypatch.setattr(ledger, "usage", told)
    for _ in range(5):
        host.complete(ALICE)
    assert len(rows(host.call("GET", "/usage", ALICE, params={"format": "csv"}).text)) == 5 + 1
    assert [query.totals for query in asked] == [False] * 3


@given(st.text())
def test_a_cell_is_never_a_formula_and_otherwise_as_it_was(text: str) -> None:
    cell = sheets._cell(text)
    assert cell in (text, f"'{text}")
    assert not (cell or "").lstrip().startswith(sheets.FORMULA)


def test_a_caller_learns_its_limits_windows_and_budgets(host: Service) -> None:
    host.call("PUT", "/tenants/acme", json={"requests_per_minute": 100, "hard_cap_usd": 7}).raise_for_status()
    headers, key = host.key(tenant="acme", requests_per_minute=5, daily_cap_usd="0.5", allowed_models=["echo"])
    host.complete(headers)
    me = host.call("GET", "/me", headers).json()
    assert (me["principal"], me["key_id"], me["tenant"], me["allowed_models"]) == (key["id"], key["id"], "acme", ["echo"])
    assert (me["requests_per_minute"], me["tokens_per_minute"], me["daily_cap_usd"]) == (5, 10_000, "0.5"), "defaults included"
    windows = {(window["scope"], window["window"]): window for window in me["windows"]}
    assert windows.keys() == {("principal", "requests"), ("principal", "tokens"), ("tenant", "requests")}
    assert windows["principal", "requests"] == {
        "scope": "principal", "window": "requests", "limit": 5, "seconds": 60, "remaining": 4, "reset_after_seconds": 60.0,
    }  # fmt: skip
    assert windows["tenant", "requests"]["remaining"] == 99
    assert windows["principal", "tokens"]["remaining"] == 10_000 - 6
    budgets = {(budget["scope"], budget["window"]): budget for budget in me["budgets"]}
    assert budgets["principal", "day"] == {
        "scope": "principal", "window": "day", "period": "2026-01-31",
        "cap_usd": "0.5", "credit_usd": "0", "spent_usd": "0.000009", "held_usd": "0", "remaining_usd": "0.499991",
    }  # fmt: skip
    assert budgets["tenant", "total"]["cap_usd"] == "7"
    assert {scope for scope, _ in budgets} == {"principal", "tenant"}


def test_looking_at_oneself_takes_nothing_from_any_window(host: Service) -> None:
    headers, _ = host.key(requests_per_minute=2)
    for _ in range(5):
        assert host.call("GET", "/me", headers).json()["windows"][0]["remaining"] == 2


def test_a_principal_of_the_hosts_login_has_its_own_caps_and_no_key(host: Service) -> None:
    me = host.call("GET", "/me", ALICE).json()
    assert (me["principal"], me["key_id"], me["tenant"], me["monthly_cap_usd"]) == ("alice", None, None, "5")
    assert host.call("GET", "/me?x=1", ALICE).status_code == 400


def test_a_tenant_that_brings_its_own_limits_shows_them_in_the_budgets_of_its_callers() -> None:
    async def resolve(_: HTTPConnection) -> Principal:
        return Principal("bob", tenant=Tenant("acme", daily_cap_usd=3, requests_per_minute=9))

    with service(resolve_principal=resolve) as host:
        me = host.call("GET", "/me", {}).json()
        assert [window["limit"] for window in me["windows"]] == [9]
        assert [budget["cap_usd"] for budget in me["budgets"] if budget["scope"] == "tenant"] == ["3", None, None]
