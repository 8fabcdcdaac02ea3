"""What administrators did, written down before it is done: nothing happens that is not in the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .accounts import AdminAction
from .policy import audit
from .policy.keys import mint_id
from .protocols import AuditStore, Clock
from .types import check_id

HOST = "host"
"""The actor of what the host's own code does and does not name one for."""


class Trail:
    def __init__(self, store: AuditStore, clock: Clock, random: Callable[[int], bytes]) -> None:
        self.store = store
        self._clock = clock
        self._random = random
        self._last = 0.0

    async def record(
        self, actor: str, action: str, subject: str, tenant: str | None = None, details: Mapping[str, Any] | None = None
    ) -> None:
        """Durable when it returns. Raises `StorageUnavailable`: then nothing may be done; `InvalidArgument` for an actor that is none."""
        check_id(actor, "actor")
        now = self._clock()
        self._last = max(now, self._last + 0.001)  # ids count in milliseconds, and what follows one another is to stand in that order
        await self.store.add(
            AdminAction(
                id=mint_id("act_", self._last, self._random),
                created_at=now,
                actor=actor,
                action=action,
                subject=subject,
                tenant=tenant,
                details=audit.told(details or {}),
            )
        )
