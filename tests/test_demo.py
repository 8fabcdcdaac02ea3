"""`scripts/demo` and its tour, as a person runs them; only the environment that the shell script sees to is there already."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
DEMO = [sys.executable, str(CHECKOUT / "scripts" / "demo.py")]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIGATEWAY_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("AIGATEWAY_ADMIN_TOKEN", "letmein")
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process in a session of its own, ended at the end of the block if it has not been by then."""
    command = [*DEMO, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said_until(process: subprocess.Popen[str], last: str) -> str:
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if last in line:
            return "".join(lines)
    raise AssertionError(f"it ended without saying {last!r}: {''.join(lines)}")


def test_the_tour_shows_every_stop_and_each_comes_out_as_it_should(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--tour"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for stop in ("A completion", "The same again", "A stream", "A rate limit", "A spend cap", "A fallback", "The usage report"):
        assert stop in done.stdout
    assert "Everything came out as it should." in done.stdout


WRONG_STOP = """
import sys
sys.path.insert(0, {scripts!r})
import tour

def forgets_to_bill(guide):
    tour.completion(guide)
    guide.paid.cost += 1
    tour.reported(guide)

tour.STOPS = [("A bill that is wrong", forgets_to_bill), ("A completion", tour.completion)]
sys.exit(tour.run(patient=False))
"""


def test_a_tour_on_which_something_is_wrong_says_so_and_fails() -> None:
    code = WRONG_STOP.format(scripts=str(CHECKOUT / "scripts"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "wrong:" in done.stdout
    assert "2 of 2 came out wrong." in done.stdout, "the second completion is a cache hit, which it checks"


def test_what_the_demo_prints_works_as_printed_and_ctrl_c_ends_it_cleanly() -> None:
    with demo("--port", "0") as process:
        said = said_until(process, "Ctrl-C stops it.")
        key = re.search(r"aigw_\w{49}", said)
        assert key is not None

        lines = said.splitlines()
        for start in (number for number, line in enumerate(lines) if line.startswith("curl ")):
            end = next(number for number in range(start, len(lines)) if not lines[number].endswith("\\"))
            answer = run_curl("\n".join(lines[start : end + 1]))
            assert answer, lines[start]
        start = next(number for number, line in enumerate(lines) if line.startswith("from openai"))
        client = subprocess.run([sys.executable, "-c", "\n".join(lines[start : start + 3])], capture_output=True, text=True, timeout=60)
        assert client.stdout == "hello\n", client.stderr

        os.kill(process.pid, signal.SIGINT)
        _, complaints = process.communicate(timeout=30)
        assert process.returncode == 0
        assert complaints == ""


def run_curl(command: str) -> str:
    assert shutil.which("curl"), "the printed lines use curl"
    done = subprocess.run(["bash", "-c", command.replace("curl ", "curl --silent --show-error --fail ", 1)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_port_that_is_taken_is_told_and_another_one_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo("--json", "--port", str(port)) as process:
            where = json.loads(said_until(process, "url"))
            assert f":{port}/" not in where["url"]
            assert httpx.get(f"{where['url']}/healthz").status_code == 200
            process.terminate()
            _, complaints = process.communicate(timeout=30)
            assert complaints.startswith(f"Port {port} is taken")
            assert "Traceback" not in complaints
