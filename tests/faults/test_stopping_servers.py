"""A server that is told to stop (SIGTERM) while callers have left or still read: drains are waited for within their bound, and booked."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from starlette_aigateway import UsageRecord

from ..serving import serve
from .billing_upstream import BillingUpstream, Charge, Wanted, charges
from .disconnect_storm import booked, open_holds
from .storm_gateway import MOUNT, Server, Settings, gateway_process

SERVERS = pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
ENDED = (0, -signal.SIGTERM)


class Stopping:
    """A gateway process over an upstream whose answers wait at their third word."""

    def __init__(self, directory: Path, server: Server, **settings: Any) -> None:
        self.bill = directory / "bill.jsonl"
        self._data_dir = directory / "gateway"
        self._settings = {"server": server, **settings}

    @contextmanager
    def running(self) -> Iterator[Any]:
        with serve(BillingUpstream(self.bill), lifespan="off") as self.upstream:
            settings = Settings(data_dir=str(self._data_dir), upstream=f"{self.upstream}/v1", **self._settings)
            with gateway_process(settings) as (process, self.port):
                yield process
            self.go_on()

    @contextmanager
    def reading(self, *, stream: bool = True) -> Iterator[httpx.Response]:
        """An answer of which the first words have come."""
        wanted = Wanted("ada", 20, 0.01, hold_at=2)
        message = {"role": "user", "content": msgspec.json.encode(wanted).decode()}
        url = f"http://127.0.0.1:{self.port}{MOUNT}/v1/chat/completions"
        body = {"model": "m", "messages": [message], "max_tokens": 100, "stream": stream}
        with httpx.stream("POST", url, json=body, headers={"x-user": "ada"}, timeout=30) as answer:
            assert b"word000" in next(answer.iter_bytes())
            yield answer

    def go_on(self) -> None:
        httpx.post(f"{self.upstream}/release")

    def record(self) -> UsageRecord:
        records, findings = anyio.run(booked, self._data_dir)
        assert findings == []
        assert open_holds(self._data_dir) == 0
        (record,) = records
        return record

    @property
    def charge(self) -> Charge:
        (charge,) = charges(self.bill).values()
        return charge


@SERVERS
def test_a_drain_that_runs_when_the_server_stops_is_waited_for_and_its_bill_is_exact(tmp_path: Path, server: Server) -> None:
    stopping = Stopping(tmp_path, server)
    with stopping.running() as process:
        with stopping.reading():
            pass
        process.send_signal(signal.SIGTERM)
        stopping.go_on()
        assert process.wait(20) in ENDED
    record, charge = stopping.record(), stopping.charge
    assert (record.outcome, charge.ended) == ("completed", "whole")
    assert record.cost == charge.cost


@SERVERS
def test_a_drain_that_never_ends_is_settled_as_an_estimate_at_the_deadline(tmp_path: Path, server: Server) -> None:
    stopping = Stopping(tmp_path, server, drain=1.0)
    with stopping.running() as process:
        with stopping.reading():
            pass
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in ENDED
        assert time.monotonic() - begun < 15
    assert stopping.record().outcome == "estimated"
    assert stopping.record().cost >= stopping.charge.cost


@SERVERS
@pytest.mark.parametrize("owned", [True, False], ids=["owned", "bare"])
def test_a_stream_that_is_still_read_when_the_server_stops_is_booked(tmp_path: Path, server: Server, owned: bool) -> None:
    stopping = Stopping(tmp_path, server, drain=1.0, owned=owned)
    with stopping.running() as process, stopping.reading():
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in ENDED
    assert stopping.record().outcome == "estimated"
    assert stopping.record().cost >= stopping.charge.cost


@SERVERS
def test_on_a_bare_mount_a_drain_that_runs_when_the_server_stops_is_booked(tmp_path: Path, server: Server) -> None:
    stopping = Stopping(tmp_path, server, drain=1.0, owned=False)
    with stopping.running() as process:
        with stopping.reading():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in ENDED
    assert stopping.record().outcome == "estimated"
    assert stopping.record().cost >= stopping.charge.cost
