"""Another process that has a file of the gateway locked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD_THE_LOCK_FILE = "import fcntl; lock = open(path + '.lock', 'r+b'); fcntl.flock(lock, fcntl.LOCK_EX)"
BEGIN = "import sqlite3; db = sqlite3.connect(path, isolation_level=None); db.execute('BEGIN {}')"


@contextmanager
def holder(code: str, path: Path) -> Iterator[None]:
    """Another process that has done `code` for as long as the block lasts."""
    code = f"import sys; path = sys.argv[1]; {code}; print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()
        assert process.wait(20) == 0
