"""What is installed, and which kernels can run on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import hypergrad_ext
from hypergrad_ext import _native, backends, ops
from hypergrad_ext.demo.tables import table


def describe() -> str:
    """Versions, processor, and for every op and backend whether it can run, or why not."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    facts = [
        ("hypergrad_ext", hypergrad_ext.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton") or "not installed"),
        ("compiled kernels", _compiled()),
        ("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", f"{torch.get_num_threads()} for torch, {os.cpu_count()} CPUs"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"),
        ("engine 'auto'", _engine()),
        (backends.ENVIRONMENT, os.environ.get(backends.ENVIRONMENT) or "not set"),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    rows = [row for op in ops.ALL for device in devices for row in _backends_of(op, device)]
    return "\n".join([*lines, "", table(["op", "device", "backend", "can run", ""], rows, left=5)])


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _backends_of(op: ops.Op, device: str) -> list[list[str]]:
    """One line per backend; the one in use, and the one ``auto`` picks, say so."""
    auto = backends.select(op.kernels, device, "auto")[0]
    try:
        used, refusal = backends.select(op.kernels, device)[0], ""
    except (RuntimeError, ValueError) as error:
        used, refusal = "", str(error)
    rows = []
    for name in backends.NAMES[1:]:
        reason = backends.unavailable(name, device) or ("" if name in op.kernels else "this op has no such kernel")
        notes = [
            reason,
            "auto picks this" if name == auto else "",
            f"{backends.ENVIRONMENT} picks this" if name == used != auto else "",
        ]
        rows.append([op.name, device, name, "no" if reason else "yes", "; ".join(filter(None, notes))])
    return rows + ([[op.name, device, "", "no", refusal]] if refusal else [])


def _engine() -> str:
    if _native._C is None:
        return "on the CPU recorded torch operations where they are measured to be faster, else backward passes"
    return "native plans on the CPU, CUDA graphs on a GPU, if measured faster than backward passes; the log says which"


def _compiled() -> str:
    if _native.MISSING:
        return f"none: {_native.MISSING}"
    return ", ".join(f"{key} {value}" for key, value in _native.build_info().items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
