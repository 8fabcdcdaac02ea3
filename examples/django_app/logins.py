"""Who is logged in: one function, for the views and for the gateway."""

from __future__ import annotations

from collections.abc import Mapping

from django.core import signing

COOKIE = "login"


def signed(user: str) -> str:
    return str(signing.dumps(user))


def user_of(cookies: Mapping[str, str]) -> str | None:
    try:
        return str(signing.loads(cookies.get(COOKIE, ""), max_age=3600))
    except signing.BadSignature:
        return None
