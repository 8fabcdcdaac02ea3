"""Logs of windows that take their turns one after the other, as processes would, and what is in them."""

from starlette_aigateway.policy.windows import MICROSECONDS, Window
from starlette_aigateway.stores.windows.log import WindowLog
from starlette_aigateway.stores.windows.states import Change, Windows

SPAN = 60 * MICROSECONDS
NOW = 1_700_000_000 * MICROSECONDS
SMALL = 4096
GUARD = (1, 2)
"""Which lock it is: these logs take their turns one after the other."""


class Log(WindowLog):
    def catch_up(self) -> bool:
        """As a turn does it."""
        if not super().catch_up():
            self.close()
            self.__init__(self._path, self._ours)  # type: ignore[misc]
        return True


def window(number: int, form: str = "moving") -> Window:
    return Window(f"key:{number}", form, 60)  # type: ignore[arg-type]


def keep(log: WindowLog, now: int, *changes: Change) -> None:
    """As a turn does it: in memory, then in the log."""
    log.catch_up()
    for change in changes:
        change.apply(log.windows, now)
    log.append(now, changes)


def used(windows: Windows, now: int) -> dict[Window, int]:
    fixed = {key: counted for key, state in windows.fixed.items() if (counted := state.at(now).value)}
    return {key: counted for key, state in windows.sliding.items() if (counted := state.used(now))} | fixed
