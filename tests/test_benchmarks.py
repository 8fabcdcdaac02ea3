"""`scripts/bench` in a short form: that it measures what it says and ends what it started. Never how fast anything is."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"
BENCH = [sys.executable, str(BENCHMARKS / "bench.py")]
SHORT = ["--rounds", "2", "--seconds", "0.2", "--connections", "4"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a test are known by it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def left_running(tmp_path: Path) -> list[str]:
    """What was started in a test and still lives; on systems without /proc it is not known."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(tmp_path).encode() in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=120)


def check_rows(figures: dict[str, object], expected: dict[str, str | None]) -> None:
    rows = figures["rows"]
    assert isinstance(rows, list)
    assert {row["case"]: row["base"] for row in rows} == expected
    for row in rows:
        assert row["errors"] == 0
        assert row["requests_per_second"]["min"] > 0
        assert row["cpu_us"]["min"] > 0
        assert 0 < row["p50_us"] <= row["p95_us"] <= row["p99_us"]
        assert (row["ratio"] is None) == (row["base"] is None)


def test_every_case_is_measured_against_its_base_and_nothing_is_left_behind(tmp_path: Path) -> None:
    done = bench(*SHORT, "--no-wrk", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    check_rows(
        figures,
        {"bare": None, "hit": "bare", "passed": None, "miss": "passed", "passed_stream": None, "stream": "passed_stream"},
    )
    assert set(figures["memory_mib"]) == {"bare", "gateway", "passthrough"}
    assert figures["generator"] == "the load loop in Python"
    for said in ("gateway, cache hit", "gateway, miss", "gateway, stream", "ratio", "p99 ms", "MiB of memory"):
        assert said in done.stdout
    assert "\x1b" not in done.stdout + done.stderr, "no terminal, no control sequences"
    assert left_running(tmp_path) == []
    assert list(tmp_path.glob("aigateway-bench-*")) == []


def test_several_workers_are_measured_against_one(tmp_path: Path) -> None:
    done = bench(*SHORT, "--no-wrk", "--cases", "miss", "--workers", "2", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    check_rows(json.loads((tmp_path / "figures.json").read_text()), {"passed": None, "miss": "passed", "miss_2": "miss"})
    assert "gateway, miss, 2 workers" in done.stdout


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_the_same_with_wrk(tmp_path: Path) -> None:
    done = bench("--rounds", "1", "--seconds", "1", "--connections", "4", "--cases", "hit,miss", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    check_rows(figures, {"bare": None, "hit": "bare", "passed": None, "miss": "passed"})
    assert figures["generator"] == "wrk"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="what runs is looked for in /proc")
def test_ctrl_c_ends_all_that_was_started(tmp_path: Path) -> None:
    command = [*BENCH, "--no-wrk", "--cases", "hit", "--seconds", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("warming up" in line for line in process.stderr)
        assert len(left_running(tmp_path)) > 3
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert left_running(tmp_path) == []


def test_a_server_that_does_not_start_is_told_with_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UVICORN_HTTP", "nonsense")
    done = bench(*SHORT, "--cases", "hit")
    assert (done.returncode, done.stdout) == (1, "")
    assert "bare ended while it started. It wrote:" in done.stderr
    assert "nonsense" in done.stderr
    assert left_running(tmp_path) == []


def test_every_micro_benchmark_does_what_it_measures() -> None:
    code = "import micro; print(*[f'{name}: {type(run()).__name__}' for name, run in micro.benchmarks().items()], sep='\\n')"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert "ledger: hold and settle, 32 in a batch: int" in done.stdout
    assert len(done.stdout.splitlines()) > 20


def test_micro_benchmarks_are_run_by_pyperf(tmp_path: Path) -> None:
    pytest.importorskip("pyperf")
    command = [sys.executable, str(BENCHMARKS / "micro.py"), "--debug-single-value", "--only", "keys: digest", "-o", "micro.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "keys: digest" in (tmp_path / "micro.json").read_text()


def test_the_profile_says_what_each_stage_costs_in_each_case(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "profiling.py"), "--seconds", "0.3", "--connections", "4", "--no-wrk", "--functions", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {name: costs for name, *costs in (re.split(r" {2,}", line) for line in done.stdout.splitlines())}
    assert rows["us of CPU for one call"] == ["hit", "miss", "stream"]
    provider = [float(cost) for cost in rows["provider: adapter and HTTP client"]]
    assert provider[0] == 0, "an answer from the cache asks no provider"
    assert min(provider[1:]) > 0
    assert "thread aigateway-ledger" in rows
    assert left_running(tmp_path) == []


def test_a_hit_is_measured_in_process() -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "hit.py"), "--calls", "4", "--rounds", "1", "--tasks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["/v1/chat/completions", "whole"], ["/complete", "whole"]]


def test_workers_are_measured_without_what_would_take_their_cores(tmp_path: Path) -> None:
    short = ["--workers", "1,2", "--callers", "4", "--rounds", "1", "--seconds", "0.2"]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(BENCHMARKS / "workers.py"), *short], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["case", "workers"], ["hit", "1"], ["hit", "2"], ["miss", "1"], ["miss", "2"],
    ]  # fmt: skip
    assert left_running(tmp_path) == []


FROZEN = """
import gc
import anyio
from starlette.applications import Starlette

async def main():
    app = Starlette(lifespan=lifespan)
    assert gc.get_freeze_count() == 0
    async with app.router.lifespan_context(app):
        assert gc.get_freeze_count() > 10_000

anyio.run(main)
"""


def test_the_garbage_collector_is_frozen_as_the_page_shows() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs" / "performance.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(block) + FROZEN], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_stage_of_the_page_is_one_of_the_profile() -> None:
    stages = subprocess.run(
        [sys.executable, "-c", "import profiling; print(*[name for name, _ in profiling.STAGES], sep='\\n')"],
        capture_output=True, text=True, timeout=60, cwd=BENCHMARKS,
    ).stdout.splitlines()  # fmt: skip
    table = (CHECKOUT / "docs" / "performance.md").read_text().partition("| | hit | miss | stream |")[2].partition("| **")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:] if line] == stages


@pytest.mark.parametrize("arguments", [("--cases", "hits"), ("--rounds", "0"), ("--connections", "many")])
def test_wrong_arguments_are_told(arguments: tuple[str, str]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert f"argument {arguments[0]}" in done.stderr


def test_the_load_loop_counts_what_is_refused_and_what_breaks_off() -> None:
    answers = [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\nno",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ncut off",
    ]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for each in answers:
            await reader.readuntil(b"}")
            writer.write(each)
            await writer.drain()
        writer.close()

    async def loaded() -> dict[str, float]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            plan = {"ports": [server.sockets[0].getsockname()[1]], "path": "/", "headers": {}, "body": "{}", "unique": False}
            limits = {"connections": 2, "seconds": 30, "requests": 8}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "comparison.load", cwd=BENCHMARKS, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            told, _ = await process.communicate(json.dumps({**plan, **limits}).encode())
            figures: dict[str, float] = json.loads(told)
            return figures

    figures = asyncio.run(loaded())
    assert (figures["requests"], figures["refused"], figures["broken"]) == (6, 2, 2)
