"""The house of `docs/architecture.md`, held: what each module imports, read from its source. Imports for type checkers count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "starlette_aigateway"
ROOT = Path(__file__).parents[1] / PACKAGE

# Layers from the ground up: rooms of one layer do not see each other, a room sees itself and every layer below.
LAYERS: tuple[dict[str, set[str]], ...] = (
    {"ground": {"errors", "money", "prices", "types", "accounts", "events", "hints"}, "process": {"process"}},
    {
        "protocols": {"protocols"},
        "wakeup": {"wakeup"},
        "entropy": {"entropy"},
        "deadlines": {"deadlines", "patience"},
        "pouring": {"pouring"},
        "shared_counter": {"shared_cells", "shared_counter"},
    },
    {"wires": {"wires"}},
    {"policy": {"policy"}},
    {
        "providers": {"providers"},
        "stores": {"stores"},
        "limiter": {"limiter"},
        "cache": {"cache", "cache_disk", "cache_purges", "cache_seal", "cache_sieve", "cache_files"},
        "public_prices": {"public_prices"},
    },
    {
        "pipeline": {
            "administration", "admission", "answers", "attempt", "attempts", "background", "bookkeeping", "calls", "channel", "drains",
            "flights", "holds", "idempotency", "lifecycle", "observing", "outbox", "pipeline", "quotes", "repeats", "replay", "retention",
            "services", "standing", "streams", "trail", "weight",
        }
    },
    {"http": {"http"}},
    {"caller": {"arguments", "caller"}, "auth": {"auth"}},
    {"gateway": {"checks", "composition", "embedded", "gateway", "settings"}},
    {"middleware": {"middleware"}, "fastapi": {"fastapi"}},
    {"front": {""}},
    {"testing": {"testing"}, "command": {"cli", "commands", "__main__"}},
)  # fmt: skip

LAYER_OF = {name: depth for depth, layer in enumerate(LAYERS) for rooms in layer.values() for name in rooms}
ROOM_OF = {name: room for layer in LAYERS for room, names in layer.items() for name in names}

KNOW_STARLETTE = {"auth", "http", "caller", "gateway", "middleware", "fastapi"}
PURE = {"policy", "wires"}
CONCRETE = {"stores", "cache", "public_prices"}

# Whatever can read a clock, roll a die, wait, start something or touch a file or a socket.
IMPURE = {
    "aiohappyeyeballs", "aiohttp", "anyio", "asyncio", "concurrent", "diskcache", "fcntl", "genai_prices", "glob", "http", "httptools",
    "httpx", "httpx2", "io",
    "limits", "logging", "mmap", "multiprocessing", "os", "pathlib", "random", "secrets", "select", "selectors", "shutil",
    "signal", "socket", "sqlite3", "ssl", "starlette", "subprocess", "tempfile", "threading", "time", "trio", "urllib", "uuid",
}  # fmt: skip

MODULES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def top(module: str) -> str:
    """`policy.keys` -> `policy`; the package's own `__init__` -> the empty name."""
    return module.partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that the module imports, at any depth of its source."""
    package = [PACKAGE, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The rooms' top-level modules of this package that the module imports."""
    inside = {name.removeprefix(PACKAGE).lstrip(".") for name in imports(path) if name == PACKAGE or name.startswith(PACKAGE + ".")}
    return {top(name) if top(name) in ROOM_OF else "" for name in inside}


def foreign_imports(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)} - {PACKAGE}


def room_of(path: Path) -> str | None:
    return ROOM_OF.get(top(name_of(path)))


def in_rooms(rooms: set[str]) -> list[Path]:
    return [path for path in MODULES if room_of(path) in rooms]


each_module = pytest.mark.parametrize("path", in_rooms(set(ROOM_OF.values())), ids=lambda path: name_of(path) or "__init__")


def test_every_module_has_its_place_in_the_house() -> None:
    assert {top(name_of(path)) for path in MODULES} - LAYER_OF.keys() == set()


@each_module
def test_a_module_imports_its_own_room_and_layers_below_it_and_nothing_else(path: Path) -> None:
    own = top(name_of(path))
    too_high = {name for name in own_imports(path) if ROOM_OF[name] != ROOM_OF[own] and LAYER_OF[name] >= LAYER_OF[own]}
    assert too_high == set()


@each_module
def test_only_the_rooms_that_face_the_host_know_starlette(path: Path) -> None:
    if room_of(path) not in KNOW_STARLETTE | {"testing"}:
        assert "starlette" not in foreign_imports(path)


@each_module
def test_fastapi_is_imported_by_its_own_module_alone(path: Path) -> None:
    assert ("fastapi" in foreign_imports(path)) == (room_of(path) == "fastapi")


@pytest.mark.parametrize("path", in_rooms(PURE), ids=name_of)
def test_pure_rules_and_wires_import_nothing_that_could_do_anything(path: Path) -> None:
    assert foreign_imports(path) & IMPURE == set()


@each_module
def test_only_the_gateway_and_the_command_name_concrete_backends(path: Path) -> None:
    if room_of(path) not in CONCRETE | {"gateway", "testing", "command"}:
        assert {ROOM_OF[name] for name in own_imports(path)} & CONCRETE == set()


@each_module
def test_nothing_that_is_shipped_for_tests_is_used_by_anything_else(path: Path) -> None:
    if room_of(path) != "testing":
        assert "testing" not in own_imports(path)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import starlette.requests", {"starlette.requests"}),
        ("from ..types import Price, Usage", {f"{PACKAGE}.types.Price", f"{PACKAGE}.types.Usage"}),
        ("from . import keys", {f"{PACKAGE}.policy.keys"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..gateway import AIGateway", {f"{PACKAGE}.gateway.AIGateway"}),
        ("def lazy():\n    import sqlite3", {"sqlite3"}),
    ],
)
def test_no_kind_of_import_is_overlooked(source: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "policy" / "module.py"
    path.parent.mkdir()
    path.write_text(source)
    assert found <= set(imports(path))
