"""Servers as processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .switchboard import PATIENCE

OURS = dict(os.environ)
"""Read once: servers are started by threads, and pytest changes the environment between two tests while one of them reads it."""


@contextmanager
def serving(command: Sequence[str], ready: str, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs `command` in `folder`, with `environment` beside that of the tests. It serves when it has written `ready`; at the end it is
    stopped by SIGTERM and waited for."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**OURS, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        output = Output(process)
        try:
            output.wait_for(ready)
            yield
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
        except BaseException as error:
            error.add_note(f"{' '.join(command)}\n{output.text}")
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Output:
    """What a process writes, read all the time: a full pipe would stop it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._ended = False
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed meanwhile
            for line in self._process.stdout:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, sign: str) -> None:
        with self._news:
            self._news.wait_for(lambda: self._ended or sign in self.text, PATIENCE)
        assert sign in self.text, "the server did not start"

    @property
    def text(self) -> str:
        return "".join(self._lines)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
