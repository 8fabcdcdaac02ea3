"""Every host on every server keeps every promise of `checks.py`; and the table in the documentation is what came out."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .cells import CELLS, CHECKOUT, HOSTS, NOT_APPLICABLE, SERVERS, Cell, Server, cell_of
from .outcomes import CAME_OUT
from .processes import free_port
from .run import Fleet
from .switchboard import PATIENCE
from .table import DOCUMENT, with_table

ALL_WELL = {cell.name: True for cell in CELLS}


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Runs whichever cells are asked for."""
    fleet = Fleet(filter(None, map(cell_of, request.session.items)))
    yield fleet
    fleet.close()


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_host_on_a_server_keeps_every_promise(cell: Cell, fleet: Fleet) -> None:
    fleet.result(cell)


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_a_gateway_that_cannot_start_ends_the_server_with_the_reason(server: Server) -> None:
    command = [sys.executable, *server.arguments, *server.address.format(port=free_port()).split(), "tests.hosts.cannot_start:app"]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=PATIENCE)
    assert "cannot_start.py cannot be created: File exists" in ended.stdout + ended.stderr


def test_the_table_in_the_documentation_is_what_came_out(request: pytest.FixtureRequest) -> None:
    """Of cells that did not run this time, it says that all was well."""
    came_out = ALL_WELL | request.config.stash[CAME_OUT]
    if request.config.getoption("--write-table", default=False):
        DOCUMENT.write_text(with_table(DOCUMENT.read_text(), came_out))
    assert with_table(DOCUMENT.read_text(), came_out) == DOCUMENT.read_text(), "docs/hosts.md is out of date: run scripts/hosts"


def test_every_combination_is_run_or_has_its_reason() -> None:
    run = {(cell.host.name, cell.server.name) for cell in CELLS}
    assert {(host.name, server.name) for host in HOSTS for server in SERVERS} == run | NOT_APPLICABLE.keys()
    assert not run & NOT_APPLICABLE.keys()


def test_a_cell_that_failed_shows_in_the_table() -> None:
    failed = next(cell for cell in CELLS if cell.nested and cell.host.name == "Quart" and cell.server.name == "granian")
    document = with_table(DOCUMENT.read_text(), ALL_WELL | {failed.name: False})
    (row,) = (line for line in document.splitlines() if line.startswith("| Quart |"))
    assert row.endswith("| ✗ nested |")
