"""What passing a call on costs, with nothing checked, counted or kept: Starlette and aiohttp in front of `UPSTREAM`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

URL = os.environ["UPSTREAM"] + "/chat/completions"
HEADERS = {"authorization": "Bearer upstream", "content-type": "application/json"}


async def chat(request: Request) -> Response:
    body = await request.body()
    if msgspec.json.decode(body).get("stream"):
        return StreamingResponse(chunks(request.app.state.session, body), media_type="text/event-stream")
    async with request.app.state.session.post(URL, data=body, headers=HEADERS) as answer:
        return Response(await answer.read(), status_code=answer.status, media_type="application/json")


async def chunks(session: aiohttp.ClientSession, body: bytes) -> AsyncIterator[bytes]:
    async with session.post(URL, data=body, headers=HEADERS) as answer:
        async for chunk in answer.content.iter_any():
            yield chunk


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as app.state.session:
        yield


app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])], lifespan=lifespan)
