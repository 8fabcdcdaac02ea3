"""The pages of this project."""

from __future__ import annotations

from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from .ai import gateway
from .logins import COOKIE, signed


async def log_in(request: ASGIRequest, user: str) -> HttpResponse:
    """A real project asks for a password."""
    answer = HttpResponse(f"hello, {user}")
    answer.set_cookie(COOKIE, signed(user), httponly=True, samesite="Lax")
    return answer


async def shout(request: ASGIRequest) -> HttpResponse:
    caller = await gateway.caller(request.scope)
    text = request.GET.get("text", "hello")
    answer = await caller.complete(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return JsonResponse({"text": str(answer.message["content"]).upper(), "cost_usd": f"{answer.cost_usd:f}"})


async def stream(request: ASGIRequest) -> StreamingHttpResponse:
    caller = await gateway.caller(request.scope)
    text = request.GET.get("text", "one word after the other")
    events = await caller.event_stream(model="echo", messages=[{"role": "user", "content": text}], max_tokens=100)
    return StreamingHttpResponse(aiter(events), headers=events.headers)


urlpatterns = [path("login/<user>", log_in), path("shout", shout), path("stream", stream)]
