"""The load loop for machines without wrk: HTTP/1.1 over kept connections, each with one request in the air.

    echo '{"ports": [9001], "path": "/v1/chat/completions", "body": "{}", ...}' | python -m comparison.load

Reads a `Plan` from the standard input and writes a `Load` to the standard output, both as JSON. Ends after `seconds` or `requests`,
whichever comes first, and waits for what is in the air by then, at most `PATIENCE` seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import cast

import msgspec

from .loops import run

NUMBER = "@@@@@NUMBER@@@@@"
"""In a body: replaced in each request by another number of as many digits, so that no two are equal."""
PATIENCE = 10.0


class Plan(msgspec.Struct, frozen=True):
    """What to send, where to, and for how long. The connections are divided evenly among the `ports`."""

    ports: list[int]
    path: str
    headers: dict[str, str]
    body: str
    unique: bool
    connections: int
    seconds: float
    requests: int = 10**7


class Load(msgspec.Struct, frozen=True):
    """What came of it. Latencies in microseconds; `refused` are answers that are no 2xx, `broken` those that never ended."""

    requests: int
    seconds: float
    p50: float
    p95: float
    p99: float
    refused: int
    broken: int
    cpu: float
    """Seconds of CPU of the load generator itself."""


def first_number() -> int:
    """Later than all numbers of earlier runs: there are fewer requests than microseconds."""
    return time.time_ns() // 1000


class Requests:
    """The bytes of one request after another."""

    def __init__(self, plan: Plan) -> None:
        body = plan.body.encode()
        fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body)), **plan.headers}
        head = f"POST {plan.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        self._before, self._mark, self._after = (head.encode() + body).partition(NUMBER.encode())
        self._number = first_number()
        self._unique = plan.unique

    def next(self) -> bytes:
        if not self._mark:
            return self._before
        self._number += self._unique
        return b"%s%016d%s" % (self._before, self._number if self._unique else 0, self._after)


class Tally:
    """How all connections fare, and when they stop."""

    def __init__(self, plan: Plan) -> None:
        self.began = time.perf_counter()
        self.latencies: list[float] = []
        self.refused = 0
        self.broken = 0
        self._deadline = self.began + plan.seconds
        self._left = plan.requests

    def may_begin(self, now: float) -> bool:
        self._left -= 1
        return self._left >= 0 and now < self._deadline

    def load(self, seconds: float, cpu: float) -> Load:
        ordered = sorted(self.latencies) or [0.0]
        p50, p95, p99 = (ordered[int(len(ordered) * share)] * 1e6 for share in (0.5, 0.95, 0.99))
        return Load(len(self.latencies), seconds, p50, p95, p99, self.refused, self.broken, cpu)


class Connection(asyncio.Protocol):
    """Sends a request, reads its answer to the end, sends the next one. `over` is called once, when no other will come."""

    transport: asyncio.WriteTransport

    def __init__(self, requests: Requests, tally: Tally, over: Callable[[], None]) -> None:
        self._requests = requests
        self._tally = tally
        self._over = over
        self._asked = 0.0
        self._waiting = False
        self._answer = b""
        self._length = -1
        """Bytes of the whole answer; -1 while its head is awaited, 0 where it comes in chunks."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)
        self._ask(time.perf_counter())

    def _ask(self, now: float) -> None:
        self._waiting = self._tally.may_begin(now)
        if not self._waiting:
            self.transport.close()
            return
        self._answer, self._length, self._asked = b"", -1, now
        self.transport.write(self._requests.next())

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._length < 0:
            self._read_head()
        if len(self._answer) >= self._length and (self._length > 0 or (self._length == 0 and self._answer.endswith(b"0\r\n\r\n"))):
            now = time.perf_counter()
            self._tally.latencies.append(now - self._asked)
            self._tally.refused += not self._answer.startswith(b"HTTP/1.1 2")
            self._ask(now)

    def _read_head(self) -> None:
        end = self._answer.find(b"\r\n\r\n")
        if end < 0:
            return
        _, told, rest = self._answer[:end].lower().partition(b"content-length:")
        self._length = end + 4 + int(rest.partition(b"\r\n")[0]) if told else 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._tally.broken += self._waiting
        self._over()


async def load(plan: Plan) -> Load:
    loop = asyncio.get_running_loop()
    requests, tally = Requests(plan), Tally(plan)
    over: list[asyncio.Future[None]] = [loop.create_future() for _ in range(plan.connections)]
    cpu = time.process_time()
    for future, port in zip(over, cycle(plan.ports), strict=False):
        await loop.create_connection(partial(Connection, requests, tally, partial(future.set_result, None)), "127.0.0.1", port)
    _, late = await asyncio.wait(over, timeout=plan.seconds + PATIENCE)
    tally.broken += len(late)
    return tally.load(time.perf_counter() - tally.began, time.process_time() - cpu)


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.json.encode(run(load(plan))))


if __name__ == "__main__":
    main()
