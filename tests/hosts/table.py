"""The table of `docs/hosts.md`, made of what came of the cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .cells import CELLS, CHECKOUT, HOSTS, NOT_APPLICABLE, SERVERS, Host, Server
from .checks import CHECKS

DOCUMENT: Path = CHECKOUT / "docs" / "hosts.md"
BEGIN = "<!-- what follows is written by scripts/hosts -->"
END = "<!-- and this is where it ends -->"


def with_table(document: str, came_out: Mapping[str, bool]) -> str:
    """`document` with the table for these results."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(came_out)}{END}{after}"


def table(came_out: Mapping[str, bool]) -> str:
    lines = [
        "| | " + " | ".join(server.name for server in SERVERS) + " |",
        "|---|" + "---|" * len(SERVERS),
        *(f"| {host.name} | " + " | ".join(_mark(host, server, came_out) for server in SERVERS) + " |" for host in HOSTS),
        "",
        "✓ stands for each of these, alone and nested:",
        *(f"- {check.__name__.replace('_s_', '’s ').replace('_', ' ')}" for check in CHECKS),
        "- is started and stopped once, with the server; on a bare mount, alone, started once",
        "",
        *(f"[^{number}]: {reason}" for number, reason in enumerate(NOT_APPLICABLE.values(), 1)),
    ]
    return "\n".join(lines) + "\n"


def _mark(host: Host, server: Server, came_out: Mapping[str, bool]) -> str:
    if (host.name, server.name) in NOT_APPLICABLE:
        return f"n/a[^{[*NOT_APPLICABLE].index((host.name, server.name)) + 1}]"
    wrong = [
        "nested" if cell.nested else "alone"
        for cell in CELLS
        if (cell.host, cell.server) == (host, server) and not came_out.get(cell.name, False)
    ]
    return f"✗ {' and '.join(wrong)}" if wrong else "✓"
