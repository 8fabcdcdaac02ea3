"""Money: integers of nano-USD inside, `Decimal` US dollars at the edges, never a float.

One US dollar is 10^9 nano-USD. SQLite and msgspec both stop at 64 bits, so an amount is at most
9.2 * 10^18 nano-USD (9.2 billion dollars); `MAX_USD` stays well below.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import TypeAlias

from .errors import InvalidArgument

Money: TypeAlias = "Decimal | str | int"
"""US dollars as hosts give them: `Decimal("0.15")`, `"0.15"` or `2`. A float is refused."""

MAX_USD = Decimal(10**9)
NANO = 10**9


def usd(value: Money, name: str = "amount") -> Decimal:
    """`value` as exact, finite, non-negative US dollars of at most nine decimal places.

    Raises `InvalidArgument` (a `TypeError` and a `ValueError`), which names the argument `name` and says how to mend it, for a
    float, a foreign type, and a negative, non-finite, too fine or absurd amount.
    """
    if isinstance(value, bool) or not isinstance(value, Decimal | str | int):
        hint = f'; write "{value}" or Decimal("{value}") instead' if isinstance(value, float) else ""
        raise InvalidArgument(f"{name} must be a decimal string of US dollars, not {type(value).__name__}{hint}", param=name)
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise InvalidArgument(f"{name} must be a decimal number of US dollars such as '12.50'", param=name) from None
    if not amount.is_finite():
        raise InvalidArgument(f"{name} must be finite", param=name)
    if amount < 0:
        raise InvalidArgument(f"{name} must not be negative", param=name)
    if amount > MAX_USD:
        raise InvalidArgument(f"{name} must be at most {MAX_USD} US dollars", param=name)
    if amount != amount.quantize(Decimal("1e-9")):
        raise InvalidArgument(f"{name} must have at most nine decimal places (nano-USD)", param=name)
    return amount if amount else Decimal(0)  # `0E-99999999` is a zero too, and a hundred megabytes of text


def nano(amount: Decimal) -> int:
    """Nano-USD of US dollars; exact for whatever `usd` let pass."""
    return int(amount.scaleb(9))


def dollars(nano_usd: int) -> Decimal:
    """US dollars of nano-USD, exact, without an exponent: `Decimal('0.00015')`."""
    return Decimal(nano_usd).scaleb(-9) if nano_usd else Decimal(0)


def plain(nano_usd: int) -> str:
    """`text` of US dollars that are not negative, given in nano-USD."""
    whole, fraction = divmod(nano_usd, NANO)
    return f"{whole}.{fraction:09d}".rstrip("0") if fraction else str(whole)


def text(amount: Decimal | None) -> str | None:
    """A plain decimal string for JSON, trailing zeros dropped: `"0.00015"`, `"50"`, `"0"`."""
    if amount is None:
        return None
    plain = f"{amount:f}"
    return (plain.rstrip("0").rstrip(".") or "0") if "." in plain else plain
