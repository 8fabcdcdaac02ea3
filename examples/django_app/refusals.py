"""Django answers all errors of its views itself, with 500. This answers those of the gateway with their own status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from asgiref.sync import markcoroutinefunction
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse

from starlette_aigateway import AIGatewayError, render_error


class Refusals:
    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Callable[[ASGIRequest], Awaitable[HttpResponse]]) -> None:
        self._get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: ASGIRequest) -> HttpResponse:
        return await self._get_response(request)

    async def process_exception(self, request: ASGIRequest, error: Exception) -> HttpResponse | None:
        if not isinstance(error, AIGatewayError):
            return None
        body, status, headers = render_error(error)
        return HttpResponse(body, status=status, headers=headers)
