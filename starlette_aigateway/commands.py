"""What the `aigateway` command can do. All of it reads, beside a gateway that may be running, and writes nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, money
from .accounts import GATEWAY_SCOPE, GROUPINGS, Finding, UsageQuery, UsageReport, principal_scope, tenant_scope
from .errors import AIGatewayError, InvalidRequest, NotFound
from .http import shapes, sheets
from .stores.sqlite.config import SCHEMA as CONFIG_SCHEMA
from .stores.sqlite.inspection import LedgerFigures, damage, inspected, ledger_figures, missing
from .stores.sqlite.keys import select_key
from .stores.sqlite.ledger_budgets import read_budgets
from .stores.sqlite.ledger_check import Progress as Told
from .stores.sqlite.ledger_check import audit
from .stores.sqlite.ledger_schema import SCHEMA as LEDGER_SCHEMA
from .stores.sqlite.ledger_schema import Prices
from .stores.sqlite.ledger_usage import MAX_PAGE, UsageReader
from .stores.sqlite.witness import noted
from .types import Caps, rfc3339, utc

FOUND, UNREADABLE, INTERRUPTED = 1, 2, 130
PIPE_WIDTH = 240
"""Columns of a table that no terminal shows: its lines are not to be folded."""

DATA_DIR = click.option(
    "--data-dir", required=True, type=click.Path(path_type=Path), help="The directory that the gateway was given as data_dir=."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
MOMENT = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S"])


def run() -> int:
    """Carries out the command line; gives the exit code."""
    try:
        return aigateway.main(prog_name="aigateway", standalone_mode=False) or 0
    except click.ClickException as error:
        shown = StringIO()
        error.show(shown)
        click.echo(_printable(shown.getvalue(), kept="\n"), nl=False, err=True)
        return error.exit_code
    except click.Abort:
        return INTERRUPTED
    except AIGatewayError as error:
        click.echo(f"aigateway: {_printable(error.message)}", err=True)
        return UNREADABLE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="starlette_aigateway")
def aigateway() -> None:
    """Looks into the data directory of a gateway, also while it is running. Reads only."""


@aigateway.command()
@DATA_DIR
@AS_JSON
def check(data_dir: Path, as_json: bool) -> int:
    """Audits the ledger: replays every entry and compares it with what is stored.

    Exit code 0: everything adds up. 1: there are findings. 2: the ledger cannot be read.
    """
    begun = time.monotonic()
    known = noted(data_dir / "ledger.db")
    with inspected(data_dir / "ledger.db", LEDGER_SCHEMA) as connection:
        figures = ledger_figures(connection)
        with _progress(figures.entries + figures.records) as told:
            findings = damage(connection, "ledger.db") or [*missing(connection, "ledger.db", known), *audit(connection, told)]
    seconds = round(time.monotonic() - begun, 3)
    if as_json:
        _print_json(_checked(figures, findings, seconds))
    else:
        if findings:
            _print_table(("invariant", "subject", "finding"), [(one.invariant, one.subject, one.message) for one in findings])
        click.echo(_summary(figures, findings, seconds))
    return FOUND if findings else 0


def _checked(figures: LedgerFigures, findings: Sequence[Finding], seconds: float) -> Mapping[str, Any]:
    return {
        "findings": [{"invariant": one.invariant, "subject": str(one.subject), "message": one.message} for one in findings],
        "entries": figures.entries,
        "open_holds": figures.open_holds,
        "records": figures.records,
        "rolled_up_records": figures.rolled_up,
        "spent_usd": money.text(money.dollars(figures.spent)),
        "seconds": seconds,
    }


def _summary(figures: LedgerFigures, findings: Sequence[Finding], seconds: float) -> str:
    verdict = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}" if findings else "everything adds up"
    return (
        f"{verdict}: {figures.entries} entries, {figures.open_holds} holds open, {figures.records} records, "
        f"{_rolled_up(figures)}"
        f"{money.text(money.dollars(figures.spent))} USD spent; {seconds:.1f} s"
    )


def _rolled_up(figures: LedgerFigures) -> str:
    return f"{figures.rolled_up} more rolled up, " if figures.rolled_up else ""


@contextmanager
def _progress(total: int) -> Iterator[Told | None]:
    """A bar on a terminal's standard error, nothing anywhere else."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("entries and records", total=total)
        yield lambda seen: bar.update(task, completed=seen)


@aigateway.command()
@DATA_DIR
@click.option("--principal", help="A principal of the host's own login. Its caps are the host's code's, and not stored.")
@click.option("--key", "key_id", help="A stored key, by its id.")
@click.option("--tenant", help="A tenant.")
@AS_JSON
def budgets(data_dir: Path, principal: str | None, key_id: str | None, tenant: str | None, as_json: bool) -> int:
    """What is spent, held and left today, this month and in all, of what is named and of the gateway as a whole.

    Caps that the host's code gives (default_limits=, Principal(...)) are not stored, and not shown.
    """
    scopes: dict[str, Caps | None] = {}
    if principal is not None:
        scopes[principal_scope(principal)] = None
    if key_id is not None:
        scopes |= _scopes_of_key(data_dir, key_id)
    if tenant is not None:
        scopes[tenant_scope(tenant)] = None
    with inspected(data_dir / "ledger.db", LEDGER_SCHEMA) as connection:
        found = read_budgets(connection, {**scopes, GATEWAY_SCOPE: None}, time.time())
        rows = [{**shapes.budget(budget), "scope": budget.scope} for budget in found]
    if as_json:
        _print_json({"data": rows})
    else:
        _print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    return 0


def _scopes_of_key(data_dir: Path, key_id: str) -> dict[str, Caps | None]:
    with inspected(data_dir / "config.db", CONFIG_SCHEMA) as connection:
        key = select_key(connection, key_id)
    if key is None:
        raise NotFound(f"there is no key {key_id!r}")
    own: dict[str, Caps | None] = {principal_scope(key.id): key.caps}
    return own if key.tenant is None else {**own, tenant_scope(key.tenant): None}


@aigateway.command()
@DATA_DIR
@click.option("--principal", help="Of this principal only.")
@click.option("--tenant", help="Of this tenant only.")
@click.option("--key", "key_id", help="Of the key with this id only.")
@click.option("--model", help="Of this model only.")
@click.option("--since", type=MOMENT, help="From this moment on, in UTC.")
@click.option("--until", type=MOMENT, help="Before this moment, in UTC.")
@click.option("--group-by", default="", help=f"Of {', '.join(GROUPINGS)}, separated by commas.")
@AS_JSON
@click.option("--csv", "as_csv", is_flag=True, help="CSV: the groups, or without --group-by every record.")
def usage(data_dir: Path, group_by: str, as_json: bool, as_csv: bool, **filters: Any) -> int:
    """What was used and what it cost."""
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")
    names = tuple(group_by.split(",")) if group_by else ()
    for name in ("since", "until"):
        filters[name] = _seconds(filters[name])
    with inspected(data_dir / "ledger.db", LEDGER_SCHEMA) as connection:

        def read(cursor: str | None) -> UsageReport:
            try:
                reader = UsageReader(UsageQuery(**filters, group_by=names, limit=MAX_PAGE, cursor=cursor, totals=cursor is None), Prices())
            except InvalidRequest as error:
                raise click.BadParameter(error.message, param_hint=f"--{error.param}".replace("_", "-")) from None
            return reader.read(connection)

        _print_usage(read, names, as_json=as_json, as_csv=as_csv)
    return 0


def _print_usage(read: Callable[[str | None], UsageReport], names: Sequence[str], *, as_json: bool, as_csv: bool) -> None:
    report = read(None)
    if report.rolled_up_before is not None:
        click.echo(
            f"Records before {rfc3339(utc(report.rolled_up_before))} may be rolled up: totals and groups have them by whole days (UTC), "
            "the list of records does not.",
            err=True,
        )
    if as_json:
        body = shapes.usage_report(report)
        _print_json({name: body[name] for name in ("totals", "groups", "rolled_up_before")})
    elif as_csv and names:
        sys.stdout.write(sheets.groups(report, names))
    elif as_csv:
        sys.stdout.write(sheets.lines([shapes.RECORD_FIELDS]))
        for page in _pages(report, read):
            sys.stdout.write(sheets.records(page))
    else:
        totals = [(*(group.by[name] for name in names), *shapes.totals(group.totals).values()) for group in report.groups]
        total = ("total", *(None for _ in names[1:])) if names else ()
        _print_table((*names, *shapes.TOTALS_FIELDS), [*totals, (*total, *shapes.totals(report.totals).values())])


def _pages(report: UsageReport, read: Callable[[str | None], UsageReport]) -> Iterator[UsageReport]:
    yield report
    while report.next_cursor is not None:
        report = read(report.next_cursor)
        yield report


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.replace(tzinfo=UTC).timestamp()


def _print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(_shown, row))
    console.print(table)


def _shown(cell: object) -> str:
    """Names come from callers: what is in them is neither markup nor a command to the terminal."""
    return escape(_printable("" if cell is None else str(cell)))


def _printable(text: str, kept: str = "") -> str:
    return "".join(letter if letter.isprintable() or letter in kept else f"\\x{ord(letter):02x}" for letter in text)


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
