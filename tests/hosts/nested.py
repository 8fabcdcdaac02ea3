"""Any host of the matrix (`HOST`, a module) as a part of a larger app: below a mount, behind the middleware that apps usually have. The
larger app owns the lifespan, as it has to: a mount passes none on."""

import os
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

host: Any = import_module(f".{os.environ['HOST']}", __package__)


class Passed(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        request.session["visits"] = request.session.get("visits", 0) + 1
        answer = await call_next(request)
        answer.headers["x-passed"] = "yes"
        return answer


app = Starlette(
    routes=[Mount("/outer", host.app)],
    middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1"]),
        Middleware(CORSMiddleware, allow_origins=["*"]),
        Middleware(GZipMiddleware, minimum_size=1),
        Middleware(SessionMiddleware, secret_key="of a test"),
        Middleware(Passed),
    ],
    lifespan=host.gateway.lifespan,
)
