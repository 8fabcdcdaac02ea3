"""Measures the gateway on this machine: against bare Starlette where the cache answers, and against a bare pass-through where the
provider is called.

Starts a server that plays the provider, bare Starlette, a bare pass-through over aiohttp and the gateway with everything on (a key with
windows and caps, a durable ledger, the cache) on free ports of 127.0.0.1; loads them in rounds that take turns, with wrk where it is
installed; prints requests per second and their ratios, latencies, CPU and memory. The first of two cores is the server's, another one
the load's. Figures of one machine say little on another one: compare the ratios.

Three minutes with the defaults; --rounds and --seconds make it shorter. Everything that was started ends with it. Exits with 1 where a
call went wrong.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from comparison import report
from comparison.cases import CASES
from comparison.generators import LoadFailed
from comparison.options import cases_of, number
from comparison.rounds import Bench, Outcome, Settings, WrongAnswer
from comparison.servers import NotStarted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number(int, 1, 100), default=5, help="in which every case is loaded once (default: 5)")
    parser.add_argument(
        "--seconds", type=number(float, 0.1, 600), default=4.0, help="of load for each case in a round; wrk takes whole ones (default: 4)"
    )
    parser.add_argument("--connections", type=number(int, 1, 1000), default=64, help="with one call in the air on each (default: 64)")
    parser.add_argument("--cases", type=cases_of(CASES), default=list(CASES), help=f"of {','.join(CASES)} (default: all of them)")
    parser.add_argument(
        "--workers",
        type=number(int, 1, 64),
        default=1,
        help="measure the gateway with 2, 4, ... and this many processes on one data_dir, too; each gets its share of the connections",
    )
    parser.add_argument("--latency", type=number(float, 0, 5), default=0.0, help="seconds that the provider takes to answer (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--no-wrk", action="store_true", help="make the load with a loop in Python, also where wrk is installed")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> Settings:
    workers = [count for count in range(2, options.workers + 1) if count == options.workers or count & (count - 1) == 0]
    return Settings(
        rounds=options.rounds,
        seconds=options.seconds,
        connections=options.connections,
        latency=options.latency,
        cases=options.cases,
        workers=workers,
        use_wrk=not options.no_wrk,
    )


def tell(what: str) -> None:
    """Where the run is: one line that changes on a terminal, else one line for each step."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{what}", end="", file=sys.stderr, flush=True)
    elif what:
        print(what, file=sys.stderr, flush=True)


def measure(chosen: Settings) -> Outcome | str:
    """The figures, or why there are none."""
    try:
        with tempfile.TemporaryDirectory(prefix="aigateway-bench-") as work:
            return Bench(chosen, Path(work), tell).run()
    except (NotStarted, WrongAnswer, LoadFailed) as failure:
        return str(failure)
    finally:
        tell("")


def main() -> int:
    options = arguments()
    chosen = settings(options)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    try:
        outcome = measure(chosen)
    except KeyboardInterrupt:
        print("Stopped; everything that was started has ended.", file=sys.stderr)
        return 130
    if isinstance(outcome, str):
        print(outcome, file=sys.stderr)
        return 1
    print(report.as_text(outcome, chosen))
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(outcome, chosen), indent=2) + "\n")
    return 1 if report.errors(outcome) else 0


if __name__ == "__main__":
    sys.exit(main())
