"""By what the library tells a process from those that it was forked from, and what it does in a child before anything else."""

import os
from collections.abc import Callable

import pytest

from starlette_aigateway.process import THIS


def in_a_child(true: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if true() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_has_another_number_than_all_that_it_was_forked_from() -> None:
    first = THIS.number
    assert in_a_child(lambda: THIS.number == first + 1 and in_a_child(lambda: THIS.number == first + 2))
    assert THIS.number == first


def test_a_child_with_the_id_of_a_process_that_has_ended_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first, ended = THIS.number, os.getpid()

    def grandchild_with_the_same_id() -> bool:
        monkeypatch.setattr(os, "getpid", lambda: ended)
        return in_a_child(lambda: THIS.number == first + 2)

    assert in_a_child(grandchild_with_the_same_id)


class Inheriting:
    def __init__(self) -> None:
        self.told = 0

    def tell(self) -> None:
        self.told += 1


def test_what_is_to_be_called_in_a_child_is_called_once_as_long_as_it_lives() -> None:
    calls = len(THIS._calls)
    one, gone = Inheriting(), Inheriting()
    for _ in range(2):
        THIS.call_in_child(one.tell)
        THIS.call_in_child(gone.tell)
    assert len(THIS._calls) == calls + 2
    del gone
    assert len(THIS._calls) == calls + 1
    assert in_a_child(lambda: one.told == 1)
    assert one.told == 0
