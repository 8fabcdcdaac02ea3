"""The lifespan of an app, as a server runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.types import ASGIApp, Message


class HostedLifespan:
    """Starts and stops `app` around a block. `state` is what the app may fill for its requests; `patience` is how many seconds it may
    take for either."""

    def __init__(self, app: ASGIApp, state: dict[str, Any], patience: float) -> None:
        self._app = app
        self._state = state
        self._patience = patience
        self._asked_to_stop = anyio.Event()
        self._begun = False
        self._started = anyio.Event()
        self._ended = anyio.Event()
        self._supported = False
        self._failure: str | None = None
        self._error: Exception | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises what the app raises, and `RuntimeError` with the message of one that says it cannot start or stop."""
        failure: BaseException | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._run)
            try:
                await self._wait(self._started, "start")
                self._check()
                yield
            except BaseException as error:  # noqa: BLE001  # raised below as it came: a task group would wrap it
                failure = error
            self._asked_to_stop.set()
            try:
                await self._wait(self._ended, "stop")
            except AssertionError as error:
                failure = failure or error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self._check()

    async def _wait(self, event: anyio.Event, what: str) -> None:
        with anyio.move_on_after(self._patience):
            await event.wait()
        assert event.is_set(), f"the app did not {what} within {self._patience:g} seconds"

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None and self._supported:
            raise error
        if self._failure is not None:
            message, self._failure = self._failure, None
            raise RuntimeError(message) from error

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self._state}
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  # raised in the test; before its first word it means that the app knows no lifespan
            self._error = error
        finally:
            self._started.set()
            self._ended.set()

    async def _receive(self) -> Message:
        if not self._begun:
            self._begun = True
            return {"type": "lifespan.startup"}
        await self._asked_to_stop.wait()
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        kind, _, outcome = message["type"].rpartition(".")
        assert kind in ("lifespan.startup", "lifespan.shutdown"), f"the app has sent {message['type']!r}"
        self._supported = True
        if outcome == "failed":
            self._failure = message.get("message", "") or f"{kind} failed"
        (self._started if kind == "lifespan.startup" else self._ended).set()
