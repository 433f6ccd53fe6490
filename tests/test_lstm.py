"""The LSTM ops: kernels against the reference, and the reference against torch's own derivatives."""

from __future__ import annotations

import pytest
import torch

from hypergrad_ext import backends, ops, reference_lstm
from tests.compare import assert_close, assert_no_worse_than_torch

CPU = torch.device("cpu")
UNITS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 200]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = [
    "lstm_cell",
    "lstm_cell_backward",
    "lstm_cell_double_backward",
    "lstm_layer",
    "lstm_layer_backward",
    "lstm_layer_double_backward",
]
# Rounding of one result; the kernels and torch round in another order.
FLOOR = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: 1e-4, torch.float16: 1e-5}


@pytest.fixture(params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.unavailable(request.param, "cpu"):
        pytest.skip(reason)
    return request.param


def activations_of(gates):
    i, f, g, o = gates.chunk(4, -1)
    return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)


def arguments_of(name, rows, units, dtype=torch.float64, steps=3, rest=True):
    """Random arguments, every one a slice of something larger; ``rest``: with the optional ones."""

    def draw(*shape, lead=True):
        shape = (steps, *shape) if lead and "layer" in name else shape
        t = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float64)[..., 2:-1]
        return t

    def state():
        return draw(rows, units)

    def once():
        return draw(rows, units, lead=False)

    w_hh = draw(4 * units, units, lead=False) / units**0.5
    gates, v_gates = 2 * draw(rows, 4 * units), draw(rows, 4 * units)
    act, more = activations_of(gates), v_gates if rest else None
    arguments = {
        "lstm_cell": lambda: (gates, state()),
        "lstm_cell_backward": lambda: (act, state(), state(), state(), state(), more),
        "lstm_cell_double_backward": lambda: (act, state(), state(), state(), state(), v_gates, state()),
        "lstm_layer": lambda: (gates, w_hh, once(), once()),
        "lstm_layer_backward": lambda: (act, state(), once(), w_hh, state(), state() if rest else None, more),
        "lstm_layer_double_backward": lambda: (
            *(act, state(), once(), w_hh, state(), state()),
            *(v_gates, once(), once()),
        ),
    }[name]()
    return [None if t is None else t.to(dtype) for t in arguments]


def wide(arguments):
    return [None if t is None else t.double() for t in arguments]


class TestAgainstReference:
    @pytest.mark.parametrize("rest", [True, False])
    @pytest.mark.parametrize("name", NAMES)
    def test_float64(self, name, rest, backend):
        for units in UNITS:
            for rows in (1, 2, 6, 7, 13):
                arguments = arguments_of(name, rows, units, rest=rest)
                value = getattr(ops, name).kernel(CPU, backend)(*arguments)
                truth = getattr(reference_lstm, name)(*arguments)
                for ours, theirs in zip(value, truth, strict=True):
                    assert ours.shape == theirs.shape and ours.is_contiguous()
                    assert_close(ours, theirs, 1e-13, f"{rows} x {units}")

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_no_less_accurate_than_torch(self, name, dtype, backend):
        for units in (5, 33, 200):
            arguments = arguments_of(name, 40, units, dtype)
            value, by_torch = (
                f(*arguments) for f in (getattr(ops, name).kernel(CPU, backend), getattr(reference_lstm, name))
            )
            truth = getattr(reference_lstm, name)(*wide(arguments))
            for ours, theirs, exact in zip(value, by_torch, truth, strict=True):
                assert ours.dtype == dtype
                assert_no_worse_than_torch(ours, theirs, exact, FLOOR[dtype], f"{units} units")

    @pytest.mark.parametrize("name", NAMES)
    def test_nan_stays_in_its_row(self, name, backend):
        arguments = [t.clone() for t in arguments_of(name, 7, 9)]
        gates = arguments[0] if arguments[0].dim() == 2 else arguments[0][0]
        gates[3, 4] = float("nan")
        for t in getattr(ops, name).kernel(CPU, backend)(*arguments):
            bad = t.isnan().any(-1)
            assert (bad if bad.dim() == 1 else bad.any(0)).nonzero().flatten().tolist() in ([3], [])

    @pytest.mark.parametrize("name", NAMES[:3])
    def test_empty(self, name, backend):
        for rows, units in ((0, 5), (4, 0), (0, 0)):
            for value in getattr(ops, name).kernel(CPU, backend)(*arguments_of(name, rows, units)):
                assert value.shape in ((rows, units), (rows, 4 * units))

    @pytest.mark.parametrize("name", NAMES[3:])
    def test_batch_of_none(self, name, backend):
        for value in getattr(ops, name).kernel(CPU, backend)(*arguments_of(name, 0, 5)):
            assert value.numel() == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_threads_change_nothing(self, name):
        if reason := backends.unavailable("cpp", "cpu"):
            pytest.skip(reason)
        arguments, before, results = arguments_of(name, 300, 65, torch.float32), torch.get_num_threads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(getattr(ops, name)(*arguments))
        torch.set_num_threads(before)
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))

    @pytest.mark.parametrize("steps", [1, 2, 40])
    def test_steps(self, steps, backend):
        for name in NAMES[3:]:
            arguments = arguments_of(name, 3, 17, steps=steps)
            value = getattr(ops, name).kernel(CPU, backend)(*arguments)
            assert_close(list(value), list(getattr(reference_lstm, name)(*arguments)), 1e-13, name)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_activations_are_accurate_everywhere(dtype, backend):
    """Relative to each number: near 0, where tanh loses digits, and far out, where sigmoid ends."""
    x = torch.logspace(-30, 2, 4001, dtype=torch.float64).to(dtype)
    x = torch.cat([-x, torch.zeros(1, dtype=dtype), x])
    gates = x.repeat(4)[None]
    _, _, activations = ops.lstm_cell.kernel(CPU, backend)(gates, torch.zeros(1, len(x), dtype=dtype))
    exact = activations_of(gates.double())
    # Below, float32 has only denormal numbers, which the kernel takes for 0.
    seen = exact.abs() > 10 * torch.finfo(dtype).tiny
    error = ((activations.double() - exact) / exact)[seen].abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    assert (activations[~seen].abs() <= 10 * torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
def test_saturates_at_infinity(bad, backend):
    gates, c = torch.full((1, 4 * 9), bad), torch.ones(1, 9)
    h, c_next, activations = ops.lstm_cell.kernel(CPU, backend)(gates, c)
    end = torch.full_like(c, float(bad > 0))
    assert torch.equal(c_next, 2 * end)
    assert torch.equal(activations, torch.cat([end, end, torch.full_like(c, bad).sign(), end], 1))
    # tanh and its rounding in torch.
    assert_close(h, c_next.tanh(), 2 * torch.finfo(torch.float32).eps)


class TestReference:
    """Every derivative in the reference is what torch's autograd makes of the one before."""

    def test_cell_backward(self):
        gates, c = (t.requires_grad_() for t in arguments_of("lstm_cell", 5, 7))
        outputs = reference_lstm.lstm_cell(gates, c)
        grads = [torch.randn_like(t) for t in outputs]
        truth = torch.autograd.grad(outputs, (gates, c), grads)
        h, c_next, activations = (t.detach() for t in outputs)
        assert_close(
            list(reference_lstm.lstm_cell_backward(activations, c.detach(), c_next, *grads)), list(truth), 1e-14
        )

    def test_cell_double_backward(self):
        *inputs, v_gates, v_c = arguments_of("lstm_cell_double_backward", 5, 7)
        inputs = [t.requires_grad_() for t in inputs]
        truth = torch.autograd.grad(reference_lstm.lstm_cell_backward(*inputs), inputs, (v_gates, v_c))
        inputs = [t.detach() for t in inputs]
        assert_close(list(reference_lstm.lstm_cell_double_backward(*inputs, v_gates, v_c)), list(truth), 1e-14)

    def test_layer_backward(self):
        inputs = x_gates, w_hh, h0, c0 = [t.requires_grad_() for t in arguments_of("lstm_layer", 5, 7)]
        outputs = reference_lstm.lstm_layer(*inputs)
        grads = [torch.randn_like(t) for t in outputs]
        by_x, by_w, by_h0, by_c0 = torch.autograd.grad(outputs, inputs, grads)
        h, c, activations = (t.detach() for t in outputs)
        value = reference_lstm.lstm_layer_backward(activations, c, c0.detach(), w_hh.detach(), *grads)
        assert_close(list(value[:2]), [by_x, by_c0], 1e-14)
        before = torch.cat([h0.detach()[None], h[:-1]])
        assert_close(value[0].flatten(0, 1).T @ before.flatten(0, 1), by_w, 1e-14)
        assert_close(value[0][0] @ w_hh.detach(), by_h0, 1e-14)

    def test_layer_double_backward(self):
        activations, c, c0, w_hh, grad_h, grad_c, _ = arguments_of("lstm_layer_backward", 5, 7)
        v_gates, v_h0, v_c0 = (torch.randn_like(t) for t in (activations, c0, c0))
        leaves = [t.requires_grad_() for t in (activations, c, c0, grad_h, grad_c)]
        grad_gates, grad_c0, dh, dc = reference_lstm.lstm_layer_backward(*leaves[:3], w_hh, *leaves[3:])
        truth = torch.autograd.grad((grad_gates, grad_gates[0] @ w_hh, grad_c0), leaves, (v_gates, v_h0, v_c0))
        with torch.no_grad():
            value = reference_lstm.lstm_layer_double_backward(*leaves[:3], w_hh, dh, dc, v_gates, v_h0, v_c0)
        assert_close(list(value), list(truth), 1e-14)


@pytest.mark.parametrize(
    ("name", "position", "bad", "error", "message"),
    [
        ("lstm_cell", 1, torch.zeros(3), ValueError, r"c must have shape \(rows, units\), got \[3\]"),
        ("lstm_cell", 0, torch.zeros(5, 7), ValueError, r"gates must have shape \[5, 28\], got \[5, 7\]"),
        ("lstm_cell", 0, torch.zeros(5, 28).half(), TypeError, "gates must be double like c, got Half"),
        ("lstm_cell", 1, torch.zeros(5, 7).long(), TypeError, "c must be float64, float32, bfloat16 or float16"),
        ("lstm_cell", 0, torch.zeros(5, 28, device="meta").double(), ValueError, "gates must be on cpu like c"),
        ("lstm_cell", 0, torch.zeros(5, 28, requires_grad=True).double(), ValueError, "gates must not require grad"),
        ("lstm_cell", 0, None, TypeError, "gates must hold tensors, got NoneType"),
        ("lstm_cell_backward", 5, torch.zeros(5, 7), ValueError, r"grad_activations must have shape \[5, 28\]"),
        ("lstm_cell_double_backward", 6, torch.zeros(5, 8), ValueError, r"v_c must have shape \[5, 7\]"),
        ("lstm_layer", 0, torch.zeros(5, 28), ValueError, "x_gates must have shape"),
        ("lstm_layer", 0, torch.zeros(0, 5, 28), ValueError, "x_gates must have shape .* with at least one step"),
        ("lstm_layer", 1, torch.zeros(7, 28), ValueError, r"w_hh must have shape \[28, 7\], got \[7, 28\]"),
        ("lstm_layer", 2, torch.zeros(7), ValueError, r"h0 must have shape \[5, 7\]"),
        ("lstm_layer", 3, torch.zeros(7), ValueError, r"c0 must have shape \(batch, units\)"),
        ("lstm_layer_backward", 1, torch.zeros(2, 5, 7), ValueError, r"c must have shape \[3, 5, 7\]"),
        ("lstm_layer_double_backward", 6, torch.zeros(3, 5, 7), ValueError, r"v_gates must have shape \[3, 5, 28\]"),
    ],
    ids=range(16),
)
def test_guards(name, position, bad, error, message):
    if reason := backends.unavailable("cpp", "cpu"):
        pytest.skip(reason)
    arguments = arguments_of(name, 5, 7)
    arguments[position] = bad
    with pytest.raises(error, match=message):
        getattr(ops, name).kernels["cpp"](*arguments)
