"""Collects the rows that benchmarks report, prints them as a table, and saves them on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bench import measure
from hypergrad_ext.engines import choose, traced

_rows: dict[str, list[dict[str, object]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write bench/results/<name>.json")
    parser.addoption("--quick", action="store_true", help="fewer rounds, two threads only, nothing that takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``--quick`` measures on the threads that users have."""
    if config.getoption("--quick"):
        alone = [item for item in items if _threads(item) == 1]
        config.hook.pytest_deselected(items=alone)
        items[:] = [item for item in items if item not in alone]


def _threads(item: pytest.Item) -> object:
    return (
        item.callspec.params.get("threads") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
    )


@pytest.fixture(params=[1, 2], ids=["threads1", "threads2"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's number of threads, and of cores; nothing is known of any model yet."""
    traced.clear_cache()
    choose.clear_histories()
    torch.manual_seed(0)
    with measure.threads(request.param):
        yield request.param


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to be brief."""
    return request.config.getoption("--quick")


@pytest.fixture
def report(benchmark, request: pytest.FixtureRequest) -> Callable[[str, dict[str, object]], None]:
    """Put a row into the table of that name, and into pytest-benchmark's own record.

    Results are saved after every row: a run that is cut short keeps those that it has.
    """

    def add(name: str, row: dict[str, object]) -> None:
        _rows.setdefault(name, []).append(row)
        benchmark.extra_info.update(row)
        if request.config.getoption("--save-results"):
            measure.save(name, _rows[name])

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    terminalreporter.section("hypergrad_ext")
    terminalreporter.write_line("  ".join(f"{key}={value}" for key, value in measure.environment().items()))
    for name, rows in _rows.items():
        terminalreporter.write_line(f"\n{name}\n{measure.table(rows)}")
