"""The Gauss-Newton operator against the dense matrix from torch's own Jacobians and Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hypergrad_ext as hg
from tests.compare import assert_close


def dense_truth(model, loss, inputs, targets):
    """``J^T S J`` from `torch.func`, in the order of the module's parameters."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(p):
        return torch.func.functional_call(model, p, (inputs,))

    z = outputs(params)
    jacobians = torch.func.jacrev(outputs)(params)
    jacobian = torch.cat([jacobians[name].reshape(z.numel(), -1) for name in params], dim=1)
    middle = torch.func.hessian(lambda z: loss(z, targets))(z).reshape(z.numel(), z.numel())
    return jacobian.T @ middle @ jacobian


def mlp(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 2, 1, 1, -100, 2])
VALUES = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PROBABILITIES = VALUES.softmax(1)
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

LOSSES = {
    "cross entropy function": (F.cross_entropy, CLASSES),
    "cross entropy": (nn.CrossEntropyLoss(), CLASSES),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "cross entropy, weighted": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), CLASSES),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "cross entropy, weighted and smoothed": (
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2),
        CLASSES,
    ),
    "cross entropy of probabilities": (nn.CrossEntropyLoss(), PROBABILITIES),
    "squared": (F.mse_loss, VALUES),
    "squared, sum": (nn.MSELoss(reduction="sum"), VALUES),
    "huber": (nn.HuberLoss(delta=0.5), VALUES),
    "poisson": (nn.PoissonNLLLoss(), VALUES.exp()),
    "own": (lambda z, y: ((z - y) ** 4).mean() + z.exp().sum(), VALUES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_dense_matrix(name):
    loss, targets = LOSSES[name]
    model = mlp()
    operator = hg.GaussNewton(model, loss, X, targets)
    truth = dense_truth(model, loss, X, targets)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-10, atol=1e-12)


def test_classes_in_dimension_1():
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 2).double()
    x, y = torch.randn(2, 2, 5, dtype=torch.float64), torch.randint(3, (2, 4))
    operator = hg.GaussNewton(model, F.cross_entropy, x, y)
    torch.testing.assert_close(operator.dense(), dense_truth(model, F.cross_entropy, x, y), rtol=1e-10, atol=1e-12)


def test_one_example_without_a_batch_dimension():
    model, y = mlp(), torch.tensor(1)
    operator = hg.GaussNewton(model, F.cross_entropy, X[0], y)
    torch.testing.assert_close(operator.dense(), dense_truth(model, F.cross_entropy, X[0], y), rtol=1e-10, atol=1e-12)


def test_equals_the_hessian_of_a_linear_model():
    model = nn.Linear(4, 3).double()
    gauss_newton = hg.GaussNewton(model, F.cross_entropy, X, CLASSES)
    hessian = hg.Hessian(F.cross_entropy(model(X), CLASSES), model)
    torch.testing.assert_close(gauss_newton.dense(), hessian.dense(), rtol=1e-10, atol=1e-13)


def test_float32_is_as_accurate_as_autograd():
    truth = dense_truth(mlp(), F.cross_entropy, X, CLASSES)
    model = mlp().float()
    ours = hg.GaussNewton(model, F.cross_entropy, X.float(), CLASSES).dense()
    torchs = dense_truth(model, F.cross_entropy, X.float(), CLASSES)
    assert (ours - truth).norm() <= 2 * (torchs - truth).norm() + 1e-7 * truth.norm()


def test_positive_semidefinite_where_the_hessian_is_not():
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    hessian = hg.Hessian(F.cross_entropy(model(X), CLASSES), model).dense()
    gauss_newton = hg.GaussNewton(model, F.cross_entropy, X, CLASSES)
    assert torch.linalg.eigvalsh(hessian).min() < -1e-3
    assert torch.linalg.eigvalsh(gauss_newton.dense()).min() > -1e-12
    b = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solution = hg.solve(gauss_newton, b, hg.CG(tol=1e-10), damping=1e-2)
    assert solution.status is hg.Status.CONVERGED


@pytest.mark.parametrize("batches", [None, True, False])
@pytest.mark.parametrize("name", ["cross entropy", "squared", "huber"])
def test_a_batch_of_vectors(name, batches):
    operator = hg.GaussNewton(mlp(), LOSSES[name][0], X, LOSSES[name][1])
    operator._outputs.batches = operator._pushed.batches = batches
    batch = [torch.randn(5, *shape, dtype=torch.float64) for shape in operator.space.shapes]
    together = operator @ batch
    for j in range(5):
        for one, part in zip(operator @ [t[j] for t in batch], together, strict=True):
            torch.testing.assert_close(part[j], one)


def test_a_function_of_params():
    model = mlp()
    params = {name: p.detach() for name, p in model.named_parameters()}
    operator = hg.GaussNewton(
        lambda p, x: torch.func.functional_call(model, p, (x,)), F.cross_entropy, X, CLASSES, params=params
    )
    truth = dense_truth(model, F.cross_entropy, X, CLASSES)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-10, atol=1e-12)


def test_dropout_is_drawn_once_and_buffers_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    operator = hg.GaussNewton(model, F.cross_entropy, X, CLASSES)
    v = [torch.randn(shape, dtype=torch.float64) for shape in operator.space.shapes]
    for first, second in zip(operator @ v, operator @ v, strict=True):
        assert torch.equal(first, second)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_that_are_broadcast_count_several_times(reduction):
    model, loss = nn.Linear(4, 1).double(), nn.MSELoss(reduction=reduction)
    with pytest.warns(UserWarning, match="broadcasting"):
        operator = hg.GaussNewton(model, loss, X, torch.zeros(len(X), dtype=torch.float64))
    with pytest.warns(UserWarning, match="broadcasting"):
        truth = hg.Hessian(loss(model(X), torch.zeros(len(X), dtype=torch.float64)), model)
    assert_close(operator.dense(), truth.dense(), 1e-13)


def test_classes_in_bytes():
    loss = nn.CrossEntropyLoss(weight=torch.arange(1.0, 4.0, dtype=torch.float64))
    model, classes = mlp(), CLASSES.clamp(min=0)
    values = [hg.GaussNewton(model, loss, X, classes.to(dtype)).dense() for dtype in (torch.uint8, torch.int64)]
    assert_close(*values, 0.0)


@pytest.mark.parametrize(
    ("loss", "targets", "error"),
    [
        (F.cross_entropy, CLASSES - 1, IndexError),
        (F.cross_entropy, CLASSES[:-1], ValueError),
        (F.cross_entropy, CLASSES.int(), RuntimeError),
        (F.mse_loss, None, AttributeError),
    ],
    ids=range(4),
)
def test_targets_that_the_loss_refuses(loss, targets, error):
    with pytest.raises(error):
        hg.GaussNewton(mlp(), loss, X, targets)


def test_a_checkpoint_that_runs_again_leaves_buffers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    model = Model().double()
    operator = hg.GaussNewton(model, F.cross_entropy, X, CLASSES)
    matrix = operator.dense()
    model.forward = lambda x: model.head(model.body(x))
    assert_close(matrix, hg.GaussNewton(model, F.cross_entropy, X, CLASSES).dense(), 1e-12)
    assert int(model.body[1].num_batches_tracked) == 0
    assert not model.body[1].running_mean.any()


def test_a_parameter_that_is_not_used_has_zero_rows():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3).double(), nn.Linear(2, 2).double()

        def forward(self, x):
            return self.used(x)

    operator = hg.GaussNewton(Model(), F.cross_entropy, X, CLASSES)
    assert operator.used == [True, True, False, False]
    assert not operator.dense()[15:].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, F.mse_loss, X, VALUES), TypeError, "model: expected an nn.Module or a function"),
        ((mlp(), None, X, VALUES), TypeError, "loss: expected a function"),
        ((lambda p, x: x, F.mse_loss, X, VALUES), ValueError, "params: expected the parameters"),
        ((nn.Sequential(nn.Linear(4, 3).double(), nn.LSTM(3, 3).double()), F.mse_loss, X, VALUES), TypeError, "tuple"),
        ((mlp(), nn.L1Loss(reduction="none"), X, VALUES), ValueError, "loss: expected a scalar"),
        ((mlp(), lambda z, y: 1.0, X, VALUES), TypeError, "loss: expected a function that returns a scalar"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        hg.GaussNewton(*arguments)


def test_bad_params_are_named():
    with pytest.raises(ValueError, match="params: expected None beside a module"):
        hg.GaussNewton(mlp(), F.mse_loss, X, VALUES, params=[X])
    with pytest.raises(ValueError, match="model: expected outputs that depend on params"):
        hg.GaussNewton(lambda p, x: x, F.mse_loss, X, VALUES, params=[torch.zeros(2)])


def test_a_penalty_counts():
    """Without it a hypergradient by penalties was 91 % off, though this model has no curvature itself."""
    torch.manual_seed(0)
    model, classes = nn.Linear(4, 3).double(), torch.tensor([0, 2, 1, 1, 0, 2])
    log_l2 = {name: torch.zeros_like(p).requires_grad_() for name, p in model.named_parameters()}

    def penalty(params):
        return sum((log_l2[name].exp() * p**2).sum() for name, p in params.items())

    def train(params):
        return F.cross_entropy(torch.func.functional_call(model, params, (X,)), classes) + penalty(params)

    def val(params):
        return F.cross_entropy(torch.func.functional_call(model, params, (-X,)), classes)

    gauss_newton = hg.GaussNewton(model, F.cross_entropy, X, classes, penalty=penalty)
    assert_close(gauss_newton.dense(), hg.Hessian(train, model).dense(), 1e-14)
    batch = {name: torch.stack([p, -2 * p]).detach() for name, p in model.named_parameters()}
    assert_close(gauss_newton @ batch, hg.Hessian(train, model) @ batch, 1e-14)
    expected = hg.hypergradient(val, train, model, log_l2, hg.Direct())
    assert_close(hg.hypergradient(val, train, model, log_l2, hg.Direct(), operator=gauss_newton), expected, 1e-12)
    with pytest.raises(TypeError, match="penalty: expected a function of the parameters, got float"):
        hg.GaussNewton(model, F.cross_entropy, X, classes, penalty=0.1)
