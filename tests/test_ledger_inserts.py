"""Rows that are written many at a time are what they would be one by one."""

import sqlite3
from contextlib import closing

import pytest

from starlette_aigateway.stores.sqlite.ledger_inserts import Insert
from starlette_aigateway.stores.sqlite.ledger_schema import ABSENT


@pytest.mark.parametrize("count", [1, 2, 17, 100])
def test_a_text_that_reads_like_the_mark_for_null_stays_a_text(count: int) -> None:
    insert = Insert("INSERT INTO t (place, said)", 2, optional=(1,))
    said = ["", "0", "0.0", ABSENT, None, "a"] * count
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (place INTEGER, said TEXT)")
        insert(connection, [*enumerate(said)])
        assert (
            connection.execute("SELECT said FROM t ORDER BY place").fetchall()
            == [("",), ("0",), ("0.0",), (None,), (None,), ("a",)] * count
        )
