"""What is given on the command line, checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)


def number(kind: type[Number], least: float, most: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    parse.__name__ = "number"  # in what argparse says of others
    return parse


def cases_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Some of the `known` ones, in their order."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no case {unknown[0]!r}; there are {', '.join(known)}")
        return [name for name in known if name in names]

    return parse
