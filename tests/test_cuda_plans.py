"""How products with a network's Hessian run on a CUDA device: a plain function, the same in every build."""

from __future__ import annotations

import pytest

from hypergrad_ext import _native

pytestmark = pytest.mark.skipif(_native._C is None, reason=_native.MISSING)

# An H200: 132 multiprocessors.
H200 = {
    "multiprocessors": 132,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "cooperative": 1,
    "capability": 90,
}


class TestMlpPlan:
    def plan(self, sizes, n=256, k=1, itemsize=4, curved=True, **chip):
        return _native._C.mlp_hvp_plan(sizes, n, k, itemsize, curved, H200 | chip)

    @pytest.mark.parametrize(
        ("sizes", "n", "k"),
        [((32,) * 61, 256, 1), ((32,) * 60 + (10,), 32, 1), ((32,) * 61, 256, 8), ((20, 64, 2), 100, 1)],
        ids=["60x32-256", "60x32-32", "60x32-256-k8", "20-64-2"],
    )
    def test_deep_and_narrow(self, sizes, n, k):
        path, reason = self.plan(sizes, n, k)
        assert path == "one_launch" and "us layer by layer" in reason

    def test_more_vectors_than_multiprocessors(self):
        path, reason = self.plan((32,) * 61, k=100)
        assert path == "launches" and "us in one launch" in reason

    @pytest.mark.parametrize(
        ("change", "path", "reason"),
        [
            ({"sizes": (784, 256, 256, 10)}, "launches", "do not fit"),
            ({"sizes": (5000, 32, 10)}, "launches", "too wide for shared memory"),
            ({"sizes": (2048,) * 4, "n": 1024}, "products", "arithmetic, not launches"),
            ({"sizes": (8,) * 63}, "launches", "at most 61 layers"),
            ({"sizes": (20, 64, 2), "cooperative": 0}, "launches", "no cooperative launches"),
            ({"sizes": (32,) * 61, "n": 50_000}, "launches", "not all rows at the same time"),
        ],
        ids=["784-256-256-10", "wide-inputs", "4x2048", "63-layers", "no-cooperation", "large-batch"],
    )
    def test_others(self, change, path, reason):
        found, why = self.plan(**change)
        assert found == path and reason in why
