"""Keys where you keep them: a `KeyStore` of your own, here over plain dictionaries. Nothing has to be inherited.

    $ python examples/custom_key_store.py

`tests/test_examples.py` runs it through `KeyStoreContract`, which says what every key store promises; do the same with yours. A
dictionary belongs to one process: an app with several workers keeps its keys in a database, with the same verbs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from starlette_aigateway import AIGateway, AuthenticationError, CompletionRequest, Conflict, Key
from starlette_aigateway.policy.keys import revised, with_hint
from starlette_aigateway.providers import EchoProvider


class DictKeyStore:
    """Digests, never keys, lead to ids; ids lead to what is known of a key. No verb awaits anything, so each is atomic."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}
        self._current: dict[bytes, str] = {}
        self._rotated_away: dict[bytes, tuple[str, float]] = {}

    async def add(self, key: Key, digest: bytes) -> None:
        if key.id in self._keys:
            raise Conflict(f"the key {key.id!r} exists already", param="id")
        self._refuse_known(digest)
        self._keys[key.id] = key
        self._current[digest] = key.id

    async def find(self, digest: bytes, *, now: float) -> Key | None:
        if digest in self._current:
            return self._keys[self._current[digest]]
        key_id, until = self._rotated_away.get(digest, ("", 0.0))
        return self._keys.get(key_id) if now < until else None

    async def get(self, key_id: str) -> Key | None:
        return self._keys.get(key_id)

    async def update(self, key_id: str, changes: Mapping[str, Any]) -> Key | None:
        if key_id not in self._keys:
            return None
        self._keys[key_id] = revised(self._keys[key_id], changes)
        return self._keys[key_id]

    async def rotate(self, key_id: str, digest: bytes, hint: str, *, previous_until: float) -> Key | None:
        if key_id not in self._keys:
            return None
        self._refuse_known(digest)
        self._rotated_away = {old: (owner, until) for old, (owner, until) in self._rotated_away.items() if owner != key_id}
        previous = next(old for old, owner in self._current.items() if owner == key_id)
        del self._current[previous]
        self._rotated_away[previous] = (key_id, previous_until)
        self._current[digest] = key_id
        self._keys[key_id] = with_hint(self._keys[key_id], hint)
        return self._keys[key_id]

    async def list(self, *, tenant: str | None = None, limit: int = 100, after: str | None = None) -> Sequence[Key]:
        ids = sorted(key_id for key_id, key in self._keys.items() if key_id > (after or "") and tenant in (None, key.tenant))
        return [self._keys[key_id] for key_id in ids[:limit]]

    def _refuse_known(self, digest: bytes) -> None:
        if digest in self._current or digest in self._rotated_away:
            raise Conflict("this key exists already")


async def main() -> None:
    with tempfile.TemporaryDirectory() as data_dir:
        gateway = AIGateway(providers=[EchoProvider()], data_dir=data_dir, keys=DictKeyStore())
        async with gateway:
            raw_key, key = await gateway.create_key("example", requests_per_minute=10)
            request = CompletionRequest(model="echo", messages=[{"role": "user", "content": "hello"}])
            answer = await gateway.complete(raw_key, request)
            print(f"the key ending in {key.hint} opens: {answer.message['content']}")

            new_key, _ = await gateway.rotate_key(key.id)
            for raw in (raw_key, new_key):
                try:
                    await gateway.complete(raw, request)
                    print("after the rotation: opens")
                except AuthenticationError as error:
                    print(f"after the rotation: {error}")

            await gateway.revoke_key(key.id)
            try:
                await gateway.complete(new_key, request)
            except AuthenticationError as error:
                print(f"after the revocation: {error}")


if __name__ == "__main__":
    anyio.run(main)
