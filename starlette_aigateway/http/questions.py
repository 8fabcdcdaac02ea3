"""What the gateway asks the host's own code at the door. Whatever that code does wrong, it lets nobody through."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from ..errors import AuthenticationError, ConfigurationError, PermissionDenied, StorageUnavailable
from ..wakeup import was_cancelled

log = logging.getLogger("starlette_aigateway")


def check_function(function: object, name: str, *, takes: str = "the connection") -> None:
    """Raises `ConfigurationError`, naming the argument, for what is not an `async def` of one argument, as far as that can be told."""
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(f"{name} must be an async function of one argument, {takes}, not {_kind(function)}", param=name)
    called = inspect.unwrap(function)
    if not any(map(inspect.iscoroutinefunction, (called, getattr(called, "__call__", None)))):  # noqa: B004  # the method itself is looked at
        raise ConfigurationError(
            f"{name} must be an async function: write `async def`, or mark what returns an awaitable by inspect.markcoroutinefunction",
            param=name,
        )
    try:
        inspect.signature(function).bind(object())
    except TypeError as error:
        raise ConfigurationError(f"{name} must take one argument, {takes}: {error}", param=name) from None
    except ValueError:
        return  # it tells nothing of its arguments


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


async def ask(question: Callable[[HTTPConnection], Awaitable[object]], connection: HTTPConnection, name: str) -> object:
    """What the host's function answers. Its refusals come out as they are: an `HTTPException` below 500, `AuthenticationError`,
    `PermissionDenied`, also as the only error of a task group. Anything else is `StorageUnavailable` (`login_unavailable`)."""
    try:
        return await question(connection)
    except BaseException as error:  # the host's code may raise anything
        sole = _sole(error)
        if _is_refusal(sole):
            raise sole from sole.__cause__
        if any(map(_ends_the_task, _leaves(error))):
            raise
        log.error("%s failed", name, exc_info=error)
        raise login_unavailable() from error


def login_unavailable() -> StorageUnavailable:
    return StorageUnavailable("the login of this service is unavailable", code="login_unavailable")


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, HTTPException):
        return error.status_code < 500
    return isinstance(error, AuthenticationError | PermissionDenied)


def _ends_the_task(error: BaseException) -> bool:
    """Also a cancellation, but for one that only something was meant by that the host's code waited for."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return was_cancelled()
    return isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)


def _sole(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
