"""The long proof that no cap is passed and no bill is lost, in sections; all of them without arguments.

    scripts/campaign                          about half an hour
    scripts/campaign kills --kills 300
    scripts/campaign model awaits mutants

Progress goes to stderr, a summary in Markdown to stdout, the figures as JSON to `--out`. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FAULTS = "tests/faults"
STORAGE = tuple(f"{FAULTS}/test_{name}.py" for name in ("storage", "corruption", "clock", "snapshots"))
PROCESSES = (f"{FAULTS}/test_ledger_processes.py", f"{FAULTS}/test_kill_loop.py", "tests/test_workers.py")
PROPERTIES = (
    f"{FAULTS}/test_ledger_model.py",
    *(f"tests/test_{name}.py" for name in ("budgets", "pricing", "worst_case", "estimate")),
)


@dataclass(frozen=True)
class Section:
    """What was tried, as one row: `figures` are shown, `wrong` is what should not be. `command` repeats it."""

    name: str
    command: str
    figures: Mapping[str, Any]
    wrong: Sequence[str] = field(default_factory=list)
    seconds: float = 0.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def python(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit status and stdout; stderr is shown as it comes."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *arguments], check=False, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout


def last_json(output: str) -> Any:
    """What was printed as JSON: a whole document, or the last line."""
    try:
        return json.loads(output)
    except ValueError:
        return json.loads(output.strip().splitlines()[-1])


def tests(paths: Sequence[str], **environment: str) -> tuple[int, list[str]]:
    """How many passed, and which failed or were skipped."""
    status, output = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *paths, **environment)
    passed = re.search(r"(\d+) passed", output)
    wrong = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
    if status and not wrong:
        wrong = [f"pytest ended with {status}"]
    if wrong:
        say(output)
    return int(passed.group(1)) if passed else 0, wrong


def kills(given: argparse.Namespace) -> Section:
    arguments = ("-m", "tests.faults.kill_loop", "--kills", str(given.kills), "--seed", str(given.seed))
    status, output = python(*arguments, "--json")
    found = last_json(output)
    wrong = found.pop("wrong") or ([f"ended with {status}"] if status else [])
    return Section("kills", f"python {' '.join(arguments)}", found, wrong)


def storm(given: argparse.Namespace) -> Section:
    arguments = ("-m", "tests.faults.disconnect_storm", "--streams", str(given.streams), "--seed", str(given.seed))
    status, output = python(*arguments)
    figures: dict[str, Any] = {}
    for found in last_json(output):
        mode = found.pop("mode")
        for name in ("charged", "booked"):
            found[name] = f"{found[name] / 10**9:.2f} USD"
        figures[mode] = {name: value for name, value in found.items() if name not in ("streams", "seed") and value != []}
    return Section("storm", f"python {' '.join(arguments)}", figures, [f"ended with {status}"] if status else [])


def model(given: argparse.Namespace) -> Section:
    passed, wrong = tests(PROPERTIES, HYPOTHESIS_PROFILE="campaign", EXAMPLES=str(given.examples))
    command = f"HYPOTHESIS_PROFILE=campaign EXAMPLES={given.examples} python -m pytest {' '.join(PROPERTIES)}"
    figures = {"examples of each property": given.examples, "runs of the stateful model": given.examples // 5, "passed": passed}
    return Section("model", command, figures, wrong)


def awaits(given: argparse.Namespace) -> Section:
    path = "tests/faults/test_every_await.py"
    passed, wrong = tests([path])
    return Section("awaits", f"python -m pytest {path}", {"passed": passed}, wrong)


def mutants(given: argparse.Namespace) -> Section:
    status, output = python("scripts/mutants.py", "--json")
    outcomes = last_json(output)
    wrong = [f"{outcome['name']}: {outcome['state']}" for outcome in outcomes if outcome["state"] != "killed"]
    figures = {"faults seeded": len(outcomes), "noticed": len(outcomes) - len(wrong)}
    return Section("mutants", "scripts/mutants", figures, wrong or ([f"ended with {status}"] if status else []))


def again_and_again(name: str, paths: Sequence[str], minutes: float) -> Section:
    """The same tests until the time is over, once at the least."""
    begun, rounds, passed, wrong = time.monotonic(), 0, 0, list[str]()
    while not rounds or time.monotonic() - begun < minutes * 60:
        more, failed = tests(paths)
        rounds, passed, wrong = rounds + 1, passed + more, [*wrong, *failed]
        say(f"{name}: round {rounds}, {passed} passed")
    return Section(name, f"python -m pytest {' '.join(paths)}", {"rounds": rounds, "passed": passed}, wrong)


def storage(given: argparse.Namespace) -> Section:
    return again_and_again("storage", STORAGE, given.minutes)


def processes(given: argparse.Namespace) -> Section:
    return again_and_again("processes", PROCESSES, given.minutes)


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "kills": kills,
    "storm": storm,
    "model": model,
    "awaits": awaits,
    "mutants": mutants,
    "storage": storage,
    "processes": processes,
}


def markdown(sections: Sequence[Section]) -> str:
    lines = ["| section | seconds | figures | wrong | repeated by |", "|---|---|---|---|---|"]
    for section in sections:
        figures = "; ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in section.figures.items() if value not in ([], {}))
        wrong = "; ".join(section.wrong) or "nothing"
        lines.append(f"| {section.name} | {section.seconds:.0f} | {figures} | {wrong} | `{section.command}` |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name.replace('_', ' ')} {_plain(number)}" for name, number in value.items()) + ")"
    return str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--examples", type=int, default=5000, help="of each property; a fifth of it for the stateful model")
    parser.add_argument("--minutes", type=float, default=2, help="for which storage and processes are tried again")
    parser.add_argument("--out", type=Path, default=Path("campaign.json"))
    given = parser.parse_args()
    unknown = set(given.sections) - SECTIONS.keys()
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    done: list[Section] = []
    for name in given.sections or SECTIONS:
        say(f"== {name}")
        begun = time.monotonic()
        section = SECTIONS[name](given)
        done.append(Section(section.name, section.command, section.figures, section.wrong, time.monotonic() - begun))
        given.out.write_text(json.dumps([vars(section) for section in done], indent=1), encoding="utf-8")
    print(markdown(done))
    return 1 if any(section.wrong for section in done) else 0


if __name__ == "__main__":
    sys.exit(main())
