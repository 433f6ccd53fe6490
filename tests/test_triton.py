"""The Triton kernels in the interpreter, on the CPU: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton.py``."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import hypergrad_ext as hg
from hypergrad_ext import ops, reference, reference_lstm, reference_minres, reference_mlp
from tests.cases import spd
from tests.compare import assert_close, assert_no_worse_than_torch
from tests.steps import STEPS, arguments
from tests.test_glm import model
from tests.test_lstm import DTYPES as LSTM_DTYPES
from tests.test_lstm import FLOOR, arguments_of, wide
from tests.test_lstm import NAMES as LSTM_NAMES
from tests.test_mlp import cast
from tests.test_mlp import problem as mlp_problem
from tests.test_ops import DTYPES, ROUNDING, copies, random_list
from tests.test_softmax import in_place, problem, truth_of
from tests.test_steps import OPS, check

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process of its own with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from hypergrad_ext.kernels import glm, lists, lstm, mlp, softmax  # noqa: E402

CPU = torch.device("cpu")
CUTS = [([1], [1]), ([5, 300, 7], [312]), ([312], [100, 0, 212]), ([17, 0, 1030, 3], [1047, 3])]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy does the arithmetic

neumann_step_ = ops.neumann_step_.kernel(CPU, "triton")
cg_step_ = ops.cg_step_.kernel(CPU, "triton")


@pytest.fixture(params=[128, None], ids=["many-programs", "one-program"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also split pieces into several programs, as on a GPU."""
    if request.param:
        monkeypatch.setattr(lists, "launch_parameters", lambda *_: {"BLOCK": request.param})


def running_state(rows: int | None) -> Tensor:
    state = torch.tensor([3.0, 1e-9, 0.0, 0.0], dtype=torch.float64)
    return state if rows is None else state.repeat(rows, 1)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("rows", [None, 3], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("cuts", CUTS, ids=str)
class TestAgainstReference:
    def test_neumann_step(self, cuts, dtypes, rows):
        v, p, hv = (random_list(cuts[i], rows, d, CPU) for i, d in zip((0, 1, 1), (dtypes[0], *dtypes), strict=True))
        stats = torch.full((2,) if rows is None else (rows, 2), float("nan"), dtype=torch.float64)
        truth, true_stats = copies([v, p, hv], torch.float64), stats.clone()
        reference.neumann_step_(*truth, true_stats, 0.3, 0.7)
        neumann_step_(v, p, hv, stats, 0.3, 0.7)
        assert_close([v, p], truth[:2], ROUNDING[dtypes[0]])
        assert_close(stats, true_stats, ROUNDING[dtypes[0]])

    def test_cg_step(self, cuts, dtypes, rows):
        x, p = (random_list(cuts[1], rows, dtypes[0], CPU) for _ in range(2))
        r = random_list(cuts[0], rows, dtypes[0], CPU)
        hp = [(2 * t).to(dtypes[1]) for t in p]
        state = running_state(rows)
        truth, true_state = copies([x, r, p, hp], torch.float64), state.clone()
        reference.cg_step_(*truth, true_state, 0.5)
        cg_step_(x, r, p, hp, state, 0.5)
        assert_close([x, r, p], truth[:3], 4 * ROUNDING[dtypes[0]])
        assert_close(state, true_state, 4 * ROUNDING[dtypes[0]])


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("rows", [None, 3], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_step_against_reference(name, preconditioned, dtypes, rows):
    cuts, sizes = CUTS[3]
    args = arguments(name, sizes, rows, dtypes, preconditioned=preconditioned, cuts=cuts)
    check(name, args, OPS[name].kernel(CPU, "triton"), 8 * ROUNDING[dtypes[0]])


@pytest.mark.parametrize("name", STEPS)
def test_what_is_only_read_may_have_any_strides(name):
    written = {"richardson_step_": (0,), "chebyshev_step_": (0,), "minres_step_": (0, 2, 4), "pcg_step_": (0, 1, 2)}
    args = arguments(name, [30])
    for position, a in enumerate(args):
        if isinstance(a, list) and position not in written[name]:
            args[position] = [torch.stack([t, t + 9], dim=1)[:, 0] for t in a]
    check(name, args, OPS[name].kernel(CPU, "triton"), 8e-14)


def test_product_of_the_older_steps_may_have_any_strides_too():
    v, p, hv = torch.ones(4), torch.zeros(4), torch.arange(8.0)[::2]
    neumann_step_([v], [p], [hv], torch.zeros(2, dtype=torch.float64), 1.0, 0.0)
    assert v.tolist() == [1.0, -1.0, -3.0, -5.0]


@pytest.mark.usefixtures("block")
def test_minres_rows_stop_by_themselves():
    args = arguments("minres_step_", [150], 4)
    state = args[6]
    flag, stop, step = (reference_minres.COLUMNS.index(name) for name in ("flag", "stop", "step"))
    state[0, flag], state[0, step] = 1.0, 0.0
    args[5][0][1, 149] = float("nan")
    state[2, stop] = 1e9
    check_args = [[t.clone() for t in a] if isinstance(a, list) else a for a in args[:6]]
    true_state = state.clone()
    reference_minres.minres_step_(*check_args, true_state, 0.7)
    OPS["minres_step_"].kernel(CPU, "triton")(*args)
    assert state[:, flag].tolist() == [1, 3, 1, 0] == true_state[:, flag].tolist()
    assert_close(state, true_state, 1e-13)
    for ours, theirs in zip(args[:5], check_args[:5], strict=True):
        assert_close(ours[0], theirs[0], 1e-13)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", ["richardson_step_", "chebyshev_step_"])
def test_non_finite_solution_is_flagged_in_its_row_only(name):
    args = arguments(name, [301], 3)
    args[1 if name == "richardson_step_" else 2][0][1, 300] = float("nan")
    OPS[name].kernel(CPU, "triton")(*args)
    stats = next(a for a in args if isinstance(a, Tensor))
    assert stats[:, 1].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_is_flagged_in_its_row_only(bad):
    v, p, hv = (torch.ones(3, 301) for _ in range(3))
    hv[1, 300] = bad
    stats = torch.zeros(3, 2, dtype=torch.float64)
    neumann_step_([v], [p], [hv], stats, 0.5, 0.0)
    assert stats[:, 1].tolist() == [0.0, 1.0, 0.0] and stats[0, 0] == 301 / 4


def test_overflow_of_a_square_is_not_a_non_finite_element():
    v, p, hv = torch.full((100,), 1e30), torch.zeros(100), torch.zeros(100)
    stats = torch.zeros(2, dtype=torch.float64)
    neumann_step_([v], [p], [hv], stats, 0.5, 0.0)
    assert stats[1] == 0 and float(stats[0]) == pytest.approx(1e62, rel=1e-6)


def test_float64_scalars_are_not_rounded():
    v, p, hv = (torch.ones(3, dtype=torch.float64) for _ in range(3))
    stats = torch.zeros(2, dtype=torch.float64)
    neumann_step_([v], [p], [hv], stats, 0.1, 1e-9)
    assert torch.equal(v, torch.full_like(v, 1 - 0.1 * (1 + 1e-9)))


def test_empty_lists():
    stats = torch.full((2,), float("nan"), dtype=torch.float64)
    neumann_step_([], [], [], stats, 0.5, 0.0)
    assert stats.tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("block")
def test_cg_rows_stop_by_themselves():
    rows, n = 5, 150
    x, r, p = (torch.randn(rows, n, dtype=torch.float64) for _ in range(3))
    hp = 2 * p
    hp[1] *= -1
    hp[2, 149] = float("nan")
    state = running_state(rows)
    state[3, 3] = 1.0
    state[4, 1] = 1e30
    truth, true_state = copies([[x], [r], [p], [hp]]), state.clone()
    before = copies([[x], [r], [p]])
    reference.cg_step_(*truth, true_state, 0.0)
    cg_step_([x], [r], [p], [hp], state, 0.0)
    assert state[:, 3].tolist() == [0, 2, 3, 1, 1] == true_state[:, 3].tolist()
    assert_close(state, true_state, 1e-14)
    for ours, theirs, old in zip((x, r, p), truth, before, strict=False):
        assert torch.equal(ours[1:4], old[0][1:4])
        assert_close(ours[0], theirs[0][0], 1e-14)
    assert_close([x[4], r[4]], [truth[0][0][4], truth[1][0][4]], 1e-14)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p": [torch.zeros(4)]}, ValueError, "p must have as many elements as v: expected 3, got 4"),
        ({"p": [torch.zeros(3).double()]}, TypeError, "p must be float64 or float32 and have the dtype of v"),
        ({"v": [torch.zeros(3).bfloat16()]}, TypeError, "v must be float64 or float32"),
        ({"v": [torch.zeros(6)[::2]]}, ValueError, "v must be contiguous"),
        ({"stats": torch.zeros(2)}, ValueError, "stats must be float64"),
    ],
)
def test_refuses(changes, error, message):
    arguments = {k: [torch.zeros(3)] for k in ("v", "p", "hv")} | {"stats": torch.zeros(2).double(), "alpha": 0.5}
    with pytest.raises(error, match=message):
        neumann_step_(**(arguments | changes))


@pytest.mark.parametrize("rows", [None, 2], ids=lambda k: f"rows{k}")
@pytest.mark.parametrize(
    "solver",
    [
        *(hg.CG(tol=1e-8), hg.Neumann(steps=120), hg.Chebyshev(30, bounds=(0.3, 1.2)), hg.MINRES(tol=1e-8)),
        *(hg.CG(tol=1e-8, preconditioner=torch.full((13,), 2.0).double()),),
        *(hg.Neumann(steps=120, preconditioner=torch.full((13,), 2.0).double()),),
    ],
    ids=lambda s: type(s).__name__,
)
def test_whole_solve(solver, rows):
    a = spd(13, 4.0)
    b = torch.randn(13, dtype=torch.float64) if rows is None else torch.randn(rows, 13, dtype=torch.float64)
    solution = hg.solve(hg.DenseMatrix(a), b, solver, damping=0.1, backend="triton")
    truth = b @ torch.linalg.inv(a + 0.1 * torch.eye(13, dtype=torch.float64))
    assert_close(solution.value, truth, 1e-6)


@pytest.fixture(params=[16, None], ids=["many-blocks", "one-block"])
def row_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut rows into several blocks, as on a GPU at vocabularies."""
    if request.param:
        monkeypatch.setattr(softmax, "launch_parameters", lambda classes: {"BLOCK": request.param})


@pytest.mark.usefixtures("row_block")
@pytest.mark.parametrize("classes", [1, 3, 16, 33, 100])
class TestSoftmaxHessian:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("k", [None, 3])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_against_reference(self, classes, dtype, k, weighted):
        arguments = problem(5, classes, k, dtype, weighted)
        value = ops.softmax_hessian.kernel(CPU, "triton")(*arguments)
        by_torch = reference.softmax_hessian(*arguments)
        if classes == 1:
            assert (value.abs() <= 4 * torch.finfo(torch.float32).eps).all()
        elif dtype == torch.float64:
            assert_close(value, by_torch, 1e-13)
        else:
            # The interpreter cuts off the bits that bfloat16 has no room for; a GPU rounds.
            floor = 2**-8 if dtype == torch.bfloat16 else 2e-7
            assert_no_worse_than_torch(value, by_torch, truth_of(*arguments), floor)
        assert torch.equal(in_place("triton", *arguments), value)

    def test_masked_classes_and_ignored_rows_are_exactly_zero(self, classes):
        logits, u, scale, _ = problem(5, classes, 2)
        logits = logits.clone()
        # A first block without a finite logit, and a row that holds anything.
        logits[:, : classes - 1] = -float("inf")
        logits[2] = float("nan")
        weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])
        value = ops.softmax_hessian.kernel(CPU, "triton")(logits, u, scale, weights)
        assert torch.equal(value, torch.zeros_like(value))

    def test_extreme_logits(self, classes):
        _, u, scale, _ = problem(5, classes)
        logits = 1e4 * (torch.randint(3, (5, classes)) - 1.0).double()
        value = ops.softmax_hessian.kernel(CPU, "triton")(logits, u, scale)
        truth = truth_of(logits, u, scale)
        assert ((value - truth).abs() <= 1e-13 * u.abs().max()).all()


@pytest.fixture(params=[16, None], ids=["many-blocks", "one-block"])
def unit_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut rows into several blocks, as on a GPU in wide layers."""
    if request.param:
        monkeypatch.setattr(lstm, "launch_parameters", lambda units, item_size: {"BLOCK": request.param})


@pytest.mark.usefixtures("unit_block")
@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("dtype", LSTM_DTYPES, ids=str)
@pytest.mark.parametrize("name", LSTM_NAMES)
def test_lstm_against_reference(name, dtype, rest):
    for rows, units in ((1, 1), (3, 5), (2, 33)):
        arguments = arguments_of(name, rows, units, dtype, rest=rest)
        value = getattr(ops, name).kernel(CPU, "triton")(*arguments)
        by_torch, truth = (getattr(reference_lstm, name)(*a) for a in (arguments, wide(arguments)))
        for ours, theirs, exact in zip(value, by_torch, truth, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == dtype
            # The interpreter cuts off the bits that bfloat16 has no room for, in each of a layer's three steps; a GPU
            # rounds.
            floor = 3 * 2**-7 if dtype == torch.bfloat16 else FLOOR[dtype]
            assert_no_worse_than_torch(ours, theirs, exact, floor, f"{rows} x {units}")


@pytest.mark.parametrize("dtype", LSTM_DTYPES[:2], ids=str)
def test_lstm_activations_are_accurate_near_zero(dtype):
    x = torch.logspace(-30, 1, 2001, dtype=torch.float64).to(dtype)
    gates = torch.cat([x, -x]).repeat(4)[None]
    _, _, activations = ops.lstm_cell.kernel(CPU, "triton")(gates, torch.zeros(1, 2 * len(x), dtype=dtype))
    exact = torch.cat([x.double(), -x.double()]).tanh()
    g = activations.chunk(4, 1)[2][0].double()
    assert ((g - exact) / exact).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("position", "bad", "error", "message"),
    [
        (1, torch.zeros(3), ValueError, r"c must have shape \(rows, units\), got \(3,\)"),
        (0, torch.zeros(5, 7), ValueError, r"gates must have shape \(5, 28\), got \(5, 7\)"),
        (0, torch.zeros(5, 28).half(), TypeError, "gates must be torch.float64 like c, got torch.float16"),
    ],
    ids=range(3),
)
def test_lstm_refuses(position, bad, error, message):
    arguments = arguments_of("lstm_cell", 5, 7)
    arguments[position] = bad
    with pytest.raises(error, match=message):
        ops.lstm_cell.kernel(CPU, "triton")(*arguments)


@pytest.fixture(params=[(4, 8), None], ids=["many-tiles", "one-tile"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut matrices into several tiles both ways, as on a GPU."""
    if request.param:
        rows, columns = request.param
        monkeypatch.setattr(mlp, "launch_parameters", lambda width: {"ROWS": rows, "COLUMNS": columns})


@pytest.mark.usefixtures("tile")
class TestMLPProduct:
    kernel = staticmethod(ops.mlp_hvp.kernel(CPU, "triton"))

    @pytest.mark.parametrize(("activation", "loss"), [("relu", "squared"), ("tanh", "cross_entropy")])
    @pytest.mark.parametrize("sizes", [(6, 1), (20, 17, 2), (9, 16, 11, 10)], ids=str)
    def test_against_reference(self, sizes, activation, loss):
        for biases, n, k, l2 in [(True, 7, 1, 0.0), (False, 5, 3, 0.1), (True, 1, 2, 0.1), (True, 7, 0, 0.0)]:
            _, operator, _ = mlp_problem(sizes, n, activation, loss, biases, l2=l2)
            arguments = operator._model(torch.randn(k, operator.space.numel, dtype=torch.float64))
            value = self.kernel(*arguments)
            assert_close(value, reference_mlp.mlp_hvp(*arguments), 1e-13, f"biases={biases} n={n} k={k}")

    def test_float32_is_no_less_accurate_than_torch(self):
        _, operator, _ = mlp_problem((9, 16, 11, 10), 12)
        single = cast(operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64)), torch.float32)
        truth = reference_mlp.mlp_hvp(*cast(single, torch.float64))
        assert_no_worse_than_torch(self.kernel(*single), reference_mlp.mlp_hvp(*single), truth, 3e-7)

    def test_not_finite_stays_visible(self):
        _, operator, _ = mlp_problem((5, 7, 3), 9)
        v = torch.randn(2, operator.space.numel, dtype=torch.float64)
        v[0, 3] = float("nan")
        value = self.kernel(*operator._model(v))
        assert value[0].isnan().any() and value[1].isfinite().all()

    def test_refuses(self):
        _, operator, _ = mlp_problem((5, 7, 3), 9)
        weights, hidden, slopes, *rest = operator._model(torch.randn(2, operator.space.numel, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"slopes must have shape \(9, 7\), got \(8, 7\)"):
            self.kernel(weights, hidden, [slopes[0][:8]], *rest)
        with pytest.raises(TypeError, match="slopes must be torch.float64 on cpu like v, got torch.float32"):
            self.kernel(weights, hidden, [slopes[0].float()], *rest)


@pytest.fixture(params=[True, False], ids=["many-programs", "one-program"])
def row_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also several blocks of rows per program, and several pieces per row, as on a GPU."""
    if request.param:
        whole = glm.launch_parameters
        monkeypatch.setattr(glm, "launch_parameters", lambda *sizes: whole(*sizes) | {"ROWS": 16, "CHUNK": 32})
        monkeypatch.setattr(glm, "PROGRAMS", 2)


@pytest.mark.usefixtures("row_blocks")
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("classes", [1, 3, 10])
class TestGlmProduct:
    @pytest.mark.parametrize("shape", [(1, 1), (35, 37)], ids=str)
    def test_float64(self, shape, classes, intercept):
        for k in (1, 17) if classes == 1 else (2,):
            arguments = model(*shape, classes, k, intercept)
            value = ops.glm_hvp.kernel(CPU, "triton")(*arguments)
            assert_close(value, reference.glm_hvp(*arguments), 1e-13, f"{shape} k={k}")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_low_precision(self, classes, intercept, dtype):
        arguments = model(37, 35, classes, 3, intercept, dtype)
        truth = reference.glm_hvp(*[t.double() if isinstance(t, Tensor) else t for t in arguments])
        value = ops.glm_hvp.kernel(CPU, "triton")(*arguments)
        assert value.dtype == torch.float32
        assert_no_worse_than_torch(value, reference.glm_hvp(*arguments), truth, 1e-7)


@pytest.mark.parametrize("classes", [1, 70])
def test_glm_product_of_no_rows_and_of_many_classes(classes):
    for n in (0, 5):
        arguments = model(n, 4, classes, 2, True)
        assert_close(ops.glm_hvp.kernel(CPU, "triton")(*arguments), reference.glm_hvp(*arguments), 1e-13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3, dtype=torch.float16)}, TypeError, "x must be float64, float32 or bfloat16"),
        ({"x": torch.zeros(3, 4).T}, ValueError, r"x must have shape \(n, d\) with contiguous rows"),
        ({"weights": torch.zeros(5)}, ValueError, "weights must be contiguous with shape"),
        ({"weights": torch.zeros(4, 1)}, ValueError, "weights must have at least 2 classes, got 1"),
        ({"weights": torch.zeros(4).double()}, TypeError, "weights, v and l2 must be torch.float32"),
        ({"v": torch.zeros(2, 4)}, ValueError, r"v must be contiguous with shape \(k, 3\)"),
        ({"l2": torch.zeros(2)}, ValueError, "l2 must be like one row of v: 3 elements"),
    ],
    ids=range(7),
)
def test_glm_product_refuses(change, error, message):
    arguments = {"x": torch.zeros(4, 3), "weights": torch.zeros(4), "v": torch.zeros(2, 3), "l2": None}
    with pytest.raises(error, match=message):
        ops.glm_hvp.kernels["triton"](**(arguments | change), scale=1.0, intercept=False)
