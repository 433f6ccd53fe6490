"""The CUDA build works for every architecture without a GPU, and no kernel spills registers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import cuda_report

NVCC = cuda_report.find_nvcc()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit found (CUDA_HOME, /usr/local/cuda, PATH)"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def library() -> Path:
    assert NVCC is not None
    return cuda_report.build(NVCC)


@pytest.mark.parametrize("arch", cuda_report.ARCHITECTURES)
@pytest.mark.parametrize("source", cuda_report.SOURCES, ids=lambda s: s.name)
def test_compiles_without_spills(source, arch, library):
    if not cuda_report.supports(NVCC, arch):
        pytest.skip(f"{NVCC} does not know sm_{arch}")
    here = [kernel for kernel in cuda_report.kernels(source) if kernel.arch == arch]
    assert here, f"no kernel of {source.name} for sm_{arch}"
    print(f"\n{cuda_report.report(here)}")
    # Launch bounds say how many blocks must fit; spills are what a kernel that is too large for them would pay.
    spilled = [kernel for kernel in here if kernel.spills or kernel.stack]
    assert not spilled, f"\n{cuda_report.report(spilled)}"


def test_loads_without_a_gpu(library):
    """Linked against this torch, with CUDA or without: nothing is missing before a kernel is called."""
    (module,) = library.glob("hypergrad_ext/_C.*.so")
    code = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("hypergrad_ext._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cuda"]
"""
    result = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
