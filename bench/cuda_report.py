"""What every CUDA kernel takes of a multiprocessor, by architecture: ``python -m bench.cuda_report [file.cu ...]``.

Needs a toolkit, not a GPU. It makes the CUDA build of ``setup.py`` for all architectures in ``build/cuda_report``,
where only what has changed is compiled again. ``tests/test_cuda_compiles.py`` holds the kernels to the report.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypergrad_ext.demo.tables import table

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda_report"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
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


def build(nvcc: str) -> Path:
    """The CUDA build for all architectures that the toolkit knows; returns the folder to import it from.

    Raises:
        RuntimeError: If it does not compile or link.
    """
    # torch writes 9.0a where nvcc writes 90a.
    architectures = ";".join(re.sub(r"(\d)(a?)$", r".\1\2", a) for a in ARCHITECTURES if supports(nvcc, a))
    environment = os.environ | {
        "HYPERGRAD_EXT_BUILD": "cuda",
        "HYPERGRAD_EXT_NVCC": nvcc,
        "PYTORCH_NVCC": str(Path(__file__).parent / "nvcc_report.sh"),
        "TORCH_CUDA_ARCH_LIST": architectures,
    }
    folders = ["--build-lib", BUILD / "lib", "--build-temp", BUILD / "objects"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    BUILD.mkdir(parents=True, exist_ok=True)
    # Test processes side by side build once: the others wait, and find everything done.
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the CUDA build failed:\n{result.stdout}{result.stderr}")
    return BUILD / "lib"


def kernels(source: Path) -> list[Kernel]:
    """What the assembler said of the kernels of one file in the last build.

    Raises:
        RuntimeError: If the assembler's report is not understood.
    """
    (path,) = BUILD.glob(f"objects/**/{source.stem}.o.ptxas")
    text = path.read_text()
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
    """Build, and print the table for the files of the command line, or for all."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no CUDA toolkit found (CUDA_HOME, /usr/local/cuda, PATH)")
    build(nvcc)
    for source in map(Path, sys.argv[1:] or SOURCES):
        print(f"{source.name}\n{report(kernels(source))}\n")


if __name__ == "__main__":
    main()
