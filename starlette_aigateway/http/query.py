"""Reading query strings: every parameter is known and given once, or the request is refused with its name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime

from starlette.requests import HTTPConnection

from ..errors import InvalidRequest
from ..types import check_id

MAX_DIGITS = 18


class Query:
    """The parameters of a request, of which only `known` may be there. Everything here raises `InvalidRequest` with `param`."""

    def __init__(self, connection: HTTPConnection, known: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for name, value in connection.query_params.multi_items():
            if name not in known:
                raise InvalidRequest(f"there is no parameter {name[:100]!r} here; there are {', '.join(known)}", param=name[:100])
            if name in self._values:
                raise InvalidRequest(f"{name} is given twice", param=name)
            self._values[name] = value

    def text(self, name: str) -> str | None:
        """1 to 200 printable characters."""
        value = self._values.get(name)
        return None if value is None else check_id(value, name)

    def integer(self, name: str) -> int | None:
        """An integer of at least 1."""
        value = self._values.get(name)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS and int(value) >= 1):
            raise InvalidRequest(f"{name} must be an integer of at least 1", param=name)
        return int(value)

    def words(self, name: str, choices: Sequence[str]) -> tuple[str, ...]:
        """Words of `choices`, separated by commas; none if the parameter is not given."""
        value = self._values.get(name)
        if value is None:
            return ()
        words = tuple(value.split(","))
        if any(word not in choices for word in words):
            raise InvalidRequest(f"{name} takes {', '.join(choices)}, separated by commas", param=name)
        return words

    def word(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`, the first one if the parameter is not given."""
        value = self._values.get(name, choices[0])
        if value not in choices:
            raise InvalidRequest(f"{name} must be one of {', '.join(choices)}", param=name)
        return value

    def moment(self, name: str) -> datetime | None:
        """RFC 3339 with its time zone, or a date, which is its midnight in UTC."""
        value = self._values.get(name)
        if value is None:
            return None
        try:
            if len(value) == len("2026-01-31"):
                day = date.fromisoformat(value)
                return datetime(day.year, day.month, day.day, tzinfo=UTC)
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is None or moment.utcoffset() is None:
            raise InvalidRequest(
                f"{name} must be a time such as 2026-01-31T12:00:00Z (RFC 3339; '+' is written %2B) or a date such as 2026-01-31",
                param=name,
            )
        return moment
