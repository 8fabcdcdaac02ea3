"""Which provider answers, in what order, and what follows a failure. Pure: `now` and the failures come in, a step goes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from msgspec import Struct

from ..errors import InvalidArgument, InvalidRequest, NoProviderAvailable, NotFound, ProviderError, ProviderRejected


class Route(Protocol):
    """A registered provider, as far as routing looks: its name, and what it calls a public model name (None: does not serve it)."""

    @property
    def name(self) -> str: ...

    def serves(self, model: str) -> str | None: ...


class Target(Struct, frozen=True, gc=False):
    """One provider and the upstream's name of the model."""

    provider: str
    upstream: str


class Plan(Struct, frozen=True, gc=False):
    """The targets of one model, in the order in which they are tried. `fingerprint` tells two plans apart in a cache key."""

    model: str
    targets: tuple[Target, ...]
    fingerprint: str = ""


def plan(model: str, routes: Sequence[Route]) -> Plan:
    """Every registered provider that serves `model`, in the order registered. Raises `NotFound` (`model_not_found`)."""
    if not model:
        raise InvalidRequest("model is required: name the model, or a prompt whose settings do", param="model")
    targets = tuple(Target(route.name, upstream) for route in routes if (upstream := route.serves(model)) is not None)
    if not targets:
        raise NotFound(f"no provider serves the model {model!r}; GET v1/models lists the models", code="model_not_found", param="model")
    return Plan(model, targets, "|".join(f"{target.provider}:{target.upstream}" for target in targets))


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """`rounds` is how often the targets are gone through at the most; `backoff` the seconds before the second round, doubled for each
    further one. A `Retry-After` that is longer is obeyed, as long as the call's deadline allows it."""

    rounds: int = 2
    backoff: float = 0.5

    def __post_init__(self) -> None:
        """Raises `InvalidArgument`."""
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise InvalidArgument("rounds must be an integer of at least 1", param="rounds")
        if isinstance(self.backoff, bool) or not isinstance(self.backoff, int | float) or not 0 <= self.backoff < math.inf:
            raise InvalidArgument("backoff must be a number of seconds", param="backoff")


class Failure(Struct, frozen=True):
    target: Target
    error: ProviderError
    at: float


class Try(Struct, frozen=True):
    """Try `target`, after `delay` seconds."""

    target: Target
    delay: float


class GiveUp(Struct, frozen=True):
    """Nothing is left to try: raise `error`."""

    error: ProviderError


Step: TypeAlias = Try | GiveUp


def next_step(
    plan: Plan,
    failures: Sequence[Failure],
    *,
    now: float,
    deadline: float,
    policy: RetryPolicy,
    opens_at: Callable[[Target], float | None],
) -> Step:
    """What to do after `failures` (seconds on the same clock for `now`, `deadline` and `opens_at`).

    A failure that another provider would repeat ends the call. Within a round the next target is tried at once. A further round only
    tries targets that charged nothing, so that a retry cannot bill twice at one provider.
    """
    if failures and not failures[-1].error.retryable:
        return GiveUp(failures[-1].error)
    by_target: dict[Target, list[Failure]] = {}
    for failure in failures:
        by_target.setdefault(failure.target, []).append(failure)
    for target in plan.targets:
        if target not in by_target and opens_at(target) is None:
            return Try(target, 0.0)
    retry = _soonest_retry(plan, by_target, now, policy)
    if retry is not None and now + retry.delay < deadline:
        return retry
    return GiveUp(failures[-1].error if failures else _all_open(plan, now, opens_at))


def _soonest_retry(plan: Plan, failures: Mapping[Target, Sequence[Failure]], now: float, policy: RetryPolicy) -> Try | None:
    candidates = []
    for target in plan.targets:
        past = failures.get(target, ())
        if not past or len(past) >= policy.rounds or any(_would_repeat(failure.error) for failure in past):
            continue
        last = past[-1]
        wait = max(policy.backoff * 2 ** (len(past) - 1), last.error.retry_after or 0.0)
        candidates.append(Try(target, max(0.0, last.at + wait - now)))
    return min(candidates, key=lambda retry: retry.delay, default=None)


def _would_repeat(error: ProviderError) -> bool:
    """Whether asking the same target again bills again, or brings the same refusal of the request again."""
    return error.billed != "no" or isinstance(error, ProviderRejected)


def _all_open(plan: Plan, now: float, opens_at: Callable[[Target], float | None]) -> ProviderError:
    waits = [moment - now for target in plan.targets if (moment := opens_at(target)) is not None]
    return NoProviderAvailable(
        f"every provider of {plan.model!r} has been failing; the gateway lets it recover before it asks again",
        retryable=True,
        billed="no",
        retry_after=max(0.0, min(waits, default=0.0)),
    )


class Circuit(Struct):
    """The breaker of one target: after `threshold` failures in a row it stays open for `cooldown` seconds, then one call tries."""

    threshold: int = 5
    cooldown: float = 30.0
    failures: int = 0
    opened_at: float | None = None

    def opens_at(self, now: float) -> float | None:
        """When the target may be asked again, None if now."""
        if self.opened_at is None or now >= self.opened_at + self.cooldown:
            return None
        return self.opened_at + self.cooldown

    def probe(self, now: float) -> float | None:
        """A call tries a target whose circuit was open: for others it stays open until that one is through. Since when it was open."""
        opened_at = self.opened_at
        if opened_at is not None:
            self.opened_at = now
        return opened_at

    def succeeded(self) -> None:
        self.failures = 0
        self.opened_at = None

    def failed(self, now: float) -> None:
        self.failures += 1
        if self.failures >= self.threshold:
            self.opened_at = now


def ails(error: ProviderError) -> bool:
    """Whether a failure speaks of the target's health: not what the request caused, and not its own rate limit."""
    if not error.retryable or isinstance(error, ProviderRejected):
        return False
    return error.status is None or error.status in (408, 504, 524) or error.status >= 500
