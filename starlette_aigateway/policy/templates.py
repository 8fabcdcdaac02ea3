"""Templates that cannot take the process down: what a prompt may use of minijinja (https://docs.rs/minijinja), and at what expense.

A render runs on the event loop of a host's worker, templates come from whoever may save a prompt, and variables from any caller.
minijinja's fuel counts instructions, not what one of them allocates, and where memory runs out it aborts the process. Two rules close
the class:

- `check` reads the tags and lets through only what is listed here. Nothing can bind a value that a template made, and nothing can be
  called but `range`.
- Long texts, lists and objects are never minijinja's own: they are handed over as objects of `template_values.py`, and each access,
  print and filter is paid for from one `Meter` before it allocates. What minijinja holds itself are numbers and texts of at most `SHORT`
  characters, and what one tag makes of them.

A long text can be printed, joined by `~`, searched by `is containing`, compared with a variable, and given to filters and tests; it
has no slices and no `in`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, NoReturn

from ..errors import InvalidRequest
from .template_values import ACCESS, FILTERS, FUEL, TESTS, WORK, Meter, NoValue, Spent, environment, held

MAX_REPEATED = 16 * 1024 * 1024
"""Characters that the texts between tags may come to by being repeated: a loop's longest text lowers the fuel."""

MAX_LITERAL = 512
MAX_TAG_TOKENS = 100
MAX_TOKENS = 5_000

BLOCKS = frozenset({"if", "elif", "else", "endif", "for", "endfor", "raw", "endraw"})
NATIVE_FILTERS = frozenset({"default", "d", "first", "last", "abs", "round", "int", "float", "bool", "safe"})
NATIVE_TESTS = frozenset(
    {"defined", "undefined", "none", "number", "integer", "float", "boolean", "true", "false", "sequence", "iterable"}
    | {"odd", "even", "divisibleby", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan", "ge", "in"}
)

_OPENING = re.compile(r"\{\{|\{%|\{#")
_TOKEN = re.compile(
    r"""(?P<space>\s+) | (?P<end>[-+]?(?:\}\}|%\})) | (?P<name>[^\W\d]\w*) | (?P<number>\d[\w]*(?:\.\d+)?)
    | (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*") | (?P<sign>==|!=|<=|>=|//|\*\*|[-+/%~<>=|.,:()\[\]*])""",
    re.VERBOSE | re.DOTALL,
)
_RAW_END = re.compile(r"\{%[-+]?\s*endraw\s*[-+]?%\}")
_WORDS = frozenset({"and", "or", "not", "in", "is", "if", "elif", "else", "for"})


class Checked(NamedTuple):
    """What `check` found: the number of `tokens` in tags, whether there is a loop, and the longest text that a loop `repeats`."""

    tokens: int
    loops: bool
    repeats: int

    def fuel(self, shares: int) -> int:
        """Instructions that the template may run, where `shares` templates of a prompt have loops."""
        return max(1, min(FUEL, MAX_REPEATED // max(1, self.repeats)) // max(1, shares)) if self.loops else FUEL


def check(source: str) -> Checked:
    """Raises `InvalidRequest`, whose message tells the line, for a tag that uses what is not listed in this module.

    Left out: `set`, `with`, `macro`, `call`, `filter`, `include` and all other blocks; `*` and `**`, which repeat texts; `{...}`; calls
    other than `range(...)`; in the head of a `for`, whatever makes a value to loop over (`~`, `+`, `[a, b]`).
    """
    return _Reader(source).read()


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._tokens = 0
        self._loops = 0
        self._looped = False
        self._repeated = 0

    def read(self) -> Checked:
        while opening := _OPENING.search(self._source, self._at):
            self._text(opening.start())
            self._at = opening.end()
            if opening[0] == "{#":
                end = self._source.find("#}", self._at)
                self._at = len(self._source) if end < 0 else end + 2
            else:
                self._tag(self._read_tag(), block=opening[0] == "{%")
        return Checked(self._tokens, self._looped, self._repeated)

    def _text(self, end: int) -> None:
        if self._loops:
            self._repeated = max(self._repeated, end - self._at)

    def _read_tag(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self._source.startswith(("-", "+"), self._at):
            self._at += 1
        while True:
            token = _TOKEN.match(self._source, self._at)
            if token is None:
                self._refuse(
                    f"{self._source[self._at : self._at + 1]!r} cannot be used in a tag"
                    if self._at < len(self._source)
                    else "a tag has no end"
                )
            kind = str(token.lastgroup)
            if kind == "string" and len(token[0]) > MAX_LITERAL:
                self._refuse(f"a quoted text in a tag can have at most {MAX_LITERAL} characters")
            self._at = token.end()
            if kind == "end":
                return found
            if kind != "space":
                found.append((kind, token[0]))
                self._tokens += 1
            if len(found) > MAX_TAG_TOKENS or self._tokens > MAX_TOKENS:
                self._refuse(f"a tag can have at most {MAX_TAG_TOKENS} words and signs, and all tags of a text {MAX_TOKENS}")

    def _tag(self, tokens: list[tuple[str, str]], *, block: bool) -> None:
        name = tokens[0][1] if block and tokens else ""
        if block and name not in BLOCKS:
            self._refuse(f"a prompt cannot use {{% {name} %}}; it can use {', '.join(sorted(BLOCKS))}")
        if name == "raw":
            self._skip_raw()
            return
        self._loops += {"for": 1, "endfor": -1}.get(name, 0)
        self._looped = self._looped or name == "for"
        for index in range(len(tokens)):
            self._token(tokens, index, head=name == "for")

    def _skip_raw(self) -> None:
        end = _RAW_END.search(self._source, self._at)
        if end is None or self._source.find("endraw", self._at) < end.start():
            self._refuse("a raw block cannot hold the word endraw, and needs its end")
        self._text(end.end())
        self._at = end.end()

    def _token(self, tokens: list[tuple[str, str]], index: int, *, head: bool) -> None:
        kind, text = tokens[index]
        before = tokens[index - 1] if index else ("", "")
        if before[1] == "|" and before[0] == "sign":
            self._listed(text, FILTERS.keys() | NATIVE_FILTERS, "filter")
        elif _names_a_test(tokens, index):
            self._listed(text, TESTS.keys() | NATIVE_TESTS, "test")
        if text == "range" and kind == "name" and tokens[index + 1 : index + 2] != [("sign", "(")] and before[1] != ".":
            self._refuse("range is only there to be called: range(...)")
        if kind != "sign":
            return
        if text in ("*", "**"):
            self._refuse("a prompt cannot repeat or multiply: '*' and '**' are not there")
        if text == "(" and not _may_open(tokens, index):
            self._refuse("a prompt can call nothing but range(...)")
        if head and text in ("~", "+"):
            self._refuse(f"{text!r} cannot be used in the head of a loop")
        if head and text == "[" and not _is_value(tokens, index - 1) and tokens[index + 1 : index + 2] != [("sign", "]")]:
            self._refuse("a list cannot be made in the head of a loop")

    def _listed(self, name: str, allowed: Any, what: str) -> None:
        if name not in allowed:
            self._refuse(f"a prompt has no {what} {name!r}; there are {', '.join(sorted(allowed))}")

    def _refuse(self, why: str) -> NoReturn:
        raise InvalidRequest(f"line {self._source.count(chr(10), 0, self._at) + 1}: {why}")


def _names_a_test(tokens: list[tuple[str, str]], index: int) -> bool:
    if tokens[index][0] != "name" or not index:
        return False
    if tokens[index - 1] == ("name", "is"):
        return tokens[index][1] != "not" and not _is_field(tokens, index - 1)
    return tokens[index - 1] == ("name", "not") and index > 1 and tokens[index - 2] == ("name", "is")


def _is_field(tokens: list[tuple[str, str]], index: int) -> bool:
    return index > 0 and tokens[index - 1] == ("sign", ".")


def _is_value(tokens: list[tuple[str, str]], index: int) -> bool:
    """Whether what ends at `index` is a value, so that `(` calls it and `[` takes of it."""
    if index < 0:
        return False
    kind, text = tokens[index]
    if kind == "name":
        return text not in _WORDS or _is_field(tokens, index)
    return kind != "sign" or text in (")", "]")


def _may_open(tokens: list[tuple[str, str]], index: int) -> bool:
    """Whether the `(` at `index` groups, or belongs to a filter, a test or `range`."""
    before = index - 1
    if not _is_value(tokens, before):
        return True
    if _is_field(tokens, before):
        return False
    return tokens[before] == ("name", "range") or (before > 0 and tokens[before - 1] == ("sign", "|")) or _names_a_test(tokens, before)


__all__ = ["ACCESS", "FILTERS", "FUEL", "TESTS", "WORK", "Checked", "Meter", "NoValue", "Spent", "check", "environment", "held"]
