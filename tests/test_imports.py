"""What `import starlette_aigateway` loads in an environment where everything is installed."""

import subprocess
import sys

LOADED_WHEN_USED = {
    "aiohttp", "anthropic", "click", "diskcache", "django", "fastapi", "genai_prices", "httptools", "httpx", "httpx2", "openai",
    "pytest", "rich", "trio", "uvicorn", "uvloop", "yarl",
}  # fmt: skip


def test_what_only_some_hosts_use_is_loaded_when_it_is_used() -> None:
    code = "import sys, starlette_aigateway; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) & LOADED_WHEN_USED == set()
