"""Matrices so large that matrix units multiply them, where the processor has some, against float64."""

from __future__ import annotations

import pytest
import torch

from hypergrad_ext import _native, ops, reference, reference_mlp
from tests.compare import assert_close, assert_no_worse_than_torch
from tests.test_glm import model
from tests.test_mlp import cast, problem
from tests.threads import threads

pytestmark = pytest.mark.skipif(_native._C is None, reason=f"these kernels are C++: {_native.MISSING}")

NAN_BITS = (0x7F800001, 0x7FFFFFFF, -0x00400000)


def gram(x, weights):
    return ops.glm_gram.kernels["cpp"](x, weights)


class TestGram:
    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("classes", [1, 3])
    @pytest.mark.parametrize(
        ("n", "d", "gap"),
        [
            (1024, 128, 0),
            (1025, 129, 1),
            (1055, 143, 0),
            (1056, 144, 5),
            (1057, 145, 0),
            (1500, 161, 0),
            (4097, 130, 0),
        ],
    )
    def test_error_is_that_of_float32(self, n, d, gap, classes, count):
        x = torch.randn(n, d + gap)[:, :d] * torch.rand(d).pow(3)
        weights = torch.rand(n, classes)
        with threads(count):
            value = gram(x, weights)
        truth = reference.glm_gram(x.double(), weights.double())
        assert_no_worse_than_torch(value, reference.glm_gram(x, weights), truth, 1e-7)
        assert torch.equal(value, value.mT)

    @pytest.mark.parametrize(("n", "d", "count"), [(3000, 784, 2), (1030, 1100, 3)])
    def test_error_of_large_ones(self, n, d, count):
        x, weights = torch.randn(n, d), torch.rand(n, 1)
        with threads(count):
            value = gram(x, weights)
        truth = reference.glm_gram(x.double(), weights.double())
        assert_no_worse_than_torch(value, reference.glm_gram(x, weights), truth, 1e-7)

    @pytest.mark.parametrize("scale", [1e-15, 1e-5, 1e10, 1e15])
    def test_scale_does_not_matter(self, scale):
        x, weights = torch.randn(1100, 150), torch.rand(1100, 1)
        truth = reference.glm_gram(scale * x.double(), weights.double())
        assert_close(gram(scale * x, weights), truth, 1e-6)

    @pytest.mark.parametrize("bits", [0x7F800000, *NAN_BITS])
    def test_what_is_not_finite_is_seen(self, bits):
        x, weights = torch.randn(1100, 150), torch.rand(1100, 1)
        x[170, 33] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        bad = ~gram(x, weights).isfinite()
        touched = torch.zeros(150, 150, dtype=torch.bool)
        touched[33], touched[:, 33] = True, True
        assert torch.equal(bad[0], touched)

    def test_same_bits_every_time(self):
        x, weights = torch.randn(1500, 140), torch.rand(1500, 1)
        for count in (1, 2, 3):
            with threads(count):
                first = gram(x, weights)
                assert all(torch.equal(first, gram(x, weights)) for _ in range(3))


def product(x, weights, v, *rest):
    return ops.glm_hvp.kernels["cpp"](x, weights, v, *rest)


def doubled(arguments):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]


class TestProductsOfBfloat16:
    """X in bfloat16 and several columns; widths of groups of columns are 2, 5, 8 and 10."""

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("k", [2, 3, 5, 6, 8, 9, 10, 11, 21, 33])
    @pytest.mark.parametrize(
        ("n", "d"), [(256, 64), (257, 65), (319, 95), (320, 96), (321, 97), (1023, 127), (2100, 784), (300, 1100)]
    )
    def test_error_is_that_of_float32(self, n, d, k, count):
        arguments = model(n, d, 1, k, k % 2 == 1, torch.bfloat16)
        with threads(count):
            value = product(*arguments)
        truth = reference.glm_hvp(*doubled(arguments))
        assert_no_worse_than_torch(value, reference.glm_hvp(*arguments), truth, 1e-7)

    @pytest.mark.parametrize("intercept", [False, True])
    @pytest.mark.parametrize(("classes", "k"), [(2, 1), (3, 1), (10, 1), (10, 3), (17, 1), (23, 2)])
    def test_classes(self, classes, k, intercept):
        arguments = model(500, 150, classes, k, intercept, torch.bfloat16)
        truth = reference.glm_hvp(*doubled(arguments))
        assert_no_worse_than_torch(product(*arguments), reference.glm_hvp(*arguments), truth, 1e-7)

    def test_long_sums(self):
        """Over rows and over columns: neither rounds worse than torch's, which adds up some hundreds at a time."""
        for n, d in ((40_000, 64), (300, 20_000)):
            x, weights, v, *rest = model(n, d, 1, 3, True, torch.bfloat16)
            arguments = (x.abs(), weights, v.abs(), *rest)
            truth = reference.glm_hvp(*doubled(arguments))
            assert_no_worse_than_torch(product(*arguments), reference.glm_hvp(*arguments), truth, 1e-7)

    @pytest.mark.parametrize("scale", [1e-15, 1e-5, 1e10, 1e15])
    def test_scale_does_not_matter(self, scale):
        x, weights, v, _, *rest = model(300, 100, 1, 4, True, torch.bfloat16)
        truth = reference.glm_hvp(*doubled((x, weights, scale * v, None, *rest)))
        assert_close(product(x, weights, scale * v, None, *rest), truth, 1e-6)

    def test_columns_keep_to_themselves(self):
        x, weights, v, *rest = model(300, 100, 1, 7, True, torch.bfloat16)
        v *= torch.tensor([1e-10, 1.0, 1e10, 1e-5, 1e5, 1e-15, 1e15])[:, None]
        truth = reference.glm_hvp(*doubled((x, weights, v, *rest)))
        for value, row in zip(product(x, weights, v, *rest), truth, strict=True):
            assert_close(value, row, 1e-6)

    @pytest.mark.parametrize("bits", [0x7F800000, *NAN_BITS])
    def test_vectors_that_are_not_finite_are_seen(self, bits):
        x, weights, v, *rest = model(300, 100, 1, 4, False, torch.bfloat16)
        v[2, 70] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        finite = product(x, weights, v, *rest).isfinite()
        assert not finite[2].any() and finite[[0, 1, 3]].all()

    @pytest.mark.parametrize("row", [0, 100, 299])
    def test_rows_that_are_not_finite_are_seen(self, row):
        for bad in (torch.nan, torch.inf):
            x, *rest = model(300, 100, 1, 4, False, torch.bfloat16)
            x[row, 99] = bad
            assert not product(x, *rest).isfinite().any()

    def test_padding_is_never_used(self):
        arguments = model(301, 101, 1, 4, True, torch.bfloat16)
        x = torch.full((302, 120), torch.nan, dtype=torch.bfloat16)
        x[:301, 9:110] = arguments[0]
        assert torch.equal(product(x[:301, 9:110], *arguments[1:]), product(*arguments))

    def test_same_bits_every_time(self):
        arguments = model(3000, 140, 10, 1, True, torch.bfloat16)
        for count in (1, 2, 3):
            with threads(count):
                first = product(*arguments)
                assert all(torch.equal(first, product(*arguments)) for _ in range(3))

    def test_solves(self):
        x, weights, b, l2, scale, intercept = model(400, 80, 1, 5, True, torch.bfloat16)
        alpha, steps, never = 1e-2, 30, torch.full((5,), -1.0, dtype=torch.float64)
        rest = scale, intercept, alpha, 0.1, steps, never
        value, _ = ops.glm_neumann_solve.kernels["cpp"](x, weights, b, l2, *rest)
        assert_close(value, reference.glm_neumann_solve(*doubled((x, weights, b, l2)), *rest)[0], 1e-6)


class TestMlp:
    @pytest.mark.parametrize(
        ("sizes", "n", "k", "activation", "loss", "biases", "count"),
        [
            ((784, 256, 256, 10), 256, 1, "tanh", "cross_entropy", True, 2),
            ((784, 256, 256, 10), 256, 4, "relu", "cross_entropy", False, 2),
            ((300, 200, 33, 250, 7), 300, 2, "tanh", "squared", True, 3),
            ((192, 192), 192, 1, "tanh", "squared", True, 1),
            ((193, 207, 1), 193, 2, "gelu", "squared", False, 1),
            ((208, 209, 208), 257, 1, "softplus", "cross_entropy", True, 3),
            ((223, 224, 225, 20), 200, 1, "sigmoid", "cross_entropy", True, 2),
            ((1200, 192, 3), 290, 1, "relu", "squared", True, 1),
            # Several blocks for a thread, of as many rows as there are at most, and fewer where layers are many.
            ((256, 240, 10), 700, 1, "tanh", "cross_entropy", True, 1),
            ((250,) * 8, 420, 1, "tanh", "squared", True, 2),
            # Of unlike layers the smaller one packs more columns at a time.
            ((352, 320), 192, 1, "tanh", "squared", False, 1),
        ],
        ids=str,
    )
    def test_error_is_that_of_float32(self, sizes, n, k, activation, loss, biases, count):
        _, operator, _ = problem(sizes, n, activation, loss, biases, l2=0.01)
        single = cast(operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64)), torch.float32)
        truth = reference_mlp.mlp_hvp(*cast(single, torch.float64))
        with threads(count):
            value = ops.mlp_hvp.kernels["cpp"](*single)
        assert_no_worse_than_torch(value, reference_mlp.mlp_hvp(*single), truth, 1e-7)

    def test_padding_is_never_used(self):
        _, operator, _ = problem((200, 220, 200), 200)
        single = cast(operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64)), torch.float32)
        truth, poisoned = reference_mlp.mlp_hvp(*cast(single, torch.float64)), []
        for x in single:
            if isinstance(x, list):
                x = [torch.full((len(t), 256), float("nan"), dtype=t.dtype)[:, : t.shape[1]].copy_(t) for t in x]
            poisoned.append(x)
        assert_close(ops.mlp_hvp.kernels["cpp"](*poisoned), truth, 1e-5)

    @pytest.mark.parametrize("bits", NAN_BITS)
    def test_what_is_not_a_number_is_seen(self, bits):
        _, operator, _ = problem((200, 220, 200), 200)
        single = cast(operator._model(torch.randn(1, operator.space.numel, dtype=torch.float64)), torch.float32)
        at = next(i for i, x in enumerate(single) if isinstance(x, torch.Tensor) and x.shape[0] == 1)
        single[at] = single[at].clone()
        single[at][0, 5] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
        assert not ops.mlp_hvp.kernels["cpp"](*single).isfinite().any()


class TestManyColumns:
    """X in float32, and as many columns of vectors and classes as repay packing it."""

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("intercept", [False, True])
    @pytest.mark.parametrize(
        ("n", "d", "classes", "k"),
        [(600, 257, 1, 65), (515, 300, 70, 1), (300, 784, 40, 2), (2100, 256, 3, 40), (130, 700, 1, 129)],
    )
    def test_error_is_that_of_float32(self, n, d, classes, k, intercept, count):
        arguments = model(n, d, classes, k, intercept, torch.float32)
        with threads(count):
            value, again = product(*arguments), product(*arguments)
        assert torch.equal(value, again)
        truth = reference.glm_hvp(*doubled(arguments))
        assert_no_worse_than_torch(value, reference.glm_hvp(*arguments), truth, 1e-7)

    @pytest.mark.parametrize(
        ("n", "d", "k", "dtype"), [(600, 257, 65, torch.float16), (70, 1040, 1010, torch.bfloat16)]
    )
    def test_half_precisions_are_widened(self, n, d, k, dtype):
        arguments = model(n, d, 1, k, True, dtype)
        truth = reference.glm_hvp(*doubled(arguments))
        assert_no_worse_than_torch(product(*arguments), reference.glm_hvp(*arguments), truth, 1e-7)

    def test_rows_that_lie_apart(self):
        x, *rest = model(400, 300, 70, 1, True, torch.float32)
        apart = torch.full((400, 311), torch.nan)
        apart[:, :300] = x
        assert torch.equal(product(apart[:, :300], *rest), product(x, *rest))

    def test_columns_keep_to_themselves(self):
        x, weights, v, *rest = model(400, 300, 1, 70, True, torch.float32)
        v *= (10.0 ** torch.randint(-15, 16, (70,)))[:, None]
        truth = reference.glm_hvp(*doubled((x, weights, v, *rest)))
        for value, row in zip(product(x, weights, v, *rest), truth, strict=True):
            assert_close(value, row, 1e-6)

    def test_vectors_that_are_not_finite_are_seen(self):
        x, weights, v, *rest = model(400, 300, 1, 70, False, torch.float32)
        v[2, 70] = torch.inf
        finite = product(x, weights, v, *rest).isfinite().all(1)
        assert not finite[2] and finite.sum() == 69
