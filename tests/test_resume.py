"""An outer loop that was interrupted ends in the same bits as one that was not."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hypergrad_ext as hg
from tests.outer_loop import SOLVERS, Loop

STEPS = 18


@pytest.fixture(scope="module")
def uninterrupted():
    """Hyperparameters after every step, by solver, computed once."""
    kept: dict[str, list[list[torch.Tensor]]] = {}

    def of(solver: str) -> list[list[torch.Tensor]]:
        if solver not in kept:
            loop, path = Loop(solver), []
            for _ in range(STEPS):
                loop.step()
                path.append([t.detach().clone() for t in loop.hparams.values()])
            assert loop.outer.steps > STEPS / 2
            kept[solver] = path
        return kept[solver]

    return of


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.detach(), b.detach()) and not a.isnan().any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_resumes_at_random_steps(solver, uninterrupted):
    """Several times in one run, each time into new objects and through torch.save."""
    path, generator = uninterrupted(solver), random.Random(solver)
    stops = sorted(generator.sample(range(1, STEPS), 4))
    loop = Loop(solver)
    for step in range(STEPS):
        if step in stops:
            file = io.BytesIO()
            torch.save(loop.state_dict(), file)
            loop = Loop(solver)
            torch.manual_seed(generator.randrange(1 << 30))
            file.seek(0)
            loop.load_state_dict(torch.load(file))  # weights_only: nothing but tensors and plain values
        loop.step()
        assert_same_bits(loop.hparams.values(), path[step])


def test_state_matters(uninterrupted):
    """The test above can fail: without the solver's state the bits are others."""
    loop = Loop("auto")
    for step in range(STEPS):
        if step == 7:
            loop.outer.state = hg.SolverState()
        loop.step()
    with pytest.raises(AssertionError):
        assert_same_bits(loop.hparams.values(), uninterrupted("auto")[-1])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that nobody can catch")
@pytest.mark.parametrize("solver", ["auto-sketched"])
def test_killed_process_goes_on(tmp_path, solver, uninterrupted):
    command = [sys.executable, "-m", "tests.outer_loop", str(tmp_path), solver, str(STEPS)]
    here = Path(__file__).parent.parent
    victim = random.randrange(1, STEPS - 8)
    child = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True)
    progress, deadline = tmp_path / "step", time.monotonic() + 240
    while not (progress.exists() and int(progress.read_text() or 0) >= victim):
        assert child.poll() is None and time.monotonic() < deadline, child.stderr.read() if child.poll() else "slow"
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    stopped = torch.load(tmp_path / "checkpoint.pt")["outer"]["steps"]
    assert victim <= stopped < STEPS
    subprocess.run(command, cwd=here, check=True, timeout=240, env={**os.environ, "PYTHONHASHSEED": "7"})
    final = torch.load(tmp_path / "checkpoint.pt")["outer"]
    assert_same_bits(final["hparams"], uninterrupted(solver)[-1])
