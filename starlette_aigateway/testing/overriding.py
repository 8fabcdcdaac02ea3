"""`override`: a gateway that is a module global, in a test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import TypeVar, Unpack

from starlette.requests import HTTPConnection

from ..errors import InvalidArgument
from ..gateway import AIGateway
from ..http.door import Admin
from ..providers import EchoProvider
from ..providers.simple import adapt
from ..settings import SettingFields
from ..types import Principal
from .recording import Recorded, RecordedProvider

T = TypeVar("T")


def override(
    gateway: AIGateway,
    *,
    principal: Principal | None = None,
    admin: Admin | None = None,
    **settings: Unpack[SettingFields],
) -> Override:
    """Within the block, `gateway` has other parts; after it, also after an exception, it has its own again.

        with override(gateway, providers=[ScriptedProvider("hello")], principal=Principal("ada")) as recorded:
            ...
            assert recorded.calls[0].request.messages == [...]

    - The host's own providers are never asked: they are `providers`, by default an `EchoProvider` that serves every name.
    - All stores are new and empty, in a temporary directory.
    - Everybody is logged in as `principal`, and is the administrator `admin`; without them, the host's own functions decide. A stored key
      (`aigw_…`) is looked up as always, so that one made within the block opens it.
    - `settings` are any others of `AIGateway`: `prices`, `clock`, `limits`, a store of your own.

    What was running goes on with what it began with, so that the app may be started before the block or in it. With `async with` the
    gateway runs within the block, and everything of it is closed at its end. Overrides may be nested; the inner one begins from the
    settings of the outer one. Raises `InvalidArgument`, and `ConfigurationError` as `AIGateway` does.
    """
    if not isinstance(gateway, AIGateway):
        raise InvalidArgument(f"gateway must be an AIGateway, not {type(gateway).__name__}", param="gateway")
    recorded = Recorded()
    providers = settings.get("providers", [EchoProvider()])
    settings["providers"] = [RecordedProvider(adapt(provider), recorded) for provider in providers]
    if principal is not None:
        settings["resolve_principal"] = _always(_expect(principal, Principal, "principal"))
    if admin is not None:
        settings["authorize_admin"] = _always(_expect(admin, Admin, "admin"))
    return Override(gateway, recorded, settings)


def _always(value: T) -> Callable[[HTTPConnection], Awaitable[T]]:
    async def answer(connection: HTTPConnection) -> T:
        return value

    return answer


def _expect(value: T, kind: type[T], name: str) -> T:
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name} must be {kind.__name__}(...), not {type(value).__name__}", param=name)
    return value


class Override:
    """A context manager, and an asynchronous one that also runs the gateway."""

    def __init__(self, gateway: AIGateway, recorded: Recorded, settings: SettingFields) -> None:
        self._gateway = gateway
        self._recorded = recorded
        self._settings = settings
        self._entered = ExitStack()
        self._running = AsyncExitStack()

    def __enter__(self) -> Recorded:
        self._entered.enter_context(self._gateway.recomposed(self._recorded.hear, **self._settings))
        return self._recorded

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered.__exit__(kind, error, trace)

    async def __aenter__(self) -> Recorded:
        recorded = self.__enter__()
        try:
            await self._running.enter_async_context(self._gateway.lifespan())
        except BaseException as failure:
            self.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return recorded

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self._running.__aexit__(kind, error, trace)
        finally:
            self.__exit__(kind, error, trace)
