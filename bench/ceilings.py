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

from bench.measure import ratio

ARITHMETIC, READING = "multiply-adds in registers", "plain reading"
# Flops and bytes per thread of a timed call, at least: some 20 ms.
LONG, FAR = 2e9, 4e8


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
    library.lanes.restype = ctypes.c_long
    library.multiply_add.argtypes = [ctypes.c_long]
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    return library


class Floor:
    """What a kernel that reads float32 ``x`` once per product, and makes so many flops for it, cannot be faster than.

    ``variants`` do this much of either and nothing else, on so many threads, and so often that waking the threads is no
    part of it. They are timed in the same rounds, because a machine that is shared is now faster, now slower. Empty
    where there is no compiler.
    """

    def __init__(self, flops: float, x: Tensor, threads: int, products: int = 1) -> None:
        library = _library()
        self.variants: dict[str, Callable[[], object]] = {}
        if library is None or x.dtype != torch.float32 or not x.is_contiguous():
            return
        share = x.numel() // threads
        self._repeats = {
            ARITHMETIC: max(1, round(LONG * threads / (products * flops))),
            READING: max(1, round(FAR / (products * 4 * share))),
        }
        steps = round(self._repeats[ARITHMETIC] * products * flops / (threads * 12 * library.lanes() * 2))
        times = self._repeats[READING] * products
        pool = ThreadPoolExecutor(threads)

        def on_all(job: Callable[[int], object]) -> Callable[[], object]:
            return (lambda: job(0)) if threads == 1 else (lambda: list(pool.map(job, range(threads))))

        self.variants = {
            ARITHMETIC: on_all(lambda _: library.multiply_add(steps)),
            READING: on_all(lambda t: library.read_all(x.data_ptr() + 4 * t * share, share, times)),
        }

    def percent(self, seconds: dict[str, list[float]], kernel: str) -> float | None:
        """How near a kernel is to the floor: the median over the rounds; None where nothing was measured."""
        if not self.variants:
            return None
        return 100 * max(ratio(seconds, limit, kernel)[0] / self._repeats[limit] for limit in self.variants)

    def speedup(self, seconds: dict[str, list[float]], other: str) -> float | None:
        """How many times faster than another variant a kernel at the floor would be; None likewise."""
        if not self.variants:
            return None
        return min(ratio(seconds, other, limit)[0] * self._repeats[limit] for limit in self.variants)
