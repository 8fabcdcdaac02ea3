"""Remembers what came of each cell, for the table that is made of it."""

from collections.abc import Generator

import pytest

from .cells import cell_of
from .outcomes import CAME_OUT

pytest.register_assert_rewrite("tests.hosts.checks", "tests.hosts.run")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write what came of the cells into docs/hosts.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CAME_OUT] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and (cell := cell_of(item)) is not None:
        item.config.stash[CAME_OUT][cell.name] = report.passed
    return report
