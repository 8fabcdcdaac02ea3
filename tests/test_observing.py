"""Observers are the host's code: none of them can hold up those beside it, or the worker that tells them."""

import anyio
import pytest

from starlette_aigateway import deadlines, observing
from starlette_aigateway.events import AdminActed, Event
from starlette_aigateway.observing import Observers
from starlette_aigateway.protocols import Observer

pytestmark = pytest.mark.anyio
EVENT = AdminActed(actor="root", action="key.create", subject="key_1")


async def deaf(event: Event) -> None:
    await anyio.sleep_forever()


async def stubborn(event: Event) -> None:
    """Takes the first cancellation for something else."""
    try:
        await anyio.sleep_forever()
    except anyio.get_cancelled_exc_class():
        await anyio.sleep_forever()


async def broken(event: Event) -> None:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(("observer", "reason"), [(deaf, "TimeoutError"), (stubborn, "TimeoutError"), (broken, "RuntimeError")])
async def test_an_observer_that_fails_is_told_to_the_log_and_the_next_one_hears(
    observer: Observer, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observing, "OBSERVER_SECONDS", 0.01)
    monkeypatch.setattr(deadlines, "AGAIN_SECONDS", 0.01)
    heard: list[Event] = []

    async def attentive(event: Event) -> None:
        heard.append(event)

    observers = Observers([observer, attentive])
    observers.emit(EVENT)
    observers.emit(EVENT)
    with anyio.fail_after(20):
        await observers.flush()
    assert heard == [EVENT, EVENT]
    assert [record.getMessage() for record in caplog.records] == [f"an observer failed: {reason}"] * 2
