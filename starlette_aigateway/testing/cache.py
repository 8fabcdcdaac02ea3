"""What a response cache promises. Subclass and give the fixtures; every test then runs against your backend."""

from __future__ import annotations

import hashlib

import anyio

from ..protocols import ResponseCache
from .clock import FakeClock


def key(name: str) -> str:
    """A key as the gateway makes them: 64 hexadecimal digits."""
    return hashlib.sha256(name.encode()).hexdigest()


class ResponseCacheContract:
    """Fixtures: `cache`, an empty cache that reads `clock`; `clock`, a `FakeClock`. Mark the subclass with `pytest.mark.anyio`."""

    async def test_what_was_put_is_what_is_got(self, cache: ResponseCache) -> None:
        await cache.put(key("a"), b"answer", 60)
        assert await cache.get(key("a")) == b"answer"

    async def test_an_unknown_key_is_a_miss(self, cache: ResponseCache) -> None:
        await cache.put(key("a"), b"answer", 60)
        assert await cache.get(key("b")) is None

    async def test_every_byte_is_kept(self, cache: ResponseCache) -> None:
        value = bytes(range(256)) * 64 + b"\x00"
        await cache.put(key("a"), value, 60)
        assert await cache.get(key("a")) == value

    async def test_an_empty_value_is_a_hit(self, cache: ResponseCache) -> None:
        await cache.put(key("a"), b"", 60)
        assert await cache.get(key("a")) == b""

    async def test_a_large_value_is_kept_whole(self, cache: ResponseCache) -> None:
        value = b"0123456789abcdef" * 65_536
        await cache.put(key("a"), value, 60)
        assert await cache.get(key("a")) == value

    async def test_the_last_put_holds(self, cache: ResponseCache) -> None:
        await cache.put(key("a"), b"first", 60)
        await cache.put(key("a"), b"second", 60)
        assert await cache.get(key("a")) == b"second"

    async def test_an_entry_is_gone_when_its_time_is_over(self, cache: ResponseCache, clock: FakeClock) -> None:
        await cache.put(key("a"), b"answer", 60)
        clock.advance(59.5)
        assert await cache.get(key("a")) == b"answer"
        clock.advance(0.5)
        assert await cache.get(key("a")) is None

    async def test_a_new_put_begins_a_new_time(self, cache: ResponseCache, clock: FakeClock) -> None:
        await cache.put(key("a"), b"answer", 60)
        clock.advance(50)
        await cache.put(key("a"), b"answer", 60)
        clock.advance(50)
        assert await cache.get(key("a")) == b"answer"

    async def test_no_time_to_live_keeps_nothing(self, cache: ResponseCache) -> None:
        await cache.put(key("a"), b"answer", 0)
        assert await cache.get(key("a")) is None

    async def test_a_purge_forgets_everything_and_counts_it(self, cache: ResponseCache) -> None:
        for name in ("a", "b", "c"):
            await cache.put(key(name), b"answer", 60)
        assert await cache.purge() == 3
        assert [await cache.get(key(name)) for name in ("a", "b", "c")] == [None, None, None]

    async def test_a_purge_of_nothing_counts_nothing(self, cache: ResponseCache) -> None:
        assert await cache.purge() == 0

    async def test_it_keeps_answers_after_a_purge(self, cache: ResponseCache) -> None:
        await cache.purge()
        await cache.put(key("a"), b"answer", 60)
        assert await cache.get(key("a")) == b"answer"

    async def test_many_tasks_never_get_each_others_answers(self, cache: ResponseCache) -> None:
        wrong: list[str] = []

        async def use(name: str) -> None:
            await cache.put(key(name), name.encode(), 60)
            if await cache.get(key(name)) != name.encode():
                wrong.append(name)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(use, str(number))
        assert not wrong


class SharedResponseCacheContract:
    """Fixtures: `cache` and `other`, two workers' caches over the same storage; `clock`, which both read. `written` may be overridden
    where other workers see a put only after a while: it returns when they do."""

    async def written(self, cache: ResponseCache) -> None:
        """Nothing to wait for: other workers see a put at once."""

    async def test_a_worker_gets_what_another_has_put(self, cache: ResponseCache, other: ResponseCache) -> None:
        await cache.put(key("a"), b"answer", 60)
        await self.written(cache)
        assert await other.get(key("a")) == b"answer"

    async def test_a_purge_holds_in_every_worker_at_once(self, cache: ResponseCache, other: ResponseCache) -> None:
        await cache.put(key("a"), b"answer", 60)
        await self.written(cache)
        assert await other.get(key("a")) == b"answer"
        await other.purge()
        assert await cache.get(key("a")) is None
        assert await other.get(key("a")) is None

    async def test_a_purge_ends_what_another_worker_has_not_written_yet(self, cache: ResponseCache, other: ResponseCache) -> None:
        await cache.put(key("warm"), b"up", 60)
        await self.written(cache)
        for name in map(str, range(20)):
            await cache.put(key(name), b"answer", 60)
        await other.purge()
        await self.written(cache)
        for name in map(str, range(20)):
            assert await cache.get(key(name)) is None
            assert await other.get(key(name)) is None

    async def test_time_is_over_in_every_worker(self, cache: ResponseCache, other: ResponseCache, clock: FakeClock) -> None:
        await cache.put(key("a"), b"answer", 60)
        await self.written(cache)
        assert await other.get(key("a")) == b"answer"
        clock.advance(60)
        assert await other.get(key("a")) is None
