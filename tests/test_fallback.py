"""Backends: chosen per call, with reasons; and the package without its compiled module."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import _native, backends, ops


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


WITHOUT_NATIVE = """
import sys
sys.modules["hypergrad_ext._C"] = None  # an import of it now fails
import torch, hypergrad_ext as hg
from hypergrad_ext import backends
w = torch.tensor([1.0, 2.0], requires_grad=True)
"""


def test_without_the_compiled_module_everything_works_on_torch_and_asking_for_it_raises_with_the_reason():
    result = run(
        WITHOUT_NATIVE + "print(hg.inverse_hvp((w**4).sum() / 12, w, torch.ones(2), hg.CG(tol=1e-6)))\n"
        "print(hg.inverse_hvp((w**2).sum(), w, torch.ones(2), hg.Neumann(60, alpha=0.25)))\n"
        "hg.inverse_hvp((w**2).sum(), w, torch.ones(2), backend='cpp')"
    )
    assert result.stdout.split() == "tensor([1.0000, 0.2500]) tensor([0.5000, 0.5000])".split(), result.stderr
    assert result.stderr.count("falling back to torch ops on cpu: cpp: hypergrad_ext._C is not built") == 1
    assert result.returncode != 0
    assert "backend 'cpp' was asked for and cannot run: hypergrad_ext._C is not built" in result.stderr


def test_environment_variable_overrides(monkeypatch):
    monkeypatch.setenv("HYPERGRAD_EXT_BACKEND", "torch")
    assert backends.select(ops.neumann_step_.kernels, "cpu") == ("torch", "asked for")
    monkeypatch.setenv("HYPERGRAD_EXT_BACKEND", "fpga")
    with pytest.raises(ValueError, match="HYPERGRAD_EXT_BACKEND must be one of .*'fpga'"):
        backends.select(ops.neumann_step_.kernels, "cpu")
    monkeypatch.setenv("HYPERGRAD_EXT_BACKEND", "")
    assert backends.select(ops.neumann_step_.kernels, "cpu")[1] != "asked for"


def test_explicit_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv("HYPERGRAD_EXT_BACKEND", "cuda")
    w = torch.ones(2, requires_grad=True)
    hg.inverse_hvp((w**2).sum(), w, torch.ones(2), backend="torch")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="HYPERGRAD_EXT_BACKEND 'cuda' was asked for and cannot run"):
            hg.inverse_hvp((w**2).sum(), w, torch.ones(2))


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_choice_gives_a_reason(op):
    name, why = backends.select(op.kernels, "cpu")
    assert (name == "cpp") == (not _native.MISSING) and why
    name, why = backends.select(op.kernels, "meta")
    assert name == "torch" and "cuda: " in why and "triton: " in why


def test_fallback_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="hypergrad_ext"):
        for _ in range(3):
            backends.select({"torch": print}, "cpu")
    reason = _native.MISSING or "no such kernel for this op"
    assert len(caplog.records) == 1 and f"falling back to torch ops on cpu: cpp: {reason}" in caplog.text


@pytest.mark.skipif(bool(_native.MISSING), reason=_native.MISSING or "-")
def test_native_module_says_how_it_was_built():
    info = _native.build_info()
    assert info["openmp"], "without OpenMP at::parallel_for runs on one thread, silently"
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    assert info["isa"] == expected
