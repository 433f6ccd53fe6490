"""What every CUDA kernel takes of a multiprocessor, by architecture: ``python -m bench.cuda_report [file.cu ...]``.

Needs a toolkit, not a GPU. ``tests/test_cuda_compiles.py`` holds the kernels to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from hypergrad_ext.demo.tables import table

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
# Ampere, Hopper, Blackwell.
ARCHITECTURES = ("80", "90a", "100")

REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\w+)'\n"
    r".*Function properties for .*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)
# What the names of kernels and of their types need not say.
NOISE = re.compile(
    r"hg::cuda::|hg::|\(anonymous namespace\)::|<unnamed>::|_INTERNAL_\w+::|^void |\(int\)|\(bool\)|\(.*\)$"
)


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    shared: int  # static; dynamic shared memory is the launch's
    stack: int
    spills: int  # bytes stored and loaded


def find_nvcc() -> str | None:
    """The compiler of the toolkit that CUDA_HOME names, of the usual place, or on PATH."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(root, "bin", "nvcc") for root in roots if root]
    return next((str(c) for c in candidates if c.is_file()), shutil.which("nvcc"))


def supports(nvcc: str, arch: str) -> bool:
    """Whether this toolkit compiles for the architecture."""
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return f"sm_{arch.rstrip('a')}" in codes


def compile_report(nvcc: str, source: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[Kernel]:
    """Compile one file for all architectures and read what the assembler says of its kernels.

    Raises:
        RuntimeError: If it does not compile, or the assembler's report is not understood.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    with tempfile.TemporaryDirectory() as folder:
        # With torch's own flags, as setup.py's build: they take away the implicit conversions of half types.
        command = [nvcc, "-c", "-O3", "-std=c++17", *COMMON_NVCC_FLAGS, "-Xptxas=-v", "--threads=2", *targets, source]
        result = subprocess.run(
            [*command, "-o", Path(folder, "kernels.o")], capture_output=True, text=True, check=False
        )
    text = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(f"{source} does not compile:\n{text}")
    found = list(REPORT.finditer(text))
    if not found or len(found) != text.count("Compiling entry function"):
        raise RuntimeError(f"the report on {source} is not understood:\n{text}")
    names = demangle(match["kernel"] for match in found)
    return [
        Kernel(
            name,
            match["arch"],
            int(match["registers"]),
            int((re.search(r"(\d+) bytes smem", match["rest"]) or [0, 0])[1]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for name, match in zip(names, found, strict=True)
    ]


def demangle(names: Iterable[str]) -> list[str]:
    """Readable names, as far as there is a tool for it."""
    names = list(names)
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    lines = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [NOISE.sub("", line) for line in lines.splitlines()]


def report(kernels: Iterable[Kernel]) -> str:
    """A table with one line per kernel and architecture."""
    header = ["kernel", "arch", "registers", "static shared", "stack", "spills"]
    rows = [[k.name, k.arch, *map(str, (k.registers, k.shared, k.stack, k.spills))] for k in kernels]
    return table(header, sorted(rows), left=2)


def main() -> None:
    """Print the table for the files of the command line, or for all."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no CUDA toolkit found (CUDA_HOME, /usr/local/cuda, PATH)")
    architectures = [arch for arch in ARCHITECTURES if supports(nvcc, arch)]
    for source in map(Path, sys.argv[1:] or SOURCES):
        print(f"{source.name}\n{report(compile_report(nvcc, source, architectures))}\n")


if __name__ == "__main__":
    main()
