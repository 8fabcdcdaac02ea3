"""Keeping the ledger small: what is older than the host wants is rolled up and pruned, now and then, beside the calls."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio

from .errors import AIGatewayError
from .policy.retention import Retention
from .protocols import Clock, IdempotencyStore, Ledger

EVERY_SECONDS = 3600.0
CLAIM = "retention"
HOLDER_BYTES = 16
RELEASE_SECONDS = 1.0
log = logging.getLogger("starlette_aigateway")


class Retainer:
    """Of all workers of the host, one does it in each hour: who claimed it in `claims`, where no call can have this key. Whoever dies
    in the middle leaves a ledger that adds up, and less to do for the next."""

    def __init__(
        self,
        ledger: Ledger,
        claims: IdempotencyStore,
        retention: Retention,
        *,
        clock: Clock,
        random: Callable[[int], bytes],
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._ledger = ledger
        self._claims = claims
        self._retention = retention
        self._clock = clock
        self._random = random
        self._sleep = sleep

    async def work(self) -> None:
        """For as long as a lifespan lasts."""
        if self._retention.records is None and self._retention.entries is None:
            return
        while True:
            try:
                await self.take_turn()
            except Exception as error:  # noqa: BLE001  # whatever a store raises, the gateway goes on, and the next hour comes
                log.warning("the ledger was not rolled up: %s: %s", type(error).__name__, error)
            await self._sleep(EVERY_SECONDS)

    async def take_turn(self) -> None:
        """Rolls up and prunes what is old enough, unless somebody did within the hour."""
        now, holder = self._clock(), self._random(HOLDER_BYTES).hex()
        claim = await self._claims.claim(CLAIM, CLAIM, holder=holder, until=now + EVERY_SECONDS, now=now)
        if claim.state != "claimed":
            return
        try:
            await self.retain(now)
        except BaseException:
            with anyio.move_on_after(RELEASE_SECONDS, shield=True), suppress(AIGatewayError):
                await self._claims.release(CLAIM, holder=holder)  # who starts next goes on where this one was stopped
            raise

    async def retain(self, now: float) -> None:
        """Holds whose week for a late settlement is over are forgotten first: they would keep their entries and their records."""
        await self._ledger.expire(now=now)
        if self._retention.entries is not None:
            await self._ledger.prune(max(0.0, now - self._retention.entries.total_seconds()))
        if self._retention.records is not None:
            await self._ledger.roll_up(max(0.0, now - self._retention.records.total_seconds()))
