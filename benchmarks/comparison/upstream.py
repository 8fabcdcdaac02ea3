"""A server that plays OpenAI's Chat Completions, and is never what limits: bytes that are ready, one timer for all streams.

    python -m comparison.upstream --port 9001 --latency 0.05

An answer has 1 kB and tells its usage; `"stream": true` gets 20 deltas, one each millisecond, then usage and `[DONE]`.
`GET` anything answers how many calls there were, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any, cast

from .loops import run

DELTAS = 20
GAP = 0.001
"""Seconds between two events of a stream."""
USAGE = {"prompt_tokens": 210, "completion_tokens": 60, "total_tokens": 270}
SENTENCES = (
    "A sliding window counts what happened in the last minute, whenever you ask. A bucket refills instead, and lets bursts through. " * 4
)


def answer() -> bytes:
    body = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1767225600,
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": SENTENCES}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    return whole(json.dumps(body).encode())


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def event_lines() -> list[bytes]:
    """The stream as server-sent events: the deltas, the usage, the end."""
    choices: list[list[dict[str, Any]]] = [
        [{"index": 0, "delta": {"content": f"word{number:02d} and more "}, "finish_reason": None}] for number in range(DELTAS)
    ]
    choices[0][0]["delta"]["role"] = "assistant"
    choices[-1][0]["finish_reason"] = "stop"
    common = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1767225600, "model": "gpt-4o-mini"}
    chunks = [{**common, "choices": each, "usage": None} for each in choices] + [{**common, "choices": [], "usage": USAGE}]
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks), b"data: [DONE]\n\n"]


def events() -> list[bytes]:
    """The stream as pieces to write: the head with the first event, the end with the usage."""
    pieces = [b"%x\r\n%s\r\n" % (len(line), line) for line in event_lines()]
    pieces[-2:] = [b"".join(pieces[-2:]) + b"0\r\n\r\n"]
    pieces[0] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + pieces[0]
    return pieces


ANSWER = answer()
EVENTS = events()


class Clock:
    """Writes the next event of every stream that is open, each `GAP`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: list[tuple[asyncio.WriteTransport, int]] = []

    def begin(self, transport: asyncio.WriteTransport) -> None:
        if not self._open:
            self._loop.call_later(GAP, self._tick, self._loop.time() + GAP)
        transport.write(EVENTS[0])
        self._open.append((transport, 1))

    def _tick(self, due: float) -> None:
        still = []
        for transport, place in self._open:
            if transport.is_closing():
                continue
            transport.write(EVENTS[place])
            if place + 1 < len(EVENTS):
                still.append((transport, place + 1))
        self._open = still
        if still:
            due = max(due + GAP, self._loop.time())
            self._loop.call_at(due, self._tick, due)


class Connection(asyncio.Protocol):
    """Requests as clients of HTTP send them, one after another: a head, and a body of a length that was told."""

    transport: asyncio.WriteTransport
    calls = 0

    def __init__(self, clock: Clock, latency: float) -> None:
        self._clock = clock
        self._latency = latency
        self._unread = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        head, end, rest = self._unread.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self._unread = rest[length:]
        if head.startswith(b"GET"):
            self.transport.write(whole(b"%d" % Connection.calls))
            return
        Connection.calls += 1
        self._answer(b'"stream": true' in rest or b'"stream":true' in rest)

    def _answer(self, stream: bool) -> None:
        if self._latency:
            asyncio.get_running_loop().call_later(self._latency, self._write, stream)
        else:
            self._write(stream)

    def _write(self, stream: bool) -> None:
        if self.transport.is_closing():
            return
        if stream:
            self._clock.begin(self.transport)
        else:
            self.transport.write(ANSWER)


async def serve(port: int, latency: float) -> None:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    server = await loop.create_server(lambda: Connection(clock, latency), "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before an answer or a stream begins")
    options = parser.parse_args()
    run(serve(options.port, options.latency))


if __name__ == "__main__":
    main()
