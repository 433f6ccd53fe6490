"""What this machine can do at best, measured in the same run: multiply-adds in registers, and plain reading.

No kernel is faster than its floor, the longer of the two times; what a table's ratio would be there says whether
a goal was missed by the kernel or is out of the machine's reach.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import clock_for

STEPS = 2_000_000


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ceilings.so")
        source = Path(__file__).with_suffix(".c")
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        library = ctypes.CDLL(str(path))
    library.multiply_add.argtypes = [ctypes.c_long]
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return library


def _best(job: Callable[[int], object], threads: int, rounds: int = 7) -> float:
    """Shortest time in which all threads do the job; with one thread, by the process's own clock."""
    clock, times = clock_for(threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = clock()
            list(pool.map(job, range(threads)))
            times.append(clock() - start)
    return min(times)


def floor(flops: float, x: Tensor, threads: int) -> float | None:
    """Seconds that a kernel takes at least which reads float32 ``x`` once and makes so many flops.

    None where there is no compiler.
    """
    library = _library()
    if library is None or x.dtype != torch.float32 or not x.is_contiguous():
        return None
    arithmetic = _best(lambda _: library.multiply_add(STEPS), threads) * flops / (threads * STEPS * 12 * 8 * 2)
    share = x.numel() // threads
    # A small matrix is read often enough for the start of the threads not to count.
    times = max(1, 2**23 // x.numel())
    reading = _best(lambda t: library.read_all(x.data_ptr() + 4 * t * share, share, times), threads) / times
    return max(arithmetic, reading)
