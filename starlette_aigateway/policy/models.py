"""Which models a caller is shown: `GET v1/models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol


class Listed(Protocol):
    """A registered provider, as far as its models are listed. `models` of None: it serves names that it cannot enumerate."""

    @property
    def name(self) -> str: ...

    @property
    def models(self) -> Mapping[str, str] | None: ...

    def serves(self, model: str) -> str | None: ...


def listed(providers: Sequence[Listed], priced: Iterable[tuple[str | None, str]], allowed: Sequence[str] | None) -> Mapping[str, str]:
    """Public model names and the provider that is asked first for each, in the order of the providers.

    Those are the names in the providers' `models`. A provider without that list adds what it serves of the `priced` names, which are
    `(provider or None, model)`, and of the names in `allowed`. With `allowed`, no other name is shown; None allows every model.
    """
    priced = sorted(priced, key=lambda price: (price[1], price[0] or ""))
    found: dict[str, str] = {}
    for provider in providers:
        for name in _names(provider, priced, allowed or ()):
            if allowed is None or name in allowed:
                found.setdefault(name, provider.name)
    return found


def _names(provider: Listed, priced: Iterable[tuple[str | None, str]], allowed: Sequence[str]) -> list[str]:
    if provider.models is not None:
        return list(provider.models)
    names = [model for owner, model in priced if owner in (None, provider.name)]
    return [name for name in (*names, *allowed) if provider.serves(name) is not None]
