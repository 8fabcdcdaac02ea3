"""The part of the audit that is about the ledger itself: whether its entries are still append-only, and up to where they were pruned."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

from ...accounts import Finding
from .ledger_schema import LAST_ENTRY, SCHEMA

TRIGGERS: Final = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
GUARDS: Final = ("entries_never_change", "entries_are_only_carried")
META: Final = "SELECT name, value FROM meta"
CARRIED: Final = """
SELECT max(value) FROM meta WHERE name = 'carried' AND typeof(value) = 'integer' AND (
  value = 0 OR (value > 0 AND value < (SELECT max(seq) FROM entries) AND value NOT IN (SELECT seq FROM entries)))
"""


def check_append_only(connection: sqlite3.Connection) -> Iterator[Finding]:
    triggers = dict(connection.execute(TRIGGERS).fetchall())
    for name in GUARDS:
        if not any((triggers.get(name) or "\0") in part for part in SCHEMA):
            yield Finding("I4", name, "this trigger is gone or another one: entries could be changed or deleted")
    meta = dict(connection.execute(META).fetchall())
    if meta.get("carrying") != 0:
        yield Finding("I4", "meta", f"carrying is {meta.get('carrying')} and not 0: entries could be deleted")
    if _carried(connection) is None:
        yield Finding("I4", "meta", f"carried is {meta.get('carried')}, and not a row before the last one that pruning took")


def read_carried(connection: sqlite3.Connection) -> int:
    """Up to which row number entries may be gone. Where that is not known: all of them."""
    carried = _carried(connection)
    return int(connection.execute(LAST_ENTRY).fetchone()[0]) if carried is None else carried


def _carried(connection: sqlite3.Connection) -> int | None:
    """What `meta` says, if it can be: the highest row number that pruning took, which was never the last one."""
    (carried,) = connection.execute(CARRIED).fetchone()
    return carried if isinstance(carried, int) else None
