"""The code of docs/testing.md runs as it stands there, in a project of its own."""

import re
import subprocess
import sys
from pathlib import Path

import starlette_aigateway.testing as kit

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = (CHECKOUT / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def files() -> dict[str, str]:
    """Each block begins with the file that it belongs to."""
    found: dict[str, str] = {}
    for block in BLOCKS:
        name, _, code = block.partition("\n")
        assert re.fullmatch(r"# \w+\.py", name), f"a block names no file: {name}"
        found[name[2:]] = found.get(name[2:], "") + code
    return found


def test_every_test_on_the_page_passes_on_both_backends(tmp_path: Path) -> None:
    for name, code in files().items():
        (tmp_path / name).write_text(code)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 2 * sum(code.count("def test_") for code in files().values())
    assert not Path("/var/lib/app/ai-gateway").exists()


def test_every_contract_is_on_the_page_and_every_name_on_it_exists() -> None:
    contracts = {name for name in kit.__all__ if name.endswith("Contract")}
    assert contracts == set(re.findall(r"`(\w+Contract)`", PAGE))
    for name in re.findall(r"from starlette_aigateway\.testing import (.*)", PAGE):
        assert set(name.split(", ")) <= set(kit.__all__)
