"""Convolutions of native plans, with every geometry that a layer may have, against backward passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hypergrad_ext as hg
from hypergrad_ext import _native
from hypergrad_ext.engines import native
from tests.compare import assert_close

pytestmark = [
    pytest.mark.usefixtures("fresh_engines"),
    pytest.mark.skipif(_native._C is None, reason="native plans are C++"),
]


def agree(net: nn.Module, x: Tensor, tolerance: float) -> None:
    """A product by a native plan, twice, and a backward pass."""
    params = [p.detach().clone() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def loss(weights: list[Tensor]) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x,)).square().mean()

    v = [torch.randn_like(p) for p in params]
    operator = hg.Hessian(loss, params, engine="native")
    truth = hg.Hessian(loss, params, engine="eager") @ v
    for _ in range(2):
        assert_close(operator @ v, truth, tolerance)
    assert operator.engine == "native"


@pytest.fixture
def kinds(monkeypatch) -> set[str]:
    """The kinds of instructions, and the ops, of the plans that are made."""
    seen: set[str] = set()
    before = native.serialised

    def noted(instructions, counts):
        seen.update(i.fields[0] if i.kind == "aten" else i.kind for i in instructions)
        return before(instructions, counts)

    monkeypatch.setattr(native, "serialised", noted)
    return seen


geometry = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 3),
        "dilation": st.integers(1, 2),
        "bias": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(geometry, min_size=1, max_size=3),
    st.lists(st.integers(1, 17), min_size=4, max_size=4),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random_geometries(layers, channels, dims, channels_last, seed):
    torch.manual_seed(seed)
    kind = nn.Conv2d if dims == 2 else nn.Conv1d
    parts: list[nn.Module] = []
    for at, given_ in enumerate(layers):
        parts += [kind(channels[at], channels[at + 1], **given_).double(), nn.Tanh()]
    x = torch.randn(3, channels[0], *(19, 21)[:dims], dtype=torch.float64)
    if channels_last and dims == 2:
        x = x.to(memory_format=torch.channels_last)
    net = nn.Sequential(*parts)
    try:
        net(x)
    except RuntimeError:
        return  # the kernel is larger than what is left of the image
    agree(net, x, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 40])
def test_widths_of_images_and_numbers_of_outputs(width, dtype, kinds):
    """Whole vectors, parts of them, and more outputs than a tile has."""
    net = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, 13, 3, padding=1)).to(dtype)
    agree(net, torch.randn(4, 2, 6, width, dtype=dtype), 1e-5 if dtype is torch.float32 else 1e-11)
    assert "convolution" in kinds and not any("conv" in kind for kind in kinds - {"convolution"})


def test_sums_of_convolutions_are_made_in_place(kinds):
    """As many threads as there are, and an image that two layers share."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.a(h) * self.b(h) + self.b(torch.sin(self.b(h)))

    agree(Shared().double(), torch.randn(5, 3, 9, 9, dtype=torch.float64), 1e-10)
    assert "convolution" in kinds


@pytest.mark.parametrize("threads", [1, 2])
def test_many_images_are_shared_among_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 24, 3, padding=1)).double()
        agree(net, torch.randn(33, 3, 16, 16, dtype=torch.float64), 1e-10)
    finally:
        torch.set_num_threads(before)


def test_large_weights_are_left_to_torch(kinds):
    net = nn.Sequential(nn.Conv2d(180, 165, 3, padding=1), nn.Tanh(), nn.Conv2d(165, 2, 3)).double()
    agree(net, torch.randn(2, 180, 4, 4, dtype=torch.float64), 1e-10)
    assert {"convolution", "aten::convolution", "aten::convolution_backward"} <= kinds


def test_groups_and_transposed_layers_are_left_to_torch(kinds):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, stride=2)).double()
    agree(net, torch.randn(3, 4, 8, 8, dtype=torch.float64), 1e-10)
    assert any("convolution" in kind and kind != "convolution" for kind in kinds)
    agree(nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh()).double(), torch.randn(2, 2, 4, 5, 3, dtype=torch.float64), 1e-10)
