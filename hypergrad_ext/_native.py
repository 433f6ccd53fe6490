"""The compiled module ``hypergrad_ext._C``, or the reason why it is missing."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  (must be loaded first: _C links against its libraries)

_C: ModuleType | None
try:
    from hypergrad_ext import _C

    MISSING = ""
except ImportError as error:
    _C = None
    # A built module that does not load is another torch's or a broken build: worth the full text.
    MISSING = f"hypergrad_ext._C is not built or does not load ({error})"


def build_info() -> dict[str, object]:
    """What the compiled module was built with: ``isa``, ``threads``, ``openmp``, ``cuda``; empty without one."""
    return {} if _C is None else _C.build_info()
