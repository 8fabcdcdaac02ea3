"""An OpenAI-compatible upstream over HTTP that keeps a bill of its own: an append-only file of what it would charge.

A line is written when a call is in (`begun`: the input is charged) and when it is over (`whole`, or `cut` where whoever asked was gone:
the output that was sent until then is charged). What a call asks for stands in its one message, as JSON: see `Wanted`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
from msgspec import Struct

INPUT_TOKENS = 20
INPUT_PRICE, OUTPUT_PRICE = 1_000_000, 2_000_000
"""Nano-USD for one token: `Price("1000", "2000")`."""


class Wanted(Struct, frozen=True):
    """What the upstream is to do for the call `name`: so many `words`, a token each, with `pause` seconds before each of them. From word
    `hold_at` on it waits until the driver lets it go."""

    name: str
    words: int
    pause: float
    hold_at: int | None = None


class Charge(Struct, frozen=True):
    """What a call was charged, from the bill. `ended` of None: it was still running."""

    input: int
    output: int
    ended: str | None

    @property
    def cost(self) -> int:
        return self.input * INPUT_PRICE + self.output * OUTPUT_PRICE


class BillingUpstream:
    """The ASGI app. `go` is asked for in the upstream's own event loop by whoever lets calls go on."""

    def __init__(self, bill: Path) -> None:
        self._bill = bill
        self._going = False
        self._waiting: list[anyio.Event] = []

    def release(self) -> None:
        """Lets calls that wait at their word go on; to be called in the upstream's event loop."""
        self._going = True
        for event in self._waiting:
            event.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"].endswith("/release"):
            self.release()
            await _answer(send, b"{}")
            return
        body = json.loads(await _body(receive))
        wanted = msgspec.json.decode(body["messages"][-1]["content"], type=Wanted)
        self._write(name=wanted.name, event="begun")
        if not body.get("stream"):
            await self._whole(wanted, send)
            return
        sent: list[str] = []
        ended = "cut"
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_when_left, receive, group.cancel_scope)
                await self._stream(wanted, send, sent)
                ended = "whole"
                group.cancel_scope.cancel()
        finally:
            self._write(name=wanted.name, event=ended, output=len(sent))

    async def _whole(self, wanted: Wanted, send: Any) -> None:
        """Charged in full once it is begun, whoever is there to hear it."""
        text = "".join(_words(wanted))
        self._write(name=wanted.name, event="whole", output=wanted.words)
        await anyio.sleep(wanted.pause * wanted.words)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer = {"id": wanted.name, "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": _usage(wanted)}
        await _answer(send, json.dumps(answer).encode())

    async def _stream(self, wanted: Wanted, send: Any, sent: list[str]) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, word in enumerate(_words(wanted)):
            if number == wanted.hold_at and not self._going:
                self._waiting.append(anyio.Event())
                await self._waiting[-1].wait()
            await anyio.sleep(wanted.pause)
            sent.append(word)
            await _event(send, {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        await _event(send, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await _event(send, {"choices": [], "usage": _usage(wanted)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _write(self, **line: Any) -> None:
        with self._bill.open("a") as bill:
            bill.write(json.dumps(line) + "\n")


def charges(bill: Path) -> dict[str, Charge]:
    """What the upstream charges for each call, by name."""
    charged: dict[str, Charge] = {}
    for line in bill.read_text().splitlines():
        entry = json.loads(line)
        begun = entry["event"] == "begun"
        assert begun == (entry["name"] not in charged), "each call is begun once"
        charged[entry["name"]] = Charge(INPUT_TOKENS, entry.get("output", 0), None if begun else entry["event"])
    return charged


def _words(wanted: Wanted) -> Iterator[str]:
    return (f"word{number:03d} " for number in range(wanted.words))


def _usage(wanted: Wanted) -> dict[str, int]:
    return {"prompt_tokens": INPUT_TOKENS, "completion_tokens": wanted.words, "total_tokens": INPUT_TOKENS + wanted.words}


async def _body(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _cancel_when_left(receive: Any, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _event(send: Any, value: dict[str, Any]) -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **value}
    await send({"type": "http.response.body", "body": b"data: " + json.dumps(chunk).encode() + b"\n\n", "more_body": True})


async def _answer(send: Any, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
