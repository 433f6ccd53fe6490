"""Every CUDA file compiles for every architecture, without a GPU, and no kernel spills registers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from bench import cuda_report

NVCC = cuda_report.find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit found (CUDA_HOME, /usr/local/cuda, PATH)")


@functools.cache
def kernels(source: Path) -> list[cuda_report.Kernel]:
    assert NVCC is not None
    return cuda_report.compile_report(
        NVCC, source, [arch for arch in cuda_report.ARCHITECTURES if cuda_report.supports(NVCC, arch)]
    )


@pytest.mark.parametrize("arch", cuda_report.ARCHITECTURES)
# One process compiles a source for all architectures.
@pytest.mark.parametrize(
    "source",
    [pytest.param(s, marks=pytest.mark.xdist_group(s.name)) for s in cuda_report.SOURCES],
    ids=lambda s: s.name,
)
def test_compiles_without_spills(source, arch):
    if not cuda_report.supports(NVCC, arch):
        pytest.skip(f"{NVCC} does not know sm_{arch}")
    here = [kernel for kernel in kernels(source) if kernel.arch == arch]
    assert here, f"no kernel of {source.name} for sm_{arch}"
    print(f"\n{cuda_report.report(here)}")
    # Launch bounds say how many blocks must fit; spills are what a kernel that is too large for them would pay.
    spilled = [kernel for kernel in here if kernel.spills or kernel.stack]
    assert not spilled, f"\n{cuda_report.report(spilled)}"
