"""The caller as a dependency of FastAPI. The only module that imports it.

    from starlette_aigateway.fastapi import Caller

    @app.post("/summary")
    async def summary(caller: Caller) -> str: ...

The app has `AIGatewayMiddleware`. Where that has a `state_name`, an annotation of your own says so:

    Billing = Annotated[starlette_aigateway.Caller, Depends(caller_from("billing"))]
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeAlias

from fastapi import Depends
from starlette.requests import HTTPConnection

from . import caller as in_process

__all__ = ["Caller", "caller_from"]


def caller_from(state_name: str = in_process.STATE_NAME) -> Callable[[HTTPConnection], Awaitable[in_process.Caller]]:
    """A dependency, in routes of HTTP and of WebSockets: the caller in the state under `state_name`. It raises `ConfigurationError` where
    the middleware is missing; nobody is logged in by it, and nobody refused."""

    async def dependency(connection: HTTPConnection) -> in_process.Caller:
        return in_process.caller_of(connection, state_name)

    return dependency


Caller: TypeAlias = Annotated[in_process.Caller, Depends(caller_from())]
