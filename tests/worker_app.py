"""The app that the tests of worker processes serve: `uvicorn tests.worker_app:app`. Told by its environment what to be."""

import os
import time
from typing import Any

import anyio
from starlette.applications import Starlette

from starlette_aigateway import AIGateway, AIGatewayMiddleware, Completion, CompletionRequest, Price
from starlette_aigateway.providers import EchoProvider

AHEAD = float(os.environ.get("CLOCK_AHEAD", "0"))


class SlowProvider:
    """Answers never; the calls to it are in the middle of their way when the process is killed."""

    name = "slow"
    models = ("slow",)

    async def complete(self, request: CompletionRequest) -> Completion:
        await anyio.sleep_forever()
        raise AssertionError


async def authorize_admin(connection: Any) -> bool:
    return bool(connection.headers.get("authorization") == "Bearer admin")


gateway = AIGateway(
    data_dir=os.environ["DATA_DIR"],
    providers=[SlowProvider(), EchoProvider()],
    prices={"echo": Price(0, 0, request=1), "slow": Price(0, 0, request=1)},
    authorize_admin=authorize_admin,
    clock=lambda: time.time() + AHEAD,
)
app = AIGatewayMiddleware(Starlette(), gateway, path="/api/ai-gateway")
