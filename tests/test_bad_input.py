"""What a host gets wrong is told when it is written, or at the start, by the name of the argument."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import (
    AIGateway,
    AIGatewayMiddleware,
    CachePolicy,
    CompletionRequest,
    ConfigurationError,
    InvalidRequest,
    Limits,
    Price,
    Principal,
    Retention,
    RetryPolicy,
    Tenant,
    Timeouts,
)
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.settings import SettingFields
from starlette_aigateway.stores.sqlite import config, connection
from starlette_aigateway.testing import ScriptedProvider

pytestmark = pytest.mark.anyio
REFUSED = (ConfigurationError, InvalidRequest)


def nothing(*_: Any) -> None: ...


class Lacking:
    """A store that has one verb of many."""

    async def get(self, key: str) -> None: ...


WRONG: dict[str, list[Any]] = {
    "providers": [EchoProvider(), "echo", 5, {"echo": EchoProvider()}, [EchoProvider(), EchoProvider()]],
    "data_dir": [5, "", b"/tmp", True],
    "prices": [5, {"m": 5}, {5: Price(1, 1)}, [Price(1, 1)], {("a", "b", "c"): Price(1, 1)}, {"": Price(1, 1)}],
    "resolve_principal": [5, nothing],
    "authorize_admin": [True, nothing],
    "trusted_origins": ["https://a.example", ["a.example"]],
    "limits": [5, {"daily_cap_usd": 1}, Limits],
    "default_limits": [5, {}],
    "cache": [3600, True, CachePolicy],
    "timeouts": [5, {"connect": 1}],
    "observers": [5, nothing, [5], [nothing]],
    "keys": [5, Lacking(), Lacking],
    "tenants": [5, Lacking()],
    "price_store": [5, Lacking()],
    "prompts": [5, Lacking()],
    "ledger": ["sqlite://", Lacking()],
    "responses": [5, Lacking()],
    "windows": [5, "memory://", Lacking()],
    "idempotency": [True, Lacking()],
    "audit_store": [True, Lacking()],
    "idempotency_policy": [86_400, {}],
    "retention": [90, timedelta(days=90), Retention],
    "retries": [3, True],
    "public_prices": ["yes", 1, None],
    "default_max_tokens": [0, "5", True, 1.5],
    "min_output_tokens": [0, "5", None],
    "allow_unbounded": ["web_search_options", 5, [5]],
    "image_tokens": [765, {}],
    "limiter_fail_open": ["no", 1],
    "enforce": ["no", 0, None],
    "budget_thresholds": [80, ["80"], [-1], "80", [0.5]],
    "max_body_bytes": [0, -1, "10 MB", True, None],
    "on_disconnect": ["stop", True, None],
    "max_drain_bytes": [0, "x", None],
    "max_drains": [0, True],
    "name": [5, "", " padded", None],
    "clock": [5, None],
    "random": [b"x", None],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


def test_every_argument_of_the_gateway_is_tried_with_something_wrong() -> None:
    assert WRONG.keys() == SettingFields.__annotations__.keys()


def without_addresses(value: Any) -> str:
    """The same in every process that collects these tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}-{without_addresses(value):.30}" for name, value in CASES])
def test_a_wrong_argument_is_refused_at_construction_by_its_name(name: str, value: Any) -> None:
    make = AIGateway if name == "data_dir" else AIGateway.in_memory
    with pytest.raises(REFUSED) as caught:
        make(**{name: value})
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("make", "named", "hint"),
    [
        (lambda: AIGateway(data_dirr="x"), "data_dirr", "did you mean 'data_dir'?"),  # type: ignore[call-arg]
        (lambda: AIGateway.in_memory(authorise_admin=nothing), "authorise_admin", "did you mean 'authorize_admin'?"),  # type: ignore[call-arg]
        (lambda: AIGateway.in_memory(zzz=1), "zzz", "there are allow_unbounded"),  # type: ignore[call-arg]
        (lambda: Limits(dayly_cap_usd=1), "dayly_cap_usd", "did you mean 'daily_cap_usd'?"),  # type: ignore[call-arg]
        (lambda: Principal("ada", monthly_cap=1), "monthly_cap", "did you mean 'monthly_cap_usd'?"),  # type: ignore[call-arg]
        (lambda: Tenant("acme", request_per_minute=1), "request_per_minute", "did you mean 'requests_per_minute'?"),  # type: ignore[call-arg]
        (lambda: Tenant("acme", color="red"), "color", "the limits are daily_cap_usd"),  # type: ignore[call-arg]
    ],
)
def test_an_argument_that_there_is_not_is_told_with_the_one_that_was_meant(make: Callable[[], Any], named: str, hint: str) -> None:
    with pytest.raises(REFUSED) as caught:
        make()
    assert caught.value.param == named
    assert hint in caught.value.message


async def test_a_field_of_a_key_that_there_is_not_is_told_with_the_one_that_was_meant() -> None:
    async with AIGateway.in_memory() as gateway:
        _, key = await gateway.create_key("app")
        with pytest.raises(InvalidRequest, match="did you mean 'allowed_models'"):
            await gateway.update_key(key.id, allowed_model=["m"])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        *[
            (lambda name=name, value=value: Timeouts(**{name: value}), name)
            for name in Timeouts.__struct_fields__ for value in (0, -1, "5", True)
        ],
        (lambda: Timeouts(call=float("inf")), "call"),
        (lambda: Timeouts(call=float("nan")), "call"),
        (lambda: RetryPolicy(rounds=0), "rounds"),
        (lambda: RetryPolicy(rounds=True), "rounds"),
        (lambda: RetryPolicy(backoff=-1), "backoff"),
        (lambda: RetryPolicy(backoff="1"), "backoff"),  # type: ignore[arg-type]
        (lambda: Price(-1, 1), "input"),
        (lambda: Price(1, "-0.000001"), "output"),
        (lambda: Price(1, 1, cache_read=-1), "cache_read"),
        (lambda: Price(1, 1, request="-1"), "request"),
        (lambda: Price(0.1, 1), "input"),  # type: ignore[arg-type]
        (lambda: AIGatewayMiddleware(5, AIGateway.in_memory()), "app"),  # type: ignore[arg-type]
        (lambda: AIGatewayMiddleware(nothing, "gateway"), "gateway"),  # type: ignore[arg-type]
        (lambda: AIGatewayMiddleware(nothing, AIGateway.in_memory(), path=5), "path"),  # type: ignore[arg-type]
        (lambda: AIGatewayMiddleware(nothing, AIGateway.in_memory(), path="api"), "path"),  # type: ignore[arg-type]
        (lambda: AIGatewayMiddleware(nothing, AIGateway.in_memory(), state_name="a b"), "state_name"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_where_they_are_made(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(REFUSED) as caught:
        make()
    assert caught.value.param == named


# -- data_dir ------------------------------------------------------------------------------------------------------------


async def start(path: Path, **settings: Any) -> None:
    async with AIGateway(data_dir=path, providers=[EchoProvider()], prices={"echo": Price(1, 1)}, **settings):
        pass


async def refused(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        await start(path)
    assert caught.value.param == "data_dir"
    assert "data_dir" in caught.value.message
    return caught.value.message


async def test_a_data_dir_that_is_a_file_or_lies_below_one_fails_the_start(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    await refused(file)
    assert "cannot be created" in await refused(file / "below")


async def test_a_data_dir_that_cannot_be_written_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == tmp_path and mode & os.W_OK))
    assert "write" in await refused(tmp_path)


async def test_a_data_dir_of_another_user_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "another user" in await refused(tmp_path)


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
async def test_a_data_dir_on_a_network_file_system_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mounts = f"/dev/root / ext4 rw 0 0\nserver:/export {tmp_path} {kind} rw 0 0\n"
    read = Path.read_text

    def told(path: Path, *arguments: Any, **more: Any) -> str:
        return mounts if str(path) == "/proc/self/mounts" else read(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", told)
    assert kind in await refused(tmp_path / "below")


async def test_a_mount_point_with_a_blank_in_its_name_is_known_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"/dev/root / ext4 rw 0 0\ns:/e {tmp_path}/my\\040disk nfs rw 0 0\nodd\n")
    assert connection.file_system(tmp_path / "my disk" / "x") == "nfs"
    assert connection.file_system(tmp_path) == "ext4"


DATABASES = ("ledger.db", "config.db", "answers.db")


async def use(path: Path) -> None:
    """A call that touches all files."""
    async with AIGateway(data_dir=path, providers=[EchoProvider()], prices={"echo": Price(1, 1)}) as gateway:
        raw, _ = await gateway.create_key("app", requests_per_minute=10)
        request = CompletionRequest(model="echo", messages=[{"role": "user", "content": "hi"}])
        await gateway.complete(raw, request, idempotency_key="k")


def pragma(path: Path, statement: str) -> int:
    with closing(sqlite3.connect(path)) as database:
        row = database.execute(statement).fetchone()
        return -1 if row is None else int(row[0])


@pytest.mark.parametrize("file", DATABASES)
async def test_a_file_of_a_newer_release_fails_the_start_and_says_what_to_do_and_is_left_alone(tmp_path: Path, file: str) -> None:
    await use(tmp_path)
    pragma(tmp_path / file, "PRAGMA user_version=99")
    message = await refused(tmp_path)
    assert file in message
    assert "Upgrade the package" in message
    assert pragma(tmp_path / file, "PRAGMA user_version") == 99


async def test_a_file_of_an_older_release_is_brought_up_to_date_and_keeps_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(connection.connect(tmp_path / "config.db", durability="OFF", schema=config.SCHEMA[:1])) as old:
        old.execute("INSERT INTO tenants (id, limits) VALUES ('acme', '{}')")
    assert pragma(tmp_path / "config.db", "PRAGMA user_version") == 1
    async with AIGateway(data_dir=tmp_path) as gateway:
        assert [tenant.id for tenant in await gateway.list_tenants()] == ["acme"]
        await gateway.create_key("app", actor="ada")
        assert [one.actor for one in await gateway.audit()] == ["ada"]
    assert pragma(tmp_path / "config.db", "PRAGMA user_version") == len(config.SCHEMA)


async def test_a_rolling_deploy_with_other_settings_on_the_same_directory_works_and_the_money_adds_up(tmp_path: Path) -> None:
    """The workers of the old release and of the new one, at once, over keys, windows, caps, prices and the ledger."""
    request = CompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}])
    old = AIGateway(
        data_dir=tmp_path, providers=[ScriptedProvider(*["old"] * 50)], prices={"m": Price(1, 1)}, limits=Limits(hard_cap_usd=100),
        cache=CachePolicy(enabled=False, size_limit_bytes=2**26), timeouts=Timeouts(storage=20), name="old",
    )  # fmt: skip
    new = AIGateway(
        data_dir=tmp_path, providers=[ScriptedProvider(*["new"] * 50), EchoProvider()], prices={"m": Price(2, 3), "echo": Price(1, 1)},
        limits=Limits(hard_cap_usd=200, requests_per_minute=10_000), default_limits=Limits(max_parallel_requests=100),
        cache=CachePolicy(enabled=False, scope="principal", size_limit_bytes=2**25), timeouts=Timeouts(storage=20, call=30),
        retries=RetryPolicy(rounds=1), budget_thresholds=(50,), default_max_tokens=77, min_output_tokens=10, name="new",
    )  # fmt: skip
    async with old, new:
        raw, key = await old.create_key("app", hard_cap_usd="5", requests_per_minute=1000)

        async def calls(gateway: AIGateway, text: str) -> None:
            for number in range(20):
                answer = await gateway.complete(raw, request, idempotency_key=f"{text}-{number}")
                assert answer.message["content"] == text

        async with anyio.create_task_group() as group:
            for gateway, text in ((old, "old"), (new, "new")):
                group.start_soon(calls, gateway, text)
        await new.update_key(key.id, hard_cap_usd="7", actor="deploy")
        assert (await old.get_key(key.id)).hard_cap_usd == 7
        assert (await old.usage(principal=key.id)).totals.calls == (await new.usage(principal=key.id)).totals.calls
        assert [one.actor for one in await old.audit(action="key.update")] == ["deploy"]
        assert list(await old.check_ledger()) == list(await new.check_ledger()) == []
