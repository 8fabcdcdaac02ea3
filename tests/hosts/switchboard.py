"""How a server process and its test talk beside HTTP: JSON lines over TCP. A provider says that it has begun and waits to be told to go
on, so that no test has to guess how long anything takes."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
from anyio.abc import SocketStream

PATIENCE = 30.0
Said = dict[str, Any]


async def dial() -> SocketStream:
    """The end of the server process."""
    return await anyio.connect_tcp("127.0.0.1", int(os.environ["SWITCHBOARD"]))


async def say(**said: Any) -> None:
    async with await dial() as line:
        await line.send(json.dumps(said).encode() + b"\n")


class Switchboard:
    """The end of the test: everything that was said, in order, and the lines on which somebody waits."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._said: list[Said] = []
        self._lines: dict[str, socket.socket] = {}
        self._news = threading.Condition()
        threading.Thread(target=self._accept, daemon=True, name="switchboard").start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                line, _ = self._listener.accept()
                threading.Thread(target=self._hear, args=(line,), daemon=True).start()

    def _hear(self, line: socket.socket) -> None:
        token = None
        with line, suppress(OSError):  # a process that ends takes its lines with it
            for text in line.makefile():
                said = json.loads(text)
                if said["kind"] == "begun":
                    token = said["token"]
                    self._lines[token] = line
                self._note(said)
        if token is not None:
            self._note({"kind": "ended", "token": token})

    def _note(self, said: Said) -> None:
        with self._news:
            self._said.append(said)
            self._news.notify_all()

    def heard(self, kind: str, **facts: Any) -> list[Said]:
        return [said for said in [*self._said] if said["kind"] == kind and facts.items() <= said.items()]

    def wait(self, kind: str, **facts: Any) -> Said:
        """The first of this kind that says so, when it has come."""
        with self._news:
            assert self._news.wait_for(lambda: self.heard(kind, **facts), PATIENCE), f"no {kind} {facts}; heard {self._said}"
        return self.heard(kind, **facts)[0]

    def go(self, token: str) -> None:
        """Lets the provider of this stream go on."""
        self.wait("begun", token=token)
        self._lines[token].sendall(b"go\n")

    def close(self) -> None:
        self._listener.close()


@contextmanager
def switchboard() -> Iterator[Switchboard]:
    board = Switchboard()
    try:
        yield board
    finally:
        board.close()
