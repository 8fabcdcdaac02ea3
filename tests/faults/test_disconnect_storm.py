"""Callers that leave over real sockets, many at a time: nothing lost, nothing left open."""

from pathlib import Path

import pytest

from starlette_aigateway.drains import OnDisconnect

from .disconnect_storm import storm


@pytest.mark.parametrize("mode", ["drain", "cancel"])
@pytest.mark.parametrize("seed", [1, 2])
def test_in_a_storm_of_disconnects_every_call_is_booked_exactly_or_marked_and_above_its_charge(
    tmp_path: Path, mode: OnDisconnect, seed: int
) -> None:
    summary = storm(60, seed, mode, tmp_path)
    assert summary.holds, summary
    assert summary.charged_calls > 20
    if mode == "drain":
        assert summary.booked == summary.charged
    else:
        assert summary.outcomes["estimated"] > 0
