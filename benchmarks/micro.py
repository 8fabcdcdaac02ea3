"""What the pure parts of a call cost, one by one, and a batch of the ledger without the disk. Measures the checkout that it lies in.

    python benchmarks/micro.py                           a quarter of an hour; --fast for five minutes
    python benchmarks/micro.py --fast --only wire        those that have this in their name

Two checkouts are compared by their files, on the same machine and with as little else running as there can be:

    python before/benchmarks/micro.py -o before.json
    python after/benchmarks/micro.py -o after.json
    python -m pyperf compare_to before.json after.json --table

All options of pyperf's runner hold: https://pyperf.readthedocs.io/en/latest/runner.html
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import msgspec
from comparison.cases import body
from comparison.upstream import ANSWER, event_lines

from starlette_aigateway.accounts import GATEWAY_SCOPE, Hold, HoldRequest, ScopeClaim, Settlement, principal_scope
from starlette_aigateway.policy import budgets, caching, estimate, keys, metering, pricing, windows
from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger_ops import Reserve, Settle
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA, Prices
from starlette_aigateway.stores.sqlite.ledger_writer import BatchWriter
from starlette_aigateway.stores.windows.book import Book
from starlette_aigateway.stores.windows.claims import acquisition
from starlette_aigateway.stores.windows.states import Windows
from starlette_aigateway.types import Answer, Caps, CompletionRequest, Price, Usage, WindowClaim
from starlette_aigateway.wires import openai_chat, sse

Benchmarks: TypeAlias = dict[str, Callable[[], object]]

NOW = 1_767_225_600.0
BODY = body(stream=False).encode()
COMPLETION = ANSWER.partition(b"\r\n\r\n")[2]
EVENTS = event_lines()
PRICE = Price("0.15", "0.60", cache_read="0.075")
USAGE = Usage(input_tokens=210, output_tokens=60, cache_read_input_tokens=64)
AMPLE = Caps(10**17, 10**17, 10**17)
SCOPES = (ScopeClaim(principal_scope("key_1"), AMPLE, 1000), ScopeClaim(GATEWAY_SCOPE))
PAIRS = (1, 32)


def request() -> CompletionRequest:
    return openai_chat.decode_request(msgspec.json.decode(BODY)).request


def hold_request(name: str, now: float = NOW) -> HoldRequest:
    return HoldRequest(
        id=f"use_{name}",
        request_id=f"req_{name}",
        attempt=1,
        scopes=SCOPES,
        principal="key_1",
        tenant=None,
        key_id="key_1",
        provider="openai",
        model="gpt-4o-mini",
        price=PRICE,
        minimum=100_000,
        wanted=200_000,
        admission=150_000,
        expires_at=now + 60,
    )


def wire() -> Benchmarks:
    decoded, whole = msgspec.json.decode(BODY), request()
    completion = openai_chat.decode_completion(COMPLETION)
    fields = {name: getattr(completion, name) for name in completion.__struct_fields__}
    answer = Answer(**fields, provider="openai", cost_usd=Decimal("0.00006"), cached=False, request_id="req_1")
    built = msgspec.structs.replace(answer, native=None)
    return {
        "wire: JSON of a request": lambda: msgspec.json.decode(BODY),
        "wire: decode_request": lambda: openai_chat.decode_request(decoded),
        "wire: validate": lambda: openai_chat.validate(whole),
        "wire: encode_request": lambda: openai_chat.encode_request(whole, stream=False),
        "wire: decode_completion": lambda: openai_chat.decode_completion(COMPLETION),
        "wire: encode_completion, passed on": lambda: openai_chat.encode_completion(answer, created=0),
        "wire: encode_completion, built": lambda: openai_chat.encode_completion(built, created=0),
    }


def streams() -> Benchmarks:
    one, burst, last = EVENTS[1], b"".join(EVENTS[1:11]), b"".join(EVENTS[-3:])
    head, tail = one[:40], one[40:]
    blocks, split = sse.BlockReader(), sse.BlockReader()
    plain, many = openai_chat.EventReader(), openai_chat.EventReader()
    items = list(openai_chat.EventReader().feed(one))

    def whole_stream() -> list[Any]:
        reader = openai_chat.EventReader()
        return [item for event in EVENTS for item in reader.feed(event)]

    return {
        "stream: cut one event out": lambda: blocks.feed(one),
        "stream: cut one event out of two reads": lambda: split.feed(head) + split.feed(tail),
        "stream: read one event": lambda: list(plain.feed(one)),
        "stream: read ten events at once": lambda: list(many.feed(burst)),
        "stream: read finish, usage and end": lambda: list(openai_chat.EventReader().feed(last)),
        "stream: read 20 chunks one by one": whole_stream,
        "stream: encode one event": lambda: list(
            openai_chat.encode_items(items, id="chatcmpl-1", model="gpt-4o-mini", created=0, include_usage=True)
        ),
    }


def policy() -> Benchmarks:
    whole, hold = request(), Hold(id="use_1", amount=200_000, made_at=NOW, expires_at=NOW + 60)
    asked, now = hold_request("1"), windows.microseconds(NOW)
    books, periods = budgets.Books(), budgets.periods_of(budgets.day_number(NOW))
    books.balances = {(claim.scope, period): budgets.Balance() for claim in SCOPES for period in periods}
    claim = WindowClaim(principal_scope("key_1"), "tokens", 10**9, 500)
    counted, both = Windows(), acquisition([WindowClaim(claim.scope, kind, 10**12, 500) for kind in ("requests", "tokens")])

    def two_windows() -> object:
        return both.apply(Book(counted, now))

    def metered() -> Settlement:
        return metering.completed(hold, PRICE, USAGE, bounded=True, reported=True, model="gpt-4o-mini", latency_ms=800)

    return {
        "policy: cache_key": lambda: caching.cache_key(whole, stream=False, plan="openai:gpt-4o-mini", scope="principal:key_1"),
        "policy: input_bound": lambda: estimate.input_bound(whole),
        "policy: tokens_for_window": lambda: estimate.tokens_for_window(whole, 256),
        "policy: ask": lambda: estimate.ask(whole, 1400, price=PRICE),
        "policy: unbounded_parameters": lambda: list(openai_chat.unbounded_parameters(whole)),
        "policy: cost": lambda: pricing.cost(USAGE, PRICE),
        "windows of requests and tokens": two_windows,
        "policy: which window a claim names": lambda: windows.window_of(claim.scope, claim.kind, claim.seconds),
        "policy: grant in two scopes": lambda: budgets.grant(asked, books, periods, NOW),
        "policy: metering of an answer": metered,
    }


def credentials() -> Benchmarks:
    def random(length: int) -> bytes:
        return bytes(range(length))

    raw = keys.mint(random)
    return {
        "keys: well_formed": lambda: keys.well_formed(raw),
        "keys: digest": lambda: keys.digest(raw),
        "keys: mint_id": lambda: keys.mint_id("use_", NOW, random),
    }


class Batches:
    """Holds and settlements in batches of `pairs`, in a database of its own that no disk is waited for."""

    def __init__(self, pairs: int) -> None:
        self._numbers = itertools.count()
        self._pairs = pairs
        self._prices = Prices()
        self._writer = BatchWriter(self._prices, budgets.THRESHOLDS)
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self) -> int:
        """As many pairs as it says, in two transactions."""
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="aigateway-micro-")
            self._connection = connect(Path(self._directory.name) / "ledger.db", durability="OFF", schema=SCHEMA)
        now = time.time()
        asked = [hold_request(f"{next(self._numbers):09d}", now) for _ in range(self._pairs)]
        end = Settlement(outcome="completed", amount=105_000, usage=USAGE, latency_ms=800)
        self._commit([Reserve(one, self._prices.dump(one.price), now) for one in asked])
        self._commit([Settle(one.id, end, now) for one in asked])
        return self._pairs

    def _commit(self, ops: list[Any]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        for outcome in self._writer.apply(self._connection, ops):
            if isinstance(outcome, Exception):
                raise outcome
        self._connection.execute("COMMIT")
        self._writer.committed()


def ledger() -> Benchmarks:
    return {f"ledger: hold and settle, {pairs} in a batch": Batches(pairs) for pairs in PAIRS}


def benchmarks() -> Benchmarks:
    return wire() | streams() | policy() | credentials() | ledger()


def main() -> None:
    import pyperf  # for developers only

    def hand_on(command: list[str], options: argparse.Namespace) -> None:
        command += ["--only", options.only]

    runner = pyperf.Runner(add_cmdline_args=hand_on, program_args=(__file__,))
    runner.argparser.description = (__doc__ or "").partition("\n")[0]
    runner.argparser.add_argument("--only", default="", metavar="TEXT", help="measure only what has this in its name")
    only = runner.parse_args().only
    for name, function in benchmarks().items():
        if only in name:
            runner.bench_func(name, function)


if __name__ == "__main__":
    main()
