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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

STEPS = 2_000_000


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ceilings.so")
        source = Path(__file__).with_suffix(".c")
        # -ffp-contract=fast is C's default in GNU mode; the loop is not worth a fallback for other machines.
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(path)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        library = ctypes.CDLL(str(path))
    library.multiply_add.argtypes = [ctypes.c_long]
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long]
    return library


def _best(job: Callable[[int], object], threads: int, rounds: int = 7) -> float:
    """Shortest time in which all threads do the job."""
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(job, range(threads)))
            times.append(time.perf_counter() - start)
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
    reading = _best(lambda t: library.read_all(x.data_ptr() + 4 * t * share, share), threads)
    return max(arithmetic, reading)
