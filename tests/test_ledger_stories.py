"""What is told of a hold from its first entry to its last, and what has no beginning or is told in part."""

from pathlib import Path

from starlette_aigateway.stores.sqlite.connection import connect
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA
from starlette_aigateway.stores.sqlite.ledger_stories import Stories

INSERT = "INSERT INTO entries (hold, kind, at, amount, day, scopes) VALUES (?, ?, ?, ?, ?, ?)"
SCOPES = '[["user:u",null,null,null,0]]'


def test_an_end_without_a_beginning_and_a_beginning_without_a_day_are_no_stories(tmp_path: Path) -> None:
    connection = connect(tmp_path / "ledger.db", durability="OFF", schema=SCHEMA)
    rows = [
        ("whole", "hold", 1.0, 5, "1970-01-01", SCOPES),
        ("whole", "hold", 1.0, 5, "1970-01-01", SCOPES),
        ("headless", "settle", 2.0, 5, None, None),
        ("dayless", "hold", 2.0, 5, None, SCOPES),
        ("dayless", "settle", 3.0, 5, None, None),
        ("whole", "settle", 4.0, 5, None, None),
        ("last", "hold", 9.0, 5, "1970-01-01", SCOPES),
    ]
    connection.executemany(INSERT, rows)
    told = Stories(100.0).step(connection)
    assert [list(story.seqs) for story in told] == [[1, 6]]
    connection.close()
