"""What templates are given, and what they may do with it: values that pay from one meter before they allocate, filters, tests, the
environment. The reasons stand in `templates.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from minijinja import Environment

from ..errors import InvalidArgument
from . import plain

FUEL = 50_000
"""Instructions that one template may run, at most: about ten for each turn of a loop."""

WORK = 8 * 1024 * 1024
"""What a prompt's rendering may spend: one for each character that is read or made, `ACCESS` for each value that is touched."""

ACCESS = 384
SHORT = 512
MAX_RANGE = 100_000
MAX_INDENT = 64


class Spent(InvalidArgument):
    """A rendering that costs more than `WORK`."""


class NoValue(InvalidArgument):
    """A filter was given nothing: an undefined name, or null. `filter` is its name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the filter {name!r} was given nothing")
        self.filter = name


class Meter:
    """What one rendering may still spend. Once spent it stays so: minijinja swallows some errors, hence `spent`."""

    __slots__ = ("left", "spent", "why")

    def __init__(self, work: int = WORK) -> None:
        self.left = work
        self.spent = False
        self.why = "it is too much work"

    def stop(self, why: str) -> None:
        """Ends the rendering at the next payment."""
        self.spent, self.why, self.left = True, why, -1

    def note(self, work: int) -> None:
        """The same where Python or minijinja would swallow an error."""
        self.left -= work
        self.spent = self.spent or self.left < 0

    def pay(self, work: int) -> None:
        """Raises `Spent` where it is not affordable, before anything is made."""
        self.left -= work
        if self.left < 0:
            self.spent = True
            raise Spent(self.why)


class _Held:
    """A value that minijinja sees only through what it asks for. Names with an underscore are closed to templates."""

    __slots__ = ("_meter", "_value")

    def __init__(self, value: Any, meter: Meter) -> None:
        self._value = value
        self._meter = meter

    def __bool__(self) -> bool:
        return bool(self._value)

    def __len__(self) -> int:
        self._meter.note(ACCESS)
        return 0 if self._meter.spent else len(self._value)

    def __eq__(self, other: object) -> bool:
        if self._meter.spent:
            return False
        try:
            return isinstance(other, _Held) and bool(_bare(self, self._meter) == _bare(other, self._meter))
        except InvalidArgument:
            self._meter.spent = True
            return False

    __hash__ = None  # type: ignore[assignment]  # as with lists and dicts

    def __str__(self) -> str:
        """What `~` joins. An error would be swallowed and reported by Python, so it is only noted: `Meter.spent`."""
        if self._meter.spent:
            return ""
        try:
            return _printed(self, self._meter)
        except InvalidArgument:
            self._meter.spent = True
            return ""


class _Items(_Held):
    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        self._meter.pay(ACCESS)
        return held(self._value[index], self._meter)


class _Fields(_Held):
    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        self._meter.pay(ACCESS)
        return held(self._value[key], self._meter)

    def __iter__(self) -> Iterator[str]:
        self._meter.pay(ACCESS * (1 + len(self._value)))
        return iter(self._value)


class _Text(_Held):
    """A text of more than `SHORT` characters. To minijinja it is a mapping, so that `in` asks it, and is not told no where it means yes."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        raise KeyError("a text has no fields")

    def __iter__(self) -> Iterator[str]:
        self._meter.stop(f"a text of more than {SHORT} characters cannot be searched by 'in' (there is 'is containing') or looped over")
        return iter(())


Sequence.register(_Items)
Mapping.register(_Fields)
Mapping.register(_Text)


def held(value: Any, meter: Meter) -> Any:
    """`value` as a template may have it."""
    if isinstance(value, str):
        return _Text(value, meter) if len(value) > SHORT else value
    if isinstance(value, list | tuple | range):
        return _Items(value, meter)
    return _Fields(value, meter) if isinstance(value, dict) else value


def _bare(value: Any, meter: Meter) -> Any:
    """The plain value, paid for."""
    inner = value._value if isinstance(value, _Held) else value  # noqa: SLF001  # this module's own class
    meter.pay(ACCESS)
    if isinstance(inner, str):
        meter.pay(len(inner))
        return inner
    if isinstance(inner, list | tuple | range):
        return [_bare(item, meter) for item in inner]
    if isinstance(inner, dict):
        return {_bare(key, meter): _bare(item, meter) for key, item in inner.items()}
    if inner is None or isinstance(inner, bool | int | float):
        return inner
    raise InvalidArgument("only texts, numbers, lists and objects can be used")


def _printed(value: Any, meter: Meter) -> str:
    return _texted(_bare(value, meter))


def _texted(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _cased(meter: Meter, value: Any) -> str:
    """A text whose case is to be changed, which is slow beyond ASCII."""
    text = _texted(value)
    meter.pay(len(text) * (1 if text.isascii() else 12))
    return text


def _many(value: Any) -> list[Any]:
    if isinstance(value, str):
        raise InvalidArgument("a text is not a list")
    return list(value)


def _size(value: Any, name: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise InvalidArgument(f"{name} takes a number of 0 to {most}")
    return value


def _join(meter: Meter, value: Any, separator: Any = "") -> str:
    parts = [_texted(item) for item in _many(value)]
    between = _texted(separator)
    meter.pay(sum(map(len, parts)) + len(between) * len(parts))
    return between.join(parts)


def _replace(meter: Meter, value: Any, old: Any, new: Any) -> str:
    text, gone, put = _texted(value), _texted(old), _texted(new)
    times = text.count(gone)
    meter.pay(len(text) + times * len(put))
    return text.replace(gone, put)


def _indent(meter: Meter, value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> str:
    """minijinja's `indent`, with a bounded width."""
    margin = " " * _size(width, "indent", MAX_INDENT)
    text = _texted(value)
    meter.pay((text.count("\n") + 1) * (len(margin) + ACCESS))
    lines = text.split("\n")
    return "\n".join(margin + line if (number or first) and (line or blank) else line for number, line in enumerate(lines))


def _to_json(meter: Meter, value: Any, indent: Any = 0) -> str:
    """JSON for a model to read, where minijinja's own is escaped for HTML."""
    width = _size(indent, "tojson", MAX_INDENT)
    if isinstance(value, str) and not value.isprintable():
        meter.pay(2 * len(value))
    encoded = msgspec.json.encode(value)
    lines = encoded.count(b",") + 2 * (encoded.count(b"[") + encoded.count(b"{"))
    meter.pay(len(encoded))
    if lines * width * plain.MAX_DEPTH > meter.left:
        raise InvalidArgument("the value given to tojson is too large to be indented like this")
    made = (msgspec.json.format(encoded, indent=width) if width else encoded).decode()
    meter.pay(len(made))
    return made


def _sort(meter: Meter, value: Any, reverse: Any = False, attribute: Any = None) -> list[Any]:
    items = _many(value)
    meter.pay(2 * ACCESS * len(items) + sum(len(item) for item in items if isinstance(item, str)) * len(items).bit_length())
    return sorted(items, key=lambda item: _sort_key(item if attribute is None else item[attribute]), reverse=bool(reverse))


def _sort_key(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _unique(meter: Meter, value: Any) -> list[Any]:
    items = _many(value)
    seen = dict.fromkeys(msgspec.json.encode(item) for item in items)
    meter.pay(ACCESS * len(items))
    return [msgspec.json.decode(item) for item in seen]


def _split(meter: Meter, value: Any, separator: Any = " ") -> list[str]:
    text = _texted(value)
    meter.pay(ACCESS * (text.count(separator) + 1))
    return text.split(separator)


def _lines(meter: Meter, value: Any) -> list[str]:
    text = _texted(value)
    meter.pay(ACCESS * (text.count("\n") + 1))
    return text.split("\n")


def _truncate(_: Meter, value: Any, length: Any = 255, end: Any = "...") -> str:
    text, tail = _texted(value), _texted(end)
    most = _size(length, "truncate", 2**31)
    return text if len(text) <= most else text[: max(0, most - len(tail))] + tail


FILTERS: Mapping[str, Callable[..., Any]] = {
    "lower": lambda meter, value: _cased(meter, value).lower(),
    "upper": lambda meter, value: _cased(meter, value).upper(),
    "title": lambda meter, value: _cased(meter, value).title(),
    "capitalize": lambda meter, value: _cased(meter, value).capitalize(),
    "trim": lambda _, value, characters=None: _texted(value).strip(characters),
    "string": lambda _, value: _texted(value),
    "length": lambda _, value: len(value),
    "count": lambda _, value: len(value),
    "list": lambda _, value: _many(value),
    "items": lambda _, value: [list(item) for item in value.items()],
    "reverse": lambda _, value: value[::-1],
    "min": lambda _, value: min(_many(value)),
    "max": lambda _, value: max(_many(value)),
    "sum": lambda _, value: sum(value),
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _to_json,
    "sort": _sort,
    "unique": _unique,
    "split": _split,
    "lines": _lines,
    "truncate": _truncate,
}
"""Filters of our own. Each is given the plain value, which has been paid for, and pays for what it makes beyond that."""

TESTS: Mapping[str, Callable[..., bool]] = {
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "startingwith": lambda value, start: _texted(value).startswith(_texted(start)),
    "containing": lambda value, part: _texted(part) in _texted(value),
    "endingwith": lambda value, end: _texted(value).endswith(_texted(end)),
}


def environment(meter: Meter, fuel: int = FUEL, *, gaps: bool = False) -> Environment:
    """Strict, fuelled, without a loader (so without includes), and for text: nothing is escaped for HTML. It takes about 40 µs to make.

    `gaps`: names are missing that the template reads, so that null given to `tojson` may be one of them.
    """
    made = Environment(
        undefined_behavior="strict",
        fuel=fuel,
        auto_escape_callback=lambda _: False,
        keep_trailing_newline=True,
        debug=True,  # or an undefined name is not told
        pycompat=False,
        filters={name: _paid(name, work, meter, nothing=not gaps and name in ("string", "tojson")) for name, work in FILTERS.items()},
        tests={name: _paid_test(work, meter) for name, work in TESTS.items()},
        globals={"range": lambda *numbers: held(_range(*numbers), meter)},
        finalizer=lambda value: _final(value, meter),
    )
    for name in ("debug", "dict", "namespace", "cycler", "joiner"):
        made.remove_global(name)
    return made


def _paid(name: str, work: Callable[..., Any], meter: Meter, *, nothing: bool) -> Callable[..., Any]:
    def filtered(*values: Any, **options: Any) -> Any:
        if values[0] is None and not nothing:
            raise NoValue(name)
        bare = [_bare(value, meter) for value in values]
        named = {key: _bare(value, meter) for key, value in options.items()}
        try:
            made = work(meter, *bare, **named)
        except InvalidArgument:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
            problem = InvalidArgument(f"the filter {name!r} cannot be used like this")
        else:
            return held(made, meter)
        raise problem  # outside of the handler: the error may repeat a value

    return filtered


def _paid_test(work: Callable[..., bool], meter: Meter) -> Callable[..., bool]:
    return lambda *values: work(*(_bare(value, meter) for value in values))


def _range(*numbers: Any) -> range:
    if not 1 <= len(numbers) <= 3 or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise InvalidArgument("range takes one to three whole numbers")
    if numbers[2:] == (0,):
        raise InvalidArgument("range takes a step other than 0")
    made = range(*numbers)
    if made and (abs(made[-1] - made[0]) // abs(made.step)) >= MAX_RANGE:
        raise InvalidArgument(f"range can have at most {MAX_RANGE} numbers")
    return made


def _final(value: Any, meter: Meter) -> Any:
    if meter.spent:
        meter.pay(0)
    if isinstance(value, str):
        meter.pay(ACCESS // 2 + len(value))
        return value
    if value is None or isinstance(value, bool | int | float):
        meter.pay(ACCESS // 2)
        return value
    return _printed(value, meter)
