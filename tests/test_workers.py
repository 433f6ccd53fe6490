"""Tests side by side: an error that the GPU does not recover from costs one process, not the tests that are left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os, pathlib, pytest

@pytest.mark.parametrize("i", range(4))
def test(i):
    pathlib.Path(__file__).with_name(f"process of {i}").write_text(str(os.getpid()))
    if i == 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert i != 2
"""


def test_a_new_process_after_an_error_that_lasts(tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_few.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    # This process may be one of pytest-xdist's, too.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    where = {"cwd": Path(__file__).parent.parent, "env": environment}
    said = subprocess.run([*command, "--rootdir", tmp_path, tmp_path], capture_output=True, text=True, **where).stdout
    processes = [(tmp_path / f"process of {i}").read_text() for i in range(4)]
    assert processes[0] == processes[1] != processes[2] == processes[3], said
    # The error itself, and the process that it ended.
    assert "RuntimeError: CUDA error: an illegal memory access" in said and "3 failed, 2 passed" in said, said
