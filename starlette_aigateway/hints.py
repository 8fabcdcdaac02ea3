"""What somebody may have meant who wrote a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'data_dir'?`, or nothing where no known name is close."""
    close = get_close_matches(str(name)[:100], list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""
