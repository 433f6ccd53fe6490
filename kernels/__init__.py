"""Triton kernels, one module per op, and whether they can run here."""

from __future__ import annotations

import importlib.util
import os


def unavailable(device_type: str) -> str:
    """Why Triton kernels cannot run on ``device_type``; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device_type != "cuda":
        return f"triton kernels run on CUDA devices, not {device_type} (TRITON_INTERPRET=1 emulates them)"
    return ""
