"""The limiter: what a caller of it is told, over our storage and over the in-process one of `limits`."""

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from limits.aio.storage import MemoryStorage
from limits.aio.storage.memcached import MemcachedStorage

from starlette_aigateway.errors import ConfigurationError, InvalidRequest, RateLimitExceeded, StorageUnavailable
from starlette_aigateway.limiter import ClaimItem, Limiter, SharedWindows
from starlette_aigateway.policy.windows import WindowClaim
from starlette_aigateway.stores.windows.storage import FileWindowStorage
from starlette_aigateway.testing.clock import FakeClock
from starlette_aigateway.testing.windows import MICROSECOND, requests, tokens

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def limiter(tmp_path: Path, clock: FakeClock) -> AsyncIterator[Limiter]:
    async with FileWindowStorage(path=tmp_path / "windows.log", clock=clock) as storage:
        yield Limiter(storage, clock=clock)


async def remaining(limiter: Limiter, *claims: WindowClaim) -> Sequence[int]:
    return [state.remaining for state in await limiter.peek(claims)]


async def test_no_claims_are_admitted_without_touching_the_storage(tmp_path: Path, clock: FakeClock) -> None:
    limiter = Limiter(FileWindowStorage(path=tmp_path / "no" / "windows.log"), clock=clock)
    assert await limiter.admit([]) == ()
    assert await limiter.peek([]) == ()
    await limiter.correct([], 5)
    await limiter.correct([requests(5)], 5)
    await limiter.correct([tokens(50, 5)], 5)
    assert list(tmp_path.iterdir()) == []


async def test_admitting_tells_each_window_in_the_order_of_the_claims(limiter: Limiter) -> None:
    claims = [requests(60), tokens(1000, 100), requests(500, scope="gateway")]
    states = await limiter.admit(claims)
    assert [state.claim for state in states] == claims
    assert [state.remaining for state in states] == [59, 900, 499]


async def test_a_refusal_says_whose_which_and_how_long(limiter: Limiter, clock: FakeClock) -> None:
    claims = [requests(10), requests(2, scope="tenant:secret-customer")]
    await limiter.admit(claims)
    clock.advance(12.5)
    await limiter.admit(claims)
    with pytest.raises(RateLimitExceeded) as caught:
        await limiter.admit(claims)
    error = caught.value
    assert (error.scope, error.window, error.limit, error.retry_after) == ("tenant", "requests", 2, 47.5)
    assert [state.remaining for state in error.states] == [8, 0]
    assert str(error) == "rate limit exceeded: at most 2 requests per minute for this tenant; retry in 47.500 seconds"


async def test_probing_says_what_admitting_would_and_takes_nothing(limiter: Limiter, clock: FakeClock) -> None:
    claims = [requests(2), tokens(100, 60)]
    for _ in range(3):
        states, error = await limiter.probe(claims)
        assert ([state.remaining for state in states], error) == ([2, 100], None)
    await limiter.admit(claims)
    clock.advance(7)
    states, error = await limiter.probe(claims)
    with pytest.raises(RateLimitExceeded) as caught:
        await limiter.admit(claims)
    assert isinstance(error, RateLimitExceeded)
    assert (str(error), error.retry_after, error.details) == (str(caught.value), caught.value.retry_after, caught.value.details)
    assert [state.remaining for state in states] == [1, 40]
    assert await limiter.probe([]) == ((), None)


async def test_probing_tells_of_a_claim_that_is_larger_than_any_window(limiter: Limiter) -> None:
    claims = [requests(2), tokens(100, 10**12)]
    states, error = await limiter.probe(claims)
    assert error is not None
    assert (error.code, [state.remaining for state in states]) == ("request_too_large_for_limit", [2, 100])


async def test_after_exactly_the_wait_the_same_call_gets_in(limiter: Limiter, clock: FakeClock) -> None:
    claims = [requests(2), tokens(100, 60), tokens(150, 60, scope="gateway")]
    await limiter.admit(claims)
    clock.advance(7)
    with pytest.raises(RateLimitExceeded) as caught:
        await limiter.admit(claims)
    wait = caught.value.retry_after
    assert wait is not None
    clock.advance(wait - MICROSECOND)
    with pytest.raises(RateLimitExceeded):
        await limiter.admit(claims)
    clock.advance(MICROSECOND)
    assert len(await limiter.admit(claims)) == 3


async def test_tokens_above_the_whole_limit_are_an_invalid_request(limiter: Limiter) -> None:
    with pytest.raises(InvalidRequest, match=r"5000 tokens.*1000 tokens per minute.*lower max_tokens") as caught:
        await limiter.admit([requests(60), tokens(1000, 5000)])
    assert caught.value.code == "request_too_large_for_limit"
    assert caught.value.param == "max_tokens"
    assert await remaining(limiter, requests(60)) == [60]


async def test_other_periods_are_named(limiter: Limiter) -> None:
    claim = requests(1, scope="login:192.0.2.7", seconds=300)
    await limiter.admit([claim])
    with pytest.raises(RateLimitExceeded, match="1 requests per 300 seconds for this login") as caught:
        await limiter.admit([claim])
    assert "192.0.2.7" not in str(caught.value)


async def test_tokens_are_corrected_to_what_was_used(limiter: Limiter) -> None:
    claims = [requests(5), tokens(1000, 800), tokens(5000, 800, scope="tenant:t")]
    await limiter.admit(claims)
    await limiter.correct(claims, 300)
    assert await remaining(limiter, *claims) == [4, 700, 4700]
    await limiter.correct([tokens(1000, 300), tokens(5000, 300, scope="tenant:t")], 900)
    assert await remaining(limiter, *claims) == [4, 100, 4100]


async def test_a_correction_waits_for_nothing_and_whatever_is_asked_later_finds_it_done(limiter: Limiter) -> None:
    claims = [tokens(1000, 800)]
    await limiter.admit(claims)
    with pytest.raises(StopIteration):
        limiter.correct(claims, 300).send(None)
    assert (await limiter.admit([tokens(1000, 600)]))[0].remaining == 100


async def test_a_late_correction_is_told_when_the_call_began(limiter: Limiter, clock: FakeClock) -> None:
    began, claims = clock(), [tokens(1000, 800)]
    await limiter.admit(claims)
    clock.advance(90)
    await limiter.admit([tokens(1000, 100)])
    await limiter.correct(claims, 200, admitted_at=began)
    assert await remaining(limiter, *claims) == [800], "half of the 200 of the last minute, and 100"


async def test_a_changed_limit_keeps_what_was_used(limiter: Limiter) -> None:
    for _ in range(3):
        await limiter.admit([requests(3)])
    with pytest.raises(RateLimitExceeded):
        await limiter.admit([requests(2)])
    assert (await limiter.admit([requests(4)]))[0].remaining == 0


def test_the_name_of_a_window_leaves_its_limit_out() -> None:
    assert ClaimItem(requests(3)).key_for("principal:a", "requests") == requests(7).key == "aigateway/principal:a/requests/60"


# --- a storage that is down -------------------------------------------------------------------------------------------


@pytest.fixture
async def broken(tmp_path: Path) -> AsyncIterator[FileWindowStorage]:
    (tmp_path / "windows.log").mkdir()
    async with FileWindowStorage(path=tmp_path / "windows.log") as storage:
        yield storage


async def test_a_storage_that_is_down_refuses_every_call(broken: FileWindowStorage, clock: FakeClock) -> None:
    limiter = Limiter(broken, clock=clock)
    with pytest.raises(StorageUnavailable):
        await limiter.admit([requests(5)])
    with pytest.raises(StorageUnavailable):
        await limiter.peek([requests(5)])


async def test_fail_open_lets_through_and_says_so_once(
    broken: FileWindowStorage, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = Limiter(broken, clock=clock, fail_open=True)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert await limiter.admit([requests(5)]) == ()
    assert sum("rate limits failed, calls are let through" in record.message for record in caplog.records) == 1


async def test_a_correction_never_raises_for_the_storage(
    broken: FileWindowStorage, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = Limiter(broken, clock=clock)
    for _ in range(3):
        await limiter.correct([tokens(100, 50)], 10)
    with pytest.raises(StorageUnavailable):  # which is asked after the corrections, so that they have failed by then
        await limiter.peek([tokens(100, 50)])
    assert sum("stay charged as estimated" in record.message for record in caplog.records) == 1


async def test_an_outage_is_reported_anew_after_it_was_over(tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "windows.log"
    async with FileWindowStorage(path=path, clock=clock) as storage:
        limiter = Limiter(storage, clock=clock, fail_open=True)
        for _ in range(2):
            storage.close()
            path.unlink()
            path.mkdir()
            assert await limiter.admit([requests(5)]) == ()
            path.rmdir()
            assert (await limiter.admit([requests(5)]))[0].remaining == 4
    assert sum("calls are let through" in record.message for record in caplog.records) == 2


class FaultyStorage(MemoryStorage):
    """Not registered: no scheme of its own."""

    STORAGE_SCHEME = None  # type: ignore[assignment]  # an abstract storage of `limits` has none

    @property
    def base_exceptions(self) -> type[Exception]:
        return ConnectionError

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        raise ConnectionError("secret-host:6379 refused")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_faults_of_any_storage_are_storage_unavailable_and_name_no_host(clock: FakeClock) -> None:
    with pytest.raises(StorageUnavailable) as caught:
        await Limiter(FaultyStorage(), clock=clock).admit([requests(5)])
    assert "secret-host" not in str(caught.value)


# --- any other storage of limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # the storages of limits know asyncio only
class TestOverMemoryOfLimits:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        clock = FakeClock()
        monkeypatch.setattr("limits.aio.storage.memory.time.time", clock)
        return clock

    @pytest.fixture
    def limiter(self, clock: FakeClock) -> Limiter:
        return Limiter(MemoryStorage(), clock=clock)

    async def test_lets_in_as_many_as_the_limit_and_no_more(self, limiter: Limiter, clock: FakeClock) -> None:
        for left in (2, 1, 0):
            assert [state.remaining for state in await limiter.admit([requests(3), tokens(100, 10)])] == [left, 70 + 10 * left]
            clock.advance(1)
        with pytest.raises(RateLimitExceeded) as caught:
            await limiter.admit([requests(3), tokens(100, 10)])
        assert caught.value.retry_after == 57
        assert await remaining(limiter, requests(3), tokens(100, 0)) == [0, 70]

    async def test_the_wait_of_tokens_is_true(self, limiter: Limiter, clock: FakeClock) -> None:
        await limiter.admit([tokens(1000, 700)])
        clock.advance(20)
        for amount in (301, 800):
            with pytest.raises(RateLimitExceeded) as caught:
                await limiter.admit([tokens(1000, amount)])
            assert caught.value.retry_after is not None
            clock.advance(caught.value.retry_after + MICROSECOND)  # limits reckons with floats
            await limiter.admit([tokens(1000, amount)])

    async def test_a_changed_limit_keeps_what_was_used(self, limiter: Limiter) -> None:
        for _ in range(3):
            await limiter.admit([requests(3)])
        with pytest.raises(RateLimitExceeded):
            await limiter.admit([requests(2)])
        assert (await limiter.admit([requests(4)]))[0].remaining == 0

    async def test_more_tokens_are_charged_and_fewer_stay_charged(self, limiter: Limiter) -> None:
        await limiter.admit([tokens(100, 50)])
        await limiter.correct([tokens(100, 50)], 10)
        assert await remaining(limiter, tokens(100, 0)) == [50]
        await limiter.correct([tokens(100, 50)], 130)
        assert await remaining(limiter, tokens(200, 0)) == [70]

    async def test_an_unused_window_is_as_unused_as_it_looks(self, limiter: Limiter) -> None:
        states = await limiter.peek([requests(3), tokens(100, 0)])
        assert [(state.remaining, state.reset_after) for state in states] == [(3, 0), (100, 0)]


def test_a_storage_without_sliding_windows_is_refused() -> None:
    class WithoutWindows(MemcachedStorage):
        STORAGE_SCHEME = None  # type: ignore[assignment]  # not registered

        def __init__(self) -> None:
            """Connects to nothing."""

    with pytest.raises(ConfigurationError, match="no sliding windows"):
        Limiter(WithoutWindows(), clock=FakeClock())


def test_our_storage_is_taken_as_shared_windows_and_memory_is_not(tmp_path: Path) -> None:
    ours: SharedWindows = FileWindowStorage(path=tmp_path / "windows.log")
    assert isinstance(ours, SharedWindows)
    assert not isinstance(MemoryStorage(), SharedWindows)
