"""Every CUDA file compiles for Hopper, without a GPU: no spills, and registers for two or four blocks per SM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
# 65536 registers per SM, 256 threads per block: four blocks, and two of the kernels that work in shared memory.
REGISTERS, REGISTERS_GLM = 64, 128
REPORT = re.compile(
    r"Function properties for (?P<kernel>\S+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers"
)


def find_nvcc() -> str | None:
    """The compiler of the toolkit that CUDA_HOME names, of the usual place, or on PATH."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(root, "bin", "nvcc") for root in roots if root]
    return next((str(c) for c in candidates if c.is_file()), shutil.which("nvcc"))


@pytest.mark.skipif(find_nvcc() is None, reason="no CUDA toolkit found (CUDA_HOME, /usr/local/cuda, PATH)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_compiles_without_spills(source, tmp_path):
    command = [find_nvcc(), "-c", "-arch=sm_90", "-O3", "-std=c++17", "-Xptxas=-v", source, "-o", tmp_path / "kernel.o"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = list(REPORT.finditer(result.stderr))
    assert len(kernels) == result.stderr.count("Compiling entry function") > 0, result.stderr
    registers = REGISTERS_GLM if source.name.startswith("glm") else REGISTERS
    for kernel in kernels:
        assert kernel["stack"] == kernel["stores"] == kernel["loads"] == "0", kernel[0]
        assert int(kernel["registers"]) <= registers, kernel[0]
