"""The compiled module ``hypergrad_ext._C``, or the reason why it is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (must be loaded first: _C links against its libraries)

_C: ModuleType | None = None
MISSING = ""
try:
    _C = importlib.import_module("hypergrad_ext._C")
except ModuleNotFoundError:
    MISSING = "hypergrad_ext._C is not built (pip install with a C++ compiler builds it)"
except ImportError as error:
    # Built against another torch, or broken: worth the full text.
    MISSING = f"hypergrad_ext._C does not load ({error})"


def build_info() -> dict[str, object]:
    """What the compiled module was built with: ``isa``, ``threads``, ``openmp``, ``cuda``; empty without one."""
    return {} if _C is None else _C.build_info()
