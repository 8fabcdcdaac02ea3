"""Django's ASGI app, with the middleware around it: Django has no lifespan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import django
from asgiref.sync import markcoroutinefunction
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from starlette_aigateway import AIGatewayError, AIGatewayMiddleware, render_error

from .common import PREFIX, asks, make_gateway

gateway = make_gateway()


async def hello(request: ASGIRequest) -> HttpResponse:
    return HttpResponse("hello from the host", content_type="text/plain")


async def ask(request: ASGIRequest) -> HttpResponse:
    caller = await gateway.caller(request.scope)
    answer = await caller.complete(**asks())
    return JsonResponse({"answer": answer.message["content"], "cost": str(answer.cost_usd)})


async def streamed(request: ASGIRequest) -> StreamingHttpResponse:
    caller = await gateway.caller(request.scope)
    events = await caller.event_stream(**asks(request.GET["token"]))
    return StreamingHttpResponse(aiter(events), headers=events.headers)


class Refusals:
    """Django's own kind of middleware: answers what the gateway refuses a view."""

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


urlpatterns = [path("hello", hello), path("ask", ask), path("streamed", streamed)]
settings.configure(
    SECRET_KEY="of a test", ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, MIDDLEWARE=[f"{__name__}.Refusals"], USE_TZ=True
)
django.setup()
app = AIGatewayMiddleware(get_asgi_application(), gateway, path=PREFIX)
