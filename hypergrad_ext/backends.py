"""Which implementation of a fused op runs: chosen per call from the device, never at import."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from hypergrad_ext import _native

ENVIRONMENT = "HYPERGRAD_EXT_BACKEND"
NAMES = ("auto", "cpp", "cuda", "triton", "torch")

_logger = logging.getLogger("hypergrad_ext")
_logged: set[str] = set()


def unavailable(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run on ``device_type``; empty if it can."""
    if backend == "torch":
        return ""
    if backend == "cpp":
        return _native.MISSING or ("" if device_type == "cpu" else f"the C++ kernels run on the CPU, not {device_type}")
    if backend == "cuda":
        if _native.MISSING:
            return _native.MISSING
        if not _native.build_info()["cuda"]:
            return "hypergrad_ext._C was built without CUDA (HYPERGRAD_EXT_BUILD=cuda builds it)"
        runs_on = "cpu" if _native.EMULATED else "cuda"
        return "" if device_type == runs_on else f"the CUDA kernels do not run on {device_type}"
    import hypergrad_ext.kernels as triton_kernels

    return triton_kernels.unavailable(device_type)


def asked_for(requested: str | None) -> str:
    """The backend that a call, else the environment, asks for."""
    return requested or os.environ.get(ENVIRONMENT) or "auto"


def select(kernels: Mapping[str, Callable], device_type: str, requested: str | None = None) -> tuple[str, str]:
    """Name of the backend to use for one op, and why.

    ``requested`` (else the environment variable ``HYPERGRAD_EXT_BACKEND``, else ``"auto"``) names a
    backend. ``"auto"`` takes the first that can run: ``cpp`` on the CPU; ``cuda``, then ``triton`` on
    a GPU; ``torch`` anywhere.

    Returns:
        The name, and why this one.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend asked for cannot run, with the reason.
    """
    asked, source = asked_for(requested), "backend" if requested else ENVIRONMENT
    if asked not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {asked!r}")
    if asked != "auto":
        reason = _unavailable(asked, kernels, device_type)
        if reason:
            raise RuntimeError(f"{source} {asked!r} was asked for and cannot run: {reason}")
        return asked, "asked for"
    rejected: list[str] = []
    for name in ("cpp",) if device_type == "cpu" else ("cuda", "triton"):
        reason = _unavailable(name, kernels, device_type)
        if not reason:
            return name, "; ".join(rejected) or "first choice"
        rejected.append(f"{name}: {reason}")
    why = "; ".join(rejected)
    if why not in _logged:
        _logged.add(why)
        _logger.warning("falling back to torch ops on %s: %s", device_type, why)
    return "torch", why


def _unavailable(backend: str, kernels: Mapping[str, Callable], device_type: str) -> str:
    return unavailable(backend, device_type) or ("" if backend in kernels else "no such kernel for this op")
