"""One connection: bytes in, bytes out, and how long it may be silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from ...errors import ProviderTimeout
from .answer import Answer

KEEP_ALIVE_SECONDS = 55.0
PIECE_BYTES = 2**18


class Connection(asyncio.Protocol):
    """Carries one exchange after the other. `lost` is called once, when it is closed.

    One timer looks after both the silence of the other side and the idle time: it is not moved when something happens, it looks at
    when that was.
    """

    def __init__(self, lost: Callable[[Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._closed = False
        self._unsent = memoryview(b"")
        self._choked = False
        self._heard = 0.0
        self._patience = KEEP_ALIVE_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    @property
    def usable(self) -> bool:
        """Whether a request may go out on it: nothing was heard of the other side since it came to rest, and that is not long ago."""
        transport = self._transport
        return (
            not self._closed
            and transport is not None
            and not transport.is_closing()
            and self._loop.time() - self._heard <= KEEP_ALIVE_SECONDS
        )

    def ask(self, head: bytes, body: bytes, *, patience: float) -> Answer:
        """Sends a request, or as much of it as the other side takes now; the rest follows. The other side may be silent for `patience`
        seconds."""
        assert self._transport is not None
        assert self._answer is None
        self._patience = patience
        self._answer = answer = Answer(self)
        if len(body) <= PIECE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._unsent = memoryview(body)
            self._send_on()
        return answer

    def rest(self) -> bool:
        """Ends the exchange. Whether another may follow; if not, the connection is closed."""
        answer, self._answer = self._answer, None
        clean = answer is not None and answer.leave() and not self._unsent
        if not clean or self._closed or self._transport is None or self._transport.get_write_buffer_size():
            self.abort()
            return False
        self._patience = KEEP_ALIVE_SECONDS
        self._watch()
        return True

    def abort(self) -> None:
        """Closes at once. `lost` is called soon after."""
        self._closed = True
        if self._answer is not None:
            self._answer.broke(None)
        if self._transport is not None:
            self._transport.abort()

    # -- for the answer

    def listen(self) -> asyncio.Future[None]:
        self._watch()
        return self._loop.create_future()

    def pause_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # -- for asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        if self._answer is None:  # nobody asked
            self.abort()
        else:
            self._answer.feed(data)

    def eof_received(self) -> None:
        self._closed = True
        if self._answer is not None:
            self._answer.ended()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed = True
        self._unsent = memoryview(b"")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._answer is not None and error is None:
            self._answer.ended()
        elif self._answer is not None:
            self._answer.broke(error)
        self._lost(self)

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._heard = self._loop.time()
        self._send_on()

    def _send_on(self) -> None:
        while self._unsent and not self._choked and self._transport is not None and not self._transport.is_closing():
            piece, self._unsent = self._unsent[:PIECE_BYTES], self._unsent[PIECE_BYTES:]
            self._transport.write(piece)

    # -- time

    def _watch(self) -> None:
        """Patience counts from now on."""
        self._heard = self._loop.time()
        self._look_at(self._heard + self._patience)

    def _look_at(self, moment: float) -> None:
        """Looks at what has happened no later than at `moment`."""
        if self._timer is not None:
            if self._due <= moment:
                return
            self._timer.cancel()
        self._due = moment
        self._timer = self._loop.call_at(moment, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        answer = self._answer
        if answer is not None and not answer.awaited:  # whoever reads is slow, not the other side
            self._look_at(now + self._patience)
        elif now < self._heard + self._patience:
            self._look_at(self._heard + self._patience)
        else:
            if answer is not None:
                answer.fail(ProviderTimeout("the provider was silent for too long"))
            self.abort()
