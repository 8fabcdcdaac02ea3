"""The gateway of this project."""

from __future__ import annotations

import os
from pathlib import Path

from starlette.requests import HTTPConnection

from starlette_aigateway import AIGateway, Price, Principal
from starlette_aigateway.providers import EchoProvider

from .logins import user_of


async def resolve_principal(connection: HTTPConnection) -> Principal | None:
    user = user_of(connection.cookies)
    return None if user is None else Principal(f"user:{user}", requests_per_minute=20, daily_cap_usd="0.50")


gateway = AIGateway(
    providers=[EchoProvider()],
    data_dir=os.environ.get("AIGATEWAY_DATA_DIR", Path(__file__).resolve().parents[2] / ".demo-data"),
    prices={"echo": Price("1.00", "2.00")},
    resolve_principal=resolve_principal,
)
