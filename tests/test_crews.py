"""Threads that stay for a whole solve (csrc/cpu/crew.h): its result, whatever they do."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hypergrad_ext as hg
from hypergrad_ext import backends, ops
from tests.compare import assert_close
from tests.threads import threads

MISSING = backends.unavailable("cpp", "cpu")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "the C++ kernels are there")

SOLVE = 0.5, 0.1, 10  # alpha, damping, steps


def never(k):
    return torch.full((k,), -1.0, dtype=torch.float64)


def by_rows(k):
    x, weights = torch.randn(4000, 400, dtype=torch.float64), torch.rand(4000, dtype=torch.float64)
    b = torch.randn(k, 400, dtype=torch.float64)
    return lambda: ops.glm_neumann_solve(x, weights, b, None, 1 / 4000, False, *SOLVE, never(k))[0]


def by_entries(k):
    root, b = torch.randn(1500, 1500, dtype=torch.float64), torch.randn(k, 1500, dtype=torch.float64)
    matrix = root @ root.T / 6000
    return lambda: ops.dense_neumann_solve(matrix, b, *SOLVE, never(k))[0]


def of_a_network(k):
    """A native plan of several kernels that threads share."""
    model = nn.Sequential(nn.Linear(80, 200), nn.Tanh(), nn.Linear(200, 10)).double()
    x, y = torch.randn(500, 80, dtype=torch.float64), torch.randint(10, (500,))
    loss = lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)  # noqa: E731
    # Not "auto", which may take another engine the next time, whose rounding differs.
    operator = hg.Hessian(loss, model, engine="native")
    b = {name: torch.randn(k, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    return lambda: hg.solve(operator, b, hg.Neumann(10, alpha=0.1), damping=0.1).value


def of_a_perceptron(k):
    params = [torch.randn(shape, dtype=torch.float64) / 8 for shape in ((150, 60), (150,), (10, 150), (10,))]
    x, y = torch.randn(800, 60, dtype=torch.float64), torch.randint(10, (800,))
    operator = hg.MLPHessian(x, params, y, activation="tanh", loss="cross_entropy")
    b = [torch.randn(k, *p.shape, dtype=torch.float64) for p in params]
    return lambda: hg.solve(operator, b, hg.Neumann(10, alpha=0.1), damping=0.1).value


PROBLEMS = [by_rows, by_entries, of_a_network, of_a_perceptron]


@pytest.mark.parametrize("count", [1, 2, 3, 5])  # also more than there are cores
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_solve_is_the_same_each_time_and_near_that_of_one_thread(problem, k, count):
    solve = problem(k)
    with threads(1):
        alone = solve()
    with threads(count):
        together = [solve() for _ in range(5)]
    assert_close(together[0], alone, 1e-12)
    for again in together[1:]:
        assert_close(again, together[0], 0.0)


def test_every_thread_of_the_program_has_a_crew_of_its_own():
    solves = [problem(1) for problem in PROBLEMS]
    with threads(3):
        alone = [solve() for solve in solves]
    results = [[] for _ in solves]

    def repeat(solve, into):
        with threads(3):
            into.extend(solve() for _ in range(10))

    at_once = [threading.Thread(target=repeat, args=pair) for pair in zip(solves, results, strict=True)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    for mine, result in zip(alone, results, strict=True):
        assert len(result) == 10
        for value in result:
            assert_close(value, mine, 1e-12)
