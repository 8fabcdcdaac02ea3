"""`/usage`: totals, groups and records. An administrator sees everything, a caller its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from starlette.responses import Response, StreamingResponse

from ..accounts import GROUPINGS, UsageReport
from ..bookkeeping import MAX_PAGE, page_size
from ..errors import InvalidRequest, PermissionDenied
from ..types import Principal
from . import realm, shapes, sheets
from .exchange import Exchange
from .pages import DEFAULT_LIMIT
from .query import Query
from .replies import as_text

FILTERS = ("principal", "tenant", "key", "model", "since", "until")
CSV = "text/csv; charset=utf-8"

Read = Callable[[int, str | None], Awaitable[UsageReport]]


async def usage(exchange: Exchange) -> Response:
    query = exchange.query(*FILTERS, "group_by", "limit", "cursor", "format")
    filters = _filters(exchange, query)
    group_by = query.words("group_by", GROUPINGS)
    limit, cursor = query.integer("limit"), query.text("cursor")

    async def read(size: int, after: str | None, *, totals: bool = True) -> UsageReport:
        return await exchange.administration.usage(**filters, group_by=group_by, limit=size, cursor=after, totals=totals)

    if query.word("format", ("json", "csv")) == "json":
        report = await read(page_size(limit or DEFAULT_LIMIT), cursor)
        return await run_sync(lambda: exchange.answer(shapes.usage_report(report)))  # 100,000 groups take a third of a second
    headers = {**as_text(exchange.id_headers), "cache-control": "no-store", "content-disposition": 'attachment; filename="usage.csv"'}
    if group_by:
        report = await read(1, None)
        return Response(await run_sync(sheets.groups, report, group_by), 200, headers, CSV)
    pages = partial(read, totals=False)
    first = await pages(min(limit or MAX_PAGE, MAX_PAGE), cursor)
    return StreamingResponse(RecordPages(first, pages, limit), 200, headers, CSV)


def _filters(exchange: Exchange, query: Query) -> dict[str, Any]:
    filters: dict[str, Any] = {name: query.text(name) for name in ("principal", "tenant", "model")}
    filters["key_id"] = query.text("key")
    filters["since"], filters["until"] = query.moment("since"), query.moment("until")
    if filters["since"] is not None and filters["until"] is not None and filters["until"] < filters["since"]:
        raise InvalidRequest("until must not be before since", param="until")
    if exchange.admin is not None:
        filters["tenant"] = realm.tenant_asked(exchange.admin, filters["tenant"])
        return filters
    _check_own(exchange.principal, filters)
    filters["principal"] = exchange.principal.id
    return filters


def _check_own(caller: Principal, filters: Mapping[str, Any]) -> None:
    for name, shown, own in (
        ("principal", "principal", caller.id),
        ("tenant", "tenant", caller.tenant_id),
        ("key_id", "key", caller.key_id),
    ):
        if filters[name] is not None and filters[name] != own:
            raise PermissionDenied("a caller sees its own usage only", param=shown)


class RecordPages:
    """All records that the filters match as CSV, newest first, read one page at a time; with a `limit`, at most that many.

    An iterator and not an async generator: nothing has to be closed when the client leaves.
    """

    def __init__(self, first: UsageReport, read: Read, limit: int | None) -> None:
        self._report: UsageReport | None = first
        self._read = read
        self._left = limit
        self._header: Sequence[str] | None = shapes.RECORD_FIELDS

    def __aiter__(self) -> RecordPages:
        return self

    async def __anext__(self) -> str:
        if self._header is not None:
            header, self._header = self._header, None
            return sheets.lines([header])
        report = self._report
        if report is None:
            raise StopAsyncIteration
        lines = await run_sync(sheets.records, report)
        self._report = await self._following(report)
        return lines

    async def _following(self, report: UsageReport) -> UsageReport | None:
        size = MAX_PAGE
        if self._left is not None:
            self._left -= len(report.data)
            size = min(self._left, MAX_PAGE)
        if report.next_cursor is None or size < 1:
            return None
        return await self._read(size, report.next_cursor)
