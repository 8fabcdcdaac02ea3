"""The `aigateway` command. What it needs comes with the extra `cli` and is imported only when it runs."""

from __future__ import annotations

import sys

EXTRA = ("click", "rich")


def main() -> None:
    """Ends the process with the command's exit code; 2 where `click` or `rich` is missing."""
    try:
        from .commands import run
    except ModuleNotFoundError as missing:
        if missing.name not in EXTRA:
            raise
        sys.stderr.write(f"aigateway needs {' and '.join(EXTRA)}: pip install 'starlette_aigateway[cli]'\n")
        raise SystemExit(2) from None
    raise SystemExit(run())
