"""The figures as a table for people and as JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from .rounds import Outcome, Row, Sample, Settings, rows_by_name

BUSY = 0.9
"""Share of its core that a server uses at least, if the server is what limits."""
HEAD = ("", "requests/s", "min", "max", "ratio", "p50 ms", "p95 ms", "p99 ms", "CPU us", "by CPU", "cores", "errors")


def errors(outcome: Outcome) -> int:
    return sum(sample.errors for row in outcome.rows for sample in row.samples)


def ratio(row: Row, base: Row | None) -> float | None:
    """The median over the rounds of requests per second over those of the base in the same round."""
    if base is None:
        return None
    return statistics.median(mine.rate / theirs.rate for mine, theirs in zip(row.samples, base.samples, strict=True))


def cpu_ratio(row: Row, base: Row | None) -> float | None:
    """The same of the CPU that a request costs, the base's over the row's."""
    if base is None:
        return None
    return statistics.median(theirs.cpu_us / mine.cpu_us for mine, theirs in zip(row.samples, base.samples, strict=True))


def as_json(outcome: Outcome, settings: Settings) -> dict[str, Any]:
    rows = rows_by_name(outcome.rows)
    return {
        "settings": settings._asdict(),
        "machine": machine(),
        "generator": outcome.generator,
        "pinned": outcome.cores.server is not None,
        "rows": [
            {
                "case": row.case.name,
                "base": row.case.base,
                "ratio": ratio(row, rows.get(row.case.base or "")),
                "ratio_by_cpu": cpu_ratio(row, rows.get(row.case.base or "")),
                "requests_per_second": spread(row, lambda sample: sample.rate),
                "p50_us": row.median(lambda sample: sample.load.p50),
                "p95_us": row.median(lambda sample: sample.load.p95),
                "p99_us": row.median(lambda sample: sample.load.p99),
                "cpu_us": spread(row, lambda sample: sample.cpu_us),
                "server_cores": row.median(lambda sample: sample.server_cores),
                "upstream_cores": row.median(lambda sample: sample.upstream_cores),
                "load_cores": row.median(lambda sample: sample.load_cores),
                "errors": sum(sample.errors for sample in row.samples),
            }
            for row in outcome.rows
        ],
        "memory_mib": {name: {"after_start": before, "after_load": after} for name, (before, after) in outcome.memory.items()},
        "notes": notes(outcome),
    }


def spread(row: Row, of: Callable[[Sample], float]) -> dict[str, float]:
    values = [of(sample) for sample in row.samples]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "uvloop": find_spec("uvloop") is not None,
        "httptools": find_spec("httptools") is not None,
    }


def as_text(outcome: Outcome, settings: Settings) -> str:
    rows = rows_by_name(outcome.rows)
    here = machine()
    fast = " and ".join(name for name in ("uvloop", "httptools") if here[name]) or "asyncio and h11"
    intro = (
        f"{settings.connections} connections, {settings.rounds} rounds of {settings.seconds:g} s, by {outcome.generator}; "
        f"Python {here['python']} on {here['system']}, {here['cores']} cores, {fast}"
    )
    table = columns([HEAD, *(line(row, rows.get(row.case.base or "")) for row in outcome.rows)])
    memory = columns(
        [
            ("MiB of memory", "after start", "after load"),
            *((name, f"{before:.0f}", f"{after:.0f}") for name, (before, after) in outcome.memory.items()),
        ]
    )
    said = "\n".join(f"- {note}" for note in notes(outcome))
    return "\n\n".join(filter(None, (intro, table, memory, said)))


def line(row: Row, base: Row | None) -> Sequence[str]:
    rate = spread(row, lambda sample: sample.rate)
    latencies = (
        row.median(lambda sample: sample.load.p50),
        row.median(lambda sample: sample.load.p95),
        row.median(lambda sample: sample.load.p99),
    )
    return (
        row.case.label,
        *(f"{rate[which]:.0f}" for which in ("median", "min", "max")),
        short(ratio(row, base)),
        *(f"{latency / 1000:.2f}" for latency in latencies),
        f"{row.median(lambda sample: sample.cpu_us):.0f}",
        short(cpu_ratio(row, base)),
        f"{row.median(lambda sample: sample.server_cores):.2f}",
        str(sum(sample.errors for sample in row.samples)),
    )


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in lines
    )


def notes(outcome: Outcome) -> list[str]:
    """What a reader of the table has to know, and what was not as it should be."""
    found = [
        "ratio: requests per second over those of the bare row above, in the same round; with more workers, over those of one. Medians.",
        "CPU us: of the server for one request, all its processes and threads; by CPU: the ratio of that, which other work disturbs least.",
        "cores: how many the server kept busy.",
    ]
    fastest = max(outcome.rows, key=lambda row: row.median(lambda sample: sample.rate))
    cost = fastest.median(lambda sample: sample.load_cores / sample.rate)
    found.append(
        f"The load itself costs {cost * 1e6:.0f} us a request ({fastest.case.label}): it makes {1 / cost:,.0f} a second at the most."
    )
    if outcome.cores.told:
        found.append(outcome.cores.told)
    found += limits(outcome.rows)
    for row in outcome.rows:
        refused, broken, strays = (sum(of) for of in zip(*((s.load.refused, s.load.broken, s.strays) for s in row.samples), strict=True))
        if refused or broken or strays:
            where = "did not reach the upstream" if row.case.reaches else "reached the upstream"
            found.append(f"ERRORS, {row.case.label}: {refused} answers other than 2xx, {broken} that broke off, {strays} that {where}")
    return found


def limits(rows: Sequence[Row]) -> list[str]:
    """Where something else than the server was the limit, its figure is a floor and the ratio is not to be trusted."""
    found: list[str] = []
    disturbed: list[str] = []
    for row in rows:
        server, upstream, load = (row.median(of) for of in (lambda s: s.server_cores, lambda s: s.upstream_cores, lambda s: s.load_cores))
        others = f"the load took {load:.2f} cores and the upstream {upstream:.2f}"
        if row.case.server.startswith("gateway_"):
            found.append(f"{row.case.label}, on all cores: {others} of those that the workers are on.")
        elif server < BUSY and load + upstream >= BUSY:
            rate = f"{row.median(lambda s: s.rate):.0f} requests/s"
            found.append(f"{row.case.label}: {rate} are what the load makes, not what the server can ({others}): go by the CPU.")
        elif server < BUSY:
            disturbed.append(f"{row.case.label} {server:.0%}")
    if disturbed:
        found.append(f"Not busy all the time, as they waited, or as other work disturbed them: {'; '.join(disturbed)}. Go by the CPU.")
    return found
