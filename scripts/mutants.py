"""Seeded faults of the path of the money: each has to be noticed by a test.

    scripts/mutants                 every fault in mutants.toml, against the tests named there
    scripts/mutants NAME ...        these faults
    scripts/mutants --list          what they are and why they matter
    scripts/mutants --all-tests     against all tests of faults and of the ledger, not only those that are named

A fault is an exact replacement of text that stands in its file once. It is made in a copy of the checkout. Where the tests that are named
do not notice it, all tests are asked. Exits with 1 where one survives, where its text does not stand in the file once any more, or where
the tests fail without any fault.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "scripts" / "mutants.toml"
COPIED = ("starlette_aigateway", "tests", "examples", "scripts", "benchmarks", "docs", "pyproject.toml", "README.md")
ALL_TESTS = (
    "tests/test_ledger.py", "tests/test_budgets.py", "tests/test_metering.py", "tests/test_pricing.py", "tests/test_pipeline.py",
    "tests/test_credits.py", "tests/faults",
)  # fmt: skip
PATIENCE = 600
"""Seconds for the tests of one fault. One that makes them hang is noticed, too."""

KILLED, SURVIVED, STALE = "killed", "SURVIVED", "STALE"


@dataclass(frozen=True)
class Mutant:
    name: str
    why: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """`by` is the first test that noticed."""

    mutant: Mutant
    state: str
    by: str
    seconds: float


def mutants() -> list[Mutant]:
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def copy_of(directory: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, directory / name)
    # Checked by its source's hash: a fault that is as long as what it replaces, within the same second, is not taken for it.
    compileall.compile_dir(directory, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return directory


def run_tests(checkout: Path, tests: Sequence[str], jobs: int = 1) -> tuple[bool, str]:
    """Whether all pass, and the first that did not."""
    spread = ["-n", str(jobs), "--dist", "loadfile"] if jobs > 1 else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *spread, *tests]
    bare = {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(checkout / ".hypothesis")}
    environment = {**os.environ, **bare}
    try:
        done = subprocess.run(command, check=False, cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return False, "a test that hangs"
    if done.returncode == 0:
        return True, ""
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return False, failed[0] if failed else (done.stdout + done.stderr).strip().splitlines()[-1]


def try_one(mutant: Mutant, checkout: Path, all_tests: bool) -> Outcome:
    begun = time.monotonic()
    path = checkout / mutant.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutant.find) != 1 or mutant.find == mutant.replace:
        return Outcome(mutant, STALE, f"its text stands {before.count(mutant.find)} times in {mutant.file}", 0.0)
    path.write_text(before.replace(mutant.find, mutant.replace), encoding="utf-8")
    try:
        passed, by = run_tests(checkout, ALL_TESTS if all_tests else mutant.tests)
        if passed and not all_tests:
            passed, by = run_tests(checkout, ALL_TESTS)
    finally:
        path.write_text(before, encoding="utf-8")
    return Outcome(mutant, SURVIVED if passed else KILLED, by, time.monotonic() - begun)


def try_all(chosen: Sequence[Mutant], all_tests: bool, jobs: int) -> list[Outcome]:
    """Prints each outcome as it comes."""
    with tempfile.TemporaryDirectory(prefix="aigateway-mutants-") as directory:
        checkouts: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            place = Path(directory, str(number))
            place.mkdir()
            checkouts.put(copy_of(place))
        sound = checkouts.get()
        tests = ALL_TESTS if all_tests else tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        passed, by = run_tests(sound, tests, jobs)
        if not passed:
            raise SystemExit(f"The tests fail without any fault: {by}")
        checkouts.put(sound)

        def one(mutant: Mutant) -> Outcome:
            checkout = checkouts.get()
            try:
                outcome = try_one(mutant, checkout, all_tests)
            finally:
                checkouts.put(checkout)
            print(line(outcome), file=sys.stderr, flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, chosen))


def line(outcome: Outcome) -> str:
    return f"{outcome.mutant.name:44} {outcome.state:9} {outcome.seconds:5.1f} s  {outcome.by}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--all-tests", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="the outcomes on one line")
    given = parser.parse_args()
    known = mutants()
    unknown = set(given.names) - {mutant.name for mutant in known}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in known if not given.names or mutant.name in given.names]
    if given.list:
        print("\n".join(f"{mutant.name:44} {mutant.why}" for mutant in chosen))
        return 0
    outcomes = try_all(chosen, given.all_tests, max(1, min(given.jobs, len(chosen))))
    if given.json:
        print(json.dumps([{"name": o.mutant.name, "why": o.mutant.why, "state": o.state, "by": o.by} for o in outcomes]))
    else:
        print("\n".join(line(outcome) for outcome in outcomes))
        print(f"{sum(outcome.state == KILLED for outcome in outcomes)} of {len(outcomes)} faults were noticed")
    return 0 if all(outcome.state == KILLED for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
