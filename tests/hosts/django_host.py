"""Django's ASGI app, with the middleware around it: Django has no lifespan."""

from __future__ import annotations

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, JsonResponse
from django.urls import path

from starlette_aigateway import AIGatewayError, AIGatewayMiddleware, render_error

from .common import MESSAGES, PREFIX, make_gateway

gateway = make_gateway()


async def hello(request: ASGIRequest) -> HttpResponse:
    return HttpResponse("hello from the host", content_type="text/plain")


async def ask(request: ASGIRequest) -> HttpResponse:
    try:
        caller = await gateway.caller(request.scope)
        answer = await caller.complete(model="m", messages=MESSAGES, max_tokens=5)
    except AIGatewayError as error:
        body, status, headers = render_error(error)
        return HttpResponse(body, status=status, headers=headers)
    return JsonResponse({"answer": answer.message["content"], "cost": str(answer.cost_usd)})


urlpatterns = [path("hello", hello), path("ask", ask)]
settings.configure(SECRET_KEY="of a test", ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, USE_TZ=True)
django.setup()
app = AIGatewayMiddleware(get_asgi_application(), gateway, path=PREFIX)
