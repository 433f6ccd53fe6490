"""The flat buffer behind the parameters' views."""

from __future__ import annotations

import pytest
import torch

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.structure import Space, take_apart, views
from tests.compare import assert_close

SHAPES = [(4, 4), (3,), (), (2, 1, 5)]


@pytest.fixture
def space():
    return Space(take_apart("params", [torch.zeros(shape) for shape in SHAPES]))


@pytest.mark.parametrize("lead", [(), (1,), (6,)])
class TestJoined:
    def test_views_give_their_buffer_back(self, space, lead):
        flat = torch.randn(*lead, space.numel)
        joined = space.joined(space.views(flat))
        assert joined is flat if lead != (1,) else torch.equal(joined, flat)

    def test_a_slice_of_a_larger_buffer_is_joined_to_its_values(self, space, lead):
        flat = torch.randn(3, *lead, space.numel)[1]
        assert torch.equal(space.joined(space.views(flat)), flat)

    @pytest.mark.parametrize(
        "change",
        {
            "transposed": lambda v: [v[0].mT, *v[1:]],
            "first again": lambda v: [v[0], v[1], v[2], v[3][..., :1, :, :].expand_as(v[3])],
            "another buffer": lambda v: [*v[:3], v[3].clone()],
            "flipped": lambda v: [v[0].flip(-1), *v[1:]],
            "copies": lambda v: [t.clone() for t in v],
        }.values(),
        ids=["transposed", "first again", "another buffer", "flipped", "copies"],
    )
    def test_everything_else_is_copied(self, space, lead, change):
        parts = change(space.views(torch.randn(*lead, space.numel)))
        assert torch.equal(space.joined(parts), torch.cat([t.reshape(*lead, -1) for t in parts], -1))

    def test_in_inference_mode(self, space, lead):
        with torch.inference_mode():
            flat = torch.randn(*lead, space.numel)
            assert torch.equal(space.joined(space.views(flat)), flat)


def test_a_product_that_returns_its_vector_is_left_alone():
    b = torch.randn(4, 6)
    solution = hg.solve(hg.Callable(lambda v: v, like=b[0]), b, hg.BlockCG(tol=1e-6), damping=1.0)
    assert_close(solution.value, b / 2, 1e-6)


@pytest.mark.parametrize("lead", [(), (1,), (6,)])
def test_compiled_views_are_those_of_torch(lead, monkeypatch):
    shapes = [torch.Size(s) for s in [(4, 4), (0, 3), (), (2, 1, 5)]]
    flat = torch.randn(*lead, 40)[..., 7:34]
    ours = views(flat, shapes)
    monkeypatch.setattr(_native, "_C", None)
    for part, by_torch in zip(ours, views(flat, shapes), strict=True):
        assert torch.equal(part, by_torch) and part._base is flat._base
        if part.numel():
            matter = [d for d, size in enumerate(part.shape) if size > 1]
            assert [part.stride(d) for d in matter] == [by_torch.stride(d) for d in matter]
            assert part.data_ptr() == by_torch.data_ptr()


def test_views_of_what_requires_grad_have_its_graph():
    flat = torch.ones(5, requires_grad=True)
    first, second = views(flat, [torch.Size([2]), torch.Size([3, 1])])
    (first.sum() + 3 * second.sum()).backward()
    assert flat.grad.tolist() == [1, 1, 3, 3, 3]


@pytest.mark.skipif(_native._C is None, reason=f"compiled views: {_native.MISSING}")
def test_views_beyond_the_buffer_are_refused():
    with pytest.raises(ValueError, match="too few elements"):
        views(torch.ones(5), [torch.Size([2]), torch.Size([4])])
    with pytest.raises(ValueError, match="dense rows"):
        views(torch.ones(4, 5).T, [torch.Size([2])])
    with pytest.raises(TypeError, match="flat must hold tensors, got list"):
        _native._C.views([1.0], [])
