"""The CPU of a cache hit in microseconds, without a server and a socket: ASGI in, ASGI out, many calls in the air at a time.

    python benchmarks/hit.py
    python benchmarks/hit.py --calls 500 --rounds 3 --tasks 1

For each of the two routes: of a whole hit, with that of the threads that write, and of its HTTP alone, where the same answer stands ready
in place of the pipeline. Everything is on: a stored key with windows and caps, a durable ledger, the cache. The least of all rounds counts:
what else runs on the machine only ever adds to it. Measures the checkout that it lies in, on uvloop where that is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ample_key
from comparison import loops
from comparison.cases import body
from comparison.in_process import Client
from comparison.upstream import ANSWER

from starlette_aigateway.calls import Served
from starlette_aigateway.composition import Composition
from starlette_aigateway.pipeline import Pipeline
from starlette_aigateway.types import CallOptions, Completion, CompletionRequest, Price, Principal
from starlette_aigateway.wires import openai_chat

MODEL = "gpt-4o-mini"
ROUTES = ("/v1/chat/completions", "/complete")
BODY = body(stream=False).encode()
COMPLETION = ANSWER.partition(b"\r\n\r\n")[2]


class Cost(NamedTuple):
    """Microseconds of CPU a call: of the event loop's thread, and of all of them."""

    loop: float
    process: float


async def cost(client: Client, route: str, options: argparse.Namespace) -> Cost:
    each = max(1, options.calls // options.tasks)

    async def calls() -> None:
        for _ in range(each):
            await client.call(route, BODY)

    rounds: list[Cost] = []
    for _ in range(options.rounds):
        loop, process = time.thread_time(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for _ in range(options.tasks):
                group.create_task(calls())
        spent = time.thread_time() - loop, time.process_time() - process
        rounds.append(Cost(*(seconds / (each * options.tasks) * 1e6 for seconds in spent)))
    return Cost(min(one.loop for one in rounds), min(one.process for one in rounds))


class Provider:
    """Has the body of OpenAI's answer at hand, which passes through to whoever speaks that wire."""

    name = "openai"

    async def complete(self, request: CompletionRequest) -> Completion:
        return openai_chat.decode_completion(COMPLETION)


class StandIn:
    """In place of a pipeline: the first answer that it gave, again and again."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._complete = pipeline.complete
        self._served: Served | None = None

    async def complete(self, principal: Principal, request: CompletionRequest, options: CallOptions, request_id: str) -> Served:
        if self._served is None:
            self._served = await self._complete(principal, request, options, request_id)
        return self._served


async def measure(directory: Path, options: argparse.Namespace) -> None:
    composition = Composition(providers=[Provider()], data_dir=directory, prices={MODEL: Price("0.15", "0.60")})
    async with composition.lifecycle.lifespan():
        raw_key = await ample_key.make(composition, "hit")
        client = Client(composition.http, raw_key)
        for route in ROUTES:
            await client.call(route, BODY)
        client.answers.clear()
        whole = {route: await cost(client, route, options) for route in ROUTES}
        composition.pipeline.complete = StandIn(composition.pipeline).complete  # type: ignore[method-assign]  # HTTP is measured alone
        for route in ROUTES:
            http = await cost(client, route, options)
            print(f"{route:22} whole {whole[route].loop:6.1f} and its threads {whole[route].process:6.1f}   HTTP alone {http.loop:6.1f}")
        assert client.answers.keys() == {(200, b"hit")}, client.answers


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU of a cache hit in microseconds, in process")
    parser.add_argument("--calls", type=int, default=4000, help="in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tasks", type=int, default=64, help="calls in the air at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aigateway-hit-") as directory:
        loops.run(measure(Path(directory), options))


if __name__ == "__main__":
    main()
