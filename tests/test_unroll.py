"""Unrolled training: equal to torch's optimisers, to loops written by hand, and to the Neumann series at an optimum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hypergrad_ext as hg
from tests.allocations import peak
from tests.cases import logistic, mlp
from tests.compare import assert_close

RULES = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "adam", "betas": (0.8, 0.95), "eps": 1e-6},
]
IDS = ["sgd", "momentum", "adam"]


def torch_optimiser(rule: dict, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    options = {key: value for key, value in rule.items() if key != "optimizer"}
    return (torch.optim.SGD if rule["optimizer"] == "sgd" else torch.optim.Adam)(params, lr=lr, **options)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trains_as_torch_does(rule, dtype):
    problem = mlp(dtype)
    trained = hg.unroll(problem.train, problem.params, problem.hparams, steps=7, lr=0.05, **rule)
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    optimiser = torch_optimiser(rule, params, 0.05)
    for _ in range(7):
        optimiser.zero_grad()
        problem.train(params).backward()
        optimiser.step()
    assert_close(trained, params, 1e-13 if dtype == torch.float64 else 1e-5)
    assert [t.dtype for t in trained] == [dtype] * len(params)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_gradcheck_by_hyperparameters_and_learning_rates(rule, checkpoint):
    """The whole map from hyperparameters and rates to the validation loss, by finite differences."""
    problem = mlp()

    def trained(lr: Tensor, *hparams: Tensor) -> Tensor:
        def loss(w: list[Tensor]) -> Tensor:
            penalty = sum((a.exp() * t.square()).sum() for a, t in zip(hparams, w, strict=True))
            return problem.train(w) + penalty

        return problem.val(hg.unroll(loss, problem.params, hparams, steps=4, lr=lr, checkpoint=checkpoint, **rule))

    for shape in ((), (4,)):
        lr = torch.full(shape, 0.05, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(trained, (lr, *problem.hparams), fast_mode=True)


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_i_steps_at_the_optimum_are_neumann_with_i_terms(steps):
    """The paper's theorem: equal to rounding, K = i - 1."""
    problem, alpha = logistic(), 0.5
    path = hg.unroll(problem.train, problem.params, problem.hparams, steps=steps, lr=alpha)
    unrolled = torch.autograd.grad(problem.val(path), problem.hparams)
    arguments = (problem.val, problem.train, problem.params, problem.hparams)
    assert_close(hg.hypergradient(*arguments, hg.Neumann(steps - 1, alpha=alpha)), unrolled, 1e-12)


@pytest.mark.parametrize("last", [0, 1, 3, 6, 9])
def test_truncated_is_the_graph_of_the_last_steps(last):
    problem = mlp()
    options = {"lr": 0.05, "momentum": 0.5}
    trained = hg.unroll(problem.train, problem.params, problem.hparams, steps=6, last=last, **options)
    assert_close(
        [t.detach() for t in trained],
        hg.unroll(problem.train, problem.params, problem.hparams, steps=6, **options),
        1e-15,
    )
    if last == 0:
        assert not any(t.requires_grad for t in trained)
        return
    # By hand: momentum goes on from where the graph begins.
    w, v = [p.detach() for p in problem.params], [torch.zeros_like(p) for p in problem.params]
    for step in range(6):
        if step < 6 - last:
            w, v = [t.detach() for t in w], [t.detach() for t in v]
        w = [t if t.requires_grad else t.requires_grad_() for t in w]
        grads = torch.autograd.grad(problem.train(w), w, create_graph=True)
        if step < 6 - last:
            grads = [g.detach() for g in grads]
        v = [0.5 * m + g for m, g in zip(v, grads, strict=True)]
        w = [t - 0.05 * m for t, m in zip(w, v, strict=True)]
        if step < 6 - last:
            w = [t.detach() for t in w]
    ours = torch.autograd.grad(problem.val(trained), problem.hparams)
    assert_close(ours, torch.autograd.grad(problem.val(w), problem.hparams), 1e-12)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_checkpoints_change_nothing_even_with_random_masks_and_batches(rule):
    """Dropout draws the same numbers when a step runs again, and the caller's generator does not notice."""
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, 3)).double()
    batches = [(torch.randn(8, 6).double(), torch.randint(3, (8,))) for _ in range(3)]
    log_l2 = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    weight = (log_l2 * 2).exp()  # a hyperparameter that was computed

    def loss(w: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(torch.func.functional_call(net, w, (x,)), y) + weight * w["0.weight"].square().sum()

    def run(checkpoint: bool) -> tuple:
        torch.manual_seed(3)
        w = hg.unroll(loss, net, weight, steps=5, lr=0.1, batches=batches, checkpoint=checkpoint, **rule)
        value = sum(t.square().sum() for t in w.values())
        after = torch.rand(())
        (grad,) = torch.autograd.grad(value, log_l2, retain_graph=True)
        return value.detach(), grad, after, torch.rand(())

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_a_learning_rate_may_be_the_only_hyperparameter_that_counts():
    lr, lam = torch.tensor(0.1, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    hg.unroll(lambda w: (w - 1) ** 2, torch.tensor(0.0), lam, steps=2, lr=lr).backward()
    assert lr.grad.isfinite() and lam.grad is None


def normed(params_of):
    """A training loss of a network whose modes matter, its parameters, its hyperparameter and a validation loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x, y = 3 * torch.randn(20, 4).double() + 1, torch.randn(20, 1).double()
    lam = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    fit = lambda w: (torch.func.functional_call(net, w, (x,)) - y).square().mean()  # noqa: E731
    return net, lambda w: fit(w) + lam * sum(t.square().sum() for t in w.values()), params_of(net), lam, fit


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["implicit", "checkpointed"])
def test_a_loss_runs_again_in_the_training_modes_of_the_call(how, frozen):
    def grad(validate_in_eval: bool) -> Tensor:
        net, train, params, lam, fit = normed(lambda net: net)
        net[1].train(not frozen)
        if how == "implicit":
            w = hg.implicit(train, params, lam, hg.Direct(), damping=1.0)
        else:
            w = hg.unroll(train, params, lam, steps=3, lr=0.1, checkpoint=True)
        if validate_in_eval:
            net.eval()
        modes = [part.training for part in net.modules()]
        sum(t.square().sum() for t in w.values()).backward()
        assert [part.training for part in net.modules()] == modes
        return lam.grad

    torch.testing.assert_close(grad(True), grad(False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_checkpointed_step_that_comes_out_otherwise_is_refused(rule):
    net, train, params, lam, fit = normed(lambda net: dict(net.named_parameters()))
    w = hg.unroll(train, params, lam, steps=3, lr=0.01, checkpoint=True, **rule)
    net.eval()
    with pytest.raises(RuntimeError, match="train_loss: expected the step of the forward pass again"):
        torch.autograd.grad(fit(w), lam, retain_graph=True)
    net.train()
    torch.autograd.grad(fit(w), lam)


def test_the_trained_weights_may_be_written_to():
    def grad(checkpoint: bool) -> Tensor:
        _, train, params, lam, _ = normed(lambda net: net)
        w = hg.unroll(train, params, lam, steps=2, lr=0.01, checkpoint=checkpoint)
        value = sum(t.sum() for t in w.values())
        with torch.no_grad():
            for t in w.values():
                t.zero_()
        return torch.autograd.grad(value, lam)[0]

    torch.testing.assert_close(grad(True), grad(False), rtol=1e-12, atol=0)


@pytest.mark.parametrize("how", ["implicit", "checkpointed"])
@pytest.mark.parametrize("here, there", [(True, False), (False, True)])
def test_a_loss_runs_again_in_the_autocast_of_the_call(how, here, there):
    net, lam = nn.Linear(4, 1), torch.tensor(0.1, requires_grad=True)
    seen = []

    def train(w: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(net, w, (torch.ones(8, 4),))
        seen.append(out.dtype)
        return (out.float() - 1).square().mean() + lam * sum(t.square().sum() for t in w.values())

    with torch.autocast("cpu", torch.bfloat16, enabled=here):
        w = (
            hg.implicit(train, net, lam, hg.Identity(0.1))
            if how == "implicit"
            else hg.unroll(train, net, lam, steps=2, lr=0.1, checkpoint=True)
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=there):
        sum(t.square().sum() for t in w.values()).backward()
        assert torch.is_autocast_enabled("cpu") is there
    assert set(seen) == {torch.bfloat16 if here else torch.float32} and lam.grad.isfinite()


def test_checkpoints_share_what_was_computed_outside_of_the_loss():
    def grad(checkpoint: bool) -> Tensor:
        w0, log_l2 = torch.tensor([1.0, 2.0]), torch.zeros(2, requires_grad=True)
        l2 = log_l2.exp()
        loss = lambda w: ((w - 3) ** 2).sum() + (l2 * w**2).sum()  # noqa: E731
        w = hg.unroll(loss, w0, log_l2, steps=3, lr=0.1, checkpoint=checkpoint)
        return torch.autograd.grad((w**2).sum(), log_l2)[0]

    torch.testing.assert_close(grad(True), grad(False))


def test_nothing_of_the_module_is_changed_and_buffers_stay():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    x, lam = torch.randn(10, 4), torch.tensor(0.1, requires_grad=True)
    loss = lambda w: torch.func.functional_call(net, w, (x,)).square().mean() + lam * w["0.weight"].square().sum()  # noqa: E731
    trained = hg.unroll(loss, net, lam, steps=3, lr=0.1)
    assert list(trained) == [name for name, _ in net.named_parameters()]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not torch.equal(trained["0.weight"], before["0.weight"])


def test_a_weight_without_gradient_is_no_nan_under_adam():
    """The square root has no derivative at zero; torch.optim.Adam unrolled as it is gives NaN here."""
    w, lam = torch.tensor([1.0, 2.0]), torch.tensor(1.0, requires_grad=True)
    trained = hg.unroll(lambda w: lam * w[0] ** 2, w, lam, steps=3, lr=0.1, optimizer="adam")
    trained.sum().backward()
    assert lam.grad.isfinite() and trained[1] == 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"train_loss": torch.tensor(1.0)}, TypeError, "train_loss: expected a function of the parameters, got Tensor"),
        ({"train_loss": lambda w: w * torch.ones(3)}, ValueError, "train_loss: expected a scalar"),
        ({"train_loss": lambda w: w.detach()}, ValueError, "train_loss"),
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"last": -1}, ValueError, "last: expected at least 0, got -1"),
        ({"lr": -0.1}, ValueError, "lr: expected a finite number > 0"),
        ({"lr": torch.ones(2)}, ValueError, r"lr: expected shape \(\) or \(3,\), one rate per step, got \(2,\)"),
        ({"lr": torch.tensor(1)}, TypeError, "lr: expected a real floating point tensor"),
        ({"optimizer": "lion"}, ValueError, "optimizer: expected 'sgd' or 'adam', got 'lion'"),
        ({"optimizer": "adam", "momentum": 0.9}, ValueError, "momentum: expected none beside optimizer='adam'"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, ValueError, "betas: expected two numbers"),
        ({"hparams": torch.tensor(1.0, requires_grad=True)}, ValueError, "hparams: expected .* got unused hparams"),
        ({"hparams": torch.tensor(1.0)}, ValueError, "hparams: expected a hyperparameter that requires grad"),
        ({"batches": [], "train_loss": lambda w, b: w}, ValueError, "batches: expected a batch for every step"),
        ({"lr": 1e30}, FloatingPointError, "training diverged within 3 steps: lower lr"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    lam = torch.tensor(1.0, requires_grad=True)
    arguments = {
        "train_loss": lambda w: lam * w**2,
        "params": torch.tensor(1.0),
        "hparams": lam,
        "steps": 3,
        "lr": 0.1,
    }
    with pytest.raises(error, match=message):
        hg.unroll(**{**arguments, **change})


def peak_of(kind: str) -> int:
    """Bytes of tensors held at the most while a hypergradient of a CNN is taken by one of four ways."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()),
        *(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(256, 10)),
    )
    x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    lam = {n: torch.full_like(p, -6.0).requires_grad_() for n, p in net.named_parameters()}
    hparams = list(lam.values())

    def val(w):
        return F.cross_entropy(torch.func.functional_call(net, w, (x,)), y)

    def train(w):
        return val(w) + sum((lam[n].exp() * t**2).sum() for n, t in w.items())

    def unrolled(**options):
        w = hg.unroll(train, net, hparams, steps=10, lr=0.01, **options)
        return torch.autograd.grad(val(w), hparams)

    run = {
        "implicit": lambda: hg.hypergradient(val, train, net, hparams, hg.Neumann(9, alpha=0.01), engine="eager"),
        "unrolled": unrolled,
        "checkpointed": lambda: unrolled(checkpoint=True),
        "truncated": lambda: unrolled(last=1),
    }[kind]
    return peak(run)


def test_memory_of_ten_steps_against_the_implicit_hypergradient():
    """A CNN: what is kept for ten steps is at least three times what Neumann with nine products holds."""
    peaks = {kind: peak_of(kind) for kind in ("implicit", "unrolled", "checkpointed", "truncated")}
    print(peaks)
    assert peaks["unrolled"] >= 3 * peaks["implicit"] > 0, peaks
    assert 0 < peaks["checkpointed"] < peaks["unrolled"] / 3, peaks
    assert 0 < peaks["truncated"] < peaks["unrolled"] / 3, peaks
