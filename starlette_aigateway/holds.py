"""The holds of calls: asked for, settled, released. Whatever comes in between, none is left for its lease to end while the process lives.

All of it is shielded, with deadlines: neither a client that leaves nor a job's own deadline can cut it off.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Any

import anyio

from .accounts import Hold, HoldRequest, Settlement, UsageRecord
from .background import Job
from .errors import AIGatewayError, RequestError, StorageUnavailable
from .outbox import End, Outbox
from .protocols import Ledger
from .types import Timeouts

RETRY_SECONDS = 0.1
log = logging.getLogger("starlette_aigateway")


class Holds:
    def __init__(self, ledger: Ledger, outbox: Outbox, timeouts: Timeouts) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._timeouts = timeouts

    async def reserve(self, job: Job[Any], request: HoldRequest, now: float) -> Hold:
        """Raises what refuses the hold, and `StorageUnavailable`. Where it is not known whether it was granted, it is given back: the
        ledger takes what is asked of it in order, so a release by its id comes after it."""
        if self._outbox.waiting:
            await self._outbox.pass_by()
            self._outbox.admit()
        with job.critical(2 * self._timeouts.storage) as scope:
            try:
                return await self._ledger.reserve(request, now=now)
            except RequestError:
                raise
            except Exception as error:
                self._outbox.put(request.id, None)
                if isinstance(error, AIGatewayError):
                    raise
                raise StorageUnavailable("the ledger failed", retry_after=1.0) from error
            except BaseException:
                self._outbox.put(request.id, None)
                if not scope.cancel_called:  # the event loop is being closed: nobody comes after this
                    await self._last_try(job, request.id, None)
                raise
        raise StorageUnavailable("the ledger did not answer in time", retry_after=1.0)

    def settle(self, job: Job[Any], hold: Hold, settlement: Settlement) -> Awaitable[UsageRecord | None]:
        """Retried while the ledger is away. None: it stayed away and is told later, or the hold is unknown to it."""
        return self._end(job, hold, settlement)

    async def release(self, job: Job[Any], hold: Hold) -> None:
        await self._end(job, hold, None)

    async def _end(self, job: Job[Any], hold: Hold, end: End) -> UsageRecord | None:
        try:
            with job.critical(self._timeouts.settle):
                while True:
                    try:
                        return await self._outbox.tell(hold.id, end)
                    except Exception as error:  # noqa: BLE001  # whatever a ledger raises, what a call cost is not forgotten
                        log.debug("hold %s could not be ended (%s); it is tried again", hold.id, type(error).__name__)
                    await anyio.sleep(RETRY_SECONDS)
        except BaseException:
            self._outbox.put(hold.id, end)
            await self._last_try(job, hold.id, end)
            raise
        log.error("hold %s could not be ended in time; it is tried until the ledger takes it", hold.id)
        self._outbox.put(hold.id, end)
        return None

    async def _last_try(self, job: Job[Any], hold_id: str, end: End) -> None:
        with job.critical(self._timeouts.settle):
            await self._outbox.try_once(hold_id, end)
