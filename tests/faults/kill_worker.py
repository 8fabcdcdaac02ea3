"""One worker of the kill loop: a real server over a shared `data_dir`, and a provider that keeps a bill of its own on disk.

`python -m tests.faults.kill_worker DATA_DIR BILL CAP_USD DESCRIPTOR`: serves on the listening socket that it inherits as DESCRIPTOR, so
that callers who come while it is dead wait for the next one.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import uvicorn
from starlette.applications import Starlette

from starlette_aigateway import (
    AIGateway,
    AIGatewayMiddleware,
    Chunk,
    Completion,
    Limits,
    Price,
    ProviderError,
    RetryPolicy,
    Timeouts,
    Usage,
)
from starlette_aigateway.types import Message, ProviderCall

MOUNT = "/gateway"
MODEL = "m"
PRICE = Price("1000.0005", "2000", request="0.001")
"""An input token costs a million and a half nano-USD: the sum has to be rounded, and up."""

MAX_OUTPUT = 60
TIMEOUT = 5.0
"""Seconds. Short, so that the leases of the killed end while the others still run."""


def bill(input_tokens: int, output_tokens: int) -> int:
    """Nano-USD, by the provider's own arithmetic."""
    return -(-(input_tokens * 2_000_001 + output_tokens * 4_000_000) // 2) + 1_000_000


class BilledProvider:
    """Writes down what it charges before it answers. It keeps every bound that it is given; it fails with and without a charge, in
    mid-stream, and says now and then nothing of its usage."""

    models = (MODEL,)
    timeout = TIMEOUT

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        self._random = random.Random()

    @asynccontextmanager
    async def open(self, call: ProviderCall) -> AsyncIterator[BilledAnswer]:
        await self._pause()
        fate = self._random.random()
        if fate < 0.08:
            raise ProviderError("down, and nothing was charged", billed="no", status=500)
        said = str(call.request.messages[-1]["content"])
        bound = call.request.max_tokens
        assert bound is not None, "each principal is under a cap, so each call has a bound"
        usage = Usage(input_tokens=len(said) // 4 + 1, output_tokens=self._random.randint(1, bound))
        await anyio.to_thread.run_sync(self._charge, call, said, usage)
        if fate < 0.11:
            raise ConnectionResetError("charged, and no answer")
        await self._pause()
        yield BilledAnswer(usage, tells=fate < 0.96, dies=0.11 <= fate < 0.14)

    async def _pause(self) -> None:
        await anyio.sleep(self._random.choice((0, 0.005, 0.02, 0.1)))

    def _charge(self, call: ProviderCall, said: str, usage: Usage) -> None:
        line = {
            "request": call.request_id,
            "provider": self.name,
            "principal": said.split()[0],
            "nano_usd": bill(usage.input_tokens, usage.output_tokens),
        }
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class BilledAnswer:
    """An answer that was charged already. One word is one token. `tells`: it reports its usage; `dies`: a stream is cut short."""

    def __init__(self, usage: Usage, *, tells: bool, dies: bool) -> None:
        self._usage = usage
        self._tells = tells
        self._dies = dies

    async def completion(self) -> Completion:
        text = "w " * self._usage.output_tokens
        return Completion(
            message=Message(role="assistant", content=text), finish_reason="stop", usage=self._usage if self._tells else None, model=MODEL
        )

    async def events(self) -> AsyncIterator[Chunk]:
        for number in range(self._usage.output_tokens):
            if number % 8 == 7:
                await anyio.sleep(0.002)
            if self._dies and number == self._usage.output_tokens // 2:
                raise ConnectionResetError("cut short")
            yield Chunk(delta={"content": "w "}, model=MODEL)
        yield Chunk(finish_reason="stop", model=MODEL)
        if self._tells:
            yield Chunk(usage=self._usage, model=MODEL)


def gateway_over(data_dir: Path, bill_file: Path, cap_usd: str) -> AIGateway:
    return AIGateway(
        data_dir=data_dir,
        providers=[BilledProvider(name, bill_file) for name in ("first", "second")],
        prices={MODEL: PRICE},
        limits=Limits(monthly_cap_usd=cap_usd),
        default_max_tokens=MAX_OUTPUT,
        min_output_tokens=MAX_OUTPUT // 4,
        retries=RetryPolicy(backoff=0.01),
        timeouts=Timeouts(drain=5, storage=5),
    )


if __name__ == "__main__":
    directory, bill_path, cap, inherited = sys.argv[1:]
    app = AIGatewayMiddleware(Starlette(), gateway_over(Path(directory), Path(bill_path), cap), path=MOUNT)
    uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none")).run([socket.socket(fileno=int(inherited))])
