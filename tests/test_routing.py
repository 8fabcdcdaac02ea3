"""Which target is tried next: a table of failures and steps, without a clock and without a network."""

from collections.abc import Mapping

import pytest

from starlette_aigateway import InvalidRequest, NoProviderAvailable, NotFound, ProviderError, ProviderRejected
from starlette_aigateway.policy import routing
from starlette_aigateway.policy.routing import Circuit, Failure, GiveUp, Plan, RetryPolicy, Step, Target, Try, ails

A, B = Target("a", "m"), Target("b", "m")
PLAN = Plan("m", (A, B))
FREE = ProviderError("busy", billed="no", status=503)
LOST = ProviderError("lost", billed="unknown")
REFUSED = ProviderRejected("bad", retryable=False, billed="no", status=400)


class Named:
    def __init__(self, name: str, models: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._models = models

    def serves(self, model: str) -> str | None:
        return model if self._models is None else self._models.get(model)


def step(
    *failures: tuple[Target, ProviderError], now: float = 10.0, deadline: float = 100.0, rounds: int = 2, shut: Target | None = None
) -> Step:
    return routing.next_step(
        PLAN,
        [Failure(target, error, 10.0) for target, error in failures],
        now=now,
        deadline=deadline,
        policy=RetryPolicy(rounds=rounds, backoff=0.5),
        opens_at=lambda target: 40.0 if target == shut else None,
    )


def test_a_plan_is_every_provider_that_serves_the_model_in_the_order_registered() -> None:
    routes = [Named("x", {"m": "vendor/m"}), Named("y"), Named("z", {"other": "o"})]
    planned = routing.plan("m", routes)
    assert planned.targets == (Target("x", "vendor/m"), Target("y", "m"))
    assert planned.fingerprint == "x:vendor/m|y:m"
    with pytest.raises(NotFound):
        routing.plan("m", [Named("z", {"other": "o"})])
    with pytest.raises(InvalidRequest):
        routing.plan("", routes)


def test_targets_are_tried_in_order_at_once() -> None:
    assert step() == Try(A, 0.0)
    assert step((A, FREE)) == Try(B, 0.0)
    assert step((A, LOST)) == Try(B, 0.0)


def test_what_another_would_refuse_as_well_ends_the_call() -> None:
    assert step((A, REFUSED)) == GiveUp(REFUSED)


def test_a_further_round_waits_and_only_goes_to_who_charged_nothing() -> None:
    assert step((A, FREE), (B, FREE)) == Try(A, 0.5)
    assert step((A, LOST), (B, FREE)) == Try(B, 0.5)
    assert step((A, LOST), (B, LOST)) == GiveUp(LOST)
    assert step((A, FREE), (B, FREE), rounds=1) == GiveUp(FREE)
    assert step((A, FREE), (B, FREE), (A, FREE), (B, FREE)) == GiveUp(FREE)


def test_the_backoff_doubles_and_a_longer_retry_after_is_obeyed_within_the_deadline() -> None:
    later = ProviderError("busy", billed="no", status=429, retry_after=20.0)
    assert step((A, FREE), (B, FREE), (A, FREE), rounds=3) == Try(B, 0.5)
    assert step((A, FREE), (B, LOST), (A, FREE), rounds=3) == Try(A, 1.0)
    assert step((A, later), (B, LOST)) == Try(A, 20.0)
    assert step((A, later), (B, LOST), deadline=25.0) == GiveUp(LOST)


def test_a_rejection_is_not_repeated_at_the_same_target() -> None:
    elsewhere = ProviderRejected("n above 1", retryable=True, billed="no")
    assert step((A, elsewhere)) == Try(B, 0.0)
    assert step((A, elsewhere), (B, LOST)) == GiveUp(LOST)


def test_an_open_circuit_is_passed_over_and_all_open_says_when() -> None:
    assert step(shut=A) == Try(B, 0.0)
    none = routing.next_step(PLAN, [], now=10.0, deadline=99.0, policy=RetryPolicy(), opens_at=lambda _: 25.0)
    assert isinstance(none, GiveUp)
    assert isinstance(none.error, NoProviderAvailable)
    assert none.error.retry_after == 15.0


def test_a_circuit_opens_after_failures_in_a_row_and_lets_one_try_after_its_cooldown() -> None:
    circuit = Circuit(threshold=2, cooldown=30.0)
    circuit.failed(1.0)
    circuit.succeeded()
    circuit.failed(2.0)
    assert circuit.opens_at(2.0) is None
    circuit.failed(3.0)
    assert circuit.opens_at(4.0) == 33.0
    assert circuit.opens_at(33.0) is None
    assert circuit.probe(33.0) == 3.0
    assert circuit.opens_at(34.0) == 63.0, "one call tries, the others wait for it"
    circuit.succeeded()
    assert circuit.opens_at(4.0) is None


@pytest.mark.parametrize(
    ("error", "ill"),
    [
        (FREE, True),
        (LOST, True),
        (REFUSED, False),
        (ProviderError("x", status=429, billed="no"), False),
        (ProviderError("x", status=404), False),
    ],
)
def test_what_speaks_of_a_target_s_health(error: ProviderError, ill: bool) -> None:
    assert ails(error) is ill
