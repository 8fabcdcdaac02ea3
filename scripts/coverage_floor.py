"""Holds the coverage of the files that money passes through, each by itself. Run by scripts/test, on what `coverage json` wrote."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

FLOOR = 95.0
PACKAGE = Path("starlette_aigateway")
MONEY_PATH = (
    "policy/budgets.py",
    "policy/pricing.py",
    "policy/estimate.py",
    "policy/metering.py",
    "stores/sqlite/ledger*.py",
    "admission.py",
    "attempts.py",
    "pipeline.py",
    "streams.py",
    "background.py",
)


def money_files() -> Iterator[Path]:
    for pattern in MONEY_PATH:
        files = sorted(PACKAGE.glob(pattern))
        if not files:
            sys.exit(f"{PACKAGE / pattern}: there is no such file; name the money path anew in scripts/coverage_floor.py")
        yield from files


def covered(summary: Mapping[str, int]) -> float:
    """Per cent: of lines and branches together, as coverage's own report says it, or of branches alone, whichever is less."""
    lines, branches = summary["num_statements"], summary["num_branches"]
    of_branches = summary["covered_branches"] / branches if branches else 1.0
    of_both = (summary["covered_lines"] + summary["covered_branches"]) / (lines + branches) if lines + branches else 1.0
    return 100 * min(of_branches, of_both)


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    below = 0
    print(f"\nFiles that money passes through: at least {FLOOR:g} % of the branches of each")
    for path in money_files():
        measured = report["files"].get(str(path))
        share = covered(measured["summary"]) if measured else 0.0
        below += share < FLOOR
        print(f"  {'BELOW' if share < FLOOR else 'ok   '} {share:6.2f} %  {path}")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
