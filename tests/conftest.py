"""Fixtures for all tests: seeds, and empties that betray whoever reads them."""

import os
import re
import sys
from collections.abc import Iterator

import pytest
import torch

try:
    import hypergrad_ext.kernels  # noqa: F401
except ImportError as error:
    raise pytest.UsageError(
        f"hypergrad_ext is not installed ({error}); run: pip install --no-build-isolation -e '.[test]'"
    ) from error

from hypergrad_ext.engines import choose, traced  # noqa: E402

# Errors after which a process cannot use its GPU any more, where a report says what was raised.
LASTING = re.compile(
    "^E .*(illegal memory access|misaligned address|unspecified launch failure|illegal instruction)", re.MULTILINE
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Tiny problems: a second thread only waits, and on a busy machine it waits long.
torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A process of pytest-xdist ends with the first error that lasts, and a new one takes its place."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and LASTING.search(report.longreprtext):
        os._exit(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_engines() -> Iterator[None]:
    """No program and no measurement from another test."""
    traced.clear_cache()
    choose.clear_histories()
    traced._logged.clear()
    yield
    traced.clear_cache()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned_empties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that the package asks for is NaN: a read before a write cannot pass."""

    def poison(function):
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("hypergrad_ext") and result.is_floating_point():
                result.fill_(float("nan"))
            return result

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
