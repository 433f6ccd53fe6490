"""Gram matrices, and solves with matrices given by their entries, of every backend against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypergrad_ext import backends, ops, reference
from tests.compare import assert_close, assert_no_worse_than_torch, relative_error
from tests.threads import threads

CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


MISSING = backends.unavailable("cpp", "cpu")
needs_cpp = pytest.mark.skipif(bool(MISSING), reason=MISSING or "the C++ kernels are there")


def by_formula(x, weights):
    return torch.einsum("nc,ni,nj->cij", weights.double(), x.double(), x.double())


def rows_of(n, d, gap, dtype):
    """X as a slice of something wider."""
    return torch.randn(n, d + gap, dtype=dtype)[:, :d]


class TestGram:
    SIZE = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 97, 130]))

    @needs_cpp
    @settings(max_examples=150, deadline=None)
    @given(
        n=st.one_of(SIZE, st.sampled_from([255, 256, 257, 1023, 2300])),
        d=SIZE,
        columns=st.integers(1, 3),
        gap=st.integers(0, 3),
        count=st.integers(1, 3),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    )
    # Ranges of rows with sums of their own, in several blocks; panels shared; one thread.
    @example(n=9000, d=33, columns=1, gap=1, count=3, dtype=torch.float64)
    @example(n=1500, d=300, columns=2, gap=0, count=2, dtype=torch.float64)
    @example(n=1500, d=300, columns=1, gap=0, count=1, dtype=torch.float32)
    def test_every_shape(self, n, d, columns, gap, count, dtype):
        # Of one sign: a sum that cancels has any relative error.
        x, weights = rows_of(n, d, gap, dtype), torch.rand(n, columns, dtype=dtype) - 1
        with threads(count):
            value = ops.glm_gram.kernels["cpp"](x, weights)
        assert torch.equal(value, value.mT)
        truth = by_formula(x, weights)
        if dtype == torch.float64:
            assert_close(value, truth, 1e-13)
        else:
            # Few numbers may come out well by luck: torch's error is the worst of some orders of the rows.
            orders = [torch.arange(n), *(torch.randperm(n) for _ in range(4))]
            by_torch = [torch.stack([x[at].T @ (x * w[:, None])[at] for w in weights.T]) for at in orders]
            assert_no_worse_than_torch(value, max(by_torch, key=lambda t: relative_error(t, truth)), truth, 1e-7)

    @pytest.mark.parametrize("shape", [(0, 5), (0, 0), (5, 0)], ids=str)
    def test_nothing_to_add_up(self, shape, backend):
        value = ops.glm_gram.kernel(CPU, backend)(torch.randn(shape), torch.randn(shape[0], 2))
        assert torch.equal(value, torch.zeros(2, shape[1], shape[1]))

    @pytest.mark.parametrize("n", [300, 20_000])
    def test_many_rows(self, n, backend):
        x, weights = rows_of(n, 230, 3, torch.float64), torch.randn(n, 2, dtype=torch.float64)
        assert_close(ops.glm_gram.kernel(CPU, backend)(x, weights), by_formula(x, weights), 1e-13)

    @needs_cpp
    def test_same_numbers_every_time(self):
        x, weights = torch.randn(20_000, 40), torch.rand(20_000, 1)
        with threads(3):
            first, *others = [ops.glm_gram.kernels["cpp"](x, weights) for _ in range(5)]
        assert all(torch.equal(first, other) for other in others)

    @needs_cpp
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": torch.zeros(4, 3).half()}, TypeError, "x and weights must both be float64 or both be float32"),
            ({"weights": torch.zeros(4, 1).double()}, TypeError, "got Float and Double"),
            ({"x": torch.zeros(3, 4).T}, ValueError, r"x must have shape \(n, d\) with contiguous rows"),
            ({"weights": torch.zeros(4)}, ValueError, r"weights must be contiguous with shape \(4, m\), got \[4\]"),
            ({"weights": torch.zeros(5, 1)}, ValueError, r"shape \(4, m\), got \[5, 1\]"),
            ({"weights": torch.zeros(2, 4).T}, ValueError, "weights must be contiguous"),
            ({"x": torch.zeros(4, 3, requires_grad=True)}, ValueError, "must not require grad"),
            ({"x": None}, TypeError, "x must hold tensors, got NoneType"),
        ],
        ids=lambda x: x if isinstance(x, str) else None,
    )
    def test_guards(self, change, error, message):
        with pytest.raises(error, match=message):
            ops.glm_gram.kernels["cpp"](**({"x": torch.zeros(4, 3), "weights": torch.zeros(4, 1)} | change))


class TestSolves:
    """More vectors than are multiplied by dot products, and rows of a matrix that do not lie one after another."""

    def matrix(self, n, layout, dtype=torch.float64):
        a = torch.randn(n, n, dtype=dtype) / (3 * n**0.5)
        a = a + a.mT + torch.eye(n, dtype=dtype)
        if layout == "rows apart":
            return torch.cat([a, a], 1)[:, :n]
        return a.mT if layout == "transposed" else a

    @pytest.mark.parametrize("layout", ["dense", "rows apart", "transposed"])
    @pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 32, 33])
    @pytest.mark.parametrize("n", [1, 5, 70, 260])
    def test_any_number_of_vectors(self, n, k, layout, backend):
        matrix, b = self.matrix(n, layout), torch.randn(k, n, dtype=torch.float64)
        solve = 0.3, 0.1, 40, torch.full((k,), -1.0, dtype=torch.float64)
        value, history = ops.dense_neumann_solve.kernel(CPU, backend)(matrix, b, *solve)
        truth, expected = reference.dense_neumann_solve(matrix, b, *solve)
        assert_close(value, truth, 1e-12)
        assert_close(history[:, :, 0], expected[:, :, 0], 1e-11)
        squares = b.square().sum(1)
        state = torch.stack([squares, 1e-16 * squares, 0 * squares, 0 * squares], 1)
        solution = ops.dense_cg_solve.kernel(CPU, backend)(matrix, b, 0.1, 3 * n, state)[0]
        shifted = matrix + 0.1 * torch.eye(n, dtype=torch.float64)
        assert_close(solution, torch.linalg.solve(shifted, b.T).T, 1e-6)

    def test_a_matrix_that_is_not_symmetric_is_not_turned(self, backend):
        matrix, b = torch.randn(80, 80, dtype=torch.float64) / 20, torch.randn(2, 80, dtype=torch.float64)
        never = torch.full((2,), -1.0, dtype=torch.float64)
        value, _ = ops.dense_neumann_solve.kernel(CPU, backend)(matrix, b, 1.0, 0.0, 1, never)
        assert_close(value, 2 * b - b @ matrix.T, 1e-14)

    @needs_cpp
    def test_several_threads(self):
        matrix, b = self.matrix(700, "dense", torch.float32), torch.randn(6, 700)
        never = torch.full((6,), -1.0, dtype=torch.float64)
        truth, _ = reference.dense_neumann_solve(matrix.double(), b.double(), 0.3, 0.1, 20, never)
        by_torch, _ = reference.dense_neumann_solve(matrix, b, 0.3, 0.1, 20, never)
        for count in (1, 2, 3):
            with threads(count):
                value, _ = ops.dense_neumann_solve.kernels["cpp"](matrix, b, 0.3, 0.1, 20, never)
            assert_no_worse_than_torch(value, by_torch, truth, 1e-7)
