"""The `aigateway` command, run as a process of its own over the files of gateways."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from starlette_aigateway import AIGateway, CompletionRequest, Message, Price, Principal, Tenant
from starlette_aigateway.providers import EchoProvider
from starlette_aigateway.stores.sqlite.inspection import inspected, ledger_figures
from starlette_aigateway.stores.sqlite.ledger_schema import SCHEMA

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS")}
HELLO: list[Message] = [{"role": "user", "content": "hello"}]

LIVE = """
import sys
import anyio
from starlette_aigateway import AIGateway, CompletionRequest, Price, Principal
from starlette_aigateway.providers import EchoProvider

async def main():
    gateway = AIGateway(data_dir=sys.argv[1], providers=[EchoProvider()], prices={"echo": Price(1, 2)})
    async with gateway:
        calls = 0
        stop = anyio.Event()
        async def work(name):
            nonlocal calls
            while not stop.is_set():
                messages = [{"role": "user", "content": f"{name} {calls}"}]
                await gateway.complete(Principal(name, hard_cap_usd=1000), CompletionRequest(model="echo", messages=messages))
                calls += 1
                if calls % 50 == 0:
                    print(calls, flush=True)
        async def until_told():
            await anyio.to_thread.run_sync(sys.stdin.read)
            stop.set()
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(work, f"user {number}")
            group.start_soon(until_told)
        print(calls, flush=True)

anyio.run(main)
"""


def aigateway(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "starlette_aigateway", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=ENVIRONMENT, **more)


def answer(*arguments: str | Path, code: int = 0) -> Any:
    """What the command says in JSON."""
    done = aigateway(*arguments, "--json")
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(done.stdout)


@contextmanager
def busy_gateway(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A gateway in another process, in the middle of its calls."""
    command = [sys.executable, "-c", LIVE, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            wait_for_more_than(0, process)
            yield process
        finally:
            process.kill()


def wait_for_more_than(calls: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while int(process.stdout.readline()) <= calls:
        pass


def ended(process: subprocess.Popen[str]) -> int:
    """Stops the gateway; how many calls it has made."""
    out, _ = process.communicate("", timeout=30)
    return int(out.split()[-1])


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Of a gateway that was stopped: two calls of a key of the tenant acme and one of a user, at 10^-6 and 2 * 10^-6 USD for a token."""

    async def use() -> None:
        async with AIGateway(data_dir=tmp_path / "data", providers=[EchoProvider()], prices={"echo": Price(1, 2)}) as gateway:
            await gateway.save_tenant(Tenant("acme", monthly_cap_usd=5))
            raw, key = await gateway.create_key("app", tenant="acme", hard_cap_usd="0.5")
            (tmp_path / "key_id").write_text(key.id)
            for text in ("one", "two three"):
                await gateway.complete(raw, CompletionRequest(model="echo", messages=[{"role": "user", "content": text}]))
            await gateway.complete(Principal("=[red]alice"), CompletionRequest(model="echo", messages=HELLO))

    anyio.run(use)
    return tmp_path / "data"


def tamper(data_dir: Path, statement: str) -> None:
    with closing(sqlite3.connect(data_dir / "ledger.db", isolation_level=None)) as connection:
        connection.execute(statement)


# -- check -------------------------------------------------------------------------------------------------------------


def test_a_ledger_that_adds_up_is_said_to(data_dir: Path) -> None:
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("everything adds up: 6 entries, 0 holds open, 3 records, 0.0000")
    told = answer("check", "--data-dir", data_dir)
    assert (told["findings"], told["entries"], told["open_holds"], told["records"]) == ([], 6, 0, 3)
    assert told["spent_usd"] == answer("usage", "--data-dir", data_dir)["totals"]["cost_usd"]


def test_what_does_not_add_up_is_listed_and_ends_with_1(data_dir: Path) -> None:
    tamper(data_dir, "UPDATE balances SET spent = spent + 7 WHERE scope = 'gateway' AND period = ''")
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stderr) == (1, "")
    assert "I2" in done.stdout
    assert "gateway total" in done.stdout
    assert "1 finding: 6 entries" in done.stdout
    (finding,) = answer("check", "--data-dir", data_dir, code=1)["findings"]
    assert (finding["invariant"], finding["subject"]) == ("I2", "gateway total")


def test_a_running_gateway_is_audited_on_one_snapshot_and_goes_on(tmp_path: Path) -> None:
    with busy_gateway(tmp_path) as process:
        checks = []
        for _ in range(3):
            checks.append(answer("check", "--data-dir", tmp_path))
            wait_for_more_than(checks[-1]["records"], process)
        calls = ended(process)
    assert [check["findings"] for check in checks] == [[], [], []]
    entries = [check["entries"] for check in checks]
    assert entries[0] < entries[1] < entries[2], "calls went on between the audits"
    last = answer("check", "--data-dir", tmp_path)
    assert (last["findings"], last["records"], last["open_holds"]) == ([], calls, 0)


def test_a_gateway_writes_while_an_audit_has_its_snapshot_open(tmp_path: Path) -> None:
    with busy_gateway(tmp_path) as process:
        with inspected(tmp_path / "ledger.db", SCHEMA) as connection:
            before = ledger_figures(connection)
            wait_for_more_than(before.records, process)
            ended(process)
            assert ledger_figures(connection) == before
        with inspected(tmp_path / "ledger.db", SCHEMA) as connection:
            assert ledger_figures(connection).entries > before.entries


def test_what_a_killed_gateway_left_behind_is_audited_too(tmp_path: Path) -> None:
    with busy_gateway(tmp_path) as process:
        process.kill()
        process.wait()
    assert (tmp_path / "ledger.db-wal").stat().st_size > 0, "nobody has taken the last commits over"
    told = answer("check", "--data-dir", tmp_path)
    assert told["findings"] == []
    assert told["records"] >= 50
    assert told["entries"] == 2 * told["records"] + told["open_holds"]


def test_a_terminal_shows_how_far_it_is_and_a_pipe_does_not(data_dir: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "starlette_aigateway", "check", "--data-dir", str(data_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT, env={**ENVIRONMENT, "TERM": "xterm"}
    ) as done:
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal:  # noqa: PTH123  # a descriptor, not a path
            while part := _read(terminal.fileno()):
                shown += part
        assert done.stdout is not None
        assert done.stdout.read().startswith("everything adds up")
    assert done.returncode == 0
    assert b"entries and records" in shown
    assert aigateway("check", "--data-dir", data_dir).stderr == ""


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux: nobody has the other end open any more
        return b""


def test_nothing_is_created_where_there_is_no_ledger(tmp_path: Path) -> None:
    for arguments in (("check",), ("budgets",), ("usage",), ("budgets", "--key", "key_1")):
        for place in (tmp_path, tmp_path / "nowhere"):
            done = aigateway(*arguments, "--data-dir", place)
            assert (done.returncode, done.stdout) == (2, "")
            assert str(place) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_database_itself_is_never_written(data_dir: Path) -> None:
    before = (data_dir / "ledger.db").read_bytes()
    for arguments in (("check",), ("budgets",), ("usage",)):
        assert aigateway(*arguments, "--data-dir", data_dir).returncode == 0
    assert (data_dir / "ledger.db").read_bytes() == before


@pytest.mark.parametrize(("version", "advice"), [(len(SCHEMA) + 1, "upgrade the package"), (1, "start the gateway of this release once")])
def test_a_ledger_of_another_release_is_not_read_and_not_migrated(data_dir: Path, version: int, advice: str) -> None:
    tamper(data_dir, f"PRAGMA user_version={version}")
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert advice in done.stderr
    with closing(sqlite3.connect(data_dir / "ledger.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)


@pytest.mark.parametrize("damage", ["header", "table"])
def test_a_file_that_cannot_be_read_ends_with_2_and_says_so(data_dir: Path, damage: str) -> None:
    if damage == "header":
        path = data_dir / "ledger.db"
        path.write_bytes(b"no database at all" + path.read_bytes()[18:])
    else:
        tamper(data_dir, "DROP TABLE credits")
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ledger.db cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("statement", "subject"),
    [
        ("INSERT INTO entries (hold, kind, at, amount, day, scopes) VALUES ('x', 'hold', 0, 1, '2026-01-01', 'no JSON')", "x"),
        ("INSERT INTO entries (hold, kind, at, amount) VALUES (x'ff', 'settle', 0, 'abc')", "b'\\xff'"),
        ("INSERT INTO credits VALUES (x'ff', 'gateway', 'abc', 0, 0, NULL, '', '')", "b'\\xff'"),
        ("INSERT INTO balances VALUES (x'ff', '', 'abc', 0, 0, 0)", "b'\\xff' total"),
        ("INSERT INTO holds VALUES (x'ff', 0, 0, 'xx')", "b'\\xff'"),
        ("DELETE FROM meta", "meta"),
    ],
)
def test_a_value_that_no_gateway_wrote_is_a_finding(data_dir: Path, statement: str, subject: str) -> None:
    tamper(data_dir, statement)
    findings = answer("check", "--data-dir", data_dir, code=1)["findings"]
    assert subject in {finding["subject"] for finding in findings}


def test_a_page_that_sqlite_finds_damaged_is_a_finding(data_dir: Path) -> None:
    with closing(sqlite3.connect(data_dir / "ledger.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'usage_model'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with (data_dir / "ledger.db").open("r+b") as file:
        file.seek((root - 1) * size + 8)
        file.write(b"\xff" * 40)
    findings = answer("check", "--data-dir", data_dir, code=1)["findings"]
    assert {finding["invariant"] for finding in findings} == {"file"}


def test_what_was_committed_and_is_not_there_any_more_is_a_finding(data_dir: Path) -> None:
    entries = answer("check", "--data-dir", data_dir)["entries"]
    (data_dir / "ledger.db.lock").write_bytes((entries + 5).to_bytes(8, "big"))
    (finding,) = answer("check", "--data-dir", data_dir, code=1)["findings"]
    assert (finding["invariant"], finding["subject"]) == ("I4", "ledger.db")
    assert f"ends at row {entries}, though row {entries + 5} was committed" in finding["message"]


def test_an_empty_file_is_no_ledger_of_an_older_release(data_dir: Path) -> None:
    (data_dir / "ledger.db").write_bytes(b"")
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert "put a backup back" in done.stderr


def test_a_database_of_another_program_is_not_said_to_be_empty(data_dir: Path) -> None:
    (data_dir / "ledger.db").unlink()
    with closing(sqlite3.connect(data_dir / "ledger.db")) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    done = aigateway("check", "--data-dir", data_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ledger.db is the database of another program; --data-dir" in done.stderr
    assert "backup" not in done.stderr


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [
        ('UPDATE usage SET price = \'["a", "b", "c", "d", "e"]\'', ("usage", "--csv")),
        ("UPDATE usage SET price = '[]'", ("usage",)),
        ("UPDATE usage SET cost = 'abc'", ("usage", "--csv")),
        ("UPDATE balances SET spent = 'abc'", ("budgets",)),
    ],
)
def test_a_report_over_values_that_no_gateway_wrote_ends_with_2_and_one_line(
    data_dir: Path, statement: str, arguments: tuple[str, ...]
) -> None:
    tamper(data_dir, statement)
    done = aigateway(*arguments, "--data-dir", data_dir)
    assert done.returncode == 2
    assert done.stderr.startswith("aigateway: ledger.db holds what no gateway wrote: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("check", "--data-dir"), ("check", "--data-dir", ".")])
def test_a_path_is_no_command_to_the_terminal_either(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = aigateway(*arguments, tmp_path / "\x1b]0;owned\x07")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert r"\x1b]0;owned\x07" in done.stderr


# -- reports -----------------------------------------------------------------------------------------------------------


def test_budgets_tell_what_is_left_of_a_key_its_tenant_and_the_gateway(data_dir: Path) -> None:
    key_id = (data_dir.parent / "key_id").read_text()
    rows = answer("budgets", "--data-dir", data_dir, "--key", key_id)["data"]
    assert [(row["scope"], row["window"]) for row in rows] == [
        (scope, window) for scope in (f"principal:{key_id}", "tenant:acme", "gateway") for window in ("day", "month", "total")
    ]
    caps = {(row["scope"].partition(":")[0], row["window"]): row["cap_usd"] for row in rows if row["cap_usd"] is not None}
    assert caps == {("principal", "total"): "0.5", ("tenant", "month"): "5"}
    assert rows[2]["spent_usd"] == rows[5]["spent_usd"] != "0"
    table = aigateway("budgets", "--data-dir", data_dir, "--tenant", "acme", "--principal", "=[red]alice")
    assert table.returncode == 0
    assert "principal:=[red]alice" in table.stdout
    unknown = aigateway("budgets", "--data-dir", data_dir, "--key", "key_none")
    assert (unknown.returncode, unknown.stderr) == (2, "aigateway: there is no key 'key_none'\n")


def test_usage_is_told_as_a_table_as_json_and_as_csv(data_dir: Path) -> None:
    report = answer("usage", "--data-dir", data_dir, "--group-by", "principal,model", "--since", "2020-01-01")
    assert report["totals"]["calls"] == 3
    assert sorted(group["calls"] for group in report["groups"]) == [1, 2]
    assert answer("usage", "--data-dir", data_dir, "--tenant", "acme")["totals"]["calls"] == 2
    assert answer("usage", "--data-dir", data_dir, "--until", "2020-01-01T00:00:00Z")["totals"]["calls"] == 0
    table = aigateway("usage", "--data-dir", data_dir, "--group-by", "principal")
    assert "=[red]alice" in table.stdout
    assert "total" in table.stdout
    groups = aigateway("usage", "--data-dir", data_dir, "--group-by", "principal", "--csv").stdout.splitlines()
    assert groups[0].startswith("principal,calls")
    assert any(line.startswith("'=[red]alice,1") for line in groups), "no formula for a spreadsheet"
    records = aigateway("usage", "--data-dir", data_dir, "--csv").stdout.splitlines()
    assert (len(records), records[0].partition(",")[0]) == (4, "id")
    for arguments in (("--group-by", "nonsense"), ("--json", "--csv"), ("--since", "yesterday")):
        assert aigateway("usage", "--data-dir", data_dir, *arguments).returncode == 2


@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_moment_out_of_range_is_blamed_on_its_own_option(data_dir: Path, option: str) -> None:
    done = aigateway("usage", "--data-dir", data_dir, option, "0001-01-01")
    assert done.returncode == 2
    assert f"Invalid value for {option}" in done.stderr


def test_a_name_is_no_command_to_the_terminal(data_dir: Path) -> None:
    tamper(data_dir, "UPDATE usage SET model = char(27) || '[2Jgone'")
    shown = aigateway("usage", "--data-dir", data_dir, "--group-by", "model").stdout
    assert "\x1b" not in shown
    assert r"\x1b[2Jgone" in shown


def test_every_page_of_records_is_in_the_csv(tmp_path: Path) -> None:
    with busy_gateway(tmp_path) as process:
        calls = ended(process)
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as connection:
        (known,) = connection.execute("SELECT count(*) FROM usage").fetchone()
        assert known == calls
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(usage)")]
        values = ", ".join({"seq": "seq + 1000000 * i", "id": "id || i"}.get(name, name) for name in columns)
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500)"
            f" INSERT INTO usage SELECT {values} FROM usage, n WHERE id = (SELECT min(id) FROM usage)"
        )
    lines = aigateway("usage", "--data-dir", tmp_path, "--csv").stdout.splitlines()
    assert len({line.partition(",")[0] for line in lines[1:]}) == len(lines) - 1 == known + 1500


def test_a_ledger_that_was_there_and_is_gone_is_no_wrong_directory(tmp_path: Path) -> None:
    (tmp_path / "ledger.db.lock").touch()
    ended = aigateway("check", "--data-dir", str(tmp_path))
    assert ended.returncode == 2
    assert "ledger.db.lock says that there was one: put a backup back" in " ".join(ended.stderr.split())
