"""Properties that hold for all inputs: linearity in b, batch = loop, list = flat, any cut, any size."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import hypergrad_ext as hg
from hypergrad_ext import backends, ops, reference
from tests.cases import spd
from tests.compare import assert_close

SOLVERS = [hg.CG(tol=1e-13), hg.Neumann(30, alpha=0.8), hg.Direct(), hg.Identity(0.3)]
seeds, sizes = st.integers(0, 2**31 - 1), st.lists(st.integers(0, 90), min_size=1, max_size=6)
common = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def system(seed: int, n: int) -> tuple[hg.DenseMatrix, torch.Tensor]:
    torch.manual_seed(seed)
    return hg.DenseMatrix(spd(n, 5.0)), torch.randn(3, n, dtype=torch.float64)


@common
@given(seed=seeds, n=st.integers(1, 25), a=st.floats(-10, 10), solver=st.sampled_from(SOLVERS))
def test_linear_in_b(seed, n, a, solver):
    operator, (x, y, _) = system(seed, n)
    solve = lambda b: hg.solve(operator, b, solver, residual=False).value  # noqa: E731
    # Tolerance against the size of the parts: a x + y may cancel.
    difference = solve(a * x + y) - (a * solve(x) + solve(y))
    assert difference.norm() <= 1e-9 * (abs(a) * solve(x).norm() + solve(y).norm() + 1e-300)


@common
@given(seed=seeds, n=st.integers(1, 25), damping=st.floats(0, 1), solver=st.sampled_from(SOLVERS))
def test_batch_is_a_loop(seed, n, damping, solver):
    operator, b = system(seed, n)
    batched = hg.solve(operator, b, solver, damping=damping).value
    single = torch.stack([hg.solve(operator, row, solver, damping=damping).value for row in b])
    assert_close(batched, single, 1e-9)


@common
@given(seed=seeds, cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6), solver=st.sampled_from(SOLVERS))
def test_list_is_flat(seed, cuts, solver):
    operator, b = system(seed, sum(cuts))
    in_list = hg.Callable(
        lambda v: list((operator.matrix @ torch.cat(v)).split(cuts)),
        [torch.zeros(n, dtype=torch.float64) for n in cuts],
    )
    x = hg.solve(in_list, list(b[0].split(cuts)), solver).value
    assert_close(torch.cat(x), hg.solve(operator, b[0], solver).value, 1e-9)


@common
@given(seed=seeds, n=st.integers(2, 20), solver=st.sampled_from(SOLVERS))
def test_order_of_a_batch_does_not_matter(seed, n, solver):
    operator, b = system(seed, n)
    order = torch.randperm(3)
    assert_close(hg.solve(operator, b[order], solver).value, hg.solve(operator, b, solver).value[order], 1e-12)


@common
@given(seed=seeds, n=st.integers(1, 20), damping=st.floats(1e-3, 5))
def test_damping_is_an_addition_to_the_matrix(seed, n, damping):
    operator, b = system(seed, n)
    shifted = hg.DenseMatrix(operator.matrix + damping * torch.eye(n, dtype=torch.float64))
    for solver in (hg.CG(tol=1e-13), hg.Direct(), hg.Neumann(40, alpha=0.15)):
        assert_close(hg.solve(operator, b, solver, damping=damping).value, hg.solve(shifted, b, solver).value, 1e-9)


@pytest.mark.skipif(bool(backends.unavailable("cpp", "cpu")), reason=backends.unavailable("cpp", "cpu") or "-")
@common
@given(
    seed=seeds,
    cuts=sizes,
    other_cuts=sizes,
    rows=st.integers(1, 3),
    alpha=st.floats(-3, 3),
    damping=st.floats(0, 3),
    product=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_step_equals_its_reference_for_any_cuts(seed, cuts, other_cuts, rows, alpha, damping, product):
    torch.manual_seed(seed)
    total = max(sum(cuts), sum(other_cuts))
    cuts, other_cuts = [*cuts, total - sum(cuts)], [*other_cuts, total - sum(other_cuts)]
    v = [torch.randn(rows, n) for n in cuts]
    p = [torch.randn(rows, n) for n in other_cuts]
    hv = [torch.randn(rows, total).to(product)]
    truth = [[t.double() for t in tensors] for tensors in (v, p, hv)]
    stats, true_stats = torch.zeros(2, rows, 2, dtype=torch.float64)
    ops.neumann_step_.kernel(torch.device("cpu"), "cpp")(v, p, hv, stats, alpha, damping)
    reference.neumann_step_(*truth, true_stats, alpha, damping)
    for ours, exact in [(v, truth[0]), (p, truth[1])]:
        difference = torch.cat([t.double().reshape(rows, -1) for t in ours], 1) - torch.cat(exact, 1)
        assert difference.abs().max() <= 1e-5 if total else True
    assert torch.allclose(stats, true_stats, rtol=1e-5)
