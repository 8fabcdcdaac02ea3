"""Lists, page by page: `{data, has_more, next_cursor}`. A cursor is the id that the next page starts after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from ..bookkeeping import MAX_PAGE, page_size
from .query import Query

T = TypeVar("T")
Fetch = Callable[[int, str | None], Awaitable[Sequence[T]]]
DEFAULT_LIMIT = 100


class Page(NamedTuple):
    limit: int
    after: str | None


def asked_page(query: Query) -> Page:
    """`limit` and `cursor` of a request. Raises `InvalidRequest`."""
    return Page(page_size(query.integer("limit") or DEFAULT_LIMIT), query.text("cursor"))


async def collect(
    page: Page, fetch: Fetch[T], name: Callable[[T], str], keep: Callable[[T], bool] = lambda _: True
) -> tuple[list[T], str | None]:
    """The page's items and its next cursor. `fetch(limit, after)` gives items in the order of their `name`; only those to `keep` count."""
    kept: list[T] = []
    after = page.after
    size = min(page.limit + 1, MAX_PAGE)
    while len(kept) <= page.limit:
        batch = await fetch(size, after)
        kept += [item for item in batch if keep(item)]
        if len(batch) < size:
            break
        after = name(batch[-1])
    shown = kept[: page.limit]
    return shown, name(shown[-1]) if len(kept) > page.limit else None


def list_of(data: Sequence[Any], next_cursor: str | None) -> dict[str, Any]:
    return {"data": data, "has_more": next_cursor is not None, "next_cursor": next_cursor}
