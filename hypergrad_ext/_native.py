"""The compiled module ``hypergrad_ext._C``, or the reason why it is missing."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch  # noqa: F401  (must be loaded first: _C links against its libraries)

# For tests: the build that runs the CUDA kernels on the CPU, thread for thread.
EMULATED = os.environ.get("HYPERGRAD_EXT_EMULATE_CUDA") == "1"

_NAME = "hypergrad_ext._C_emulated" if EMULATED else "hypergrad_ext._C"
_C: ModuleType | None = None
MISSING = ""
try:
    _C = importlib.import_module(_NAME)
except ModuleNotFoundError:
    how = "HYPERGRAD_EXT_BUILD=emulate builds it" if EMULATED else "pip install with a C++ compiler builds it"
    MISSING = f"{_NAME} is not built ({how})"
except ImportError as error:
    # Built against another torch, or broken: worth the full text.
    MISSING = f"{_NAME} does not load ({error})"


def build_info() -> dict[str, object]:
    """What the compiled module was built with (``openmp``, ``cuda``) and runs on (``isa``, ...); empty without one."""
    return {} if _C is None else _C.build_info()
